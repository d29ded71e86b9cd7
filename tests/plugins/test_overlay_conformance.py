"""The conformance kit, run on `overlay` over the file systems that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import MIB, loop_fs, needs, small_tmpfs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="class")
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system for all cases of a class: that of the temporary folder may be an overlay itself."""
    kind = request.cls.kind
    folder = tmp_path_factory.mktemp(kind)
    size = 1024 * MIB
    with small_tmpfs(folder, size) if kind == "tmpfs" else loop_fs(kind, folder, size) as mount:
        yield mount


class Overlay(BackendConformance):
    name = "overlay"
    kind: ClassVar[str]

    @pytest.fixture
    def area(self, disk: Path, tmp_path: Path) -> Path:
        area = disk / tmp_path.name
        area.mkdir()
        return area

    def leftovers(self, root: Path) -> list[str]:
        points = root / "overlay" / "mounts"
        return super().leftovers(root) + [str(path) for path in points.iterdir()]


@needs("overlay", "ext4")
class TestExt4(Overlay):
    kind = "ext4"


@needs("overlay", "xfs")
class TestXfs(Overlay):
    kind = "xfs"


@needs("overlay", "tmpfs")
class TestTmpfs(Overlay):
    kind = "tmpfs"
    options: ClassVar = {"depth": 3}  # so that every chain is flattened now and then
