"""Where a step's commands run: on the host as it is, or in bubblewrap, with the tree at one fixed path.

A tree moves when it is published, so a path to it that a build wrote into it is dead afterwards. In bubblewrap the tree
is always at /build, which is where nothing else can be, and so what a build writes does not depend on where it ran:

    /            the host, read-only: all of it but the folders below
    /build       the tree
    /tmp         private, TMPDIR; HOME is in it
    /run         empty, but for the step's secrets
    /dev /proc   private; no process outside can be seen

This isolates builds from each other and from what they did not mean to touch. It keeps no secrets of the host from a
build: whatever its user can read, it can.

Nothing here starts a step. `bwrap` makes the argv; the workspace runs it, as it runs everything.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from . import process
from .errors import CommandFailed, NotSupported

Setting = Literal["auto", "bwrap", "host"]
Kind = Literal["bwrap", "host"]

TREE = "/build"
TMP = "/tmp"  # noqa: S108 (the build's own, inside)
SECRETS = "/run/secrets"

_OWN = frozenset(["build", "dev", "proc", "run", "tmp"])
# A build as root sets owners, and in a user namespace there would be only one. So root's gets none, and loses instead
# what reaches out of the sandbox: mounts, devices, modules, other processes.
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETFCAP", "SETGID", "SETUID", "SYS_CHROOT")


def choose(setting: Setting) -> Kind:
    """What *setting* comes to on this machine. Raises NotSupported where bubblewrap is asked for and does not work."""
    reason = "" if setting == "host" else why_not()
    if reason and setting == "bwrap":
        raise NotSupported("the bubblewrap sandbox", reason, 'make it work, or set sandbox = "host"')
    return "host" if reason or setting == "host" else "bwrap"


@functools.cache
def why_not() -> str:
    """Why bubblewrap is of no use on this machine; "" where it is. Tries it, once in a process."""
    if shutil.which("bwrap") is None:
        return "there is no program 'bwrap' (on Linux the package is called bubblewrap)"
    with tempfile.TemporaryDirectory() as folder:
        try:
            process.tool(bwrap(["true"], tree=Path(folder), tmp=Path(folder)), timeout=10)
        except CommandFailed as error:
            return str(error)
    return ""


def bwrap(
    argv: Sequence[str],
    *,
    tree: Path,
    tmp: Path,
    cwd: str = ".",
    network: bool = False,
    secrets: Path | None = None,
    caches: Mapping[str, Path] = MappingProxyType({}),
    show: Sequence[Path] = (),
    hide: Sequence[Path] = (),
) -> list[str]:
    """The argv that runs *argv* inside, with *tree* at /build and *tmp* at /tmp, both writable, in the folder *cwd*.

    *secrets* is a folder to see at /run/secrets, *caches* are writable folders by the absolute path to see each at:
    where the host has its root folder, it must have it. The folders *show* can be read at their own paths even where
    the sandbox has something of its own above them, and in the folders *hide* nothing can be seen.
    """
    words = ["--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid", "--unshare-uts"]
    words += ["--unshare-cgroup-try"] if network else ["--unshare-cgroup-try", "--unshare-net"]
    words += _host()
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "--bind", str(tmp), TMP, "--bind", str(tree), TREE]
    if network:
        words += _read_only(Path("/etc/resolv.conf"))
    for folder in show:
        words += _read_only(folder)
    for folder in hide:
        words += ["--tmpfs", os.path.realpath(folder), "--remount-ro", os.path.realpath(folder)]
    for path, folder in caches.items():
        words += ["--bind", str(folder), path]
    if secrets:
        words += ["--ro-bind", str(secrets), SECRETS]
    words += ["--remount-ro", "/", "--chdir", os.path.normpath(f"{TREE}/{cwd}")]
    if sys.platform != "win32" and os.geteuid() == 0:
        words += ["--cap-drop", "ALL", *(word for name in _CAPABILITIES for word in ("--cap-add", f"CAP_{name}"))]
    return [shutil.which("bwrap") or "bwrap", *words, "--", *argv]


def _host() -> Iterator[str]:
    """Mount what the host's root has. Not the root itself: in a read-only one there could be no new /build."""
    with os.scandir("/") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name in _OWN:
                continue
            if entry.is_symlink():
                yield from ("--symlink", os.readlink(entry.path), entry.path)
            else:
                yield from ("--ro-bind-try", entry.path, entry.path)


def _read_only(path: Path) -> list[str]:
    """Mount what a folder of the sandbox's own would cover; the rest of the host can be seen anyway."""
    real = os.path.realpath(path)
    return ["--ro-bind-try", real, real] if real.split(os.sep)[1] in _OWN else []
