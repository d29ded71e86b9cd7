"""The backend `btrfs`: what is its own. What every backend must do is in test_btrfs_conformance.py."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storebackends
import storebackends_btrfs
from storebackends import BuildFailed, NoSpace, NotSupported, Store, StoreError, Workspace, process
from storebackends.registry import Registry, best
from storebackends.testing.harness import contents
from storebackends.testing.trees import make_rich, snapshot
from storebackends_btrfs import BtrfsOptions, probe
from tests.capabilities import MIB, loop_fs, mounted, needs, run
from tests.stores import files, kept, left_in_progress, writes

pytestmark = pytest.mark.slow

Fill = Callable[..., None]
ODD = ["new\nline", "-rf", os.fsdecode(b"\xff"), "n" * 255]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with loop_fs("btrfs", tmp_path_factory.mktemp("btrfs"), size=1024 * MIB) as folder:
        yield folder


@pytest.fixture
def store(disk: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A new store; in the end it is deleted, and no subvolume may be left."""
    with open_btrfs(disk / "store") as store:
        yield store
        assert list(store.fsck().findings) == []
        for id in list(store.ids()):
            store.delete(id, recursive=True)
        for cache in store.caches():
            store.delete_cache(cache.name)
        assert left_in_progress(store.root) == []
    assert subvolumes(disk) == []
    shutil.rmtree(disk / "store")


def open_btrfs(root: Path) -> Store:
    return storebackends.open_store(backend="btrfs", path=root, durability="none")


def subvolumes(mount: Path) -> list[str]:
    import btrfsutil

    with btrfsutil.SubvolumeIterator(mount) as found:
        return sorted(path for path, _ in found)


def nest(*places: str, read_only: bool = False) -> None:
    """Make a subvolume at each place, in order, with a file that has its name."""
    import btrfsutil

    for place in places:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        btrfsutil.create_subvolume(place)
        Path(place, "file").write_bytes(os.fsencode(os.path.basename(place)))
    for place in reversed(places):
        if read_only:
            btrfsutil.set_subvolume_read_only(place, True)


def nested_oddly(work: Workspace) -> None:
    tree = work.path
    nest(*(f"{tree}/in/{name}" for name in ODD))
    nest(f"{tree}/a", f"{tree}/a/closed/b", f"{tree}/a/closed/b/c", read_only=True)
    (tree / "a" / ".." / "in").chmod(0o500)


def fails(work: Workspace) -> None:
    nested_oddly(work)
    raise ValueError("meant to fail")


class TestSpec:
    def test_names_this_driver(self) -> None:
        (spec,) = storebackends_btrfs.storebackends_backends()

        assert (spec.name, spec.options) == ("btrfs", BtrfsOptions)
        assert spec.factory == "storebackends_btrfs.driver:BtrfsBackend"

    @needs("btrfs", "btrfsutil")
    def test_on_btrfs_it_is_the_best(self, disk: Path) -> None:
        support = probe(disk / "not" / "yet")

        assert support.usable
        assert best(Registry().supports(disk)) == "btrfs"
        assert os.listdir(disk) == []
        assert subvolumes(disk) == []

    @needs("btrfsutil", "tmpfs")
    def test_elsewhere_it_says_where_it_works(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "other", "-t", "tmpfs", "tmpfs") as other:
            support = probe(other)
            with pytest.raises(NotSupported, match="is not on btrfs; put the store on a btrfs"):
                open_btrfs(other / "store")

        assert (support.usable, support.reason) == (False, f"{other} is not on btrfs")

    @needs("xfs")
    def test_auto_takes_reflinks_where_they_are_and_copies_elsewhere(self, tmp_path: Path) -> None:
        for kind, size, rank in (("xfs", 512, 50), ("ext4", 64, 10)):
            with loop_fs(kind, tmp_path, size=size * MIB) as folder:
                answers = Registry().supports(folder)

                assert (best(answers), answers["copy"].rank) == ("copy", rank)
                assert not answers["btrfs"].usable

    @needs("btrfs", "btrfsutil")
    def test_auto_opens_it(self, disk: Path) -> None:
        with storebackends.open_store(backend="auto", path=disk / "auto", durability="none") as store:
            assert store.backend == "btrfs"
        shutil.rmtree(disk / "auto")

    @pytest.mark.skipif(sys.platform != "linux", reason="btrfs is Linux's")
    @pytest.mark.parametrize("release", ["5.7.19-generic", "4.19.0", "what"])
    def test_a_kernel_whose_snapshots_can_hang_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str
    ) -> None:
        running = os.uname()
        monkeypatch.setattr("os.uname", lambda: os.uname_result((*running[:2], release, *running[3:])))

        support = probe(tmp_path)

        assert not support.usable
        assert f"before 5.8, and this is {release}" in support.reason

    @pytest.mark.skipif(sys.platform != "linux", reason="btrfs is Linux's")
    def test_without_btrfsutil_it_says_how_to_get_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        volumes = importlib.import_module("storebackends_btrfs.volumes")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "btrfsutil", None)
            importlib.reload(volumes)
        try:
            support = probe(tmp_path)
            with pytest.raises(NotSupported, match=r"pip install 'storebackends\[btrfs\]'"):
                open_btrfs(tmp_path / "store")
        finally:
            importlib.reload(volumes)

        assert not support.usable
        assert "btrfsutil" in support.reason

    @needs("btrfs_of_a_user", "btrfsutil")
    def test_a_user_is_told_what_deletes_faster(self) -> None:
        support = probe(Path(os.environ["STOREBACKENDS_BTRFS"]))

        assert support.usable
        assert "user_subvol_rm_allowed" in support.fix

    @needs("btrfs_that_allows", "btrfsutil")
    def test_a_user_who_may_delete_is_told_nothing(self) -> None:
        support = probe(Path(os.environ["STOREBACKENDS_BTRFS_ALLOWS"]))

        assert (support.usable, support.fix) == (True, "")


