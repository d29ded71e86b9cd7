"""Builds under way in this process: who shares one, who waits for whom, and who may end it.

Callers of one id share one `Running`: one run of the function, one log, one outcome. It is cancelled when the last of
them has gone. A wait that would close a circle is an error, not a deadlock.

A circle goes through builds, by id, and through caches in mode "locked", as cache/NAME. A build waits for what its
function waits for; a cache waits for the build that has it locked, or, where that is none, for what its borrower does.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from .backend import Entry
from .errors import Busy, Cancelled, StoreError
from .following import waits_of
from .locks import Lease
from .log import BuildLog
from .process import Cancel
from .results import Result
from .watching import Signal

_FREE = nullcontext()
"""Around the waits of those who are in no build's function."""
_current: ContextVar[Running | None] = ContextVar("storebackends_build", default=None)
"""The build whose function this thread is in."""
_borrower: ContextVar[Waiter | None] = ContextVar("storebackends_borrower", default=None)
"""The first cache that this thread has locked, outside of any build's function."""


class building:  # noqa: N801 (a context manager is called like a function)
    """Mark this thread as the one inside the function of *running*."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def __enter__(self) -> None:
        self._token = _current.set(self._running)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def current() -> Running:
    """The build whose function this thread is in; LookupError outside one."""
    if (running := _current.get()) is None:
        raise LookupError("this thread is in no build's function")
    return running


class Waiter:
    """What waits for others while others wait for it: a build, or a cache that was locked outside of one."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.waits_for: list[str] = []
        self.note: Callable[[tuple[str, ...]], None] | None = None
        """Writes into its record what it waits for, while there is one to write to."""
        self.noted: tuple[str, ...] = ()


class Running(Waiter):
    """One build, from the first caller's request until its outcome is known."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.cancel = Cancel()
        self.callers = 1
        self.signal: Signal | None = None
        self.outcome = "built"
        self.entry: Entry | None = None
        """The result, once there is one."""
        self.error: BaseException | None = None
        self._log: BuildLog | None = None
        self._here = False
        self.ended = False
        self._changed = threading.Condition()
        self._tell: list[Callable[[], None]] = []
        self._interrupt: Callable[[], object] | None = None

    def log(self) -> BuildLog | None:
        """The log, as soon as there is one that has not lost its builder; at the end what there is, or None."""
        with self._changed:
            self._changed.wait_for(lambda: (self._log and not self._log.error) or self.ended)
            return self._log

    @property
    def current_log(self) -> BuildLog | None:
        """The log, if there is one already, and if it is written here."""
        return self._log if self._here else None

    def has_log(self, log: BuildLog, *, here: bool) -> None:
        """The log is there: of the build *here*, or of the one elsewhere that is followed for the callers here."""
        with self._changed:
            self._log, self._here = log, here
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> None:
        """Return when the outcome is known. Raises TimeoutError, which ends nothing."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended, timeout):
                raise TimeoutError(f"the build of {self.id!r} is not done after {timeout} s; it goes on")

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Call *tell*, which must be quick, once the outcome is known; in the builder's thread, or now."""
        with self._changed:
            if not self.ended:
                self._tell.append(tell)
                return
        tell()

    def interrupt_by(self, interrupt: Callable[[], object]) -> None:
        """Have *interrupt*, which must be quick and bear a second call, called when it is cancelled; or now."""
        self._interrupt = interrupt
        if self.cancel.is_set():
            interrupt()

    def stop(self) -> None:
        """Cancel it, wherever it is: waiting for a lock, or in its function."""
        self.cancel.set()
        if self._interrupt:
            self._interrupt()
        if signal := self.signal:
            signal.set()

    def end(self, error: BaseException | None) -> None:
        """Called by the builder, once: the outcome is known."""
        with self._changed:
            self.error, self.ended = error, True
            self._changed.notify_all()
        for tell in self._tell:
            tell()
        self.cancel.close()

    def failure(self) -> StoreError | None:
        """The error for one caller: its own copy, as raising one object in many threads would mix their tracebacks."""
        error = self.error
        if error is None:
            return None
        if not isinstance(error, StoreError):
            mine: StoreError = Cancelled(self.id, reason=f"its builder was interrupted ({type(error).__name__})")
            mine.__cause__ = error
        else:
            mine = copy.copy(error)
            mine.__cause__ = error.__cause__
        return mine


