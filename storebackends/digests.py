"""The digest of a tree: what a result was when it was published, to be compared with what the disk gives back later.

Digested are the names, types and modes of all that is in the tree, the contents of files, the targets of links and the
numbers of devices. Owners and times are not, nor what is mounted inside: only that something is.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import explained

if sys.platform == "win32":
    from ._trees_windows import _long, _walk

    _FLAGS = os.O_RDONLY | os.O_BINARY
else:
    import errno

    from ._trees_walk import FOLDER, Chain, open_same_mount

    _FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # it may have become a link or a pipe

Facts = tuple[object, ...]


def digest(tree: Path) -> str:
    """Read all of *tree*, following no link. Raises StoreError for what cannot be read."""
    result = hashlib.sha256()
    with explained(f"digesting {tree}", tree):
        for facts in _facts(tree):
            result.update(repr(facts).encode())
    return result.hexdigest()


if sys.platform == "win32":

    def _facts(tree: Path) -> Iterator[Facts]:
        for path, is_folder in sorted(_walk(_long(tree))):
            status = os.lstat(path)
            content = "" if is_folder else _content(path, status, None)
            yield os.path.relpath(path, _long(tree)), status.st_mode, content

else:

    def _facts(tree: Path) -> Iterator[Facts]:
        """Of each thing its depth, name, mode and content, a folder before what is in it, in one order everywhere."""
        start = os.open(tree, FOLDER)
        try:
            yield 0, b"", os.fstat(start).st_mode, ""
            with Chain(start, open_same_mount) as chain:
                todo = [_names(chain)]
                while todo:
                    if not todo[-1]:
                        todo.pop()
                        if todo:
                            chain.leave()
                        continue
                    name = todo[-1].pop()
                    status = os.stat(name, dir_fd=chain.fd, follow_symlinks=False)
                    content = ""
                    if not stat.S_ISDIR(status.st_mode):
                        content = _content(name, status, chain.fd)
                    elif _is_entered(chain, name):
                        todo.append(_names(chain))
                    else:
                        content = "mount"
                    yield len(chain.names), os.fsencode(name), status.st_mode, content
        finally:
            os.close(start)

    def _names(chain: Chain) -> list[str]:
        return sorted(os.listdir(chain.fd), reverse=True)

    def _is_entered(chain: Chain, name: str) -> bool:
        try:
            chain.enter(name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            raise
        return True


def _content(name: str, status: os.stat_result, folder: int | None) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(name, dir_fd=folder)
    if stat.S_ISREG(status.st_mode):
        with open(os.open(name, _FLAGS, dir_fd=folder), "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if sys.platform == "win32":
        return ""
    else:  # noqa: RET505 (or the type checker would take it for unreachable)
        return str(status.st_rdev)