@needs("btrfs", "btrfsutil")
class TestTree:
    def test_a_step_is_a_subvolume_and_starts_no_process(self, store: Store) -> None:
        store.build("base", writes(f="1")).release()
        started = process.started

        with store.build("child", writes(g="2"), base="base") as result:
            status = os.stat(result.path)

        assert process.started == started
        assert (status.st_ino, stat.S_IMODE(status.st_mode)) == (256, 0o755)

    def test_a_clone_takes_no_space(self, store: Store) -> None:
        store.build("base", lambda work: (work.path / "large").write_bytes(os.urandom(64 * MIB))).release()
        os.sync()
        free = store.usage().free

        for n in range(20):
            store.build(f"child-{n}", writes(), base="base").release()
        os.sync()

        assert free - store.usage().free < 32 * MIB

    def test_what_is_nested_is_cloned_under_any_name_with_all_its_metadata(self, store: Store) -> None:
        def rich(work: Workspace) -> None:
            nested_oddly(work)
            make_rich(work.path / "in" / ODD[0])
            os.utime(work.path / "in", ns=(1, 1_000_000_007))

        def same(work: Workspace) -> None:
            assert snapshot(work.path) == before
            nest(f"{work.path}/a/closed/b/c/deeper")  # so all of it can be written to

        with store.build("base", rich) as base:
            before = snapshot(base.path)
            store.build("child", same, base="base").release()
            assert snapshot(base.path) == before
            with kept(store, "child") as child:
                assert snapshot(child.path).keys() > before.keys()

    def test_what_is_nested_is_sealed(self, store: Store) -> None:
        with store.build("id", nested_oddly) as result:
            for place in (".", "a", "a/closed/b/c", *(f"in/{name}" for name in ODD)):
                with pytest.raises(OSError, match="Read-only"):
                    (result.path / place / "new").touch()

    def test_what_is_nested_goes_with_a_build_that_fails(self, store: Store) -> None:
        with pytest.raises(BuildFailed):
            store.build("id", fails)

        assert subvolumes(store.root.parent) == []

    def test_what_is_nested_in_a_cache_is_kept(self, store: Store) -> None:
        with store.cache("name") as path:
            nest(f"{path}/nested", read_only=True)

        for _ in range(2):
            with store.cache("name") as path:
                assert contents(path) == {"nested/file": b"nested"}
                (path / "nested" / "file").write_bytes(b"nested")

    @pytest.mark.parametrize("kind", ["folder", "link", "file"])
    def test_a_tree_that_was_replaced_is_no_result(self, store: Store, kind: str, tmp_path: Path) -> None:
        (tmp_path / "precious").touch()

        def replace(work: Workspace) -> None:
            work.path.rmdir()
            if kind == "folder":
                work.path.mkdir()
            elif kind == "link":
                work.path.symlink_to(tmp_path)
            else:
                work.path.touch()

        with pytest.raises(StoreError, match=r"plain folder|removed or replaced"):
            store.build("id", replace)

        assert store.result("id") is None
        assert (tmp_path / "precious").exists()

    def test_no_mount_is_entered_by_a_deletion(self, store: Store, disk: Path) -> None:
        """Neither over the tree nor in it: what is mounted is somebody else's, and may be a subvolume too."""
        nest(f"{disk}/theirs", f"{disk}/theirs/inner")
        mounts: list[Path] = []

        def binds(work: Workspace) -> None:
            nest(f"{work.path}/nested/theirs")
            for place in (work.path / "nested" / "theirs", work.path):
                run("mount", "--bind", disk / "theirs", place)
                mounts.append(place)
            raise ValueError("meant to fail")

        try:
            with pytest.raises(BuildFailed):
                store.build("id", binds)

            assert contents(disk / "theirs") == {"file": b"theirs", "inner/file": b"inner"}
        finally:
            for line in Path("/proc/self/mountinfo").read_text().splitlines()[::-1]:
                if "/trash/" in (place := line.split()[4]):
                    run("umount", place)
            nest_gone(disk / "theirs")
        open_btrfs(store.root).close()


def nest_gone(place: Path) -> None:
    run("btrfs", "subvolume", "delete", place / "inner", place)


