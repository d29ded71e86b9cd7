"""The command line as a whole: exit codes, signals, help, and how little a start imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import storebackends
from storebackends.cli import cli
from tests.capabilities import PROJECT, needs
from tests.cli.host import Host
from tests.stores import WAIT, left_in_progress, until, writes

posix = needs("sh")


def commands(group: click.Group = cli, *names: str) -> Iterator[tuple[str, ...]]:
    """Every command, by the words that call it."""
    yield names
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name)


@pytest.mark.parametrize("names", [*commands()], ids=" ".join)
def test_every_command_has_help_with_an_example(names: tuple[str, ...]) -> None:
    said = CliRunner().invoke(cli, [*names, "--help"]).stdout

    assert " ".join(["storebackends", *names]) in said.partition("\n  Example")[2]


@needs("source")
def test_every_command_and_option_is_in_the_reference() -> None:
    page = (PROJECT / "docs" / "reference" / "cli.md").read_text()

    for names in commands():
        command: click.Command = cli
        for name in names:
            assert isinstance(command, click.Group)
            command = command.commands[name]
        if not command.hidden:
            assert f"`storebackends {' '.join(names)}".rstrip() in page
            for option in command.params:
                assert all(f"`{name}" in page for name in option.opts if isinstance(option, click.Option))


@needs("sh")
def test_a_start_imports_nothing_heavy() -> None:
    program = "import sys, storebackends.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()

    assert not {"rich", "pydantic", "pluggy", "platformdirs", "sh", "tarfile", "storebackends.recipe"} & set(loaded)


@posix
@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["run", "--", "false"], 1, "storebackends: build of 'run-"),
        (["run", "--", "no-such-program"], 1, "storebackends: build of 'run-"),
        (["nonsense"], 2, "No such command"),
        (["rm", "../base"], 2, "storebackends: '../base' cannot be an id"),
        (["rm", ""], 2, "storebackends: '' cannot be an id"),
        (["run", "--id", "con", "--", "true"], 2, "storebackends: 'con' cannot be an id"),
        (["--store", "onyl", "ls"], 2, "did you mean 'only'?"),
        (["ls", "--store", "onyl"], 2, "did you mean 'only'?"),
        (["result", "nothing"], 3, "storebackends: nothing is kept under 'nothing'"),
        (["rm", "base"], 3, "storebackends: 'base' is busy: 1 results are built on it"),
        (["run", "--base", "nothing", "--", "true"], 3, "storebackends: nothing is kept under 'nothing'"),
    ],
)
def test_an_error_is_a_message_and_an_exit_code(host: Host, argv: list[str], code: int, message: str) -> None:
    host("run", "--id", "base", "--", "true")
    host("run", "--id", "child", "--base", "base", "--", "true")

    said = host(*argv, code=code)

    assert message in said.err
    assert "Traceback" not in said.err
    assert host("ls").out.split() in (["base", "child"], ["child", "base"])


def test_a_wrong_configuration_is_reported_whole(host: Host) -> None:
    host.config.write_text('[stores.only]\npaht = "/x"\ndurability = "some"\n')

    said = host("ls", code=2)

    assert "stores.only.paht: is no known key; did you mean 'path'?" in said.err
    assert "stores.only.durability: " in said.err


def test_debug_shows_where_it_came_from(host: Host) -> None:
    assert "Traceback" in host("--debug", "result", "nothing", code=3).err


@needs("sh")
def test_what_could_steer_a_terminal_is_spelled_out(host: Host) -> None:
    recipe = host.recipe('[steps.a]\nfrom = "b\\u001b]0;title\\u0007"\nrun = "true"\n')

    said = host("build", recipe, code=2)

    assert "\x1b" not in said.err
    assert "\\x1b]0;title\\x07" in said.err


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_build_and_keeps_its_log(host: Host, name: str) -> None:
    with host.start("run", "--id", "long", "--", "sh", "-c", "echo begun; sleep 1000") as process:
        until(lambda: any(b"\nbegun\n" in log.read_bytes() for log in host.root.glob("in-progress/long~*/log")))
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=WAIT)

    assert process.returncode == 130
    assert err.decode() == "storebackends: interrupted\n"
    assert left_in_progress(host.root) == []
    assert host("ls").out == ""
    assert host("log", "long").out.endswith("\nbegun\n")


@posix
def test_a_reader_that_leaves_is_no_error(host: Host) -> None:
    host("run", "--id", "app", "--", "true")
    read, write = os.pipe()
    os.close(read)

    with host.start("ls", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=WAIT)

    assert process.returncode == 141
    assert err == b""


def test_the_last_barrier_is_left_to_a_process_that_outlives_the_command(host: Host) -> None:
    host.configure(durability="group")

    with host.start("run", "--id", "app", "--", sys.executable, "-c", "") as process:
        process.communicate(timeout=WAIT)

    assert process.returncode == 0
    until((host.root / "result" / "app" / "synced").exists)


def test_the_last_barrier_is_not_left_out_where_no_process_can_be_had(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.configure(durability="group")
    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(host.folder / "no-python"))

    host("run", "--id", "app", "--", python, "-c", "")

    assert (host.root / "result" / "app" / "synced").exists()


@needs("syncfs")
def test_sync_marks_what_reached_the_disk(host: Host, tmp_path: Path) -> None:
    with storebackends.open_store(backend="copy", path=host.root, durability="group") as store:
        store.build("app", writes(f="text")).release()
    (host.root / "result" / "app" / "synced").unlink()

    host("_sync", host.root)

    assert (host.root / "result" / "app" / "synced").exists()
    assert "vanished" in host("_sync", tmp_path / "no-store", code=2).err
