"""The backend `zfs`: what it has beyond what every backend must do, which is in test_zfs_conformance.py."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import storebackends
import storebackends_zfs
from storebackends import Store, Workspace, process
from storebackends.errors import BuildFailed, Busy, NoSpace, NotFound, NotSupported, StoreError
from storebackends_zfs import ZfsOptions
from storebackends_zfs.commands import LONGEST_DATASET
from tests import capabilities
from tests.capabilities import needs
from tests.plugins.zfs import datasets, named, zfs
from tests.plugins.zfs import pool as pool
from tests.stores import files, kept, until, writes

MIB = 1 << 20


@pytest.mark.parametrize("name", ["tank", "tank/builds", "t/a_b.c:d-e f", "t/" + "x" * (LONGEST_DATASET - 2)])
def test_names_that_zfs_takes_are_taken(name: str) -> None:
    assert ZfsOptions(dataset=name).dataset == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "/tank", "tank/", "tank//a", "tank/../a", "tank/.", "-tank", "1tank", "tank ", "tank\n"),
        *("tank@a", "tank#a", "tank/a%b", "tank/ä", "t/" + "x" * (LONGEST_DATASET - 1)),
    ],
)
def test_names_that_zfs_refuses_are_refused_before_it_is_asked(name: str) -> None:
    with pytest.raises(ValidationError, match="ZFS"):
        ZfsOptions(dataset=name)


@pytest.mark.parametrize(
    ("said", "usable", "reason"),
    [
        ("zfs-2.3.2-1\nzfs-kmod-2.3.2-1\n", True, "zfs-2.3.2-1"),
        ("zfs-0.8.6-1\nzfs-kmod-0.8.6-1\n", False, "too old"),
        ("zebra 5\n", False, "not OpenZFS"),
        (None, False, "there is no ZFS"),
    ],
)
@needs("root")
def test_the_probe_tells_what_there_is(
    said: str | None, usable: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said is not None:
        program = tmp_path / "zfs"
        program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("storebackends_zfs.commands._SBIN", ())

    support = storebackends_zfs.probe(tmp_path)

    assert (support.usable, support.rank) == (usable, 0)
    assert reason in support.reason


@needs("root")
def test_a_host_without_zfs_says_so_with_and_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("storebackends_zfs.commands._SBIN", ())

    for path in (None, tmp_path / "store"):
        with pytest.raises(NotSupported, match="there is no ZFS.*install OpenZFS"):
            storebackends.open_store(backend="zfs", dataset="tank/builds", path=path)


# On real ZFS.


@pytest.fixture
def opened(pool: str) -> Iterator[Callable[..., Store]]:
    """Open a store of this test's own, in a dataset of its own; again each time."""
    dataset = f"{pool}/{random.SystemRandom().getrandbits(32):08x}"
    zfs("create", dataset)
    stores = []

    def open_it(**options: Any) -> Store:
        given = {"dataset": dataset, "durability": "none"} | options
        stores.append(storebackends.open_store(backend="zfs", **given))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()
    zfs("destroy", "-r", dataset)


@pytest.fixture
def store(opened: Callable[..., Store]) -> Store:
    return opened()


def dataset_of(store: Store, id: str | None = None) -> str:
    """The dataset of a result, or that of the store."""
    own = f"{parent_of(store)}/storebackends-{json.loads((store.root / 'store.json').read_bytes())['uuid']}"
    if id is None:
        return own
    return f"{own}/{json.loads((store.root / 'result' / id / 'tree.json').read_bytes())['dataset']}"


def parent_of(store: Store) -> str:
    return str(store._backend.options.dataset)


def left(store: Store) -> set[str]:
    """Datasets that no result names."""
    return datasets(parent_of(store), store.root) - named(store.root)


@contextmanager
def started() -> Iterator[Callable[[], int]]:
    """How many commands were started in the block so far."""
    before = process.started
    yield lambda: process.started - before


