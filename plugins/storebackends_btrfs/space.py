"""Room for metadata, which can run out while there is room for data; and then nothing works any more.

Neither statvfs(3) nor the module btrfsutil tells of it. The kernel does, and the `btrfs` command would be a process.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

assert sys.platform == "linux"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import fcntl  # noqa: E402

from .volumes import opened  # noqa: E402

# ioctl_btrfs(2), linux/btrfs.h and linux/btrfs_tree.h.
_SPACE_INFO, _FS_INFO, _DEV_INFO = 0xC0109414, 0x8400941F, 0xD000941E
_DATA, _METADATA, _RESERVE = 1 << 0, 1 << 2, 1 << 49
_COPIES = {1 << 4: 2, 1 << 5: 2, 1 << 6: 2, 1 << 7: 2, 1 << 8: 3, 1 << 9: 3, 1 << 10: 4}  # RAID1, DUP, RAID10, 5, 6, …
_GROUP, _DEVICE = struct.Struct("=3Q"), struct.Struct("=Q16x2Q")


class Room(NamedTuple):
    """So many bytes in all, and so many of them free."""

    total: int
    free: int


def metadata(folder: Path) -> Room | None:
    """Room for metadata, with what no group of blocks has taken yet; None where data and metadata are mixed."""
    with opened(folder) as fd:
        groups, unallocated = _groups(fd), sum(_unallocated(fd))
    total = used = 0
    copies = 1
    for flags, size, taken in groups:
        if flags & _DATA and flags & _METADATA:
            return None
        if flags & _METADATA and not flags & _RESERVE:
            total, used = total + size, used + taken
            copies = max(copies, *(count for bit, count in _COPIES.items() if flags & bit), 1)
        elif flags & _RESERVE:
            used += size - taken  # kept by the kernel for getting out of trouble; what is taken counts above
    spare = unallocated // copies
    return Room(total + spare, max(total - used, 0) + spare)


def _groups(fd: int) -> list[tuple[int, int, int]]:
    """(flags, bytes, bytes taken) of each kind of block groups."""
    slots = 64  # there are four kinds, and a few more while profiles are converted
    buffer = bytearray(16 + slots * _GROUP.size)
    struct.pack_into("=Q", buffer, 0, slots)
    fcntl.ioctl(fd, _SPACE_INFO, buffer)
    (count,) = struct.unpack_from("=Q", buffer, 8)
    return [_GROUP.unpack_from(buffer, 16 + n * _GROUP.size) for n in range(min(count, slots))]


def _unallocated(fd: int) -> Iterator[int]:
    """The bytes of each device that no group of blocks has taken."""
    buffer = bytearray(1024)
    fcntl.ioctl(fd, _FS_INFO, buffer)
    (highest,) = struct.unpack_from("=Q", buffer)
    for number in range(1, highest + 1):
        device = bytearray(4096)
        _DEVICE.pack_into(device, 0, number, 0, 0)
        try:
            fcntl.ioctl(fd, _DEV_INFO, device)
        except OSError as error:
            if error.errno != errno.ENODEV:  # removed: its number stays free
                raise
            continue
        _, used, total = _DEVICE.unpack_from(device)
        yield total - used
