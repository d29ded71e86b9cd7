"""The conformance kit, run on `hcs` with each of containerd's snapshotters, on a real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storebackends import mounts
from storebackends.backend import Backend
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


class Brief(Hcs):
    """The longest cases, which are about the driver and not about the snapshotter, are left to `make soak`."""

    @pytest.mark.soak
    def test_a_chain_of_builds_equals_their_edits_replayed_on_one_folder(self, backend: Backend, area: Path) -> None:
        """Case 17."""
        super().test_a_chain_of_builds_equals_their_edits_replayed_on_one_folder(backend, area)

    @pytest.mark.soak
    def test_whatever_is_done_the_store_agrees_with_the_disk(self, area: Path) -> None:
        """Case 15."""
        super().test_whatever_is_done_the_store_agrees_with_the_disk(area)

    @pytest.mark.soak
    def test_a_copy_killed_at_any_step_is_found_and_removed(self, backend: Backend, root: Path) -> None:
        """Case 24."""
        super().test_a_copy_killed_at_any_step_is_found_and_removed(backend, root)

    @pytest.mark.soak
    def test_deletions_race_with_builds_and_lose_nothing(self, root: Path) -> None:
        """Case 37."""
        super().test_deletions_race_with_builds_and_lose_nothing(root)


class TestNative(Brief):
    options: ClassVar = {"snapshotter": "native"}


@needs("btrfs")
class TestBtrfs(Brief):
    options: ClassVar = {"snapshotter": "btrfs"}