@needs("zfs")
class TestCommands:
    def test_a_step_takes_three_at_most_a_delete_two_a_look_none(self, store: Store) -> None:
        with started() as count:
            store.build("first", writes(a="1")).release()
            assert count() <= 3
        with started() as count:
            store.build("second", writes(b="2"), base="first").release()
            assert count() <= 3
        with started() as count:
            assert files(kept(store, "second").path) == {"a": "1", "b": "2"}
            assert sorted(store.ids()) == ["first", "second"]
            assert count() == 0
        with started() as count:
            store.delete("second")
            assert count() <= 2

    @pytest.mark.soak  # the kit has one of 128
    def test_a_chain_of_100_is_whole_and_goes(self, store: Store) -> None:
        base = None
        for number in range(100):
            store.build(f"step-{number}", writes(**{f"f{number}": str(number)}), base=base).release()
            base = f"step-{number}"

        assert files(kept(store, "step-99").path) == {f"f{number}": str(number) for number in range(100)}
        store.delete("step-0", recursive=True)
        assert datasets(parent_of(store), store.root) == set()


@needs("zfs")
class TestPlace:
    def test_the_store_is_in_the_dataset_by_itself_and_closed_to_others(self, store: Store) -> None:
        (point,) = zfs("get", "-H", "-o", "value", "mountpoint", parent_of(store))

        assert store.root == Path(point, "storebackends")
        for folder in (store.root, Path(point, dataset_of(store).rpartition("/")[2])):
            assert folder.stat().st_mode & 0o077 == 0

    def test_a_dataset_that_is_not_there_has_no_mount_point_or_is_read_only_is_told(self, pool: str) -> None:
        zfs("create", "-o", "mountpoint=none", f"{pool}/none")
        zfs("create", "-o", "readonly=on", f"{pool}/readonly")

        for name, fix in (("missing", "zfs create -p"), ("none", "zfs set mountpoint="), ("readonly", "readonly=off")):
            with pytest.raises(NotSupported, match=fix):
                storebackends.open_store(backend="zfs", dataset=f"{pool}/{name}")

        for name in ("none", "readonly"):
            zfs("destroy", f"{pool}/{name}")

    def test_a_pool_that_is_read_only_or_exported_is_told_and_loses_nothing(self, tmp_path: Path) -> None:
        with capabilities.zpool(tmp_path, size=128 * MIB) as own:
            options: dict[str, Any] = {
                "backend": "zfs",
                "dataset": own,
                "path": tmp_path / "store",
                "durability": "none",
            }
            with storebackends.open_store(**options) as store:
                store.build("id", writes(a="1")).release()

                capabilities.run("zpool", "export", own)
                with pytest.raises(StoreError, match="import"):
                    kept(store, "id").path  # noqa: B018
                with pytest.raises(StoreError, match="import"):
                    store.delete("id")
                with pytest.raises(StoreError):
                    store.build("other", writes(a="1"))
            with pytest.raises(NotSupported, match="import"):
                storebackends.open_store(**options)
            (grave,) = (tmp_path / "store" / "trash").glob("id~*")
            os.rename(grave, tmp_path / "store" / "result" / "id")  # as if nobody had tried to delete it

            capabilities.run("zpool", "import", "-o", "readonly=on", "-d", tmp_path, own)
            with pytest.raises(NotSupported, match="read-only"):
                storebackends.open_store(**options)
            capabilities.run("zpool", "export", own)
            capabilities.run("zpool", "import", "-d", tmp_path, own)
            with storebackends.open_store(**options) as store:
                assert files(kept(store, "id").path) == {"a": "1"}


