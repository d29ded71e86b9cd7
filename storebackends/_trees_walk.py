"""Going down a tree by open folders: the ground that copying and removing stand on. POSIX only."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Callable, Sequence

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NO_FOLDER = (errno.ENOTDIR, errno.ELOOP)  # what FOLDER says of a link, and of all else


def open_folder(name: str, parent: int) -> int:
    """Open the folder *name*; a link to one is ENOTDIR or ELOOP."""
    return os.open(name, FOLDER, dir_fd=parent)


class Chain:
    """A way down a tree: the open folder at its end, and the way back.

    Only the last KEEP folders hold a descriptor, so trees of any depth need few. Going up, a closed one is opened
    again as "..", and must be the one that was left: else the tree was moved under us, and ".." is anywhere.
    """

    KEEP = 16

    def __init__(self, start: int, opener: Callable[[str, int], int] = open_folder) -> None:
        """Begin at the folder *start*, which stays the caller's."""
        self._open = opener
        self._fds = [os.dup(start)]
        self._closed: list[tuple[int, int]] = []
        self.names: list[str] = []

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        while self._fds:
            os.close(self._fds.pop())

    @property
    def fd(self) -> int:
        """The folder at the end."""
        return self._fds[-1]

    def enter(self, name: str) -> None:
        """Go down into *name*."""
        self._fds.append(self._open(name, self.fd))
        self.names.append(name)
        if len(self._fds) > self.KEEP:
            self._closed.append(identity(os.fstat(self._fds[0])))
            os.close(self._fds.pop(0))

    def leave(self) -> str:
        """Go up, and return the name of the folder left."""
        os.close(self._fds.pop())
        if len(self._fds) == 1 and self._closed:
            # Now, not when it is needed: the folder we are in may lose its own search permission before.
            self._fds.insert(0, os.open("..", FOLDER, dir_fd=self._fds[0]))
            if identity(os.fstat(self._fds[0])) != self._closed.pop():
                raise OSError(errno.ESTALE, "a folder was moved while it was being walked")
        return self.names.pop()

    def locate(self, error: OSError, below: int = 0) -> None:
        """Have *error*, which knows a name at most, name the place: the way here, without its first *below* names."""
        name = [error.filename] if isinstance(error.filename, str) else []
        error.filename = "/".join([*self.names, *name][below:])


def identity(status: os.stat_result) -> tuple[int, int]:
    """What tells one inode from all others."""
    return status.st_dev, status.st_ino


def descend(root: int, names: Sequence[str], opener: Callable[[str, int], int] = open_folder) -> int:
    """Open the folder reached from *root* by *names*, one at a time and following no link."""
    fd = os.dup(root)
    for name in names:
        parent = fd
        try:
            fd = opener(name, parent)
        finally:
            os.close(parent)
    return fd


def open_same_mount(name: str, parent: int) -> int:
    """Open the folder *name*, or fail with EXDEV where something is mounted there."""
    if sys.platform == "linux" and _syscall is not None:
        fd: int = _syscall(_OPENAT2, parent, os.fsencode(name), ctypes.byref(_HOW), ctypes.sizeof(_HOW))
        if fd >= 0:
            return fd
        if (code := ctypes.get_errno()) not in (errno.ENOSYS, errno.EPERM):  # EPERM is what a seccomp filter may say
            raise OSError(code, os.strerror(code), name)
    return _open_same_device(name, parent)


def _open_same_device(name: str, parent: int) -> int:
    """As open_same_mount(), but blind to a folder of the same file system that is mounted a second time."""
    fd = open_folder(name, parent)
    if os.fstat(fd).st_dev != os.fstat(parent).st_dev:
        os.close(fd)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    return fd


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


# openat2(2), Linux 5.6. A comparison of devices does not see a bind mount, and `mount --bind /home tree/home` in a
# build would have us empty the real one. It has one number on all architectures but Alpha.
_OPENAT2 = 437
_HOW = _OpenHow(FOLDER, 0, 1)  # RESOLVE_NO_XDEV
_syscall = None
if sys.platform == "linux" and os.uname().machine != "alpha":
    _syscall = ctypes.CDLL(None, use_errno=True).syscall
    _syscall.restype = ctypes.c_long
    _syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]


def make_writable(name: str, parent: int) -> None:
    """chmod u+rwx a folder that may not even be opened, following no link."""
    if sys.platform == "linux":
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{fd}", stat.S_IRWXU)  # fchmod(2) refuses such a descriptor
        finally:
            os.close(fd)
    else:
        os.chmod(name, stat.S_IRWXU, dir_fd=parent, follow_symlinks=False)
