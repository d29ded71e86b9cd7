"""How long a start takes: what a user waits for before anything else."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .harness import Case, Figure, milliseconds


def cases() -> Iterator[Case]:
    """The command's help beside the import of the library it is made with, and the package's import beside nothing."""
    command = Path(sysconfig.get_path("scripts")) / "storebackends"
    click = _python("import click")
    yield Case("storebackends --help", _run(command, "--help"), click, "python -c 'import click'", at_most=2)
    yield Case("import storebackends", _python("import storebackends"), _python("pass"), "python -c pass")


def _python(code: str) -> Figure:
    return _run(sys.executable, "-c", code)


def _run(*argv: str | Path) -> Figure:
    return milliseconds(lambda: subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
