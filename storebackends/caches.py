"""Named caches: trees that builds borrow a private copy of, add to, and give back.

    ROOT/caches/NAME/GEN/        a generation; the highest number is the current one, and its tree never changes
    ROOT/loans/NAME~ATTEMPT/     a private copy in the hands of one borrower

Giving back is one rename of the loan to the generation after the one it was cloned from. Where there is one already,
somebody was first, and the copy is dropped. So a cache is always whole, whoever dies when. The locks, none of which is
that of an id, since no id has a slash:

    lease of cache/NAME          it is lent, so it stays
    lease of cache/NAME/GEN      loans were cloned from it, so it stays though a newer one has come
    `work` of loan/ATTEMPT       the borrower lives
    `work` of cache/NAME         there is a borrower in mode "locked"

The record of such a borrower's loan says what others who wait for the cache wait for with that: see builds.py.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self, get_args

from .backend import Backend, CacheEntry, Size
from .builds import Builds
from .durability import SUSPECT, Durability, unsynced
from .errors import Busy, NotSupported, StoreError, explained
from .following import note_waits
from .ids import check_id, new_attempt
from .locks import Lock, Locks, never
from .records import Record

log = logging.getLogger(__name__)

Mode = Literal["shared", "private", "locked"]
"""shared: all at once, and the first to give back wins. private: the same, and never given back. locked: one after the
other, so that each gets what the one before gave back."""
MODES: tuple[Mode, ...] = get_args(Mode)

_locked: ContextVar[list[tuple[Path, str]] | None] = ContextVar("storebackends_locked_caches", default=None)


def locked_here() -> list[tuple[Path, str]]:
    """The caches that are borrowed in mode "locked" by this thread, or by the build that it is in; with their stores.

    One list: asked for before a function begins, it is there in all that the function does, in other contexts too.
    """
    if (mine := _locked.get()) is None:
        _locked.set(mine := [])
    return mine


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What is known of one cache. *borrowers* are process ids, one for each loan."""

    name: str
    generation: int  # 0 until one is given back
    size: Size
    last_used: float  # when it was last borrowed or given back, in seconds since the epoch
    borrowers: tuple[int, ...]


class Loan:
    """A private copy of a cache: a context manager, given back at its end unless an exception ends it."""

    def __init__(
        self, backend: Backend, durability: Durability, entry: CacheEntry, path: Path, becomes: int, held: ExitStack
    ) -> None:
        self._backend, self._durability, self._entry, self._held = backend, durability, entry, held
        self._becomes = becomes  # the generation that it is to be; 0 where it is not given back
        self._pid = os.getpid()
        self.path = path
        """The copy: a folder to change at will, until it is given back or dropped."""

    def give_back(self) -> bool:
        """Make the copy the newest generation; False where it is private, or another was given back meanwhile.

        Raises StoreError where it cannot be kept. drop() is still to be called.
        """
        if not self._becomes:
            return False
        if self.path.is_symlink() or not self.path.is_dir():
            raise StoreError(f"the cache {self._entry.id!r} is not given back: {self.path} was removed or replaced")
        with explained(f"giving back the cache {self._entry.id!r}", self._backend.root):
            record = replace(self._entry.read(), finished=time.time(), waits_for=())
            record.save(self._entry.record)
            self._durability.before_rename(self._entry, self.path, self._backend.seals_durably)
            installed = self._backend.cache_install(self._entry, self._becomes)
        if installed is None:
            return False
        try:
            self._durability.published(installed, record.attempt)
        except (OSError, StoreError) as error:  # it is there: what fails now is told, and fails nothing
            log.warning("the cache %s is given back, but it is not known to be on the disk: %s", record.id, error)
        return True

    def drop(self) -> None:
        """Remove the copy unless it was given back, and let the cache go. Idempotent; in a forked child, nothing."""
        if self._pid == os.getpid():
            self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.give_back()
        finally:
            self.drop()