@needs("zfs")
class TestMounts:
    def test_what_was_unmounted_is_mounted_when_it_is_used(self, store: Store) -> None:
        store.build("base", writes(a="1")).release()

        zfs("unmount", dataset_of(store, "base"))
        with store.build("child", writes(b="2"), base="base") as child:
            assert files(child.path) == {"a": "1", "b": "2"}
        assert files(kept(store, "base").path) == {"a": "1"}

    def test_a_tree_unmounted_under_its_build_fails_that_and_leaves_nothing(self, store: Store) -> None:
        def function(work: Workspace) -> None:
            (work.path / "a").write_text("1")
            zfs("unmount", work.path)

        with pytest.raises(StoreError, match="unmounted while it was being built"):
            store.build("id", function)

        assert store.result("id") is None
        assert left(store) == set()

    def test_a_tree_that_somebody_destroyed_is_reported(self, store: Store) -> None:
        store.build("id", writes(a="1")).release()

        zfs("destroy", "-r", dataset_of(store, "id"))

        with pytest.raises(NotFound, match="somebody destroyed"):
            kept(store, "id").path  # noqa: B018
        assert [finding.kind for finding in store.fsck().findings] == ["tree"]
        with pytest.raises(StoreError, match="somebody destroyed"):
            store.build("child", writes(), base="id")
        store.delete("id")

    def test_what_a_build_made_below_its_dataset_is_read_only_with_it(self, store: Store) -> None:
        def function(work: Workspace) -> None:
            (dataset,) = zfs("list", "-H", "-o", "name", work.path)
            zfs("create", "-o", "readonly=off", f"{dataset}/nested")
            zfs("create", "-o", f"mountpoint={work.path}/elsewhere", f"{dataset}/other")
            (work.path / "nested" / "a").write_text("1")
            (work.path / "elsewhere" / "b").write_text("2")

        store.build("base", function).release()
        store.build("child", writes(c="3"), base="base").release()

        for id in ("base", "child"):
            tree = kept(store, id).path
            assert {"nested/a": "1", "elsewhere/b": "2"}.items() <= files(tree).items()
            for folder in ("nested", "elsewhere"):
                with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
                    (tree / folder / "new").touch()
        store.delete("base", recursive=True)
        assert datasets(parent_of(store), store.root) == set()

    def test_a_link_that_a_build_put_in_the_way_of_a_nested_dataset_is_never_followed(
        self, store: Store, tmp_path: Path
    ) -> None:
        def nest(work: Workspace) -> None:
            (dataset,) = zfs("list", "-H", "-o", "name", work.path)
            (work.path / "folder").mkdir()
            zfs("create", "-o", f"mountpoint={work.path}/folder/nested", f"{dataset}/nested")

        def lead_away(work: Workspace) -> None:
            os.rename(work.path / "folder", work.path / "moved")
            (work.path / "folder").symlink_to(tmp_path)

        (tmp_path / "nested").mkdir()
        store.build("base", nest).release()

        with pytest.raises(StoreError, match="folder"):
            store.build("child", lead_away, base="base")

        assert store.result("child") is None
        assert left(store) == set()
        assert not os.path.ismount(tmp_path / "nested")


@needs("zfs")
class TestBusy:
    def test_who_holds_a_tree_is_named_and_it_goes_later(self, opened: Callable[..., Store]) -> None:
        store = opened()
        with store.build("id", writes(a="1")) as result:
            holder = subprocess.Popen(["sleep", "100"], cwd=result.path)
        try:
            with pytest.raises(Busy) as caught:
                store.delete("id")
        finally:
            holder.kill()
            holder.wait()

        assert any(f"process {holder.pid} (sleep" in name for name in caught.value.holders)
        assert store.result("id") is None
        opened()
        assert datasets(parent_of(store), store.root) == set()

    def test_a_base_goes_before_its_clone_if_it_has_to(self, store: Store) -> None:
        """A delete by the store never does that; recovery may have to."""
        backend = store._backend
        for id, base in (("a", None), ("b", "a"), ("c", "b"), ("d", "b")):
            store.build(id, writes(**{id: id}), base=base).release()

        for id in ("b", "a"):
            backend.delete(id)

        assert files(kept(store, "c").path) == {"a": "a", "b": "b", "c": "c"}
        assert files(kept(store, "d").path) == {"a": "a", "b": "b", "d": "d"}
        store.build("e", writes(e="e"), base="c").release()
        for id in ("e", "c", "d"):
            backend.delete(id)
        listed = zfs("list", "-H", "-o", "name", "-t", "all", "-r", dataset_of(store))
        assert listed == [dataset_of(store)]

    def test_generations_of_a_cache_do_not_pile_up(self, store: Store) -> None:
        for number in range(5):
            with store.cache("name") as folder:
                (folder / str(number)).write_text("x" * 1000)

        with store.cache("name", mode="private") as folder:
            assert sorted(os.listdir(folder)) == ["0", "1", "2", "3", "4"]
        listed = zfs("list", "-H", "-o", "name", "-t", "all", "-r", dataset_of(store))
        assert len(listed) == 3, listed  # the store's, the newest generation and its snapshot


