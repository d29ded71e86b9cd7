"""What is shown while things are built, on a terminal and off it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.host import Host
from tests.stores import WAIT

pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
assert sys.platform != "win32"


class Terminal:
    """The outer end of a terminal on which a command runs."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.seen = b""

    def read_until(self, ready: Callable[[bytes], bool]) -> bytes:
        """All that was written so far, once it is *ready*; what comes after the last writer is gone is the end."""
        while not ready(self.seen):
            assert select.select([self._fd], [], [], WAIT)[0], f"nothing more came after {self.seen!r}"
            try:
                self.seen += os.read(self._fd, 65536)
            except OSError:  # EIO: nobody has the other end open any more
                break
        return self.seen


@contextmanager
def on_terminal(host: Host, *argv: str | Path) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    outer, inner = pty.openpty()
    try:
        with host.start(*argv, stdout=inner, stderr=inner) as process:
            os.close(inner)
            yield Terminal(outer), process
            process.wait(WAIT)
    finally:
        os.close(outer)


def waiting_recipe(host: Host) -> tuple[Path, Path]:
    """A recipe of two steps, the second of which waits for a file; and that file."""
    go = host.folder / "go"
    text = f"""
        [steps.quick]
        run = "true"
        [steps.slow]
        run = '''printf 'line\\033[31m-red\\033]0;title\\007\\n'
        while [ ! -e {go} ]; do sleep 0.02; done'''
    """
    return host.recipe(text), go


def test_on_a_terminal_the_running_step_is_shown_with_the_end_of_its_log(host: Host) -> None:
    recipe, go = waiting_recipe(host)

    with on_terminal(host, "build", recipe) as (terminal, process):
        while_running = terminal.read_until(lambda seen: b"> slow" in seen and b"line-red" in seen)
        go.touch()
        everything = terminal.read_until(lambda seen: False)

    assert process.returncode == 0
    assert b"+ quick" in while_running
    assert b"+ slow" not in while_running
    assert b"+ slow" in everything
    assert b": 2 built\r\n" in everything
    assert b"\x1b]0;" not in everything
    assert everything.endswith(b"\r\n")


def test_on_a_terminal_a_failed_step_leaves_the_end_of_its_log(host: Host) -> None:
    recipe = host.recipe('[steps.bad]\nrun = "echo reason; exit 1"\n')

    with on_terminal(host, "build", recipe) as (terminal, process):
        everything = terminal.read_until(lambda seen: False)

    assert process.returncode == 1
    shown = [everything.rindex(text) for text in (b"  reason\x1b[0m\r\n", b"x bad", b"storebackends: build of")]
    assert shown == sorted(shown)


def test_on_a_terminal_an_interrupt_leaves_the_cursor_as_it_was(host: Host) -> None:
    recipe, _ = waiting_recipe(host)

    with on_terminal(host, "build", recipe) as (terminal, process):
        terminal.read_until(lambda seen: b"line-red" in seen)
        process.terminate()
        everything = terminal.read_until(lambda seen: False)

    assert process.returncode == 130
    assert everything.rindex(b"\x1b[?25h") > everything.rindex(b"\x1b[?25l")
    assert everything.endswith(b"storebackends: interrupted\r\n")


@pytest.mark.parametrize("to_json", [False, True])
def test_off_a_terminal_there_are_plain_lines_as_they_come(host: Host, to_json: bool) -> None:
    recipe, go = waiting_recipe(host)

    with host.start("build", recipe, *(["--json"] if to_json else [])) as process:
        lines = process.stderr if to_json else process.stdout
        assert lines is not None
        while b"line-red" not in (line := lines.readline()):
            assert line
        go.touch()
        out, err = process.communicate(timeout=WAIT)

    assert process.returncode == 0
    assert b"\x1b" not in line + out + err
    assert b"<- slow: built in " in (err if to_json else out)


def test_what_the_encoding_of_stdout_lacks_is_spelled_out(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")

    with host.start("run", "--", "printf", r"\303\274 \346\274\242") as process:
        out, err = process.communicate(timeout=WAIT)

    assert (process.returncode, err) == (0, b"")
    assert b"   \xfc \\u6f22\n" in out


def test_a_reader_that_leaves_does_not_stop_the_step_that_runs(host: Host) -> None:
    recipe, go = waiting_recipe(host)

    with host.start("build", recipe) as process:
        assert process.stdout is not None
        while b"$ printf" not in (line := process.stdout.readline()):
            assert line
        process.stdout.close()
        go.touch()
        process.wait(WAIT)

    assert process.returncode == 141
    assert len(host("ls").out.split()) == 2
