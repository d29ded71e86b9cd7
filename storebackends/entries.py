"""The protocol for backends whose entries are plain folders: all of it, over four verbs.

    ROOT/in-progress/ID~ATTEMPT/   a build: log, build.json, and the tree or the name of the tree
    ROOT/result/ID/                a result: the same folder, renamed once
    ROOT/trash/NAME/               hidden by one rename, being reclaimed

A plugin writes clone, seal, remove and view. rename(2) publishes, so all three folders share a file system. The Store
holds the locks. Any system call here may be the last one before a kill.
"""

from __future__ import annotations

import logging
import os
import secrets
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from . import trees
from .backend import Backend, Command, Entry, Size, Usage
from .errors import BaseNotFound, InvalidId, NotFound, StoreError
from .ids import check_id
from .records import Record

log = logging.getLogger(__name__)


class EntryBackend(Backend):
    """A backend whose every build is a folder that one rename publishes."""

    def __init__(self, root: Path, options: Any, uuid: str) -> None:
        super().__init__(root, options, uuid)
        self.in_progress, self.results, self.trash = root / "in-progress", root / "result", root / "trash"
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

    # The protocol.

    def open(self) -> None:
        """Make the three folders. Raises OSError."""
        for folder in (self.in_progress, self.results, self.trash):
            folder.mkdir(mode=0o700, exist_ok=True)

    def build(self, id: str, base: str | None, attempt: str, record: Record | None = None) -> Entry:
        """See Backend.build."""
        source = self._base(id, base)  # BaseNotFound comes before any change
        entry = Entry(check_id(id), self.in_progress / f"{id}~{attempt}")
        with ExitStack() as undo:
            undo.callback(self.discard, id, attempt)
            entry.folder.mkdir(mode=0o700)
            (record or Record(id, attempt, base)).save(entry.record)
            self.clone(source, entry)
            self._builds[id] = entry
            undo.pop_all()  # the caller's from here
        return entry

    def rename(self, id: str) -> Entry:
        """See Backend.rename."""
        entry, result = self._building(id), Entry(id, self.results / id)
        if os.path.lexists(result.folder):  # rename(2) would replace an empty folder
            raise StoreError(f"cannot publish {id!r}: {result.folder} exists; only this store's locks keep it free")
        self.seal(entry)
        os.rename(entry.folder, result.folder)
        del self._builds[id]
        return result

    def result(self, id: str) -> Entry | None:
        """See Backend.result."""
        folder = f"{self.results}{os.sep}{id}"  # a Path's "/" costs more than the stat
        return Entry(id, Path(folder)) if os.path.isdir(folder) else None

    def discard(self, id: str, attempt: str) -> None:
        """See Backend.discard."""
        self._builds.pop(id, None)
        self._hide_and_remove(self.in_progress / f"{id}~{attempt}")

    def delete(self, id: str) -> None:
        """See Backend.delete."""
        self._hide_and_remove(self.results / check_id(id))

    def ids(self) -> Iterator[str]:
        """See Backend.ids. Foreign files are passed over."""
        with os.scandir(self.results) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and _is_id(entry.name):
                    yield entry.name

    def unfinished(self) -> Iterator[tuple[str, str]]:
        """See Backend.unfinished. Foreign files are passed over."""
        for name in os.listdir(self.in_progress):
            id, _, attempt = name.partition("~")
            if attempt and _is_id(id):
                yield id, attempt

    def sweep(self) -> None:
        """Empty the trash. What cannot be removed stays there, is logged, and is tried again at the next open."""
        for name in os.listdir(self.trash):
            try:
                self.remove(self.trash / name)
            except (OSError, StoreError) as error:
                log.warning("%s stays in the trash: %s", self.trash / name, error)

    def usage(self) -> Usage:
        """See Backend.usage; here that of the root's file system."""
        return trees.usage(self.root)

    def size(self, id: str) -> Size:
        """See Backend.size; an estimate, since files may share blocks or inodes with other results."""
        return Size(trees.size(self._source(id).folder), exact=False)

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

    def _hide_and_remove(self, folder: Path) -> None:
        # The name is new each time: a stray process may make the old path again while its grave is being emptied.
        grave = self.trash / f"{folder.name}~{secrets.token_hex(4)}"
        try:
            os.rename(folder, grave)  # hidden whole; a kill from here leaves only trash
        except FileNotFoundError:
            return
        self.remove(grave)


def _is_id(name: str) -> bool:
    try:
        check_id(name)
    except InvalidId:
        return False
    return True
