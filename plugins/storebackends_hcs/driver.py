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
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from storebackends.plugin import (
    Busy,
    Capability,
    Entry,
    EntryBackend,
    NotFound,
    NotSupported,
    Problem,
    Size,
    StoreError,
    Usage,
    check_id,
    mounts,
    trees,
)

from . import WINDOWS, HcsOptions
from .ctr import Ctr, Missing, Mount
from .records import Keys, Tree

if sys.platform != "win32":
    from .views import Views

log = logging.getLogger(__name__)

LAYERS = 100
"""An overlay takes 500, and each costs at every look at the tree: a build that is deeper gets a copy of its base."""
PATIENCE = 60.0
"""Seconds for which a ctr that outlived its caller is waited for."""
_LINKED = frozenset(["btrfs", "native"])
"""The snapshotters whose clones keep files of several names one file. In an overlay the first write parts them."""
_BUILDING = ("redirect_dir=on", "metacopy=off", "xino=off")
"""What an overlay is given beside what containerd asks for. Without the first no folder of the base can be renamed."""


class HcsBackend(EntryBackend):
    """See the module."""

    options: HcsOptions
    rooms = frozenset(["containerd"])

    def open(self) -> None:
        """Raises NotSupported where this user cannot mount, or containerd's trees cannot be used."""
        super().open()
        self._keys, self._ctr = Keys(self.uuid), Ctr(self.options)
        self._room = self.root / "containerd"
        self._points, self._tombs, views = (self._room / name for name in ("mounts", "tombs", "views"))
        for folder in (self._room, self._points, self._tombs, views):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._disk = self.root
        self._prepared: dict[str, Mount] = {}  # on Windows, of the builds under way
        if sys.platform != "win32":
            if os.geteuid() != 0:
                raise NotSupported("a store on containerd", "only root can mount its snapshots", "run as root")
            self._views = Views(views, self._show, self._reclaim)
        self._learn()

    # The verbs.

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """One ``ctr snapshots prepare``, and a mount."""
        tree = Tree(check_id(entry.attempt), self._committed(source))
        tree.save(entry.tree_record)
        try:
            made = self._prepare(tree)
        except Missing as error:
            raise self._gone(source, error) from error
        if source and made[0].layers > LAYERS:
            self._reclaim(tree)
            self._copy(source, entry)
        else:
            self._mount(tree, made)

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
        self._unmount(tree.nonce)
        self._ctr.commit(self._keys.committed(tree.nonce), self._keys.active(tree.nonce))
        self._prepared.pop(tree.nonce, None)
        replace(tree, sealed=True).save(entry.tree_record)

    def remove(self, folder: Path) -> None:
        """The snapshot, then the folder. What is still in use stays in the trash until a later open."""
        if tree := Tree.load(folder / "tree.json"):
            try:
                self._reclaim(tree)
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
        if WINDOWS:
            raise NotSupported("a folder of the tree", "Windows mounts layers in containers only", "use run()")
        return self._point(check_id(entry.attempt))

    def sweep(self) -> None:
        """Reclaim trash, views of dead processes, tombs, and what no entry names. One ctr where all is well."""
        super().sweep()
        if sys.platform != "win32":
            self._views.sweep()
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

    def _prepare(self, tree: Tree) -> list[Mount]:
        made = self._ctr.prepare(self._keys.active(tree.nonce), tree.parent)
        if WINDOWS:
            self._prepared[tree.nonce] = made[0]
        return made

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

    def _reclaim(self, tree: Tree) -> None:
        """Unmount a tree and remove its snapshot, or note that it is to go with those made of it. Idempotent.

        Raises Busy where it is in use: nothing in use is removed.
        """
        self._unmount(tree.nonce)
        self._prepared.pop(tree.nonce, None)
        keys = [self._keys.active(tree.nonce), self._keys.committed(tree.nonce)]
        if tree.sealed:
            keys.reverse()
        # A killed process leaves its ctr running, and what that makes comes after it was looked for.
        if not self._remove_one(keys) and not (_await_end(keys) and self._remove_one(keys)):
            self._exorcise(keys[0], tree.parent)
        if tree.parent and (nonce := self._keys.nonce(tree.parent)):
            self._open_tomb(nonce)

    def _remove_one(self, keys: Sequence[str]) -> bool:
        """Remove the one of *keys* that is there; False where none is. If others are made of it, it gets a tomb."""
        for key in keys:
            answer = self._ctr.remove(key)
            if answer == "needed":
                nonce = self._keys.nonce(key)
                assert nonce is not None  # noqa: S101 (it is one of ours)
                Tree(nonce, self._parent(key), sealed=True).save(self._tombs / nonce)
                self._open_tomb(nonce)  # the last child may have gone just before, and seen no tomb
            if answer != "missing":
                return True
        return False

    def _exorcise(self, key: str, parent: str | None) -> None:
        """Clear what containerd may keep of a child that its collector took: it would never let the parent go."""
        if parent:
            with suppress(Missing):  # the parent has gone
                self._ctr.prepare(key, parent)
                self._ctr.remove(key)

    def _parent(self, key: str) -> str | None:
        return next((snapshot.parent for snapshot in self._ctr.snapshots() if snapshot.key == key), None)

    def _open_tomb(self, nonce: str) -> None:
        """Remove a snapshot that was kept for those made of it, if that can be now; and what was kept for it."""
        while tree := Tree.load(self._tombs / nonce):
            if self._ctr.remove(self._keys.committed(tree.nonce)) == "needed":
                return
            (self._tombs / nonce).unlink(missing_ok=True)
            if (above := self._keys.nonce(tree.parent or "")) is None:
                return
            nonce = above

    # Mounts.

    def _point(self, nonce: str) -> Path:
        return self._points / nonce

    def _mount(self, tree: Tree, made: Sequence[Mount], *, writable: bool = True) -> Path:
        point = self._point(tree.nonce)
        if WINDOWS:
            return point
        point.mkdir(mode=0o700, exist_ok=True)
        for mount in made:
            if mount.kind == "overlay":
                _dress(mount)
            mounts.mount(mount.kind, mount.source, point, _options(mount, writable))
        if tree.parent is None and writable:
            os.chmod(point, 0o755)  # noqa: S103 (a system's root folder is like that)
        return point

    def _show(self, tree: Tree, writable: bool) -> Path:
        return self._mount(tree, self._prepare(tree), writable=writable)

    def _unmount(self, nonce: str) -> None:
        """Raises Busy where the tree is in use, or was mounted elsewhere too; then it stays mounted."""
        point = self._point(nonce)
        if own := mounts.below(point)[:1]:
            elsewhere = [m.path for m in mounts.mounted() if _shows(m, own[0]) and not _inside(m.path, own[0].path)]
            if elsewhere:
                raise Busy(nonce, f"its tree is mounted elsewhere, too; unmount {elsewhere}", elsewhere)
            mounts.unmount(point)
        with suppress(FileNotFoundError):
            point.rmdir()

    @contextmanager
    def _view(self, entry: Entry) -> Iterator[Path]:
        if sys.platform == "win32":
            raise NotSupported("reading a tree", "Windows mounts layers in containers only", "use run()")
        parent = self._committed(entry)
        assert parent is not None  # noqa: S101 (an entry was given)
        try:
            with self._views.shared(parent) as path:
                yield path
        except Missing as error:
            raise self._gone(entry, error) from error

    # What no entry names.

    def _orphans(self) -> Iterator[Tree]:
        """Snapshots and mounts of this store that nothing in it names.

        They are listed first: a record comes before what it names, and goes after it.
        """
        found = {nonce: Tree(nonce) for nonce in os.listdir(self._points)}
        for snapshot in self._ctr.snapshots():
            if nonce := self._keys.nonce(snapshot.key):
                found[nonce] = Tree(nonce, snapshot.parent, snapshot.committed)
        known = set(self._named()) if found else set()
        return (tree for nonce, tree in found.items() if nonce not in known)

    def _named(self) -> Iterator[str]:
        """The nonces of all there is. In the order in which an entry moves, so that none is missed on its way."""
        for room in (self.in_progress, self.loans, self.results, *_subfolders(self.caches), self.root / "quarantine"):
            for name in _listed(room):
                if tree := Tree.load(room / name / "tree.json"):
                    yield tree.nonce
        yield from _listed(self._tombs)
        yield from _listed(self._room / "views")

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
            known = chosen | self._try_out()
            part = self._room / f".{secrets.token_hex(8)}"
            part.write_text(json.dumps(known))
            os.replace(part, path)
        self.capabilities = frozenset(map(Capability, known["capabilities"]))
        self._disk = Path(known["disk"])

    def _try_out(self) -> dict[str, object]:
        if sys.platform == "win32":
            return {"disk": str(self.root), "capabilities": []}
        with self._views.own(None, writable=True) as folder:
            found = trees.capabilities(folder) | {Capability.READONLY}
            disk = self._disk_of(folder)
        if self.options.snapshotter not in _LINKED:
            found -= {Capability.HARDLINKS}
        return {"disk": disk, "capabilities": sorted(found)}

    def _disk_of(self, folder: Path) -> str:
        """A folder that stays, on the file system of what is mounted on *folder*: to be measured and synced."""
        own, *_ = mounts.below(folder)
        on_top = {point.path: point for point in mounts.mounted()}.values()
        shown = [point for point in on_top if point.device == own.device and not _inside(point.path, str(self._points))]
        for point in sorted(shown, key=lambda point: len(point.root)):  # the whole of it before a part
            if os.path.isdir(point.path):
                return point.path
        reason = "each of its trees is a file system of its own, which no barrier of the store reaches"
        raise NotSupported(f"the snapshotter {self.options.snapshotter!r}", reason, "use overlayfs, btrfs or native")


