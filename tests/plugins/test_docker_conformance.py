"""The conformance kit, run on `docker`: with folders of this host, and through containers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import needs
from tests.dockerd import Dockerd

pytestmark = [needs("docker"), pytest.mark.slow]


class Docker(BackendConformance):
    name = "docker"
    more: Mapping[str, Any] = {}
    daemon: Dockerd

    def leftovers(self, root):
        return super().leftovers(root)


class TestOnTheHost(Docker):
    @pytest.fixture(autouse=True)
    def _daemon(self, overlay2: Dockerd) -> None:
        self.daemon = overlay2
        self.options = {"host": overlay2.host}
