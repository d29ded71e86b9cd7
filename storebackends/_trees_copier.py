"""Copying a tree by open folders, with all that can be kept of it. POSIX only.

The order for each inode: contents, owner, extended attributes, mode, times. chown(2) clears setuid and capabilities, an
ACL rewrites the mode, and all of them touch the times.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Literal

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

from ._trees_walk import NO_FOLDER, Chain, descend, identity  # noqa: E402
from .errors import NotSupported  # noqa: E402

if sys.platform == "linux":
    from fcntl import ioctl as _ioctl
else:

    def _ioctl(fd: int, request: int, arg: int) -> int:
        raise OSError(errno.ENOSYS, "not on this platform")


# Not blocking, in case a file has become a pipe since it was listed.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FICLONE = 0x40049409
_NO_REFLINK = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS)  # never for such a pair of file systems
_CHUNK = 1 << 18
_SPECIAL = stat.S_ISUID | stat.S_ISGID


class Copier:
    """One copying of one tree, and what was learnt on the way."""

    def __init__(
        self, reflink: Literal["auto", "always", "never"] = "auto", *, merge: bool = False, linking: bool = False
    ) -> None:
        """With *merge*, what is in the way is replaced. With *linking*, all but folders is linked, not copied."""
        self._reflink, self._merge, self._linking = reflink, merge, linking
        self._unshared: set[int] = set()  # devices whose files cannot share blocks with ours
        self._firsts: dict[tuple[int, int], tuple[tuple[str, ...], str]] = {}  # of each inode with several names

    def tree(self, source: int, dest: int) -> None:
        """Copy what is in the folder *source* and its metadata to the folder *dest*."""
        with Chain(source) as src, Chain(dest) as dst:
            try:
                self._tree(dest, src, dst)
            except OSError as error:
                src.locate(error)
                raise

    def file(self, name: str, source: int, target: str, dest: int) -> None:
        """Copy *name*, no folder, of the folder *source* to *target* in the folder *dest*."""
        with Chain(dest) as dst:
            is_file = stat.S_ISREG(os.stat(name, dir_fd=source, follow_symlinks=False).st_mode)
            self._copy(name, source, target, dst, dest, is_file, True)

    def _tree(self, root: int, src: Chain, dst: Chain) -> None:
        todo = [self._begin(root, src, dst, made=not self._merge)]
        while True:
            status, folders = todo[-1]
            if folders:
                name = folders.pop()
                made = self._mkdir(name, dst.fd)
                self._enter(name, dst)
                src.enter(name)
                todo.append(self._begin(root, src, dst, made))
                continue
            _keep(src.fd, dst.fd, status)  # now that nothing below touches it any more
            todo.pop()
            if not todo:
                return
            src.leave()
            dst.leave()

    def _begin(self, root: int, src: Chain, dst: Chain, made: bool) -> tuple[os.stat_result, list[str]]:
        """Copy all but the folders of one folder, and return those, with the folder's own metadata."""
        status = os.fstat(src.fd)
        if identity(status) == identity(os.fstat(root)):
            raise OSError(errno.ELOOP, "the copy would lie inside of what it copies")
        if made:
            drop_acls(dst.fd)
            os.fchmod(dst.fd, 0o700)  # a default ACL of the parent may have taken the owner's right to write
        folders, source = [], src.fd
        with os.scandir(source) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    name, is_file = entry.name, entry.is_file(follow_symlinks=False)
                    self._copy(name, source, name, dst, root, is_file, not made)
        return status, folders

    def _mkdir(self, name: str, dst: int) -> bool:
        """Make a folder; False where there was one and merging is asked for."""
        try:
            os.mkdir(name, 0o700, dir_fd=dst)
        except FileExistsError:
            if not self._merge:
                raise
            return False
        return True

    def _enter(self, name: str, dst: Chain) -> None:
        try:
            dst.enter(name)
        except OSError as error:
            if error.errno not in NO_FOLDER:
                raise
            raise OSError(error.errno, "a link or a file is where a folder is needed", name) from error

    def _copy(self, name: str, src: int, target: str, dst: Chain, root: int, is_file: bool, foreign: bool) -> None:
        """Copy anything but a folder. A *foreign* folder may have a default ACL, which is not ours to inherit."""
        try:
            if self._linking and self._link(name, src, target, dst.fd):
                return
            (self._file if is_file else self._node)(name, src, target, dst, root, foreign)
        except OSError as error:
            error.filename = name
            raise

    def _link(self, name: str, src: int, target: str, dst: int) -> bool:
        try:
            os.link(name, target, src_dir_fd=src, dst_dir_fd=dst, follow_symlinks=False)
        except OSError as error:
            # EPERM: fs.protected_hardlinks guards another user's file; or no links to links on this file system.
            if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
                raise
            return False
        return True

    def _link_first(self, status: os.stat_result, target: str, dst: Chain, root: int) -> bool:
        """Make *target* another name of what was copied of the inode before; False where this is the first."""
        try:
            way, first = self._firsts[identity(status)]
        except KeyError:
            self._firsts[identity(status)] = tuple(dst.names), target
            return False
        parent = descend(root, way)
        try:
            self._replace(
                lambda: os.link(first, target, src_dir_fd=parent, dst_dir_fd=dst.fd, follow_symlinks=False),
                target,
                dst.fd,
            )
        finally:
            os.close(parent)
        return True

    def _replace(self, create: Callable[[], object], name: str, dst: int) -> None:
        try:
            create()
        except FileExistsError:
            self._make_way(name, dst)
            create()

    def _make_way(self, name: str, dst: int) -> None:
        """Remove what has that name already, if merging is asked for."""
        if not self._merge:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        os.unlink(name, dir_fd=dst)

    def _file(self, name: str, src: int, target: str, dst: Chain, root: int, foreign: bool) -> None:
        fd = os.open(name, _READ, dir_fd=src)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ESTALE, "it became something else while it was being copied")
            if status.st_nlink > 1 and self._link_first(status, target, dst, root):
                return
            permissions, into = status.st_mode & 0o777, dst.fd
            try:
                out = os.open(target, _CREATE, permissions, dir_fd=into)
            except FileExistsError:
                self._make_way(target, into)
                out = os.open(target, _CREATE, permissions, dir_fd=into)
            try:
                if status.st_size and not self._share(fd, out, status.st_dev):
                    _copy_data(fd, out, status)
                if foreign:
                    drop_acls(out)
                _keep(fd, out, status)
            finally:
                os.close(out)
        finally:
            os.close(fd)

    def _share(self, fd: int, out: int, device: int) -> bool:
        if self._reflink == "never" or device in self._unshared:
            return False
        try:
            _ioctl(out, _FICLONE, fd)
        except OSError as error:
            if self._reflink == "always":
                if error.errno in (*_NO_REFLINK, errno.EINVAL):
                    raise NotSupported(
                        "a copy that shares blocks",
                        f"the file system refused ({error.strerror})",
                        'use XFS (made with reflink=1) or btrfs for source and store, or reflink = "auto"',
                    ) from error
                raise
            if error.errno in _NO_REFLINK:
                self._unshared.add(device)
            return False
        return True

    def _node(self, name: str, src: int, target: str, dst: Chain, root: int, foreign: bool) -> None:
        """Copy a link, a pipe or a device: nothing that may be opened."""
        status = os.stat(name, dir_fd=src, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK or (status.st_nlink > 1 and self._link_first(status, target, dst, root)):
            return
        if kind == stat.S_IFLNK:
            text = os.readlink(name, dir_fd=src)
            self._replace(lambda: os.symlink(text, target, dir_fd=dst.fd), target, dst.fd)
        else:
            self._mknod(target, kind, status.st_rdev, dst.fd)
        _keep_node(name, src, target, dst.fd, status, foreign)

    def _mknod(self, name: str, kind: int, device: int, dst: int) -> None:
        try:
            self._replace(lambda: os.mknod(name, kind | 0o600, device, dir_fd=dst), name, dst)
        except PermissionError as error:
            raise NotSupported(
                f"making the device node {name!r}", "this user may not", "copy as root, or without that node"
            ) from error


def _copy_data(fd: int, out: int, status: os.stat_result) -> None:
    if status.st_blocks * 512 >= status.st_size:
        _copy_range(fd, out, 0, status.st_size)
        return
    for start, end in _data(fd, status.st_size):
        _copy_range(fd, out, start, end)
    os.ftruncate(out, status.st_size)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: a hole from here to the end
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _copy_range(fd: int, out: int, start: int, end: int) -> None:
    """Copy bytes by reading and writing.

    Not by copy_file_range(2): it may share blocks where that is not wanted. sendfile(2) would save a sixth of the time,
    but not every file system has it.
    """
    while start < end and (chunk := os.pread(fd, min(end - start, _CHUNK), start)):
        written = os.pwrite(out, chunk, start)
        start += written


def _keep(source: int, dest: int, status: os.stat_result) -> None:
    """Give the open inode *dest* the metadata of *source*, whose status was taken before it was read."""
    made, mode = os.fstat(dest), status.st_mode
    is_ours = made.st_uid == status.st_uid and made.st_gid == status.st_gid
    if not is_ours and not _chown(dest, status):
        mode &= ~_SPECIAL
    if _copy_xattrs(source, dest) or not is_ours or mode != made.st_mode:
        os.fchmod(dest, stat.S_IMODE(mode))
    os.utime(dest, ns=(status.st_atime_ns, status.st_mtime_ns))


def _keep_node(name: str, src: int, target: str, dst: int, status: os.stat_result, foreign: bool) -> None:
    """As _keep(), for what must not be opened: by name, following no link."""
    mode = stat.S_IMODE(status.st_mode)
    if not _chown(target, status, dst):
        mode &= ~_SPECIAL
    if foreign:
        drop_acls(f"/proc/self/fd/{dst}/{target}")
    _copy_xattrs(f"/proc/self/fd/{src}/{name}", f"/proc/self/fd/{dst}/{target}")
    if not stat.S_ISLNK(status.st_mode):
        _chmod_node(target, dst, mode)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=dst, follow_symlinks=False)


