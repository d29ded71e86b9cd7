from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storebackends import process
from storebackends.backend import Command
from storebackends.errors import CommandFailed, NotSupported
from storebackends.process import Cancel, Finished, Interrupted

pytest.importorskip("fcntl", reason="no sh, tee and process groups here")
assert sys.platform != "win32"
from storebackends import _process_posix  # noqa: E402

proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to look into")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="not root")
needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv (util-linux) here")


@pytest.fixture
def cancel() -> Iterator[Cancel]:
    cancel = Cancel()
    yield cancel
    cancel.close()


@pytest.fixture
def said() -> bytearray:
    return bytearray()


Run = Callable[..., Finished]


@pytest.fixture
def run(cancel: Cancel, said: bytearray) -> Run:
    """process.run() with the output in `said`."""

    def run(
        *argv: str, user: str | int | None = None, stop: Callable[[], None] | None = None, **more: object
    ) -> Finished:
        command = Command(argv, {"PATH": os.environ["PATH"]}, None, user, stop)
        return process.run(command, **{"output": said.extend, "cancelled": cancel, **more})  # type: ignore[arg-type]

    return run


def has_zombie() -> bool:
    """Whether a child of this process has ended and nobody reaped it. A daemon of other tests may still run."""
    try:
        return os.waitpid(-1, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return False


def alive(pid: int) -> bool:
    """Whether *pid* is a process that still runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def await_end(pid: int) -> None:
    """Return when *pid* is gone, whoever its parent is; the test's own timeout bounds it."""
    if sys.platform == "linux":
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], 30)[0]
        finally:
            os.close(fd)


# run()


def test_output_comes_in_order_and_whole(run: Run, said: bytearray) -> None:
    finished = run("sh", "-c", "for n in 1 2 3; do echo out $n; echo err $n >&2; done; exit 7")

    assert finished == Finished(7)
    assert said == b"out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n"


def test_output_larger_than_a_pipe_comes_whole(run: Run, said: bytearray) -> None:
    run("sh", "-c", "seq 200000; echo end >&2")

    assert said == "".join(f"{n}\n" for n in range(1, 200_001)).encode() + b"end\n"


def test_tee_to_its_stderr_loses_nothing(run: Run, said: bytearray) -> None:
    run("sh", "-c", "echo before; echo once | tee /dev/stderr; echo after")

    assert said == b"before\nonce\nonce\nafter\n"


def test_capture_keeps_stdout_apart(run: Run, said: bytearray) -> None:
    finished = run("sh", "-c", "seq 100000; echo err >&2", capture=True)

    assert finished.stdout == "".join(f"{n}\n" for n in range(1, 100_001)).encode()
    assert said == b"err\n"


def test_input_is_read_to_its_end(run: Run, said: bytearray) -> None:
    data = os.urandom(300_000)

    run("cat", input=data)

    assert said == data


def test_without_input_there_is_none(run: Run, said: bytearray) -> None:
    finished = run("cat")

    assert finished == Finished(0)
    assert said == b""


def test_environment_and_umask_are_what_was_asked_for(run: Run, said: bytearray) -> None:
    run("sh", "-c", "umask; env", umask=0o027)

    lines = said.decode().splitlines()
    assert lines[0] == "0027"
    assert {line.partition("=")[0] for line in lines[1:]} <= {"PATH", "PWD", "SHLVL", "_", "OLDPWD"}


def test_command_runs_in_its_folder(cancel: Cancel, said: bytearray, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "here").chmod(0o755)

    process.run(Command(["./here"], {}, tmp_path), output=said.extend, cancelled=cancel)

    assert said.decode().strip() == os.path.realpath(tmp_path)


def test_signal_is_a_negative_status(run: Run) -> None:
    assert run("sh", "-c", "kill -9 $$").returncode == -signal.SIGKILL


@proc
def test_what_a_command_leaves_in_its_group_is_dead_when_it_returns(run: Run, said: bytearray) -> None:
    run("sh", "-c", "sleep 1000 & echo $!; sh -c 'trap \"\" TERM HUP; sleep 1000' & echo $!")

    assert [alive(int(pid)) for pid in said.split()] == [False, False]


