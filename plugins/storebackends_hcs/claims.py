"""Locks on records, which tell of two things whether they are still there: a process, and a ctr that it started.

A process that is killed leaves its ctr running, and what that makes may come after everybody has looked for it. So a
ctr that makes something gets the record of it, locked, as its standard input: the lock ends when the last of both has.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import fcntl  # noqa: E402
import io  # noqa: E402
import os  # noqa: E402
import struct  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402

_WHOLE_FILE = struct.Struct("@hhqqi0q")

_held: set[int] = set()
"""The descriptors of all claims of this process."""


def _forget() -> None:
    # A forked child that kept them would keep the claims of its parent when that is dead.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


class Life(io.FileIO):
    """A record, locked by the process that it is of, until close()."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "r+")
        _held.add(fd)

    def claim(self) -> bool:
        """Lock it; False where another process has it."""
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let go. Unlocked first: a child on its way to exec may have a copy of the descriptor."""
        if not self.closed:
            self._unlock()
            _held.discard(self.fileno())
        super().close()

    def _unlock(self) -> None:
        fcntl.flock(self.fileno(), fcntl.LOCK_UN)


class Call(Life):
    """The record of what a ctr is making, locked until close() and the end of that ctr, whoever has its Life."""

    def __init__(self, record: Path) -> None:
        super().__init__(os.open(record, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        self._lock(fcntl.F_WRLCK)

    def _unlock(self) -> None:
        self._lock(fcntl.F_UNLCK)

    def _lock(self, kind: int) -> None:
        # Of the open file, as flock() is, but a lock of another kind: so one file has both.
        fcntl.fcntl(self.fileno(), fcntl.F_OFD_SETLKW, _WHOLE_FILE.pack(kind, os.SEEK_SET, 0, 0, 0))


def await_calls(record: Path) -> None:
    """Wait until no ctr is making what *record* is of."""
    with suppress(FileNotFoundError):
        Call(record).close()
