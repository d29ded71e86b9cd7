"""A machine whose power can be cut: its disk is a file, and what a cut leaves of it is a copy of that file.

    ground/  an XFS            its files can be copied in an instant
      image    of cache/, an XFS too: what the disk has kept for good
        image    of disk/, the file system under test: what the disk was told to write, in the page cache of cache/

All are mounted by loop devices. A write to disk/'s device is one write(2) to its image, and a flush of the device is an
fsync(2) of it. A copy is one FICLONE, which XFS makes under the lock that also writes take: it has each write whole or
not at all, and every write that ended before it. So both of these are states that a real disk can be found in:

- the disk's own cache is kept: a copy of disk/'s image, all that it was told up to one moment;
- the disk's own cache is lost: a copy of cache/'s image, mounted again. Of what the disk was told since the last flush
  it has what the kernel happened to write back, in any order, and of an unfinished flush a part.

Copying the image byte by byte, while it is written to, would give a state that no disk ever had: its beginning older
than its end. What is not played is a disk that lies about a flush, and sectors written by halves.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import leftovers
from tests.capabilities import MIB, loop_fs, mounted, run

_FICLONE = 0x40049409
_CUT = "cut"


class Machine:
    """Boots, and is cut; then the next boot finds the disk as the cut left it."""

    def __init__(self, kind: str, ground: Path) -> None:
        """Format a disk with an ext4, xfs or btrfs, on the XFS *ground*."""
        self._options = "loop,nouuid" if kind == "xfs" else "loop"
        with loop_fs("xfs", ground, 1024 * MIB) as self._cache, loop_fs(kind, self._cache, 512 * MIB) as self._disk:
            pass

    @contextmanager
    def boot(self) -> Iterator[Path]:
        """Its disk, mounted; afterwards what the last cut() left takes its place. Nothing may use it any more then."""
        kept = self._cache.parent / _CUT
        # The same XFS again is refused for as long as anybody, say a container made meanwhile, has the one before.
        with mounted(self._cache, "-o", "loop,nouuid", self._cache.parent / "image"):
            with mounted(self._disk, "-o", self._options, self._disk.parent / "image"):
                yield self._disk
                for mount in leftovers.mounts(self._disk)[:0:-1]:  # what the killed had mounted on it
                    run("umount", mount)
            _take(self._disk.parent)
        _take(kept.parent)

    def cut(self, *, cache_lost: bool) -> None:
        """What is on the disk now is what the next boot finds."""
        folder = (self._cache if cache_lost else self._disk).parent
        with open(folder / "image", "rb") as image, open(folder / _CUT, "xb") as copy:
            fcntl.ioctl(copy, _FICLONE, image.fileno())


def _take(folder: Path) -> None:
    """Put the copy that was made of an image, if there is one, in its place."""
    if (folder / _CUT).exists():
        os.replace(folder / _CUT, folder / "image")
