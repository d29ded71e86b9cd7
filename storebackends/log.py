"""The log of a build: written once, read by anyone, at any time, also while its folder is renamed.

Bytes in, the same bytes out, at offsets that never change; finish() fixes the length and no reader goes past it.

    open -> finished -> closed      a build's log: create(), finish(), close()
    saved                           one that is on the disk already

All readers of a log share one source: its file, and the chunks last read from it. It is there while there are readers;
whoever is last lets the descriptor go. (The log of another process's build keeps it until close(), or it might lose
the file before anybody reads.) How the file is read across a rename of its
folder is the strategy's: by a descriptor that follows the inode, or by opening the path anew for each read.
"""

from __future__ import annotations

import copy
import errno
import os
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from ._log_posix import DupFd
from ._log_windows import PathReopen, Turnstile
from .errors import NoSpace, NotFound, StoreError

_CHUNK = 1 << 20
"""Chunks end at multiples of this, so that readers who began apart come to share them."""
_CHUNKS = 64
"""At most so many are kept, and no more than there are readers: a crowd draws out, one alone needs none."""
_PACE = 0.05
"""Seconds between two wake-ups of the readers that caught up with a busy writer."""

State = Literal["open", "finished", "closed", "saved"]


class Strategy(Protocol):
    """One log's file, for one writer at a time; raises OSError.

    A handle is what open() gave: a descriptor, or -1 where none is kept.
    """

    path: str | Path

    def __init__(self, path: str | Path, turnstile: Turnstile | None = None) -> None: ...

    def create(self) -> None:
        """Create the file, which must not exist, and open it for writing."""

    def write(self, data: memoryview, offset: int) -> int:
        """Write at *offset*; return how many bytes were."""

    def finish(self) -> None:
        """Close what create() opened. Idempotent; takes no lock, since a forked child calls it too."""

    def open(self) -> int:
        """Get ready to read what create() made, or the file that is at the path now. Not while finish() is called."""

    def read(self, handle: int, offset: int, size: int) -> bytes:
        """At most *size* bytes from *offset*; none where the file ends."""

    def close(self, handle: int) -> None:
        """Let go of what open() gave. Takes no lock."""

    def moving(self) -> AbstractContextManager[object]:
        """Hold back all that follows the path, and keep nothing open that would forbid the rename."""


# The log's only platform test. Both import everywhere, so tests can force either.
NATIVE: type[Strategy] = PathReopen if sys.platform == "win32" else DupFd


class Move:
    """Where the log went; see BuildLog.moving()."""

    target: str | Path | None = None

    def to(self, path: str | os.PathLike[str]) -> None:
        """Tell the log its new path."""
        self.target = _absolute(path)


