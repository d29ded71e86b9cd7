from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storebackends import renames, trees
from storebackends.errors import StoreError
from tests.capabilities import needs

PATIENCE = 60


@contextmanager
def opened(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that has *file* open until its stdin ends."""
    script = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout
        assert program.stdout.readline() == "open\n"
        yield program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")
    return tmp_path / "folder"


@needs("windows")
def test_windows_refuses_to_rename_a_folder_with_an_open_file(folder: Path) -> None:
    """The canary: where this rule is off, as on plain Wine, no test of what obeys it says anything."""
    with (folder / "file").open(), pytest.raises(PermissionError) as refusal:
        os.rename(folder, folder.with_name("new"))

    assert getattr(refusal.value, "winerror", None) == 5


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a call was refused, and is to be tried again."""
    event = threading.Event()
    sleep = time.sleep

    def pause(seconds: float) -> None:
        event.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", pause)
    return event


@needs("windows")
def test_a_rename_waits_for_a_program_that_lets_go(folder: Path, refused: threading.Event) -> None:
    with opened(folder / "file") as program:
        assert program.stdin
        rename = threading.Thread(target=renames.rename, args=(folder, folder.with_name("new")), daemon=True)
        rename.start()
        assert refused.wait(PATIENCE)
        program.stdin.close()
        rename.join(PATIENCE)

    assert not folder.exists()
    assert (folder.with_name("new") / "file").read_text() == "content"


@needs("windows")
def test_a_removal_waits_for_a_program_that_lets_go(folder: Path, refused: threading.Event) -> None:
    with opened(folder / "file") as program:
        assert program.stdin
        removal = threading.Thread(target=trees.remove, args=(folder,), daemon=True)
        removal.start()
        assert refused.wait(PATIENCE)
        program.stdin.close()
        removal.join(PATIENCE)

    assert not folder.exists()


@needs("windows")
def test_a_program_that_keeps_a_file_open_is_to_be_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "LIMIT", 0.0)

    with opened(folder / "file"), pytest.raises(StoreError, match=f"{re.escape(str(folder))}.*Resource Monitor"):
        renames.rename(folder, folder.with_name("new"))

    assert (folder / "file").read_text() == "content"


def test_what_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        renames.rename(tmp_path / "nothing", tmp_path / "new")
