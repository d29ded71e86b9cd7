"""A step with a function that does nothing, a look-up and a deletion, beside what one would type to copy a tree."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

from storebackends import Store, Workspace
from tests.capabilities import run
from tests.stores import kept

from .harness import Case, Figure, microseconds_each, milliseconds

SIZES = (1000, 10_000)
"""How many files a base has."""

COPIES = {
    "cp -a --reflink=always": ("cp", "-a", "--reflink=always"),
    "cp -a": ("cp", "-a", "--reflink=never"),
    "rsync -aH": ("rsync", "-aH"),
}
_STEPS = 10
numbers = count()


def filled(size: int) -> Callable[[Workspace], None]:
    """A function that makes *size* files of 4 kB, a hundred in each folder."""

    def fill(work: Workspace) -> None:
        for n in range(size):
            folder = work.path / f"{n // 100}"
            folder.mkdir(exist_ok=True)
            (folder / f"{n}").write_bytes(os.urandom(4000))

    return fill


def step(store: Store) -> str:
    """Build something on `base`, and return its id."""
    id = f"step-{next(numbers)}"
    store.build(id, lambda _: None, base="base").release()
    return id


def each(one: Callable[[], object], pool: ThreadPoolExecutor | None = None) -> Figure:
    """The milliseconds that one of many takes, one after the other or by all threads of *pool*."""

    def figure() -> float:
        if pool is None:
            return milliseconds(lambda: [one() for _ in range(_STEPS)])() / _STEPS
        many = _STEPS * 4
        return milliseconds(lambda: [done.result() for done in [pool.submit(one) for _ in range(many)]])() / many

    return figure


def at_once(name: str, store: Store, bare: Callable[[], object]) -> Iterator[Case]:
    """1, 2, 4 and 8 steps at once, beside as many times the bare calls."""
    for threads in (1, 2, 4, 8):
        with ThreadPoolExecutor(threads) as pool:
            ours, theirs = each(partial(step, store), pool), each(bare, pool)
            yield Case(f"{name}, {threads} at once", ours, theirs, "the calls, as many at once", rounds=9)


def beside_copies(
    name: str, size: int, store: Store, base: Path, copies: Path, commands: Iterable[str]
) -> Iterator[Case]:
    """A step, a look-up and a deletion; the copies are of the tree *base*, made in *copies* by *commands*."""
    copies.mkdir()
    for command in commands:
        theirs = _timed(partial(_copy, command, base, copies), shutil.rmtree)
        yield Case(f"{name}: step, {size:,} files", each(partial(step, store)), theirs, command, rounds=3)
    yield Case(
        f"{name}: look-up, {size:,} files",
        microseconds_each(1, lambda: kept(store, "base").release()),
        microseconds_each(1, lambda: os.stat(base)),
        "stat",
        unit="µs",
    )
    yield Case(
        f"{name}: delete, {size:,} files",
        lambda: milliseconds(partial(store.delete, step(store)))(),
        lambda: milliseconds(partial(run, "rm", "-rf", _copy(command, base, copies)))(),
        "rm -rf of a copy",
        rounds=5,
    )


def _timed(work: Callable[[], Path], undo: Callable[[Path], object]) -> Figure:
    """The milliseconds of *work*, not of undoing it."""

    def figure() -> float:
        made: list[Path] = []
        took = milliseconds(lambda: made.append(work()))()
        undo(made[0])
        return took

    return figure


def _copy(command: str, base: Path, copies: Path) -> Path:
    dest = copies / f"{next(numbers)}"
    dest.mkdir()
    run(*COPIES[command], f"{base}/.", dest)
    return dest