class Caches:
    """The caches of one open store."""

    def __init__(self, backend: Backend, locks: Locks, durability: Durability, boot: str, builds: Builds) -> None:
        self._backend, self._locks, self._durability, self._boot = backend, locks, durability, boot
        self._builds = builds

    def borrow(
        self,
        name: str,
        mode: Mode = "shared",
        owner: tuple[int, int] | None = None,
        cancelled: Callable[[], bool] = never,
        build: str | None = None,
    ) -> Loan:
        """Lend a private copy of the newest generation of *name*, or, of a new cache, an empty folder of *owner*.

        *build* is the id of the build that borrows it. Mode "locked" waits until it is the only one of that mode.
        Raises StoreError once cancelled() is true meanwhile, Busy where the wait could be for oneself, NotSupported
        where no folder of this host can show the copy.
        """
        check_id(name)
        if mode not in MODES:
            raise StoreError(f"a cache cannot be borrowed in mode {mode!r}; use {', '.join(MODES)}")
        with ExitStack() as held:
            held.callback(_trim, self._backend, self._locks, name, self._durability.marks_later)
            if mode == "locked":
                self._lock(name, held, cancelled)
            held.enter_context(self._locks.lease(_lent(name)))
            with explained(f"borrowing the cache {name!r}", self._backend.root):
                source = self._newest(name, held)
                entry = self._clone(name, source, held, mode == "locked", build or self._builds.borrower())
                path = self._backend.tree(entry)
                if source is None and owner is not None:
                    _give_to(path, owner)
            kept = held.pop_all()  # the loan's from here
        becomes = 0 if mode == "private" else _number(source) + 1
        return Loan(self._backend, self._durability, entry, path, becomes, kept)

    def infos(self) -> list[CacheInfo]:
        """All caches, by name. Measures each, file by file where the backend does not know better."""
        return [
            info for name in sorted({entry.id for entry in self._backend.cache_list()}) for info in self._info(name)
        ]

    def delete(self, name: str) -> bool:
        """Delete a cache; False where there is none of that name. Raises Busy while it is lent to anybody."""
        lock = self._locks.try_use(_lent(check_id(name)))
        if lock is None:
            holders = self._locks.holders(_lent(name))
            raise Busy(name, f"the cache is lent to {', '.join(holders) or 'somebody'}; wait, or end that", holders)
        with lock, explained(f"deleting the cache {name!r}", self._backend.root):
            entries = list(self._backend.cache_list(name))
            for entry in entries:
                self._backend.cache_drop(entry)
        return bool(entries)

    # Inside.

    def _lock(self, name: str, held: ExitStack, cancelled: Callable[[], bool]) -> None:
        key, mine = (self._backend.root, name), locked_here()
        lock = self._locks.try_work(_lent(name))
        if lock is None and any(key <= other for other in mine):
            # Who holds it may be waiting for one of ours. All waits go up in the order of names, so none is a circle.
            has = ", ".join(repr(other) for _, other in mine)
            reason = f"it is lent, and waiting for it with {has} locked could last for ever: lock in the order of names"
            raise Busy(name, reason, self._locks.holders(_lent(name)))
        if lock is None:
            with self._builds.waiting(_lent(name)):
                lock = self._locks.work(_lent(name), cancelled=cancelled)
        if lock is None:
            raise StoreError(f"the cache {name!r} was waited for until the build was cancelled or the store closed")
        held.enter_context(lock)
        mine.append(key)
        held.callback(mine.remove, key)

    def _newest(self, name: str, held: ExitStack) -> CacheEntry | None:
        """The current generation, leased."""
        while generations := _generations(self._backend, name):
            newest = generations[-1]
            lease = self._locks.lease(_of(newest))
            if newest.folder.is_dir():
                held.enter_context(lease)
                return newest
            lease.release()  # a newer one came, and this one went before it was leased
        return None

    def _clone(
        self, name: str, source: CacheEntry | None, held: ExitStack, locked: bool, borrower: str | None
    ) -> CacheEntry:
        waits = (borrower,) if locked and borrower else ()
        record = Record(name, new_attempt(), boot=self._boot, pid=os.getpid(), started=time.time(), waits_for=waits)
        lives = self._locks.try_work(_borrower(record.attempt))
        assert lives is not None  # noqa: S101 (nobody else knows the attempt)
        held.enter_context(lives)
        if source:
            os.utime(source.folder)  # its last use
        entry = self._backend.cache_clone(source, record)
        held.callback(_drop, self._backend, entry)
        if locked and not borrower:
            held.enter_context(self._builds.borrowing(_lent(name), partial(note_waits, entry, record)))
        return entry

    def _info(self, name: str) -> Iterator[CacheInfo]:
        loans = list(_loans(self._backend, self._locks, name))
        with ExitStack() as held:
            newest = self._newest(name, held)
            try:
                size = self._backend.cache_size(newest) if newest else Size(0, exact=True)
                times = [loan.started for loan in loans] + ([newest.folder.stat().st_mtime] if newest else [])
            except (OSError, StoreError):
                if newest is None or newest.folder.is_dir():
                    raise
                return  # the cache was deleted meanwhile
            if times:  # else a borrower died, and the first one
                yield CacheInfo(name, _number(newest), size, max(times), tuple(sorted(loan.pid for loan in loans)))


