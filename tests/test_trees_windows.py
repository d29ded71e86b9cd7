"""Trees by path: what Windows has, tested wherever the tests run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storebackends import _trees_windows as trees
from storebackends.errors import NotSupported
from tests.capabilities import needs


def contents(tree: Path) -> dict[str, bytes | str | None]:
    """By path: a file's bytes, a link's target, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in tree.rglob("*"):
        name = path.relative_to(tree).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "folder" / "empty").mkdir(parents=True)
    (source / "folder" / "file").write_bytes(b"x")
    (source / "again").hardlink_to(source / "folder" / "file")
    os.utime(source / "folder" / "file", ns=(10**18, 10**18 + 123456700))
    os.utime(source / "folder", ns=(10**18, 10**18))
    return source


def test_a_copy_keeps_contents_times_and_hard_links(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy"

    trees.copy(source, copy, "auto")

    assert contents(copy) == contents(source)
    assert (copy / "folder" / "file").stat().st_mtime_ns == 10**18 + 123456700
    assert (copy / "folder").stat().st_mtime_ns == 10**18
    assert (copy / "again").samefile(copy / "folder" / "file")
    assert not (copy / "again").samefile(source / "again")


def test_a_copy_goes_over_nothing_and_not_into_itself(tmp_path: Path, source: Path) -> None:
    with pytest.raises(OSError, match="not empty"):
        trees.copy(tmp_path, source, "auto")
    with pytest.raises(OSError, match="inside of what it copies"):
        trees.copy(source, source / "folder" / "below", "auto")
    with pytest.raises(NotSupported, match="Windows"):
        trees.copy(source, tmp_path / "copy", "always")

    assert sorted(os.listdir(tmp_path)) == ["source"]
    assert os.listdir(source / "folder" / "empty") == []


def test_a_linked_tree_has_new_folders_and_the_same_files(tmp_path: Path, source: Path) -> None:
    trees.link(source, tmp_path / "linked")

    assert contents(tmp_path / "linked") == contents(source)
    assert (tmp_path / "linked" / "again").samefile(source / "again")


def test_copy_into_merges_folders_and_replaces_files(tmp_path: Path, source: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "again").write_bytes(b"old")
    (tmp_path / "base").hardlink_to(tree / "again")

    trees.copy_into(source, tree, [])
    trees.copy_into(source / "again", tree, ["new", "parent", "file"])

    assert contents(tree) == contents(source) | {"new": None, "new/parent": None, "new/parent/file": b"x"}
    assert (tmp_path / "base").read_bytes() == b"old"
    with pytest.raises(OSError, match="a folder is where a file is to be"):
        trees.copy_into(source / "again", tree, ["folder"])


@needs("symlinks")
def test_no_link_is_followed(tmp_path: Path, source: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "precious").write_bytes(b"kept")
    (tree / "folder").symlink_to(outside, target_is_directory=True)

    with pytest.raises(OSError, match="where a folder is needed"):
        trees.copy_into(source / "again", tree, ["folder", "file"])
    with pytest.raises(OSError, match="where a folder is needed"):
        trees.copy_into(source, tree, [])
    with pytest.raises(OSError, match="where a folder is needed"):
        trees.check_folder(tree, ["folder"])
    trees.check_folder(tree, ["sub"])
    trees.copy(tree, tmp_path / "copy", "auto")
    trees.remove(tree)

    assert contents(tmp_path / "copy")["folder"] == str(outside)
    assert contents(outside) == {"precious": b"kept"}


def test_removal_takes_read_only_files_and_is_idempotent(tmp_path: Path, source: Path) -> None:
    (source / "folder" / "file").chmod(0o444)

    trees.remove(source)
    trees.remove(source)

    assert os.listdir(tmp_path) == []


def test_size_counts_every_file_once(source: Path) -> None:
    assert trees.size(source) == 1


def test_space_is_told(tmp_path: Path) -> None:
    usage = trees.usage(tmp_path)

    assert 0 < usage.free < usage.total
