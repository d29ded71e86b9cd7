"""Which results go when there is too much, and why the others stay.

    policy -> plan -> deletions

Least recently used leaves go first; a base is a leaf once all that was built on it is gone. The locks decide, never
the plan: what is in use when its turn comes stays, and the plan says by whom. Space is measured as it is freed, since
no sum of sizes tells what a deletion gives back where trees share data.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path

from .backend import Backend, Size, Usage
from .durability import Durability
from .errors import Busy, ConfigError, NotFound, NotSupported, StoreError
from .index import Index, Row

log = logging.getLogger(__name__)

BATCH = 256  # deletions between two writes of the index, and hidden results that are reclaimed in one go
LARGE = 64 << 20  # bytes of hidden results that are not left to wait for more
PRUNING = "prune/"  # the lock, shared by prunes, that tells fsck of hidden results that wait; no id has a slash
SAMPLE = 1000  # deletions that are measured one by one
GIVE_UP = 64  # deletions after which space must have been gained
PATIENCE = 30.0  # seconds, in all, that a prune waits for a backend which frees space later
PACE = 10.0  # seconds between two looks at the space before builds
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # XFS and others free a file's blocks a moment after it is gone
_NAMED = 32  # leases whose holders are looked up: each reads all of /proc

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGTP])?(I)?B|(%))", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|m|h|d|w)", re.ASCII)
_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def bytes_of(amount: int | str, total: int) -> float:
    """An amount in bytes: a number of them, "10GiB" (1024), "10 GB" (1000), or a share of *total*, "15%".

    Raises ValueError for anything else.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0:
        return amount
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if not found or (found[3] and not found[2]) or (found[4] and float(found[1]) > 100):
        raise ValueError('should be a number of bytes, an amount like "10GiB" or "10 GB", or a share like "15%"')
    if found[4]:
        return float(found[1]) / 100 * total
    power = " KMGTP".index((found[2] or " ").upper())
    return float(found[1]) * float(1024 if found[3] else 1000) ** power


def seconds_of(duration: float | str) -> float:
    """A duration in seconds: a number of them, or "90 s", "30min", "12h", "7d", "2w". ValueError for anything else."""
    if isinstance(duration, int | float) and not isinstance(duration, bool) and 0 <= duration < math.inf:
        return duration
    found = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if not found:
        raise ValueError('should be a number of seconds, or a duration like "30min", "12h" or "7d"')
    return float(found[1]) * _SECONDS[found[2]]


@dataclass(frozen=True, slots=True)
class Policy:
    """When results go, as it was written: for amounts see bytes_of(), for durations seconds_of().

    min_free     so much is free where the trees are, and the like share of the inodes and of the metadata
    max_used     the results take no more: the sum of their sizes, or all that is in use there if that is less
    max_items    there are no more results
    keep_for     results that were used within that time stay, whatever the others ask for

    Raises ConfigError.
    """

    min_free: int | str | None = None
    max_used: int | str | None = None
    keep_for: float | str | None = None
    max_items: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, check in (("min_free", _check_amount), ("max_used", _check_amount), ("keep_for", seconds_of)):
            try:
                if (value := getattr(self, name)) is not None:
                    check(value)
            except ValueError as error:
                problems.append(f"{name}: {error}, not {value!r}")
        items = self.max_items
        if items is not None and (not isinstance(items, int) or isinstance(items, bool) or items < 0):
            problems.append(f"max_items: should be a number of results, not {items!r}")
        if problems:
            raise ConfigError("prune", problems)

    def over(self, other: Policy | None) -> Policy:
        """These rules, and those of *other* that are not among them."""
        mine = {rule: value for rule, value in asdict(self).items() if value is not None}
        return replace(other, **mine) if other else self

    def short_of(self, usage: Usage) -> list[str]:
        """What there is less of than min_free asks for: "bytes", "inodes", "metadata"."""
        return [what for what, margin in self.margins(usage) if margin < 0]

    def margins(self, usage: Usage) -> list[tuple[str, float]]:
        """By how large a share of all there is more of each than min_free asks for."""
        if self.min_free is None or not usage.total:
            return []
        least = bytes_of(self.min_free, usage.total) / usage.total
        supplies = (
            ("bytes", usage.free, usage.total),
            ("inodes", usage.inodes_free, usage.inodes_total),
            ("metadata", usage.metadata_free, usage.metadata_total),
        )
        return [(what, (free or 0) / total - least) for what, free, total in supplies if total]


