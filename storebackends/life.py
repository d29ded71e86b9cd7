"""The life of a build, once for every backend.

await and lease the base      no such result: BaseNotFound
take the `work` lock, look    another process was first: attached
clear, clone, log, function   a failure: the log to failed/, the rest to the trash
record, seal, rename          published; nothing fails the build from here
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from .backend import Backend, Capability, Entry
from .builds import Builds, Running
from .caches import Caches
from .digests import digest
from .durability import Durability
from .errors import BaseNotFound, BuildFailed, Cancelled, NotFound, StoreError, explained
from .events import Attempt, Events
from .failures import Failures
from .following import note_waits
from .ids import new_attempt
from .index import Index
from .locks import Locks
from .log import BuildLog
from .records import Record
from .sharing import Sharing
from .workspace import Workspace

log = logging.getLogger(__name__)

Function = Callable[[Workspace], object]
"""Fills a build's tree. What it returns is ignored; what it raises fails the build."""


class Life:
    """What a build of one open store goes through, in the thread that runs its function."""

    def __init__(
        self,
        backend: Backend,
        boot: str,
        locks: Locks,
        index: Index,
        durability: Durability,
        failures: Failures,
        events: Events,
        builds: Builds,
        caches: Caches,
        make_room: Callable[[], object],
    ) -> None:
        """*make_room* is called before a build begins."""
        self._root, self._backend, self._boot, self._locks, self._index = backend.root, backend, boot, locks, index
        self._durability, self._failures, self._events = durability, failures, events
        self._builds, self._caches, self._make_room = builds, caches, make_room
        self._scratch = backend.root / "scratch"
        self.sharing = Sharing(backend.root, backend, locks, failures, builds)
        self.verify = False
        """Keep the digest of each tree that is published."""

    def run(self, running: Running, fn: Function, base: str | None) -> None:
        """Bring *running* to its outcome: a result, of this build or another's, or what it raises."""
        if base is None:
            self._own(running, fn, None)
            return
        self.sharing.await_base(running, base)
        with self._locks.lease(base):
            if self._backend.result(base) is None:
                raise BaseNotFound(running.id, base)
            self._index.touch(base)
            self._own(running, fn, base)

    def _own(self, running: Running, fn: Function, base: str | None) -> None:
        self._make_room()
        if work := self.sharing.own(running):
            with work:
                self._attempt(running, fn, base)
        else:
            running.entry, running.outcome = self._entry(running.id), "attached"
            self._index.touch(running.id)

    def _attempt(self, running: Running, fn: Function, base: str | None) -> None:
        record = Record(
            id=running.id,
            attempt=new_attempt(),
            base=base,
            base_attempt=self._entry(base).attempt if base else None,
            boot=self._boot,
            pid=os.getpid(),
            started=time.time(),
        )
        with Attempt(self._events, record, lambda: running.current_log, self._is_published):
            self._make(running, fn, record)

    def _make(self, running: Running, fn: Function, record: Record) -> None:
        if record.base is not None:
            self._index.add(record.id, record.attempt, record.base)
        try:
            with explained(f"beginning the build of {record.id!r}", self._root):
                entry = self._backend.build(record.id, record.base, record.attempt, record)
        except BaseException as error:
            self._forget(record.id, error)
            raise
        running.note = partial(note_waits, entry, record)
        try:
            self._fill(running, entry, fn)
            self._publish(running, entry, record)
        except BaseException as error:
            if self._is_published(record):
                self._moved(running)
                raise
            self._bury(running, entry, record, error)
            raise

    def _fill(self, running: Running, entry: Entry, fn: Function) -> None:
        with explained(f"beginning the log of {entry.id!r}", self._root):
            build_log = BuildLog.create(entry.file("log"), turnstile=self._locks.turnstile(entry.id))
        running.has_log(build_log, here=True)
        work = Workspace(self._backend, entry, build_log, running.cancel, self._scratch, self._caches)
        try:
            fn(work)
            work.end(give_back=True)
        except Exception as error:
            if running.cancel.is_set():
                raise Cancelled(entry.id, entry.attempt) from error
            raise BuildFailed(entry.id, entry.attempt, _reason(error)) from error
        finally:
            self._builds.publishes(running)
            work.end()
        if running.cancel.is_set():
            raise Cancelled(entry.id, entry.attempt)

    def _publish(self, running: Running, entry: Entry, record: Record) -> None:
        tree = self._backend.tree(entry) if Capability.HOST_TREE in self._backend.capabilities else None
        if tree and not _is_folder(tree):
            raise BuildFailed(entry.id, entry.attempt, f"its function removed or replaced its tree, {tree}")
        build_log = running.current_log
        assert build_log is not None  # noqa: S101 (_fill made it)
        with explained(f"publishing {entry.id!r}", self._root):
            length = build_log.finish()
            digest = self._digest(tree) if self.verify and tree else None
            final = replace(record, finished=time.time(), outcome="built", log_length=length, digest=digest)
            entry.save(final)
            self._durability.before_rename(entry, tree, self._backend.seals_durably)
            with build_log.moving() as move:
                running.entry = self._backend.rename(entry.id)
                move.to(running.entry.file("log"))
        self._after_rename(running.entry, record)
        build_log.close()

    def _digest(self, tree: Path) -> str | None:
        try:
            return digest(tree)
        except StoreError as error:
            log.warning("a result is published without a digest: %s", error)
            return None

    def _after_rename(self, published: Entry, record: Record) -> None:
        # The result is there: what fails now is told, and fails nothing.
        if record.base is None:
            self._index.built(record.id, record.attempt)
        try:
            self._durability.published(published, record.attempt)
        except (OSError, StoreError) as error:
            log.warning("%s is published, but it is not known to be on the disk: %s", published.id, error)

    def _is_published(self, record: Record) -> bool:
        entry = self._backend.result(record.id)
        with suppress(StoreError):
            return entry is not None and entry.attempt == record.attempt
        return False

    def _moved(self, running: Running) -> None:
        if build_log := running.current_log:
            with build_log.moving() as move:
                move.to(self._entry(running.id).log)
            build_log.close()

    def _bury(self, running: Running, entry: Entry, record: Record, error: BaseException) -> None:
        """Keep the log of a build that failed, and remove the rest; what goes wrong here is noted on *error*."""
        outcome = "failed" if isinstance(error, Exception) and not isinstance(error, Cancelled) else "cancelled"
        reason = getattr(error, "reason", None) or _reason(error)
        build_log = running.current_log
        try:
            length = build_log.finish() if build_log else None
            final = replace(record, finished=time.time(), outcome=outcome, reason=reason, log_length=length)
            self._failures.bury(entry, final, build_log)
        except (OSError, StoreError) as second:
            error.add_note(f"its log could not be kept: {second}")
        self._forget(entry.id, error)
        try:
            self._backend.discard(entry.id, entry.attempt)
        except (OSError, StoreError) as second:
            error.add_note(f"what it left is removed at the next open: {second}")
        if build_log:
            build_log.close()

    def _forget(self, id: str, error: BaseException) -> None:
        """Take from the index what a build announced to it; what goes wrong here is noted on *error*."""
        try:
            self._index.remove(id)
        except (OSError, StoreError) as second:
            error.add_note(f"the index still names it, until the next open: {second}")

    def _entry(self, id: str) -> Entry:
        if (entry := self._backend.result(id)) is None:
            raise NotFound(id)
        return entry


def _is_folder(path: Path) -> bool:
    """Is it one itself, and no link to one?"""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _reason(error: BaseException) -> str:
    """What went wrong, in half a line."""
    if isinstance(error, StoreError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
