"""Stores for tests, and functions to build with."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import storebackends
from storebackends import Result, Store, Workspace

WAIT = 60.0
"""Seconds that anything may take on a machine busy with other things; reached only by a failure."""


def open_copy(root: Path, **options: Any) -> Store:
    """A throw-away store of plain copies."""
    return storebackends.open_store(backend="copy", path=root, durability="none", **options)


def writes(**files: str) -> Callable[[Workspace], None]:
    """A function that writes these files into its tree, and their names into its log."""

    def fn(work: Workspace) -> None:
        for name, text in files.items():
            (work.path / name).write_text(text)
            work.log.write(name.encode() + b"\n")

    return fn


def kept(store: Store, id: str) -> Result:
    """The result of *id*, which must be there."""
    result = store.result(id)
    assert result is not None, f"there is no result {id}"
    return result


def files(tree: Path) -> dict[str, str]:
    """The regular files of a tree."""
    return {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*") if path.is_file()}


def left_in_progress(root: Path) -> list[str]:
    """What is unfinished, in the trash or in scratch."""
    return [name for part in ("in-progress", "trash", "scratch") for name in os.listdir(root / part)]


def until(ready: Callable[[], object]) -> None:
    """Look until *ready*, which only another process can bring about; fail after WAIT seconds."""
    pause = threading.Event()
    for _ in range(int(WAIT / 0.02)):
        if ready():
            return
        pause.wait(0.02)
    raise AssertionError("it did not come about in time")


def python(program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start a Python program with this project importable, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def descriptors() -> Iterator[str]:
    """The paths this process has open."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
