"""How long a start takes: what a user waits for before anything else."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from .harness import Case


def cases() -> list[Case]:
    """The command's help beside the import of the library it is made with, and the package's import beside nothing."""
    command = Path(sysconfig.get_path("scripts")) / "storebackends"
    return [
        Case("storebackends --help", _run(command, "--help"), _python("import click"), "import click", gate=2),
        Case("import storebackends", _python("import storebackends"), _python("pass"), "bare python"),
    ]


def _python(code: str) -> Callable[[], object]:
    return _run(sys.executable, "-c", code)


def _run(*argv: str | Path) -> Callable[[], object]:
    return lambda: subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