@needs("zfs")
class TestSpace:
    def test_a_size_is_what_a_deletion_frees(self, store: Store) -> None:
        def function(work: Workspace) -> None:
            (work.path / "data").write_bytes(random.Random(1).randbytes(8 * MIB))

        store.build("base", function).release()
        store.build("child", writes(a="1"), base="base").release()

        assert not store.size("base").exact
        child = store.size("child")
        assert child.exact
        assert child.bytes < MIB
        store.delete("child")
        size, before = store.size("base"), store.usage().free
        assert size.exact
        store.delete("base")
        assert store._backend.settle(60)
        assert store.usage().free - before == pytest.approx(size.bytes, rel=0.1)

    def test_the_quota_nearest_to_its_end_is_what_is_left(self, pool: str, store: Store) -> None:
        assert store.usage().free > 100 * MIB

        zfs("set", f"quota={16 * MIB}", parent_of(store))

        assert store.usage().total == 16 * MIB
        assert store.usage().free <= 16 * MIB

    def test_a_full_pool_fails_the_build_and_the_store_goes_on(self, tmp_path: Path) -> None:
        def function(work: Workspace) -> None:
            rng = random.Random(1)
            for number in range(1000):
                (work.path / str(number)).write_bytes(rng.randbytes(MIB))

        with capabilities.zpool(tmp_path, size=96 * MIB) as own:
            options: dict[str, Any] = {
                "backend": "zfs",
                "dataset": own,
                "path": tmp_path / "store",
                "durability": "none",
            }
            with storebackends.open_store(**options) as store:
                store.build("base", writes(a="1")).release()
                with pytest.raises((BuildFailed, NoSpace), match=os.strerror(errno.ENOSPC)):
                    store.build("id", function, base="base")
                assert store.result("id") is None
                assert left(store) == set()
                assert store._backend.settle(60)
                with store.build("id", writes(b="2"), base="base") as result:
                    assert files(result.path) == {"a": "1", "b": "2"}


@needs("zfs")
class TestRecovery:
    def test_what_no_entry_names_goes_whatever_hangs_on_it(self, opened: Callable[..., Store]) -> None:
        store = opened()
        store.build("id", writes(a="1")).release()
        own = dataset_of(store)
        zfs("create", f"{own}/stray")
        zfs("snapshot", f"{own}/stray@sealed")
        zfs("clone", f"{own}/stray@sealed", f"{own}/another")

        assert {finding.what for finding in store.fsck().findings} == {f"{own}/stray", f"{own}/another"}
        opened()

        assert left(store) == set()
        assert files(kept(store, "id").path) == {"a": "1"}

    def test_what_is_not_mounted_or_damaged_is_nobodys_leftover(self, opened: Callable[..., Store]) -> None:
        store = opened()
        store.build("result", writes(a="1")).release()
        store.build("damaged", writes(b="2")).release()
        with store.cache("name") as folder:
            (folder / "c").write_text("3")
        (store.root / "result" / "damaged" / "build.json").write_bytes(b"torn")
        assert "damaged" in {finding.what for finding in store.fsck(repair=True).findings}
        before = datasets(parent_of(store), store.root)
        for name in before:
            zfs("unmount", f"{dataset_of(store)}/{name}")

        opened()

        assert datasets(parent_of(store), store.root) == before
        with store.cache("name", mode="private") as folder:
            assert os.listdir(folder) == ["c"]

    def test_random_kills_show_no_half_result_and_leave_nothing(
        self, opened: Callable[..., Store], rng: random.Random
    ) -> None:
        kill_builders(opened, rng, 10)

    @pytest.mark.soak
    def test_50_random_kills(self, opened: Callable[..., Store], rng: random.Random) -> None:
        kill_builders(opened, rng, 50)


