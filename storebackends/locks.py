"""Locks per id, and one for the whole store, between threads and between processes.

    locks/work-00 … work-3f    `work`: one holder, who builds, discards or deletes the id
    locks/use-00 … use-3f      `use`: shared by every lease of the id; exclusive for who wants it unused
    locks/store                shared or exclusive: the store as a whole
    locks/turn-XX, move-XX     for a log's readers, where an open file forbids a rename

The kernel holds the locks, so a process that is killed holds none. They belong to open descriptors: two locks
exclude each other wherever their holders are, in two threads as in two processes. The one rule: between opening a
descriptor and `_Gate` knowing it nothing forks, since a forked child that kept it would keep a dead builder's lock.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, Self, TypeVar

from .errors import NoSpace, NotSupported, StoreError

Place = tuple[str, int]
"""A file's name, and the byte in it that is locked."""

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05


class Strategy(Protocol):
    """How one platform locks. All of it returns at once; OSError where the platform will not."""

    per_id: bool  # a file for each id, where a lock is on whole files; else 64 files a kind, a byte for each id

    def open(self, path: str, shared: bool) -> int: ...

    def lock(self, fd: int, offset: int, exclusive: bool) -> bool: ...

    def unlock(self, fd: int, offset: int) -> None: ...

    def holders(self, places: Sequence[tuple[str, int]]) -> list[str]: ...


# The only platform test of the locks. Linux has both POSIX ones, so tests can force the other.
if sys.platform == "win32":
    from ._locks_windows import LockFile

    NATIVE: Strategy = LockFile()
elif sys.platform == "linux":
    from ._locks_posix import ByteRange

    NATIVE: Strategy = ByteRange()
else:
    from ._locks_posix import WholeFile

    NATIVE: Strategy = WholeFile()


class _File:
    """An open descriptor, and how often each byte is locked through it: an exclusive lock's own, or shared."""

    __slots__ = ("counts", "fd", "name", "pool", "stays")

    def __init__(self, name: str, fd: int, pool: dict[str, _File] | None, stays: bool) -> None:
        self.name, self.fd, self.pool, self.stays = name, fd, pool, stays
        self.counts: dict[int, int] = {}


class _Gate:
    """The only way to the descriptors of all locks of this process; entered by one thread at a time.

    Locks are also released by the garbage collector, which may strike inside the gate, in the thread that is there.
    So a release is queued, and carried out on the spot or, in that one case, when the thread leaves.
    """

    def __init__(self) -> None:
        self.generation = 0  # of forks: what was made in another is dead
        self.descriptors: set[int] = set()
        self.released: deque[Lock] = deque()
        self._mutex = threading.RLock()
        self._inside = False
        if sys.platform != "win32":
            os.register_at_fork(
                before=self._mutex.acquire, after_in_parent=self._mutex.release, after_in_child=self._forget
            )

    def __enter__(self) -> None:
        self._mutex.acquire()
        self._inside = True

    def __exit__(self, _: object, __: object, ___: object) -> None:
        try:
            self._inside = False
            if self.released:
                self.settle()
        finally:
            self._mutex.release()

    def settle(self) -> None:
        """End every lock that was released, unless this very thread is inside: then it does so on leaving."""
        with self._mutex:
            while self.released and not self._inside:
                self._inside = True
                try:
                    while self.released:
                        self.released.popleft()._end()
                finally:
                    self._inside = False

    def _forget(self) -> None:
        # Closing is all: to unlock would unlock the parent's, which is the same open file.
        for fd in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.descriptors.clear()
        self.released.clear()
        self._inside = False
        self.generation += 1
        self._mutex.release()


_gate = _Gate()


