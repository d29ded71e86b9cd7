"""A host of its own for a test of the command line: one configured store, and ways to call `storebackends` there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from storebackends.cli import cli


class Said(NamedTuple):
    """What a command said."""

    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Host:
    """Called, it runs a command in this process, and checks its exit code."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.config = folder, folder / "store", folder / "config.toml"
        self.configure()

    def configure(self, **options: str) -> None:
        """Configure the one store, by default as one whose durability costs nothing."""
        table = {"path": str(self.root), "durability": "none"} | options
        lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.config.write_text("\n".join(["[stores.only]", *lines]))

    def __call__(self, *argv: str | Path, code: int = 0) -> Said:
        done = CliRunner().invoke(cli, [str(word) for word in argv], env={"STOREBACKENDS_CONFIG": str(self.config)})
        assert done.exit_code == code, f"{argv} ended with {done.exit_code}: {done.output}"
        return Said(done.stdout, done.stderr)

    @contextmanager
    def start(
        self, *argv: str | Path, stdout: int = subprocess.PIPE, **options: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a command as its users do, in a process and a session of its own; a test that fails leaves none."""
        environment = os.environ | {"STOREBACKENDS_CONFIG": str(self.config), "TERM": "xterm", "COLUMNS": "100"}
        with subprocess.Popen(
            [sys.executable, "-m", "storebackends", *argv],
            stdout=stdout,
            stderr=options.pop("stderr", subprocess.PIPE),
            stdin=options.pop("stdin", subprocess.DEVNULL),
            env=environment,
            start_new_session=True,
            **options,
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # does nothing to one that was waited for

    def recipe(self, text: str) -> Path:
        """Write a recipe whose steps run on the host, so that no test here needs bubblewrap."""
        path = self.folder / "recipe.toml"
        path.write_text(f'[recipe]\nsandbox = "host"\nsource = "source"\n{text}')
        (self.folder / "source").mkdir(exist_ok=True)
        return path
