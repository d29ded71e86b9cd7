"""The commands `zfs` and `zpool`: how they are started, and what their complaints mean.

What they say is the only interface that all platforms share, and `tool` has them say it in English.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from storebackends.plugin import Busy, CommandFailed, Finished, NoSpace, NotSupported, StoreError, tool

T = TypeVar("T")

_UUID, _ATTEMPT = 36, 16
LONGEST_DATASET = 255 - len("/storebackends-/@dropped-") - _UUID - 2 * _ATTEMPT
"""ZFS ends names at 255 characters, and counts those of a snapshot."""
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between tries at what is busy: what a killed command or a scanner holds is free again within moments."""
# The programs lie where users' PATHs often do not lead.
_SBIN = ("/usr/sbin", "/sbin", "/usr/local/zfs/bin", "/usr/local/sbin")
_FULL = re.compile(r"out of space|quota exceeded|no space left", re.IGNORECASE)
_MISSING = re.compile(r"does not exist|no such pool", re.IGNORECASE)
_BUSY = re.compile(r"is busy|resource busy", re.IGNORECASE)


def run(
    argv: Sequence[str], *, timeout: float = 600, ok: Container[int] = (0,), stdin: IO[bytes] | None = None
) -> Finished:
    """Start one of the commands, or sudo."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    return tool(argv, timeout=timeout, ok=ok, env={"PATH": path}, input=stdin)


@contextmanager
def claimed(record: Path) -> Iterator[IO[bytes]]:
    """Lock the *record* of a dataset, once nobody else has it; what is started with the file as its input has it too.

    A process that is killed leaves its command running, and what that makes may come after everybody has looked for it.
    So the command that makes a dataset holds its record, and who removes the dataset waits for it.
    """
    with record.open("rb") as file:
        _flock(file, "LOCK_EX")
        try:
            yield file
        finally:  # not by closing: a child on its way to exec may have a copy of the descriptor
            _flock(file, "LOCK_UN")


def _flock(file: IO[bytes], operation: str) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, getattr(fcntl, operation))


def may_mount() -> bool:
    """May this user mount? Linux lets root alone, whatever `zfs allow` says; elsewhere ZFS itself tells."""
    return platform.system() != "Linux" or is_root()


def is_root() -> bool:
    """Is this root, or a platform that has none?"""
    return not hasattr(os, "geteuid") or os.geteuid() == 0


def is_missing(error: CommandFailed) -> bool:
    """Did it fail since there is no such dataset, snapshot or pool?"""
    return bool(_MISSING.search(error.stderr))


def has_clones(error: CommandFailed) -> bool:
    """Did it fail since something was cloned from it?"""
    return "has dependent clones" in error.stderr


class Zfs:
    """The commands, by sudo where that is asked for."""

    def __init__(self, sudo: bool) -> None:
        self.sudo = sudo

    def __call__(self, *arguments: str, record: IO[bytes] | None = None) -> None:
        """Change something: `zfs ARGUMENTS`, by sudo if need be. Raises CommandFailed, NoSpace or NotSupported.

        What makes a dataset gets its *record*, as claimed() gave it.
        """
        # A copy, since what is handed over is closed in the end.
        self.run("zfs", *arguments, stdin=record and os.fdopen(os.dup(record.fileno()), "rb"))

    def prefixed(self, *argv: str) -> list[str]:
        """A command that takes root's rights."""
        return ["sudo", "-n", *argv] if self.sudo else [*argv]

    def run(self, *argv: str, stdin: IO[bytes] | None = None) -> None:
        """Start a command that takes root's rights."""
        try:
            run(self.prefixed(*argv), stdin=stdin)
        except CommandFailed as error:
            if self.sudo and error.stderr.startswith("sudo:"):
                fix = f"allow this user to run {argv[0]} as root without a password, in sudoers"
                raise NotSupported(f"sudo -n {argv[0]}", error.stderr.strip(), fix) from error
            if _FULL.search(error.stderr):
                raise NoSpace(argv[-1], error.stderr.strip()) from error
            raise

    def rows(self, *names: str, properties: Sequence[str], options: Sequence[str] = ()) -> dict[str, list[str]]:
        """Look up the values of *properties*, sizes in bytes, by dataset. What is missing is left out."""
        columns = ",".join(["name", *properties])
        listed = run(["zfs", "list", "-H", "-p", *options, "-o", columns, *names], ok=(0, 1))
        complaints = listed.stderr.decode(errors="replace").strip()
        if listed.returncode and not all(map(_MISSING.search, complaints.splitlines())):
            raise CommandFailed(["zfs", "list"], listed.returncode, "failed", complaints)
        split = (line.split("\t") for line in listed.stdout.decode(errors="replace").splitlines())
        return {name: values for name, *values in split}

    def patiently(self, act: Callable[[], T], name: str, folder: Path) -> T:
        """Do it; while ZFS says that it is busy, again, a few times; then raise Busy with who holds the *folder*."""
        for pause in _PAUSES:
            try:
                return act()
            except CommandFailed as error:
                if not _BUSY.search(error.stderr):
                    raise
            threading.Event().wait(pause)
        try:
            return act()
        except CommandFailed as error:
            if not _BUSY.search(error.stderr):
                raise
            found = list(holders(folder, name))
            by = f"held by {', '.join(found)}" if found else "who holds it cannot be seen from here"
            raise Busy(name, f"{error.stderr.strip()}; {by}; end that, and try again", found) from error