class Lock:
    """A held lock: a context manager; free once released, collected, or its Locks closed.

    Free for all at once: also while another thread's child, not yet at its exec, still has a copy of the descriptor.
    """

    __slots__ = ("_file", "_locks", "_offset", "_released")

    def __init__(self, locks: Locks, file: _File, offset: int) -> None:
        self._locks, self._file, self._offset, self._released = locks, file, offset, False

    def release(self) -> None:
        """Let go. Twice is fine, from any thread or finalizer; in a forked child it changes nothing."""
        if not self._released and self._locks._generation == _gate.generation:
            _gate.released.append(self)
            _gate.settle()

    def _end(self) -> None:
        if not self._released:
            self._released = True
            self._locks._drop(self._file, self._offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Lease(Lock):
    """A promise to every process that an id is in use: nobody gets its exclusive `use` lock."""

    __slots__ = ()


class Waiter:
    """Waits for the `work` lock of one id: a context manager with one descriptor for all its tries.

    The kernel tells who watches *path* when one of its descriptors is closed, which is what a builder does when it ends
    or is killed. A waiter that closed one at each try would wake the others, and they it, without end.
    """

    def __init__(self, locks: Locks, place: Place) -> None:
        self._locks, self._place = locks, place
        self._file: _File | None = None
        self.path = f"{locks._folder}/{place[0]}"

    def try_work(self) -> Lock | None:
        """Locks.try_work(); call it no more once it gave the lock."""
        file, offset = self._file, self._place[1]
        assert file is not None  # noqa: S101 (the context is open, and gave no lock yet)
        with _gate:
            self._locks._check()
            try:
                if not self._locks._strategy.lock(file.fd, offset, True):
                    return None
            except OSError as error:
                raise _explained(self.path, error) from error
            self._file = None
            file.counts[offset] = 1
            return Lock(self._locks, file, offset)

    def __enter__(self) -> Self:
        with _gate:
            self._locks._check()
            try:
                self._file = self._locks._open(self._place[0])  # now, so that it is there to be watched
            except OSError as error:
                raise _explained(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file and self._locks._generation == _gate.generation:
            with _gate:
                if self._file in self._locks._files:
                    self._locks._close(self._file)


class Keys:
    """Takes the exclusive locks of many ids, one after the other: a context manager; what it opened serves the next.

    Who watches a file is told that a lock of it is free at the end only: so these are to be held for moments.
    """

    def __init__(self, locks: Locks) -> None:
        self._locks = locks
        self._files: dict[str, _File] = {}

    def try_work(self, id: str) -> Lock | None:
        """See Locks.try_work()."""
        return self._locks._take(self._locks._place("work", id), self._files, Lock)

    def try_use(self, id: str) -> Lock | None:
        """See Locks.try_use()."""
        return self._locks._take(self._locks._place("use", id), self._files, Lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._locks._generation == _gate.generation:
            with _gate:
                for file in list(self._files.values()):
                    self._locks._close(file)


class Turnstile:
    """Two locks of one log, for platforms where it cannot be moved while anybody has it open.

    A read passes `turn` and holds `move`, shared both; who moves the log holds both alone. So he waits for the reads in
    flight, and however many read, none overtakes him.
    """

    def __init__(self, locks: Locks, id: str) -> None:
        self._locks, self._id = locks, id

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around one read."""
        with self._get("turn", shared=True):
            place = self._get("move", shared=True)
        with place:
            yield

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around the rename."""
        with self._get("turn", shared=False), self._get("move", shared=False):
            yield

    def _get(self, kind: str, shared: bool) -> Lock:
        place, pool = self._locks._place(kind, self._id), self._locks._leases if shared else None
        lock = _wait(lambda: self._locks._take(place, pool, Lock), never, None, str)
        assert lock is not None  # noqa: S101 (nobody cancels)
        return lock


L = TypeVar("L", bound=Lock)
T = TypeVar("T")


def never() -> bool:
    """Nobody cancels."""
    return False


class Locks:
    """All locks of one store in this process. Dead in a forked child: there every request is a StoreError."""

    def __init__(self, folder: Path, strategy: Strategy = NATIVE) -> None:
        """Make *folder*, closed to other users, if it is missing."""
        self._generation, self._closed = _gate.generation, False
        self._folder, self._strategy = os.fspath(folder), strategy
        self._files: set[_File] = set()
        self._leases: dict[str, _File] = {}  # those of _files that leases of this process share, by name
        try:
            os.makedirs(os.path.dirname(self._folder), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._folder, 0o700)
                self._make_files()
        except OSError as error:
            raise _explained(self._folder, error) from error

    def try_work(self, id: str) -> Lock | None:
        """The right to change what is kept under *id*; None if anybody has it, in this process or another."""
        return self._take(self._place("work", id), None, Lock)

    def try_use(self, id: str) -> Lock | None:
        """The assurance that nobody leases *id*; None if anybody does, in this process or another."""
        return self._take(self._place("use", id), None, Lock)

    def try_lease(self, id: str) -> Lease | None:
        """A share of *id*; None while somebody holds its `use` lock. Costs a few microseconds."""
        return self._take(_place("use", id, self._strategy.per_id), self._leases, Lease)

    def try_store(self, exclusive: bool) -> Lock | None:
        """The lock of the whole store, shared by all or held by one; None where that cannot be had now."""
        return self._take(("store", 0), None if exclusive else self._leases, Lock)

    def work(self, id: str, *, cancelled: Callable[[], bool] = never, timeout: float | None = None) -> Lock | None:
        """Wait for `try_work`. None once cancelled() is true; TimeoutError after *timeout* seconds."""
        with self.waiter(id) as place:
            return _wait(place.try_work, cancelled, timeout, lambda: self._late(f"the lock of {id!r}", id))

    def keys(self) -> Keys:
        """A cheaper way to the locks of many ids in turn."""
        return Keys(self)

    def waiter(self, id: str) -> Waiter:
        """A place from which to wait for `try_work`."""
        return Waiter(self, self._place("work", id))

    def lease(self, id: str, *, timeout: float | None = None) -> Lease:
        """Wait for `try_lease`: who holds the `use` lock does so for moments. TimeoutError after *timeout* seconds."""
        lease = self.try_lease(id) or _wait(
            lambda: self.try_lease(id), never, timeout, lambda: self._late(f"a lease of {id!r}", id)
        )
        assert lease is not None  # noqa: S101 (nobody cancels)
        return lease

    def turnstile(self, id: str) -> Turnstile:
        """What keeps processes that follow the log of *id* from the moment in which it is moved."""
        return Turnstile(self, id)

    def store(self, exclusive: bool, timeout: float | None = None) -> Lock:
        """Wait for `try_store`. TimeoutError after *timeout* seconds."""
        lock = _wait(lambda: self.try_store(exclusive), never, timeout, lambda: self._late("the store's lock", None))
        assert lock is not None  # noqa: S101 (nobody cancels)
        return lock

    def holders(self, id: str | None) -> list[str]:
        """Who holds `work` or `use` of *id* (of None: the store's lock), for a message; [] where that is not known.

        Reads all of /proc, so it is for those who were refused. Processes of other users stay unseen. Never raises.
        """
        places = [("store", 0)] if id is None else [self._place("work", id), self._place("use", id)]
        return self._strategy.holders([(f"{self._folder}/{name}", offset) for name, offset in places])

    def close(self) -> None:
        """Release all that is held through this object; later requests are errors. Twice is fine."""
        if self._generation == _gate.generation:
            with _gate:
                self._closed = True
                for file in list(self._files):
                    self._close(file)

    def _make_files(self) -> None:
        """Make the files of leases, so that what is there can be leased where no file can be made any more."""
        for number in range(0 if self._strategy.per_id else 64):
            with _gate:
                os.close(self._strategy.open(f"{self._folder}/use-{number:02x}", False))

    def _place(self, kind: str, id: str) -> Place:
        return _place(kind, id, self._strategy.per_id)

    def _take(self, place: Place, pool: dict[str, _File] | None, cls: type[L]) -> L | None:
        """Lock *place*, by a file of *pool* where that has it; shared if it is that of the leases."""
        name, offset = place
        shared = pool is self._leases
        with _gate:
            self._check()
            try:
                file = (pool.get(name) if pool else None) or self._open(name, pool)
                count = file.counts.get(offset, 0)
                if shared if count else self._lock(file, offset, shared):
                    file.counts[offset] = count + 1
                    return cls(self, file, offset)
            except OSError as error:
                raise _explained(f"{self._folder}/{name}", error) from error
        return None

    def _open(self, name: str, pool: dict[str, _File] | None = None) -> _File:
        # The 64 files of leases stay open: the next lease, which will not be long, is then a single system call.
        fd = self._strategy.open(f"{self._folder}/{name}", pool is self._leases)
        file = _File(name, fd, pool, pool is not None and not self._strategy.per_id)
        _gate.descriptors.add(fd)
        self._files.add(file)
        if pool is not None:
            pool[name] = file
        return file

    def _lock(self, file: _File, offset: int, shared: bool) -> bool:
        held = False
        try:
            held = self._strategy.lock(file.fd, offset, not shared)
        finally:
            if not held and not file.counts and not file.stays:
                self._close(file)
        return held

    def _drop(self, file: _File, offset: int) -> None:
        if file not in self._files:
            return  # close() was first
        file.counts[offset] -= 1
        if not file.counts[offset]:
            del file.counts[offset]
            # Closing alone would leave the lock to a child of another thread that is between its fork and its exec.
            self._strategy.unlock(file.fd, offset)
            if not file.counts and not file.stays:
                self._close(file)

    def _close(self, file: _File) -> None:
        for offset in file.counts:
            self._strategy.unlock(file.fd, offset)
        file.counts.clear()
        if file.pool and file.pool.get(file.name) is file:
            del file.pool[file.name]
        self._files.discard(file)
        _gate.descriptors.discard(file.fd)
        os.close(file.fd)

    def _check(self) -> None:
        if self._closed:
            raise StoreError(f"the store locked by {self._folder} is closed: open it again")
        if self._generation != _gate.generation:
            raise StoreError(
                f"the store locked by {self._folder} was opened before fork(): open the store again in the child"
            )

    def _late(self, what: str, id: str | None) -> str:
        return f"{what} is held by {', '.join(self.holders(id)) or 'another process'}; wait longer, or end that"


@functools.lru_cache(1024)
def _place(kind: str, id: str, per_id: bool) -> Place:
    # Python's own hash differs between processes. 62 bits of this one make two ids on one byte a thing that does
    # not happen; 6 others choose the file, since a file's locks are searched one after the other.
    digest = blake2b(id.encode(), digest_size=9).digest()
    if per_id:
        return f"{kind}-{digest.hex()}", 0
    return f"{kind}-{digest[8] & 63:02x}", int.from_bytes(digest[:8], "big") >> 2


def _wait(
    attempt: Callable[[], T | None], cancelled: Callable[[], bool], timeout: float | None, late: Callable[[], str]
) -> T | None:
    """Poll *attempt*: locks of this kind can be waited for only in system calls that nothing could cancel."""
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = FIRST_PAUSE
    while (got := attempt()) is None and not cancelled():
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"waited {timeout:g} s: {late()}")
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE)
    return got


def _explained(path: str, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(path, reason)
    if error.errno in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return NotSupported(f"locking {path}", reason, "keep the store on a local file system")
    if error.errno == errno.EROFS:
        return StoreError(f"cannot lock {path}: {reason}; until it can be written, what is there can only be read")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return StoreError(f"cannot lock {path}: {reason}; raise the limit (ulimit -n)")
    return StoreError(f"cannot lock {path}: {reason}; check that you may write there")
