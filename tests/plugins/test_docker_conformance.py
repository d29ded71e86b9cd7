"""The conformance kit, run on `docker`: with folders of this host, and through containers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from storebackends.backend import Backend
from storebackends.testing import BackendConformance, Caches, Fidelity, Harness, Life, Logs, Processes, Roots
from storebackends.testing.trees import FEATURES
from tests.capabilities import needs
from tests.dockerd import IMAGE, Dockerd

pytestmark = [needs("docker"), pytest.mark.slow]


class Docker(Harness):
    name = "docker"
    fixed: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def daemon(self, overlay2: Dockerd) -> Dockerd:
        return overlay2

    @pytest.fixture(autouse=True)
    def _use(self, daemon: Dockerd) -> None:
        self._dockerd = daemon
        type(self).options = {"host": daemon.host, **self.fixed}

    def leftovers(self, root: Path) -> list[str]:
        """Also the containers, and the volumes but those of what is kept."""
        kept = [*root.glob("result/*/tree.json"), *root.glob("caches/*/*/tree.json")]
        named = {json.loads(path.read_bytes())["volume"] for path in kept}
        uuid = json.loads((root / "store.json").read_bytes())["uuid"]
        there = {*self._dockerd.volumes(), *self._dockerd.containers()}
        return super().leftovers(root) + sorted(name for name in there - named if uuid in name)


class TestOnTheHost(Docker, BackendConformance):
    fixed: ClassVar = {"access": "host"}

    @pytest.mark.soak  # a hundred openings, each of which asks the daemon five times
    def test_whatever_is_done_the_store_agrees_with_the_disk(self, area: Path) -> None:
        """Case 15."""
        super().test_whatever_is_done_the_store_agrees_with_the_disk(area)


@pytest.mark.soak  # volumes are what they are with any driver
class TestOnTheHostWithVfs(Docker, BackendConformance):
    fixed: ClassVar = {"access": "host"}

    @pytest.fixture
    def daemon(self, vfs: Dockerd) -> Dockerd:
        return vfs


class ThroughContainers(Docker):
    """On vfs, which copies an image's whole tree for each container."""

    fixed: ClassVar = {"access": "container", "image": IMAGE}

    @pytest.fixture
    def daemon(self, vfs: Dockerd) -> Dockerd:
        return vfs


class TestThroughContainers(ThroughContainers, Life, Fidelity):
    # A container takes half a second, and these take dozens.

    @pytest.mark.soak
    @pytest.mark.parametrize("feature", FEATURES)
    def test_a_clone_keeps(self, backend: Backend, root: Path, feature: str) -> None:
        """Case 16; all of it together is no soak."""
        super().test_a_clone_keeps(backend, root, feature)

    @pytest.mark.soak
    def test_a_rename_killed_at_any_step_leaves_a_whole_result_or_none(self, backend: Backend, root: Path) -> None:
        """Case 6."""
        super().test_a_rename_killed_at_any_step_leaves_a_whole_result_or_none(backend, root)

    @pytest.mark.soak
    def test_a_clone_killed_at_any_step_is_found_and_removed(self, backend: Backend, root: Path) -> None:
        """Case 8."""
        super().test_a_clone_killed_at_any_step_is_found_and_removed(backend, root)

    @pytest.mark.soak
    def test_a_delete_killed_at_any_step_shows_nothing_or_a_whole_result(self, backend: Backend, root: Path) -> None:
        """Case 13."""
        super().test_a_delete_killed_at_any_step_shows_nothing_or_a_whole_result(backend, root)


@pytest.mark.soak
class TestWhatElseGoesThroughContainers(ThroughContainers, Logs, Caches, Processes, Roots):
    pass
