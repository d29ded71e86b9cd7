"""The conformance kit, run on `docker`: with folders of this host, and through containers only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import needs
from tests.dockerd import IMAGE, Dockerd

pytestmark = [needs("docker"), pytest.mark.slow]


class Docker(BackendConformance):
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


class TestOnTheHost(Docker):
    fixed: ClassVar = {"access": "host"}


class TestThroughContainers(Docker):
    """On vfs, which copies an image's whole tree for each container."""

    fixed: ClassVar = {"access": "container", "image": IMAGE}

    @pytest.fixture
    def daemon(self, vfs: Dockerd) -> Dockerd:
        return vfs
