"""Unpacking a tar archive, whoever made it, into one folder. POSIX only.

Every name is walked from the folder by open folders, and no link is followed: a link may point anywhere, but nothing
is put below or through one. Folders get their metadata last, when nothing is made in them any more.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

import errno  # noqa: E402
import os  # noqa: E402
import stat  # noqa: E402
import tarfile  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from decimal import Decimal, InvalidOperation  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ._trees_walk import FOLDER, NO_FOLDER, descend, open_folder  # noqa: E402
from .errors import NotSupported, StoreError, explained  # noqa: E402
from .log import BuildLog  # noqa: E402

_CHUNK = 1 << 20
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_XATTR = "SCHILY.xattr."
# Not every user may set every owner and attribute, and not every file system has them: kept as far as may be.
_NOT_KEPT = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP)


class Unpacker:
    """Puts the members of one archive into the folder *root*, in their order; later ones replace earlier ones."""

    def __init__(self, root: Path, archive: tarfile.TarFile, log: BuildLog) -> None:
        self._root, self._archive, self._log = root, archive, log
        self._folders: dict[tuple[str, ...], tarfile.TarInfo] = {}
        self._held = ExitStack()

    def __enter__(self) -> Unpacker:
        self._fd = os.open(self._root, FOLDER)
        self._held.callback(os.close, self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, member: tarfile.TarInfo) -> None:
        """Unpack one member. Raises StoreError, NoSpace among them, for one that cannot or may not be."""
        way = _way(member.name)
        with explained(f"unpacking {member.name!r}", self._root):
            if not way and not member.isdir():
                raise StoreError(f"the archive's member {member.name!r} would replace the tree itself")
            parent = self._open(way[:-1], member.name)
            try:
                self._make(member, way, parent)
            finally:
                os.close(parent)

    def finish(self) -> None:
        """Give the folders their metadata, those inside others first."""
        for way in sorted(self._folders, key=len, reverse=True):
            member = self._folders[way]
            with explained(f"unpacking {member.name!r}", self._root):
                parent = self._open(way[:-1], member.name)
                try:
                    self._keep(member, way[-1] if way else ".", parent)
                finally:
                    os.close(parent)

    def _open(self, way: Sequence[str], name: str) -> int:
        """Open the folder at *way*, making it where it is missing: archives need not list the parents."""
        try:
            return descend(self._fd, way, _open_or_make)
        except OSError as error:
            if error.errno not in NO_FOLDER:
                raise
            raise StoreError(f"the archive's member {name!r} lies below a link or a file; it is refused") from error

    def _make(self, member: tarfile.TarInfo, way: tuple[str, ...], parent: int) -> None:
        name = way[-1] if way else "."
        if member.isdir():
            if way:
                _mkdir(name, parent)
            self._folders[way] = member
        elif member.islnk():
            self._link(member, name, parent)
        else:
            _replacing(lambda: self._create(member, name, parent), name, parent)
            self._keep(member, name, parent)

    def _create(self, member: tarfile.TarInfo, name: str, parent: int) -> None:
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.isreg():
            self._write(member, os.open(name, _CREATE, 0o600, dir_fd=parent))
        elif member.isfifo():
            os.mkfifo(name, 0o600, dir_fd=parent)
        elif member.isdev():
            _mknod(member, name, parent)
        else:
            raise StoreError(f"the archive's member {member.name!r} is of the unknown type {member.type!r}")

    def _write(self, member: tarfile.TarInfo, fd: int) -> None:
        # Not by extractfile(): it would have us read the holes of a sparse member, whose size is only claimed.
        pieces: Any = member.sparse
        source: Any = self._archive.fileobj
        with open(fd, "wb", buffering=0) as file:
            source.seek(member.offset_data)
            for offset, size in [(0, member.size)] if pieces is None else pieces:
                file.seek(offset)
                while size > 0:
                    chunk = source.read(min(size, _CHUNK))
                    if not chunk:
                        raise tarfile.ReadError(f"it ends within {member.name!r}")
                    size -= file.write(chunk)
            file.truncate(member.size)

    def _link(self, member: tarfile.TarInfo, name: str, parent: int) -> None:
        way = _way(member.linkname)
        first = self._open(way[:-1], member.linkname)
        try:
            _replacing(
                lambda: os.link(way[-1], name, src_dir_fd=first, dst_dir_fd=parent, follow_symlinks=False), name, parent
            )
        except (FileNotFoundError, IndexError) as error:
            reason = f"{member.linkname!r}, which no member before it is"
            raise StoreError(f"the archive's member {member.name!r} is a hard link to {reason}") from error
        finally:
            os.close(first)

    def _keep(self, member: tarfile.TarInfo, name: str, parent: int) -> None:
        """Owner, attributes, mode, times: chown(2) clears setuid, an ACL rewrites the mode, and all touch the times.

        By name: nothing but this runs in the tree, and none of it is open to other users.
        """
        mode = stat.S_IMODE(member.mode)
        try:
            os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NOT_KEPT:
                raise
            mode &= ~(stat.S_ISUID | stat.S_ISGID)  # they are the owner's
        self._set_xattrs(member, name, parent)
        if not member.issym():
            os.chmod(name, mode, dir_fd=parent)
        modified = _ns(member)
        os.utime(name, ns=(modified, modified), dir_fd=parent, follow_symlinks=False)

    def _set_xattrs(self, member: tarfile.TarInfo, name: str, parent: int) -> None:
        if sys.platform == "linux":
            for attribute, data in _xattrs(member):
                try:
                    os.setxattr(f"/proc/self/fd/{parent}/{name}", attribute, data, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in _NOT_KEPT:
                        raise
                    self._log.write(f"{member.name!r}: {attribute!r} was not kept: {error.strerror}\n".encode())


def _xattrs(member: tarfile.TarInfo) -> Iterator[tuple[str, bytes]]:
    for key, value in member.pax_headers.items():
        if key.startswith(_XATTR):
            yield key.removeprefix(_XATTR), value.encode(errors="surrogateescape")


def _way(name: str) -> tuple[str, ...]:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise StoreError(f"the archive names {name!r}, which is not inside of it; make one of relative names")
    return tuple(part for part in parts if part not in ("", "."))


def _open_or_make(name: str, parent: int) -> int:
    try:
        return open_folder(name, parent)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=parent)
        fd = open_folder(name, parent)
        os.fchmod(fd, 0o755)  # whatever the umask is
        return fd


def _mkdir(name: str, parent: int) -> None:
    try:
        os.close(open_folder(name, parent))
    except FileNotFoundError:
        os.mkdir(name, 0o700, dir_fd=parent)
    except OSError as error:
        if error.errno not in NO_FOLDER:
            raise
        os.unlink(name, dir_fd=parent)
        os.mkdir(name, 0o700, dir_fd=parent)


def _replacing(create: Callable[[], None], name: str, parent: int) -> None:
    try:
        create()
    except FileExistsError:
        os.unlink(name, dir_fd=parent)  # a new file, never the old one written to: it may have other names
        create()


def _mknod(member: tarfile.TarInfo, name: str, parent: int) -> None:
    kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
    try:
        os.mknod(name, kind | 0o600, os.makedev(member.devmajor, member.devminor), dir_fd=parent)
    except PermissionError as error:
        raise NotSupported(
            f"making the device node {member.name!r}", "this user may not", "import as root, or leave it out"
        ) from error


def _ns(member: tarfile.TarInfo) -> int:
    """The time in nanoseconds. The header has whole seconds, and tarfile makes a float of a pax record's."""
    try:
        return int(Decimal(member.pax_headers.get("mtime", str(member.mtime))) * 10**9)
    except (InvalidOperation, ValueError, OverflowError):
        return int(member.mtime) * 10**9
