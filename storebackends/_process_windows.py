"""Programs on Windows: a job object for each command, closed with all that is in it, and a thread for each pipe."""

from __future__ import annotations

import sys

assert sys.platform == "win32"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import ctypes  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from ctypes import wintypes  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO, TYPE_CHECKING, Literal  # noqa: E402

from .errors import CommandFailed, NotSupported  # noqa: E402

if TYPE_CHECKING:
    from .backend import Command
    from .process import Cancel

KILLED = 1
CHUNK = 65536
TICK = 0.05  # how often to look at the child and its Cancel, neither of which wakes a queue
LINGER = 1.0  # how long what a killed job wrote may take through the pipe

Sink = Callable[[bytes], None]
Why = Literal["ended", "late", "cancelled"]

# What Windows' own libraries and programs look for themselves by.
_SYSTEM = ("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "PROGRAMDATA", "PROGRAMFILES")

_CREATE_SUSPENDED = 0x4
_KILL_ON_JOB_CLOSE = 0x2000
_EXTENDED_LIMITS = 9


class _Limits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = (
        ("process_time", ctypes.c_int64),
        ("job_time", ctypes.c_int64),
        ("flags", wintypes.DWORD),
        ("least_working_set", ctypes.c_size_t),
        ("most_working_set", ctypes.c_size_t),
        ("active_processes", wintypes.DWORD),
        ("affinity", ctypes.c_size_t),
        ("priority", wintypes.DWORD),
        ("scheduling", wintypes.DWORD),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    )


_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_kernel32.CreateJobObjectW.argtypes = [ctypes.c_void_p, wintypes.LPCWSTR]
_kernel32.CreateJobObjectW.restype = wintypes.HANDLE
_kernel32.SetInformationJobObject.argtypes = [wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD]
_kernel32.AssignProcessToJobObject.argtypes = [wintypes.HANDLE, wintypes.HANDLE]
_kernel32.TerminateJobObject.argtypes = [wintypes.HANDLE, wintypes.UINT]
_kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
_kernel32.GenerateConsoleCtrlEvent.argtypes = [wintypes.DWORD, wintypes.DWORD]
_ntdll = ctypes.WinDLL("ntdll")
_ntdll.NtResumeProcess.argtypes = [wintypes.HANDLE]


def _checked(result: int | None) -> int:
    if not result:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


def _new_job() -> int:
    job = _checked(_kernel32.CreateJobObjectW(None, None))
    limits = _Limits(flags=_KILL_ON_JOB_CLOSE)  # so the kernel ends it all when this process dies
    _checked(_kernel32.SetInformationJobObject(job, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)))
    return job


