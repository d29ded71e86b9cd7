"""Snapshots that no entry names: what a result is read through, for as long as a process does.

    ROOT/views/NONCE    its record, locked by the process that uses it
    ROOT/mounts/NONCE   where it is mounted

The kernel ends the lock with the process, so a record that nobody has locked is of one that died.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

import fcntl  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import secrets  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import ExitStack, contextmanager, suppress  # noqa: E402
from pathlib import Path  # noqa: E402

from storebackends.plugin import StoreError  # noqa: E402

from .records import Tree  # noqa: E402

log = logging.getLogger(__name__)

_locked: set[int] = set()
"""The descriptors of all records that this process has locked."""


def _forget() -> None:
    # A forked child that kept them would keep the views of its parent when that is dead.
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_forget)


class Views:
    """Those of one open store. In a forked child what the parent shows stays as it is, and nothing new can be shown."""

    def __init__(self, folder: Path, show: Callable[[Tree, bool], Path], reclaim: Callable[[Tree], None]) -> None:
        """*show* makes and mounts a snapshot, writable or not; *reclaim* unmounts and removes it, idempotently."""
        self._folder, self._show, self._reclaim, self._pid = folder, show, reclaim, os.getpid()
        self._mutex = threading.RLock()  # re-entrant, since a result is also released by the garbage collector
        self._shared: dict[str, _Shared] = {}

    @contextmanager
    def shared(self, parent: str) -> Iterator[Path]:
        """The tree of the committed snapshot *parent*, read-only: one mount for all who read it in this process."""
        self._check()
        with self._mutex:
            view = self._shared.get(parent) or self._shared.setdefault(parent, _Shared())
            view.users += 1
        try:
            with view.lock:
                if view.path is None:
                    view.path = view.held.enter_context(self.own(parent))
            yield view.path
        finally:
            if self._pid == os.getpid():
                self._leave(parent, view)

    @contextmanager
    def own(self, parent: str | None, writable: bool = False) -> Iterator[Path]:
        """A snapshot made of *parent*, or an empty one, mounted for the length of the block."""
        self._check()
        tree = Tree(secrets.token_hex(8), parent)
        fd = self._claim(tree)
        try:
            yield self._show(tree, writable)
        finally:
            if self._pid == os.getpid():
                self._end(tree, fd, tree.nonce)

    def sweep(self) -> None:
        """Reclaim what dead processes left. Never waits."""
        for name in os.listdir(self._folder):
            try:
                fd = os.open(self._folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # ended meanwhile, or nothing of ours
                continue
            _locked.add(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _close(fd)
            else:
                self._end(Tree.load(self._folder / name), fd, name)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise StoreError("the store was opened before fork(): open it again in the child")

    def _leave(self, parent: str, view: _Shared) -> None:
        with self._mutex:
            view.users -= 1
            last = view.users == 0
            if last and self._shared.get(parent) is view:
                del self._shared[parent]
        if last:
            with view.lock:
                view.held.close()

    def _claim(self, tree: Tree) -> int:
        """Have the record of *tree* there, locked from the first moment that it has its name."""
        hidden = self._folder / f".{tree.nonce}"
        while True:
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _locked.add(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.truncate(fd, 0)
                os.write(fd, tree.dump())
                os.rename(hidden, self._folder / tree.nonce)
            except FileNotFoundError:  # another process swept it away before it was locked
                _close(fd)
            except BaseException:
                _close(fd)
                raise
            else:
                return fd

    def _end(self, tree: Tree | None, fd: int, name: str) -> None:
        try:
            if tree:
                self._reclaim(tree)
            with suppress(FileNotFoundError):
                os.unlink(self._folder / name)
        except (OSError, StoreError) as error:
            log.warning("%s is removed at the next open: %s", self._folder / name, error)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: a child on its way to exec may have a copy
            _close(fd)


class _Shared:
    """One mount, and how many use it."""

    def __init__(self) -> None:
        self.users, self.lock, self.held = 0, threading.RLock(), ExitStack()
        self.path: Path | None = None


def _close(fd: int) -> None:
    _locked.discard(fd)
    os.close(fd)
