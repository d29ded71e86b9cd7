"""A log's file where an open file follows its inode: readers keep one descriptor, and a rename passes unseen."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import NotSupported

# A build can put a link or a FIFO in a log's place; neither may be followed or waited for.
_FLAGS: int = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK"))


class DupFd:
    """Reads go through a descriptor of their own, opened with the log; only opening needs to know the path."""

    def __init__(self, path: Path) -> None:
        if not hasattr(os, "pread"):
            raise NotSupported("reading a log by descriptor", "an open file forbids a rename", "use PathReopen")
        self.path = path
        self._writer = -1
        self._place = threading.Lock()  # held while the path is followed or changes

    def create(self) -> None:
        self._writer = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o644)

    def write(self, data: memoryview, offset: int) -> int:
        assert sys.platform != "win32"  # noqa: S101 (for the type checker; __init__ refused)
        return os.pwrite(self._writer, data, offset)

    def finish(self) -> None:
        writer, self._writer = self._writer, -1
        if writer >= 0:
            os.close(writer)

    def open(self) -> int:
        with self._place:
            return os.open(self.path, os.O_RDONLY | _FLAGS)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        assert sys.platform != "win32"  # noqa: S101 (as in write)
        return os.pread(handle, size, offset)

    def close(self, handle: int) -> None:
        if handle >= 0:
            os.close(handle)

    @contextmanager
    def moving(self) -> Iterator[None]:
        with self._place:
            yield
