"""Clones of trees of many files, on file systems that share blocks; each beside what one would type."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

from storebackends import trees
from storebackends.entries import EntryBackend
from storebackends_copy import CopyOptions
from storebackends_copy.driver import CopyBackend
from storebackends_rsync import RsyncOptions
from storebackends_rsync.driver import RsyncBackend
from tests.capabilities import MIB, look, loop_fs

from .harness import Case, scratch, seconds

ROUNDS = {1000: 15, 10_000: 5}
SIZES = (0, 500, 3000, 10_000, 60_000)
FOLDER = 40  # files in each


def cases() -> Iterator[Case]:
    """On a disk in memory, so that what is measured is the work and not the disk."""
    for kind in ("xfs", "btrfs"):
        if not (answer := look(kind)).usable:
            print(f"no clones on {kind}: {answer.reason}", file=sys.stderr)
            continue
        with scratch() as memory, loop_fs(kind, memory, 4096 * MIB) as disk:
            for files, rounds in ROUNDS.items():
                copy = CopyBackend(disk / f"copy-{files}", CopyOptions(reflink="always"), "uuid")
                with _base(copy, files) as base:
                    yield Case(
                        f"copy: clone {files} files on {kind}",
                        _build(copy),
                        _plain(base, lambda base, copy: _run("cp", "-a", "--reflink=always", base, copy)),
                        "cp -a --reflink=always",
                        at_most=1.0,
                        rounds=rounds,
                    )
                rsync = RsyncBackend(disk / f"rsync-{files}", RsyncOptions(), "uuid")
                with _base(rsync, files) as base:
                    yield Case(
                        f"rsync: clone and publish {files} files on {kind}",
                        _build(rsync, publish=True),
                        _plain(base, _rsync_and_mv),
                        "rsync -aHq, mv",
                        at_most=0.9,
                        rounds=rounds,
                    )


@contextmanager
def _base(backend: EntryBackend, files: int) -> Iterator[Path]:
    """The tree of a result called base."""
    backend.root.mkdir()
    backend.open()
    tree, rng = backend.tree(backend.build("base", None, "attempt")), Random(files)
    for n in range(files):
        folder = tree / f"{n // FOLDER % 20}" / f"{n // FOLDER}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{n}").write_bytes(rng.randbytes(rng.choice(SIZES)))
    backend.rename("base")
    _run("sync")
    yield backend.root / "result" / "base" / "rootfs"
    backend.close()
    trees.remove(backend.root)


def _build(backend: EntryBackend, *, publish: bool = False) -> Callable[[], float]:
    """A step of the backend, without what the store does above it; it is removed outside of the time."""
    ids = (f"child-{n}" for n in count())

    def figure() -> float:
        id = next(ids)
        works = [partial(backend.build, id, "base", "attempt"), *([partial(backend.rename, id)] if publish else [])]
        took = 1e3 * seconds(*works)
        backend.delete(id) if publish else backend.discard(id, "attempt")
        return took

    return figure


def _plain(base: Path, copy: Callable[[Path, Path], object]) -> Callable[[], float]:
    dest = base.parents[2] / "plain"

    def figure() -> float:
        took = 1e3 * seconds(partial(copy, base, dest))
        trees.remove(dest)
        return took

    return figure


def _rsync_and_mv(base: Path, dest: Path) -> None:
    """As OBuilder does it."""
    part = dest.with_name("part")
    _run("rsync", "-aHq", f"{base}/", f"{part}/")
    _run("mv", part, dest)


def _run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True)
