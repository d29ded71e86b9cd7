"""Processes with threads that do at random all a store can do, on ids they share; see tests/stress."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.capabilities import needs

pytestmark = [needs("proc", "fork"), pytest.mark.slow]


class Kind(NamedTuple):
    """A backend with its options. A later one joins by a line below, with the abilities that it needs."""

    backend: str
    options: Mapping[str, Any] = MappingProxyType({})


RSYNC = needs("rsync")
KINDS = [
    pytest.param(Kind("copy"), id="copy"),
    pytest.param(Kind("rsync", {"mode": "copy"}), id="rsync-copy", marks=RSYNC),
    pytest.param(Kind("rsync", {"mode": "hardlink"}), id="rsync-hardlink", marks=RSYNC),
    pytest.param(Kind("rsync", {"mode": "hardlink_unsafe"}), id="rsync-hardlink_unsafe", marks=RSYNC),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


def stress(kind: Kind, folder: Path, rng: random.Random, *arguments: str) -> None:
    """Run it in a process of its own and show what it says; a test that is given up takes the workers with it."""
    seed = str(rng.getrandbits(32))
    command = [sys.executable, "-m", "tests.stress", "--root", str(folder), "--seed", seed, "--backend", kind.backend]
    with subprocess.Popen(
        [*command, "--options", json.dumps(dict(kind.options)), *arguments],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        try:
            status = running.wait()
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    assert status == 0, "it is told above what went wrong; the seed there repeats the plan"


@every_kind
def test_whatever_many_processes_and_threads_do_at_once_all_is_whole_and_nothing_is_left(
    kind: Kind, tmp_path: Path, rng: random.Random
) -> None:
    stress(kind, tmp_path, rng, "--calls", "8")


def test_builders_that_are_killed_cost_nobody_else_anything(tmp_path: Path, rng: random.Random) -> None:
    stress(Kind("copy"), tmp_path, rng, "--kills", "8", "--durability", "group")


@pytest.mark.soak
@every_kind
def test_a_minute_of_it(kind: Kind, tmp_path: Path, rng: random.Random) -> None:
    stress(kind, tmp_path, rng, "--seconds", "60")


@pytest.mark.soak
@every_kind
def test_500_kills(kind: Kind, tmp_path: Path, rng: random.Random) -> None:
    stress(kind, tmp_path, rng, "--kills", "500", "--durability", "group")
