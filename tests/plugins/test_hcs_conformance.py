"""The conformance kit, run on `hcs` with each of containerd's snapshotters, on a real daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storebackends import mounts
from storebackends.testing import BackendConformance
from tests.capabilities import needs
from tests.containerd import Daemon

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
        uuid = json.loads((root / "store.json").read_bytes())["uuid"]
        entries = [*(root / "result").iterdir(), *(root / "caches").glob("*/*")]
        nonces = [json.loads((entry / "tree.json").read_bytes())["nonce"] for entry in entries]
        named = {f"storebackends-{uuid}-{nonce}-committed" for nonce in nonces}
        there = {key for key in self._daemon.snapshots(self.options["snapshotter"]) if uuid in key}
        left = [f"snapshot {key}" for key in there ^ named] + [f"mount {point.path}" for point in mounts.below(root)]
        rooms = [root / "containerd" / room for room in ("mounts", "tombs", "views")]
        return super().leftovers(root) + left + [str(path) for room in rooms for path in room.iterdir()]


@needs("overlay")
class TestOverlayfs(Hcs):
    options: ClassVar = {"snapshotter": "overlayfs"}


class TestNative(Hcs):
    options: ClassVar = {"snapshotter": "native"}


@needs("btrfs")
class TestBtrfs(Hcs):
    options: ClassVar = {"snapshotter": "btrfs"}
