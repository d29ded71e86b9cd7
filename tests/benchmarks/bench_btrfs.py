"""A step on btrfs: what it costs beside the bare calls, beside OBuilder's commands, and beside copies of the tree.

The disk is a loop device in memory; ours and theirs are on the same one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import storebackends
from storebackends import Store
from tests.capabilities import MIB, look, loop_fs, run

from .harness import Case, scratch
from .steps import COPIES, SIZES, at_once, beside_copies, each, filled, numbers, step


def cases() -> Iterator[Case]:
    """Nothing where there is no btrfs to be had, which is told."""
    for ability in ("btrfs", "btrfsutil"):
        if not (answer := look(ability)).usable:
            print(f"needs {ability}: {answer.reason}", file=sys.stderr)
            return
    for size in SIZES:
        with scratch() as memory, loop_fs("btrfs", memory, size=4096 * MIB) as disk:
            with _opened(disk / "none", size, "none") as store:
                yield from _beside_calls(disk, size, store)
                yield from beside_copies("btrfs", size, store, _base(store), disk / "copies", COPIES)
            with _opened(disk / "group", size, "group") as store:
                bare = partial(_calls, _base(store), disk / "bare")
                name = f"btrfs: step, {size:,} files, durability group"
                yield Case(name, each(partial(step, store)), each(bare), "the calls")


@contextmanager
def _opened(root: Path, size: int, durability: str) -> Iterator[Store]:
    """A store with a `base` of *size* files, on the disk already."""
    with storebackends.open_store(backend="btrfs", path=root, durability=durability) as store:
        store.build("base", filled(size)).release()
        os.sync()
        yield store


def _base(store: Store) -> Path:
    return store.root / "result" / "base" / "rootfs"


def _beside_calls(disk: Path, size: int, store: Store) -> Iterator[Case]:
    (bare := disk / "bare").mkdir()
    name, ours = f"btrfs: step, {size:,} files", partial(step, store)
    calls, commands = partial(_calls, _base(store), bare), partial(_commands, _base(store), bare)
    yield Case(name, each(ours), each(calls), "btrfsutil: snapshot, read-only; rename", at_most=1.25)
    yield Case(name, each(ours), each(commands), "btrfs subvolume snapshot; snapshot -r; delete", at_most=0.4)
    yield from at_once(name, store, calls)


def _calls(base: Path, bare: Path) -> None:
    import btrfsutil

    name = bare / f"{next(numbers)}"
    btrfsutil.create_snapshot(base, f"{name}.new")
    btrfsutil.set_subvolume_read_only(f"{name}.new", True)
    os.rename(f"{name}.new", name)


def _commands(base: Path, bare: Path) -> None:
    name = bare / f"{next(numbers)}"
    run("btrfs", "subvolume", "snapshot", base, f"{name}.new")
    run("btrfs", "subvolume", "snapshot", "-r", f"{name}.new", name)
    run("btrfs", "subvolume", "delete", f"{name}.new")
