"""The right to build an id, and being part of its build elsewhere until one has it.

Whoever wants an id that another process is building follows that build: its log, live, and its outcome. Where it
failed, they fail alike. Where it was cancelled or its builder died, exactly one of them gets the `work` lock and builds
again; the others follow that one, and the readers of the old log are told that it ended without an outcome.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from .backend import Backend
from .builds import Builds, Running
from .errors import BuilderDied, Cancelled, NotFound, StoreError
from .failures import Failures
from .following import Followed, attempt_of
from .locks import Lock, Locks
from .log import BuildLog
from .recovery import discard_dead
from .watching import POLL, Signal


class Sharing:
    """What the builds of one open store share with those of other processes."""

    def __init__(self, root: Path, backend: Backend, locks: Locks, failures: Failures, builds: Builds) -> None:
        self._root, self._backend, self._locks, self._failures, self._builds = root, backend, locks, failures, builds
        self._lock = threading.Lock()
        self._followed: dict[tuple[str, str], tuple[Followed, Signal, threading.Thread]] = {}
        self._closing = False

    def own(self, running: Running) -> Lock | None:
        """Get the right to build *running*, with nothing of earlier attempts in the way; None if there is a result.

        Raises what the build elsewhere failed with, or Cancelled.
        """
        work = self._locks.try_work(running.id) or self._share(running)
        if work is None:
            return None
        try:
            if self._backend.result(running.id) is None:
                self._clear(running.id)
                return work
        except BaseException:
            work.release()
            raise
        work.release()
        return None

    def await_base(self, running: Running, base: str) -> None:
        """Return when no build of *base* is under way any more, here or elsewhere."""
        while self._backend.result(base) is None and (here := self._builds.get(base)):
            with self._builds.waiting(base), Signal() as signal:
                here.when_ended(signal.set)
                _wait(running, signal, lambda here=here: here.ended)  # type: ignore[misc]
        if self._backend.result(base) is None and attempt_of(self._root, base):
            with self._builds.waiting(base), self._locks.waiter(base) as place, Signal([place.path]) as signal:
                _wait(running, signal, lambda: _is_free(place.try_work()))

    def follow(self, id: str) -> BuildLog | None:
        """The log of the build of *id* that is under way elsewhere, live; None where there is none, or no log of it."""
        attempt = attempt_of(self._root, id)
        if attempt is None:
            return None
        with self._lock:
            if known := self._followed.get((id, attempt)):
                return known[0].log
            try:
                followed = Followed(self._root, id, attempt, self._locks.turnstile(id))
            except NotFound:
                return None
            signal = Signal([followed.log.path])
            thread = threading.Thread(target=self._attend, args=(followed, signal), name=f"follow {id}", daemon=True)
            thread.start()
            self._followed[id, attempt] = followed, signal, thread
        return followed.log

    def close(self) -> None:
        """End the following; readers of those logs end with an error. Idempotent."""
        self._closing = True
        with self._lock:
            following = list(self._followed.values())
        for _, signal, _ in following:
            signal.set()
        for _, _, thread in following:
            thread.join()

    def _attend(self, followed: Followed, signal: Signal) -> None:
        error = StoreError(f"the store was closed while the log of {followed.id!r} was followed; open it again")
        try:
            with signal, self._locks.waiter(followed.id) as place:
                signal.add(place.path)
                while not (followed.look() or self._closing):
                    if work := place.try_work():
                        with work:
                            self._bury(followed)
                        break
                    signal.wait()
        except (OSError, StoreError) as raised:
            error = StoreError(f"the log of {followed.id!r} cannot be followed: {raised}")
        with self._lock:
            del self._followed[followed.id, followed.attempt]
        followed.abandon(error)

    def _share(self, running: Running) -> Lock | None:
        """Follow the builds elsewhere until one leaves a result (None), or the lock."""
        followed: list[Followed] = []
        try:
            with self._locks.waiter(running.id) as place, Signal([place.path]) as signal:
                running.signal = signal
                while (work := place.try_work()) is None:
                    self._follow_newest(running, followed, signal)
                    if followed and _is_ours(followed[-1]):
                        return None
                    _check(running)
                    signal.wait(None if followed and followed[-1].outcome is None else POLL)
            with ExitStack() as undo:
                undo.callback(work.release)
                if followed and not _is_ours(followed[-1]):
                    self._bury(followed[-1])
                undo.pop_all()
            return work
        finally:
            for one in followed:
                one.abandon(Cancelled(running.id, one.attempt, "its log is no longer followed here"))

    def _follow_newest(self, running: Running, followed: list[Followed], signal: Signal) -> None:
        """Add the build under way to *followed*, if it is not the last there."""
        if followed and followed[-1].log.path.exists():
            return
        attempt = attempt_of(self._root, running.id)
        if attempt is None or (followed and followed[-1].attempt == attempt):
            return
        with suppress(NotFound):  # it has no log yet, or no more
            followed.append(Followed(self._root, running.id, attempt, self._locks.turnstile(running.id)))
            for earlier in followed[:-1]:
                earlier.abandon(BuilderDied(running.id, earlier.attempt, "its builder died"))
            signal.add(followed[-1].log.path)
            running.has_log(followed[-1].log, here=False)

    def _bury(self, followed: Followed) -> None:
        """Discard a build whose lock is held here, unless it has an outcome; its readers learn that it died."""
        if followed.look() is None:
            self._clear(followed.id)
            followed.abandon(BuilderDied(followed.id, followed.attempt, "its builder died"))

    def _clear(self, id: str) -> None:
        for other, attempt in list(self._backend.unfinished()):
            if other == id:
                discard_dead(self._backend, self._failures, id, attempt)


def _is_ours(followed: Followed) -> bool:
    """Did it leave a result? Raises its failure; a cancelled or dead build is nobody's outcome."""
    record = followed.look()
    if failure := followed.failure():
        raise failure
    return record is not None and record.outcome == "built"


def _wait(running: Running, signal: Signal, ready: Callable[[], bool]) -> None:
    running.signal = signal
    while not ready():
        _check(running)
        signal.wait()


def _check(running: Running) -> None:
    if running.cancel.is_set():
        raise Cancelled(running.id)


def _is_free(work: Lock | None) -> bool:
    if work:
        work.release()
    return work is not None
