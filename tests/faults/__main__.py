"""Fails each system call of a store's life, one at a time, by the preloaded shim.c.

    LD_PRELOAD=shim.so python -m tests.faults ROOT BACKEND OPTIONS ERRNO FIRST STEP

For each phase: the first call that it makes below the store fails, then in another try only the second, and so on until
the phase needs no more calls. Each time: what is raised is a StoreError that says why, what was there is whole, nothing
half done is to be seen, the same store goes on to work, and once it is opened again nothing is left.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import storebackends
from storebackends import BuildFailed, Busy, NoSpace, Result, Store, StoreError, Workspace
from storebackends.errors import explained
from tests.stores import descriptors, files, left_in_progress

CALLS = 2000
SPACE = {"copy_file_range", "ftruncate64", "mkdir", "rename", "sendfile64", "syncfs", "write"}
"""The calls that fail for want of space only, where they fail with that; others do when they make or read a file."""
FILES = {"kept": "of the base", "new": "of the child"}

Act = Callable[[Store], object]


class Shim:
    """The preloaded library."""

    def __init__(self, folder: Path, number: int) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fault_disarm.restype = ctypes.c_char_p
        self._folder, self._number = os.fsencode(folder), number

    def fail(self, call: int, act: Callable[[], object]) -> tuple[str, Exception | None]:
        """Fail one call of *act*; the name of the call, or "" if there were not so many, and what was raised."""
        error = None
        self._library.fault_arm(call, self._number, self._folder)
        try:
            act()
        except Exception as raised:  # noqa: BLE001 (judged by the caller)
            error = raised
        return self._library.fault_disarm().decode(), error


class Life:
    """One store, brought back to the same state for each try: `base`, `child` on it if it has one, and a cache."""

    def __init__(self, root: Path, backend: str, options: dict[str, Any], number: int) -> None:
        self._root, self._backend, self._options, self._number = root, backend, options, number
        self._shim = Shim(root, number)
        self._open().close()  # what it imports stays imported

    def _open(self) -> Store:
        return storebackends.open_store(backend=self._backend, path=self._root, durability="full", **self._options)

    def sweep(self, phase: str, first: int, step: int) -> Iterator[str]:
        """Every problem of a phase, with every so many-th call failing."""
        act, has_child = PHASES[phase]
        failed: Counter[str] = Counter()
        for number in range(first, CALLS, step):
            before = Counter(descriptors())
            store = self._open()
            self._prepare(store, has_child)
            if phase == "open":
                store.close()
                _crash(self._root)
                call, error = self._shim.fail(number, lambda: self._open().close())
            else:
                call, error = self._shim.fail(number, lambda store=store: act(store))  # type: ignore[misc]
            if phase in ("open", "close"):
                store = self._open()
            what = f"{phase}, call {number}, {call}: {type(error).__name__}: {error}"
            try:
                self._judge(store, phase, call, error)
                error = None
                store.close()
                self._judge_closed(before)
            except (AssertionError, StoreError, OSError) as problem:
                yield f"{what}\n    {type(problem).__name__}: {problem}"
            finally:
                store.close()
            if not call:
                print(phase, os.strerror(self._number), dict(failed))
                return
            failed[call] += 1
        yield f"{phase} makes more than {CALLS} calls"

    def _prepare(self, store: Store, has_child: bool) -> None:
        store.build("base", _base).release()
        if has_child:
            store.build("child", _child, base="base").release()
        else:
            store.delete("child")
        with store.cache("cache") as folder:
            (folder / "file").write_text("lent")

    def _judge(self, store: Store, phase: str, call: str, error: Exception | None) -> None:
        """In the store in which the call failed."""
        if error is not None:
            assert isinstance(error, StoreError), "it is no StoreError"
            # SQLite has words of its own for some of them.
            why = (os.strerror(self._number), "index.sqlite cannot be read")
            assert phase == "fail" or any(word in str(error) for word in why), "it does not say why"
            needs_space = self._number != errno.EIO and call in SPACE
            assert isinstance(error, NoSpace | BuildFailed) or not needs_space, "it is not NoSpace"
        there = store.result("child")
        if there:
            with there:
                _is_whole(there)
        if phase in ("build", "fail"):
            assert (there is None) == (error is not None), "the outcome and the result do not agree"
        with store.build("base", _base) as base:
            assert (base.outcome, files(base.path)) == ("hit", {"kept": FILES["kept"]})
        with store.cache("cache") as folder:
            assert (folder / "file").read_text() == "lent"
        with store.build("child", _child, base="base") as child:
            _is_whole(child)
        try:
            store.delete("base")
        except Busy:
            return
        raise AssertionError("the base of a result could be deleted")

    def _judge_closed(self, before: Counter[str]) -> None:
        gc.collect()  # with what the frames of an error had open
        # The one descriptor by which the process watches files stays for good.
        left = Counter(descriptors()) - before - Counter({"anon_inode:inotify": 1})
        assert not left, f"descriptors are left: {dict(left)}"
        self._open().close()
        assert left_in_progress(self._root) == []
        assert os.listdir(self._root / "loans") == []
        assert len(os.listdir(self._root / "caches" / "cache")) == 1


def _base(work: Workspace) -> None:
    (work.path / "kept").write_text(FILES["kept"])


def _child(work: Workspace) -> None:
    work.log.write(b"first\n")
    (work.path / "new").write_text(FILES["new"])
    (work.cache("cache") / "more").write_text("x")
    work.log.write(b"last\n")


def _failing(work: Workspace) -> None:
    _child(work)
    raise ValueError("meant to fail")


def _is_whole(child: Result) -> None:
    assert files(child.path) == FILES
    assert b"".join(child.log.tail()) == b"first\nlast\n"


def _crash(root: Path) -> None:
    """What a killed process left."""
    for folder in ("in-progress/dead~0123/rootfs", "loans/cache~0123/rootfs", "trash/old~0123", "scratch/0123"):
        (root / folder).mkdir(parents=True)
    for entry in ("in-progress/dead~0123", "loans/cache~0123"):
        name = entry.partition("/")[2].partition("~")[0]
        (root / entry / "build.json").write_text(json.dumps({"id": name, "attempt": "0123", "pid": 1}))
        (root / entry / "log").write_text("half a l")
        (root / entry / "rootfs" / "file").write_text("half a f")


def _hit(store: Store) -> None:
    with store.build("child", _child, base="base") as child, explained("reading", child.path):
        _is_whole(child)


def _borrow(store: Store) -> None:
    with store.cache("cache") as folder, explained("writing", folder):
        (folder / "other").write_text("x")


PHASES: dict[str, tuple[Act, bool]] = {
    "open": (lambda _: None, True),
    "build": (lambda store: store.build("child", _child, base="base").release(), False),
    "fail": (lambda store: store.build("child", _failing, base="base"), False),
    "hit": (_hit, True),
    "delete": (lambda store: store.delete("child"), True),
    "cache": (_borrow, True),
    "prune": (lambda store: store.prune(max_items=1), True),
    "close": (lambda store: store.close(), True),
}


def main(root: str, backend: str, options: str, number: str, first: str, step: str) -> int:
    logging.disable()  # what fails is logged, hundreds of times
    life = Life(Path(root), backend, json.loads(options), int(number))
    problems = [problem for phase in PHASES for problem in life.sweep(phase, int(first), int(step))]
    print(*problems, sep="\n")
    return len(problems) > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
