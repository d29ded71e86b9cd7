"""A store with many results: opening it, and listing them."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from storebackends.records import Record
from tests.stores import open_copy

from .harness import Case, milliseconds, scratch

RESULTS = 100_000


def cases() -> Iterator[Case]:
    """Opening and closing it beside a look at each entry; the first line of `ls` beside the last."""
    with scratch() as folder:
        root = folder / "store"
        open_copy(root).close()
        fill(root, RESULTS)
        yield Case(
            f"open a store of {RESULTS} results",
            milliseconds(lambda: open_copy(root).close()),
            milliseconds(lambda: _look(root / "result")),
            "scandir, and stat of each entry",
            at_most=2,
            rounds=7,
        )
        config = folder / "config.toml"
        options = f'backend = "copy"\ndurability = "none"\npath = {json.dumps(str(root))}'
        config.write_text(f'default = "it"\n[stores.it]\n{options}\n')
        environment = {**os.environ, "STOREBACKENDS_CONFIG": str(config)}
        yield Case(
            f"storebackends ls, of {RESULTS}: its first line",
            lambda: _list(environment, lines=1),
            lambda: _list(environment),
            "its last line",
            at_most=0.75,
            rounds=5,
        )


def fill(root: Path, results: int) -> None:
    """Put results into the store as builds would have, but for their rows in the index."""
    for number in range(results):
        id = f"app-{number}"
        entry = f"{root}/result/{id}"
        os.makedirs(f"{entry}/rootfs")
        Record(id, "attempt", started=1.0, finished=2.0, outcome="built", log_length=0).save(f"{entry}/build.json")
        os.close(os.open(f"{entry}/log", os.O_WRONLY | os.O_CREAT))


def _look(results: Path) -> None:
    with os.scandir(results) as entries:
        for entry in entries:
            os.stat(entry.path)


def _list(environment: dict[str, str], lines: int = RESULTS) -> float:
    """Milliseconds from the start of the command to so many lines."""
    command = [os.path.join(sysconfig.get_path("scripts"), "storebackends"), "ls"]
    before = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        found = sum(1 for _ in zip(range(lines), child.stdout, strict=False))
        took = time.perf_counter() - before
        child.stdout.read()
    assert found == lines
    return 1e3 * took