@proc
def test_daemon_that_keeps_the_output_does_not_hold_us_up(run: Run, said: bytearray, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    daemon_script = f"trap '' PIPE; echo $$; echo > {tmp_path}/ready; while :; do echo noise; done"

    run("sh", "-c", 'setsid sh -c "$1" & read line < "$2"; echo end', "sh", daemon_script, f"{tmp_path}/ready")

    daemon = int(said.split()[0])
    was_alive = alive(daemon)
    os.kill(daemon, signal.SIGKILL)
    assert was_alive
    assert b"end\n" in said


def test_cancel_from_another_thread_ends_the_command(cancel: Cancel, run: Run) -> None:
    ready = threading.Event()

    def cancel_it() -> None:
        ready.wait(60)
        cancel.set()

    thread = threading.Thread(target=cancel_it)
    thread.start()

    with pytest.raises(Interrupted):
        run("sh", "-c", "echo ready; exec sleep 1000", output=lambda data: ready.set())

    thread.join()
    assert cancel.is_set()


def test_cancel_set_beforehand_ends_the_command_at_once(cancel: Cancel, run: Run) -> None:
    cancel.set()

    with pytest.raises(Interrupted):
        run("sleep", "1000")

    assert cancel.is_set()


def test_cancelled_command_may_clean_up(cancel: Cancel, run: Run, said: bytearray) -> None:
    def output(data: bytes) -> None:
        said.extend(data)
        cancel.set()

    with pytest.raises(Interrupted):
        run("sh", "-c", "trap 'echo cleaned; exit' TERM; sleep 1000 & echo ready; wait", output=output)

    assert said == b"ready\ncleaned\n"


@proc
def test_cancelled_command_that_will_not_end_is_killed(
    cancel: Cancel, run: Run, said: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.05)
    stopped: list[bool] = []

    def output(data: bytes) -> None:
        said.extend(data)
        cancel.set()

    with pytest.raises(Interrupted):
        run(
            "sh",
            "-c",
            "trap '' TERM; echo $$; while :; do sleep 1; done",
            output=output,
            stop=lambda: stopped.append(alive(int(said))),
        )

    assert stopped == [False]


def test_timeout_is_a_failure_that_names_the_limit(run: Run) -> None:
    stopped: list[None] = []

    with pytest.raises(CommandFailed, match=r"^sleep ran longer than 0\.05 s$") as caught:
        run("sleep", "1000", timeout=0.05, stop=lambda: stopped.append(None))

    assert caught.value.returncode == -signal.SIGTERM
    assert stopped == [None]


@proc
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_from_the_output_kills_the_command(
    run: Run, said: bytearray, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def output(data: bytes) -> None:
        said.extend(data)
        raise error("full")

    with pytest.raises(error, match="full"):
        run("sh", "-c", "echo $$; exec sleep 1000", output=output)

    assert not alive(int(said))


def test_stop_is_not_called_for_a_command_that_ends(run: Run) -> None:
    stopped: list[None] = []

    run("true", stop=lambda: stopped.append(None))

    assert stopped == []


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["no-such-program"], r"cannot start: it is not in PATH \(.+\); install what provides it"),
        (["/etc/passwd"], "cannot start: it is no executable file"),
        (["true", "nul\0"], "cannot start: .*null byte"),
    ],
)
def test_what_cannot_start_says_why(run: Run, argv: list[str], reason: str) -> None:
    with pytest.raises(CommandFailed, match=reason) as caught:
        run(*argv)

    assert caught.value.returncode is None
    assert caught.value.argv == tuple(argv)


def test_folder_that_is_missing_is_named(cancel: Cancel, said: bytearray, tmp_path: Path) -> None:
    command = Command(["true"], os.environ, tmp_path / "missing")

    with pytest.raises(CommandFailed, match=r"cannot start: there is no folder .*missing"):
        process.run(command, output=said.extend, cancelled=cancel)

    assert said == b""


