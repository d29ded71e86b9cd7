"""What the tests of the backend `zfs` share: a pool in a file, and looks at it by other ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import capabilities


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a pool for all tests of this run."""
    capabilities.require("zfs")
    with capabilities.zpool(tmp_path_factory.mktemp("zfs")) as name:
        yield name


def zfs(*arguments: str | Path) -> list[str]:
    """What a command prints, by lines; OSError where it fails."""
    return capabilities.run("zfs", *arguments).splitlines()


def home(pool: str, root: Path) -> str:
    """The dataset of the store in *root*."""
    return f"{pool}/storebackends-{json.loads((root / 'store.json').read_bytes())['uuid']}"


def datasets(pool: str, root: Path) -> set[str]:
    """The names of all trees there are of the store in *root*."""
    parent = home(pool, root)
    listed = zfs("list", "-H", "-o", "name", "-d", "1", "-t", "filesystem", parent)
    return {name.rpartition("/")[2] for name in listed if name != parent}


def named(root: Path) -> set[str]:
    """The names of the trees of results and of generations of caches."""
    entries = [*root.glob("result/*/tree.json"), *root.glob("caches/*/*/tree.json")]
    return {json.loads(entry.read_bytes())["dataset"] for entry in entries}