def builder(dataset: str, number: str, ready: Connection) -> None:
    """A build, a loan and a deletion, in a process that may be killed at any moment."""
    with storebackends.open_store(backend="zfs", dataset=dataset, durability="none") as store:
        ready.send(None)
        store.build(f"id-{number}", writes(**{number: number}), base="base").release()
        with store.cache("cache") as folder:
            (folder / number).write_text(number)
        store.delete(f"id-{number}")


def kill_builders(opened: Callable[..., Store], rng: random.Random, kills: int) -> None:
    """Kill that many builders; after each, all that the store shows is whole."""
    store, fork = opened(), multiprocessing.get_context("fork")
    store.build("base", writes(base="base")).release()
    killed = 0
    for number in range(kills * 3):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=builder, args=(parent_of(store), str(number), theirs))
        process.start()
        theirs.close()
        ours.recv()
        process.join(rng.uniform(0, 2))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        process.close()
        ours.close()
        with opened() as looking:
            for id in looking.ids():
                own = {} if id == "base" else {id.partition("-")[2]: id.partition("-")[2]}
                with kept(looking, id) as result:
                    assert files(result.path) == {"base": "base"} | own
        if killed == kills:
            break
    assert killed == kills
    settled(store, opened)


def settled(store: Store, opened: Callable[..., Store]) -> None:
    """After a last command of a killed builder's has ended, the next open leaves nothing but what is kept."""

    def nothing_is_left() -> bool:
        opened().close()
        return left(store) == set()

    until(nothing_is_left)
    for room in ("in-progress", "loans", "trash", "scratch"):
        assert os.listdir(store.root / room) == []


@needs("zfs")
class TestSudo:
    def test_a_user_with_sudo_builds_and_deletes(self, pool: str, tmp_path: Path) -> None:
        capabilities.require("sudo_zfs")
        dataset = f"{pool}/sudo"
        zfs("create", dataset)
        (point,) = zfs("get", "-H", "-o", "value", "mountpoint", dataset)
        os.chown(point, 65534, 65534)
        program = """
import os, sys, storebackends, storebackends_zfs
from pathlib import Path
os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.environ["HOME"] = "/"
print(storebackends_zfs.probe(Path("/")).reason)
fill = lambda work: (work.path / "a").write_text("1")
try:
    storebackends.open_store(backend="zfs", dataset=sys.argv[1])
except storebackends.NotSupported as error:
    print(error.fix)
with storebackends.open_store(backend="zfs", dataset=sys.argv[1], sudo=True) as store:
    with store.build("base", fill), store.build("child", fill, base="base") as child:
        print((child.path / "a").read_text(), child.path.stat().st_uid)
    store.delete("base", recursive=True)
    print(sorted(store.ids()))
"""
        for folder in (Path(point), *Path(point).parents):
            os.chmod(folder, folder.stat().st_mode | 0o111)

        done = subprocess.run([sys.executable, "-c", program, dataset], capture_output=True, text=True, timeout=300)

        assert done.returncode == 0, done.stderr
        reason, fix, built, ids = done.stdout.splitlines()
        assert "by sudo: set sudo = true" in reason
        assert fix == "set sudo = true"
        assert (built, ids) == ("1 65534", "[]")
        zfs("destroy", "-r", dataset)