class BuildLog:
    """One log. Every method may be called from any thread. Made by create() or saved()."""

    def __init__(self, strategy: Strategy, state: State, length: int) -> None:
        self._strategy, self._state, self._length = strategy, state, length
        self._kept: _Source | None = None
        self._shared: weakref.ref[_Source] | None = None
        self._opening = threading.Lock()
        self._writing = threading.Lock()
        self._waiters = _Waiters()
        self._forked = False
        self._error: StoreError | None = None
        self._locate: Callable[[], Path | None] | None = None
        _logs.add(self)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        strategy: type[Strategy] | None = None,
        turnstile: Turnstile | None = None,
    ) -> Self:
        """Begin the log of a build at *path*. StoreError if something is there already.

        *turnstile* is the log's own among processes, where others follow it.
        """
        file = (strategy or NATIVE)(_absolute(path), turnstile)
        try:
            file.create()
        except OSError as error:
            raise _failure("create", file.path, error) from error
        return cls(file, "open", 0)

    @classmethod
    def saved(
        cls, path: str | os.PathLike[str], *, length: int | None = None, strategy: type[Strategy] | None = None
    ) -> Self:
        """The log at *path*, which grows no more: its first *length* bytes, or all. NotFound if it is not there.

        Holds no descriptor but while it has readers.
        """
        file = (strategy or NATIVE)(_absolute(path))
        try:
            found = os.lstat(file.path)
        except OSError as error:
            raise _failure("read", file.path, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"cannot read the log {file.path}: it is not a regular file; something replaced it")
        return cls(file, "saved", found.st_size if length is None else length)

    @classmethod
    def elsewhere(
        cls,
        path: str | os.PathLike[str],
        locate: Callable[[], Path | None],
        *,
        strategy: type[Strategy] | None = None,
        turnstile: Turnstile | None = None,
    ) -> Self:
        """The log at *path*, which another process writes: grew() and settled() tell what it does. NotFound.

        *locate* finds it where it has just been moved by that process, which settled() will tell of later.
        """
        log = cls((strategy or NATIVE)(_absolute(path), turnstile), "open", 0)
        log._kept, log._locate = log._source(), locate
        return log

    def grew(self, length: int) -> None:
        """Another process has written up to *length*."""
        if length > self._length and self._state == "open":
            self._length = length
            self._waiters.grown()

    def settled(self, length: int, path: Path, error: StoreError | None = None) -> None:
        """Another process has finished it: it is at *path* now. Followers end there, with *error* if there is one."""
        with self._strategy.moving():
            self._strategy.path = path
        with self._writing:
            self._length, self._error = length, error
            self._state = "finished"
        self._waiters.wake()
        self.close()

    @property
    def error(self) -> StoreError | None:
        """What followers end with after the last byte: the build has no outcome, or none that can be learnt here."""
        return self._error

    @property
    def path(self) -> Path:
        """Where the log is now."""
        path = self._strategy.path
        return path if isinstance(path, Path) else Path(path)

    @property
    def length(self) -> int:
        """How many bytes it has: so far, or for good once the state is not "open"."""
        return self._length

    @property
    def state(self) -> State:
        return self._state

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append *data* and let the readers know. StoreError once the log is finished; NoSpace if the disk is full.

        After an error the log ends with the last byte that was written.
        """
        self._check_process()
        with self._writing:
            if self._state != "open":
                raise StoreError(f"cannot write to the log {self.path}: it is {self._state}")
            rest = memoryview(data).cast("B")
            while rest:
                try:
                    written = self._strategy.write(rest, self._length)
                except OSError as error:
                    raise _failure("write", self.path, error) from error
                rest = rest[written:]
                self._length += written
                self._waiters.grown()

    def finish(self) -> int:
        """Fix the length and return it; readers end there. Idempotent."""
        self._check_process()
        with self._writing:
            if self._state == "open":
                try:
                    self._strategy.finish()
                except OSError as error:
                    raise _failure("write", self.path, error) from error
                finally:
                    self._state = "finished"
                    self._waiters.wake()
        return self._length

    def close(self) -> None:
        """Finish, and let go of the file once the readers there are have reached their end. Idempotent.

        tail() still works: it opens the file again, by its path.
        """
        try:
            self.finish()
        finally:
            self._kept = None
        if self._state == "finished":
            self._state = "closed"

    def tail(self, start: int = 0, follow: bool = True) -> LogReader:
        """Read from offset *start*, or from -*start* bytes before the end as it is now.

        With *follow* the reader waits for more until the log is finished; else it ends at the present end. NotFound
        if the file has to be opened and is gone.
        """
        self._check_process()
        source, length = self._source(), self._length
        return LogReader(self, source, max(0, length + start) if start < 0 else start, None if follow else length)

    @contextmanager
    def moving(self) -> Iterator[Move]:
        """Rename the log's folder inside this context, and tell the new path; readers miss nothing.

            with log.moving() as move:
                os.rename(entry, result)
                move.to(result / "log")

        An exception keeps the old path, if the log is still there. Do not read it inside: a read may wait for the end.
        StoreError if the log is not finished.
        """
        self._check_process()
        with self._writing:
            if self._state == "open":
                raise StoreError(f"cannot move the log {self.path}: it is being written; finish() it first")
        move, done = Move(), False
        with self._strategy.moving():
            try:
                yield move
                done = True
            finally:
                # An interrupt can come just after the rename.
                if move.target and (done or not os.path.lexists(self.path)):
                    self._strategy.path = move.target

    def __del__(self) -> None:
        self._strategy.finish()

    def _has_moved(self) -> bool:
        """Another process has moved it, and it is found again."""
        place = self._locate and self._locate()
        if place is None or place == self.path:
            return False
        with self._strategy.moving():
            self._strategy.path = place
        return True

    def _source(self) -> _Source:
        with self._opening:
            source = self._shared() if self._shared else None
            if source is None:
                try:
                    with self._writing:
                        handle = self._strategy.open()
                except OSError as error:
                    raise _failure("read", self.path, error) from error
                source = _Source(self._strategy, handle)
                self._shared = weakref.ref(source)
            return source

    def _check_process(self) -> None:
        if self._forked:
            raise StoreError(f"the log {self.path} belongs to the process that forked this one; open it with saved()")

    def _let_go_in_child(self) -> None:
        # No lock is taken: the thread that held it is not in this process.
        self._forked = True
        self._strategy.finish()
        if self._shared and (source := self._shared()):
            source.close()


class LogReader(Iterator[bytes]):
    """Yields the log's bytes in chunks of any size, in order. For one thread; only close() is for all."""

    def __init__(self, log: BuildLog, source: _Source, offset: int, end: int | None) -> None:
        self.offset = offset
        """The offset of the first byte not yielded yet: tail(reader.offset) goes on from here."""
        self._log, self._end = log, end
        self._source: _Source | None = source
        source.readers.add(self)
        self._waiting = False  # set before it looks, as _source is cleared before close() asks: one sees the other

    def __next__(self) -> bytes:
        self._log._check_process()
        end = self._wait() if self._end is None else self._end
        source = self._source  # held here, so that close() cannot take the descriptor from under the read
        if source is None or self.offset >= end:
            self.close()
            if source and self._end is None and self._log._error:
                raise copy.copy(self._log._error)
            raise StopIteration
        try:
            chunk = self._read(source, end)
        except OSError as error:
            raise _failure("read", self._log.path, error) from error
        if not chunk:
            raise StoreError(f"the log {self._log.path} lost its end: {self.offset} of at least {end} bytes are there")
        self.offset += len(chunk)
        return chunk

    def close(self) -> None:
        """End here; a thread that waits in this reader ends too. Idempotent."""
        source, self._source = self._source, None
        if source is not None:
            source.readers.discard(self)
        if self._waiting and not self._log._forked:
            self._log._waiters.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, source: _Source, end: int) -> bytes:
        try:
            return source.chunk(self.offset, end)
        except FileNotFoundError:
            if not self._log._has_moved():
                raise
        return source.chunk(self.offset, end)

    def _wait(self) -> int:
        """Wait until there is something to yield or the end is known; return the length then."""
        if not self._ready():
            self._waiting = True
            try:
                self._log._waiters.wait(self._ready)
            finally:
                self._waiting = False
        return self._log.length

    def _ready(self) -> bool:
        # The state first: a length read after "finished" is final.
        return self._log.state != "open" or self._log.length > self.offset or self._source is None