def mount_point(zfs: Zfs, dataset: str) -> Path:
    """Where *dataset* is mounted, by ZFS's word; mounted now if need be. Raises NotSupported where that cannot be."""
    return use(zfs, dataset, zfs.rows(dataset, properties=("mountpoint", "mounted", "readonly")).get(dataset))


def use(zfs: Zfs, dataset: str, found: Sequence[str] | None) -> Path:
    """As mount_point(), with the mountpoint, mounted and readonly that were *found*."""
    what = f"a zfs store in {dataset!r}"
    if found is None:
        raise NotSupported(what, "there is no such dataset", f"import its pool, or: zfs create -p {dataset}")
    point, mounted, readonly = found
    if not os.path.isabs(point):
        fix = f"give it one: zfs set mountpoint=/some/where {dataset}"
        raise NotSupported(what, f"it has no mount point ({point})", fix)
    if readonly == "on":
        fix = f"import the pool to write, or: zfs set readonly=off {dataset}"
        raise NotSupported(what, "it, or its pool, is read-only", fix)
    if mounted != "yes":
        mount(zfs, dataset, Path(point))
    return Path(point)


def mount(zfs: Zfs, dataset: str, point: Path) -> None:
    """Mount it, if nobody else was first. Raises StoreError where it then is not."""
    try:
        zfs("mount", dataset)
    except CommandFailed as error:
        if is_missing(error) or not os.path.ismount(point):
            raise
    if not os.path.ismount(point):
        raise StoreError(f"{dataset!r} was mounted, but not at {point}; look at 'zfs mount' and 'zfs get mountpoint'")


def mounts_below(dataset: str) -> list[str] | None:
    """The datasets below *dataset* that are mounted; None where only a command could tell (anywhere but on Linux)."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            sources = [line.partition(" - zfs ")[2].split(" ")[0] for line in file]
    except OSError:
        return None
    return [source for source in sources if source.startswith(f"{_escaped(dataset)}/")]


def holders(folder: Path, dataset: str) -> Iterator[str]:
    """Who holds something in *folder*, or has *dataset* mounted in a world of its own; Linux alone tells."""
    own = _mounts("self")
    for pid in [name for name in _names("/proc") if name.isdecimal()]:
        links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
        links += [f"/proc/{pid}/fd/{name}" for name in _names(f"/proc/{pid}/fd")]
        inside = any(os.path.join(target, "").startswith(f"{folder}/") for target in map(_target, links))
        if inside or ((mounts := _mounts(pid)) != own and f" - zfs {_escaped(dataset)} " in mounts):
            yield f"process {pid} ({_command(pid)})"


def _escaped(dataset: str) -> str:
    return dataset.replace(" ", r"\040")  # as the table of mounts has it


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _mounts(pid: str) -> str:
    return _read(f"/proc/{pid}/mountinfo")


def _command(pid: str) -> str:
    return _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()[:80] or "ended"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
