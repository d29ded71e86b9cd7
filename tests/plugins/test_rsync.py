"""The backend `rsync`: its own modes, probe and driver. What every backend must do is in test_rsync_conformance.py."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pydantic
import pytest

import storebackends_rsync
from storebackends import process
from storebackends.errors import NoSpace, NotSupported, StoreError
from storebackends.plugin import Capability
from storebackends_rsync import RsyncOptions, probe
from storebackends_rsync.driver import RsyncBackend, _kept
from tests.capabilities import needs

# Read, write and nothing for owner, group and others, and read for user 1, as acl(5) has it on disk.
ACL = struct.pack("<I" + "HHi" * 5, 2, 1, 6, -1, 2, 4, 1, 4, 4, -1, 16, 4, -1, 32, 0, -1)
TIME = (10**18, 10**18 + 123456789)
MODES = ["copy", "hardlink", "hardlink_unsafe"]


def opened(root: Path, mode: str = "copy") -> RsyncBackend:
    root.mkdir()
    backend = RsyncBackend(root, RsyncOptions.model_validate({"mode": mode}), "uuid")
    backend.open()
    return backend


def publish(backend: RsyncBackend, id: str, files: dict[str, bytes], base: str | None = None) -> Path:
    tree = backend.tree(backend.build(id, base, f"attempt-{id}"))
    for name, data in files.items():
        (tree / name).unlink(missing_ok=True)
        (tree / name).write_bytes(data)
        os.utime(tree / name, ns=TIME)
    return backend.tree(backend.rename(id))


def fake(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an `rsync` of our own first on PATH."""
    folder.mkdir()
    (folder / "rsync").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_spec_names_this_driver() -> None:
    (spec,) = storebackends_rsync.storebackends_backends()

    assert spec.name == "rsync"
    assert spec.factory == f"{RsyncBackend.__module__}:{RsyncBackend.__name__}"
    assert spec.options is RsyncOptions


@pytest.mark.parametrize("options", [{"mode": "link"}, {"mode": 1}, {"modes": "copy"}])
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        RsyncOptions.model_validate(options)


@needs("rsync")
def test_this_rsync_is_usable_but_never_chosen_unasked(tmp_path: Path) -> None:
    support = probe(tmp_path)

    assert support.usable
    assert support.rank == 0


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("rsync  version 3.1.2  protocol version 31", "too old"),
        ("rsync  version 2.6.9  protocol version 29", "too old"),
        ("openrsync: protocol version 29", "not the rsync of samba.org"),
        ("rsync  version 3.2.7  protocol version 31\\n no ACLs, xattrs", "without ACLs"),
    ],
)
def test_an_rsync_that_would_lose_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, reason: str
) -> None:
    fake(tmp_path / "bin", f"printf '{said}'", monkeypatch)

    support = probe(tmp_path)
    with pytest.raises(NotSupported, match=reason):
        opened(tmp_path / "store")

    assert not support.usable
    assert "install rsync 3.1.3 or newer" in support.fix


def test_a_missing_rsync_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    support = probe(tmp_path)

    assert not support.usable
    assert "does not run" in support.reason


@needs("rsync")
@pytest.mark.parametrize("mode", MODES)
def test_a_step_costs_one_command_and_one_more_where_sealing_links(tmp_path: Path, mode: str) -> None:
    backend = opened(tmp_path / "store", mode)
    publish(backend, "base", {"file": b"x"})
    before = process.started

    publish(backend, "child", {"other": b"y"}, base="base")

    assert process.started - before == (2 if mode == "hardlink" else 1)


@needs("rsync")
@pytest.mark.parametrize("mode", MODES)
def test_every_clone_keeps_all_times_to_the_nanosecond(tmp_path: Path, mode: str) -> None:
    backend = opened(tmp_path / "store", mode)
    base = backend.tree(backend.build("base", None, "a1"))
    (base / "folder").mkdir()
    (base / "file").write_bytes(b"x")
    (base / "link").symlink_to("nowhere")
    if sys.platform != "win32":
        os.mkfifo(base / "pipe")
    times = {name: (base / name).lstat().st_mtime_ns for name in [".", *os.listdir(base)]}
    backend.rename("base")

    # At once, so most likely within the second that all of these were made in.
    child = publish(backend, "child", {}, base="base")

    assert {name: (child / name).lstat().st_mtime_ns for name in times} == times


@needs("xattrs", "acls")
def test_a_copy_looks_for_holes_and_attributes_where_there_are_any(tmp_path: Path) -> None:
    folder, parent = tmp_path / "tree" / "folder", tmp_path / "parent"
    folder.mkdir(parents=True)
    parent.mkdir()
    (folder / "file").write_bytes(b"x" * 5000)
    (folder / "link").symlink_to("nowhere")
    plain = _kept(tmp_path / "tree", parent)
    with open(folder / "sparse", "wb") as file:
        file.truncate(1 << 20)
    sparse = _kept(tmp_path / "tree", parent)
    if sys.platform == "linux":
        os.setxattr(folder, "user.mark", b"1")
    both = _kept(tmp_path / "tree", parent)
    (folder / "sparse").unlink()
    attributes = _kept(tmp_path / "tree", parent)

    assert (plain, sparse, both, attributes) == (set(), {"-S"}, {"-S", "-AX"}, {"-AX"})
    assert _kept(tmp_path / "missing", parent) == {"-S", "-AX"}


