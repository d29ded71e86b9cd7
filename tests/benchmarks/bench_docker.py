"""A step of a docker store beside the daemon's own way to keep a tree: an image, committed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import storebackends
from storebackends import Workspace
from storebackends.process import tool
from tests.capabilities import MIB, look, loop_fs
from tests.dockerd import IMAGE, Dockerd, dockerd

from .harness import Case, milliseconds, scratch

FILES = 1000


def cases() -> Iterator[Case]:
    """On a base of 1,000 files, with nothing done in it: clone and publish, or create, commit, rm and rmi.

    What the daemon keeps is in memory: where a clone is made of reflinks, and where it is a copy.
    """
    if not (answer := look("docker")).usable:
        print(f"nothing of docker is measured: {answer.reason}", file=sys.stderr)
        return
    for kind in ("xfs", "ext4"):
        if look(kind).usable:
            with scratch() as memory, loop_fs(kind, memory, 4096 * MIB) as disk, dockerd("overlay2", disk) as daemon:
                yield from _steps(kind, memory, daemon)


def _steps(kind: str, folder: Path, daemon: Dockerd) -> Iterator[Case]:
    options: dict[str, Any] = {"host": daemon.host, "durability": "none", "access": "host"}
    with storebackends.open_store(backend="docker", path=folder / "store", **options) as store:
        store.build("base", _fill).release()
        _image(daemon, folder)
        ids = (f"step-{number}" for number in count())
        yield Case(
            f"docker: step, {FILES:,} files, volumes on {kind}",
            milliseconds(lambda: store.build(next(ids), lambda work: None, base="base").release()),
            milliseconds(lambda: _commit(daemon)),
            "docker create, commit, rm, rmi",
            at_most=0.5,
            rounds=11,
        )
        for id in [id for id in store.ids() if id != "base"]:
            store.delete(id)
        store.delete("base")


def _fill(work: Workspace) -> None:
    _write(work.path)


def _write(folder: Path) -> None:
    for number in range(FILES):
        (folder / str(number % 20)).mkdir(exist_ok=True)
        (folder / str(number % 20) / str(number)).write_bytes(b"x" * 2000)


def _image(daemon: Dockerd, folder: Path) -> None:
    """One like the base."""
    (folder / "files").mkdir()
    _write(folder / "files")
    daemon("create", "--name", "box", IMAGE, "true")
    daemon("cp", f"{folder}/files", "box:/files")
    daemon("commit", "box", "files")
    daemon("rm", "box")


def _commit(daemon: Dockerd) -> None:
    def docker(*words: str) -> None:
        tool(["docker", "--host", daemon.host, *words])

    docker("create", "--name", "step", "files", "true")
    docker("commit", "step", "step")
    docker("rm", "step")
    docker("rmi", "step")
