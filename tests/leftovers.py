"""What a test forgot: processes, mounts and loop devices that outlive it. Without /proc (not Linux) nothing is found.

A process counts when it is a child of this one or holds something below the folder: a build's programs get a clean
environment and may change their parent, but they work in that folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

# Helpers that multiprocessing starts once and ends itself when this process does.
_LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def below(folder: Path, patience: float = 30) -> list[str]:
    """Describe all that is left below *folder*, and this process's children.

    Some of it may be just ending, as a detached syncfs or a loop device are: that gets *patience* seconds.
    """
    if not os.path.isdir("/proc/self/fd"):
        return []
    for _ in range(round(patience * 10)):
        if not (_strangers(folder) or _loops(folder)):
            break
        threading.Event().wait(0.1)
    processes = _strangers(folder) | dict.fromkeys(_children(), "a child of the tests")
    left = [f"process {pid} ({_command(pid)}): {text}" for pid, text in sorted(processes.items())]
    left += [f"mount {mount}" for mount in mounts(folder)]
    return left + [f"loop device {device}" for device in _loops(folder)]


def holders(folder: Path) -> Iterator[tuple[int, str]]:
    """(pid, what it holds) of each process with a working folder, program or descriptor below *folder*."""
    for pid in _pids():
        for link in _links(f"/proc/{pid}"):
            try:
                target = os.readlink(link)
            except OSError:
                continue  # ended, closed, or another user's
            if _inside(target, folder):
                yield pid, f"{link.split('/', 3)[3]} is {target}"
                break


def _links(process: str) -> list[str]:
    try:
        descriptors = [f"{process}/fd/{fd}" for fd in os.listdir(f"{process}/fd")]
    except OSError:
        descriptors = []
    return [f"{process}/{name}" for name in ("cwd", "root", "exe")] + descriptors


def _children() -> Iterator[int]:
    """Zombies too: a child nobody waited for is a leak."""
    for pid in _pids():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            continue
        parent = int(stat.rpartition(")")[2].split()[1])
        if parent == os.getpid() and not any(name in _command(pid) for name in _LASTING):
            yield pid


def _strangers(folder: Path) -> dict[int, str]:
    return {pid: text for pid, text in holders(folder) if pid != os.getpid()}


def mounts(folder: Path) -> list[str]:
    """The mount points at *folder* and below, in the order in which they were mounted."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    points = [line.split()[4].replace(r"\040", " ") for line in lines]
    return [point for point in points if _inside(point, folder)]


def _loops(folder: Path) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_text().strip()
        except OSError:
            continue  # freed meanwhile
        if _inside(file, folder):
            found.append(f"{backing.parts[3]} of {file}")
    return found


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended"


def _inside(path: str, folder: Path) -> bool:
    return path == str(folder) or path.startswith(f"{folder}/")