@needs("rsync", "acls")
def test_a_copy_inherits_nothing_from_a_default_acl_of_the_store(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store")
    base = publish(backend, "base", {"file": b"x"})
    if sys.platform == "linux":
        # Its owner may enter what inherits it.
        default = struct.pack("<I" + "HHi" * 5, 2, 1, 7, -1, 2, 4, 1, 4, 4, -1, 16, 4, -1, 32, 0, -1)
        os.setxattr(backend.in_progress, "system.posix_acl_default", default)

    child = publish(backend, "child", {}, base="base")

    if sys.platform == "linux":
        assert os.listxattr(child / "file") == os.listxattr(child) == []
    assert (child / "file").stat().st_mode == (base / "file").stat().st_mode


@needs("rsync")
def test_hardlink_mode_shares_what_is_equal_and_only_that(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store", "hardlink")
    names = ("same", "again", "content", "mode", "time", "nanosecond")
    base = publish(backend, "base", dict.fromkeys(names, b"old"))
    tree = backend.tree(backend.build("child", "base", "a1"))
    shared_while_building = [name for name in names if (tree / name).samefile(base / name)]

    (tree / "again").write_bytes(b"old")
    (tree / "content").write_bytes(b"new")  # of the same length, and with the old time
    for name in ("again", "content"):
        os.utime(tree / name, ns=TIME)
    (tree / "mode").chmod(0o600)
    os.utime(tree / "time", ns=(0, 0))
    os.utime(tree / "nanosecond", ns=(TIME[0], TIME[1] + 1))
    child = backend.tree(backend.rename("child"))

    assert shared_while_building == []
    assert [name for name in names if (child / name).samefile(base / name)] == ["same", "again"]
    assert {(base / name).read_bytes() for name in names} == {b"old"}
    assert {((base / name).stat().st_mode & 0o777, (base / name).stat().st_mtime_ns) for name in names} == {
        (0o644, TIME[1])
    }
    assert (child / "content").read_bytes() == b"new"
    assert sorted(os.listdir(child.parent)) == ["build.json", "rootfs"]


@needs("rsync", "xattrs")
def test_hardlink_mode_does_not_share_across_attributes(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store", "hardlink")
    base = publish(backend, "base", {"file": b"x"})
    tree = backend.tree(backend.build("child", "base", "a1"))

    if sys.platform == "linux":
        os.setxattr(tree / "file", "user.mark", b"1")
    child = backend.tree(backend.rename("child"))

    assert not (child / "file").samefile(base / "file")


@needs("rsync")
def test_sealing_again_after_a_failure_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened(tmp_path / "store", "hardlink")
    base = publish(backend, "base", {"file": b"x"})
    entry = backend.build("child", "base", "a1")
    with monkeypatch.context() as patch:
        fake(tmp_path / "bin", 'for last; do :; done; mkdir "$last"; touch "$last/partial"; exit 23', patch)
        with pytest.raises(StoreError):
            backend.rename("child")
    assert backend.result("child") is None
    assert backend.tree(entry).is_dir()

    child = backend.tree(backend.rename("child"))

    assert os.listdir(child) == ["file"]
    assert (child / "file").samefile(base / "file")


@needs("rsync")
def test_hardlink_unsafe_starts_shared_and_says_so(tmp_path: Path) -> None:
    backend = opened(tmp_path / "store", "hardlink_unsafe")
    base = publish(backend, "base", {"replaced": b"old", "kept": b"old"})

    child = publish(backend, "child", {"replaced": b"new"}, base="base")

    assert (child / "kept").samefile(base / "kept")
    assert (base / "replaced").read_bytes() == b"old"
    assert Capability.DETACHED not in backend.capabilities


@needs("rsync")
@pytest.mark.parametrize("mode", ["hardlink", "hardlink_unsafe"])
def test_deleting_a_result_leaves_linked_files_as_they_are(tmp_path: Path, mode: str) -> None:
    backend = opened(tmp_path / "store", mode)
    base = publish(backend, "base", {"file": b"x"})
    (base / "file").chmod(0o444)
    publish(backend, "child", {}, base="base")
    before = (base / "file").stat()

    backend.delete("child")

    after = (base / "file").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_uid) == (before.st_mode, before.st_mtime_ns, before.st_uid)
    assert (before.st_nlink, after.st_nlink) == (2, 1)


@needs("rsync")
def test_paths_that_look_like_hosts_or_options_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = opened(Path("host:-a b\n"), "hardlink")

    publish(backend, "base", {"file": b"x"})
    child = publish(backend, "child", {}, base="base")

    assert os.listdir(child) == ["file"]


@needs("rsync", "tmpfs")
def test_a_full_disk_is_no_space(small_tmpfs: Callable[..., AbstractContextManager[Path]]) -> None:
    with small_tmpfs(size=3 << 20) as folder:
        backend = opened(folder / "store")
        publish(backend, "base", {"file": b"x" * (2 << 20)})

        with pytest.raises(NoSpace):
            backend.build("child", "base", "a1")

        assert list(backend.unfinished()) == []
