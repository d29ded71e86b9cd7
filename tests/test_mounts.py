from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from storebackends import mounts
from storebackends.errors import Busy, StoreError
from tests.capabilities import needs

SmallTmpfs = Callable[..., AbstractContextManager[Path]]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "a target").mkdir()
    return tmp_path / "a target"


@needs("tmpfs")
def test_a_bind_shows_a_folder_and_read_only_it_refuses_writes(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")

    mounts.mount("bind", str(source), target, ["ro", "rbind"])

    try:
        assert (target / "file").read_bytes() == b"x"
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").touch()
        (point,) = mounts.below(target)
        assert point.path == str(target)
    finally:
        mounts.unmount(target)
    assert os.listdir(target) == []


@needs("tmpfs")
def test_what_is_mounted_inside_goes_first_and_shows_nowhere_else(tmp_path: Path, target: Path) -> None:
    mounts.mount("tmpfs", "tmpfs", target, ["size=1m"])
    (target / "inner").mkdir()
    for _ in range(2):  # one over the other
        mounts.mount("tmpfs", "tmpfs", target / "inner")
    assert [Path(point.path).name for point in mounts.below(target)] == ["a target", "inner", "inner"]
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert not [line for line in lines if "a\\040target" in line and "shared:" in line]

    mounts.unmount(target)
    mounts.unmount(target)

    assert mounts.below(tmp_path) == []


@needs("tmpfs")
def test_who_holds_a_mount_is_named_and_it_stays(target: Path) -> None:
    mounts.mount("tmpfs", "tmpfs", target)
    holder = subprocess.Popen(["sleep", "600"], cwd=target)

    try:
        with pytest.raises(Busy, match="sleep") as caught:
            mounts.unmount(target)
        assert len(mounts.below(target)) == 1
    finally:
        holder.kill()
        holder.wait()
        mounts.unmount(target)

    assert caught.value.holders == (f"pid {holder.pid} (sleep): {target}",)


@needs("overlay", "tmpfs")
@pytest.mark.parametrize("layers", [3, 120])
@pytest.mark.parametrize("name", ["n", "n" * 250])
def test_an_overlay_may_have_more_layers_than_fit_into_a_page(
    tmp_path: Path, target: Path, small_tmpfs: SmallTmpfs, layers: int, name: str
) -> None:
    with small_tmpfs() as room:
        folders = [room / f"{number}" / name for number in range(layers)]
        for number, folder in enumerate(folders):
            folder.mkdir(parents=True)
            (folder / f"file {number}").write_bytes(b"x")
        for kind in ("upper", "work"):
            (room / kind).mkdir()
        lower, own = ":".join(map(str, folders)), [f"upperdir={room}/upper", f"workdir={room}/work"]

        mounts.mount("overlay", "overlay", target, [f"lowerdir={lower}", *own])
        try:
            assert len(os.listdir(target)) == layers
            (target / "file 0").write_bytes(b"new")
            assert (folders[0] / "file 0").read_bytes() == b"x"
        finally:
            mounts.unmount(target)
        mounts.mount("overlay", "overlay", target, ["ro", f"lowerdir={room}/upper:{lower}"])
        try:
            assert (target / "file 0").read_bytes() == b"new"
            with pytest.raises(OSError, match="Read-only"):
                (target / "file 0").touch()
        finally:
            mounts.unmount(target)


@needs("tmpfs")
@pytest.mark.parametrize("layers", [1, 120])
def test_what_the_kernel_refuses_is_told_and_leaves_nothing(tmp_path: Path, target: Path, layers: int) -> None:
    lower = ":".join(f"{tmp_path}/{'missing' * 8}-{number}" for number in range(layers))

    with pytest.raises(StoreError, match="No such file"):
        mounts.mount("overlay", "overlay", target, [f"lowerdir={lower}:{tmp_path}"])

    assert mounts.below(tmp_path) == []


@needs("tmpfs")
def test_a_link_in_the_way_is_not_followed(tmp_path: Path, target: Path) -> None:
    """A mount on a folder that was moved is listed where it is now."""
    inner = target / "folder" / "inner"
    inner.mkdir(parents=True)
    mounts.mount("tmpfs", "tmpfs", inner)
    (target / "folder").rename(target / "moved")
    (target / "folder").symlink_to("/")

    mounts.unmount(target)

    assert mounts.below(target) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/mountinfo")
def test_names_are_read_as_they_are() -> None:
    line = "36 35 98:0 /a\\040b /mnt\\0111\\134 rw,noatime shared:1 master:2 - ext3 /dev/root\\040x rw,errors=continue"

    assert mounts._parse(line) == mounts.MountPoint("/mnt\t1\\", "98:0", "/a b", "ext3", "/dev/root x")
