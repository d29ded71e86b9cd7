from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from storebackends import StoreError, durability
from storebackends.opening import open_store
from tests.capabilities import needs
from tests.stores import kept, until, writes


def is_marked(root: Path, id: str) -> bool:
    return (root / "result" / id / "synced").exists()


def test_group_marks_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "PAUSE", 0.01)
    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("a", writes(f="1")).release()
        until(lambda: is_marked(store.root, "a"))


@needs("syncfs")
def test_group_marks_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "PAUSE", 3600)
    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("a", writes(f="1")).release()
        assert not is_marked(store.root, "a")

    assert is_marked(store.root, "a")


@needs("syncfs")
def test_after_a_flush_the_marks_are_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "PAUSE", 3600)
    store = open_store(backend="copy", path=tmp_path / "store")
    store.build("a", writes(f="1")).release()
    barrier, covered = store._durability.barrier, list[bool]()

    def watched() -> None:
        covered.append(is_marked(store.root, "a"))
        barrier()

    monkeypatch.setattr(store._durability, "barrier", watched)
    store.close()

    assert covered == [False, True]


@needs("syncfs")
def test_group_marks_what_earlier_processes_left(tmp_path: Path) -> None:
    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("a", writes(f="1")).release()
    (tmp_path / "store" / "result" / "a" / "synced").unlink()

    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("b", writes(f="1")).release()

    assert is_marked(store.root, "a")
    assert is_marked(store.root, "b")


def test_full_brings_the_log_and_the_record_to_the_disk_where_only_the_tree_is_sealed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr("storebackends_copy.driver.CopyBackend.seals_durably", True)
    monkeypatch.setattr(durability, "_fsync", lambda path: flushed.append(path.name))

    with open_store(backend="copy", path=tmp_path / "store", durability="full") as store:
        store.build("a", lambda work: work.log.write(b"line")).release()

        assert {"log", "build.json"} <= set(flushed)
        assert is_marked(store.root, "a")


@needs("syncfs")
def test_group_never_marks_another_attempt_than_its_barrier_covered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "PAUSE", 3600)
    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("a", writes(f="1")).release()
        barrier = store._durability.barrier

        def slow_barrier() -> None:
            barrier()
            if not list(store.root.glob("result/a/rootfs/g")):
                store.delete("a")
                store.build("a", writes(g="2")).release()

        monkeypatch.setattr(store._durability, "barrier", slow_barrier)
        store._durability.flush()

        assert not is_marked(store.root, "a")
    assert is_marked(store.root, "a")


def test_full_marks_before_build_returns(tmp_path: Path) -> None:
    with open_store(backend="copy", path=tmp_path / "store", durability="full") as store:
        store.build("a", writes(f="1")).release()

        assert is_marked(store.root, "a")


def test_full_gives_nobody_a_result_whose_name_may_not_be_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = durability._fsync_folder

    def watch(folder: Path) -> None:
        synced.append(folder)
        fsync(folder)

    monkeypatch.setattr(durability, "_fsync_folder", watch)
    with open_store(backend="copy", path=tmp_path / "store", durability="full") as store:
        results = store.root / "result"
        with monkeypatch.context() as patch:  # as if the builder were killed between the rename and what follows it
            patch.setattr(store._durability, "published", lambda *_: None)
            store.build("a", writes(f="1")).release()
        assert results not in synced

        with open_store(backend="copy", path=store.root, durability="full") as other, kept(other, "a"):
            assert synced[-1] == results
        synced.clear()
        store.build("a", writes()).release()
        store.build("b", writes(f="1")).release()
        assert synced.count(results) == 1  # of the new one
        with kept(store, "a"), kept(store, "b"):
            assert synced.count(results) == 1


def test_none_marks_nothing(tmp_path: Path) -> None:
    with open_store(backend="copy", path=tmp_path / "store", durability="none") as store:
        store.build("a", writes(f="1")).release()

    assert not is_marked(store.root, "a")


@pytest.mark.parametrize("mode", ["group", "full"])
def test_without_syncfs_files_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    flushed = set[int]()
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(durability, "_syncfs", lambda: None)
    monkeypatch.setattr(os, "fsync", watch)
    with open_store(backend="copy", path=tmp_path / "store", durability=mode) as store:
        store.build("a", writes(f="1")).release()

        assert is_marked(store.root, "a")
        result = store.root / "result" / "a"
        assert {os.stat(result / name).st_ino for name in ("rootfs/f", "log", "build.json")} <= flushed


@needs("syncfs")
def test_full_fails_the_build_where_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(backend="copy", path=tmp_path / "store", durability="full") as store:
        monkeypatch.setattr(durability, "_syncfs", lambda: lambda descriptor: -1)

        with pytest.raises(StoreError, match="failed to write"):
            store.build("a", writes(f="1"))

        assert store.result("a") is None


@needs("syncfs")
def test_group_never_marks_what_a_failing_disk_may_have_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(backend="copy", path=tmp_path / "store")
    store.build("a", writes(f="1")).release()
    with monkeypatch.context() as patch:
        patch.setattr(durability, "_syncfs", lambda: lambda descriptor: -1)
        with pytest.raises(StoreError, match="failed to write"):
            store.close()

    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("b", writes(f="1")).release()

    assert is_marked(store.root, "b")
    assert not is_marked(store.root, "a")


@needs("syncfs")
def test_a_disk_that_fails_while_marks_are_written_makes_what_came_meanwhile_suspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "PAUSE", 3600)
    store = open_store(backend="copy", path=tmp_path / "store")
    store.build("a", writes(f="1")).release()

    def failing() -> None:
        if is_marked(store.root, "a"):
            raise StoreError("the disk failed to write")
        store.build("b", writes(f="1")).release()

    with monkeypatch.context() as patch:
        patch.setattr(store._durability, "barrier", failing)
        with pytest.raises(StoreError, match="failed to write"):
            store._durability.flush()
    store.close()
    with open_store(backend="copy", path=tmp_path / "store") as store:
        store.build("c", writes(f="1")).release()

    assert [is_marked(store.root, id) for id in "abc"] == [True, False, True]


@needs("proc")
def test_the_kernel_tells_which_boot_this_is() -> None:
    assert re.fullmatch(r"[0-9a-f-]{36}", durability.boot_id())
