"""The protocol for backends whose entries are plain folders: all of it, over four verbs.

    ROOT/in-progress/ID~ATTEMPT/   a build: log, build.json, and the tree or the name of the tree
    ROOT/result/ID/                a result: the same folder, renamed once
    ROOT/loans/NAME~ATTEMPT/       a borrower's private copy of a cache
    ROOT/caches/NAME/GEN/          a generation of the cache: the same folder, given back by one rename
    ROOT/trash/NAME/               hidden by one rename, being reclaimed

A plugin writes clone, seal, remove and view. rename(2) publishes, so all these folders share a file system. The Store
holds the locks. Any system call here may be the last one before a kill.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from . import renames, trees
from .backend import Backend, CacheEntry, Command, Entry, Size, Usage
from .errors import BaseNotFound, InvalidId, NotFound, StoreError
from .ids import check_id
from .records import Record

log = logging.getLogger(__name__)

_GENERATION = re.compile(r"[1-9][0-9]*", re.ASCII)


class EntryBackend(Backend):
    """A backend whose every build is a folder that one rename publishes."""

    may_wait: bool = False
    """May a result wait in the trash while others are deleted? For trees that are plain files, and go as such."""

    def __init__(self, root: Path, options: Any, uuid: str) -> None:
        super().__init__(root, options, uuid)
        self.in_progress, self.results, self.trash = root / "in-progress", root / "result", root / "trash"
        self.loans, self.caches = root / "loans", root / "caches"
        self._results, self._trash = f"{self.results}{os.sep}", f"{self.trash}{os.sep}"  # a Path costs more than a stat
        self._builds: dict[str, Entry] = {}

    # The four verbs of a plugin.

    @abstractmethod
    def clone(self, source: Entry | None, entry: Entry) -> None:
        """Make the tree of *entry*: a private writable copy of the tree of the result *source*, or empty.

        Killed midway, it leaves nothing that remove() does not find from the entry. Raises StoreError or OSError.
        """

    def seal(self, entry: Entry) -> None:
        """Make the finished tree ready to be published: the last change to it. Raises StoreError, the build intact."""

    def remove(self, folder: Path) -> None:
        """Reclaim an entry's folder, now in the trash, and its tree wherever that lies. Idempotent, killed or not."""
        trees.remove(folder)

    def view(self, id: str) -> AbstractContextManager[Path]:
        """The readable tree of a result; here the folder itself."""
        return nullcontext(self.tree(self._source(id)))

    def clone_cache(self, source: Entry | None, entry: Entry) -> None:
        """As clone(), for a cache. To be overridden where a clone needs its source to stay, or shares files with it.

        A generation is dropped while loans of it live on, and a cache is written to in place.
        """
        self.clone(source, entry)

    # The protocol.

    def open(self) -> None:
        """Make the folders. Raises OSError."""
        for folder in (self.in_progress, self.results, self.loans, self.caches, self.trash):
            folder.mkdir(mode=0o700, exist_ok=True)

    def build(self, id: str, base: str | None, attempt: str, record: Record | None = None) -> Entry:
        """See Backend.build."""
        source = self._base(id, base)  # BaseNotFound comes before any change
        entry = Entry(check_id(id), self.in_progress / f"{id}~{attempt}")
        self._make(entry, record or Record(id, attempt, base), partial(self.clone, source))
        self._builds[id] = entry
        return entry

    def rename(self, id: str) -> Entry:
        """See Backend.rename."""
        entry, result = self._building(id), f"{self._results}{id}"
        if os.path.lexists(result):  # rename(2) would replace an empty folder
            raise StoreError(f"cannot publish {id!r}: {result} exists; only this store's locks keep it free")
        self.seal(entry)
        renames.rename(entry.folder, result)
        del self._builds[id]
        return Entry(id, self.results / id)

    def result(self, id: str) -> Entry | None:
        """See Backend.result."""
        folder = f"{self._results}{id}"  # a Path costs more than the stat
        try:
            found = os.stat(folder)
        except (OSError, ValueError):
            return None
        return _entry(id, folder) if stat.S_ISDIR(found.st_mode) else None

    def has(self, id: str) -> bool:
        """See Backend.has."""
        return os.path.isdir(f"{self._results}{id}")

    def discard(self, id: str, attempt: str) -> None:
        """See Backend.discard."""
        self._builds.pop(id, None)
        self._hide_and_remove(self.in_progress / f"{id}~{attempt}")

    def delete(self, id: str) -> None:
        """See Backend.delete."""
        self._hide_and_remove(f"{self._results}{check_id(id)}")

    def hide(self, id: str) -> Path | None:
        """See Backend.hide."""
        return self._hide(f"{self._results}{check_id(id)}") if self.may_wait else super().hide(id)

    def reclaim(self, hidden: Path) -> None:
        """See Backend.reclaim."""
        self.remove(hidden)

    def ids(self) -> Iterator[str]:
        """See Backend.ids. Foreign files are passed over."""
        return _ids(self.results)

    def unfinished(self) -> Iterator[tuple[str, str]]:
        """See Backend.unfinished. Foreign files are passed over."""
        return _attempts(self.in_progress)

    def cache_list(self, name: str | None = None) -> Iterator[CacheEntry]:
        """See Backend.cache_list. Foreign files are passed over."""
        for id in _ids(self.caches) if name is None else [name]:
            with suppress(FileNotFoundError):
                for number in os.listdir(self.caches / id):
                    if _GENERATION.fullmatch(number):
                        yield CacheEntry(id, self.caches / id / number)
        for id, attempt in _attempts(self.loans):
            if name in (None, id):
                yield CacheEntry(id, self.loans / f"{id}~{attempt}")

    def cache_clone(self, source: CacheEntry | None, record: Record) -> CacheEntry:
        """See Backend.cache_clone."""
        loan = CacheEntry(check_id(record.id), self.loans / f"{record.id}~{record.attempt}")
        self._make(loan, record, partial(self.clone_cache, source))
        return loan

    def cache_install(self, loan: CacheEntry, generation: int) -> CacheEntry | None:
        """See Backend.cache_install."""
        installed = CacheEntry(loan.id, self.caches / loan.id / str(generation))
        if os.path.lexists(installed.folder):
            return None  # before the sealing, which may cost much
        self.seal(loan)
        installed.folder.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            renames.rename(loan.folder, installed.folder)  # it replaces an empty folder only, and no generation is one
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return None
            raise
        return installed

    def cache_drop(self, entry: CacheEntry) -> None:
        """See Backend.cache_drop."""
        # The cache's own folder stays, if empty: somebody may just have made it, to rename a generation into it.
        self._hide_and_remove(entry.folder)

    def cache_size(self, entry: CacheEntry) -> Size:
        """See Backend.cache_size; an estimate, since blocks may be shared with other generations."""
        return Size(trees.size(entry.folder), exact=False)

    def sweep(self) -> None:
        """Empty the trash. What cannot be removed stays there, is logged, and is tried again at the next open."""
        for name in os.listdir(self.trash):
            try:
                if "~" in name:
                    self.remove(self.trash / name)
                else:  # of an open() that was killed, or is under way: that finds it gone whole, or untouched
                    self._hide_and_remove(self.trash / name)
            except (OSError, StoreError) as error:
                log.warning("%s stays in the trash: %s", self.trash / name, error)

    def usage(self) -> Usage:
        """See Backend.usage; here that of the root's file system."""
        return trees.usage(self.root)

    def size(self, id: str) -> Size:
        """See Backend.size; an estimate, since files may share blocks or inodes with other results."""
        try:
            return Size(trees.size(self._source(id).folder), exact=False)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # deleted just now
                raise NotFound(id) from None
            raise

    def tree(self, entry: Entry) -> Path:
        """The folder that holds the tree."""
        return entry.folder / "rootfs"

    def command(
        self, entry: Entry, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, user: str | int | None = None
    ) -> Command:
        """See Backend.command: a process of this host, in the tree's folder."""
        return Command(argv, env, trees.resolve_inside(self.tree(entry), cwd or "."), user)

    def copy_in(self, entry: Entry, source: Path, dest: str) -> None:
        """See Backend.copy_in."""
        trees.copy_into(source, self.tree(entry), dest)

    # Inside.

    def _make(self, entry: Entry, record: Record, clone: Callable[[Entry], None]) -> None:
        """Make the entry's folder, its record and then, by *clone*, its tree; or leave nothing of it."""
        try:
            os.mkdir(entry.folder, 0o700)
            entry.begin(record)
            clone(entry)
        except BaseException:
            self._hide_and_remove(entry.folder)
            raise

    def _source(self, id: str) -> Entry:
        if (entry := self.result(check_id(id))) is None:
            raise NotFound(id)
        return entry

    def _base(self, id: str, base: str | None) -> Entry | None:
        if base is None:
            return None
        if (entry := self.result(check_id(base))) is None:
            raise BaseNotFound(id, base)
        return entry

    def _building(self, id: str) -> Entry:
        try:
            return self._builds[id]
        except KeyError:
            raise NotFound(id, f"no build of {id!r} was begun here: build() comes before rename()") from None

    def _hide_and_remove(self, folder: str | Path) -> None:
        if grave := self._hide(folder):
            self.remove(grave)

    def _hide(self, folder: str | Path) -> Path | None:
        # The name is new each time: a stray process may make the old path again while its grave is being emptied.
        grave = f"{self._trash}{os.path.basename(folder)}~{secrets.token_hex(4)}"
        try:
            renames.rename(folder, grave)  # hidden whole; a kill from here leaves only trash
        except FileNotFoundError:
            return None
        return Path(grave)


@lru_cache(1024)
def _entry(id: str, folder: str) -> Entry:
    return Entry(id, Path(folder))


def _ids(folder: Path) -> Iterator[str]:
    """The folders that are called by an id."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and _is_id(entry.name):
                yield entry.name


def _attempts(folder: Path) -> Iterator[tuple[str, str]]:
    """(id, attempt) of what is called ID~ATTEMPT."""
    for name in os.listdir(folder):
        id, _, attempt = name.partition("~")
        if attempt and _is_id(id):
            yield id, attempt


def _is_id(name: str) -> bool:
    try:
        check_id(name)
    except InvalidId:
        return False
    return True
