"""Trees as subvolumes: a step is a snapshot, a flag and a rename, whatever the size of the tree. Starts no process.

A read-only subvolume cannot move to another folder, but the folder that it is in can: so a tree is sealed where it was
built, and its entry renamed after that. Deleted subvolumes are reclaimed by the kernel, later.
"""

from __future__ import annotations

import errno
import sys
import time
from dataclasses import replace
from pathlib import Path

from storebackends.plugin import Capability, Entry, EntryBackend, NotSupported, StoreError, Usage, trees

from . import BtrfsOptions

assert sys.platform == "linux", "btrfs is a file system of Linux; use the backend copy"  # noqa: S101 (for the type checker too)

from . import checks, space, volumes  # noqa: E402

_PASSES = 16  # subvolumes in each other's closed folders that a user's build may leave
_PAUSE = 0.05


class BtrfsBackend(EntryBackend):
    """See the module."""

    options: BtrfsOptions

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
        for left in reversed(range(_PASSES)):
            volumes.delete(folder / "rootfs")
            try:
                trees.remove(folder)
                break
            except StoreError as error:
                # A user's build can hide subvolumes in folders that the user may not read; those are open now.
                if not (left and isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS):
                    raise

    def usage(self) -> Usage:
        """See Backend.usage; with the metadata, which can run out before the rest does."""
        usage, room = super().usage(), space.metadata(self.root)
        return replace(usage, metadata_total=room.total, metadata_free=room.free) if room else usage

    def settle(self, timeout: float) -> bool:
        """Wait until the kernel has reclaimed what is deleted now. False also where only root may know."""
        deadline = time.monotonic() + timeout
        volumes.start_commit(self.root)  # which reclaims sooner than the next that is due
        try:
            waiting = volumes.deleted(self.root)
            while waiting and time.monotonic() < deadline:
                time.sleep(_PAUSE)
                waiting &= volumes.deleted(self.root)
        except PermissionError:
            return False
        return not waiting
