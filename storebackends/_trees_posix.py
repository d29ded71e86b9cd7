"""Trees by open folders: see `trees` for what each function promises."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

from ._trees_copier import Copier, drop_acls  # noqa: E402
from ._trees_walk import (  # noqa: E402
    FOLDER,
    NO_FOLDER,
    Chain,
    descend,
    identity,
    make_writable,
    open_folder,
    open_same_mount,
)
from .backend import Capability, Usage  # noqa: E402

_PASSES = 1000  # how often remove() may find that a name is not what it was, before it gives up


def copy(source: Path, dest: Path, reflink: Literal["auto", "always", "never"]) -> None:
    _copy_tree(Copier(reflink), source, dest)


def link(source: Path, dest: Path) -> None:
    _copy_tree(Copier(linking=True), source, dest)


def _copy_tree(copier: Copier, source: Path, dest: Path) -> None:
    src = os.open(source, FOLDER)
    try:
        with suppress(FileExistsError):
            os.mkdir(dest, 0o700)
        dst = os.open(dest, FOLDER)
        try:
            if os.listdir(dst):
                raise OSError(errno.ENOTEMPTY, f"{dest} is not empty")
            copier.tree(src, dst)
        finally:
            os.close(dst)
    finally:
        os.close(src)


def copy_into(source: Path, root: Path, parts: Sequence[str]) -> None:
    base = os.open(root, FOLDER)
    try:
        parent = descend(base, parts[:-1], _open_or_make)
    finally:
        os.close(base)
    try:
        name = parts[-1] if parts else "."
        if stat.S_ISDIR(os.lstat(source).st_mode):
            _merge(source, name, parent)
        else:
            _copy_file(source, name, parent)
    finally:
        os.close(parent)


def _merge(source: Path, name: str, parent: int) -> None:
    src = os.open(source, FOLDER)
    try:
        dst = _open_or_make(name, parent)
        try:
            Copier(merge=True).tree(src, dst)
        finally:
            os.close(dst)
    finally:
        os.close(src)


def _copy_file(source: Path, name: str, parent: int) -> None:
    src = os.open(source.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        Copier(merge=True).file(source.name, src, name, parent)
    finally:
        os.close(src)


def _open_or_make(name: str, parent: int) -> int:
    made = False
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent)
        made = True
    try:
        fd = open_folder(name, parent)
    except OSError as error:
        if error.errno in NO_FOLDER:
            raise OSError(error.errno, "it is a link or a file where a folder is needed", name) from error
        raise
    if made:
        drop_acls(fd)
        os.fchmod(fd, 0o755)  # whatever the umask is
    return fd


def check_folder(root: Path, parts: Sequence[str]) -> None:
    base = os.open(root, FOLDER)
    try:
        os.close(descend(base, parts))
    finally:
        os.close(base)


def size(path: Path) -> int:
    start = os.open(path, FOLDER)
    try:
        with Chain(start, open_same_mount) as chain:
            return os.fstat(start).st_blocks * 512 + _allocated(chain)
    finally:
        os.close(start)


def _allocated(chain: Chain) -> int:
    total, seen, todo = 0, set[tuple[int, int]](), [os.listdir(chain.fd)]
    while True:
        if not todo[-1]:
            todo.pop()
            if not todo:
                return total
            chain.leave()
            continue
        name = todo[-1].pop()
        try:
            status = os.stat(name, dir_fd=chain.fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                chain.enter(name)
                todo.append(os.listdir(chain.fd))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EXDEV, *NO_FOLDER):
                raise
            continue
        if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode) or identity(status) not in seen:
            total += status.st_blocks * 512
            seen.add(identity(status))


def usage(path: Path) -> Usage:
    disk = os.statvfs(path)
    # Btrfs, for one, makes inodes as it goes and reports none.
    inodes = (disk.f_files, disk.f_favail) if disk.f_files else (None, None)
    return Usage(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize, *inodes)


def remove(path: Path) -> None:
    above, name = os.path.split(path)
    try:
        parent = os.open(above or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        with Chain(parent, _open_writable) as chain:
            try:
                _Remover(chain).remove(name)
            except OSError as error:
                chain.locate(error, below=1)
                raise
    finally:
        os.close(parent)


class _Remover:
    """Removes a folder of the chain's last one. Whatever is gone or has become something else is looked at again."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._passes = chain, 0

    def remove(self, name: str) -> None:
        todo = [[name]]  # per folder on the way down: the folders still in it
        while todo[0] or len(todo) > 1:
            if todo[-1]:
                if self._enter(name := todo[-1].pop()):
                    todo.append(self._clear())
                elif not self._unlink(name):
                    todo[-1].append(name)
            else:
                todo.pop()
                if not self._rmdir(name := self._chain.leave()):
                    todo[-1].append(name)

    def _enter(self, name: str) -> bool:
        try:
            self._chain.enter(name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise OSError(errno.EXDEV, "something is mounted there; unmount it first", name) from error
            if error.errno not in (errno.ENOENT, *NO_FOLDER):
                raise
            return False
        return True

    def _clear(self) -> list[str]:
        """Remove all but the folders that hold something, and return those."""
        with os.scandir(self._chain.fd) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        return [name for name, is_folder in found if not (self._was_empty if is_folder else self._unlink)(name)]

    def _was_empty(self, name: str) -> bool:
        # An attempt costs a fraction of a look into it.
        try:
            os.rmdir(name, dir_fd=self._chain.fd)
        except OSError:
            return False  # entering it will say why, where it is not for what it holds
        return True

    def _unlink(self, name: str) -> bool:
        try:
            os.unlink(name, dir_fd=self._chain.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            # What unlink(2) says of a folder is EISDIR on Linux and EPERM in POSIX.
            if error.errno not in (errno.EISDIR, errno.EPERM) or not self._is_folder(name):
                raise
            return self._again(name)
        return True

    def _rmdir(self, name: str) -> bool:
        try:
            os.rmdir(name, dir_fd=self._chain.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return self._again(name)
        return True

    def _is_folder(self, name: str) -> bool:
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=self._chain.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return True  # so it was one: look again

    def _again(self, name: str) -> Literal[False]:
        self._passes += 1
        if self._passes > _PASSES:
            raise OSError(errno.EBUSY, "a process changes it as fast as it is removed; end that process", name)
        return False


def _open_writable(name: str, parent: int) -> int:
    try:
        fd = open_same_mount(name, parent)
    except PermissionError:
        make_writable(name, parent)
        fd = open_same_mount(name, parent)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            with suppress(PermissionError):  # another's; unlink(2) will say so where it matters
                os.fchmod(fd, mode | stat.S_IRWXU)
    except OSError:
        os.close(fd)
        raise
    return fd


def _has_modes(file: str) -> bool:
    os.chmod(file, 0o640)
    return stat.S_IMODE(os.stat(file).st_mode) == 0o640


def _has_ns_times(file: str) -> bool:
    os.utime(file, ns=(123456789, 123456789))
    return os.stat(file).st_mtime_ns == 123456789


def _has_holes(file: str) -> bool:
    os.truncate(file, 1 << 20)
    return os.stat(file).st_blocks < (1 << 20) // 512


# What a copy keeps, and how to find out, given a new file; see trees.capabilities().
TRIALS: dict[Capability, Callable[[str], object]] = {
    Capability.OWNERS: lambda file: os.chown(file, 1, 1),
    Capability.MODES: _has_modes,
    Capability.NS_MTIME: _has_ns_times,
    Capability.SYMLINKS: lambda file: os.symlink("x", file + "~"),
    Capability.HARDLINKS: lambda file: os.link(file, file + "~"),
    Capability.SPARSE: _has_holes,
    Capability.FIFOS: lambda file: os.mkfifo(file + "~"),
    Capability.DEVICES: lambda file: os.mknod(file + "~", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}
if sys.platform == "linux":
    # Read, write and nothing for owner, group and others, and read for user 1, in the form that acl(5) has on disk.
    _ACL = struct.pack("<I" + "HHi" * 5, 2, 1, 6, -1, 2, 4, 1, 4, 4, -1, 16, 4, -1, 32, 0, -1)
    TRIALS[Capability.XATTRS] = lambda file: os.setxattr(file, "user.storebackends", b"x")
    TRIALS[Capability.ACLS] = lambda file: os.setxattr(file, "system.posix_acl_access", _ACL)
