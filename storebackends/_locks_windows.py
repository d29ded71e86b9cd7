"""Locks on Windows: LockFileEx, which can share, as msvcrt.locking cannot. They belong to the open handle."""

from __future__ import annotations

import sys

assert sys.platform == "win32"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import ctypes  # noqa: E402
import msvcrt  # noqa: E402
import os  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from ctypes import wintypes  # noqa: E402

_FAIL_IMMEDIATELY, _EXCLUSIVE = 1, 2
_IO_PENDING, _LOCK_VIOLATION = 997, 33


class _Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", ctypes.c_void_p),
        ("internal_high", ctypes.c_void_p),
        ("offset", wintypes.DWORD),
        ("offset_high", wintypes.DWORD),
        ("event", wintypes.HANDLE),
    )


_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_lock, _unlock = _kernel32.LockFileEx, _kernel32.UnlockFileEx
# The handle, flags (to lock only), zero, the length's two halves, where.
_lock.argtypes = [wintypes.HANDLE] + [wintypes.DWORD] * 4 + [ctypes.POINTER(_Overlapped)]
_unlock.argtypes = [wintypes.HANDLE] + [wintypes.DWORD] * 3 + [ctypes.POINTER(_Overlapped)]
_lock.restype = _unlock.restype = wintypes.BOOL


def _at(offset: int) -> _Overlapped:
    return _Overlapped(offset=offset & 0xFFFFFFFF, offset_high=offset >> 32)


class LockFile:
    """LockFileEx on one byte for each id. The bytes are far beyond the files' end, so no read meets them."""

    per_id = False

    def open(self, path: str, shared: bool) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_BINARY | os.O_NOINHERIT, 0o600)

    def lock(self, fd: int, offset: int, exclusive: bool) -> bool:
        flags = _FAIL_IMMEDIATELY | (_EXCLUSIVE if exclusive else 0)
        if _lock(msvcrt.get_osfhandle(fd), flags, 0, 1, 0, ctypes.byref(_at(offset))):
            return True
        if (error := ctypes.get_last_error()) in (_IO_PENDING, _LOCK_VIOLATION):
            return False
        raise ctypes.WinError(error)

    def unlock(self, fd: int, offset: int) -> None:
        if not _unlock(msvcrt.get_osfhandle(fd), 0, 1, 0, ctypes.byref(_at(offset))):
            raise ctypes.WinError(ctypes.get_last_error())

    def holders(self, places: Sequence[tuple[str, int]]) -> list[str]:
        return []
