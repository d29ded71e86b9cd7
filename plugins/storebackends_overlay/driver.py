"""Trees as layers: what a build changes lies in its entry, and is mounted over what its bases changed.

    ROOT/result/ID/upper~ATTEMPT        a layer: the files that are new or changed, and marks of those removed
    ROOT/result/ID/tree.json            the layers below it, the nearest first
    ROOT/overlay/attributes             which extended attributes hold the marks: "privileged" or "unprivileged"
    ROOT/overlay/mounts/ID~ATTEMPT      the tree of a build, mounted
    ROOT/overlay/views/PID-NONCE/NAME   the tree of a result, mounted read-only by one process; see views.py
    ROOT/overlay/empty                  what lies below every tree

Mount points lie outside the entries, and a build is unmounted before its entry is renamed: a live overlay follows its
upper folder, so a stray process could go on writing into a published result. A layer bears its attempt in its name, so
that none can be taken for another of the same id. The empty layer makes the kernel stand between a build and its upper
folder from the first: written to directly, that could be given marks which hide or move files in its children.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from storebackends.plugin import (
    BuildFailed,
    Busy,
    CacheEntry,
    Capability,
    Entry,
    EntryBackend,
    Locks,
    NotFound,
    NotSupported,
    Problem,
    Size,
    StoreError,
    check_id,
    mounts,
    trees,
)

assert sys.platform == "linux", "overlayfs is a file system of Linux"  # noqa: S101 (tells the type checker, too)

from . import OverlayOptions, mounting  # noqa: E402
from .trial import Found, trial  # noqa: E402
from .views import Views, remove_all, stale, unmount_and_remove  # noqa: E402

log = logging.getLogger(__name__)


class Layer(NamedTuple):
    """The changes that one attempt at one id made."""

    id: str
    attempt: str


class OverlayBackend(EntryBackend):
    """See the module. Caches are plain folders: a loan outlives the generation it is a copy of."""

    options: OverlayOptions
    rooms = frozenset({"overlay"})

    def open(self) -> None:
        """Raises NotSupported where this user cannot mount overlays there, or not those of this store."""
        super().open()
        self._pid = os.getpid()
        room = f"{os.path.realpath(self.root)}/overlay"  # as the kernel lists mount points
        self._mounts, self._views_room, self._empty = f"{room}/mounts", f"{room}/views", f"{room}/empty"
        for folder in (room, self._mounts, self._views_room, self._empty):
            Path(folder).mkdir(mode=0o700, exist_ok=True)
        with ExitStack() as undo:
            self._locks = Locks(self.root / "locks")
            undo.callback(self._locks.close)
            self._views = Views(self._views_room, self._locks)
            undo.callback(self._views.close)
            self._unprivileged, capabilities = self._try_out(f"{room}/attributes")
            undo.pop_all()
        # An edit of a base's file that has several names copies it up under one, and leaves the others as they were.
        self.capabilities = capabilities - {Capability.LINKED} | {Capability.READONLY}

    def close(self) -> None:
        """Unmount all that was mounted here. Twice is fine; in a forked child it does nothing."""
        if os.getpid() == self._pid:
            for entry in self._builds.values():
                unmount_and_remove(self._point(entry))
            self._views.close()
            self._locks.close()

    # The verbs.

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """Mount an empty layer over those of *source*; where these are too many, over none, and copy the tree there."""
        below = self._layers(source) if source else []
        copied = source if len(below) > self.options.depth else None
        if copied:
            below = []
        own, folder, point = Layer(entry.id, entry.attempt), os.fspath(entry.folder), self._point(entry)
        upper, work = f"{folder}/{_upper(own)}", f"{folder}/work"
        with open(_record(entry), "xb") as file:
            file.write(json.dumps({"layers": [own, *below]}).encode())
        if below:
            _make_like(upper, self._path(below[0]))
        else:
            trees.create(Path(upper))
        os.mkdir(work, 0o700)
        os.mkdir(point, 0o700)
        self._mount(entry.id, point, below, upper, work)
        if copied:
            with self.view(copied.id) as tree:
                trees.copy(tree, Path(point))  # by way of the mount, so that nothing in it is taken for a mark

    def clone_cache(self, source: Entry | None, entry: Entry) -> None:
        """Copy the folder."""
        if source is None:
            trees.create(self.tree(entry))
        else:
            trees.copy(self.tree(source), self.tree(entry))

    def seal(self, entry: Entry) -> None:
        """Unmount the tree. Raises BuildFailed where a process has something open in it."""
        if isinstance(entry, CacheEntry):
            return
        point = self._point(entry)
        try:
            if not mounts.unmount(point) and os.path.isdir(point):  # else an earlier try came as far as that
                raise BuildFailed(entry.id, entry.attempt, "somebody unmounted its tree, so that it is not whole")
        except Busy as error:
            held = error.id if error.id != point else ", ".join(error.holders) or "a process that cannot be seen"
            reason = f"its tree cannot be unmounted: {held} keeps it in use; end that, or close what is open"
            raise BuildFailed(entry.id, entry.attempt, reason) from error
        with suppress(FileNotFoundError):
            os.rmdir(point)
        _remove_work(f"{entry.folder}/work")

    def remove(self, folder: Path) -> None:
        """Unmount the tree of what was a build, and remove the folder."""
        name = folder.name.rpartition("~")[0]  # a grave is called ID~ATTEMPT~NONCE, or that of a result ID~NONCE
        if "~" in name:
            unmount_and_remove(f"{self._mounts}/{name}")
        super().remove(folder)

    @contextmanager
    def view(self, id: str) -> Iterator[Path]:
        """Mount the tree read-only, once for all who look at it in this process."""
        layers = self._layers(self._source(id))
        mount = partial(self._mount, id, layers=layers)
        with self._views.show("~".join(layers[0]), mount) as point:
            yield Path(point)

    # The rest of the protocol, where it differs.

    def tree(self, entry: Entry) -> Path:
        """Where the tree of a build is mounted; a cache's is in its entry."""
        return super().tree(entry) if isinstance(entry, CacheEntry) else Path(self._point(entry))

    def size(self, id: str) -> Size:
        """See Backend.size. Exact, unless the file system lets a changed file share blocks with the one below it."""
        return replace(super().size(id), exact=not self._shares_blocks)

    def sweep(self) -> None:
        """Unmount what the dead have left mounted, and empty the trash."""
        for point, undo in self._stale():
            try:
                undo()
            except OSError as error:
                log.warning("%s stays mounted: %s", point, error)
        super().sweep()

    def check(self) -> Iterator[Problem]:
        """Mounts of builds and processes that are gone."""
        for point, undo in self._stale():
            yield Problem(point, "this was mounted by a process that is gone", undo)

    # Inside.

    def _point(self, entry: Entry) -> str:
        return f"{self._mounts}/{entry.folder.name}"

    def _layers(self, entry: Entry) -> list[Layer]:
        """Those of a result, its own first."""
        try:
            with open(_record(entry), "rb", buffering=0) as file:
                record = json.loads(file.read())
            return [Layer(check_id(id), check_id(attempt)) for id, attempt in record["layers"]]
        except FileNotFoundError:
            raise NotFound(entry.id, f"{entry.tree_record} is not there: {entry.id!r} was deleted meanwhile") from None
        except (ValueError, KeyError, TypeError) as error:
            raise NotFound(
                entry.id,
                f"{entry.tree_record} does not tell of what layers {entry.id!r} is made ({error}); "
                "delete it recursively, and build it again",
            ) from error

    def _path(self, layer: Layer) -> str:
        return f"{self._results}{layer.id}/{_upper(layer)}"

    def _mount(self, id: str, point: str, layers: Sequence[Layer], upper: str | None = None, work: str = "") -> None:
        lower = [*map(self._path, layers), self._empty]
        try:
            mounting.mount(point, lower, upper, work, unprivileged=self._unprivileged)
        except FileNotFoundError as error:
            gone = [layer for layer in layers if not os.path.isdir(self._path(layer))]
            if not gone:
                raise
            raise NotFound(
                id,
                f"{id!r} lies on attempt {gone[0].attempt} at {gone[0].id!r}, which is not there any more; "
                "delete what was built on that, and build it again",
            ) from error

    def _stale(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is mounted for nobody, and how to undo it."""
        points = os.listdir(self._mounts)  # before the builds are listed: a build is there before its mount
        building = set(os.listdir(self.in_progress))
        for name in points:
            if "~" in name and name not in building:
                point = f"{self._mounts}/{name}"
                yield point, partial(unmount_and_remove, point)
        for folder in stale(self._views_room, self._locks):
            yield folder, partial(remove_all, folder)

    def _try_out(self, attributes: str) -> Found:
        """What overlays can do here, with the attributes that this store's layers were made with."""
        kept = _kept(attributes)
        found = trial(Path(self._views.folder), unprivileged=kept)
        if kept is None:
            part = f"{self._views.folder}/attributes"
            with open(part, "w", encoding="ascii") as file:
                file.write(_ATTRIBUTES[found.unprivileged])
                file.flush()
                os.fsync(file.fileno())  # a power cut must not leave an empty one: no store opens with that
            with suppress(FileExistsError):
                os.link(part, attributes)
            if _kept(attributes) != found.unprivileged:
                raise StoreError(f"{self.root} was just made by a user with other rights; open it again")
        return found

    @functools.cached_property
    def _shares_blocks(self) -> bool:
        try:
            trees.check_reflink(self.trash)
        except NotSupported:
            return False
        return True


_ATTRIBUTES = ("privileged", "unprivileged")


def _kept(attributes: str) -> bool | None:
    """Are the layers of this store described by attributes that every user may set? None where there are none yet."""
    try:
        return bool(_ATTRIBUTES.index(Path(attributes).read_text(encoding="ascii")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(f"{attributes} says neither {' nor '.join(_ATTRIBUTES)}; restore it from a backup") from error


def _upper(layer: Layer) -> str:
    return f"upper~{layer.attempt}"


def _record(entry: Entry) -> str:
    return f"{entry.folder}/tree.json"  # as entry.tree_record, but to make a Path takes longer than to read the file


def _make_like(folder: str, other: str) -> None:
    """Make an empty layer whose own folder has the metadata of another's."""
    status = os.stat(other)
    os.mkdir(folder, 0o700)
    os.chown(folder, status.st_uid, status.st_gid)
    for name in os.listxattr(other):
        if not _MARK.match(name):
            os.setxattr(folder, name, os.getxattr(other, name))
    os.chmod(folder, stat.S_IMODE(status.st_mode))
    os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))


def _remove_work(work: str) -> None:
    """Remove what overlayfs leaves: `volatile` has put a mark there that forbids to mount the layer again."""
    with suppress(OSError):
        os.unlink(f"{work}/work/incompat/volatile/dirty")
        for folder in ("/work/incompat/volatile", "/work/incompat", "/work", ""):
            os.rmdir(f"{work}{folder}")
        return
    trees.remove(Path(work))  # it is not as we know it, or an earlier try came as far as that


# What overlayfs keeps of its own. With another "overlay." it is what a build set by that name, which is its own affair.
_MARK = re.compile(r"(trusted|user)\.overlay\.(?!overlay\.)")
