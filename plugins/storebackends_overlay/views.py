"""Trees that are mounted to be read: one mount for all who look at the same tree in this process, undone with the last.

    ROOT/overlay/views/PID-NONCE/NAME   a tree, mounted read-only by that process

Whoever has views holds the `work` lock of overlay/PID-NONCE, which the kernel ends with the process. So a folder whose
lock can be had belongs to the dead, and its mounts are nobody's.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storebackends.plugin import Locks, mounts, trees

assert sys.platform == "linux", "overlayfs is a file system of Linux"  # noqa: S101 (tells the type checker, too)


class Views:
    """The views of one open store."""

    def __init__(self, room: str, locks: Locks) -> None:
        self._name, self._pid = f"{os.getpid()}-{secrets.token_hex(8)}", os.getpid()
        self.folder = f"{room}/{self._name}"
        self._lock = locks.try_work(_lock(self._name))
        os.mkdir(self.folder, 0o700)
        self._shown: dict[str, int] = {}  # how many look at each
        # A result's view may be ended by the garbage collector, which may strike in the midst of what is done here, in
        # this very thread: what is given back is queued, and seen to when that is over.
        self._left: deque[str] = deque()
        self._mutex, self._inside = threading.RLock(), False

    @contextmanager
    def show(self, name: str, mount: Callable[[str], None]) -> Iterator[str]:
        """The path of the view *name*, mounted by *mount* where nobody looks at it yet, for the length of the block."""
        with self._entered():
            point = f"{self.folder}/{name}"
            if name not in self._shown:
                with suppress(FileExistsError):  # it could not be removed after the last view
                    os.mkdir(point, 0o700)
                try:
                    mount(point)
                except BaseException:
                    unmount_and_remove(point)
                    raise
            self._shown[name] = self._shown.get(name, 0) + 1
        try:
            yield point
        finally:
            self._left.append(name)
            self._settle()

    def close(self) -> None:
        """End all views. Idempotent; in a forked child, where they are the parent's, it does nothing."""
        if self._lock and os.getpid() == self._pid:
            remove_all(self.folder)
            self._shown.clear()
            self._lock.release()
            self._lock = None

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._mutex:
            self._inside = True
            try:
                yield
            finally:
                self._inside = False
                self._settle()

    def _settle(self) -> None:
        """End what nobody looks at any more, unless this thread is at it, or this is a forked child."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            while self._left and not self._inside:
                self._inside = True
                try:
                    self._end(self._left.popleft())
                finally:
                    self._inside = False

    def _end(self, name: str) -> None:
        if name in self._shown:  # else close() was first
            self._shown[name] -= 1
            if not self._shown[name]:
                del self._shown[name]
                unmount_and_remove(f"{self.folder}/{name}")


def stale(room: str, locks: Locks) -> Iterator[str]:
    """The folders of those who died, each while nobody else can have it."""
    for name in os.listdir(room):
        if lock := locks.try_work(_lock(name)):
            with lock:
                if os.path.lexists(folder := f"{room}/{name}"):
                    yield folder


def unmount_and_remove(point: str) -> None:
    """Undo what is mounted on a folder, and remove that. Idempotent."""
    mounts.detach(point)
    try:
        os.rmdir(point)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        trees.remove(Path(point))  # somebody else had unmounted it, and it was written to since


def remove_all(folder: str) -> None:
    """Undo what is mounted in a folder, and remove all of that. Idempotent."""
    for point in mounts.below(folder):
        mounts.detach(point.path)
    trees.remove(Path(folder))


def _lock(name: str) -> str:
    return f"overlay/{name}"
