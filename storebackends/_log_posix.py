"""A log's file where an open file follows its inode: readers keep one descriptor, and a rename passes unseen."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ._log_windows import Turnstile
from .errors import NotSupported

# A build can put a link or a FIFO in a log's place; neither may be followed or waited for.
_FLAGS: int = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK"))
# Windows has neither, and __init__ refuses there.
_absent: Any = None
_pread: Callable[[int, int, int], bytes] = getattr(os, "pread", _absent)
_pwrite: Callable[[int, memoryview, int], int] = getattr(os, "pwrite", _absent)


class DupFd:
    """Reads go through a descriptor of their own, a copy of the writer's while there is one."""

    def __init__(
        self, path: str | Path, turnstile: Turnstile | None = None
    ) -> None:  # nobody has to wait his turn here
        if not hasattr(os, "pread"):
            raise NotSupported("reading a log by descriptor", "an open file forbids a rename", "use PathReopen")
        self.path = path
        self._writer = -1
        self._place = threading.Lock()  # held while the path is followed or changes

    def create(self) -> None:
        self._writer = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o644)

    def write(self, data: memoryview, offset: int) -> int:
        return _pwrite(self._writer, data, offset)

    def finish(self) -> None:
        writer, self._writer = self._writer, -1
        if writer >= 0:
            os.close(writer)

    def open(self) -> int:
        with self._place:
            return os.dup(self._writer) if self._writer >= 0 else os.open(self.path, os.O_RDONLY | _FLAGS)

    def read(self, handle: int, offset: int, size: int) -> bytes:
        return _pread(handle, size, offset)

    def close(self, handle: int) -> None:
        if handle >= 0:
            os.close(handle)

    def moving(self) -> AbstractContextManager[object]:
        return self._place
