r"""Trees by path, for Windows: see `trees` for what each function promises.

There are no calls relative to an open folder here, so a tree that is changed while it is walked is not defended
against. Links and junctions are still never followed, and ``\\?\`` lifts the limit of 260 characters from paths.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from . import renames
from .backend import Capability, Usage
from .errors import NotSupported


def copy(source: Path, dest: Path, reflink: Literal["auto", "always", "never"]) -> None:
    if reflink == "always":
        raise NotSupported("a copy that shares blocks", "Windows offers none to us", 'set reflink = "auto"')
    _check_empty(dest)
    _Copier().tree(_long(source), _long(dest))


def link(source: Path, dest: Path) -> None:
    _check_empty(dest)
    _Copier(linking=True).tree(_long(source), _long(dest))


def copy_into(source: Path, root: Path, parts: Sequence[str]) -> None:
    dest = _descend(_long(root), parts[:-1], make=True)
    if parts:
        dest = os.path.join(dest, parts[-1])
    if _is_folder(os.lstat(_long(source))):
        _Copier(merge=True).tree(_long(source), dest)
    else:
        _Copier(merge=True).file(_long(source), dest)


def check_folder(root: Path, parts: Sequence[str]) -> None:
    _descend(_long(root), parts, make=False)


def size(path: Path) -> int:
    total, seen = 0, set[tuple[int, int]]()
    for name, is_folder in _walk(_long(path)):
        status = os.lstat(name)
        if not is_folder and (status.st_dev, status.st_ino) not in seen:
            total += status.st_size
            seen.add((status.st_dev, status.st_ino))
    return total


def usage(path: Path) -> Usage:
    disk = shutil.disk_usage(path)
    return Usage(disk.total, disk.free)


def remove(path: Path) -> None:
    if not os.path.lexists(_long(path)):
        return
    if not _is_folder(os.lstat(_long(path))):
        _forced(os.unlink, _long(path))
        return
    folders = [_long(path)]
    for name, is_folder in _walk(_long(path)):
        if is_folder:
            folders.append(name)
        else:
            _forced(os.unlink, name)  # of a junction or a link to a folder too
    for name in reversed(folders):
        _forced(os.rmdir, name)


def _forced(verb: Callable[[str], None], name: str) -> None:
    try:
        verb(name)
    except FileNotFoundError:
        pass
    except PermissionError:
        os.chmod(name, stat.S_IREAD | stat.S_IWRITE)  # the read-only attribute forbids removal here
        renames.patiently(verb)(name)


def _walk(top: str) -> Iterator[tuple[str, bool]]:
    """All paths below *top*, each folder before what is in it, and whether it is a folder."""
    todo = [top]
    while todo:
        with os.scandir(todo.pop()) as entries:
            found = [(entry.path, _is_folder(entry.stat(follow_symlinks=False))) for entry in entries]
        yield from found
        todo += [path for path, is_folder in found if is_folder]


class _Copier:
    def __init__(self, *, merge: bool = False, linking: bool = False) -> None:
        self._merge, self._linking = merge, linking
        self._firsts: dict[tuple[int, int], str] = {}

    def tree(self, source: str, dest: str) -> None:
        if os.path.commonpath([source]) == os.path.commonpath([source, dest]):
            raise OSError(errno.ELOOP, "the copy would lie inside of what it copies", source)
        folders = [(source, dest)]
        self._mkdir(dest)
        for name, is_folder in _walk(source):
            target = os.path.join(dest, os.path.relpath(name, source))
            if is_folder:
                folders.append((name, target))
                self._mkdir(target)
            else:
                self.file(name, target)
        for name, target in reversed(folders):
            shutil.copystat(name, target)

    def file(self, source: str, target: str) -> None:
        if self._merge and os.path.lexists(target):
            if _is_folder(os.lstat(target)):
                raise IsADirectoryError(errno.EISDIR, "a folder is where a file is to be", target)
            _forced(os.unlink, target)
        status = os.lstat(source)
        first = source if self._linking else self._firsts.setdefault((status.st_dev, status.st_ino), target)
        if first != target and (self._linking or status.st_nlink > 1):
            os.link(first, target, follow_symlinks=False)
        else:
            shutil.copy2(source, target, follow_symlinks=False)

    def _mkdir(self, path: str) -> None:
        if not os.path.lexists(path):
            os.mkdir(path)
        elif not _is_folder(os.lstat(path)):
            raise NotADirectoryError(errno.ENOTDIR, "a link or a file is where a folder is needed", path)


def _descend(root: str, parts: Sequence[str], make: bool) -> str:
    for part in parts:
        root = os.path.join(root, part)
        if make and not os.path.lexists(root):
            os.mkdir(root)
        if not _is_folder(os.lstat(root)):
            raise NotADirectoryError(errno.ENOTDIR, "it is a link or a file where a folder is needed", root)
    return root


def _check_empty(dest: Path) -> None:
    if os.path.lexists(dest) and os.listdir(_long(dest)):
        raise OSError(errno.ENOTEMPTY, "it is not empty", str(dest))


if sys.platform == "win32":

    def _is_folder(status: os.stat_result) -> bool:
        # A junction claims to be a folder, and leads anywhere.
        return stat.S_ISDIR(status.st_mode) and not status.st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT

    def _long(path: Path) -> str:
        absolute = os.path.abspath(path)
        if absolute.startswith("\\\\?\\"):
            return absolute
        return "\\\\?\\UNC" + absolute[1:] if absolute.startswith("\\\\") else "\\\\?\\" + absolute

else:

    def _is_folder(status: os.stat_result) -> bool:
        return stat.S_ISDIR(status.st_mode)

    def _long(path: Path) -> str:
        return os.path.abspath(path)


# What a copy by path keeps, and how to find out, given a new file; see trees.capabilities().
TRIALS: dict[Capability, Callable[[str], object]] = {
    Capability.SYMLINKS: lambda file: os.symlink("x", file + "~"),
    Capability.HARDLINKS: lambda file: os.link(file, file + "~"),
}
