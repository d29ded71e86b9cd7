"""A step on an overlay store: beside its system calls alone, and beside containerd's snapshotter of that name."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import storebackends
from storebackends import Store
from storebackends.ids import new_attempt
from storebackends_overlay import probe
from tests.capabilities import look
from tests.containerd import running
from tests.stores import writes

from .harness import Case, microseconds_each, milliseconds, scratch
from .steps import COPIES, SIZES, at_once, beside_copies, filled, step

COUNT = 50
_libc = ctypes.CDLL(None, use_errno=True)


def cases() -> Iterator[Case]:
    """Builds on a base of two layers. What this machine cannot do is passed over, with the reason."""
    with scratch() as folder:
        if not (support := probe(folder)).usable:
            _skip("overlay", support.reason)
            return
        for size in SIZES:
            with storebackends.open_store(backend="overlay", path=folder / f"{size}", durability="none") as store:
                store.build("first", filled(size)).release()
                store.build("base", writes(g="1"), base="first").release()
                yield from _beside_calls(size, store, folder / f"bare-{size}")
                with store.use("base") as base:
                    commands = [command for command in COPIES if "reflink" not in command]  # there are none on tmpfs
                    yield from beside_copies("overlay", size, store, base.path, folder / f"copies-{size}", commands)
                if size == SIZES[0]:
                    yield from _beside_containerd(store, folder / "containerd")


def _beside_calls(size: int, store: Store, folder: Path) -> Iterator[Case]:
    ids = (f"child-{n}" for n in count())
    layers = [_upper(store, "base"), _upper(store, "first"), store.root / "overlay" / "empty"]
    bare = microseconds_each(COUNT, lambda: _bare(folder, layers, COUNT))
    for name, work, gate in (("clone, seal and rename", _step, 3), ("step", _build, None)):
        ours = microseconds_each(COUNT, partial(_repeat, work, store, ids))
        yield Case(f"overlay: {name}, {size:,} files", ours, bare, "mount, umount, rename", unit="µs", at_most=gate)
    rooms = (folder / f"{n}" for n in count())
    yield from at_once(f"overlay: step, {size:,} files", store, lambda: _bare(next(rooms), layers, 1))


def _beside_containerd(store: Store, folder: Path) -> Iterator[Case]:
    if not (answer := look("containerd")).usable:
        _skip("overlay beside containerd", answer.reason)
        return
    folder.mkdir()
    with running(folder) as daemon:
        ctr = partial(daemon.ctr, "snapshots", "--snapshotter", "overlayfs")
        ctr("prepare", "k")
        ctr("commit", "base", "k")
        yield Case(
            "overlay: step, and its deletion",
            milliseconds(lambda: store.delete(step(store))),
            milliseconds(lambda: _snapshot(ctr)),
            "ctr snapshots prepare, commit, rm",
            at_most=0.1,
        )


def _skip(what: str, reason: str) -> None:
    print(f"{what}: passed over, {reason}", file=sys.stderr)


def _upper(store: Store, id: str) -> Path:
    (upper,) = (store.root / "result" / id).glob("upper~*")
    return upper


def _repeat(step: Callable[[Store, str], None], store: Store, ids: Iterator[str]) -> None:
    for _ in range(COUNT):
        step(store, next(ids))


def _step(store: Store, id: str) -> None:
    """What the backend does for a build."""
    store._backend.build(id, "base", new_attempt())
    store._backend.rename(id)


def _build(store: Store, id: str) -> None:
    store.build(id, writes(), base="base").release()


def _bare(folder: Path, layers: list[Path], times: int) -> None:
    """Nothing but the calls, on the same layers and on folders that are there already."""
    names = ("upper", "work", "tree", "entry")
    upper, work, tree, entry = (str(folder / name) for name in names)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={':'.join(map(str, layers))},upperdir={upper},workdir={work}".encode()
    for _ in range(times):
        assert _libc.mount(b"overlay", tree.encode(), b"overlay", ctypes.c_ulong(0), options) == 0
        assert _libc.umount2(tree.encode(), 0) == 0
        os.rename(entry, f"{entry}~")
        os.rename(f"{entry}~", entry)


def _snapshot(ctr: Callable[..., object]) -> None:
    ctr("prepare", "key", "base")
    ctr("commit", "result", "key")
    ctr("rm", "result")