@as_root
@pytest.mark.root
def test_command_runs_as_another_user_who_can_open_its_own_streams(run: Run, said: bytearray) -> None:
    run("sh", "-c", "id -un; id -G; cat /dev/stdin | tee /dev/stderr", user="nobody", input=b"in\n")

    name, groups, *rest = said.decode().splitlines()
    assert name == "nobody"
    assert "0" not in groups.split()
    assert rest == ["in", "in"]


@as_root
@pytest.mark.root
def test_command_runs_as_a_number_that_has_no_name(run: Run, said: bytearray) -> None:
    before = os.stat(os.devnull)

    run("id", "-u", user=54321)

    assert said == b"54321\n"
    assert os.stat(os.devnull).st_uid == before.st_uid


def test_unknown_user_is_refused(run: Run) -> None:
    with pytest.raises(NotSupported, match="running as 'no-such-user' is not possible here: this host knows no such"):
        run("true", user="no-such-user")


@as_root
@pytest.mark.root
def test_folder_is_given_to_another_user(tmp_path: Path) -> None:
    process.give_to(str(tmp_path), 54321)

    assert tmp_path.stat().st_uid == 54321


@proc
@needs_setpriv
def test_command_dies_with_its_builder() -> None:
    script = """if True:
        import os
        from storebackends.backend import Command
        from storebackends.process import Cancel, run
        command = Command(["sh", "-c", "echo $$; exec sleep 1000"], os.environ, None)
        run(command, output=lambda data: os.write(1, data), cancelled=Cancel())
        """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        child = int(builder.stdout.readline())

        builder.kill()
        await_end(child)

    assert not alive(child)