class Builds:
    """The table of one open store."""

    def __init__(self, root: Path, locked_by: Callable[[str], Iterable[str]]) -> None:
        """*locked_by* says what a cache (cache/NAME) that is locked, in whatever process, waits for."""
        self._root, self._locked_by = root, locked_by
        self._lock = threading.Lock()
        self._table: dict[str, Running] = {}
        self._borrowers: set[Waiter] = set()
        self._closed = False

    def join(self, id: str) -> tuple[Running, bool]:
        """Become a caller of the build of *id*; True if it is new and the caller must run it.

        A build that is being cancelled is not joined: the new one waits for its lock.
        """
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed")
            running = self._table.get(id)
            if running and not running.cancel.is_set():
                running.callers += 1
                return running, False
            running = self._table[id] = Running(id)
            return running, True

    def get(self, id: str) -> Running | None:
        """The build of *id* that is under way here, if any."""
        return self._table.get(id)

    def leave(self, running: Running) -> None:
        """One caller goes; the last one to go cancels the build."""
        with self._lock:
            running.callers -= 1
            if running.callers == 0 and not running.ended:
                running.stop()

    def end(self, running: Running, error: BaseException | None) -> None:
        """The outcome is known: let the callers go, and forget the build."""
        with self._lock:
            if self._table.get(running.id) is running:
                del self._table[running.id]
        running.end(error)

    def close(self) -> list[Running]:
        """Take no new builds and cancel those under way; return them."""
        with self._lock:
            self._closed = True
            running = list(self._table.values())
        for build in running:
            build.stop()
        return running

    def waiting(self, id: str) -> AbstractContextManager[None]:
        """Around every wait for the build, or the locked cache, *id*.

        Raises Busy where it would wait for itself, in whatever process.
        """
        waiter = self._waiter()
        return self._waiting(waiter, id) if waiter else _FREE

    def borrower(self) -> str | None:
        """Who it is that locks a cache now: the build that this thread is in, or the cache that it locked before."""
        waiter = self._waiter()
        return waiter.id if waiter else None

    @contextmanager
    def borrowing(self, cache: str, note: Callable[[tuple[str, ...]], None]) -> Iterator[None]:
        """While this thread, being nobody that others could wait for, has *cache* locked: now it is that."""
        waiter = Waiter(cache)
        waiter.note = note
        with self._lock:
            self._borrowers.add(waiter)
        _borrower.set(
            waiter
        )  # never reset, since the loan may end in another context; it counts while it is in the set
        try:
            yield
        finally:
            with self._lock:
                self._borrowers.discard(waiter)

    def _waiter(self) -> Waiter | None:
        borrower = _borrower.get()
        return _current.get() or (borrower if borrower in self._borrowers else None)

    @contextmanager
    def _waiting(self, waiter: Waiter, id: str) -> Iterator[None]:
        with self._lock:
            waiter.waits_for.append(id)
            # Told before it is asked: of two processes that close a circle at once, one at least sees it.
            self._tell()
        try:
            if circle := self._path(id, waiter.id, ()):
                raise Busy(waiter.id, f"it would wait for itself: {' -> '.join((waiter.id, *circle))}", circle)
            yield
        finally:
            with self._lock:
                waiter.waits_for.remove(id)
                self._tell()

    def publishes(self, running: Running) -> None:
        """The function is done: what its threads still wait for is not written into its record any more."""
        with self._lock:
            running.note = None

    def _tell(self) -> None:
        for waiter in (*self._table.values(), *self._borrowers):
            waits = self._reached(waiter)
            if waiter.note and waits != waiter.noted:
                waiter.noted = waits
                waiter.note(waits)

    def _reached(self, waiter: Waiter) -> tuple[str, ...]:
        """All that it waits for in this process, directly or through other builds here."""
        reached: list[str] = []
        stack: list[Waiter | None] = [waiter]
        while stack:
            if one := stack.pop():
                new = [id for id in one.waits_for if id not in reached]
                reached += new
                stack += [self._table.get(id) for id in new]
        return tuple(reached)

    def _path(self, start: str, goal: str, seen: tuple[str, ...]) -> tuple[str, ...] | None:
        if start == goal:
            return (*seen, start)
        if start in seen:
            return None
        paths = (self._path(next_id, goal, (*seen, start)) for next_id in self._next(start))
        return next((path for path in paths if path), None)

    def _next(self, id: str) -> Iterable[str]:
        """What the build or the cache *id* waits for, in this process or another."""
        if "/" in id:
            return self._locked_by(id)
        running = self._table.get(id)
        return (*(running.waits_for if running else ()), *waits_of(self._root, id))


class Build:
    """One caller's hold on a build that runs in a thread of its own (or is done already)."""

    def __init__(
        self,
        id: str,
        lease: Lease,
        running: Running | None,
        found: Entry | None,
        builds: Builds,
        lend: Callable[[Entry, Lease, str], Result],
    ) -> None:
        """*found* is the result where it is there already, else there is *running*; *lend* makes the Result."""
        self._lease, self._running, self._found, self._builds, self._lend = lease, running, found, builds, lend
        self._result: Result | None = None
        self._gone = False
        self.id = id
        self.is_builder = False
        """Is this the call that runs the function?"""

    @property
    def log(self) -> BuildLog:
        """The log, live while it runs. Waits until there is one; raises the build's error where none was begun."""
        running = self._running
        if running and (live := running.log()) and (running.error or not running.ended):
            return live
        return self.wait().log

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the outcome, at most *timeout* seconds; the Result is the same at every call.

        Raises TimeoutError (the build goes on), BuildFailed, Cancelled, or what kept it from beginning.
        """
        if self._gone:
            raise Cancelled(self.id, reason="cancelled here")
        if self._result is None:
            self._result = self._await(timeout)
        return self._result

    def add_done_callback(self, tell: Callable[[Build], None]) -> None:
        """Call *tell*, which must be quick, once wait() would not wait: in the builder's thread, or now."""
        if self._running:
            self._running.when_ended(partial(tell, self))
        else:
            tell(self)

    def waiting(self) -> AbstractContextManager[None]:
        """Around a wait by add_done_callback(). Raises Busy where the build would wait for itself."""
        return self._builds.waiting(self.id)

    def cancel(self) -> bool:
        """Stop waiting. The build goes on while others wait for it; the last one to go ends it. Idempotent.

        True where the build is being ended, or was.
        """
        if not self._gone and self._result is None:
            self._gone = True
            if self._running:
                self._builds.leave(self._running)
            self._lease.release()
        return self._running is not None and self._running.cancel.is_set()

    def _await(self, timeout: float | None) -> Result:
        running = self._running
        if running is None:
            assert self._found is not None  # noqa: S101 (one of both is)
            return self._lend(self._found, self._lease, "hit")
        if not running.ended:
            with self._builds.waiting(self.id):
                running.wait(timeout)
        if failure := running.failure():
            self._lease.release()
            raise failure
        assert running.entry is not None  # noqa: S101 (it did not fail)
        return self._lend(running.entry, self._lease, running.outcome if self.is_builder else "attached")
