"""The Store: what callers use. It leases the id and looks; what is not there goes through the life of a build."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from .backend import Backend, Capability, Entry, Size, Usage
from .builds import Build, Builds, Running, building
from .caches import CacheInfo, Caches, Mode, locked_by
from .durability import Durability
from .errors import Busy, NotFound, StoreError, explained
from .events import Attached, Event, Events, Hit, Listener, Pruned
from .failures import Failures
from .fsck import Check, Report
from .ids import check_id
from .index import Index
from .life import Function, Life
from .locks import Keys, Lease, Lock, Locks
from .log import BuildLog
from .marker import Marker
from .prune import PRUNING, LowWater, Plan, Policy, Pruning
from .records import Record
from .results import Result, saved_log

log = logging.getLogger(__name__)


class Store:
    """A root folder, a backend and an index, shared by any number of threads and processes. Made by open_store()."""

    def __init__(
        self,
        root: Path,
        marker: Marker,
        backend: Backend,
        *,
        locks: Locks,
        presence: Lock,
        failures: Failures,
        events: Events,
        detach_barrier: Callable[[], None] | None = None,
    ) -> None:
        self._root, self._marker, self._backend, self._locks, self._failures = root, marker, backend, locks, failures
        self._presence = presence  # the store's lock, shared: nobody may have the store for itself alone
        paths = [] if marker.durability == "none" else backend.sync_paths()
        self._durability = Durability(marker.durability, paths, root / "result")
        try:
            self._index = Index(root, root / "result")
        except BaseException:
            self._durability.abandon()
            raise
        self._builds = Builds(root, partial(locked_by, backend, locks))
        self._caches = Caches(backend, locks, self._durability, marker.boot, self._builds)
        # A process that opens the root alone knows no other file system.
        self._detach_barrier = detach_barrier if set(paths) <= {root} else None
        self.prune_policy: Policy | None = None
        """What prune() goes by where it is not told; with a min_free, builds prune first where less is free."""
        self._low_water = LowWater()
        self._events = events
        self._life = Life(
            backend,
            marker.boot,
            locks,
            self._index,
            self._durability,
            failures,
            events,
            self._builds,
            self._caches,
            self._make_room,
        )
        self._shown: weakref.WeakSet[Result] = weakref.WeakSet()  # their views end with the store, as all leases do
        self._closed = threading.Event()
        self._forked = False
        _open_stores.add(self)

    # What callers use.

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self._root

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self._marker.backend

    @property
    def durability(self) -> str:
        """group, full or none."""
        return self._marker.durability

    @property
    def verify(self) -> bool:
        """Keep the digest of each tree that is published from now on, for fsck() to compare? Reads the whole tree."""
        return self._life.verify

    @verify.setter
    def verify(self, verify: bool) -> None:
        self._life.verify = verify

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the trees of this store can hold or do."""
        return self._backend.capabilities

    @property
    def contained(self) -> bool:
        """Do the commands of builds run in containers of the backend's?"""
        return self._backend.contained

    def build(self, id: str, fn: Function, base: str | None = None) -> Result:
        """Return the result of *id*; where there is none, run *fn* in this thread on a clone of *base*, and publish.

        Where the id is being built already, that build's outcome is awaited instead. Raises InvalidId, BaseNotFound,
        BuildFailed with the function's exception as its cause, Cancelled, NoSpace, or StoreError where the storage
        fails; an interrupt passes through. In each case nothing is kept under the id but the log.
        """
        build, running = self._begin(id, base)
        try:
            if running:
                self._execute(running, fn, base)
                if running.error and not isinstance(running.error, StoreError):
                    raise running.error
            return build.wait()
        except BaseException:
            build.cancel()
            raise

    def start(self, id: str, fn: Function, base: str | None = None) -> Build:
        """As build(), but run *fn* in a thread of its own and return at once."""
        build, running = self._begin(id, base)
        if running:
            thread = threading.Thread(target=self._execute, args=(running, fn, base), name=f"build {id}")
            try:
                thread.start()
            except BaseException as error:
                self._builds.end(running, error)
                raise
        return build

    @contextmanager
    def use(self, id: str, fn: Function | None = None, base: str | None = None) -> Iterator[Result]:
        """Hold the result of *id* for the length of the block, building it by *fn* where there is none.

        Raises NotFound where there is none and no *fn*, else what build() does.
        """
        result = self.result(id) if fn is None else self.build(id, fn, base)
        if result is None:
            raise NotFound(id)
        with result:
            yield result

    def result(self, id: str) -> Result | None:
        """Return what is kept under *id*, leased, or None. A stat and a lock; starts no process."""
        self._check_open()
        lease = self._locks.lease(check_id(id))
        entry = self._backend.result(id)
        if entry is None:
            lease.release()
            return None
        self._index.touch(id)
        return self._lend(entry, lease, "hit")

    def log(self, id: str) -> BuildLog:
        """The log of *id*: of the build under way, else of the result, else of the newest failure. Raises NotFound."""
        self._check_open()
        running = self._builds.get(check_id(id))
        if running and running.current_log:
            return running.current_log
        # In the order in which a log moves, so that none is missed on its way.
        if live := self._life.sharing.follow(id):
            return live
        if entry := self._backend.result(id):
            return saved_log(entry)
        with explained("listing the failures", self._root):
            failed = self._failures.newest(id)
        if failed:
            return saved_log(failed)
        raise NotFound(id, f"no build, result or failure of {id!r} is known here, so there is no log")

    def delete(self, id: str, recursive: bool = False) -> None:
        """Delete the result of *id*; with *recursive* all that was built on it, leaves first. Idempotent.

        Raises Busy where it, or one of those, is in use, or where something is built on it and not *recursive*.
        """
        self._check_open()
        check_id(id)
        for victim in self._descendants(id) if recursive else [id]:
            self._delete_one(victim)

    def ids(self) -> Iterator[str]:
        """The ids of all results, in no order."""
        self._check_open()
        return self._ids()

    def children(self, id: str) -> list[str]:
        """The ids of the results that were built on *id*."""
        self._check_open()
        return [child for child in self._index.children(check_id(id)) if self._is_child(child, id)]

    def record(self, id: str) -> Record:
        """What is recorded of the result of *id*, without leasing it. Raises NotFound."""
        self._check_open()
        return self._entry(check_id(id)).read()

    def running(self) -> list[tuple[str, str]]:
        """(id, attempt) of each build under way, in any process."""
        self._check_open()
        with explained("listing the builds under way", self._root):
            return sorted(self._backend.unfinished())

    def failures(self) -> set[str]:
        """The ids whose newest failures are kept, with their logs."""
        self._check_open()
        with explained("listing the failures", self._root):
            return self._failures.ids()

    def size(self, id: str) -> Size:
        """What deleting *id* would free. Raises NotFound."""
        self._check_open()
        with explained(f"measuring {id!r}", self._root):
            return self._backend.size(check_id(id))

    @contextmanager
    def cache(self, name: str, mode: Mode = "shared", owner: tuple[int, int] | None = None) -> Iterator[Path]:
        """Lend a private copy of the cache *name*, a folder to change at will; given back when the block ends well.

        A new cache is an empty folder of *owner*. With "shared" the first to give back wins, and the copies of those
        who borrowed meanwhile are dropped; "private" is never given back; "locked" waits for other "locked" ones. What
        a block that raises did to its copy is dropped. Raises InvalidId, NotSupported, NoSpace, or Busy for a wait that
        could be for oneself, in whatever process.
        """
        self._check_open()
        with self._caches.borrow(name, mode, owner, self._closed.is_set) as loan:
            yield loan.path
            self._check_open()  # closed meanwhile, so that no lock keeps it in order

    def caches(self) -> list[CacheInfo]:
        """What is known of each cache, by name. Measures them all, which may take long."""
        self._check_open()
        with explained("measuring the caches", self._root):
            return self._caches.infos()

    def delete_cache(self, name: str) -> bool:
        """Delete a cache; False where there was none of that name. Raises Busy while it is lent, in any process."""
        self._check_open()
        return self._caches.delete(name)

    def usage(self) -> Usage:
        """Space below the store, on the tightest file system that holds trees."""
        self._check_open()
        with explained("measuring the space", self._root):
            return self._backend.usage()

    def prune(
        self,
        *,
        min_free: int | str | None = None,
        max_used: int | str | None = None,
        keep_for: float | str | None = None,
        max_items: int | None = None,
        all: bool = False,
        dry_run: bool = False,
    ) -> Plan:
        """Delete the least recently used results until the rules are met, and tell what went, what stayed, and why.

        What a rule is, see storebackends.prune.Policy; one that is not given is as in `prune_policy`. With *all*
        everything goes that is not in use, and only the rules given here hold. Never waits for a result in use. With
        *dry_run* nothing is deleted. Raises ConfigError for a rule that makes no sense, or where there is none.
        """
        self._check_open()
        given = Policy(min_free, max_used, keep_for, max_items)
        return self._prune(given.over(None if all else self.prune_policy), all=all, dry_run=dry_run)

    def fsck(
        self, *, repair: bool = False, content: bool = False, sample: int | None = None, seed: int | None = None
    ) -> Report:
        """Hold the disk against the index, the locks and the mounts, and report what does not fit.

        With *content* the trees whose digest was kept are read and compared: all, or *sample* of them, chosen by
        *seed*. With *repair* what can be mended is; a result that is damaged moves to quarantine/, with all that was
        built on it, for its id to be built anew. Never touches what is in use, nor files that nobody here made.
        """
        self._check_open()
        check = Check(self._backend, self._index, self._locks, self._failures, self.durability, self._unused)
        with explained("checking the store", self._root):
            return check.run(repair=repair, content=content, sample=sample, seed=seed)

    def listen(self, listener: Callable[[Event], object]) -> Listener:
        """Have *listener* called with each event (see storebackends.events) from now on, until its handle's close().

        It is called in a thread of the store's own, one event at a time. What it raises is logged. Where it is too
        slow the oldest events are dropped. It may call the store, but not close it and wait.
        """
        self._check_open()
        return self._events.listen(listener)

    def close(self) -> None:
        """End the builds under way, release every Result, bring what was published to the disk. Idempotent."""
        if self._closed.is_set() or self._forked:
            return
        for running in self._builds.close():
            running.wait(None)
        self._events.close()  # now, while a listener may still ask the store
        self._closed.set()
        for result in list(self._shown):
            result.release()
        with ExitStack() as undo:
            undo.callback(_open_stores.discard, self)
            undo.callback(self._locks.close)
            undo.callback(self._backend.close)
            undo.callback(self._index.close)
            undo.callback(self._close_durability)
            undo.callback(self._life.sharing.close)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self._marker.backend} {str(self._root)!r}>"

    # Building.

    def _begin(self, id: str, base: str | None) -> tuple[Build, Running | None]:
        """Become a caller; where that starts a new build, return it too, for the caller to execute."""
        self._check_open()
        check_id(id)
        if base is not None:
            check_id(base)
        lease = self._locks.lease(id)
        try:
            if found := self._backend.result(id):
                self._index.touch(id)
                return Build(id, lease, None, found, self._builds, self._lend), None
            running, new = self._builds.join(id)
        except BaseException:
            lease.release()
            raise
        build = Build(id, lease, running, None, self._builds, self._lend)
        build.is_builder = new
        return build, running if new else None

    def _lend(self, entry: Entry, lease: Lease, outcome: str) -> Result:
        if outcome != "built":
            self._durability.settle(entry)
            if self._events.heard:
                self._events.tell(Hit if outcome == "hit" else Attached, id=entry.id)
        return Result(entry, lease, outcome, self._show)

    def _show(self, result: Result) -> AbstractContextManager[Path]:
        self._shown.add(result)  # before the look: close() looks after the mark, so one of both ends the view
        self._check_open()
        return self._backend.view(result.id)

    def _execute(self, running: Running, fn: Function, base: str | None) -> None:
        error: BaseException | None = None
        try:
            with (
                explained(f"building {running.id!r}", self._root),
                self._builds.waiting(running.id),
                building(running),
            ):
                self._life.run(running, fn, base)
        except BaseException as raised:  # noqa: BLE001 (each caller gets it, or its like)
            error = raised
        self._builds.end(running, error)

    # Deleting.

    def _descendants(self, id: str) -> list[str]:
        """*id* and all that was built on it, leaves first."""
        order, stack = [], [id]
        while stack:
            order.append(stack.pop())
            stack += self.children(order[-1])
        return order[::-1]

    def _make_room(self) -> None:
        if policy := self.prune_policy:
            self._low_water.check(policy, self._backend.usage, partial(self._prune, policy))

    def _prune(self, policy: Policy, *, all: bool = False, dry_run: bool = False) -> Plan:
        started = time.monotonic()
        with explained("pruning", self._root), self._locks.lease(PRUNING), self._locks.keys() as keys:
            hold = partial(self._unused, locks=keys)
            pruning = Pruning(self._backend, self._index, hold, self.children, policy)
            plan = pruning.run(all=all, dry_run=dry_run)
        if plan.steps and not dry_run:
            ids, freed = tuple(step.id for step in plan.steps), plan.freed
            seconds = time.monotonic() - started
            self._events.tell(Pruned, ids=ids, bytes=freed.bytes, exact=freed.exact, seconds=seconds)
        return plan

    @contextmanager
    def _unused(self, id: str, named: bool = True, locks: Keys | None = None) -> Iterator[None]:
        """Hold both locks of *id*, by *locks*. Raises Busy where anybody uses it, and if *named* says who."""
        work = (locks or self._locks).try_work(id)
        use = work and (locks or self._locks).try_use(id)
        try:
            if use is None:
                if work:
                    work.release()  # or this process would be among the holders
                holders = self._locks.holders(id) if named else []
                raise Busy(id, f"in use by {', '.join(holders) or 'another process'}; wait, or end that", holders)
            yield
        finally:
            for lock in (use, work):
                if lock:
                    lock.release()

    def _delete_one(self, id: str) -> None:
        with self._unused(id):
            # Asked under the locks: a build on this id leases it first, and a published one left an edge.
            if children := self.children(id):
                raise Busy(
                    id, f"{len(children)} results are built on it ({children[0]} ...): delete recursively", children
                )
            with explained(f"deleting {id!r}", self._root):
                self._backend.delete(id)
            self._index.remove(id)

    def _is_child(self, child: str, base: str) -> bool:
        entry = self._backend.result(child)
        try:
            return entry is not None and entry.read().base == base
        except NotFound:
            return False

    # Inside.

    def _ids(self) -> Iterator[str]:
        with explained("listing the results", self._root):
            yield from self._backend.ids()

    def _entry(self, id: str) -> Entry:
        if (entry := self._backend.result(id)) is None:
            raise NotFound(id)
        return entry

    def _check_open(self) -> None:
        if self._forked:
            raise StoreError("this store was opened before a fork; open it again in the child")
        if self._closed.is_set():
            raise StoreError(f"the store {self._root} is closed; open it again")

    def _close_durability(self) -> None:
        hand_over = self._detach_barrier if self._durability.pending() else None
        try:
            self._durability.close(flush=hand_over is None)
        finally:
            if hand_over:
                hand_over()

    def _abandon(self) -> None:
        self._forked = True
        self._events.abandon()
        self._durability.abandon()


_open_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _abandon_in_child() -> None:
    for store in list(_open_stores):
        store._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
