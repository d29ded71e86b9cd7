"""The guard at the end of a session is itself held to finding what it is for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests import leftovers
from tests.capabilities import PROJECT, needs


@needs("proc")
def test_a_child_and_a_grandchild_in_the_folder_are_found_until_they_end(tmp_path: Path) -> None:
    shell = ["sh", "-c", f"cd '{tmp_path}'; env -i cat & echo $!; exec cat >/dev/null"]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())

        holding = {pid for pid, _ in leftovers.holders(tmp_path)}
        child.communicate()

    assert holding >= {child.pid}
    assert child.pid not in dict(leftovers.holders(tmp_path))
    assert not any(str(grandchild) in line for line in leftovers.below(tmp_path, patience=0))


@needs("tmpfs")
def test_a_mount_is_found_while_it_is_there(
    tmp_path: Path, small_tmpfs: Callable[..., AbstractContextManager[Path]]
) -> None:
    with small_tmpfs() as mount:
        during = leftovers.below(tmp_path, patience=0)

    assert f"mount {mount}" in during
    assert not any("mount" in line for line in leftovers.below(tmp_path, patience=0))


@needs("ext4")
def test_a_loop_device_is_found_while_it_is_there(
    tmp_path: Path, loop_fs: Callable[..., AbstractContextManager[Path]]
) -> None:
    with loop_fs("ext4", size=16 << 20) as mount:
        during = leftovers.below(tmp_path, patience=0)

    assert any(line.startswith("loop device") and str(mount.parent / "image") in line for line in during)
    assert not any("loop device" in line for line in leftovers.below(tmp_path, patience=0))


@needs("proc")
def test_a_session_whose_test_forgets_a_process_fails_and_names_it(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_forgetful.py").write_text(
        "import subprocess, os\n"
        "def test_forgetful():\n"
        "    reading, writing = os.pipe()\n"
        "    os.set_inheritable(writing, True)\n"
        "    pid = subprocess.Popen(['cat'], stdin=reading).pid\n"
    )
    for name in ("__init__", "conftest", "capabilities", "containerd", "dockerd", "leftovers"):
        (tests / f"{name}.py").write_text((Path(__file__).parent / f"{name}.py").read_text())
    (tmp_path / "pyproject.toml").write_text((PROJECT / "pyproject.toml").read_text())

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "ignore", f"--basetemp={tmp_path / 'base'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "1 passed, 1 error" in done.stdout
    assert "(cat): a child of the tests" in done.stdout
