"""The probes are what decides that a test is skipped, so each must be able to say both yes and no."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests import capabilities
from tests.capabilities import needs


def test_a_missing_program_is_a_no_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        capabilities._PROBES,
        "no-such-program",
        capabilities._Probe(lambda: print(capabilities.run("no-such-program")), "apt-get install it", root=False),
    )

    with pytest.raises(pytest.skip.Exception) as skipped:
        capabilities.require("no-such-program")

    assert str(skipped.value) == "needs no-such-program: no-such-program is not installed; apt-get install it"


def test_a_misspelt_ability_is_an_error_not_a_skip() -> None:
    misspelt = "no-such-ability"

    with pytest.raises(KeyError, match=misspelt):
        capabilities.require(misspelt)


@needs("unprivileged")
@pytest.mark.parametrize("name", ["root", "tmpfs", "btrfs", "devices"])
def test_root_abilities_are_refused_to_anybody_else(name: str) -> None:
    usable, reason = capabilities.look(name)

    assert not usable
    assert "run the tests as root" in reason


@needs("tmpfs")
def test_small_tmpfs_is_full_where_it_says(small_tmpfs: Callable[..., AbstractContextManager[Path]]) -> None:
    with small_tmpfs(size=1 << 20, nr_inodes=3) as folder:
        (folder / "one").touch()
        (folder / "two").touch()  # the mount's own root took the third inode

        with pytest.raises(OSError, match="No space left"):
            (folder / "three").touch()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in ("ext4", "xfs", "btrfs")])
def test_loop_fs_is_gone_after_its_block_even_when_that_fails(
    kind: str, loop_fs: Callable[..., AbstractContextManager[Path]]
) -> None:
    mounts: list[Path] = []

    def failing() -> None:
        with loop_fs(kind) as folder:
            mounts.append(folder)
            assert os.path.ismount(folder)
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        failing()

    assert not os.path.ismount(mounts[0])
