"""Deaths: a process killed at a chosen step, with nothing cleaned up, as kill -9 does it.

An exception would run every `finally` on its way; so these are forked processes, killed for good.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from .harness import require

T = TypeVar("T")

# Functions of C that change a disk or start a program. Calls that only read or wait are no steps of their own; nor is
# a write, since half a file is as unfinished as none.
_CHANGES = {
    "mkdir",
    "rename",
    "replace",
    "link",
    "symlink",
    "unlink",
    "remove",
    "rmdir",
    "mknod",
    "mkfifo",
    "chmod",
    "fchmod",
    "chown",
    "fchown",
    "lchown",
    "utime",
    "setxattr",
    "truncate",
    "ftruncate",
    "ioctl",
    "create_subvolume",  # btrfsutil's; all else there goes by ioctl
    "copy_file_range",
    "sendfile",
    "fork",
    "fork_exec",
    "posix_spawn",
}
_MOST_STEPS = 1000


def killed_at_each_step(prepare: Callable[[], T], action: Callable[[T], object]) -> Iterator[int]:
    """Run *action* in a process that is killed before its first change to the disk, then one killed before its second …

    Yields after each death, for the caller to look at what is left and to restore it; ends once *action* came through.
    *prepare* runs in the same process first and gives *action* its argument. What another thread or program of that
    process does is no step.
    """
    for step in range(_MOST_STEPS):

        def dying(step: int = step) -> None:
            given = prepare()
            _die_before(step)
            try:
                action(given)
            finally:
                sys.setprofile(None)

        if not _forked(dying):
            return
        yield step
    raise AssertionError(f"more than {_MOST_STEPS} steps")


def killed_inside(action: Callable[[], object]) -> None:
    """Run *action* in a process of its own; it has to call die()."""
    assert _forked(action), "it was not killed"


def die() -> None:
    """Kill this process."""
    if sys.platform != "win32":
        os.kill(os.getpid(), signal.SIGKILL)


def _die_before(step: int) -> None:
    """Have this thread die before its change number *step*."""
    left, process = step, os.getpid()

    def profile(_: FrameType, event: str, function: object) -> None:
        nonlocal left
        # A forked child inherits this function; what it does before its exec is not ours to count.
        if event == "c_call" and getattr(function, "__name__", "") in _CHANGES and os.getpid() == process:
            if left == 0:
                die()
            left -= 1

    sys.setprofile(profile)


def _forked(action: Callable[[], object]) -> bool:
    """Run *action* in a forked process and return if that was killed. AssertionError if it raised."""
    require(hasattr(os, "fork"), "fork()")
    status = 0
    if sys.platform != "win32":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads hold nothing that is used there
            pid = os.fork()
        if pid == 0:
            _run_and_exit(action)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status <= 0, "it failed; the captured output has its traceback"
    return status < 0


def _run_and_exit(action: Callable[[], object]) -> None:
    status = 1
    try:
        action()
        status = 0
    except BaseException:  # noqa: BLE001 (nothing may reach the tests' own frames below this one)
        traceback.print_exc()
    finally:
        os._exit(status)
