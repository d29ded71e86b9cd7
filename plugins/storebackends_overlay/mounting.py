"""Mounting overlays: system calls only, no program, no link followed.

By fsopen(2) and its kin, which take any number of layers, each as an open folder (Linux 6.13) or as a path (6.7).
Before that by mount(2), whose options have to fit on one page: so a layer is named by its descriptor, /proc/self/fd/N.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal

from storebackends.plugin import mounts

assert sys.platform == "linux", "overlayfs is a file system of Linux"  # noqa: S101 (tells the type checker, too)

Way = Literal["descriptors", "paths", "mount(2)"]

# Their numbers are those of all architectures but Alpha.
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC = 1  # of fsopen(2) and of fsmount(2)
_SET_FLAG, _SET_STRING, _SET_FD, _CREATE = 0, 1, 5, 6
_ATTR_RDONLY, _FROM_EMPTY_PATH, _AT_FDCWD = 1, 4, -100
_MS_RDONLY, _MS_PRIVATE = 1, 1 << 18
_PAGE = 4095
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def mount(
    point: str,
    layers: Sequence[str],
    upper: str | None = None,
    work: str | None = None,
    *,
    unprivileged: bool = False,
) -> None:
    """Mount *layers*, the topmost first, on the folder *point*: to be written to *upper*, or read-only without one.

    What is mounted inside of it later does not spread to other namespaces. Raises OSError; a FileNotFoundError names
    the folder that is missing.
    """
    if way() == "mount(2)":
        _mount_by_page(point, layers, upper, work, unprivileged)
    else:
        fd = _detached(layers, upper, work, unprivileged)
        try:
            _call("move_mount", _MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(point), _FROM_EMPTY_PATH)
        finally:
            os.close(fd)
    try:
        _mount(None, point, None, _MS_PRIVATE, None)
    except OSError:
        mounts.detach(point)
        raise


@contextmanager
def unseen(point: str, layers: Sequence[str], upper: str, work: str, *, unprivileged: bool) -> Iterator[str]:
    """A path to an overlay that is mounted nowhere, so that no kill can leave it; on *point* where that must be."""
    if way() == "mount(2)":
        _mount_by_page(point, layers, upper, work, unprivileged)
        try:
            yield point
        finally:
            mounts.detach(point)
    else:
        fd = _detached(layers, upper, work, unprivileged)
        try:
            yield _named(fd)
        finally:
            os.close(fd)


@functools.cache
def way() -> Way:
    """How this kernel takes layers, tried once."""
    with suppress(OSError), _open_context() as context, _opened("/") as root:
        with suppress(OSError):
            _set(context, _SET_FD, "lowerdir+", None, root)
            return "descriptors"
        _set(context, _SET_STRING, "lowerdir+", "/")
        return "paths"
    return "mount(2)"


def _options(writable: bool, unprivileged: bool) -> Mapping[str, str | None]:
    """What every overlay here is mounted with, whatever the kernel was built to prefer."""
    chosen: dict[str, str | None] = {"index": "off", "xino": "off"}
    if unprivileged:
        chosen["userxattr"] = None  # it excludes the two below
    else:
        chosen |= {"metacopy": "off", "redirect_dir": "on" if writable else "follow"}
    if writable:
        chosen["volatile"] = None  # else to unmount it is to sync the whole file system below
    return chosen


def _detached(layers: Sequence[str], upper: str | None, work: str | None, unprivileged: bool) -> int:
    """The descriptor of a new mount that is attached nowhere."""
    with _open_context() as context:
        try:
            _set(context, _SET_STRING, "source", "storebackends")
            for key, path in _folders("lowerdir+", layers, upper, work):
                folder = os.open(path, _FOLDER)  # one at a time: a process may not have hundreds open
                try:
                    if way() == "descriptors":
                        _set(context, _SET_FD, key, None, folder)
                    else:
                        _set(context, _SET_STRING, key, _named(folder))
                finally:
                    os.close(folder)
            for key, value in _options(upper is not None, unprivileged).items():
                _set(context, _SET_FLAG if value is None else _SET_STRING, key, value)
            _call("mounting an overlay", _FSCONFIG, context, _CREATE, None, None, 0)
            return _call("fsmount", _FSMOUNT, context, _CLOEXEC, 0 if upper else _ATTR_RDONLY)
        except OSError as error:
            if error.filename is None and (said := _said(context)):
                raise OSError(error.errno, f"{error.strerror} ({said})") from error
            raise


def _mount_by_page(point: str, layers: Sequence[str], upper: str | None, work: str | None, unprivileged: bool) -> None:
    with ExitStack() as held:
        named = [
            (key, _named(held.enter_context(_opened(path)))) for key, path in _folders("lowerdir", layers, upper, work)
        ]
        words = ["lowerdir=" + ":".join(name for key, name in named if key == "lowerdir")]
        words += [f"{key}={name}" for key, name in named if key != "lowerdir"]
        chosen = _options(upper is not None, unprivileged)
        words += [key if value is None else f"{key}={value}" for key, value in chosen.items()]
        page = ",".join(words)
        if len(page) > _PAGE:
            raise OSError(
                errno.E2BIG, f"{len(layers)} layers are too many for this kernel; choose a lower depth", point
            )
        _mount("storebackends", point, "overlay", 0 if upper else _MS_RDONLY, page)


def _folders(lower: str, layers: Sequence[str], upper: str | None, work: str | None) -> Iterator[tuple[str, str]]:
    """Each folder, with the name of the option that it is given by."""
    yield from ((lower, layer) for layer in layers)
    if upper is not None and work is not None:
        yield from (("upperdir", upper), ("workdir", work))


# The system calls.


@contextmanager
def _open_context() -> Iterator[int]:
    """What an overlay is put together in."""
    fd = _call("fsopen", _FSOPEN, b"overlay", _CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _opened(folder: str) -> Iterator[int]:
    fd = os.open(folder, _FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


def _named(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _set(context: int, kind: int, key: str, value: str | None, fd: int = 0) -> None:
    _call(f"the option {key}", _FSCONFIG, context, kind, key.encode(), None if value is None else value.encode(), fd)


def _said(context: int) -> str:
    """What the kernel says of a failure beside its number."""
    with suppress(OSError):
        return os.read(context, 4096).decode(errors="replace").partition(" ")[2].strip()
    return ""


def _call(what: str, number: int, *arguments: int | bytes | None) -> int:
    # As long ones: the variadic syscall() would read an int's upper half from what lies about.
    given = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _mount(source: str | None, point: str, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, point, kind, data)]
    if _libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), point)
