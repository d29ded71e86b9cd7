"""Programs on Windows: what job objects promise. The commands are Python, as no other program can be counted on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storebackends import process
from storebackends.backend import Command
from storebackends.errors import CommandFailed, NotSupported
from storebackends.process import Cancel, Interrupted
from tests.capabilities import needs
from tests.stores import until

pytestmark = needs("windows")

# Starts a grandchild that holds the file open, so that it cannot be removed while that runs.
HOLDS = "import sys, time; file = open(sys.argv[1], 'w'); print('held', flush=True); time.sleep(1000)"
STARTS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}, sys.argv[1]])"


@pytest.fixture
def cancel() -> Iterator[Cancel]:
    cancel = Cancel()
    yield cancel
    cancel.close()


@pytest.fixture
def said() -> bytearray:
    return bytearray()


def python(program: str, *arguments: str | Path, user: str | None = None) -> Command:
    argv = [sys.executable, "-c", program, *map(str, arguments)]
    return Command(argv, {**process.environment("home", "tmp"), "PYTHONPATH": os.environ["PYTHONPATH"]}, None, user)


def test_output_of_both_streams_comes_whole(cancel: Cancel, said: bytearray) -> None:
    program = "import sys; sys.stdout.write('o' * 300_000); sys.stdout.flush(); sys.stderr.write('e' * 300_000)"

    done = process.run(python(program), output=said.extend, cancelled=cancel)

    assert done.returncode == 0
    assert (said.count(b"o"), said.count(b"e"), len(said)) == (300_000, 300_000, 600_000)


def test_input_is_read_and_captured_output_kept_apart(cancel: Cancel, said: bytearray) -> None:
    program = "import sys; print(sys.stdin.read().upper()); print('aside', file=sys.stderr); sys.exit(3)"

    done = process.run(python(program), output=said.extend, cancelled=cancel, input=b"words", capture=True)

    assert (done.returncode, done.stdout.split(), bytes(said).split()) == (3, [b"WORDS"], [b"aside"])


def test_all_that_a_late_command_started_is_dead(cancel: Cancel, said: bytearray, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="longer than"):
        process.run(python(STARTS, tmp_path / "held"), output=said.extend, cancelled=cancel, timeout=5)

    (tmp_path / "held").unlink(missing_ok=True)  # PermissionError if anybody had it open


def test_all_that_a_cancelled_command_started_is_dead(cancel: Cancel, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        process.run(python(STARTS, tmp_path / "held"), output=lambda data: cancel.set(), cancelled=cancel)

    (tmp_path / "held").unlink()


def test_a_command_dies_with_its_builder(tmp_path: Path) -> None:
    builder = """if True:
        import sys
        from tests.test_process_windows import STARTS, python
        from storebackends import process
        command = python(STARTS, sys.argv[1])
        process.run(command, output=lambda data: print("going", flush=True), cancelled=process.Cancel())
        """
    with subprocess.Popen(
        [sys.executable, "-c", builder, str(tmp_path / "held")], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout
        assert running.stdout.readline().split() == [b"going"]
        running.kill()

    def is_free() -> bool:
        try:
            (tmp_path / "held").unlink()
        except PermissionError:
            return False
        return True

    until(is_free)


def test_another_user_is_refused(cancel: Cancel, said: bytearray) -> None:
    with pytest.raises(NotSupported, match="setuid"):
        process.run(python("", user="somebody"), output=said.extend, cancelled=cancel)


def test_a_program_that_is_missing_is_to_be_installed(cancel: Cancel, said: bytearray) -> None:
    with pytest.raises(CommandFailed, match="not in PATH"):
        process.run(Command(["no-such-program"], {"PATH": ""}, None), output=said.extend, cancelled=cancel)


def test_a_tool_is_run_without_sh() -> None:
    done = process.tool([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr)"])

    assert (done.stdout.split(), done.stderr.split()) == ([b"out"], [b"err"])
    assert "sh" not in sys.modules


def test_a_tool_that_fails_keeps_its_stderr() -> None:
    with pytest.raises(CommandFailed, match="reason") as caught:
        process.tool([sys.executable, "-c", "import sys; sys.exit('the reason')"])

    assert caught.value.returncode == 1
