"""What happens in a store, told to whoever listens.

The store puts events into a queue and goes on; one thread per store takes them to the listeners, in order. So a
listener runs under no lock and in no builder's thread, and a slow one delays nobody: the queue is bounded, and its
oldest events make room. Where nobody listens there is no thread, and an event costs one look at an attribute.

Only what this store object does is told: not what other processes do in the same store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from . import errors
from .backend import Entry
from .failures import Failures
from .log import BuildLog
from .records import Record

log = logging.getLogger(__name__)

LIMIT = 10_000
"""How many events may wait for their listeners."""
PATIENCE = 5.0
"""Seconds that close() waits for the listeners to take what is queued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened in the store *uuid*, whose folder is *root*. *time* is in seconds since the epoch."""

    kind: ClassVar[str] = "event"
    """The name of the class in small letters."""

    root: Path
    uuid: str
    time: float

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__name__.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Event):
    """The store was opened. Told to plugins only: nobody else can listen before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed(Event):
    """The store is being closed; its builds have ended. The last event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit(Event):
    """A call found its result."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached(Event):
    """A call waited for a build that another call, here or in another process, had begun; and got its result."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """An attempt at building *id* begins. Finished, Failed or Cancelled follows, with the same *attempt*."""

    id: str
    attempt: str
    base: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended(Event):
    id: str
    attempt: str
    base: str | None
    seconds: float
    """From Started on, by a clock that nobody sets: the clone, the function and the publication."""
    log_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Ended):
    """The build is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(_Ended):
    """The build's function failed, or the storage below it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(_Ended):
    """The last caller of the build went, the store was closed, or the builder was interrupted."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned(Event):
    """Results were deleted to make room. *bytes* is what that freed, an estimate unless *exact*."""

    ids: tuple[str, ...]
    bytes: int
    exact: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(Event):
    """What a crash left of *id* was removed: an attempt whose builder died, or a result that may have lost data."""

    id: str
    attempt: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped(Event):
    """The listeners were too slow: *count* events, older than the next one, were never told."""

    count: int


class Listener:
    """A function that hears of events until close(), or of those before the end of the context, which waits for it."""

    def __init__(self, tell: Callable[[Event], object], events: Events) -> None:
        self._tell, self._events = tell, events

    def close(self) -> None:
        """Hear nothing more. A call that is under way is not waited for. Idempotent."""
        self._events._forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events._drain(self)
        self.close()


