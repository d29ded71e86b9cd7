"""The conformance kit, run on `overlay` over the file systems that it is for."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import MIB, PROJECT, loop_fs, needs, small_tmpfs

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


# What no user namespace can give: a redirect takes an attribute of root's, and so does the number of a linked file.
IMPOSSIBLE = (
    "test_a_replacing_edit_does_not_reach_the_base[rename a folder]",
    "test_hard_links_that_a_build_breaks_or_makes_are_published_as_they_are",
)


@needs("userns")
@pytest.mark.timeout(600)
def test_the_kit_in_a_user_namespace(tmp_path: Path) -> None:
    """By any user: mounts, and all that the kit makes, are the namespace's own."""
    this = f"{Path(__file__).relative_to(PROJECT)}::TestTmpfs"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "--kill-child", "--fork"]
    pytest_inside = [sys.executable, "-m", "pytest", this, "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "in")]
    left_out = [word for case in IMPOSSIBLE for word in ("--deselect", f"{this}::{case}")]

    done = subprocess.run(
        [*inside, *pytest_inside, *left_out], cwd=PROJECT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 80
