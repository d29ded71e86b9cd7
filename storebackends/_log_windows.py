"""A log's file where an open file forbids the rename of its folder: nothing is open but during a write or a read.

Portable calls only, so that every platform can use it, and test it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from . import renames

# Windows would translate line ends. A build can put a link or a FIFO in a log's place: neither followed nor waited for.
_FLAGS: int = sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"))


class Turnstile(Protocol):
    """What processes that read one log pass one by one, and who moves it holds."""

    def reading(self) -> AbstractContextManager[None]: ...

    def moving(self) -> AbstractContextManager[None]: ...


class PathReopen:
    """Each read opens the file where it is now, and closes it; a move waits for the read in flight, no other.

    *turnstile* does for the processes of a host what the two locks here do for threads.
    """

    def __init__(self, path: str | Path, turnstile: Turnstile | None = None) -> None:
        self.path, self._turns = path, turnstile
        self._writer = -1
        self._place = threading.Lock()  # held by a read or a move
        # A read passes it, a move holds it: so no read overtakes a move that waits.
        self._turnstile = threading.Lock()

    def create(self) -> None:
        self._writer = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o644)

    def write(self, data: memoryview, offset: int) -> int:
        os.lseek(self._writer, offset, os.SEEK_SET)
        return os.write(self._writer, data)

    def finish(self) -> None:
        writer, self._writer = self._writer, -1
        if writer >= 0:
            os.close(writer)

    def open(self) -> int:
        self.read(-1, 0, 0)  # a log that is gone is told of here, as by the siblings that keep a descriptor
        return -1

    def read(self, handle: int, offset: int, size: int) -> bytes:
        with self._turnstile:
            self._place.acquire()
        try:
            with self._turns.reading() if self._turns else nullcontext():
                file = _open(self.path, os.O_RDONLY | _FLAGS)
                try:
                    os.lseek(file, offset, os.SEEK_SET)
                    return os.read(file, size)
                finally:
                    os.close(file)
        finally:
            self._place.release()

    def close(self, handle: int) -> None:
        pass

    @contextmanager
    def moving(self) -> Iterator[None]:
        with self._turnstile, self._place, self._turns.moving() if self._turns else nullcontext():
            yield


_open = renames.patiently(os.open)  # its folder may just be on its way