class _Source:
    """What the readers of one log share. Its handle closes with the last that holds it, or by close()."""

    def __init__(self, strategy: Strategy, handle: int) -> None:
        self._strategy, self._handle = strategy, handle
        # Not by __del__: during that, a weak reference still gives the object to another thread.
        self._finalizer = weakref.finalize(self, strategy.close, handle)
        self._finalizer.atexit = False
        self.readers: weakref.WeakSet[LogReader] = weakref.WeakSet()
        self._chunks: dict[int, bytes] = {}
        self._reading = threading.Lock()

    def chunk(self, offset: int, end: int) -> bytes:
        """Some bytes from *offset* to *end*, the same object for all who ask. Empty if the file has none."""
        found = self._chunks.get(offset)
        if found is not None:
            return found
        with self._reading:
            found = self._chunks.get(offset)  # read by somebody while this one waited
            if found is None:
                size = min(end, (offset // _CHUNK + 1) * _CHUNK) - offset
                self._chunks[offset] = found = self._strategy.read(self._handle, offset, size)
                while len(self._chunks) > min(_CHUNKS, len(self.readers)):
                    del self._chunks[next(iter(self._chunks))]
        return found

    def close(self) -> None:
        self._handle = -1
        self._finalizer()


class _Waiters:
    """The readers that have read all there is. One leads: it listens to the writer; the others queue at its gate.

    However many there are, a write costs one look at a flag, and a wake-up one thread, once in _PACE seconds at most:
    who passes the gate lets in the next, so they never crowd the writer out. A busy writer is followed in strides,
    while the first byte after a pause is told of at once.
    """

    def __init__(self) -> None:
        self._news = threading.Condition(threading.Lock())
        self._gate: threading.Lock | None = None  # there, and locked, while somebody leads
        self._listening = self._hurry = False
        self._opened = 0.0

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return once *ready* is true; it is asked after each grown() and wake()."""
        while not ready():
            with self._news:
                if ready():  # what happened since it was asked has opened another gate
                    return
                gate = self._gate
                if gate is None:
                    self._lead()
                    continue
            with gate:
                pass

    def grown(self) -> None:
        """There is more to read."""
        with self._news:
            if self._listening:
                self._listening = False
                self._news.notify()

    def wake(self) -> None:
        """Have all look again, now."""
        with self._news:
            self._listening, self._hurry = False, True
            self._news.notify()

    def _lead(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        try:
            self._gate, self._listening = gate, True
            self._news.wait_for(lambda: not self._listening)
            pause = self._opened + _PACE - time.monotonic()
            if pause > 0 and not self._hurry:
                self._news.wait(pause)  # only wake() cuts it short
        finally:
            self._gate, self._listening, self._hurry = None, False, False
            self._opened = time.monotonic()
            gate.release()


def _absolute(path: str | os.PathLike[str]) -> str | Path:
    if isinstance(path, str) and os.path.isabs(path):
        return path  # a Path would cost more than the system call it is for
    return Path(path).absolute()


def _failure(verb: str, path: str | Path, error: OSError) -> StoreError:
    what = f"cannot {verb} the log {path}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
        return NotFound(str(path), f"{what}; its build was deleted or its folder moved: ask the store for it by id")
    if isinstance(error, FileExistsError):
        return StoreError(f"{what}; a log has one writer: read this one with saved(), or choose another path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(str(path), what)
    return StoreError(f"{what}; look at its folder's permissions and at the disk")


_logs: weakref.WeakSet[BuildLog] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for log in _logs:
        log._let_go_in_child()


if sys.platform != "win32":
    # A child would keep the files of logs that its parent closed, and could write into them.
    os.register_at_fork(after_in_child=_let_go_in_child)
