"""Programs of the tests' own, in the place of those that a machine lacks."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest


def stand_in(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the Python *script* a program called *name* in *folder*, which becomes the first on PATH."""
    folder.mkdir(exist_ok=True)
    if sys.platform == "win32":
        (folder / f"{name}.exe").write_bytes(_executable(script))
    else:
        (folder / name).write_text(f"#!{sys.executable}\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def _executable(script: str) -> bytes:
    """As pip makes them: a launcher, the interpreter that it is to start, and an archive with what that is to run."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("__main__.py", script)
    launcher = resources.files("distlib").joinpath("t64.exe").read_bytes()
    return launcher + f"#!{sys.executable}\r\n".encode() + archive.getvalue()
