"""The backend `copy`: its own options, probe and driver. What every backend must do is in test_copy_conformance.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pydantic
import pytest

import storebackends_copy
from storebackends.errors import NotSupported
from storebackends.plugin import Capability
from storebackends_copy import CopyOptions, probe
from storebackends_copy.driver import CopyBackend

LoopFs = Callable[..., AbstractContextManager[Path]]


def opened(root: Path, **options: object) -> CopyBackend:
    root.mkdir()
    backend = CopyBackend(root, CopyOptions.model_validate(options), "uuid")
    backend.open()
    return backend


def test_the_spec_names_this_driver() -> None:
    (spec,) = storebackends_copy.storebackends_backends()

    assert spec.name == "copy"
    assert spec.factory == f"{CopyBackend.__module__}:{CopyBackend.__name__}"
    assert spec.options is CopyOptions


@pytest.mark.parametrize("options", [{"reflink": "sometimes"}, {"reflink": True}, {"reflinks": "auto"}])
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        CopyOptions.model_validate(options)


def test_a_clone_is_a_private_copy_of_the_base(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store")
    base = backend.build("base", None, "a1")
    (backend.tree(base) / "file").write_bytes(b"old")
    backend.rename("base")

    child = backend.build("child", "base", "a2")
    (backend.tree(child) / "file").write_bytes(b"new")
    backend.rename("child")

    with backend.view("base") as tree, backend.view("child") as other:
        assert (tree / "file").read_bytes() == b"old"
        assert (other / "file").read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="needs permission bits")
def test_an_empty_tree_is_open_to_all_whatever_the_umask(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store")
    old = os.umask(0o077)

    try:
        tree = backend.tree(backend.build("base", None, "a1"))
    finally:
        os.umask(old)

    assert tree.stat().st_mode & 0o7777 == 0o755


def test_capabilities_are_those_of_the_file_system(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store")

    assert {Capability.HOST_TREE, Capability.DETACHED, Capability.HARDLINKS} <= backend.capabilities
    assert Capability.READONLY not in backend.capabilities
    assert os.listdir(backend.trash) == []


def test_a_file_system_without_reflinks_gets_a_low_rank_and_refuses_always(tmp_path: Path, loop_fs: LoopFs) -> None:
    with loop_fs("ext4", size=32 << 20) as folder:
        support = probe(folder / "not" / "yet")
        with pytest.raises(NotSupported, match=r"file system refused.*reflink = \"auto\""):
            opened(folder / "store", reflink="always")

    assert support.usable
    assert support.rank == 10
    assert "XFS or btrfs" in support.fix


def test_a_file_system_with_reflinks_gets_a_high_rank(loop_fs: LoopFs) -> None:
    with loop_fs("xfs") as folder:
        support = probe(folder / "not" / "yet")
        opened(folder / "store", reflink="always")

        assert sorted(os.listdir(folder)) == ["store"]

    assert support.rank == 50
