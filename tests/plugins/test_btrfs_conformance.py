"""The conformance kit, run on `btrfs`: as root, and as a user, with a mount that lets them delete and without."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storebackends.testing import BackendConformance
from tests.capabilities import loop_fs, needs

pytestmark = pytest.mark.slow


class Btrfs(BackendConformance):
    name = "btrfs"

    def make_nested(self, tree: Path) -> bool:
        import btrfsutil

        btrfsutil.create_subvolume(tree / "nested")
        return True


@needs("btrfs", "btrfsutil")
class TestRoot(Btrfs):
    @pytest.fixture(scope="class")
    @classmethod
    def disk(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        with loop_fs("btrfs", tmp_path_factory.mktemp("btrfs"), size=2 << 30) as folder:
            yield folder

    @pytest.fixture
    def area(self, disk: Path) -> Path:
        return Path(tempfile.mkdtemp(dir=disk))

    def leftovers(self, root: Path) -> list[str]:
        """Subvolumes of entries that are gone, too."""
        return super().leftovers(root) + strays(root)


class User(Btrfs):
    """On a btrfs that root mounted for this user."""

    variable: str

    @pytest.fixture
    def area(self) -> Path:
        return Path(tempfile.mkdtemp(dir=os.environ[self.variable]))


@needs("btrfs_of_a_user", "btrfsutil")
class TestUser(User):
    """Who may not delete subvolumes, and removes them file by file."""

    variable = "STOREBACKENDS_BTRFS"


@needs("btrfs_that_allows", "btrfsutil")
class TestUserWhoMayDelete(User):
    variable = "STOREBACKENDS_BTRFS_ALLOWS"


def strays(root: Path) -> list[str]:
    """Subvolumes below the store in *root* that belong to no result and no generation of its caches."""
    import btrfsutil

    mount = next(folder for folder in root.parents if os.path.ismount(folder))
    with btrfsutil.SubvolumeIterator(mount) as found:
        paths = [f"{mount}/{path}" for path, _ in found]
    ours = (f"{root}/result/", f"{root}/caches/")
    return [path for path in paths if path.startswith(f"{root}/") and not path.startswith(ours)]
