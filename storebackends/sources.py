"""The files that a step copies: found without leaving their folder, digested, and copied in the same pass.

Digested is what a copy keeps: names, contents, the targets of links, and whether a file is executable. Owners, times
and the other bits of a mode differ between two checkouts of the same thing, so they count for nothing: the copies are
0755 or 0644, belong to whoever builds, and are all of one time.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import NoReturn

from .errors import StoreError, explained

if sys.platform == "win32":
    _FLAGS = os.O_RDONLY | os.O_BINARY
else:
    from ._trees_walk import FOLDER, descend

    _FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # it may have become a link or a pipe

_CHUNK = 1 << 20
_SCANNED = 256 << 20
_NAMED = 5


@dataclass(frozen=True, slots=True)
class _Found:
    """A file, folder or link: *name* in the open folder *parent*, or by path where folders cannot be opened."""

    relative: str
    name: str
    parent: int | None
    status: os.stat_result

    def link(self) -> str:
        return os.readlink(self.name, dir_fd=self.parent)

    def chunks(self) -> Iterator[bytes]:
        with open(os.open(self.name, _FLAGS, dir_fd=self.parent), "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def gather(top: Path, source: str, exclude: Sequence[str] = (), into: Path | None = None, time_ns: int = 0) -> str:
    """Return the digest of the file, folder or link *source* in the folder *top*.

    With *into*, a path where nothing is, it is copied there too, and the digest is that of the copy, whose files and
    folders are of the time *time_ns*. Raises StoreError for what is not there, can only be reached by a link that
    leaves *top*, or is neither file, folder nor link.
    """
    digest = hashlib.sha256()
    made: list[Path] = []
    with explained(f"copying {source!r} from {top}", into or top):
        for found in _walk(top, source, exclude):
            copy = into and into / found.relative
            digest.update(json.dumps([found.relative, *_take(found, copy)]).encode())
            if copy and not stat.S_ISLNK(found.status.st_mode):
                made.append(copy)
        for copy in reversed(made):  # a folder after what is in it
            os.utime(copy, ns=(time_ns, time_ns))
    return digest.hexdigest()


def naming(tree: Path, path: Path, since_ns: int) -> Sequence[str]:
    """The first five files and links in *tree* that are no older than *since_ns* and hold *path*, if there are any.

    For a warning: it reads 256 MiB at most, and passes over what it cannot read.
    """
    needle, left, names = os.fsencode(path), _SCANNED, list[str]()
    with suppress(OSError, StoreError, RecursionError):
        for found in _walk(tree, ".", ()):
            size, mode = found.status.st_size, found.status.st_mode
            if found.status.st_mtime_ns < since_ns or size > left or stat.S_ISDIR(mode):
                continue
            left -= size
            if needle in os.fsencode(found.link()) if stat.S_ISLNK(mode) else _holds(found, needle):
                names.append(found.relative)
            if len(names) == _NAMED:
                break
    return names


def _holds(found: _Found, needle: bytes) -> bool:
    tail = b""
    with suppress(OSError):
        for chunk in found.chunks():
            tail = tail[-len(needle) :] + chunk
            if needle in tail:
                return True
    return False


def _take(found: _Found, copy: Path | None) -> Iterable[str]:
    """Describe one of what is found, and copy it."""
    mode = found.status.st_mode
    if stat.S_ISDIR(mode):
        if copy:
            copy.mkdir()
            copy.chmod(0o755)
        return ["folder"]
    if stat.S_ISLNK(mode):
        target = found.link()
        if copy:
            os.symlink(target, copy)
        return ["link", target]
    if not stat.S_ISREG(mode):
        raise StoreError(f"{found.relative or found.name!r} is neither file, folder nor link; exclude it")
    executable = bool(mode & stat.S_IXUSR)
    return ["program" if executable else "file", _contents(found, copy, 0o755 if executable else 0o644)]


def _contents(found: _Found, copy: Path | None, mode: int) -> str:
    digest = hashlib.sha256()
    if copy is None:
        for chunk in found.chunks():
            digest.update(chunk)
    else:
        with copy.open("xb") as file:
            for chunk in found.chunks():
                digest.update(chunk)
                file.write(chunk)
        copy.chmod(mode)
    return digest.hexdigest()


def _walk(top: Path, source: str, exclude: Sequence[str]) -> Iterator[_Found]:
    """All of *source*, each folder before what is in it, in one order everywhere."""
    with _reached(top, source) as (name, parent):
        first = _Found("", name, parent, os.stat(name, dir_fd=parent, follow_symlinks=False))
        yield first
        if not stat.S_ISDIR(first.status.st_mode):
            return
        for folder, folders, files, fd in _folders(name, parent):
            names, below = sorted(folders + files), PurePath(folder).relative_to(name)
            folders.clear()  # to be filled with those to go down into: no links, nothing excluded
            for name_here in names:
                relative = (below / name_here).as_posix()
                if any(fnmatchcase(relative, pattern) or fnmatchcase(name_here, pattern) for pattern in exclude):
                    continue
                reach = name_here if fd is not None else os.path.join(folder, name_here)
                found = _Found(relative, reach, fd, os.stat(reach, dir_fd=fd, follow_symlinks=False))
                if stat.S_ISDIR(found.status.st_mode):
                    folders.append(name_here)
                yield found


def _folders(name: str, parent: int | None) -> Iterator[tuple[str, list[str], list[str], int | None]]:
    if sys.platform == "win32":
        for folder, folders, files in os.walk(name, onerror=_raise):
            yield folder, folders, files, None
    else:
        yield from os.fwalk(name, onerror=_raise, dir_fd=parent)


def _raise(error: OSError) -> NoReturn:
    raise error


@contextmanager
def _reached(top: Path, source: str) -> Iterator[tuple[str, int | None]]:
    """The last name of *source* and the open folder it is in. The way there may lead through links inside *top*."""
    root, path = os.path.realpath(top, strict=True), PurePath(source)
    folder = os.path.realpath(os.path.join(root, path.parent), strict=True)
    if os.path.commonpath([root, folder]) != root:
        raise StoreError(f"{source!r} leads out of {root} through a link; copy from inside it")
    if sys.platform == "win32":
        yield os.path.join(folder, path.name), None
    else:
        start = os.open(root, FOLDER)
        try:
            fd = descend(start, PurePath(folder).relative_to(root).parts)
        finally:
            os.close(start)
        try:
            yield path.name or ".", fd
        finally:
            os.close(fd)
