"""Processes with threads that do at random all a store can do, on ids they share; see tests/stress."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.capabilities import MIB, loop_fs, needs, run, small_tmpfs

pytestmark = [needs("proc", "fork"), pytest.mark.slow]


class Kind(NamedTuple):
    """A backend with its options. A later one joins by a line below, with the abilities that it needs."""

    backend: str
    options: Mapping[str, Any] = MappingProxyType({})
    on: str = ""  # a file system of its own, where that of the temporary folder may not do
    calls: int = 8  # of each thread in the short run; fewer where each starts programs


RSYNC = needs("rsync")
COPY = pytest.param(Kind("copy"), id="copy")
OVERLAY = pytest.param(Kind("overlay", {"depth": 2}, on="tmpfs"), id="overlay", marks=needs("overlay", "tmpfs"))
BTRFS = pytest.param(Kind("btrfs", on="btrfs"), id="btrfs", marks=needs("btrfs", "btrfsutil"))
KINDS = [
    BTRFS,
    COPY,
    OVERLAY,
    pytest.param(
        Kind("hcs", {"snapshotter": "overlayfs"}, calls=2), id="hcs-overlayfs", marks=needs("containerd", "overlay")
    ),
    pytest.param(Kind("hcs", {"snapshotter": "native"}, calls=2), id="hcs-native", marks=needs("containerd")),
    pytest.param(Kind("hcs", {"snapshotter": "btrfs"}, calls=2), id="hcs-btrfs", marks=needs("containerd", "btrfs")),
    pytest.param(Kind("rsync", {"mode": "copy"}), id="rsync-copy", marks=RSYNC),
    pytest.param(Kind("rsync", {"mode": "hardlink"}), id="rsync-hardlink", marks=RSYNC),
    pytest.param(Kind("rsync", {"mode": "hardlink_unsafe"}), id="rsync-hardlink_unsafe", marks=RSYNC),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def folder(kind: Kind, tmp_path: Path) -> Iterator[Path]:
    """Where stores of that kind can be. In the end a btrfs has no subvolume: all that the stores made were deleted."""
    if kind.on == "tmpfs":
        with small_tmpfs(tmp_path, 1024 * MIB) as mount:
            yield mount
    elif kind.on == "btrfs":
        with loop_fs("btrfs", tmp_path, 2048 * MIB) as mount:
            yield mount
            assert run("btrfs", "subvolume", "list", mount) == ""
    else:
        yield tmp_path


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
    kind: Kind, folder: Path, rng: random.Random
) -> None:
    stress(kind, folder, rng, "--calls", str(kind.calls))


@pytest.mark.parametrize("kind", [BTRFS, COPY, OVERLAY])
def test_builders_that_are_killed_cost_nobody_else_anything(kind: Kind, folder: Path, rng: random.Random) -> None:
    stress(kind, folder, rng, "--kills", "8", "--durability", "group")


@pytest.mark.soak
@every_kind
def test_a_minute_of_it(kind: Kind, folder: Path, rng: random.Random) -> None:
    stress(kind, folder, rng, "--seconds", "60")


@pytest.mark.soak
@every_kind
def test_500_kills(kind: Kind, folder: Path, rng: random.Random) -> None:
    stress(kind, folder, rng, "--kills", "500", "--durability", "group")
