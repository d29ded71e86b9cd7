"""The conformance kit, run on `zfs`: on a pool in a file, by the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import needs
from tests.plugins.zfs import datasets, named, zfs
from tests.plugins.zfs import pool as pool

pytestmark = pytest.mark.slow


@needs("zfs")
class TestZfs(BackendConformance):
    name = "zfs"

    @pytest.fixture
    def area(self, pool: str, tmp_path: Path) -> Path:
        self.pool, self.options = pool, {"dataset": pool}  # type: ignore[misc]
        return tmp_path

    def make_nested(self, tree: Path) -> bool:
        (dataset,) = zfs("list", "-H", "-o", "name", tree)
        zfs("create", f"{dataset}/nested")
        return True

    def leftovers(self, root: Path) -> list[str]:
        return super().leftovers(root) + sorted(datasets(self.pool, root) - named(root))
