"""Mounting without a program: what backends do whose trees are mounted. Linux's; elsewhere all of it is NotSupported.

A mount made here is private: what a build mounts inside of it shows nowhere else. What is to be published is never
detached lazily: who still uses a mount that only seems gone could write into the published tree.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import Busy, NoSpace, NotSupported, StoreError

_RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_FLAGS = {
    "ro": _RDONLY,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1024,
    "bind": _BIND,
    "rbind": _BIND | _REC,
}
_DEFAULTS = frozenset(["rw", "defaults"])
_PAGE = 4095
"""What mount(2) takes of a file system's own options, in bytes."""
_STRING = 255
"""And fsconfig(2) of one of them."""
_DETACH, _NOFOLLOW = 2, 8
_NOTHING_THERE = (errno.EINVAL, errno.ENOENT)
_FOLDER = getattr(os, "O_PATH", 0) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_PATIENCE, _PAUSE = 100, 0.05
"""How often, and after how many seconds each, an unmount is tried again where something is in use."""

# The numbers of the newer calls are the same on all architectures.
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC, _SET_FLAG, _SET_STRING, _CREATE = 1, 0, 1, 6
_EMPTY_PATH, _AT_FDCWD = 4, -100


@dataclass(frozen=True, slots=True)
class MountPoint:
    """Something mounted, as the kernel lists it: *root* is what of the file system *device* is seen at *path*."""

    path: str
    device: str  # "major:minor"
    root: str
    kind: str
    source: str


def mount(kind: str, source: str, target: Path, options: Sequence[str] = ()) -> None:
    """Mount *source* on the folder *target*, with *options* as in fstab. Raises NotSupported, NoSpace or StoreError.

    Of an overlay any number of layers that the kernel takes is possible, also where their paths fill more than a page.
    """
    flags, data = 0, list[str]()
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option not in _DEFAULTS:
            data.append(option)
    with ExitStack() as undo:
        if kind == "overlay" and len(os.fsencode(",".join(data))) > _PAGE:
            _mount_by_parts(source, target, flags, data)
        else:
            _mount(source, target, kind, flags, ",".join(data))
        undo.callback(unmount, target)
        if flags & _BIND and flags & ~(_BIND | _REC):  # of a bind the rest is heeded only afterwards
            _mount(source, target, kind, (flags & ~_REC) | _REMOUNT, "")
        _mount("none", target, None, _PRIVATE | _REC, "")
        undo.pop_all()


def unmount(target: str | os.PathLike[str]) -> bool:
    """Undo all that is mounted on *target* and below, deepest first; False where nothing was.

    No link below it is followed. Raises Busy with the holders where something is in use; then it, and what it lies in,
    stays mounted, since whoever has it open could go on writing to it unseen.
    """
    point, done, number = os.fspath(target), False, 0
    for _ in range(_PATIENCE):
        while not (number := _umount(point)):
            done = True
        if number in _NOTHING_THERE and (done or not below(point)):
            return done
        if number not in (*_NOTHING_THERE, errno.EBUSY):
            break
        if not _unmount_inside(point):
            # A program that is just being started may still have a copy of what another thread had open there.
            threading.Event().wait(_PAUSE)
    if number not in (*_NOTHING_THERE, errno.EBUSY):
        raise _explained(f"unmount {point}", number)
    inner = [point, *(found.path for found in below(point))][-1]  # it may have become free just now
    held = list(holders(inner))
    raise Busy(inner, f"{', '.join(held) or 'a process that cannot be seen'} has it in use; end that", held)


def detach(target: str | os.PathLike[str]) -> None:
    """As unmount(), and at once, for what is thrown away: what is open there stays so until it is closed."""
    while not (number := _umount(os.fspath(target), _DETACH)):
        pass
    if number not in _NOTHING_THERE:
        raise _explained(f"unmount {target}", number)


def _unmount_inside(point: str) -> bool:
    """Unmount what is mounted below *point*, the deepest first; False where nothing could be."""
    top, done = os.path.realpath(point), False
    for path in sorted((found.path for found in below(top)), key=len, reverse=True):
        if path != top:
            with suppress(OSError):
                done |= _unmount_at(top, path.removeprefix(f"{top}/").split("/"))
    return done


