"""Trees as subvolumes: a step is a snapshot, a flag and a rename, whatever the size of the tree. Starts no process.

A read-only subvolume cannot move to another folder, but the folder that it is in can: so a tree is sealed where it was
built, and its entry renamed after that. Deleted subvolumes are reclaimed by the kernel, later.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from storebackends.plugin import Capability, Entry, EntryBackend, NotSupported, StoreError, Usage, trees

from . import BtrfsOptions

assert sys.platform == "linux", "btrfs is a file system of Linux; use the backend copy"  # noqa: S101 (for the type checker too)

from . import checks, space, volumes  # noqa: E402

log = logging.getLogger(__name__)

_PASSES = 16  # subvolumes in each other's closed folders that a user's build may leave
_PAUSE = 0.05  # seconds between two looks at what is not reclaimed yet
_PATIENCE = 10.0


class BtrfsBackend(EntryBackend):
    """See the module."""

    options: BtrfsOptions
    _is_reclaiming = False  # has anything been deleted here, and not been waited for?

    def open(self) -> None:
        """Raises NotSupported where the file system, the kernel or the module btrfsutil does not serve."""
        support = checks.why_not(self.root)
        if not support.usable:
            raise NotSupported("a btrfs store", support.reason, support.fix)
        super().open()
        self.capabilities = trees.capabilities(self.trash) | {Capability.READONLY}

    def clone(self, source: Entry | None, entry: Entry) -> None:
        """Snapshot the tree, and what is nested in it. All of the clone is writable."""
        if source is None:
            volumes.create(self.tree(entry))
        else:
            volumes.clone(self.tree(source), self.tree(entry))

    def seal(self, entry: Entry) -> None:
        """Make the tree, and what is nested in it, read-only."""
        volumes.seal(self.tree(entry))

    def remove(self, folder: Path) -> None:
        """Delete the subvolumes, then the rest as the plain folders it is."""
        self._is_reclaiming = True
        for left in reversed(range(_PASSES)):
            volumes.delete(folder / "rootfs")
            try:
                trees.remove(folder)
                break
            except StoreError as error:
                # A user's build can hide subvolumes in folders that the user may not read; those are open now.
                if not (left and isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS):
                    raise

    # What is deleted comes back only when the kernel has reclaimed it, and to hide an entry is a rename, which takes
    # metadata. On a full file system both are helped by a little patience.

    def build(self, id: str, base: str | None, attempt: str, record: Any = None) -> Entry:
        """See Backend.build."""
        if self._is_reclaiming and _is_tight(self.root):
            self.settle(_PATIENCE)
        return super().build(id, base, attempt, record)

    def discard(self, id: str, attempt: str) -> None:
        """See Backend.discard; without room for the rename the tree goes where it is, since nobody sees a build."""
        try:
            super().discard(id, attempt)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            volumes.delete(self.in_progress / f"{id}~{attempt}" / "rootfs")
            self.settle(_PATIENCE)
            super().discard(id, attempt)

    def delete(self, id: str) -> None:
        """See Backend.delete."""
        try:
            super().delete(id)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.settle(_PATIENCE)
            super().delete(id)

    def usage(self) -> Usage:
        """See Backend.usage; with the metadata, which can run out before the rest does."""
        usage, room = super().usage(), space.metadata(self.root)
        return replace(usage, metadata_total=room.total, metadata_free=room.free) if room else usage

    def settle(self, timeout: float) -> bool:
        """Wait until the kernel has reclaimed what is deleted now. False also where only root may know."""
        deadline = time.monotonic() + timeout
        self._is_reclaiming = False
        if not self._commits(timeout):  # which has the kernel begin
            return False
        try:
            waiting = volumes.deleted(self.root)
            while waiting and time.monotonic() < deadline:
                time.sleep(_PAUSE)
                waiting &= volumes.deleted(self.root)
        except PermissionError:
            return False
        return not waiting and self._commits(deadline - time.monotonic())  # only then is the space free

    def _commits(self, timeout: float) -> bool:
        """Have the file system commit, in a thread of its own: it may take longer than anybody wants to wait."""
        thread = threading.Thread(target=_commit, args=(self.root,), name="btrfs commit", daemon=True)
        thread.start()
        thread.join(max(timeout, 0))
        return not thread.is_alive()


def _commit(folder: Path) -> None:
    try:
        volumes.commit(folder)
    except OSError as error:
        log.warning("the file system of %s does not commit: %s", folder, error)


def _is_tight(folder: Path) -> bool:
    """Is there next to nothing free? The kernel says so, too, where the metadata are what runs out."""
    disk = os.statvfs(folder)
    return disk.f_bavail * 20 < disk.f_blocks
