"""What holds for the whole suite: skips by ability, seeds, no host configuration, and nothing left behind."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import capabilities, leftovers
from tests.containerd import Daemon, running
from tests.dockerd import Dockerd, dockerd

# One seed for all that is random here, Hypothesis included; the header shows it.
SEED = int(os.environ.get("STOREBACKENDS_SEED") or random.SystemRandom().getrandbits(32))

# No deadline and no health check of speed: other work may share the machine.
settings.register_profile("dev", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), max_examples=50)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header() -> str:
    return f"seed: {SEED} (STOREBACKENDS_SEED={SEED} repeats it)"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share, shares = map(int, os.environ.get("STOREBACKENDS_SHARE", "1/1").split("/"))  # of a run in several machines
    items[:] = items[share - 1 :: shares]
    for item in items:
        mounts = {"loop_fs", "overlay2", "small_tmpfs", "vfs"} & set(getattr(item, "fixturenames", ()))
        if mounts or any(capabilities.root_only(name) for name in _needs(item)):
            item.add_marker("root")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root"):
        capabilities.require("root")
    capabilities.require(*_needs(item))


def _needs(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("needs") for name in mark.args]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what did not run here, by reason: CI shows what a machine could not test."""
    skipped = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if skipped:
        terminalreporter.section("skipped here, and why")
    for reason, count in sorted(skipped.items()):
        terminalreporter.write_line(f"{count:5}  {reason}")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the run, at its last test, if any test forgot a process, a mount or a loop device."""
    yield
    left = leftovers.below(tmp_path_factory.getbasetemp())
    assert not left, "left behind by the tests (a path names its test):\n" + "\n".join(left)


@pytest.fixture(scope="session", autouse=True)
def _no_host_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests from the stores and the configuration of whoever runs them."""
    own = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STOREBACKENDS_CONFIG", raising=False)
        patch.setenv("XDG_CONFIG_HOME", str(own / "config"))
        patch.setenv("XDG_CACHE_HOME", str(own / "cache"))
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test's own, the same again for the same seed."""
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture
def loop_fs(tmp_path: Path) -> Callable[..., AbstractContextManager[Path]]:
    """`with loop_fs("xfs", size=512 << 20) as folder:`, below tmp_path; skips where that cannot be had."""

    def make(kind: str, size: int = 512 * capabilities.MIB) -> AbstractContextManager[Path]:
        capabilities.require(kind)
        return capabilities.loop_fs(kind, tmp_path, size)

    return make


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Callable[..., AbstractContextManager[Path]]:
    """`with small_tmpfs(size=16 << 20, nr_inodes=100) as folder:`, below tmp_path; skips where mounts are refused."""
    capabilities.require("tmpfs")
    return partial(capabilities.small_tmpfs, tmp_path)


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A containerd for all tests of the run; a ctr that is not told another address finds it."""
    capabilities.require("containerd")
    with running(tmp_path_factory.mktemp("containerd")) as daemon, pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERD_ADDRESS", daemon.address)
        yield daemon


@pytest.fixture(autouse=True)
def _daemons(request: pytest.FixtureRequest) -> None:
    """What needs a containerd finds it running."""
    if "containerd" in _needs(request.node):
        request.getfixturevalue("containerd")


@pytest.fixture(scope="session")
def overlay2(_nothing_left_behind: None) -> Iterator[Dockerd]:
    """A Docker daemon with that storage driver, one for all tests."""
    capabilities.require("docker")
    with dockerd("overlay2") as daemon:
        yield daemon


@pytest.fixture(scope="session")
def vfs(_nothing_left_behind: None) -> Iterator[Dockerd]:
    """As overlay2, with the driver that copies whatever it mounts."""
    capabilities.require("docker")
    with dockerd("vfs") as daemon:
        yield daemon
