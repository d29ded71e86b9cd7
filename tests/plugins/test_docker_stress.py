"""The stress test on `docker`, with each storage driver of its daemon."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.capabilities import needs
from tests.dockerd import Dockerd
from tests.test_stress import Kind, stress

pytestmark = [needs("docker", "fork", "proc"), pytest.mark.slow]


@pytest.fixture(params=["overlay2", "vfs"])
def daemon(request: pytest.FixtureRequest) -> Dockerd:
    found: Dockerd = request.getfixturevalue(request.param)
    return found


def kind(daemon: Dockerd) -> Kind:
    return Kind("docker", {"host": daemon.host, "access": "host"})


def test_whatever_many_processes_and_threads_do_at_once(daemon: Dockerd, tmp_path: Path, rng: random.Random) -> None:
    stress(kind(daemon), tmp_path, rng, "--calls", "4", "--processes", "4")


@pytest.mark.soak
def test_a_minute_of_it(daemon: Dockerd, tmp_path: Path, rng: random.Random) -> None:
    stress(kind(daemon), tmp_path, rng, "--seconds", "60")


@pytest.mark.soak
def test_50_kills(daemon: Dockerd, tmp_path: Path, rng: random.Random) -> None:
    stress(kind(daemon), tmp_path, rng, "--kills", "50", "--durability", "group")