def _chmod_node(name: str, dst: int, mode: int) -> None:
    if sys.platform == "linux":
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dst)
        try:
            os.chmod(f"/proc/self/fd/{fd}", mode)  # chmod(2) itself would follow a link that took the name
        finally:
            os.close(fd)
    else:
        os.chmod(name, mode, dir_fd=dst, follow_symlinks=False)


def _chown(dest: int | str, status: os.stat_result, dst: int | None = None) -> bool:
    """Give an open inode, or a name in the folder *dst*, its owners, or what a user may; False if not all of it."""
    follow = dst is None
    for uid, whole in ((status.st_uid, True), (-1, False)):
        try:
            os.chown(dest, uid, status.st_gid, dir_fd=dst, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):  # EINVAL: no such id in this user namespace
                raise
        else:
            return whole
    return False


if sys.platform == "linux":

    def _copy_xattrs(source: int | str, dest: int | str) -> bool:
        """Copy extended attributes, ACLs among them; True if there were any. A str is a path that ends in no link."""
        follow = isinstance(source, int)
        try:
            names = os.listxattr(source, follow_symlinks=follow)
        except OSError as error:
            _tolerate(error)
            return False
        for name in names:
            try:
                os.setxattr(dest, name, os.getxattr(source, name, follow_symlinks=follow), follow_symlinks=follow)
            except OSError as error:
                _tolerate(error)
        return bool(names)

    def drop_acls(dest: int | str) -> None:
        """Take away what a new inode inherited from a default ACL of the folder it was made in."""
        for name in ("system.posix_acl_access", "system.posix_acl_default"):
            try:
                os.removexattr(dest, name, follow_symlinks=isinstance(dest, int))
            except OSError as error:
                _tolerate(error)

    def _tolerate(error: OSError) -> None:
        """Not every user may set every attribute, nor has every file system all: kept as far as may be, like owners."""
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENODATA, errno.ENOENT):
            raise error

else:

    def _copy_xattrs(source: int | str, dest: int | str) -> bool:
        return False

    def drop_acls(dest: int | str) -> None:
        pass
