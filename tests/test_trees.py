"""Trees: what a copy keeps, and that nothing in a hostile tree reaches beyond it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from storebackends import trees
from storebackends.backend import Capability
from storebackends.errors import NoSpace, NotSupported, StoreError

if not hasattr(os, "mkfifo"):
    pytest.skip("needs POSIX", allow_module_level=True)
assert sys.platform != "win32"

from storebackends import _trees_walk  # noqa: E402
from tests.capabilities import mounted, needs  # noqa: E402
from tests.stores import descriptors  # noqa: E402

NOBODY = 65534
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw, effective
ACL = struct.pack("<I" + "HHi" * 5, 2, 1, 6, -1, 2, 4, 1, 4, 4, -1, 16, 4, -1, 32, 0, -1)

if sys.platform == "linux":
    setxattr, getxattr, listxattr = os.setxattr, os.getxattr, os.listxattr
else:

    def setxattr(path: Path, name: str, value: bytes, *, follow_symlinks: bool = True) -> None:
        raise AssertionError("a test that needs xattrs runs on Linux")

    def getxattr(path: Path | bytes, name: str, *, follow_symlinks: bool = True) -> bytes:
        raise AssertionError("as above")

    def listxattr(path: Path | bytes, *, follow_symlinks: bool = True) -> list[str]:
        return []


def facts(path: bytes, status: os.stat_result) -> dict[str, Any]:
    kind = stat.S_IFMT(status.st_mode)
    found: dict[str, Any] = {
        "mode": oct(status.st_mode),
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "device": status.st_rdev if kind in (stat.S_IFBLK, stat.S_IFCHR) else None,
    }
    if kind == stat.S_IFREG and status.st_size < 1 << 24:
        found["bytes"] = Path(os.fsdecode(path)).read_bytes()
    elif kind == stat.S_IFREG:
        found["size"] = status.st_size
    elif kind == stat.S_IFLNK:
        found["target"] = os.readlink(path)
    names = listxattr(path, follow_symlinks=False)
    found["xattrs"] = {name: getxattr(path, name, follow_symlinks=False) for name in names}
    return found


def census(tree: Path) -> dict[bytes, dict[str, Any]]:
    """All that a copy must keep of a tree of ordinary depth, by path."""
    top = os.fsencode(tree)
    firsts: dict[tuple[int, int], bytes] = {}
    found = {}
    for folder, folders, files in os.walk(top):
        for name in sorted([b"", *folders, *files] if folder == top else [*folders, *files]):
            path = os.path.join(folder, name) if name else folder
            status = os.lstat(path)
            key = os.path.relpath(path, top)
            found[key] = facts(path, status)
            if not stat.S_ISDIR(status.st_mode):
                found[key]["same as"] = firsts.setdefault((status.st_dev, status.st_ino), key)
    return found


def deep(at: Path, levels: int, name: str = "d" * 20) -> None:
    """Make a chain of folders, some with a file and an empty folder beside the next; no path is as long as it."""
    at.mkdir()
    fd = os.open(at, os.O_RDONLY)
    for level in range(levels):
        if level % 20 == 0:
            os.close(os.open("file", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd))
            os.mkdir("beside", dir_fd=fd)
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def depth(at: Path, name: str = "d" * 20) -> int:
    fd, levels = os.open(at, os.O_RDONLY), 0
    try:
        while name in os.listdir(fd):
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd, levels = below, levels + 1
    finally:
        os.close(fd)
    return levels


@pytest.fixture
def user_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of an unprivileged user, which this process is for as long as the test runs."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp())  # what pytest makes is closed to others
    os.chown(folder, NOBODY, NOBODY)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(0)
        os.setegid(0)
        shutil.rmtree(folder)


@pytest.fixture
def xfs(loop_fs: Callable[..., AbstractContextManager[Path]]) -> Iterator[Path]:
    with loop_fs("xfs") as folder:
        yield folder


# What a copy keeps


def test_a_copy_equals_its_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "file").write_bytes(b"some\0bytes")
    (source / "nothing").touch()
    (source / "a" / "b" / "again").hardlink_to(source / "a" / "file")
    (source / "setuid").write_bytes(b"x")
    (source / "setuid").chmod(0o6755)
    (source / "a").chmod(0o3751)
    (source / "a" / "file").chmod(0o440)
    for name, target in (("dangling", "nowhere"), ("absolute", "/etc"), ("folder", "a/b"), ("file", "a/file")):
        (source / f"to-{name}").symlink_to(target)
    os.mkfifo(source / "pipe", 0o640)
    for n, path in enumerate(sorted(source.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18 + n, 10**18 + 7 * n + 123456789), follow_symlinks=False)
    os.utime(source, ns=(1, 999999999))

    trees.copy(source, tmp_path / "copy")

    assert census(tmp_path / "copy") == census(source)
    assert not os.path.samefile(tmp_path / "copy" / "a" / "file", source / "a" / "file")


@needs("devices", "acls", "xattrs")
def test_owners_devices_attributes_acls_and_capabilities_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    for name in ("setuid", "capable", "acl", "folder/inside"):
        (source / name).write_bytes(b"x")
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(source / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mkfifo(source / "pipe")
    (source / "link").symlink_to("nowhere")
    for n, path in enumerate(sorted(source.rglob("*"))):
        os.chown(path, 1000 + n, 2000 + n, follow_symlinks=False)
        setxattr(path, "trusted.mark", b"%d" % n, follow_symlinks=False)
    (source / "setuid").chmod(0o6711)
    (source / "null").chmod(0o1666)
    setxattr(source / "capable", "security.capability", CAPABILITY)
    setxattr(source / "capable", "user.empty", b"")
    setxattr(source / "acl", "system.posix_acl_access", ACL)
    setxattr(source / "folder", "system.posix_acl_default", ACL)
    (source / "folder").chmod(0o2750)

    trees.copy(source, tmp_path / "copy")

    assert census(tmp_path / "copy") == census(source)
    assert getxattr(tmp_path / "copy" / "capable", "security.capability")[:4] == CAPABILITY[:4]


@needs("acls")
def test_a_copy_inherits_nothing_from_a_default_acl_of_its_parent(tmp_path: Path) -> None:
    source, parent = tmp_path / "source", tmp_path / "parent"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "file").write_bytes(b"x")
    parent.mkdir()
    setxattr(parent, "system.posix_acl_default", ACL)

    trees.copy(source, parent / "copy")
    trees.copy_into(source / "folder" / "file", parent, "file")
    trees.copy_into(source, parent, "merged")

    assert census(parent / "copy") == census(source) == census(parent / "merged")
    assert listxattr(parent / "file") == []


def test_names_of_any_bytes_are_kept(tmp_path: Path) -> None:
    source = os.fsencode(tmp_path / "source")
    os.mkdir(source)
    for name in (b"new\nline", b"not \xff\xfe text", b"n" * 255, b" ", b"-rf", b"\\", b"$(x)"):
        try:
            Path(os.fsdecode(os.path.join(source, name))).write_bytes(name)
        except OSError:
            assert name.startswith(b"not"), "only a file system of text may refuse a name"

    trees.copy(tmp_path / "source", tmp_path / "copy")

    assert census(tmp_path / "copy") == census(tmp_path / "source")


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_sparse_files_stay_sparse_at_any_size(tmp_path: Path, reflink: trees.Reflink) -> None:
    if Capability.SPARSE not in trees.capabilities(tmp_path):
        pytest.skip("needs a file system with holes")
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "large", "wb") as file:
        for offset in (0, 1 << 30, 5 << 30):
            file.seek(offset)
            file.write(b"data at %d" % offset)
        file.truncate(6 << 30)
    with open(source / "hole", "wb") as file:
        file.truncate(1 << 20)

    trees.copy(source, tmp_path / "copy", reflink=reflink)

    assert census(tmp_path / "copy") == census(source)
    assert trees.size(tmp_path / "copy") < 1 << 20
    with open(tmp_path / "copy" / "large", "rb") as file:
        file.seek(5 << 30)
        assert file.read(10) == b"data at 53"


def test_a_file_larger_than_a_chunk_is_copied_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(random.Random(1).randbytes((2 << 20) + 17))

    trees.copy(source, tmp_path / "copy", reflink="never")

    assert census(tmp_path / "copy") == census(source)


def test_sockets_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "socket"))

        trees.copy(source, tmp_path / "copy")

    assert os.listdir(tmp_path / "copy") == []


def test_a_tree_deeper_than_any_path_is_copied_measured_and_removed(tmp_path: Path) -> None:
    deep(tmp_path / "source", 3000)
    (tmp_path / "source" / "last").hardlink_to(tmp_path / "source" / "file")
    open_before = os.listdir("/dev/fd")

    trees.copy(tmp_path / "source", tmp_path / "copy")
    sizes = trees.size(tmp_path / "source"), trees.size(tmp_path / "copy")
    levels = depth(tmp_path / "copy")
    trees.link(tmp_path / "source", tmp_path / "linked")
    for name in ("source", "copy", "linked"):
        trees.remove(tmp_path / name)

    assert levels == 3000
    assert sizes[0] == sizes[1]
    assert os.listdir(tmp_path) == []
    assert os.listdir("/dev/fd") == open_before


def test_few_descriptors_are_enough_for_a_deep_tree(tmp_path: Path) -> None:
    import resource

    deep(tmp_path / "source", 200)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 60, old[1]))

    try:
        trees.copy(tmp_path / "source", tmp_path / "copy")
        trees.remove(tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)

    assert os.listdir(tmp_path) == ["source"]


def test_a_copy_goes_into_an_empty_folder_but_never_over_anything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")

    trees.copy(source, tmp_path / "empty")
    with pytest.raises(StoreError, match="not empty"):
        trees.copy(source, tmp_path / "empty")
    with pytest.raises(StoreError):
        trees.copy(source, tmp_path / "link")
    with pytest.raises(StoreError, match="inside of what it copies"):
        trees.copy(source, source / "below")

    assert census(tmp_path / "empty")[b"file"] == census(source)[b"file"]


def test_a_user_loses_the_owners_and_no_setuid_goes_astray(user_folder: Path) -> None:
    source = user_folder / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    (source / "file").chmod(0o4755)
    (source / "closed").mkdir(mode=0o400)
    if os.getuid() == 0:
        os.seteuid(0)
        (source / "roots").write_bytes(b"x")
        (source / "roots").chmod(0o6755)
        os.seteuid(NOBODY)

    trees.copy(source, user_folder / "copy")

    assert stat.S_IMODE((user_folder / "copy" / "file").stat().st_mode) == 0o4755
    assert stat.S_IMODE((user_folder / "copy" / "closed").stat().st_mode) == 0o400
    if os.getuid() == 0:
        assert stat.S_IMODE((user_folder / "copy" / "roots").stat().st_mode) == 0o755
        assert (user_folder / "copy" / "roots").stat().st_uid == NOBODY


@needs("devices")
def test_a_device_that_a_user_may_not_make_is_a_clear_error(user_folder: Path) -> None:
    (user_folder / "source").mkdir()
    os.seteuid(0)
    os.mknod(user_folder / "source" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.seteuid(NOBODY)

    with pytest.raises(NotSupported, match=r"'null'.*as root"):
        trees.copy(user_folder / "source", user_folder / "copy")

    os.seteuid(0)


# Sharing


def test_reflinks_share_blocks_and_keep_everything(xfs: Path) -> None:
    (xfs / "source").mkdir()
    (xfs / "source" / "file").write_bytes(random.Random(2).randbytes(64 << 20))
    os.sync()
    before = trees.usage(xfs).free

    trees.copy(xfs / "source", xfs / "auto")
    trees.copy(xfs / "source", xfs / "always", reflink="always")
    os.sync()
    shared = before - trees.usage(xfs).free
    trees.copy(xfs / "source", xfs / "never", reflink="never")
    os.sync()
    unshared = before - trees.usage(xfs).free

    assert shared < 4 << 20
    assert unshared > 60 << 20
    assert census(xfs / "auto") == census(xfs / "always") == census(xfs / "never") == census(xfs / "source")


def test_reflinks_that_must_be_and_cannot_say_why(tmp_path: Path, xfs: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"x")

    trees.check_reflink(xfs)
    trees.copy(tmp_path / "source", xfs / "auto")
    with pytest.raises(NotSupported, match=r"file system refused.*XFS"):
        trees.copy(tmp_path / "source", xfs / "always", reflink="always")

    assert census(xfs / "auto") == census(tmp_path / "source")


def test_a_linked_tree_has_new_folders_and_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / "folder" / "file").write_bytes(b"x")
    (source / "link").symlink_to("folder")
    os.utime(source / "folder", ns=(1, 123456789))
    before = census(source)

    trees.link(source, tmp_path / "linked")

    assert census(tmp_path / "linked") == before == census(source)
    assert os.path.samefile(source / "folder" / "file", tmp_path / "linked" / "folder" / "file")
    assert not os.path.samefile(source / "folder", tmp_path / "linked" / "folder")


def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, link = tmp_path / "source", os.link
    source.mkdir()
    for name in ("full", "other"):
        (source / name).write_bytes(b"x")
    before = census(source)

    def full(name: str, target: str, **where: Any) -> None:
        if name == "full":
            raise OSError(errno.EMLINK, "as ext4 says at 65,000 links")
        link(name, target, **where)

    monkeypatch.setattr(os, "link", full)
    trees.link(source, tmp_path / "linked")

    assert census(tmp_path / "linked") == before
    assert not (tmp_path / "linked" / "full").samefile(source / "full")
    assert (tmp_path / "linked" / "other").samefile(source / "other")


def test_size_counts_blocks_and_every_inode_once(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    empty = trees.size(tmp_path / "tree")
    (tmp_path / "tree" / "file").write_bytes(b"x" * 65536)
    (tmp_path / "tree" / "again").hardlink_to(tmp_path / "tree" / "file")
    (tmp_path / "tree" / "outside").symlink_to("/")

    size = trees.size(tmp_path / "tree")

    assert 65536 <= size - empty < 2 * 65536


# Removing


def test_removing_what_is_missing_or_no_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to("outside")

    for name in ("missing", "missing/below", "file", "link"):
        trees.remove(tmp_path / name)

    assert os.listdir(tmp_path) == ["outside"]


def test_removing_follows_no_link_and_opens_no_pipe(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (tmp_path / "tree" / "folder").mkdir(parents=True)
    (tmp_path / "tree" / "folder" / "out").symlink_to(outside)
    (tmp_path / "tree" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "tree" / "pipe")

    trees.remove(tmp_path / "tree")

    assert os.listdir(tmp_path) == ["outside"]
    assert os.listdir(outside) == ["precious"]


def test_a_user_removes_closed_folders_and_chmods_no_file(user_folder: Path) -> None:
    tree = user_folder / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_bytes(b"x")
    (user_folder / "kept").hardlink_to(tree / "a" / "b" / "file")
    (user_folder / "kept").chmod(0o400)
    (tree / "a" / "b").chmod(0o555)
    (tree / "a").chmod(0)
    tree.chmod(0o200)

    trees.remove(tree)

    assert os.listdir(user_folder) == ["kept"]
    assert stat.S_IMODE((user_folder / "kept").stat().st_mode) == 0o400


@needs("tmpfs")
def test_a_mount_inside_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "precious").touch()
    (tmp_path / "tree" / "folder").mkdir(parents=True)

    # Of the same file system, so with the same st_dev.
    with mounted(tmp_path / "tree" / "folder" / "mount", "--bind", tmp_path / "real"):
        with pytest.raises(StoreError, match=r"folder/mount'.*unmount it first"):
            trees.remove(tmp_path / "tree")
        with pytest.raises(StoreError, match="unmount it first"):
            trees.remove(tmp_path / "tree" / "folder" / "mount")
        size = trees.size(tmp_path / "tree")

    assert os.listdir(tmp_path / "real") == ["precious"]
    assert size < 1 << 20
    trees.remove(tmp_path / "tree")


@needs("tmpfs")
def test_without_openat2_another_file_system_is_still_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trees_walk, "_syscall", None)
    (tmp_path / "tree" / "folder").mkdir(parents=True)

    with mounted(tmp_path / "tree" / "mount", "-t", "tmpfs", "none"):
        (tmp_path / "tree" / "mount" / "precious").touch()
        with pytest.raises(StoreError, match="unmount it first"):
            trees.remove(tmp_path / "tree")
        assert os.listdir(tmp_path / "tree" / "mount") == ["precious"]

    trees.remove(tmp_path / "tree")
    assert os.listdir(tmp_path) == []


@needs("proc")
def test_a_folder_that_cannot_be_made_writable_costs_an_error_and_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree" / "closed" / "inside").mkdir(parents=True)
    (tmp_path / "tree" / "closed").chmod(0o500)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fchmod", broken)
    before = sorted(descriptors())
    with pytest.raises(StoreError, match="Input/output error"):
        trees.remove(tmp_path / "tree")

    assert sorted(descriptors()) == before


def test_removers_at_work_on_one_tree_do_not_disturb_each_other(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for n in range(200):
        (tree / f"{n % 20}" / f"{n}").mkdir(parents=True)
        (tree / f"{n % 20}" / f"{n}" / "file").touch()
    failures: list[BaseException] = []

    run([lambda: trees.remove(tree)] * 4, failures)

    assert failures == []
    assert not tree.exists()


def test_a_writer_that_never_stops_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "folder").mkdir(parents=True)
    rmdir = os.rmdir

    def beaten(name: str, *, dir_fd: int) -> None:
        if name == "folder":
            fd = os.open(name, os.O_RDONLY, dir_fd=dir_fd)
            os.close(os.open("new", os.O_CREAT, dir_fd=fd))
            os.close(fd)
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", beaten)
    with pytest.raises(StoreError, match=r"'folder'.*end that process"):
        trees.remove(tmp_path / "tree")
    monkeypatch.undo()

    trees.remove(tmp_path / "tree")
    assert os.listdir(tmp_path) == []


def run(jobs: list[Callable[[], None]], failures: list[BaseException]) -> None:
    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def remove_it(tree: Path, _: Path) -> set[str]:
    trees.remove(tree)
    return set()


def copy_it(tree: Path, scratch: Path) -> set[str]:
    try:
        trees.copy(tree, scratch)
    finally:
        names = {path.name for path in scratch.rglob("*")}
        trees.remove(scratch)
    return names


def copy_into_it(tree: Path, scratch: Path) -> set[str]:
    scratch.touch()
    trees.copy_into(scratch, tree, "a/below/new")
    return set()


@pytest.mark.parametrize("verb", [remove_it, copy_it])
def test_a_folder_swapped_for_a_link_at_the_last_moment_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[[Path, Path], set[str]]
) -> None:
    outside, tree, enter = tmp_path / "outside", tmp_path / "tree", _trees_walk.Chain.enter
    outside.mkdir()
    (outside / "precious").write_bytes(b"secret")
    (tree / "a" / "below").mkdir(parents=True)
    before, swapped = census(outside), list[Path]()

    def enter_late(chain: _trees_walk.Chain, name: str) -> None:
        if name == "a" and (tree / "a").is_dir() and not swapped:
            swapped.append((tree / "a").rename(tmp_path / "moved"))
            (tree / "a").symlink_to(outside)
        enter(chain, name)

    monkeypatch.setattr(_trees_walk.Chain, "enter", enter_late)
    if verb is copy_it:
        with pytest.raises(StoreError, match="'a'"):
            verb(tree, tmp_path / "scratch")
    else:
        verb(tree, tmp_path / "scratch")

    assert swapped
    assert census(outside) == before
    assert tree.exists() == (verb is copy_it)


@pytest.mark.parametrize("verb", [remove_it, copy_it, copy_into_it])
def test_a_folder_that_becomes_a_link_leads_nowhere(tmp_path: Path, verb: Callable[[Path, Path], set[str]]) -> None:
    outside, tree, done = tmp_path / "outside", tmp_path / "tree", threading.Event()
    (outside / "below").mkdir(parents=True)
    (outside / "below" / "precious").write_bytes(b"secret")
    before, seen, failures = census(outside), set[str](), list[BaseException]()

    def swap() -> None:
        while not done.is_set():
            with suppress(OSError):  # the other side was quicker
                os.rename(tree / "a", tree / "a~")
                os.symlink(outside, tree / "a")
                os.unlink(tree / "a")
                os.rename(tree / "a~", tree / "a")

    def act() -> None:
        try:
            for _ in range(100):
                with suppress(OSError):
                    (tree / "a").mkdir(parents=True, exist_ok=True)
                with suppress(StoreError):
                    seen.update(verb(tree, tmp_path / "scratch"))
        finally:
            done.set()

    run([act, swap], failures)

    assert failures == []
    assert census(outside) == before
    assert "precious" not in seen


# Copying into a tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "folder").mkdir(parents=True)
    (tree / "file").write_bytes(b"old")
    outside.mkdir()
    (tree / "absolute").symlink_to(outside)
    (tree / "relative").symlink_to("folder")
    return tree


def test_copy_into_makes_parents_merges_folders_and_replaces_files(tmp_path: Path, tree: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(b"new")
    (source / "link").symlink_to("/nowhere")
    (tmp_path / "base").hardlink_to(tree / "file")
    old = os.umask(0o077)

    try:
        trees.copy_into(source / "sub" / "file", tree, "file")
        trees.copy_into(source, tree, "x/y")
        trees.copy_into(source, tree, "./folder/")
        trees.copy_into(source / "link", tree, "relative")
        trees.copy_into(source / "sub", tree, ".")
    finally:
        os.umask(old)

    assert (tree / "file").read_bytes() == b"new"
    assert (tmp_path / "base").read_bytes() == b"old"
    assert (tree / "relative").readlink() == Path("/nowhere")
    assert census(tree / "x" / "y") == census(source) == census(tree / "folder")
    assert sorted(os.listdir(tree)) == ["absolute", "file", "folder", "relative", "x"]


def test_parents_made_by_copy_into_are_open_to_all_whatever_the_umask(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "file").touch()
    old = os.umask(0o077)

    try:
        trees.copy_into(tmp_path / "file", tree, "x/y/z")
    finally:
        os.umask(old)

    assert [stat.S_IMODE((tree / name).stat().st_mode) for name in ("x", "x/y")] == [0o755, 0o755]


@pytest.mark.parametrize("dest", ["", "/etc/x", "..", "a/../../x", "folder/..", "nul\0", "//x"])
def test_a_destination_that_is_no_path_inside_is_refused(tmp_path: Path, tree: Path, dest: str) -> None:
    (tmp_path / "file").touch()
    before = census(tmp_path)

    with pytest.raises(StoreError, match="inside a tree"):
        trees.copy_into(tmp_path / "file", tree, dest)
    with pytest.raises(StoreError, match="inside a tree"):
        trees.resolve_inside(tree, dest)

    assert census(tmp_path) == before


@pytest.mark.parametrize("dest", ["absolute/x", "relative/x", "file/x", "folder/../x/y", "absolute/"])
def test_no_link_in_the_tree_is_followed(tmp_path: Path, tree: Path, dest: str) -> None:
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "sub" / "file").touch()
    before = census(tmp_path)

    with pytest.raises(StoreError):
        trees.copy_into(tmp_path / "source", tree, dest)

    assert census(tmp_path) == before


def test_the_error_names_the_link(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "source" / "relative").mkdir(parents=True)

    with pytest.raises(StoreError, match="'absolute'"):
        trees.copy_into(tmp_path / "source", tree, "absolute/x")
    with pytest.raises(StoreError, match=r"'relative'.*where a folder is needed"):
        trees.copy_into(tmp_path / "source", tree, ".")
    with pytest.raises(StoreError, match="'folder'"):
        trees.copy_into(tree / "file", tree, "folder")

    assert (tree / "relative").is_symlink()


def test_a_tree_is_not_copied_into_itself(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(StoreError, match="inside of what it copies"):
        trees.copy_into(tmp_path, tree, "folder/copy")
    with pytest.raises(StoreError, match="inside of what it copies"):
        trees.copy_into(tree, tree, ".")

    assert (tree / "file").read_bytes() == b"old"


@pytest.mark.parametrize("verb", [trees.copy, lambda source, dest: trees.copy_into(source, dest.parent, dest.name)])
@needs("tmpfs")
def test_a_full_disk_is_no_space(
    tmp_path: Path, small_tmpfs: Callable[..., AbstractContextManager[Path]], verb: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"x" * (2 << 20))

    with small_tmpfs(size=1 << 20) as small:
        with pytest.raises(NoSpace, match="No space left") as caught:
            verb(tmp_path / "source", small / "copy")
        trees.remove(small / "copy")
        assert os.listdir(small) == []

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


# Looking


def test_resolve_inside_goes_through_folders_only(tmp_path: Path, tree: Path) -> None:
    (tree / "folder" / "below").mkdir()

    found = [trees.resolve_inside(tree, path) for path in (".", "folder", "folder//./below/")]
    for path in ("absolute", "relative", "relative/below", "file", "missing"):
        with pytest.raises(StoreError, match=path.split("/")[0]):
            trees.resolve_inside(tree, path)

    assert found == [tree, tree / "folder", tree / "folder" / "below"]


def test_usage_is_that_of_the_file_system(tmp_path: Path) -> None:
    usage = trees.usage(tmp_path)

    assert usage.total == shutil.disk_usage(tmp_path).total
    assert 0 < usage.free <= usage.total
    assert usage.inodes_total is None or usage.inodes_free is not None


def test_capabilities_are_tried_and_leave_nothing(tmp_path: Path) -> None:
    found = trees.capabilities(tmp_path)

    assert os.listdir(tmp_path) == []
    assert (Capability.OWNERS in found) == (os.geteuid() == 0)
    assert {Capability.HOST_TREE, Capability.MODES, Capability.SYMLINKS, Capability.FIFOS} <= found
