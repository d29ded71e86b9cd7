"""The conformance kit, run on `hcs` with each of containerd's snapshotters, on a real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storebackends import mounts
from storebackends.testing import BackendConformance
from tests.capabilities import needs
from tests.containerd import Daemon, left

pytestmark = pytest.mark.slow


@needs("containerd")
class Hcs(BackendConformance):
    name = "hcs"

    @pytest.fixture
    def area(self, tmp_path: Path, containerd: Daemon) -> Iterator[Path]:
        self._daemon = containerd
        yield tmp_path
        mounts.unmount(tmp_path)  # of builds that a case left unfinished

    def leftovers(self, root: Path) -> list[str]:
        """Its snapshots are those that its results and generations name, and nothing is mounted."""
        return super().leftovers(root) + left(self._daemon, root, self.options["snapshotter"])


@needs("overlay")
class TestOverlayfs(Hcs):
    options: ClassVar = {"snapshotter": "overlayfs"}


class TestNative(Hcs):
    options: ClassVar = {"snapshotter": "native"}


@needs("btrfs")
class TestBtrfs(Hcs):
    options: ClassVar = {"snapshotter": "btrfs"}