def _check_amount(amount: int | str) -> float:
    return bytes_of(amount, 0)


@dataclass(frozen=True, slots=True)
class Step:
    """A result that goes. *used* is its last use, in seconds since the epoch; *reason* names the rule.

    *frees* is measured before; in a run of many, beyond the first thousand, it is the mean of those, as an estimate.
    """

    id: str
    used: float
    frees: Size
    reason: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A result that stays, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a prune did, or with *dry_run* would do: *steps* in their order. *unmet*: what held each rule back."""

    steps: tuple[Step, ...]
    kept: tuple[Kept, ...]
    unmet: tuple[str, ...]
    dry_run: bool

    @property
    def freed(self) -> Size:
        """The sum of what the steps free."""
        sizes = [step.frees for step in self.steps]
        return Size(sum(size.bytes for size in sizes), all(size.exact for size in sizes))


Hold = Callable[[str, bool], AbstractContextManager[None]]
"""Hold an id for a deletion; raises Busy where it is in use, and if the flag is set, says by whom."""


class Pruning:
    """One prune of one store."""

    def __init__(
        self, backend: Backend, index: Index, hold: Hold, children: Callable[[str], list[str]], policy: Policy
    ) -> None:
        self._backend, self._index, self._hold, self._children, self._policy = backend, index, hold, children, policy
        self._all = self._dry_run = False
        self._now = time.time()
        self._floor = math.inf if policy.keep_for is None else self._now - seconds_of(policy.keep_for)
        self._patience = PATIENCE
        self._sample = 0, 0  # how many were measured, and the sum of their sizes
        self._steps: list[Step] = []
        self._refused: dict[str, str] = {}  # id -> why
        self._gone: list[tuple[str, str]] = []  # (id, attempt) the index still has
        self._hidden: deque[tuple[Step, Path]] = deque()
        self._waiting = 0  # bytes of those
        self._take_stock()

    def run(self, *, all: bool = False, dry_run: bool = False) -> Plan:
        """Delete until every rule is met; with *all* what can go. With *dry_run* only find out what that would be.

        Raises ConfigError where there is no rule.
        """
        policy, self._all, self._dry_run = self._policy, all, dry_run
        if not all and (policy.min_free, policy.max_used, policy.max_items) == (None, None, None):
            reason = "no rule says what has to go: give min_free, max_used or max_items, or ask for all"
            raise ConfigError("prune", [reason])
        try:
            while self._leaves and (need := next(self._needs(), None)):
                used, id = heappop(self._leaves)
                if used > self._floor:
                    break  # and so are all others
                self._take(self._rows[id], need)
            if self._count and self._margin() < 0:
                self._gained()  # before it is said that it was not enough
        finally:
            self._index.forget(self._gone)
            self._reclaim()
        stays = list(self._stays())
        held = Counter(holder for _, holder, _ in stays if holder)
        kept = tuple(Kept(id, reason) for id, _, reason in stays)
        return Plan(tuple(self._steps), kept, tuple(self._unmet(held)), dry_run)

    # What there is.

    def _take_stock(self) -> None:
        there = set(self._backend.ids())
        self._rows = {row.id: row for row in self._index.rows() if row.id in there}
        self._unread = sorted(there - self._rows.keys())
        self._built_on = Counter(row.base for row in self._rows.values() if row.base is not None)
        self._leaves = [(row.used, row.id) for row in self._rows.values() if not self._built_on[row.id]]
        heapify(self._leaves)
        self._used = 0
        if self._policy.max_used is not None:
            self._measure_all()
            self._used = sum(row.size.bytes for row in self._rows.values() if row.size)
        self._usage = self._backend.usage()
        self._pending, self._count, self._stuck = 0, 0, False  # bytes and deletions since the space was looked at last
        self._mark = self._margin()

    def _measure_all(self) -> None:
        sizes = []
        for row in self._rows.values():
            try:
                if row.size is None:
                    sizes.append((row.id, row.attempt, self._measure(row.id)))
            except NotFound:
                continue  # deleted meanwhile
        self._index.measured(sizes)
        for id, _, size in sizes:
            self._rows[id] = replace(self._rows[id], size=size)

    # What the rules ask for.

    def _needs(self) -> Iterator[str]:
        """What each rule that is not met has to say; measured anew where that costs something."""
        policy, items = self._policy, len(self._rows) + len(self._unread)
        if self._all:
            yield "all was asked for"
            return
        if policy.max_items is not None and items > policy.max_items:
            yield f"max_items {policy.max_items}: there are {items}"
        if policy.max_used is not None:
            used = min(self._used, self._usage.total - self._usage.free)
            if used > bytes_of(policy.max_used, self._usage.total):
                yield f"max_used {policy.max_used}: {_size(used)} are used"
        if policy.min_free is not None and not self._stuck:
            self._look()
            if not self._count:
                self._mark = self._margin()
            yield from self._short()

    def _short(self) -> Iterator[str]:
        usage = self._usage
        free = {"inodes": f"{usage.inodes_free} inodes", "metadata": f"{_size(usage.metadata_free or 0)} of metadata"}
        for what in self._policy.short_of(usage):
            yield f"min_free {self._policy.min_free}: {free.get(what, _size(usage.free))} are free"

    def _look(self) -> None:
        if not self._dry_run:
            self._usage = self._backend.usage()

    def _margin(self) -> float:
        return min((margin for _, margin in self._policy.margins(self._usage)), default=0.0)

    # Deletions.

    def _take(self, row: Row, need: str) -> None:
        hidden = None
        try:
            with self._hold(row.id, len(self._refused) < _NAMED):
                if not self._backend.has(row.id):
                    raise NotFound(row.id)
                size = row.size or self._size_of(row.id)
                if not self._dry_run:
                    hidden = self._hide(row)
        except Busy as error:
            by = f" by {', '.join(error.holders)}" if error.holders else ""
            self._refused[row.id] = f"leased{by}"
        except NotFound:
            self._forget(row)  # another process was faster
        except _Stays as error:
            self._refused[row.id] = str(error)
        else:
            self._forget(row)
            step = Step(row.id, row.used, size, f"used {_time(self._now - row.used)} ago; {need}")
            if hidden:
                self._wait(step, hidden)
            else:
                self._done(step)

    def _size_of(self, id: str) -> Size:
        # To walk a tree costs as much as to remove it, so in the end the mean of many stands for each of the rest.
        count, total = self._sample
        if count >= SAMPLE and not self._dry_run:
            return Size(total // count, exact=False)
        size = self._measure(id)
        self._sample = count + 1, total + size.bytes
        return size

    def _measure(self, id: str) -> Size:
        try:
            return self._backend.size(id)
        except NotFound:
            raise
        except (StoreError, OSError) as error:
            log.warning("%s could not be measured: %s", id, error)
            return Size(0, exact=False)

    def _hide(self, row: Row) -> Path | None:
        # The plan is old by now: asked again under the locks, which nobody who builds on it or uses it can pass.
        attempt, used, is_base = self._index.state(row.id) or ("", 0.0, False)
        if (attempt, used) != (row.attempt, row.used):
            raise _Stays("used a moment ago")
        if is_base and (children := self._children(row.id)):
            raise _Stays(f"base of {children[0]}, built a moment ago")
        try:
            return self._backend.hide(row.id)
        except (StoreError, OSError) as error:
            log.warning("%s could not be deleted: %s", row.id, error)
            if not self._backend.has(row.id):
                raise NotFound(row.id) from error  # it is hidden at least: the next open tries again to reclaim it
            raise _Stays(f"could not be deleted: {error}") from error

    def _wait(self, step: Step, hidden: Path) -> None:
        """Reclaim it with others, after their locks; but where a rule asks for space, before that is looked at."""
        self._hidden.append((step, hidden))
        self._waiting += step.frees.bytes
        by_space = (self._policy.min_free, self._policy.max_used) != (None, None)
        if by_space or len(self._hidden) >= BATCH or self._waiting >= LARGE:
            self._reclaim()

    def _reclaim(self) -> None:
        self._waiting = 0
        while self._hidden:
            step, hidden = self._hidden.popleft()
            try:
                self._backend.reclaim(hidden)
            except (StoreError, OSError) as error:
                log.warning("%s is deleted, but the next open has to try again to reclaim it: %s", step.id, error)
            else:
                self._done(step)

    def _done(self, step: Step) -> None:
        self._steps.append(step)
        self._frees(step.frees)

    def _forget(self, row: Row) -> None:
        del self._rows[row.id]
        if not self._dry_run:
            self._gone.append((row.id, row.attempt))
            if len(self._gone) >= BATCH:
                self._index.forget(self._gone)
                self._gone.clear()
        if row.base is not None:
            self._built_on[row.base] -= 1
            if not self._built_on[row.base] and (base := self._rows.get(row.base)):
                heappush(self._leaves, (base.used, base.id))

    def _frees(self, size: Size) -> None:
        self._used -= size.bytes
        if self._dry_run:
            self._usage = replace(self._usage, free=min(self._usage.free + size.bytes, self._usage.total))
        elif self._mark < 0 and not self._stuck:
            self._pending, self._count = self._pending + size.bytes, self._count + 1
            if self._count >= GIVE_UP or self._is_due():
                self._stuck = not self._gained()
                self._pending, self._count, self._mark = 0, 0, self._margin()

    def _gained(self) -> bool:
        """Is there more space than at the last look, now that enough should be free? Waits a little for it."""
        started = time.monotonic()
        self._backend.settle(self._patience)
        margin = self._wait_for_more()
        if margin < 0 and (self._is_due() or margin <= self._mark):
            self._commit()
            self._look()
            margin = self._margin()
        self._patience = max(0.0, self._patience - (time.monotonic() - started))
        return margin > self._mark

    def _is_due(self) -> bool:
        """By the sizes of what was deleted, should enough be free?"""
        return self._pending >= round(-self._mark * self._usage.total)

    def _wait_for_more(self) -> float:
        last = self._mark
        for pause in _PAUSES:
            self._look()
            margin = self._margin()
            if margin >= 0 or margin == last > self._mark:  # enough, or no more to come
                return margin
            last = margin
            time.sleep(pause)
        return last

    def _commit(self) -> None:
        """Btrfs gives space back with its next transaction only."""
        try:
            paths = self._backend.sync_paths()
        except NotSupported:
            return  # then it is no file system of this host that the space is on
        durability = Durability("group", paths, self._backend.root / "result")
        try:
            durability.barrier()
        except StoreError as error:
            log.warning("%s", error)
        finally:
            durability.close(flush=False)

    # What stays.

    def _stays(self) -> Iterator[tuple[str, str, str]]:
        """(id, in general what holds it, why it stays)."""
        newest: dict[str, Row] = {}
        for row in self._rows.values():
            if row.base is not None and (row.base not in newest or newest[row.base].used < row.used):
                newest[row.base] = row
        for row in self._rows.values():
            yield (row.id, *self._stays_for(row, newest.get(row.id)))
        for id in self._unread:
            yield id, "damaged", "its record cannot be read; 'storebackends fsck --repair' moves it away"

    def _stays_for(self, row: Row, child: Row | None) -> tuple[str, str]:
        used = f"used {_time(self._now - row.used)} ago"
        if row.id in self._refused:
            return "in use", self._refused[row.id]
        if child:
            return "built on", f"base of {child.id}, used {_time(self._now - child.used)} ago"
        if row.used > self._floor:
            return f"used within keep_for {self._policy.keep_for}", f"{used}, keep_for {self._policy.keep_for}"
        return "", f"{used}; " + ("deleting more frees nothing" if self._stuck else "no rule needs it to go")

    def _unmet(self, held: Counter[str]) -> Iterator[str]:
        if self._all:
            return
        why = ", ".join(f"{count} {holder}" for holder, count in sorted(held.items()))
        why = f"held back by {why}" if why else "no result is left, and the rest is not this store's"
        yield from (f"{need}; {why}" for need in self._needs() if not self._is_guess(need))
        if self._stuck:
            freed = f"deleting {len(self._steps)} results, the last ones for nothing"
            yield from (f"{need} after {freed}: others fill it, or still hold the data" for need in self._short())

    def _is_guess(self, need: str) -> bool:
        """In a dry run, how many inodes a deletion frees is not known: that is no reason to say it cannot be met."""
        return self._dry_run and need.startswith("min_free") and "bytes" not in self._policy.short_of(self._usage)


class _Stays(Exception):
    """Why a victim stays, found out under its locks."""


class LowWater:
    """Prunes before a build, where less is free than the policy asks for. One at a time, and every few seconds."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._next = 0.0

    def check(self, policy: Policy, usage: Callable[[], Usage], prune: Callable[[], Plan]) -> None:
        """Never raises for want of space: the build may fit."""
        if policy.min_free is None or time.monotonic() < self._next or not self._turn.acquire(blocking=False):
            return
        try:
            self._next = time.monotonic() + PACE
            if policy.short_of(usage()):
                for reason in prune().unmet:
                    log.warning("before a build: %s", reason)
        except (StoreError, OSError) as error:
            log.warning("no space could be made before a build: %s", error)
        finally:
            self._turn.release()


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{unit != 'B':d}f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