@needs("btrfs", "btrfsutil")
class TestSpace:
    def test_usage_tells_of_data_and_metadata(self, store: Store) -> None:
        said = run("btrfs", "filesystem", "usage", "--raw", store.root.parent)
        facts = {line.split(":")[0].strip(): line for line in said.splitlines() if ":" in line}
        unallocated = int(facts["Device unallocated"].split()[-1])

        usage = store.usage()

        assert usage.inodes_total is None
        assert usage.metadata_total is not None
        assert usage.metadata_free is not None
        size, used = (int(part.split(":")[-1]) for part in facts["Metadata,DUP"].split("(")[0].split(",")[1:])
        assert usage.metadata_total == size + unallocated // 2
        assert 0 < usage.metadata_free <= usage.metadata_total - used

    def test_mixed_groups_have_one_figure(self, tmp_path: Path) -> None:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        run("mkfs.btrfs", "-q", "--mixed", image)
        with mounted(tmp_path / "mnt", "-o", "loop", image) as folder, open_btrfs(folder / "store") as store:
            usage = store.usage()

        assert usage.total > 0
        assert usage.metadata_total is None

    def test_settling_waits_for_what_was_deleted(self, store: Store) -> None:
        import btrfsutil

        store.build("id", lambda work: (work.path / "large").write_bytes(os.urandom(32 * MIB))).release()
        os.sync()
        free = store.usage().free

        store.delete("id")
        settled = store._backend.settle(60)

        assert settled
        assert btrfsutil.deleted_subvolumes(store.root) == []
        assert store.usage().free >= free + 30 * MIB

    def test_settling_ends_in_time(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """However long the kernel takes: it has been seen to take days."""
        monkeypatch.setattr("storebackends_btrfs.volumes.deleted", lambda _: {1})

        assert not store._backend.settle(0.2)

    def test_a_store_whose_quotas_are_on_works_the_same(self, tmp_path: Path) -> None:
        with loop_fs("btrfs", tmp_path, size=256 * MIB) as folder:
            run("btrfs", "quota", "enable", folder)
            with open_btrfs(folder / "store") as store:
                store.build("base", nested_oddly).release()
                store.build("child", writes(f="1"), base="base").release()
                store.delete("base", recursive=True)
            assert subvolumes(folder) == []


@pytest.fixture(params=["data", "metadata"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Fill]]:
    """A small disk, and what fills it: data, or metadata, which have the less room the more the data have taken."""
    with loop_fs("btrfs", tmp_path, size=256 * MIB) as folder:
        if request.param == "metadata":
            with (folder / "theirs").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 170 * MIB)
        yield folder, fill_data if request.param == "data" else fill_metadata


def fill_data(folder: Path, count: int = 1_000_000) -> None:
    for n in range(count):
        (folder / f"{n}").write_bytes(os.urandom(MIB))


def fill_metadata(folder: Path, count: int = 1_000_000) -> None:
    for n in range(count):
        (folder / f"{n}").symlink_to("x" * 3900)


@needs("btrfs", "btrfsutil")
def test_a_full_disk_fails_the_build_and_after_a_deletion_the_store_works(full: tuple[Path, Fill]) -> None:
    folder, fill = full
    with open_btrfs(folder / "store") as store:
        store.build("base", writes(f="1")).release()
        store.build("some", lambda work: fill(work.path, 10)).release()

        with pytest.raises((BuildFailed, NoSpace)) as caught:
            store.build("full", lambda work: fill(work.path), base="base")

        cause = caught.value.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == errno.ENOSPC
        assert store.result("full") is None
        assert left_in_progress(store.root) == []
        store.delete("some")
        with store.build("again", writes(g="2"), base="base") as result:
            assert files(result.path) == {"f": "1", "g": "2"}
        assert subvolumes(folder) == ["store/result/again/rootfs", "store/result/base/rootfs"]


@needs("btrfs", "btrfsutil")
def test_a_disk_that_others_filled_costs_no_result_and_once_there_is_room_all_works(full: tuple[Path, Fill]) -> None:
    folder, fill = full
    with open_btrfs(folder / "store") as store:
        store.build("base", writes(f="1")).release()
        store.build("large", lambda work: fill(work.path, 10)).release()
        (folder / "others").mkdir()
        with pytest.raises(OSError, match="No space"):
            fill(folder / "others")

        with pytest.raises((BuildFailed, NoSpace)):
            store.build("child", lambda work: fill(work.path), base="base").release()
        try:
            store.delete("large")
        except NoSpace:  # to hide a result takes metadata, and there is not even enough for that
            with kept(store, "large") as large:
                assert len(os.listdir(large.path)) == 10
        shutil.rmtree(folder / "others")
        store.delete("large")

        with store.build("again", writes(g="2"), base="base") as result:
            assert files(result.path) == {"f": "1", "g": "2"}
    with open_btrfs(folder / "store") as store:
        assert left_in_progress(store.root) == []
        assert subvolumes(folder) == ["store/result/again/rootfs", "store/result/base/rootfs"]
