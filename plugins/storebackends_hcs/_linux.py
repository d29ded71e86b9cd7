"""Snapshots mounted on folders of this host, for as long as they are written or read."""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import AbstractContextManager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO  # noqa: E402

from storebackends.plugin import Busy, Capability, NotSupported, mounts, trees  # noqa: E402

from . import HcsOptions  # noqa: E402
from .claims import Call, await_calls  # noqa: E402
from .ctr import Mount  # noqa: E402
from .host import Host, Prepare, Reclaim  # noqa: E402
from .records import Tree  # noqa: E402
from .views import Views  # noqa: E402

_LOST = {"btrfs": frozenset[Capability](), "native": frozenset([Capability.NS_MTIME, Capability.SPARSE])}
"""What a clone loses of what its file system could hold: native's are copied by containerd, as well as it can."""
_LOST_BY_OVERLAYS = frozenset([Capability.LINKED])
"""The first write to a file of several names parts it from the others."""
_ADDED = ("redirect_dir=on", "metacopy=off", "xino=off")
"""What an overlay is given beside what containerd asks for. Without the first no folder of the base can be renamed."""


class LinuxHost(Host):
    """See Host."""

    def __init__(self, room: Path, options: HcsOptions, prepare: Prepare, reclaim: Reclaim) -> None:
        super().__init__(room, options, prepare, reclaim)
        self._points, self._records = room / "mounts", room / "views"
        self._views = Views(self._records, self._show, reclaim)

    def open(self) -> None:
        """Raises NotSupported for every user but root."""
        if os.geteuid() != 0:
            raise NotSupported("a store on containerd", "only root can mount its snapshots", "run as root")
        for folder in (self._points, self._records):
            folder.mkdir(mode=0o700, exist_ok=True)

    def try_out(self) -> tuple[Path, frozenset[Capability]]:
        """Both are told by a snapshot that is made for it."""
        with self._views.own(None, writable=True) as folder:
            found = trees.capabilities(folder) | {Capability.READONLY}
            disk = self._disk_of(folder)
        return disk, found - _LOST.get(self._options.snapshotter, _LOST_BY_OVERLAYS)

    def attach(self, tree: Tree, made: Sequence[Mount], writable: bool = True) -> None:
        """Mount it."""
        point = self.path(tree.nonce)
        point.mkdir(mode=0o700, exist_ok=True)
        for mount in made:
            if mount.kind == "overlay":
                _dress(mount)
            mounts.mount(mount.kind, mount.source, point, _options(mount, writable))
        if tree.parent is None and writable:
            os.chmod(point, 0o755)  # noqa: S103 (a system's root folder is like that)

    def detach(self, nonce: str) -> bool:
        """Raises Busy where the tree is in use, or is mounted elsewhere, too."""
        point = self.path(nonce)
        if own := mounts.below(point)[:1]:
            elsewhere = [m.path for m in mounts.mounted() if _shows(m, own[0]) and not _inside(m.path, own[0].path)]
            if elsewhere:
                raise Busy(nonce, f"its tree is mounted elsewhere, too: unmount {', '.join(elsewhere)}", elsewhere)
            mounts.unmount(point)
        if not point.exists():  # an earlier try came so far
            return True
        trees.remove(point)
        return bool(own)

    def attached(self) -> Sequence[str]:
        """The names of the mount points."""
        return os.listdir(self._points)

    def path(self, nonce: str) -> Path:
        """The mount point."""
        return self._points / nonce

    def view(self, parent: str) -> AbstractContextManager[Path]:
        """A mount for all who read it in this process."""
        return self._views.shared(parent)

    def viewed(self) -> Sequence[str]:
        """The names of the records."""
        return os.listdir(self._records)

    def sweep(self) -> None:
        """See Views."""
        self._views.sweep()

    def calling(self, record: Path) -> AbstractContextManager[IO[bytes]]:
        """See claims.py."""
        return Call(record)

    def await_calls(self, record: Path) -> None:
        """See claims.py."""
        await_calls(record)

    def _show(self, tree: Tree, record: Path, writable: bool) -> Path:
        self.attach(tree, self._prepare(tree, record), writable)
        return self.path(tree.nonce)

    def _disk_of(self, folder: Path) -> Path:
        """A folder that stays, on the file system of what is mounted on *folder*."""
        own, *_ = mounts.below(folder)
        on_top = {point.path: point for point in mounts.mounted()}.values()
        shown = [point for point in on_top if point.device == own.device and not _inside(point.path, str(self._points))]
        for point in sorted(shown, key=lambda point: len(point.root)):  # the whole of it before a part
            if os.path.isdir(point.path):
                return Path(point.path)
        reason = "each of its trees is a file system of its own, which no barrier of the store reaches"
        raise NotSupported(f"the snapshotter {self._options.snapshotter!r}", reason, "use overlayfs, btrfs or native")


def _options(mount: Mount, writable: bool) -> list[str]:
    """What to mount a snapshot with."""
    options = list(mount.options)
    if mount.kind == "overlay":
        # An overlay whose attributes are those of a user cannot note where a folder was.
        options += _ADDED[1:] if "userxattr" in options else _ADDED
        # Else unmounting brings to the disk all that anybody wrote there. The store's barrier does, if it is asked for.
        options += ["volatile"] if writable else []
    return options if writable else [*options, "ro"]


def _dress(mount: Mount) -> None:
    """Give the root of a stacked tree what that of the layer below has: containerd makes a new folder for it."""
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
