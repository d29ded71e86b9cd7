"""The only module that starts programs: a backend's helpers, a build's commands, and what outlives this process.

`tool` runs a helper and keeps what it says. `run` runs a build's command in a group of its own, hands its output on
while it runs, and ends the whole group before it returns: what a build started must not write into its tree later.
`detach` starts and forgets. No command goes through a shell, and none inherits a descriptor of the store.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .backend import Command
from .errors import CommandFailed

# The only platform test of this module.
if sys.platform == "win32":
    from . import _process_windows as _native
else:
    from . import _process_posix as _native

GRACE = 5.0
"""Seconds that a cancelled command has between being asked to end and being killed."""
KEPT = 65536
"""How much of a failed helper's stderr its CommandFailed has, in bytes."""

started = 0
"""How many programs this module has started, for tests that count commands; threads may lose one to each other."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended: a negative *returncode* is a signal's number, as in `subprocess`."""

    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""


class Interrupted(Exception):
    """A command was ended because its `Cancel` was set."""


class Cancel:
    """A switch that any thread can set, once, to end the commands that run under it."""

    def __init__(self) -> None:
        self._set = False
        self._pipe: tuple[int, int] | None = None
        self._lock = threading.RLock()  # re-entrant: a signal handler may call set() at any point

    def set(self) -> None:
        """End what runs under it, now or later."""
        with self._lock:
            self._set = True
            if self._pipe:
                os.write(self._pipe[1], b"!")

    def is_set(self) -> bool:
        return self._set

    def fileno(self) -> int:
        """A descriptor that is readable once set() was called, for poll(); made when first asked for."""
        with self._lock:
            if self._pipe is None:
                self._pipe = os.pipe()
                if self._set:
                    os.write(self._pipe[1], b"!")
            return self._pipe[0]

    def close(self) -> None:
        """Give the descriptor back. Nothing may run under it any more; twice is fine."""
        with self._lock:
            pipe, self._pipe = self._pipe, None
            for fd in pipe or ():
                os.close(fd)


def environment(home: str, tmp: str) -> dict[str, str]:
    """What a build's command finds in its environment: little, and nothing of the user's own."""
    return _native.environment(home, tmp)


def tool(
    argv: Sequence[str],
    *,
    input: bytes | IO[bytes] | None = None,
    timeout: float = 600,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    ok: Container[int] = (0,),
) -> Finished:
    """Run a helper program to its end, without a terminal, in English, with *env* added to this process's environment.

    Its stdin is *input*: bytes, what an open file holds from where it is, or nothing.
    Raises CommandFailed where it is not installed (returncode None), ends with a status that is not *ok*, or takes
    more than *timeout* seconds; then it and all in its group are killed.
    """
    global started
    merged = {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "", **(env or {})}
    command = Command(argv, merged, cwd)
    program = [_native.find(command), *argv[1:]]
    # Files, not pipes: a daemon that the helper leaves cannot hold them up, and no size of output can.
    with _stdin(input) as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started += 1
        returncode = _native.call(program, stdin, out, err, timeout, merged, cwd)
        for file in (out, err):
            file.seek(0)
        finished = Finished(_native.KILLED if returncode is None else returncode, out.read(), err.read())
    if returncode is None or returncode not in ok:
        reason = f"ran longer than {timeout:g} s" if returncode is None else ending(returncode)
        said = finished.stderr[-KEPT:].decode(errors="replace")
        raise CommandFailed(argv, finished.returncode, reason, said)
    return finished


def run(
    command: Command,
    *,
    output: Callable[[bytes], None],
    cancelled: Cancel,
    input: bytes | None = None,
    timeout: float | None = None,
    capture: bool = False,
    umask: int = 0o022,
) -> Finished:
    """Run a build's command; *output* gets what it writes, in this thread, as it comes.

    Its stdin is *input*, or empty. With *capture* its stdout is returned, and *output* gets its stderr only.
    Returns when the program ends, whatever its status. By then all that it started is dead, except for what left its
    process group; a daemon that did, and keeps the output open, is not waited for.

    Raises CommandFailed where it cannot start (returncode None) or runs longer than *timeout* seconds, Interrupted
    when *cancelled* is set, and what *output* raises. In these cases it is asked to end, and killed after GRACE
    seconds (at once for an exception), and then *command.stop* is called.
    """
    global started
    captured: list[bytes] = []
    with _stdin(input) as stdin:
        child = _native.Child(command, stdin, output, captured.append if capture else None, umask)
    started += 1
    why = "raised"
    try:
        why = child.wait(timeout, cancelled)
        if why != "ended":
            child.terminate()
            child.wait(GRACE, None)
        returncode = child.end()
        child.drain()
    finally:
        child.close()
        if why != "ended" and command.stop:
            command.stop()
    if why == "late":
        raise CommandFailed(command.argv, returncode, f"ran longer than {timeout:g} s")
    if why == "cancelled":
        raise Interrupted
    return Finished(returncode, b"".join(captured))


def detach(argv: Sequence[str]) -> None:
    """Start a program that neither needs this process nor holds it up, with no input and no output.

    Raises CommandFailed where it cannot start.
    """
    global started
    child = _native.detached(argv, _native.find(Command(argv, os.environ, None)))
    started += 1
    # Whoever ends first: the thread leaves no zombie to this process, which leaves none to whoever adopts the child.
    threading.Thread(target=child.wait, name=f"wait for {argv[0]}", daemon=True).start()


def give_to(path: str, user: str | int) -> None:
    """Make *user*, as in `Command`, the owner of *path*. Raises NotSupported where that cannot be."""
    _native.give_to(path, user)


def ending(returncode: int) -> str:
    """How a program ended, in words."""
    return f"was ended by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"


def _stdin(input: bytes | IO[bytes] | None) -> IO[bytes]:
    """*input* as a file, which is closed in the end; bytes go into a nameless one."""
    if input is None:
        return open(os.devnull, "rb")
    if not isinstance(input, bytes):
        return input
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.write(input)
    file.seek(0)
    return file
