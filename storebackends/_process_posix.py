"""Programs on POSIX: `sh` for helpers; for a build's commands a session each, read and waited for by one poll()."""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # noqa: S101 (tells the type checker to skip the rest there)

import array  # noqa: E402
import contextlib  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import os  # noqa: E402
import pwd  # noqa: E402
import select  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import stat  # noqa: E402
import subprocess  # noqa: E402
import termios  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO, TYPE_CHECKING, Literal  # noqa: E402

from .errors import CommandFailed, NotSupported  # noqa: E402

if TYPE_CHECKING:
    from .backend import Command
    from .process import Cancel

KILLED = -signal.SIGKILL
ANY_STATUS = tuple(range(-128, 256))
CHUNK = 65536
FIRST_TICK, LAST_TICK = 0.001, 0.05  # pauses between looks at what the kernel has no descriptor to poll for
LINGER = 1.0  # how long killed processes may take to go

_starting = threading.RLock()
"""Held while a program is started. A child that another thread forks meanwhile, and that lives on, would keep the pipe
by which the start learns that the program runs, and the start would wait until that child ends."""
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)

Sink = Callable[[bytes], None]
Why = Literal["ended", "late", "cancelled"]


class Child:
    """A running command: a session, and so a process group, of its own."""

    def __init__(self, command: Command, stdin: IO[bytes], output: Sink, capture: Sink | None, umask: int) -> None:
        argv = [*_dying_with_us(), find(command), *command.argv[1:]]
        user = _user(command.user)
        self._sinks: dict[int, Sink] = {}
        self._poll = select.poll()
        self._over = False
        with ExitStack() as undo, ExitStack() as ours:
            stderr = self._pipe(output, undo, ours)
            stdout = stderr if capture is None else self._pipe(capture, undo, ours)
            if user:
                _give_streams(user, stdin.fileno(), stdout, stderr)
            self._process = _start(command, argv, stdin, stdout, stderr, umask, user)
            self._files = undo.pop_all()
        self._files.callback(self.end)
        self._watched, self._tick = self._watch(), FIRST_TICK

    def _pipe(self, sink: Sink, undo: ExitStack, ours: ExitStack) -> int:
        """Make a pipe into *sink*; return the end for the child, which *ours* closes once it has started."""
        reading, writing = os.pipe()
        undo.callback(os.close, reading)
        ours.callback(os.close, writing)
        os.set_blocking(reading, False)
        self._sinks[reading] = sink
        self._poll.register(reading, select.POLLIN)
        return writing

    def _watch(self) -> bool:
        """Have poll() return when the child ends, where the kernel can."""
        pidfd_open = getattr(os, "pidfd_open", None)  # Linux only, and Python may have been built for an older one
        if pidfd_open is None:
            return False
        try:
            fd = pidfd_open(self._process.pid)
        except OSError:  # before Linux 5.3, or forbidden by a filter of system calls
            return False
        self._files.callback(os.close, fd)
        self._poll.register(fd, select.POLLIN)
        return True

    def wait(self, timeout: float | None, cancel: Cancel | None) -> Why:
        """Hand on output until the program ends, *timeout* seconds have passed or *cancel* is set."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if cancel:
            self._poll.register(cancel.fileno(), select.POLLIN)
        try:
            while not self._ended():
                left = None if deadline is None else deadline - time.monotonic()
                if cancel and cancel.is_set():
                    return "cancelled"
                if left is not None and left <= 0:
                    return "late"
                self._pump(left)
            return "ended"
        finally:
            if cancel:
                self._poll.unregister(cancel.fileno())

    def _pump(self, patience: float | None) -> None:
        if not self._watched:
            patience = self._tick if patience is None else min(patience, self._tick)
        # Rounded up, or the last millisecond would be spent in a busy loop; and no larger than poll() takes.
        ready = self._poll.poll(None if patience is None else min(int(patience * 1000) + 1, 1_000_000))
        self._tick = FIRST_TICK if ready else min(self._tick * 2, LAST_TICK)
        for fd, _ in ready:
            if fd in self._sinks:
                self._read(fd, CHUNK)

    def _read(self, fd: int, most: int) -> int:
        """Hand on at most *most* bytes; returns how many there were."""
        try:
            data = os.read(fd, most)
        except BlockingIOError:
            return 0
        if data:
            self._sinks[fd](data)
        else:
            self._poll.unregister(fd)  # at its end it would be ready for ever
            del self._sinks[fd]
        return len(data)

    def _ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        waitid = getattr(os, "waitid", None)
        if waitid is None:  # macOS before Python 3.13
            return self._process.poll() is not None
        try:
            return waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True  # SIGCHLD is ignored in this program, so nobody can know its status

    def terminate(self) -> None:
        """Ask the whole group to end."""
        self._signal(signal.SIGTERM)

    def end(self) -> int:
        """Kill what is left of the group, and reap the leader. Twice is fine."""
        if not self._over:
            # In this order: once the leader is reaped, its number may be another's. (Where there is no waitid() it is
            # reaped already; but the number stays taken for as long as the group has anybody to kill.)
            self._signal(signal.SIGKILL)
            self._process.wait()
            deadline, pause = time.monotonic() + LINGER, FIRST_TICK
            while _lives(self._process.pid) and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(pause * 2, LAST_TICK)
            self._over = True
        return self._process.returncode

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def drain(self) -> None:
        """Hand on what the pipes hold at this moment, and no more: a daemon may write for ever."""
        for fd in list(self._sinks):
            left = _pending(fd)
            while left > 0 and (got := self._read(fd, min(left, CHUNK))):
                left -= got

    def close(self) -> None:
        """End what runs, and give the descriptors back."""
        self._files.close()


def _start(
    command: Command,
    argv: Sequence[str],
    stdin: IO[bytes],
    stdout: int,
    stderr: int,
    umask: int,
    user: tuple[int, int, list[int]] | None,
) -> subprocess.Popen[bytes]:
    uid, gid, groups = user or (None, None, None)
    try:
        with _starting:
            return subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=command.env,
                cwd=command.cwd,
                umask=umask,
                user=uid,
                group=gid,
                extra_groups=groups,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        raise CommandFailed(command.argv, None, f"cannot start: {error}") from error


def _give_streams(user: tuple[int, int, list[int]], *streams: int) -> None:
    """Let the user open its own /dev/stdin and /dev/stdout again: files and pipes of ours, but not /dev/null."""
    for fd in streams:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            os.fchown(fd, user[0], user[1])


def _lives(group: int) -> bool:
    """Whether anything in the group still runs. A zombie does not, and is there for ever where nobody reaps orphans."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    if not os.path.exists("/proc/self/stat"):
        return True
    return any(_runs_in(group, pid) for pid in os.listdir("/proc") if pid.isdecimal())


