"""Trees as ZFS datasets.

    DATASET/storebackends-UUID             of the store: not mounted itself, read-only, and so is what inherits from it
    DATASET/storebackends-UUID/ATTEMPT     a tree, mounted below it; of a result read-only, with the snapshot @sealed

An entry's tree.json has the name of its dataset, and is there before the dataset. A published tree does not move: its
entry does. A clone needs what it was cloned from; so of what is removed while clones of it live (a generation of a
cache), the snapshot is first handed on to one of them, to go with the last.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from storebackends.plugin import (
    CacheEntry,
    Capability,
    CommandFailed,
    Entry,
    EntryBackend,
    NotFound,
    NotSupported,
    Problem,
    Size,
    StoreError,
    Usage,
    trees,
)

from . import ZfsOptions, explained, probe
from .commands import Zfs, claimed, has_clones, is_missing, may_mount, mount, mounts_below, run, use

log = logging.getLogger(__name__)

SEALED = "sealed"
_MOST_HEIRS = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_FOUND = ("mountpoint", "mounted", "readonly")


@dataclass(frozen=True, slots=True)
class Tree:
    """tree.json: the dataset, relative to the store's, and those that the build made below it, with their folders."""

    name: str
    nested: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises OSError."""
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps({"format": 1, "dataset": self.name, "nested": self.nested}), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Tree:
        """Read it. Raises FileNotFoundError, or StoreError where it is none of ours."""
        try:
            content = json.loads(path.read_bytes())
            name, nested = content["dataset"], content["nested"]
            if _NAME.fullmatch(name) and isinstance(nested, dict):
                return cls(name, nested)
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path} does not name a tree ({error}); fsck tells what can be done") from error
        raise StoreError(f"{path} does not name a tree of ours: {name!r}")


class ZfsBackend(EntryBackend):
    """See the module."""

    options: ZfsOptions
    seals_durably = True

    # Opening.

    def open(self) -> None:
        """Raises NotSupported where there is no ZFS, no such dataset, or no right to mount."""
        self._zfs = Zfs(self.options.sudo)
        self._home = f"{self.options.dataset}/storebackends-{self.uuid}"
        if not self.options.sudo and not may_mount():
            support = probe(self.root)
            fix = "set sudo = true" if support.usable else support.fix
            raise NotSupported("a zfs store", "on Linux only root mounts ZFS", fix)
        names = (self.options.dataset, self._home)
        try:
            rows = self._zfs.rows(*names, properties=_FOUND)
        except CommandFailed as error:
            raise explained(error) from error
        point = use(self._zfs, self.options.dataset, rows.get(self.options.dataset))
        super().open()
        if self._home not in rows:
            self._make_home(point)
            rows = self._zfs.rows(*names, properties=_FOUND)
        self._trees = Path(rows[self._home][0])
        self._make_private(self._trees)
        self.capabilities = trees.capabilities(self._trees) | {Capability.READONLY}

    def _make_home(self, point: Path) -> None:
        # Before ZFS makes it for the first tree: nobody else may get at what a build makes, such as a setuid program.
        self._make_private(point / self._home.rpartition("/")[2])
        try:
            self._zfs("create", "-o", "canmount=off", "-o", "readonly=on", self._home)
        except CommandFailed as error:
            if "already exists" not in error.stderr:  # another process was first
                raise

    def _make_private(self, folder: Path) -> None:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.stat(self.root).st_uid:
            raise StoreError(f"{folder} is no folder of this user's, and the trees are mounted there; move it away")
        os.chmod(folder, 0o700)

    # The verbs.

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """One command, and one for each dataset that was made below the base's."""
        name = _attempt(entry)
        if source is None:
            Tree(name).save(entry.tree_record)
            with claimed(entry.tree_record) as record:
                self._zfs("create", "-o", "readonly=off", f"{self._home}/{name}", record=record)
            if self._zfs.sudo:
                us = os.stat(self._trees)
                self._zfs.run("chown", f"{us.st_uid}:{us.st_gid}", str(self._trees / name))
        else:
            base = self._load(source)
            Tree(name, base.nested).save(entry.tree_record)
            with claimed(entry.tree_record) as record:
                self._clone(source, base, name, record)
        self.tree(entry)  # StoreError unless it is mounted

    def _clone(self, source: Entry, base: Tree, name: str, record: IO[bytes]) -> None:
        old, new = f"{self._home}/{base.name}", f"{self._home}/{name}"
        try:
            self._zfs("clone", "-o", "readonly=off", f"{old}@{SEALED}", new, record=record)
            for child, where in sorted(base.nested.items()):
                at = () if where == child else ("-o", f"mountpoint={self._trees / name / where}")
                self._zfs("clone", *at, f"{old}/{child}@{SEALED}", f"{new}/{child}", record=record)
        except CommandFailed as error:
            if is_missing(error):
                raise self._gone(source, base.name) from error
            raise

    def seal(self, entry: Entry) -> None:
        """Read-only first, so that no stray process writes to the tree and not to its snapshot. Two commands."""
        folder, dataset = self.tree(entry), f"{self._home}/{_attempt(entry)}"
        nested = self._nested(entry, dataset, folder)
        if nested != self._load(entry).nested:
            Tree(_attempt(entry), nested).save(entry.tree_record)
        self._zfs.patiently(lambda: self._zfs("inherit", "-r", "readonly", dataset), dataset, folder)
        snapshot = f"{dataset}@{SEALED}"
        try:
            self._zfs("snapshot", "-r", snapshot)
        except CommandFailed as error:
            if "already exists" not in error.stderr:
                raise
            self._zfs("destroy", "-r", snapshot)  # of an earlier try, or the build's own
            self._zfs("snapshot", "-r", snapshot)

    def _nested(self, entry: Entry, dataset: str, folder: Path) -> dict[str, str]:
        """What the build made below its dataset, and where in its tree that is mounted.

        Where there is nothing, the table of mounts says so without a command.
        """
        if mounts_below(dataset) == [] and not self._load(entry).nested:
            return {}
        rows = self._zfs.rows(dataset, properties=("mountpoint",), options=("-r", "-t", "filesystem"))
        nested = {}
        for name, (point,) in rows.items():
            if name == dataset:
                continue
            where = os.path.relpath(point, folder)
            # Later it is mounted by that path, as root: no link that the build left may lead that out of the tree.
            if trees.resolve_inside(folder, where) == folder or not os.path.ismount(point):
                raise StoreError(f"{name!r}, which the build made, is not mounted at {point}; mount it in the tree")
            nested[name.removeprefix(f"{dataset}/")] = where
        return nested

    def remove(self, folder: Path) -> None:
        """One command; more where something was cloned from it. Raises Busy where it is held."""
        try:
            name = Tree.load(folder / "tree.json").name
        except FileNotFoundError:  # killed before there was a dataset, or after it was gone
            pass
        except StoreError as error:  # a power cut: sweep() finds the dataset by itself
            log.warning("%s", error)
        else:
            with claimed(folder / "tree.json"):  # a command of a killed builder may still be making it
                pass
            self._destroy(name)
        super().remove(folder)

    def view(self, id: str) -> AbstractContextManager[Path]:
        """The dataset's mount point; mounted now if need be. Raises NotFound where somebody destroyed the dataset."""
        return nullcontext(self.tree(self._source(id)))

    def tree(self, entry: Entry) -> Path:
        """Where the dataset is mounted. That of a result is mounted if need be, not that of a build.

        What was unmounted under a build has lost what the build wrote since: StoreError.
        """
        building = "~" in entry.folder.name
        tree = Tree(_attempt(entry)) if building else self._load(entry)
        folder = self._trees / tree.name
        if building and not os.path.ismount(folder):
            raise StoreError(f"the tree of {entry.id!r} was unmounted while it was being built; see 'zfs mount'")
        try:
            if not os.path.ismount(folder):
                mount(self._zfs, f"{self._home}/{tree.name}", folder)
            for child, where in sorted(tree.nested.items()):
                if not os.path.ismount(folder / where):
                    mount(self._zfs, f"{self._home}/{tree.name}/{child}", trees.resolve_inside(folder, where))
        except CommandFailed as error:
            if is_missing(error):
                raise self._gone(entry, tree.name) from error
            raise
        return folder

    def _gone(self, entry: Entry, name: str) -> StoreError:
        """The error for a result whose dataset is not there."""
        if not self._is_there():
            return StoreError(f"the pool of {self._home!r} is not here, so {entry.id!r} is not either; import it")
        return NotFound(entry.id, f"somebody destroyed {self._home}/{name}, the tree of {entry.id!r}; build it again")

    def _is_there(self) -> bool:
        return bool(self._zfs.rows(self._home, properties=()))

    # Removing.

    def _destroy(self, name: str) -> None:
        """Destroy a dataset of ours and what is below it, never what was cloned from it. Idempotent."""
        dataset, folder = f"{self._home}/{name}", self._trees / name
        for _ in range(_MOST_HEIRS):
            try:
                self._zfs.patiently(lambda: self._zfs("destroy", "-r", dataset), dataset, folder)
                break
            except CommandFailed as error:
                if is_missing(error) and self._is_there():
                    break
                if is_missing(error):
                    raise StoreError(f"{dataset!r} cannot be destroyed: its pool is not here; import it") from error
                if not has_clones(error) or not self._hand_on(dataset, name):
                    raise
        with suppress(OSError):  # ZFS removes it itself, mostly
            os.rmdir(folder)

    def _hand_on(self, dataset: str, name: str) -> bool:
        """Give a snapshot of *dataset* that has clones to one of these, to go with the last; False where there is none.

        What is older than the snapshot goes with it.
        """
        rows = self._zfs.rows(self._home, properties=("origin",), options=("-r", "-t", "filesystem,volume"))
        for heir, (origin,) in sorted(rows.items()):
            owner, _, snapshot = origin.partition("@")
            if not f"{owner}/".startswith(f"{dataset}/") or heir.startswith(f"{dataset}/"):
                continue
            if snapshot == SEALED:  # the heir has one of that name too, or will
                self._zfs("rename", origin, f"{owner}@dropped-{name}")
                self._zfs("destroy", "-d", f"{owner}@dropped-{name}")  # not now: with its last clone
            self._zfs("promote", heir)
            return True
        return False

    def sweep(self) -> None:
        """Empty the trash, and destroy what no entry names. What resists is logged and tried at the next open.

        By names, never by paths: a dataset that is not mounted, or mounted elsewhere, is nobody's leftover.
        """
        super().sweep()
        try:
            unnamed = self._unnamed()
        except StoreError as error:  # where one entry cannot be read, nobody knows what it names
            log.warning("datasets of %s that no entry names stay: %s", self._home, error)
            unnamed = []
        for name in unnamed:
            try:
                self._destroy(name)
            except StoreError as error:
                log.warning("%s/%s, which no entry names, stays: %s", self._home, name, error)
        for name in os.listdir(self._trees):
            if name.startswith("tmp"):  # where open() tried out what can be kept
                trees.remove(self._trees / name)

    def _unnamed(self) -> list[str]:
        """The datasets that no entry names: listed first, the entries second, since theirs are there before them."""
        prefix = f"{self._home}/"
        rows = self._zfs.rows(self._home, properties=(), options=("-d", "1", "-t", "filesystem"))
        names = {name.removeprefix(prefix) for name in rows if name.startswith(prefix)}
        return sorted(names - set(self._named())) if names else []

    def _named(self) -> Iterator[str]:
        """The datasets that entries name. In the order in which an entry moves, so that none is missed on its way."""
        for room in (self.in_progress, self.loans):
            yield from (name.partition("~")[2] for name in os.listdir(room))
        caches = [self.caches / name for name in os.listdir(self.caches)]
        for room in (self.results, *caches, self.root / "quarantine", self.trash):
            with suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(room):
                    with suppress(FileNotFoundError, NotADirectoryError):
                        yield Tree.load(room / name / "tree.json").name

    def check(self) -> Iterator[Problem]:
        """Datasets of ours that no entry names."""
        for name in self._unnamed():
            yield Problem(f"{self._home}/{name}", "no entry names this dataset", partial(self._destroy, name))

    # Space.

    def usage(self) -> Usage:
        """That of the pool, or of the quota above the trees that is nearest to its end."""
        parts = self.options.dataset.split("/")
        above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        rows = self._zfs.rows(*above, properties=("used", "available", "quota"))
        if not rows:
            raise StoreError(f"{self.options.dataset!r} is not here; import its pool")
        limits = []
        for used, available, quota in (map(_number, row) for row in rows.values()):
            total = quota or used + available
            limits.append(Usage(total, min(available, max(0, total - used))))
        return min(limits, key=lambda limit: limit.free / max(1, limit.total))

    def size(self, id: str) -> Size:
        """What the dataset and the entry take: exact, unless something was cloned from it."""
        return self._size(self._source(id))

    def cache_size(self, entry: CacheEntry) -> Size:
        """As size()."""
        return self._size(entry)

    def _size(self, entry: Entry) -> Size:
        name = self._load(entry).name
        dataset = f"{self._home}/{name}"
        rows = self._zfs.rows(
            dataset, properties=("used", "clones"), options=("-r", "-t", "filesystem,volume,snapshot")
        )
        if dataset not in rows:
            raise self._gone(entry, name)
        own = trees.size(entry.folder)
        return Size(_number(rows[dataset][0]) + own, exact=all(clones in ("-", "") for _, clones in rows.values()))

    def settle(self, timeout: float) -> bool:
        """Wait for the pool to have freed all that was destroyed; the kernel tells when."""
        pool, deadline = self.options.dataset.partition("/")[0], time.monotonic() + timeout
        # What is freed in one transaction group can be used again after two more.
        for command in (["zpool", "wait", "-t", "free", pool], *[self._zfs.prefixed("zpool", "sync", pool)] * 3):
            try:
                run(command, timeout=max(0.0, deadline - time.monotonic()))
            except CommandFailed as error:
                if error.returncode is None or error.returncode >= 0:
                    raise
                return False
        return True

    def _load(self, entry: Entry) -> Tree:
        try:
            return Tree.load(entry.tree_record)
        except FileNotFoundError:
            raise NotFound(
                entry.id, f"{entry.tree_record} is not there: {entry.id!r} was deleted, or is not ours"
            ) from None


def _attempt(entry: Entry) -> str:
    """The attempt of a build or a loan, which names its dataset."""
    attempt = entry.folder.name.partition("~")[2]
    if not _NAME.fullmatch(attempt):
        raise StoreError(f"{attempt!r} cannot be an attempt at a tree of ZFS: letters, digits and . _ - only")
    return attempt


def _number(value: str) -> int:
    return int(value) if value.isdecimal() else 0
