"""Locks on POSIX. Both kinds belong to the open file, not to the process: threads exclude each other too."""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

import contextlib  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import os  # noqa: E402
import struct  # noqa: E402
from collections.abc import Sequence  # noqa: E402


def _open(path: str, shared: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS or not shared:
            raise
    return os.open(path, os.O_RDONLY | flags)  # enough to lease what is there


class WholeFile:
    """flock(2), which knows no ranges: a file for each id, never removed, since a waiter may have it open."""

    per_id = True
    open = staticmethod(_open)

    def lock(self, fd: int, offset: int, exclusive: bool) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
        except BlockingIOError:
            return False
        return True

    def unlock(self, fd: int, offset: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def holders(self, places: Sequence[tuple[str, int]]) -> list[str]:
        return []


if sys.platform == "linux":
    # struct flock: type, whence, start, length, pid (0 for this kind of lock), padded as C pads it.
    _FLOCK = struct.Struct("@hhqqi0q")

    class ByteRange:
        """Linux's open-file-description locks, on one byte for each id."""

        per_id = False
        open = staticmethod(_open)

        def lock(self, fd: int, offset: int, exclusive: bool) -> bool:
            kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return False
                raise
            return True

        def unlock(self, fd: int, offset: int) -> None:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))

        def holders(self, places: Sequence[tuple[str, int]]) -> list[str]:
            # The kernel names no owner for these locks, but /proc lists them with each descriptor.
            sought = {}
            for path, offset in places:
                with contextlib.suppress(OSError):
                    status = os.stat(path)
                    sought[f":{status.st_ino} {offset} {offset}".encode()] = status
            return [_name(pid) for pid in _numbers("/proc") if sought and _holds(pid, sought)]

    def _numbers(folder: str) -> list[str]:
        with contextlib.suppress(OSError):
            return [name for name in os.listdir(folder) if name.isdecimal()]
        return []

    def _read(path: str) -> bytes:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return file.read()
        return b""

    def _holds(pid: str, sought: dict[bytes, os.stat_result]) -> bool:
        for fd in _numbers(f"/proc/{pid}/fdinfo"):
            for line in _read(f"/proc/{pid}/fdinfo/{fd}").splitlines():
                where = next((end for end in sought if line.startswith(b"lock:") and line.endswith(end)), None)
                with contextlib.suppress(OSError):
                    # The line's device is not always the one stat() gives (btrfs): compare the open file itself.
                    if where and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), sought[where]):
                        return True
        return False

    def _name(pid: str) -> str:
        if pid == str(os.getpid()):
            return "this process"
        program = _read(f"/proc/{pid}/cmdline").split(b"\0")[0] or _read(f"/proc/{pid}/comm").strip()
        return f"pid {pid} ({program.decode(errors='replace')})"
