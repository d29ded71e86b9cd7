"""A first base: a tree filled with a folder of this host, or with what a tar archive holds.

An archive is read once, from its first byte to its last, so it may come through a pipe. It is believed only if it is
whole: one that ends before its end mark, or whose checksums are wrong, fails the build that reads it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Self

from .errors import Cancelled, NotSupported, StoreError, explained
from .workspace import Workspace

if sys.platform != "win32":
    from ._importing_posix import Unpacker

_OPENERS: Mapping[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_LIMIT = 4 << 20  # of one extended header, which is read whole; a file's attributes are far below
_STRIDE = 5000  # members between two signs of life in the log


def fill(work: Workspace, source: Path) -> None:
    """Fill a build's empty tree with the folder or the archive *source*. Raises StoreError, for the build to fail."""
    if source.is_dir():
        work.log.write(f"copying {source}\n".encode(errors="surrogateescape"))
        work.copy_in(source, ".")
        return
    with explained("reading the archive", source), source.open("rb") as stream:
        unpack(work, stream, str(source))


def unpack(work: Workspace, stream: BufferedReader[Any], name: str) -> None:
    """Fill a build's empty tree with the tar archive that *stream* holds, plain or packed by gzip, bzip2 or xz.

    Kept: owners, devices and setuid bits as root, modes, times to the nanosecond, links and hard links, holes, and
    extended attributes as GNU tar and others write them. Raises StoreError for an archive that is damaged, or has a
    member that would lie outside the tree or below a link.
    """
    work.log.write(f"unpacking {name}\n".encode(errors="surrogateescape"))
    try:
        with (
            _unpacked(stream, name) as plain,
            tarfile.open(
                fileobj=plain, mode="r|", tarinfo=_Member, encoding="utf-8", errors="surrogateescape"
            ) as archive,
        ):
            _unpack(work, archive)
            while plain.read(1 << 20):  # what follows the end mark: the packer's checksum stands behind it
                pass
    except (tarfile.TarError, ValueError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise StoreError(f"{name} is damaged or cut short: {error}; get it again") from error


def _unpacked(stream: BufferedReader[Any], name: str) -> IO[bytes]:
    head = stream.peek(8)
    if head.startswith(_ZSTD):
        raise NotSupported(f"reading {name}", "it is packed by zstd", "unpack that first: zstd -dc ... | ... import -")
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    return opener(stream) if opener else stream


def _unpack(work: Workspace, archive: tarfile.TarFile) -> None:
    if sys.platform != "win32":
        with Unpacker(work.path, archive, work.log) as unpacker:
            count = 0
            while (member := archive.next()) is not None:
                if work.cancelled:
                    raise Cancelled(work.id, work.attempt)
                unpacker.add(member)
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                count += 1
                if count % _STRIDE == 0:
                    work.log.write(f"{count} members so far\n".encode())
            unpacker.finish()
        work.log.write(f"{count} members\n".encode())
    else:
        raise NotSupported("unpacking an archive", "Windows cannot keep what may be in it", "import a folder")


class _Member(tarfile.TarInfo):
    """A member whose broken header is an error, where tarfile takes one after the first for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise  # the end mark
            raise tarfile.ReadError(f"{error}, so it is no tar archive or not whole") from error
        if member.size < 0 or (member.type in _EXTENDED and member.size > _LIMIT):
            raise tarfile.ReadError(f"a header in it claims {member.size} bytes")
        return member