def locked_by(backend: Backend, locks: Locks, cache: str) -> Iterator[str]:
    """What ends before *cache* (cache/NAME) is free: the build that has it locked, or what its borrower waits for."""
    for loan in _loans(backend, locks, cache.partition("/")[2]):
        yield from loan.waits_for


def _loans(backend: Backend, locks: Locks, name: str) -> Iterator[Record]:
    """The records of the loans whose borrowers live."""
    for entry in backend.cache_list(name):
        if not entry.generation and not _is_free(locks.try_work(_borrower(entry.attempt))):
            with suppress(StoreError):  # it ended meanwhile
                yield entry.read()


# What opening a store does with what it finds.


def sweep(backend: Backend, locks: Locks) -> None:
    """Drop the loans of borrowers that died, and old generations that nobody holds. Never waits."""
    entries = list(backend.cache_list())
    for loan in entries:
        if not loan.generation and (lock := locks.try_work(_borrower(loan.attempt))):
            with lock:
                _drop(backend, loan)
    for name in {entry.id for entry in entries}:
        _trim(backend, locks, name, marks_later=False)


def drop_unsynced(backend: Backend, boot: str) -> None:
    """Drop what an unclean end of an earlier boot may have broken; the caller holds the store for itself alone."""
    for entry in list(backend.cache_list()):
        if entry.generation and entry.folder.name in unsynced(entry.folder.parent, boot):
            log.warning("the cache %s: its newest files may not have reached the disk; dropped", entry.id)
            backend.cache_drop(entry)


def _trim(backend: Backend, locks: Locks, name: str, marks_later: bool) -> None:
    """Drop the generations that nobody needs any more; those that loans were cloned from stay."""
    try:
        for old in _spent(backend, name, marks_later):
            if lock := locks.try_use(_of(old)):
                with lock:
                    _drop(backend, old)
    except (OSError, StoreError) as error:  # nothing depends on it
        log.warning("old generations of the cache %s stay until it is used again: %s", name, error)


def _drop(backend: Backend, entry: CacheEntry) -> None:
    try:
        backend.cache_drop(entry)
    except (OSError, StoreError) as error:  # nothing depends on it
        log.warning("%s is removed at the next open: %s", entry.folder, error)


def _generations(backend: Backend, name: str) -> list[CacheEntry]:
    """Those of the cache, oldest first."""
    return sorted((entry for entry in backend.cache_list(name) if entry.generation), key=_number)


def _spent(backend: Backend, name: str, marks_later: bool) -> Iterator[CacheEntry]:
    """All but the newest and, until that bears its mark, what a power cut may leave instead.

    That is the newest that is marked, and each after it: the barrier under way may be about to mark it.
    """
    generations = _generations(backend, name)
    synced = max((entry.generation for entry in generations if entry.synced.exists()), default=0)
    for entry in generations[:-1]:
        may_be_marked = (synced or marks_later) and not (entry.folder / SUSPECT).exists()
        if entry.generation < synced or not may_be_marked:
            yield entry


def _number(entry: CacheEntry | None) -> int:
    return entry.generation if entry else 0


def _is_free(lock: Lock | None) -> bool:
    if lock:
        lock.release()
    return lock is not None


def _give_to(path: Path, owner: tuple[int, int]) -> None:
    chown = getattr(os, "chown", None)
    if chown is None:
        raise NotSupported("giving a cache to an owner", "users have no numbers on this platform", "leave it out")
    chown(path, *owner)


# What the locks are called.


def _lent(name: str) -> str:
    return f"cache/{name}"


def _of(generation: CacheEntry) -> str:
    return f"cache/{generation.id}/{generation.generation}"


def _borrower(attempt: str) -> str:
    return f"loan/{attempt}"