def _runs_in(group: int, pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # After the name, which is in parentheses and may hold anything: state, parent, group.
            state, _, pgrp = file.read().rpartition(b")")[2].split()[:3]
    except OSError:
        return False  # it has just gone
    return int(pgrp) == group and state not in b"ZX"


def _pending(fd: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


@functools.cache
def _dying_with_us() -> tuple[str, ...]:
    """A prefix that has the kernel kill a command when the thread that started it is gone; empty where there is none.

    A program does this, since between fork and exec no Python may run beside threads.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    if setpriv is None:
        return ()
    prefix = (setpriv, "--pdeathsig", "KILL", "--")
    null = subprocess.DEVNULL
    try:
        with _starting:
            tried = subprocess.Popen([*prefix, setpriv, "--version"], stdin=null, stdout=null, stderr=null)
    except OSError:
        return ()
    with tried:
        return prefix if tried.wait() == 0 else ()  # BusyBox has one without that option


def find(command: Command) -> str:
    """The program's path, found as exec would: by the command's own PATH and folder. CommandFailed where it is not."""
    name, folder = command.argv[0], os.path.abspath(command.cwd) if command.cwd else os.curdir
    if not os.path.isdir(folder):
        raise CommandFailed(command.argv, None, f"cannot start: there is no folder {folder}")
    path = command.env.get("PATH", os.defpath)
    for where in [""] if "/" in name else path.split(os.pathsep):
        candidate = os.path.join(folder, where, name)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    if "/" in name:
        raise CommandFailed(command.argv, None, "cannot start: it is no executable file; correct the path or its mode")
    raise CommandFailed(command.argv, None, f"cannot start: it is not in PATH ({path}); install what provides it")


def _user(user: str | int | None) -> tuple[int, int, list[int]] | None:
    """The ids to run with; None where they are this process's own."""
    if user is None:
        return None
    try:
        entry = pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        if isinstance(user, str):
            raise NotSupported(
                f"running as {user!r}", "this host knows no such user", "name another, or a number"
            ) from None
        ids = user, user, list[int]()
    else:
        ids = entry.pw_uid, entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
    if ids[0] == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise NotSupported(f"running as {user!r}", "only root can change users", "run as root, or leave the user out")
    return ids


def environment(home: str, tmp: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": home,
        "TMPDIR": tmp,
    }


def give_to(path: str, user: str | int) -> None:
    if ids := _user(user):
        os.chown(path, ids[0], ids[1], follow_symlinks=False)


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
    try:
        import sh  # here, since it takes 80 ms
    except ImportError:
        reason = "cannot start: the Python package 'sh' is missing; pip install 'storebackends[all]'"
        raise CommandFailed(argv, None, reason) from None
    try:
        with _starting:
            running = sh.Command(argv[0])(
                *argv[1:],
                _in=stdin,
                _out=out,
                _err=err,
                _env=dict(env),
                _cwd=None if cwd is None else str(cwd),
                _tty_out=False,
                _new_session=True,
                _bg=True,
                _bg_exc=False,
                _ok_code=ANY_STATUS,
            )
    except sh.ForkException as error:
        raise CommandFailed(argv, None, f"cannot start: {str(error).strip().splitlines()[-1]}") from error
    late = threading.Event()

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)

    def expire() -> None:
        late.set()
        kill()

    # Not sh's own time limit: it looks every 0.1 s whether to go on, so every call would take that long.
    timer = threading.Timer(timeout, expire)
    timer.start()
    try:
        running.wait()
    except BaseException:
        kill()
        running.wait()
        raise
    finally:
        timer.cancel()
        timer.join()  # it ends at once, and else might outlive the store
    return None if late.is_set() else int(running.exit_code)


def detached(argv: Sequence[str], program: str) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    try:
        with _starting:
            return subprocess.Popen([program, *argv[1:]], stdin=null, stdout=null, stderr=null, start_new_session=True)
    except (OSError, ValueError) as error:
        raise CommandFailed(argv, None, f"cannot start: {error}") from error
