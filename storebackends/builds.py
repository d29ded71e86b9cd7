"""Builds under way in this process: who shares one, who waits for whom, and who may end it.

Callers of one id share one `Running`: one run of the function, one log, one outcome. It is cancelled when the last of
them has gone. A wait that would close a circle is an error, not a deadlock.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import Busy, Cancelled, StoreError
from .locks import Lease
from .log import BuildLog
from .process import Cancel
from .results import Result

_current: ContextVar[Running | None] = ContextVar("storebackends_build", default=None)
"""The build whose function this thread is in."""


class Running:
    """One build, from the first caller's request until its outcome is known."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.cancel = Cancel()
        self.callers = 1
        self.waits_for: list[str] = []
        self.outcome = "built"
        self.error: BaseException | None = None
        self._log: BuildLog | None = None
        self.ended = False
        self._changed = threading.Condition()

    def log(self) -> BuildLog | None:
        """The log, as soon as there is one; None where the build ended without."""
        with self._changed:
            self._changed.wait_for(lambda: self._log or self.ended)
            return self._log

    @property
    def current_log(self) -> BuildLog | None:
        """The log, if there is one already."""
        return self._log

    def has_log(self, log: BuildLog) -> None:
        """Called by the builder once the log is there."""
        with self._changed:
            self._log = log
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> None:
        """Return when the outcome is known. Raises TimeoutError, which ends nothing."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended, timeout):
                raise TimeoutError(f"the build of {self.id!r} is not done after {timeout} s; it goes on")

    def end(self, error: BaseException | None) -> None:
        """Called by the builder, once: the outcome is known."""
        with self._changed:
            self.error, self.ended = error, True
            self._changed.notify_all()
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

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table: dict[str, Running] = {}
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
                running.cancel.set()

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
            build.cancel.set()
        return running

    @contextmanager
    def building(self, running: Running) -> Iterator[None]:
        """Mark this thread as the one inside the function of *running*."""
        token = _current.set(running)
        try:
            yield
        finally:
            _current.reset(token)

    @contextmanager
    def waiting(self, id: str) -> Iterator[None]:
        """Around every wait for the build of *id*. Raises Busy where it would wait for itself."""
        waiter = _current.get()
        if waiter is None:
            yield
            return
        with self._lock:
            if circle := self._path(id, waiter.id, ()):
                raise Busy(waiter.id, f"it would wait for itself: {' -> '.join((waiter.id, *circle))}", circle)
            waiter.waits_for.append(id)
        try:
            yield
        finally:
            waiter.waits_for.remove(id)

    def _path(self, start: str, goal: str, seen: tuple[str, ...]) -> tuple[str, ...] | None:
        if start == goal:
            return (*seen, start)
        if start in seen or (running := self._table.get(start)) is None:
            return None
        paths = (self._path(next_id, goal, (*seen, start)) for next_id in running.waits_for)
        return next((path for path in paths if path), None)


class Build:
    """One caller's hold on a build that runs in a thread of its own (or is done already)."""

    def __init__(
        self, id: str, lease: Lease, running: Running | None, builds: Builds, keep: Callable[[str, Lease, str], Result]
    ) -> None:
        """*running* is None where the result is there already; *keep* makes the Result of id, lease and outcome."""
        self._lease, self._running, self._builds, self._keep = lease, running, builds, keep
        self._result: Result | None = None
        self._gone = False
        self.id = id
        self.is_builder = False
        """Is this the call that runs the function?"""

    @property
    def log(self) -> BuildLog:
        """The log, live while it runs. Waits until there is one; raises the build's error where none was begun."""
        if self._running and (live := self._running.log()):
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

    def cancel(self) -> None:
        """Stop waiting. The build goes on while others wait for it; the last one to go ends it. Idempotent."""
        if not self._gone and self._result is None:
            self._gone = True
            if self._running:
                self._builds.leave(self._running)
            self._lease.release()

    def _await(self, timeout: float | None) -> Result:
        running = self._running
        if running is None:
            return self._keep(self.id, self._lease, "hit")
        with self._builds.waiting(self.id):
            running.wait(timeout)
        if failure := running.failure():
            self._lease.release()
            raise failure
        return self._keep(self.id, self._lease, running.outcome if self.is_builder else "attached")