class Events:
    """The listeners of one open store, and the queue to them."""

    def __init__(self, root: Path, uuid: str) -> None:
        self.heard = False
        """Is anybody listening? Asked before tell() where every microsecond counts."""
        self._root, self._uuid = root, uuid
        self._changed = threading.Condition()
        self._listeners: tuple[Listener, ...] = ()
        self._queue: deque[tuple[Event, tuple[Listener, ...]]] = deque()
        self._hearing: tuple[Listener, ...] = ()  # those that are being called
        self._dropped = 0
        self._delivering = self._warned = self._closed = False
        self._thread: threading.Thread | None = None

    def listen(self, tell: Callable[[Event], object]) -> Listener:
        """Have *tell* called with each event from now on, one at a time, in the thread of the events."""
        listener = Listener(tell, self)
        with self._changed:
            if self._closed:
                raise errors.StoreError(f"the store {self._root} is closed; open it again")
            self._start(self._delivering)
            self._listeners += (listener,)
            self.heard = True
        return listener

    def deliver(self) -> None:
        """Begin: what was told before waits in the queue."""
        with self._changed:
            self._delivering = True
            self._start(self.heard)

    def tell(self, kind: type[Event], **facts: Any) -> None:
        """Queue an event for those who listen now."""
        if not self.heard:
            return
        event = kind(root=self._root, uuid=self._uuid, time=time.time(), **facts)
        with self._changed:
            if not self._listeners:
                return
            if len(self._queue) >= LIMIT:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append((event, self._listeners))
            self._changed.notify_all()

    def close(self) -> None:
        """Have what is queued delivered, for at most PATIENCE seconds; nobody hears of anything after."""
        self.tell(Closed)
        with self._changed:
            self._closed, self.heard, self._listeners = True, False, ()
            thread = self._thread
            self._changed.notify_all()
        if thread is None or thread is threading.current_thread():
            return
        thread.join(PATIENCE)
        with self._changed:
            if self._queue:
                log.warning("%s: its listeners were too slow for the last %d events", self._root, len(self._queue))
                self._queue.clear()

    def abandon(self) -> None:
        """In a forked child: there is no thread to tell anybody."""
        self.__init__(self._root, self._uuid)  # type: ignore[misc]
        self._closed = True

    def _start(self, wanted: bool) -> None:
        if wanted and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="storebackends-events", daemon=True)
            self._thread.start()  # it waits for the lock that is held here

    def _drain(self, listener: Listener) -> None:
        """Tell *listener* of nothing new, and wait until it has heard what was told, for at most PATIENCE seconds."""
        with self._changed:
            self._listeners = _without(self._listeners, listener)
            self.heard = bool(self._listeners)
            if threading.current_thread() is not self._thread:
                self._changed.wait_for(lambda: not self._is_to_hear(listener), PATIENCE)

    def _is_to_hear(self, listener: Listener) -> bool:
        return listener in self._hearing or any(listener in who for _, who in self._queue)

    def _forget(self, listener: Listener) -> None:
        with self._changed:
            self._listeners = _without(self._listeners, listener)
            self.heard = bool(self._listeners)
            self._queue = deque((event, who) for event, others in self._queue if (who := _without(others, listener)))
            self._changed.notify_all()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            event, listeners = item
            for listener in listeners:
                try:
                    listener._tell(event)
                except BaseException:  # a SystemExit would end this thread, and the others would hear no more
                    log.exception("%s: a listener failed on %r; it is still told of what follows", self._root, event)
            with self._changed:
                self._hearing = ()
                self._changed.notify_all()

    def _next(self) -> tuple[Event, tuple[Listener, ...]] | None:
        """Wait for the next event; None, and this thread is no more, once all is told and nobody listens."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or not self._listeners)
            if not self._queue:
                self._thread = None
                return None
            item = self._report() if self._dropped else self._queue.popleft()
            self._hearing = item[1]
            return item

    def _report(self) -> tuple[Event, tuple[Listener, ...]]:
        count, self._dropped = self._dropped, 0
        if not self._warned:
            log.warning("%s: its listeners are too slow; the oldest events were dropped (told once)", self._root)
            self._warned = True
        event = Dropped(root=self._root, uuid=self._uuid, time=time.time(), count=count)
        return event, self._queue[0][1]


class Attempt:
    """Around an attempt at a build: tells that it starts, and how it ended."""

    def __init__(
        self,
        events: Events,
        record: Record,
        build_log: Callable[[], BuildLog | None],
        is_published: Callable[[Record], bool],
    ) -> None:
        self._events, self._record, self._build_log, self._is_published = events, record, build_log, is_published
        self._began = time.monotonic()

    def __enter__(self) -> None:
        if self._events.heard:
            self._events.tell(Started, **self._facts())

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self._events.heard:
            return
        if error is None or self._is_published(self._record):  # interrupted just after
            self._end(Finished)
        elif isinstance(error, Exception) and not isinstance(error, errors.Cancelled):
            self._end(Failed, reason=_reason(error))
        else:
            self._end(Cancelled, reason=_reason(error))

    def _end(self, kind: type[_Ended], **more: str) -> None:
        length = written.length if (written := self._build_log()) else 0
        seconds = time.monotonic() - self._began
        self._events.tell(kind, **self._facts(), seconds=seconds, log_bytes=length, **more)

    def _facts(self) -> dict[str, str | None]:
        return {"id": self._record.id, "attempt": self._record.attempt, "base": self._record.base}


class Deaths(Failures):
    """failed/, and word of each attempt whose builder died: whoever finds one buries it there."""

    def __init__(self, root: Path, events: Events) -> None:
        super().__init__(root)
        self._events = events

    def bury(self, entry: Entry, record: Record, log: BuildLog | None = None) -> None:
        """See Failures."""
        super().bury(entry, record, log)
        if record.outcome == "died":
            self._events.tell(Recovered, id=record.id, attempt=record.attempt, reason=record.reason or "")


def _reason(error: BaseException) -> str:
    return getattr(error, "reason", None) or str(error) or type(error).__name__


def _without(listeners: tuple[Listener, ...], gone: Listener) -> tuple[Listener, ...]:
    return tuple(one for one in listeners if one is not gone)
