"""Is what a store should have there, whole, and nothing else? The disk against the index, the locks and the mounts.

Everything found is told. To repair is to remove what nobody can miss (what dead builders and interrupted deletions
left, rows of the index) and to take what is damaged out of the way, with all that was built on it:

    ROOT/quarantine/ID~NONCE/   the entry as it was; its id can be built anew

Nothing in use is touched, nor anything that nobody here made.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import renames, trees
from .backend import Backend, Entry, Problem
from .digests import digest
from .durability import SUSPECT, Durability
from .errors import NotFound, NotSupported, StoreError
from .failures import Failures
from .index import Index
from .locks import Locks
from .prune import PRUNING
from .records import Record
from .recovery import discard_dead

ROOMS = frozenset(["caches", "failed", "in-progress", "loans", "locks", "quarantine", "result", "scratch", "trash"])
"""The folders in a store's folder, on every backend."""
FILES = re.compile(r"(\.)?store\.json.*|index\.(dirty|sqlite(-journal|-shm|-wal)?)")
"""And the files."""
UNSYNCED = 60.0
"""Seconds after which a result that is not known to be on the disk is no longer just new."""
SEEDS = 1 << 32

Damage = tuple[str, str]
"""The kind of a finding, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. *what* is an id or a path.

    *kind* is one of: unfinished (a build without a builder), loan (of a cache, without a borrower), scratch, trash (a
    deletion that was interrupted), index, record, tree, content, suspect (the disk failed to write it), unsynced, base
    (it is gone), outside (a resource of the backend), mount, unknown (a file that nobody here made).
    """

    kind: str
    what: str
    problem: str
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What was found among *results* results. Of these *compared* were read and compared to their digests, and
    *without_digest* could not be; *seed* chose which, where a sample was asked for."""

    findings: tuple[Finding, ...]
    results: int
    compared: int = 0
    without_digest: int = 0
    seed: int | None = None

    @property
    def is_clean(self) -> bool:
        """Is all repaired that was found, files of unknown origin aside?"""
        return all(finding.repaired or finding.kind == "unknown" for finding in self.findings)


class Check:
    """One check of one store."""

    def __init__(
        self,
        backend: Backend,
        index: Index,
        locks: Locks,
        failures: Failures,
        durability: str,
        unused: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """*unused* holds an id for a deletion, or raises Busy."""
        self._backend, self._index, self._locks, self._failures = backend, index, locks, failures
        self._durability, self._unused = durability, unused
        self._root, self._results = backend.root, backend.root / "result"
        self._built_on: dict[str, list[str]] = {}
        self._indexed: dict[str, tuple[str, str | None]] = {}
        self._content: set[str] = set()  # the ids to be compared
        self._without_digest = 0

    def run(
        self, *, repair: bool = False, content: bool = False, sample: int | None = None, seed: int | None = None
    ) -> Report:
        """See Store.fsck()."""
        ids = sorted(self._backend.ids())
        if sample is not None:
            seed = random.SystemRandom().randrange(SEEDS) if seed is None else seed
            self._content = set(random.Random(seed).sample(ids, min(sample, len(ids))))  # noqa: S311 (to be repeated)
        elif content:
            self._content = set(ids)
        checks = (
            self._unfinished(),
            self._loans(),
            self._scratch(),
            self._trash(),
            self._rows(),
            self._kept(ids),
            self._mounts(),
            self._unknown(),
            self._outside(),
        )
        findings = [_settle(kind, problem, repair) for found in checks for kind, problem in found]
        seed = seed if sample is not None else None
        return Report(tuple(findings), len(ids), len(self._content), self._without_digest, seed)

    # What was left behind. Each is told, and so repaired, while its lock is held.

    def _unfinished(self) -> Iterator[tuple[str, Problem]]:
        for id, attempt in sorted(self._backend.unfinished()):
            if lock := self._locks.try_work(id):
                with lock:
                    if (id, attempt) in set(self._backend.unfinished()):  # it may just have ended
                        repair = partial(discard_dead, self._backend, self._failures, id, attempt)
                        yield "unfinished", Problem(id, f"attempt {attempt} has no builder any more", repair)

    def _loans(self) -> Iterator[tuple[str, Problem]]:
        for loan in [entry for entry in self._backend.cache_list() if not entry.generation]:
            if lock := self._locks.try_work(f"loan/{loan.attempt}"):  # see caches.py
                with lock:
                    if loan.folder.exists():
                        repair = partial(self._backend.cache_drop, loan)
                        yield "loan", Problem(loan.id, "this copy of a cache has no borrower any more", repair)

    def _scratch(self) -> Iterator[tuple[str, Problem]]:
        scratch = self._root / "scratch"
        strays = set(os.listdir(scratch))  # before the builds are listed: a build is there before its scratch
        for name in sorted(strays - {attempt for _, attempt in self._backend.unfinished()}):
            yield "scratch", Problem(str(scratch / name), "belongs to no build", partial(trees.remove, scratch / name))

    def _trash(self) -> Iterator[tuple[str, Problem]]:
        trash = self._root / "trash"
        left = []
        # A disk that turned read-only refuses the lock; with nothing in the trash none is needed.
        if os.listdir(trash) and (alone := self._locks.try_use(PRUNING)):  # else what a prune has hidden waits there
            with alone:
                left = [trash / name for name in sorted(os.listdir(trash)) if self._is_left(trash / name)]
        for path in left:  # all are told before one repair removes them all
            yield "trash", Problem(str(path), "was deleted in part only", partial(self._sweep, path))

    def _is_left(self, path: Path) -> bool:
        if lock := self._locks.try_work(path.name.partition("~")[0]):  # else it is being deleted
            with lock:
                return os.path.lexists(path)
        return False

    def _sweep(self, path: Path) -> None:
        if os.path.lexists(path):
            self._backend.sweep()
        if os.path.lexists(path):
            raise StoreError("it cannot be removed; the log says why")

    def _rows(self) -> Iterator[tuple[str, Problem]]:
        building = {id for id, _ in self._backend.unfinished()}
        for row in self._index.rows():
            self._indexed[row.id] = row.attempt, row.base
            if row.id in building or self._backend.result(row.id):
                continue
            if lock := self._locks.try_work(row.id):
                with lock:
                    if self._backend.result(row.id) is None:
                        repair = partial(self._index.forget, [(row.id, row.attempt)])
                        yield "index", Problem(row.id, "the index knows a result that is not there", repair)

    # Results.

    def _kept(self, ids: Sequence[str]) -> Iterator[tuple[str, Problem]]:
        chosen, self._content = self._content, set()
        for id in ids:  # first of all, since quarantine takes the descendants too
            if record := self._record(id):
                if record.base is not None:
                    self._built_on.setdefault(record.base, []).append(id)
                if id in chosen:
                    self._content |= {id} if record.digest else set()
                    self._without_digest += not record.digest
        for id in ids:
            lease = self._locks.try_lease(id)
            if lease is None:  # it is being deleted
                continue
            with lease:
                damage = self._damage(id)
                others = [] if damage else list(self._blemishes(id))
            if damage:
                kind, problem = damage
                yield kind, Problem(id, problem, partial(self._quarantine, id))
            yield from others

    def _damage(self, id: str) -> Damage | None:
        """What is wrong with the result of *id* itself."""
        entry = self._backend.result(id)
        if entry is None:
            return None
        try:
            record = entry.read()
        except StoreError as error:
            return "record", str(error)
        if record.id != id:
            return "record", f"its record is that of {record.id!r}"
        if os.path.lexists(entry.folder / SUSPECT):
            return "suspect", "the disk failed to write it: its files may be lost when the host restarts"
        return self._damaged_tree(entry, record)

    def _damaged_tree(self, entry: Entry, record: Record) -> Damage | None:
        try:
            with self._backend.view(entry.id) as tree:
                if not stat.S_ISDIR(os.lstat(tree).st_mode):
                    return "tree", f"{tree} is no folder"
                return _other_content(tree, record) if entry.id in self._content else None
        except NotSupported:
            return None
        except (NotFound, FileNotFoundError) as error:
            return "tree", f"its tree is not there: {error}"

    def _blemishes(self, id: str) -> Iterator[tuple[str, Problem]]:
        """What is wrong around a result that is whole."""
        entry, record = self._backend.result(id), self._record(id)
        if entry is None or record is None:
            return
        if self._indexed.get(id) != (record.attempt, record.base):
            repair = partial(self._index.add, id, record.attempt, record.base)
            yield "index", Problem(id, "the index has it wrong: what may be deleted is decided by that", repair)
        if record.base is not None and self._backend.result(record.base) is None:
            yield "base", Problem(id, f"its base {record.base!r} is gone; delete it, or build that again")
        age = time.time() - (record.finished or record.started)
        if self._durability != "none" and age > UNSYNCED and not entry.synced.exists():
            repair = partial(self._sync, entry)
            yield "unsynced", Problem(id, "it is not known to be on the disk; the next power cut may cost it", repair)

    def _sync(self, entry: Entry) -> None:
        if not entry.synced.exists():  # the first one's barrier is that of all
            durability = Durability(self._durability, self._backend.sync_paths(), self._results)
            try:
                durability.flush()
            finally:
                durability.close(flush=False)

    def _record(self, id: str) -> Record | None:
        try:
            return Entry(id, self._results / id).read()
        except StoreError:
            return None

    # Quarantine.

    def _quarantine(self, id: str) -> None:
        for victim in self._descendants(id)[::-1]:
            with self._unused(victim):
                # Asked again: it may have been built anew since. What was built on a damaged one goes with it.
                if self._backend.result(victim) and (victim != id or self._damage(id)):
                    folder = self._root / "quarantine"
                    folder.mkdir(mode=0o700, exist_ok=True)
                    renames.rename(self._results / victim, folder / f"{victim}~{secrets.token_hex(4)}")
                    self._index.remove(victim)

    def _descendants(self, id: str) -> list[str]:
        order, stack = list[str](), [id]
        while stack:
            order.append(stack.pop())
            stack += self._built_on.get(order[-1], ())
        return order

    # What is not ours to repair.

    def _mounts(self) -> Iterator[tuple[str, Problem]]:
        rooms = [f"{os.path.realpath(self._root)}/{name}/" for name in ("result", "trash", "quarantine")]
        for point in _mount_points():
            if point.startswith(tuple(rooms)):
                yield "mount", Problem(point, "something is mounted here, so this can neither be trusted nor removed")

    def _unknown(self) -> Iterator[tuple[str, Problem]]:
        listed = {room: os.listdir(self._root / room) for room in ("", "result", "in-progress")}  # before what is known
        known = {
            "": ROOMS | self._backend.rooms,
            "result": set(self._backend.ids()),
            "in-progress": {f"{id}~{attempt}" for id, attempt in self._backend.unfinished()},
        }
        for room, names in listed.items():
            for name in sorted(set(names) - known[room]):
                path = self._root / room / name
                if os.path.lexists(path) and (room or not FILES.fullmatch(name)):
                    yield "unknown", Problem(str(path), "nobody here made this; it is left alone")

    def _outside(self) -> Iterator[tuple[str, Problem]]:
        return (("outside", problem) for problem in self._backend.check())


def _other_content(tree: Path, record: Record) -> Damage | None:
    try:
        if digest(tree) == record.digest:
            return None
    except StoreError as error:
        return "content", str(error)
    return "content", "its tree is not the one that was published"


def _settle(kind: str, problem: Problem, repair: bool) -> Finding:
    if not repair or problem.repair is None:
        return Finding(kind, problem.what, problem.problem)
    try:
        problem.repair()
    except (StoreError, OSError) as error:
        return Finding(kind, problem.what, f"{problem.problem}; not repaired: {error}")
    return Finding(kind, problem.what, problem.problem, repaired=True)


def _mount_points() -> list[str]:
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return []
    # Blanks and the like are written as \040.
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines]
