"""The conformance kit, run on `zfs`: on a pool in a file, by the real commands."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import needs
from tests.plugins.zfs import datasets, named, zfs
from tests.plugins.zfs import pool as pool
from tests.test_stress import Kind, stress

pytestmark = pytest.mark.slow


@needs("zfs")
class TestZfs(BackendConformance):
    name = "zfs"
    examples = 3  # each takes minutes in software emulation

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


@needs("zfs", "proc", "fork")
def test_whatever_many_processes_and_threads_do_at_once_all_is_whole_and_nothing_is_left(
    pool: str, tmp_path: Path, rng: random.Random
) -> None:
    # All of it is commands, which take tenths of a second each in software emulation, one after the other.
    few = ("--processes", "3", "--threads", "2", "--calls", "4", "--patience", "900")
    stress(Kind("zfs", {"dataset": pool}), tmp_path, rng, *few)

    assert datasets(pool, tmp_path / "store") == set()
