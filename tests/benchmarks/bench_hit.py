"""A look-up that finds its result: the most frequent thing a store does."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from storebackends import Store
from tests.stores import open_copy, writes

from .harness import Case, microseconds_each, scratch

# What is compared are the locks that belong to an open file, which only Linux has.
assert sys.platform == "linux"

import fcntl  # noqa: E402

IDS = [f"app-{n}" for n in range(100)]
COUNT = 20 * len(IDS)
_FLOCK = struct.Struct("@hhqqi0q").pack(fcntl.F_RDLCK, os.SEEK_SET, 2**40, 1, 0)


def cases() -> Iterator[Case]:
    """A leased Result, released at once, beside the system calls it cannot do without."""
    with scratch() as folder, open_copy(folder / "store") as store:
        for id in IDS:
            store.build(id, writes()).release()
        paths = [str(folder / "store" / "result" / id) for id in IDS]
        yield Case(
            "hit",
            microseconds_each(COUNT, lambda: _ours(store)),
            microseconds_each(COUNT, lambda: _theirs(paths, folder / "lock")),
            "stat; open, lock and close of a byte",
            unit="µs",
            at_most=2.5,
            rounds=61,
        )


def _ours(store: Store) -> None:
    for _ in range(COUNT // len(IDS)):
        for id in IDS:
            if result := store.result(id):
                result.release()


def _theirs(paths: list[str], lock: Path) -> None:
    name = str(lock)
    for _ in range(COUNT // len(paths)):
        for path in paths:
            os.stat(path)
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK)
            os.close(descriptor)
