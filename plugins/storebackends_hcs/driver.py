"""Trees as snapshots of a containerd.

    ROOT/*/ENTRY/tree.json          the snapshot's name, written before it exists
    ROOT/containerd/mounts/NONCE/   where the tree of a build, a loan (their nonce is the attempt) or a view is mounted
    ROOT/containerd/views/NONCE     see views.py
    ROOT/containerd/tombs/NONCE     a snapshot that is to go, and was refused: another is still made of it
    ROOT/containerd/facts.json      what was found out when the store was made

A build is an active snapshot made of the base's committed one. It is unmounted and committed, and then its entry
renamed: a result has a committed snapshot, made of its base's. containerd collects what nothing refers to; what ctr
prepares and commits has a label that keeps it, but what it calls a view has none. So a result is read through a
prepared snapshot of its own.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from storebackends.plugin import (
    BuildFailed,
    Busy,
    Capability,
    Command,
    Entry,
    EntryBackend,
    NotFound,
    NotSupported,
    Problem,
    Size,
    StoreError,
    Usage,
    check_id,
    trees,
)

from . import HcsOptions, images
from .ctr import Ctr, Missing, Mount
from .host import Host
from .records import Keys, Tree

# The only platform test of the driver.
if sys.platform == "linux":
    from ._linux import LinuxHost as NativeHost
else:
    from ._windows import WindowsHost as NativeHost

log = logging.getLogger(__name__)

LAYERS = 100
"""An overlay takes 500, and each costs at every look at the tree: a build that is deeper gets a copy of its base."""

_IMAGE = "image"
"""In an entry: an image is being taken in for its tree."""


class HcsBackend(EntryBackend):
    """See the module."""

    options: HcsOptions
    rooms = frozenset(["containerd"])
    host: type[Host] = NativeHost

    def open(self) -> None:
        """Raises NotSupported where this user cannot mount, or containerd's trees cannot be used."""
        super().open()
        self._room = self.root / "containerd"
        self._tombs = self._room / "tombs"
        for folder in (self._room, self._tombs):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._keys, self._ctr = Keys(self.uuid), Ctr(self.options)
        self._host = self.host(self._room, self.options, self._prepare, self._reclaim)
        self._host.open()
        self._learn()

    # The verbs.

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """One ``ctr snapshots prepare``, and on Linux a mount."""
        tree = Tree(check_id(entry.attempt), self._committed(source))
        tree.save(entry.tree_record)
        try:
            made = self._prepare(tree, entry.tree_record)
        except Missing as error:
            raise self._gone(source, error) from error
        if source and made[0].layers > LAYERS:
            self._reclaim(tree, entry.tree_record)
            self._copy(source, entry)
        else:
            self._host.attach(tree, made)

    def clone_cache(self, source: Entry | None, entry: Entry) -> None:
        """A copy, made of nothing. A generation made of the one before would keep that, and so all that it dropped."""
        if source is None:
            self.clone(None, entry)
        else:
            self._copy(source, entry)

    def seal(self, entry: Entry) -> None:
        """Unmount, and one ``ctr snapshots commit``. Raises Busy, naming the holders; nothing in use is committed."""
        tree = Tree.load(entry.tree_record)
        if tree is None:
            raise StoreError(f"{entry.tree_record} names no snapshot, so there is nothing to publish; build it again")
        if tree.sealed:  # an earlier try, which failed after it
            return
        if not self._host.detach(tree.nonce):
            raise BuildFailed(entry.id, tree.nonce, "somebody unmounted its tree, so it may not be whole")
        self._ctr.commit(self._keys.committed(tree.nonce), self._keys.active(tree.nonce))
        replace(tree, sealed=True).save(entry.tree_record)

    def remove(self, folder: Path) -> None:
        """The snapshot, then the folder. What is still in use stays in the trash until a later open."""
        if tree := Tree.load(folder / "tree.json"):
            try:
                self._reclaim(tree, folder / "tree.json")
                if (folder / _IMAGE).exists():
                    images.drop(self._ctr, self._keys.active(tree.nonce))
            except Busy as error:
                log.warning("%s stays in the trash: %s", folder, error)
                return
        trees.remove(folder)

    def view(self, id: str) -> AbstractContextManager[Path]:
        """A read-only mount, one for all who read it in this process."""
        return self._view(self._source(id))

    # The rest of the protocol, where a folder is not the tree.

    def tree(self, entry: Entry) -> Path:
        """Where it is mounted."""
        return self._host.path(check_id(entry.attempt))

    def command(
        self, entry: Entry, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, user: str | int | None = None
    ) -> Command:
        """See Backend.command: on Linux a process of this host, on Windows one in a container."""
        found = self._host.command(entry.folder, entry.attempt, Command(argv, env, None, user), cwd)
        return found or super().command(entry, argv, env, cwd, user)

    def import_image(self, entry: Entry, image: str) -> None:
        """Make the tree of *entry*, a build without a base, that of an image: an archive, or one that containerd has.

        The archive is an OCI layout or what `docker save` writes, with one image for this platform. Nothing of it
        stays but the snapshots that the tree is made of.
        """
        nonce, record = check_id(entry.attempt), entry.tree_record
        mark, name = entry.folder / _IMAGE, self._keys.active(nonce)
        mark.touch()
        try:
            with self._host.calling(record) as call:
                parent = images.take_in(self._ctr, image, name, call)
            self._reclaim(Tree(nonce), record)
            tree = Tree(nonce, parent)
            tree.save(record)
            self._host.attach(tree, self._prepare(tree, record))
        finally:
            images.drop(self._ctr, name)
        mark.unlink()

    def sweep(self) -> None:
        """Reclaim trash, views of dead processes, tombs, and what no entry names. One ctr where all is well."""
        if os.listdir(self.trash):
            self._ctr.snapshots()  # a daemon that does not answer is waited for once, and not for each of them
        super().sweep()
        self._host.sweep()
        orphans = list(self._orphans())
        for nonce in os.listdir(self._tombs):
            self._open_tomb(nonce)
        for tree in orphans:
            try:
                self._reclaim(tree)
            except StoreError as error:
                log.warning("the snapshot %s is removed at a later open: %s", self._keys.active(tree.nonce), error)

    def check(self) -> Iterator[Problem]:
        """Snapshots of this store that nothing in it names."""
        for tree in self._orphans():
            what = "no entry names this snapshot or mount of the store"
            yield Problem(self._keys.active(tree.nonce), what, partial(self._reclaim, tree))

    def usage(self) -> Usage:
        """That of the file system of containerd's snapshots."""
        return trees.usage(self._disk)

    def size(self, id: str) -> Size:
        """The snapshot's own, as containerd measured it when it was committed."""
        return self._size(self._source(id))

    def cache_size(self, entry: Entry) -> Size:
        """As size()."""
        return self._size(entry)

    def sync_paths(self) -> Sequence[Path]:
        """The store's folder, and that of containerd's snapshots."""
        return (self.root, self._disk)

    # Snapshots.

    def _committed(self, source: Entry | None) -> str | None:
        if source is None:
            return None
        tree = Tree.load(source.tree_record)
        if tree is None:
            reason = f"{source.tree_record} names no snapshot: delete {source.id!r}, and build it again"
            raise NotFound(source.id, reason)
        return self._keys.committed(tree.nonce)

    def _gone(self, source: Entry | None, error: Missing) -> StoreError:
        if source is None:
            return error
        return NotFound(
            source.id,
            f"the tree of {source.id!r} is gone: its snapshot was removed from containerd, and not by this store; "
            f"delete {source.id!r} with all that is built on it, and build it again ({error})",
        )

    def _prepare(self, tree: Tree, record: Path) -> list[Mount]:
        with self._host.calling(record) as call:
            return self._ctr.prepare(self._keys.active(tree.nonce), tree.parent, call)

    def _copy(self, source: Entry, entry: Entry) -> None:
        """Make the tree of *entry* by copying that of *source*."""
        self.clone(None, entry)
        with self._view(source) as folder:
            trees.copy(folder, self.tree(entry))

    def _size(self, entry: Entry) -> Size:
        try:
            return Size(self._ctr.size(self._committed(entry) or ""), exact=True)
        except Missing as error:
            raise self._gone(entry, error) from error

    def _reclaim(self, tree: Tree, record: Path | None = None) -> None:
        """Unmount a tree and remove its snapshot, or note that it is to go with those made of it. Idempotent.

        *record* is where it is named. Raises Busy where it is in use: nothing in use is removed.
        """
        if not tree.sealed:
            self._host.end(tree.nonce)
        self._host.detach(tree.nonce)
        if record:
            self._host.await_calls(record)
        keys = [self._keys.active(tree.nonce), self._keys.committed(tree.nonce)]
        if tree.sealed:
            keys.reverse()
        if not self._remove_one(keys) and record and tree.parent:
            self._exorcise(keys[0], tree.parent, record)
        if tree.parent and (nonce := self._keys.nonce(tree.parent)):
            self._open_tomb(nonce)

    def _remove_one(self, keys: Sequence[str]) -> bool:
        """Remove the one of *keys* that is there; False where none is. If others are made of it, it gets a tomb."""
        for key in keys:
            answer = self._ctr.remove(key)
            if answer == "needed" and (nonce := self._keys.nonce(key)):
                (self._tombs / nonce).touch()
                self._open_tomb(nonce)  # the last child may have gone just before, and seen no tomb
            if answer != "missing":
                return True
        return False

    def _exorcise(self, key: str, parent: str, record: Path) -> None:
        """Clear what containerd may keep of a child that its collector took: it would never let the parent go."""
        with suppress(Missing), self._host.calling(record) as call:  # the parent has gone
            self._ctr.prepare(key, parent, call)
            self._ctr.remove(key)

    def _open_tomb(self, nonce: str) -> None:
        """Remove a snapshot that was kept for those made of it, if that can be now; and what was kept for it."""
        while os.path.exists(self._tombs / nonce):
            key = self._keys.committed(nonce)
            parents = [snapshot.parent for snapshot in self._ctr.snapshots() if snapshot.key == key]
            if self._ctr.remove(key) == "needed":
                return
            (self._tombs / nonce).unlink(missing_ok=True)
            above = self._keys.nonce(parents[0]) if parents and parents[0] else None
            if above is None:
                return
            nonce = above

    @contextmanager
    def _view(self, entry: Entry) -> Iterator[Path]:
        parent = self._committed(entry)
        assert parent is not None  # noqa: S101 (an entry was given)
        try:
            with self._host.view(parent) as path:
                yield path
        except Missing as error:
            raise self._gone(entry, error) from error

    # What no entry names.

    def _orphans(self) -> Iterator[Tree]:
        """Snapshots and mounts of this store that nothing in it names.

        They are listed first: a record comes before what it names, and goes after it.
        """
        found = {nonce: Tree(nonce) for nonce in self._host.attached()}
        for snapshot in self._ctr.snapshots():
            if nonce := self._keys.nonce(snapshot.key):
                found[nonce] = Tree(nonce, snapshot.parent, snapshot.committed)
        known = set(self._named()) if found else set()
        return (tree for nonce, tree in found.items() if nonce not in known)

    def _named(self) -> Iterator[str]:
        """The nonces of all there is. In the order in which an entry moves, so that none is missed on its way."""
        for pattern in ("in-progress/*", "loans/*", "result/*", "caches/*/*", "quarantine/*"):
            for record in self.root.glob(f"{pattern}/tree.json"):
                if tree := Tree.load(record):
                    yield tree.nonce
        yield from _listed(self._tombs)
        yield from self._host.viewed()

    # What is found out when the store is made, and kept.

    def _learn(self) -> None:
        path = self._room / "facts.json"
        chosen = {"namespace": self.options.namespace, "snapshotter": self.options.snapshotter}
        try:
            known = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            known = None
        if known and (other := [key for key, value in chosen.items() if known[key] != value]):
            was = ", ".join(f"{key} {known[key]!r}" for key in other)
            raise NotSupported(f"opening {self.root} so", f"its trees are in {was}", "set that, or make a new store")
        if known is None or not _listed(Path(known["disk"])):  # a disk that is not mounted shows an empty folder
            disk, capabilities = self._host.try_out()
            known = chosen | {"disk": str(disk), "capabilities": sorted(capabilities)}
            part = self.trash / secrets.token_hex(8)
            part.write_text(json.dumps(known))
            with suppress(FileNotFoundError):  # swept away by another process, which has learnt the same
                os.replace(part, path)
        self.capabilities = frozenset(map(Capability, known["capabilities"]))
        self._disk = Path(known["disk"])


def _listed(folder: Path) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)
    return []
