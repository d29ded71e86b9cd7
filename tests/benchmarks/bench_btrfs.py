"""A step on btrfs: what it costs beside the bare calls, beside OBuilder's commands, and beside copies of the tree.

Each disk is a loop device on whatever holds the temporary folder; ours and theirs are on the same one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import storebackends
from storebackends import Store, Workspace
from tests.capabilities import MIB, look, loop_fs, run
from tests.stores import kept

from .harness import Case, Figure, microseconds_each, milliseconds

STEPS = 10
COPIES = {
    "cp -a --reflink=always": ("cp", "-a", "--reflink=always"),
    "cp -a": ("cp", "-a", "--reflink=never"),
    "rsync -aH": ("rsync", "-aH"),
}
numbers = count()


def cases() -> Iterator[Case]:
    """Nothing where there is no btrfs to be had, which is told."""
    for ability in ("btrfs", "btrfsutil"):
        if not (answer := look(ability)).usable:
            print(f"needs {ability}: {answer.reason}", file=sys.stderr)
            return
    for size in (1000, 10_000):
        with tempfile.TemporaryDirectory() as room, loop_fs("btrfs", Path(room), size=4096 * MIB) as disk:
            with opened(disk / "none", size, "none") as store:
                yield from beside_calls(disk, size, store)
                yield from beside_copies(disk, size, store)
            with opened(disk / "group", size, "group") as store:
                bare = partial(calls, store.root / "result" / "base" / "rootfs", disk / "bare")
                name = f"btrfs: step, {size:,} files, durability group"
                yield Case(name, each(partial(step, store)), each(bare), "the calls")


@contextmanager
def opened(root: Path, size: int, durability: str) -> Iterator[Store]:
    """A store with a `base` of *size* files, on the disk already."""

    def fill(work: Workspace) -> None:
        for n in range(size):
            folder = work.path / f"{n // 100}"
            folder.mkdir(exist_ok=True)
            (folder / f"{n}").write_bytes(os.urandom(4000))

    with storebackends.open_store(backend="btrfs", path=root, durability=durability) as store:
        store.build("base", fill).release()
        os.sync()
        yield store


def beside_calls(disk: Path, size: int, store: Store) -> Iterator[Case]:
    base, bare = store.root / "result" / "base" / "rootfs", disk / "bare"
    bare.mkdir()
    name, ours = f"btrfs: step, {size:,} files", partial(step, store)
    calls_of_it, commands_of_it = partial(calls, base, bare), partial(commands, base, bare)
    yield Case(name, each(ours), each(calls_of_it), "btrfsutil: snapshot, read-only; rename", at_most=1.25)
    yield Case(name, each(ours), each(commands_of_it), "btrfs subvolume snapshot; snapshot -r; delete", at_most=0.4)
    for threads in (1, 2, 4, 8):
        with ThreadPoolExecutor(threads) as pool:
            many = f"{name}, {threads} at once"
            yield Case(many, each(ours, pool), each(calls_of_it, pool), "the calls, as many at once", rounds=9)


def beside_copies(disk: Path, size: int, store: Store) -> Iterator[Case]:
    base, copies = store.root / "result" / "base" / "rootfs", disk / "copies"
    copies.mkdir()
    for name, command in COPIES.items():
        theirs = timed(partial(copy, command, base, copies), shutil.rmtree)
        yield Case(f"btrfs: step, {size:,} files", each(partial(step, store)), theirs, name, rounds=3)
    yield Case(
        f"btrfs: look-up, {size:,} files",
        microseconds_each(1, lambda: kept(store, "base").release()),
        microseconds_each(1, lambda: os.stat(base)),
        "stat",
        unit="µs",
    )
    yield Case(
        f"btrfs: delete, {size:,} files",
        lambda: milliseconds(partial(store.delete, step(store)))(),
        lambda: milliseconds(partial(run, "rm", "-rf", copy(COPIES["cp -a --reflink=always"], base, copies)))(),
        "rm -rf of a copy",
        rounds=5,
    )


def each(one: Callable[[], object], pool: ThreadPoolExecutor | None = None) -> Figure:
    """The milliseconds that one of many takes, one after the other or by all threads of *pool*."""

    def figure() -> float:
        if pool is None:
            return milliseconds(lambda: [one() for _ in range(STEPS)])() / STEPS
        many = STEPS * 4
        return milliseconds(lambda: [done.result() for done in [pool.submit(one) for _ in range(many)]])() / many

    return figure


def timed(work: Callable[[], Path], undo: Callable[[Path], object]) -> Figure:
    """The milliseconds of *work*, not of undoing it."""

    def figure() -> float:
        made: list[Path] = []
        took = milliseconds(lambda: made.append(work()))()
        undo(made[0])
        return took

    return figure


def step(store: Store) -> str:
    id = f"step-{next(numbers)}"
    store.build(id, lambda _: None, base="base").release()
    return id


def calls(base: Path, bare: Path) -> None:
    import btrfsutil

    name = bare / f"{next(numbers)}"
    btrfsutil.create_snapshot(base, f"{name}.new")
    btrfsutil.set_subvolume_read_only(f"{name}.new", True)
    os.rename(f"{name}.new", name)


def commands(base: Path, bare: Path) -> None:
    name = bare / f"{next(numbers)}"
    run("btrfs", "subvolume", "snapshot", base, f"{name}.new")
    run("btrfs", "subvolume", "snapshot", "-r", f"{name}.new", name)
    run("btrfs", "subvolume", "delete", f"{name}.new")


def copy(command: tuple[str, ...], base: Path, copies: Path) -> Path:
    dest = copies / f"{next(numbers)}"
    dest.mkdir()
    run(*command, f"{base}/.", dest)
    return dest