@proc
def test_commands_inherit_nothing_but_their_streams(run: Run, said: bytearray, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w"):
        run("sh", "-c", "ls -l /proc/self/fd")

    assert b"secret" not in said
    assert b" 0 -> /dev/null" in said


@proc
@pytest.mark.parametrize("watched", [True, False], ids=["pidfd", "polling"])
def test_many_commands_leave_no_descriptor_and_no_zombie(
    run: Run, cancel: Cancel, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watched:
        monkeypatch.setattr(os, "pidfd_open", _forbidden)
    cancel.fileno()
    before = os.listdir("/proc/self/fd")

    for n in range(100):
        assert run("sh", "-c", f"cat; exit {n}", input=b"x" if n % 2 else None, capture=n % 3 == 0).returncode == n

    assert os.listdir("/proc/self/fd") == before
    assert not has_zombie()


def _forbidden(pid: int) -> int:
    raise PermissionError(1, "forbidden by a filter")


@proc
def test_command_and_its_group_end_where_the_kernel_has_neither_pidfd_nor_waitid(
    run: Run, said: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.delattr(os, "waitid", raising=False)

    finished = run("sh", "-c", "sleep 1000 & echo $!; sleep 0.1; exit 3")

    assert finished == Finished(3)
    assert not alive(int(said))


# Cancel


def test_cancel_is_readable_once_set_whichever_came_first() -> None:
    early, late, unset = Cancel(), Cancel(), Cancel()
    early.set()
    late.fileno()
    late.set()

    ready = select.select([early, late, unset], [], [], 0)[0]

    assert ready == [early, late]
    for cancel in (early, late, unset):
        cancel.close()
        cancel.close()
        cancel.set()


# tool()


def test_tool_returns_both_outputs_and_counts() -> None:
    before = process.started

    finished = process.tool(["sh", "-c", "cat; echo err >&2"], input=b"in")

    assert finished == Finished(0, b"in", b"err\n")
    assert process.started == before + 1


def test_tool_keeps_output_larger_than_any_pipe() -> None:
    finished = process.tool(["seq", "700000"])

    assert finished.stdout == "".join(f"{n}\n" for n in range(1, 700_001)).encode()


def test_tool_speaks_english_has_no_terminal_and_a_session_of_its_own() -> None:
    script = "echo $LC_ALL $EXTRA; tty; ps -o sid= -p $$ | tr -d ' '; echo $$; pwd"

    out = process.tool(["sh", "-c", script], env={"EXTRA": "more"}, cwd=Path("/usr"), ok=(0, 1)).stdout

    language, terminal, session, pid, folder = out.decode().splitlines()
    assert (language, terminal, session, folder) == ("C.UTF-8 more", "not a tty", pid, "/usr")


def test_tool_that_fails_keeps_the_end_of_its_stderr() -> None:
    with pytest.raises(CommandFailed) as caught:
        process.tool(["sh", "-c", "seq 100000 >&2; echo the reason >&2; exit 3"])

    assert caught.value.returncode == 3
    assert caught.value.reason == "ended with status 3"
    assert len(caught.value.stderr) == 65536
    assert caught.value.stderr.endswith("100000\nthe reason\n")


def test_tool_may_end_with_a_status_that_is_ok() -> None:
    assert process.tool(["sh", "-c", "exit 24"], ok=(0, 24)).returncode == 24


def test_tool_that_a_signal_ends_says_so() -> None:
    with pytest.raises(CommandFailed, match="was ended by signal 9") as caught:
        process.tool(["sh", "-c", "kill -9 $$"])

    assert caught.value.returncode == -9


def test_tool_that_is_missing_is_to_be_installed() -> None:
    with pytest.raises(CommandFailed, match=r"no-such-tool cannot start: it is not in PATH .*; install") as caught:
        process.tool(["no-such-tool"])

    assert caught.value.returncode is None


def test_tool_without_sh_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sh", None)

    with pytest.raises(CommandFailed, match="the Python package 'sh' is missing; pip install"):
        process.tool(["true"])


@proc
def test_tool_that_takes_too_long_is_killed_with_its_group(tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $$ $! > {tmp_path}/pids; wait"

    with pytest.raises(CommandFailed, match=r"^sh ran longer than 0\.5 s$"):
        process.tool(["sh", "-c", script], timeout=0.5)

    leader, child = (tmp_path / "pids").read_text().split()
    with contextlib.suppress(ProcessLookupError):
        await_end(int(child))
    assert not alive(int(child))
    assert not alive(int(leader))


@proc
def test_tool_leaves_no_descriptor_and_no_zombie() -> None:
    process.tool(["true"])
    before = os.listdir("/proc/self/fd")

    for _ in range(10):
        process.tool(["sh", "-c", "cat"], input=b"x")

    assert os.listdir("/proc/self/fd") == before
    assert not has_zombie()


# starting a program


def test_no_thread_forks_while_a_program_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that it forked and that lives on would keep the pipe by which the start learns that the program runs."""
    forks: list[bool] = []
    start = subprocess.Popen

    def fork() -> None:
        forks.append(_process_posix._starting.acquire(blocking=False))
        if forks[-1]:
            _process_posix._starting.release()

    def popen(*args: object, **more: object) -> subprocess.Popen[bytes]:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        return start(*args, **more)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", popen)
    _process_posix._dying_with_us.cache_clear()
    run("true")
    _process_posix.detached(["true"], "/bin/true").wait()

    assert forks == [False] * (2 + bool(shutil.which("setpriv")))


# detach()


@proc
def test_detached_program_outlives_us_without_a_word(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = "import sys; from storebackends.process import detach; detach(['sh', '-c', sys.argv[1]])"
    detached = f"ps -o sid= -p $$; echo noise; read line < {fifo}; echo $line > {tmp_path}/got; echo > {fifo}"

    us = subprocess.run([sys.executable, "-W", "error", "-c", script, detached], capture_output=True, check=True)
    fifo.write_text("go\n")
    fifo.read_text()

    assert (us.stdout, us.stderr) == (b"", b"")
    assert (tmp_path / "got").read_text() == "go\n"


@proc
def test_detached_program_that_ends_first_leaves_no_zombie() -> None:
    process.detach(["true"])

    for thread in threading.enumerate():
        if thread.name == "wait for true":
            thread.join()

    assert not has_zombie()


def test_detached_program_that_is_missing_is_an_error() -> None:
    with pytest.raises(CommandFailed, match="no-such-program cannot start"):
        process.detach(["no-such-program"])
