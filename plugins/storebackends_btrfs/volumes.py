"""Subvolumes, and what is nested in them: made, cloned, sealed and deleted.

A build may nest subvolumes in its tree, under any name and at any depth. A snapshot has an empty folder in the place of
each. So they are listed, from the file system's own records, and dealt with one by one. They are deleted by their
numbers, and entered by open folders: no link is followed and no mount entered, whatever a build left in the way.

The module btrfsutil does what it can. It keeps Python's lock while it waits, though, and a snapshot or a change of the
read-only flag waits for a commit of the whole file system, which beside others' writes takes a tenth of a second and
more: long enough to stop every log and every other build of this process. Those calls are made here, as is the deletion
by number, which it lacks.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

assert sys.platform == "linux"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import fcntl  # noqa: E402

try:
    import btrfsutil
except ImportError as error:  # not installed, or built for another libbtrfsutil
    MISSING = str(error)
else:
    MISSING = ""

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what FOLDER says of all that is none
_REFUSED = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOTEMPTY, errno.ENOENT)

# ioctl_btrfs(2), linux/btrfs.h. The arguments: a descriptor, a flag, and at the end a name or a number.
_SNAP_CREATE_V2, _SNAP_DESTROY_V2, _SUBVOL_SETFLAGS, _FS_INFO = 0x50009417, 0x5000943F, 0x4008941A, 0x8400941F
_BY_NAME, _BY_NUMBER, _FLAGS = struct.Struct("=q8xQ32x4040s"), struct.Struct("=q8xQ32xQ4032x"), struct.Struct("=Q")
_START_SYNC, _WAIT_SYNC = 0x80089418, 0x40089416
_READ_ONLY, _SPEC_BY_ID = 1 << 1, 1 << 4


def is_btrfs(folder: Path) -> bool:
    """Is the folder on a btrfs?"""
    with opened(folder) as fd:
        try:
            fcntl.ioctl(fd, _FS_INFO, bytearray(1024))
        except OSError:
            return False
    return True


def create(path: Path) -> None:
    """Make an empty subvolume: a folder with mode 0755, whatever the umask."""
    btrfsutil.create_subvolume(path)
    os.chmod(path, 0o755)  # noqa: S103 (a system's root folder is like that)


def clone(source: Path, dest: Path) -> None:
    """Make *dest* a writable snapshot of the subvolume *source*, and of all that is nested in it."""
    with opened(source) as fd, opened(dest.parent) as parent:
        _snapshot(fd, parent, dest.name)
        if nested := [path for path, _ in _nested(fd)]:
            with _entered(parent, [dest.name]) as copy:
                for path in nested:
                    _clone_nested(fd, copy, path.split("/"))


def seal(path: Path) -> None:
    """Make a subvolume and all that is nested in it read-only. Twice is fine."""
    with opened(path.parent) as parent, _entered(parent, [path.name]) as fd:
        if not btrfsutil.is_subvolume(fd):
            raise OSError(errno.EINVAL, "the build has put a plain folder in the place of its subvolume", str(path))
        _set_read_only(fd, True)  # first, so that nothing can move from where it is listed
        for nested, _ in _nested(fd):
            with _entered(fd, nested.split("/")) as inner:
                _set_read_only(inner, True)


def delete(path: Path) -> None:
    """Delete a subvolume, if it is one, and all that is nested in it, as far as the kernel lets this user.

    What is left is writable, to be emptied and removed as folders are. Another remover may be at work.
    """
    try:
        with opened(path.parent) as parent, _entered(parent, [path.name]) as fd:
            if btrfsutil.is_subvolume(fd):
                _delete(parent, fd, _nested(fd))
    except OSError as error:
        if error.errno not in (*_NO_FOLDER, errno.EACCES):  # the last: a user's build closed it
            raise


def deleted(folder: Path) -> set[int]:
    """The numbers of the file system's deleted subvolumes that still take space; PermissionError but to root."""
    return set(btrfsutil.deleted_subvolumes(folder))


def commit(folder: Path) -> None:
    """Have the file system commit what it has. May take long."""
    number = bytearray(8)
    with opened(folder) as fd:
        fcntl.ioctl(fd, _START_SYNC, number)
        fcntl.ioctl(fd, _WAIT_SYNC, number)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """The descriptor of a folder of the store's own."""
    fd = os.open(folder, FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


# Inside.


@contextmanager
def _entered(folder: int, names: Sequence[str]) -> Iterator[int]:
    """The descriptor of the folder reached from *folder* by *names*, through no link and no mount."""
    here = os.dup(folder)
    try:
        for name in names:
            there = os.open(name, FOLDER, dir_fd=here)
            os.close(here)
            here = there
        # Once, at the end: no way down leads out of a mount again.
        if _mount_of(here) != _mount_of(folder):
            raise OSError(errno.EXDEV, "something is mounted there; unmount it first", "/".join(names))
        yield here
    finally:
        os.close(here)


def _mount_of(fd: int) -> str:
    # Not st_dev, which differs between the subvolumes of one file system and is the same for a folder bound elsewhere.
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as facts:
        return next(line for line in facts if line.startswith("mnt_id:"))


def _nested(fd: int) -> Sequence[tuple[str, int]]:
    """(path, number) of each subvolume below *fd*, at any depth; outer ones before those in them.

    To a user other than root those in folders that this user may not read are not shown.
    """
    with closing(btrfsutil.SubvolumeIterator(fd)) as found:
        return list(found)


def _snapshot(source: int, parent: int, name: str) -> None:
    fcntl.ioctl(parent, _SNAP_CREATE_V2, bytearray(_BY_NAME.pack(source, 0, os.fsencode(name))))


def _clone_nested(source: int, dest: int, path: Sequence[str]) -> None:
    """Snapshot what is at *path* in *source* to that place in *dest*, where an empty folder holds it."""
    with _entered(source, path) as fd, _entered(dest, path[:-1]) as parent, _unchanged(parent):
        os.rmdir(path[-1], dir_fd=parent)
        _snapshot(fd, parent, path[-1])


@contextmanager
def _unchanged(folder: int) -> Iterator[None]:
    """Let this user write to a folder, and have its mode and times as they were."""
    status = os.fstat(folder)
    is_closed = status.st_mode & 0o700 != 0o700
    if is_closed:
        os.fchmod(folder, status.st_mode | 0o700)
    try:
        yield
    finally:
        if is_closed:
            os.fchmod(folder, status.st_mode)
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))


def _set_read_only(fd: int, read_only: bool) -> None:
    fcntl.ioctl(fd, _SUBVOL_SETFLAGS, bytearray(_FLAGS.pack(_READ_ONLY * read_only)))


def _delete(parent: int, fd: int, nested: Sequence[tuple[str, int]]) -> None:
    number = btrfsutil.subvolume_id(fd)
    if not nested and _destroy(parent, number):
        return
    # Nothing goes from a read-only parent, and to a user nothing that is read-only itself. What cannot be unsealed
    # resists below, and then says why to whoever removes it as a folder.
    for path in ([], *(path.split("/") for path, _ in nested)):
        with suppress(OSError), _entered(fd, path) as inner:
            _set_read_only(inner, False)
    for inner_number in (*(inner for _, inner in reversed(nested)), number):
        _destroy(parent, inner_number)


def _destroy(fd: int, number: int) -> bool:
    """Delete an empty subvolume other than that of *fd*; False where that is refused, or another remover was first."""
    try:
        fcntl.ioctl(fd, _SNAP_DESTROY_V2, bytearray(_BY_NUMBER.pack(0, _SPEC_BY_ID, number)))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True