def _options(mount: Mount, writable: bool) -> list[str]:
    """What to mount a snapshot with."""
    options = [option for option in mount.options if writable or option != "rw"]
    if mount.kind == "overlay":
        # Attributes of users cannot tell where a folder was. And "volatile": unmounting would otherwise bring to the
        # disk all that anybody wrote to it; the store's own barrier does that where it is asked for.
        options += [option for option in _BUILDING if "userxattr" not in options or option != _BUILDING[0]]
        options += ["volatile"] if writable else []
    return options if writable else [*options, "ro"]


def _dress(mount: Mount) -> None:
    """Give the root of a stacked tree what that of the layer below has: containerd makes a new folder for it."""
    if sys.platform == "linux":
        (upper, *_), (lowers, *_) = mount.values("upperdir"), mount.values("lowerdir")
        below = lowers.split(":")[0]
        status = os.stat(below)
        os.chown(upper, status.st_uid, status.st_gid)
        for name in os.listxattr(below):
            if ".overlay." not in name:  # those are the overlay's own
                os.setxattr(upper, name, os.getxattr(below, name))
        os.chmod(upper, status.st_mode & 0o7777)
        os.utime(upper, ns=(status.st_atime_ns, status.st_mtime_ns))


def _shows(other: mounts.MountPoint, own: mounts.MountPoint) -> bool:
    """Is a part of what *own* shows seen at *other*?"""
    return other.device == own.device and _inside(other.root, own.root)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _listed(folder: Path) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)
    return []


def _subfolders(folder: Path) -> Iterator[Path]:
    return (folder / name for name in _listed(folder))


def _await_end(keys: Sequence[str]) -> bool:
    """Wait for the end of every ctr that names one of *keys*; was there any?"""
    words = [key.encode() for key in keys]
    found = False
    for pid in _listed(Path("/proc")):
        if pid.isdecimal() and set(_argv(pid)) & set(words):
            found = True
            _await_process(int(pid))
    return found


def _argv(pid: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it ended
        return []


def _await_process(pid: int) -> None:
    if sys.platform == "linux":
        with suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(PATIENCE * 1000)
            finally:
                os.close(fd)
