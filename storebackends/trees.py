"""Copying, linking and removing plain trees, whatever is in them.

A build's tree is hostile until proved otherwise: folders that become links while they are walked, devices, pipes that
would block a reader, names that are not text, paths longer than any path may be. So a tree is walked by open folders
and never by path, and no link in it is followed (`_trees_posix`). Windows has no such calls and goes by path
(`_trees_windows`).

Every function raises StoreError with the OSError as its cause, or NoSpace where a disk or a quota is full.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from .backend import Capability, Usage
from .errors import NoSpace, StoreError

if sys.platform == "win32":
    from . import _trees_windows as _native
else:
    from . import _trees_posix as _native

Reflink = Literal["auto", "always", "never"]
T = TypeVar("T")
_TRIES = 100


def copy(source: Path, dest: Path, *, reflink: Reflink = "auto") -> None:
    """Make *dest*, which must not exist or be an empty folder, equal to the tree *source*.

    Kept: owners (all as root, else as far as the user may), modes with setuid, setgid and sticky, times to the
    nanosecond, links as they are, hard links within the tree, holes, extended attributes with ACLs and capabilities,
    pipes, and device nodes (as root). A setuid or setgid bit goes where its owner could not be kept. Sockets are left
    out: without their process they mean nothing.

    *reflink* "auto" shares blocks where the file systems can, "always" raises NotSupported where they cannot, "never"
    makes blocks of its own. On failure the half-filled *dest* stays, for the caller to remove.
    """
    with _explained("copy", source):
        _native.copy(source, dest, reflink)


def link(source: Path, dest: Path) -> None:
    """Make *dest* a tree of new folders, like those of *source*, that hold hard links to all else in it.

    Whoever writes to a file in place through one tree changes the other. What the file system does not let be linked
    (too many links, or a file of another user) is copied. *dest* is as for copy().
    """
    with _explained("link", source):
        _native.link(source, dest)


def copy_into(source: Path, root: Path, dest: str) -> None:
    """Copy a file, link or folder of this host to the relative path *dest* in the tree *root*, as copy() does.

    Missing parents are made (0755). A folder merges into a folder, whose metadata becomes the source's; what else
    meets is replaced by a new file, never written in place: the old one may be a hard link shared with a base. A
    folder and something else in one place is an error. No link inside *root* is followed: one among the parents is an
    error, as is a *dest* that is absolute, empty or holds "..".
    """
    parts = _inside(dest)
    with _explained(f"copy {source} to {dest!r} in", root):
        _native.copy_into(source, root, parts)


def remove(path: Path) -> None:
    """Remove a tree. Missing is fine, and so is another remover at work in it.

    Follows no link and changes the mode of folders only: files may be linked from elsewhere. A mount inside is an
    error that names it, and nothing below it is touched; so is a process that adds files as fast as they go.
    """
    with _explained("remove", path):
        _native.remove(path)


def size(path: Path) -> int:
    """The bytes that the tree occupies: allocated blocks, each inode counted once however many names it has here."""
    with _explained("measure", path):
        return _native.size(path)


def resolve_inside(root: Path, relative: str) -> Path:
    """Return root/relative if it is a folder reached through folders alone; raises StoreError at a link or a file.

    True at the time of asking: what runs in the tree may change it.
    """
    parts = _inside(relative)
    with _explained(f"enter {relative!r} in", root):
        _native.check_folder(root, parts)
    return root.joinpath(*parts)


def create(path: Path) -> None:
    """Make an empty tree: a folder with mode 0755, whatever the umask."""
    with _explained("create", path):
        os.mkdir(path)
        os.chmod(path, 0o755)  # noqa: S103 (a system's root folder is like that)


def capabilities(folder: Path) -> frozenset[Capability]:
    """What copy() keeps on the file system of *folder* for this user: tried there, in a temporary folder."""

    def trials(scratch: str) -> frozenset[Capability]:
        found = {Capability.HOST_TREE, Capability.DETACHED, Capability.LINKED}
        for capability, trial in _native.TRIALS.items():
            file = os.path.join(scratch, capability)
            with suppress(OSError), open(file, "xb"):
                if trial(file) is not False:
                    found.add(capability)
        return frozenset(found)

    return _tried_out(folder, trials)


def check_reflink(folder: Path) -> None:
    """Raise NotSupported where two files in *folder* cannot share blocks; tried there, in a temporary folder."""

    def trial(scratch: str) -> None:
        source = Path(scratch, "source")
        source.mkdir()
        Path(source, "file").write_bytes(b"x")
        copy(source, Path(scratch, "copy"), reflink="always")

    _tried_out(folder, trial)


def usage(path: Path) -> Usage:
    """Space on the file system of *path*; free is what an unprivileged user may still take."""
    return _native.usage(path)


def _tried_out(folder: Path, trial: Callable[[str], T]) -> T:
    """What *trial* says of a temporary folder in *folder*; asked again if another process swept that away meanwhile."""
    with _explained("try out", folder):
        for _ in range(_TRIES):
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                try:
                    found = trial(scratch)
                except (OSError, StoreError):
                    if os.path.isdir(scratch):
                        raise
                else:
                    if os.path.isdir(scratch):
                        return found
    raise StoreError(f"cannot try out {folder}: what is made there vanishes; is something else cleaning this folder?")


def _inside(relative: str) -> list[str]:
    """The parts of a relative path that goes nowhere but down; none for "." itself."""
    parts = (relative.replace("\\", "/") if sys.platform == "win32" else relative).split("/")
    drive = os.path.splitdrive(relative)[0]
    if not relative or not parts[0] or drive or ".." in parts or "\0" in relative:
        raise StoreError(f"{relative!r} is no path inside a tree; give a relative one without '..'")
    return [part for part in parts if part not in ("", ".")]


class _explained:  # noqa: N801 (as errors.explained, and for its reason)
    def __init__(self, verb: str, path: Path) -> None:
        self._verb, self._path = verb, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(str(self._path), error.strerror or str(error)) from error
        where = ""
        if isinstance(error.filename, str) and error.filename:  # names in a tree hold anything, at any length
            where = f" at {'...' * (len(error.filename) > 200)}{error.filename[-200:]!r}"
        raise StoreError(f"cannot {self._verb} {self._path}{where}: {error.strerror or error}") from error
