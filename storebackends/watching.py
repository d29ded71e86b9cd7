"""Waiting for files to change: inotify where there is one, a patient poll elsewhere.

One inotify descriptor and one thread serve every `Signal` of the process, so that a thousand waiters cost nothing while
nothing happens. A wake-up is a hint to look again, never a fact; the poll is the net below it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Iterable
from typing import Self

log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between two looks where the platform tells of no change."""
NET = 2.0
"""Seconds after which one looks again all the same where it does."""
LOOKS = 50
"""So many of these a second are enough for all who wait in a process: the more they are, the more seldom each looks."""
PACE = 0.01
"""Seconds in which changes gather, after one that was told of at once."""

_CLOSE_WRITE, _MODIFY, _MOVE_SELF, _MASK_ADD, _IGNORED, _OVERFLOW = 0x8, 0x2, 0x800, 0x20000000, 0x8000, 0x4000
_CLOEXEC = 0o2000000
_EVENT = struct.Struct("iIII")


class Signal:
    """Wakes one waiting thread when a watched file is written, moved, or closed by a writer; a context manager."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._event = threading.Event()
        self._watches: set[int] = set()
        self._told = True  # of every change; else it has to poll
        for path in paths:
            self.add(path)

    def add(self, path: str | os.PathLike[str]) -> None:
        """Watch *path* as well. A file that is gone, or cannot be watched, is looked at by polling."""
        watch = _watcher.add(self, os.fspath(path))
        if watch is None:
            self._told = False
        else:
            self._watches.add(watch)

    def set(self) -> None:
        """Wake the waiter now, from any thread."""
        self._event.set()

    def wait(self, longest: float | None = None) -> None:
        """Return at a change since the last call, or for another look; at most *longest* seconds later."""
        _asleep.add(self)
        try:
            due = max(NET, len(_asleep) / LOOKS) if self._told else POLL
            self._event.wait(due if longest is None else min(longest, due))
        finally:
            _asleep.discard(self)
        self._event.clear()

    def close(self) -> None:
        """Watch nothing any more. Idempotent."""
        while self._watches:
            _watcher.remove(self, self._watches.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_asleep: set[Signal] = set()


class _Watcher:
    """The process's one inotify descriptor, made when first needed, and the thread that reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._signals: dict[int, set[Signal]] = {}
        self._descriptor: int | None = None
        self._broken = sys.platform != "linux"

    def add(self, signal: Signal, path: str) -> int | None:
        """Have *signal* woken by changes of *path*; None where that cannot be."""
        with self._lock:
            if (descriptor := self._open()) is None:
                return None
            mask = _CLOSE_WRITE | _MODIFY | _MOVE_SELF | _MASK_ADD
            watch: int = _libc().inotify_add_watch(descriptor, os.fsencode(path), mask)
            if watch < 0:
                return None
            self._signals.setdefault(watch, set()).add(signal)
            return watch

    def remove(self, signal: Signal, watch: int) -> None:
        """Undo add()."""
        with self._lock:
            signals = self._signals.get(watch)
            if signals is None:
                return  # the file was deleted, or this is a forked child
            signals.discard(signal)
            if not signals:
                del self._signals[watch]
                _libc().inotify_rm_watch(self._descriptor, watch)

    def forget(self) -> None:
        """In a forked child: the thread is not there, and the descriptor is the parent's."""
        descriptor, lost = self._descriptor, self._signals
        self.__init__()  # type: ignore[misc]
        _asleep.clear()
        if descriptor is not None:
            os.close(descriptor)
        for signals in lost.values():
            for signal in signals:
                signal._watches.clear()
                signal._told = False

    def _open(self) -> int | None:
        if self._descriptor is None and not self._broken:
            descriptor = _libc().inotify_init1(_CLOEXEC)
            if descriptor < 0:
                self._broken = True
                reason = os.strerror(ctypes.get_errno())
                log.warning("changes are polled for: inotify: %s; raise fs.inotify.max_user_instances", reason)
                return None
            self._descriptor = descriptor
            threading.Thread(target=self._read, args=(descriptor,), name="storebackends-inotify", daemon=True).start()
        return self._descriptor

    def _read(self, descriptor: int) -> None:
        while self._descriptor == descriptor:
            try:
                data = os.read(descriptor, 1 << 16)
            except OSError as error:
                if error.errno == errno.EBADF:
                    return
                raise
            self._tell(data)
            time.sleep(PACE)  # a busy writer is followed in strides; the kernel merges what comes meanwhile

    def _tell(self, data: bytes) -> None:
        at = 0
        woken: set[int] = set()
        with self._lock:
            while at < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size + length
                woken.update(self._signals if mask & _OVERFLOW else (watch,))
                if mask & _IGNORED:
                    for signal in self._signals.pop(watch, ()):
                        signal._watches.discard(watch)
                        signal._told = False  # the file is gone; another may take its place
                        signal.set()
            for watch in woken:
                for signal in self._signals.get(watch, ()):
                    signal.set()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_watcher = _Watcher()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watcher.forget)
