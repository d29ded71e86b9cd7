"""The conformance kit, run on `rsync` in each of its modes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from storebackends.backend import Backend
from storebackends.testing import BackendConformance
from tests.capabilities import needs

pytestmark = pytest.mark.slow


@needs("rsync")
class Rsync(BackendConformance):
    name = "rsync"

    @pytest.mark.soak  # rsync reads through holes: half a minute
    def test_a_clone_keeps_a_file_larger_than_4_gib(self, backend: Backend, root: Path) -> None:
        """Case 16."""
        super().test_a_clone_keeps_a_file_larger_than_4_gib(backend, root)


class TestCopy(Rsync):
    pass


class TestHardlink(Rsync):
    options: ClassVar = {"mode": "hardlink"}


class TestHardlinkUnsafe(Rsync):
    options: ClassVar = {"mode": "hardlink_unsafe"}