class Child:
    """A running command, in a job object of its own."""

    def __init__(self, command: Command, stdin: IO[bytes], output: Sink, capture: Sink | None, umask: int) -> None:
        if command.user is not None:
            raise NotSupported(f"running as {command.user!r}", "Windows has no setuid()", "leave the user out")
        self._process = _start(command, stdin, capture is not None)
        self._job: int | None = None
        # Bounded, so that a sink that is slow slows the program down, as a pipe alone would.
        self._chunks: queue.Queue[tuple[Sink, bytes]] = queue.Queue(16)
        streams = [(self._process.stdout, capture or output), (self._process.stderr, output)]
        readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams if pair[0]]
        self._open = len(readers)
        for reader in readers:
            reader.start()
        try:
            self._job = _new_job()
            handle = int(self._process._handle)  # type: ignore[attr-defined]
            _checked(_kernel32.AssignProcessToJobObject(self._job, handle))
            _ntdll.NtResumeProcess(handle)  # not before: what it had started by then would not be in the job
        except OSError as error:
            self.close()
            raise CommandFailed(command.argv, None, f"cannot start: {error}") from error

    def _read(self, stream: IO[bytes], sink: Sink) -> None:
        with stream:
            while data := os.read(stream.fileno(), CHUNK):
                self._chunks.put((sink, data))
        self._chunks.put((sink, b""))

    def wait(self, timeout: float | None, cancel: Cancel | None) -> Why:
        """Hand on output until the program ends, *timeout* seconds have passed or *cancel* is set."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._process.poll() is None:
            left = TICK if deadline is None else deadline - time.monotonic()
            if cancel and cancel.is_set():
                return "cancelled"
            if left <= 0:
                return "late"
            self._pump(min(left, TICK))
        return "ended"

    def _pump(self, patience: float, deliver: bool = True) -> bool:
        try:
            sink, data = self._chunks.get(timeout=patience)
        except queue.Empty:
            return False
        if not data:
            self._open -= 1
        elif deliver:
            sink(data)
        return True

    def terminate(self) -> None:
        """Ask the program to end, if it has a console to ask through."""
        # Not send_signal(): where there is no console, os.kill() kills at once and fails with a SystemError.
        _kernel32.GenerateConsoleCtrlEvent(signal.CTRL_BREAK_EVENT, self._process.pid)

    def end(self) -> int:
        """Kill all that is in the job. Twice is fine."""
        if self._job is None:
            self._process.kill()
        else:
            _kernel32.TerminateJobObject(self._job, KILLED)
        return self._process.wait()

    def drain(self, deliver: bool = True) -> None:
        """Hand on what the pipes hold. With the job dead their ends come at once, but for a daemon that broke away."""
        deadline = time.monotonic() + LINGER
        while self._open and (left := deadline - time.monotonic()) > 0 and self._pump(left, deliver):
            pass

    def close(self) -> None:
        """End what runs, and give the handles and the threads back."""
        self.end()
        self.drain(deliver=False)
        if self._job is not None:
            _kernel32.CloseHandle(self._job)
            self._job = None


def _start(command: Command, stdin: IO[bytes], separate: bool) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [find(command), *command.argv[1:]],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if separate else subprocess.STDOUT,
            env=command.env,
            cwd=command.cwd,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP | _CREATE_SUSPENDED,
        )
    except (OSError, ValueError) as error:
        raise CommandFailed(command.argv, None, f"cannot start: {error}") from error


def find(command: Command) -> str:
    """The program's path, by the command's own PATH and folder. CommandFailed where it is not there."""
    path, name = command.env.get("PATH", ""), command.argv[0]
    if os.path.dirname(name) and command.cwd:
        name = os.path.join(command.cwd, name)
    if found := shutil.which(name, path=path):
        return found
    raise CommandFailed(command.argv, None, f"cannot start: it is not in PATH ({path}); install what provides it")


def environment(home: str, tmp: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _SYSTEM if name in os.environ}
    system = os.environ.get("SYSTEMROOT", r"C:\Windows")
    path = os.pathsep.join([rf"{system}\System32", system, rf"{system}\System32\WindowsPowerShell\v1.0"])
    return {**kept, "PATH": path, "HOME": home, "USERPROFILE": home, "TMPDIR": tmp, "TEMP": tmp, "TMP": tmp}


def give_to(path: str, user: str | int) -> None:
    raise NotSupported(f"giving {path} to {user!r}", "Windows has no chown()", "leave the user out")


def call(
    argv: Sequence[str],
    stdin: IO[bytes],
    out: IO[bytes],
    err: IO[bytes],
    timeout: float,
    env: Mapping[str, str],
    cwd: Path | None,
) -> int | None:
    """Run a helper to its end; None where it took too long and was killed."""
    flags = subprocess.CREATE_NO_WINDOW
    try:
        return subprocess.run(
            argv,
            stdin=stdin,
            stdout=out,
            stderr=err,
            timeout=timeout,
            env=env,
            cwd=cwd,
            creationflags=flags,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return None
    except (OSError, ValueError) as error:
        raise CommandFailed(argv, None, f"cannot start: {error}") from error


def detached(argv: Sequence[str], program: str) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
    try:
        return subprocess.Popen([program, *argv[1:]], stdin=null, stdout=null, stderr=null, creationflags=flags)
    except (OSError, ValueError) as error:
        raise CommandFailed(argv, None, f"cannot start: {error}") from error
