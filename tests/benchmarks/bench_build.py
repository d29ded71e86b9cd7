"""Builds that do nothing: what a build costs beside the work it is for."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

from storebackends import Store
from tests.stores import open_copy, writes

from .harness import Case, microseconds_each, scratch

COUNT, ROUNDS = 1000, 10
_RECORD = b"x" * 220  # as long as that of a build which says nothing
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # by the bare calls: open() makes three more for each file


def cases() -> Iterator[Case]:
    """Ten thousand in a row, each beside the least that leaves a folder under a name and a row in a table."""
    with scratch() as folder, open_copy(folder / "store") as store, closing(_database(folder)) as database:
        ids = (f"app-{n}" for n in count())
        _build(store, ids)
        descriptors, memory = _descriptors(), _memory()
        yield Case(
            "trivial build",
            microseconds_each(COUNT, lambda: _build(store, ids)),
            microseconds_each(COUNT, lambda: _plain(folder / "plain", database, ids)),
            "mkdir, create 2 files and write a record, rename, insert in a batch",
            unit="µs",
            at_most=4,
            rounds=ROUNDS,
        )
        yield _left("descriptors left by 10,000 builds", _descriptors() - descriptors, "", at_most=0)
        yield _left("memory left by 10,000 builds", (_memory() - memory) / 1024, "MiB", at_most=3)


def _left(name: str, figure: float, unit: str, at_most: float) -> Case:
    return Case(name, lambda: figure, unit=unit, at_most=at_most, rounds=1, warm_up=False)


def _build(store: Store, ids: Iterator[str]) -> None:
    nothing = writes()
    for _ in range(COUNT):
        store.build(next(ids), nothing).release()


def _plain(folder: Path, database: sqlite3.Connection, ids: Iterator[str]) -> None:
    rows = []
    for _ in range(COUNT):
        id = next(ids)
        build, result = f"{folder}/in-progress/{id}", f"{folder}/result/{id}"
        os.mkdir(build)
        os.close(os.open(f"{build}/log", _NEW))
        record = os.open(f"{build}/build.json", _NEW)
        os.write(record, _RECORD)
        os.close(record)
        os.rename(build, result)
        rows.append((id, "attempt", None, 0.0, 0.0))
    with database:
        database.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?)", rows)


def _database(folder: Path) -> sqlite3.Connection:
    for name in ("in-progress", "result"):
        os.makedirs(folder / "plain" / name)
    database = sqlite3.connect(folder / "plain" / "index.sqlite")
    database.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
        "CREATE TABLE results (id TEXT PRIMARY KEY, attempt TEXT, base TEXT, created REAL, used REAL) WITHOUT ROWID;"
    )
    return database


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory() -> int:
    """In KiB, now."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
