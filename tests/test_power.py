"""Power cuts at random moments, on every file system that a store is likely to be on; see tests/power."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import count, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.capabilities import MIB, loop_fs, needs
from tests.power.checker import Checker, unfinished
from tests.power.machine import Machine
from tests.power.worker import Host
from tests.stores import until

pytestmark = [needs("xfs", "tmpfs"), pytest.mark.slow]
LONGEST = 1.5
"""Seconds from the first work of a boot to its end, at most."""
Mounted = Callable[..., AbstractContextManager[Path]]


class Kind(NamedTuple):
    """A backend with its options, on a file system. A later one joins by a line below."""

    backend: str
    fs: str
    options: Mapping[str, Any] = MappingProxyType({})


KINDS = [
    *(pytest.param(Kind("copy", fs), id=f"copy-{fs}", marks=needs(fs)) for fs in ("ext4", "xfs", "btrfs")),
    pytest.param(Kind("overlay", "ext4"), id="overlay-ext4", marks=needs("overlay", "ext4")),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize("durability", ["full", "group"])


@pytest.fixture
def ground(small_tmpfs: Mounted) -> Iterator[Path]:
    """Where machines stand: an XFS in memory, since what is cut is the machine and not what it stands on."""
    with small_tmpfs(size=4096 * MIB) as memory, loop_fs("xfs", memory, 2048 * MIB) as folder:
        yield folder


@every_mode
@every_kind
def test_a_power_cut_costs_nothing_that_was_promised(
    kind: Kind, durability: str, ground: Path, tmp_path: Path, rng: random.Random
) -> None:
    cut_often(kind, durability, 5, ground, tmp_path, rng)


@pytest.mark.soak
@every_mode
@every_kind
def test_50_power_cuts(kind: Kind, durability: str, ground: Path, tmp_path: Path, rng: random.Random) -> None:
    cut_often(kind, durability, 50, ground, tmp_path, rng)


@every_kind
def test_without_durability_the_same_cuts_do_cost_something(
    kind: Kind, ground: Path, tmp_path: Path, rng: random.Random
) -> None:
    """So the tests above can fail."""
    with cuts(kind, "none", ground, Checker(tmp_path / "journal"), rng) as boots:
        found = next((problems for problems in islice(boots, 20) if problems), [])

    print(*found, sep="\n")
    assert found


def cut_often(kind: Kind, durability: str, times: int, ground: Path, tmp_path: Path, rng: random.Random) -> None:
    checker = Checker(tmp_path / "journal", synced_only=durability == "group")
    with cuts(kind, durability, ground, checker, rng) as boots:
        problems = [f"boot {n}: {problem}" for n, found in enumerate(islice(boots, times)) for problem in found]

    print(
        f"{checker.promises} promises, {checker.wholes} whole, {checker.losses} lost that were not promised",
        *problems,
        sep="\n",
    )
    assert problems == []
    assert checker.promises >= times, "too little was promised for this to mean anything"


def cuts(
    kind: Kind, durability: str, ground: Path, checker: Checker, rng: random.Random
) -> AbstractContextManager[Iterator[list[str]]]:
    """What is wrong after each of any number of power cuts, one after the other on the same disk."""
    machine = Machine(kind.fs, ground)

    def boots() -> Generator[list[str], None, None]:
        problems: list[str] = []
        for boot in count():
            host = Host(kind.backend, dict(kind.options), durability, f"boot-{boot}")
            with machine.boot() as disk:
                root = disk / "store"
                if boot:
                    yield problems + look(host, root, checker)
                with working(host, root, checker.journal, rng.getrandbits(32)):
                    threading.Event().wait(rng.uniform(0, LONGEST))
                    checker.before_cut()
                    machine.cut(cache_lost=rng.random() < 0.5)
                problems = checker.after_cut()

    return closing(boots())


def look(host: Host, root: Path, checker: Checker) -> list[str]:
    """Open the store as after a restart: all that is wrong, and what is left."""
    with host.open(root) as store:
        problems = [*checker.look(store)]
    return problems + [f"{name} is left" for name in unfinished(root)]


@contextmanager
def working(host: Host, root: Path, journal: Path, seed: int) -> Iterator[None]:
    """Builders at work in a process of its own, killed at the end of the block."""
    before = journal.stat().st_size if journal.exists() else 0
    facts = [str(root), host.backend, json.dumps(host.options), host.durability, host.boot, str(journal), str(seed)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.power.worker", *facts], stdin=subprocess.PIPE, start_new_session=True
    ) as running:
        try:
            until(lambda: journal.exists() and journal.stat().st_size > before)
            yield
            assert running.poll() is None, "it ended by itself; what it says is above"
        finally:
            os.killpg(running.pid, signal.SIGKILL)