def _unmount_at(point: str, names: Sequence[str]) -> bool:
    """Go down folder by folder: a build may put a link in the place of one, to have us unmount something else."""
    fd = os.open(point, _FOLDER)
    try:
        for name in names[:-1]:
            below = os.open(name, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = below
        return not _umount(f"/proc/self/fd/{fd}/{names[-1]}")
    finally:
        os.close(fd)


def below(folder: str | os.PathLike[str]) -> list[MountPoint]:
    """What is mounted on *folder* and below: each after what it lies on or in."""
    top = os.path.realpath(folder)
    return [point for point in mounted() if point.path == top or point.path.startswith(f"{top}/")]


def mounted() -> list[MountPoint]:
    """All mounts that this process sees, oldest first."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:  # not Linux
        return []
    return [_parse(line) for line in lines]


def _parse(line: str) -> MountPoint:
    before, _, after = line.partition(" - ")
    _, _, device, root, path, *_ = before.split(" ")
    kind, source, *_ = after.split(" ")
    return MountPoint(_plain(path), device, _plain(root), kind, _plain(source))


def _plain(text: str) -> str:
    # Blanks and the like are written as \040, byte by byte.
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def holders(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Who keeps *folder* from being unmounted, for a message; of other users' processes only root is told."""
    top = os.path.realpath(folder)
    device = _own_device(top)
    for pid in os.listdir("/proc") if os.path.isdir("/proc/self/fd") else ():
        if pid.isdecimal() and (held := _held(pid, top, device)):
            yield f"{_program(pid)}: {held}"


def _own_device(top: str) -> int | None:
    """What tells the files of what is mounted there from all others, by whatever path a process of another namespace
    has them; None where the file system is seen elsewhere, too.
    """
    table = mounted()
    devices = [found.device for found in table if found.path == top]
    shown = {found.path for found in table if found.device in devices[-1:]}
    return os.stat(top).st_dev if shown == {top} else None


def _held(pid: str, top: str, device: int | None) -> str:
    links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
    for kind in ("fd", "map_files"):
        with suppress(OSError):  # it ended, or is another user's
            links += [f"/proc/{pid}/{kind}/{name}" for name in os.listdir(f"/proc/{pid}/{kind}")]
    for link in links:
        with suppress(OSError):
            target = os.readlink(link)
            if target == top or target.startswith(f"{top}/") or (device and os.stat(link).st_dev == device):
                return target
    return ""


def _program(pid: str) -> str:
    if pid == str(os.getpid()):
        return "this process"
    try:
        return f"pid {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    except OSError:
        return f"pid {pid} (ended)"


# The system calls.


@functools.cache
def _libc() -> ctypes.CDLL:
    library: ctypes.CDLL | None = None
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
    if library is None:
        raise NotSupported("mounting", "only Linux mounts trees this way")
    return library


def _umount(point: str, flags: int = 0) -> int:
    """Undo the topmost mount on *point*; the number of the error, 0 if it was done."""
    if _libc().umount2(os.fsencode(point), flags | _NOFOLLOW) == 0:
        return 0
    return ctypes.get_errno()


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    if _libc().mount(*words, ctypes.c_ulong(flags), os.fsencode(data) or None) != 0:
        raise _explained(f"mount {kind or 'privately'} {source} on {target}", ctypes.get_errno())


def _mount_by_parts(source: str, target: Path, flags: int, data: Sequence[str]) -> None:
    """Mount an overlay option by option; Linux 6.5 and newer take its layers one at a time."""
    what = f"mount overlay on {target}"
    context = _call(what, _FSOPEN, b"overlay", _CLOEXEC)
    try:
        _configure(what, context, "source", source)
        for option in data:
            key, _, value = option.partition("=")
            # In a path a colon is escaped.
            layers = re.split(r"(?<!\\):", value) if key == "lowerdir" else [value]
            for layer in layers:
                _configure(what, context, "lowerdir+" if key == "lowerdir" else key, layer.replace("\\:", ":"))
        if flags & _RDONLY:
            _configure(what, context, "ro", "")
        _call(what, _FSCONFIG, context, _CREATE, None, None, 0, log=context)
        made = _call(what, _FSMOUNT, context, _CLOEXEC, flags & 15)  # these four have the same bits in both calls
    finally:
        os.close(context)
    try:
        _call(what, _MOVE_MOUNT, made, b"", _AT_FDCWD, os.fsencode(target), _EMPTY_PATH)
    finally:
        os.close(made)


def _configure(what: str, context: int, key: str, value: str) -> None:
    if not value:
        _call(what, _FSCONFIG, context, _SET_FLAG, key.encode(), None, 0, log=context)
        return
    with ExitStack() as opened:
        if len(os.fsencode(value)) > _STRING:
            folder = os.open(value, getattr(os, "O_PATH", 0))
            opened.callback(os.close, folder)
            value = f"/proc/self/fd/{folder}"
        _call(what, _FSCONFIG, context, _SET_STRING, key.encode(), os.fsencode(value), 0, log=context)


def _call(what: str, number: int, *arguments: int | bytes | None, log: int | None = None) -> int:
    # As long ones: the variadic syscall() would read an int's upper half from what lies about.
    given = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(_libc().syscall(ctypes.c_long(number), *given))
    if result < 0:
        raise _explained(what, ctypes.get_errno(), "" if log is None else _said(log))
    return result


def _said(context: int) -> str:
    """What the kernel complains of."""
    try:
        return os.read(context, 4096).decode(errors="replace").removeprefix("e ").strip()
    except OSError:
        return ""


def _explained(what: str, number: int, said: str = "") -> StoreError:
    reason = os.strerror(number) + (f" ({said})" if said else "")
    if number == errno.EPERM:
        return NotSupported(f"to {what}", reason, "run as root")
    if number in (errno.ENODEV, errno.ENOSYS):
        return NotSupported(f"to {what}", reason, "use a kernel that has that file system")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(what, reason)
    return StoreError(f"cannot {what}: {reason}; the kernel's log may tell more")
