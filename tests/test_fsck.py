from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storebackends import Store, Workspace
from storebackends.backend import Problem
from storebackends.digests import digest
from storebackends.entries import EntryBackend
from storebackends.errors import NotSupported, StoreError
from storebackends.fsck import Report
from storebackends.opening import open_store
from tests import capabilities
from tests.capabilities import needs
from tests.stores import WAIT, files, kept, left_in_progress, open_copy, writes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store whose results have digests: base, app on base, test on app, and lone."""
    with open_copy(tmp_path / "store", verify="digest") as store:
        for id, base in (("base", None), ("app", "base"), ("test", "app"), ("lone", None)):
            store.build(id, writes(**{id: "text"}), base).release()
        yield store


def found(report: Report) -> dict[str, str]:
    """The kind of each finding, by what it is about: an id, or a file's name."""
    return {os.path.basename(finding.what): finding.kind for finding in report.findings}


def tree(store: Store, id: str) -> Path:
    return store.root / "result" / id / "rootfs"


def quarantined(store: Store) -> list[str]:
    folder = store.root / "quarantine"
    return sorted(name.partition("~")[0] for name in os.listdir(folder)) if folder.exists() else []


def spoil(store: Store, id: str) -> None:
    (tree(store, id) / id).write_text("rotten")


def test_a_sound_store_is_clean(store: Store) -> None:
    report = store.fsck(content=True)

    assert report == Report((), results=4, compared=4)
    assert report.is_clean


class TestLeftovers:
    @pytest.fixture
    def dirty(self, tmp_path: Path) -> Iterator[Store]:
        """A store with what kills leave, opened without recovery."""
        root = tmp_path / "dirty"
        with open_copy(root) as store:
            store.build("a", writes(f="1")).release()
            store.build("gone", writes(f="1")).release()
        (root / "in-progress" / "b~0123" / "rootfs").mkdir(parents=True)
        (root / "in-progress" / "b~0123" / "log").write_text("said")
        (root / "scratch" / "4567").mkdir()
        (root / "trash" / "c~89ab~cdef").mkdir()
        os.rename(root / "result" / "gone", root / "trash" / "gone~0000")
        (root / "loans" / "cache~9999").mkdir()
        with open_copy(root, recover=False) as store:
            yield store

    def test_are_told_and_left_without_repair(self, dirty: Store) -> None:
        left = sorted(left_in_progress(dirty.root))

        report = dirty.fsck()

        assert found(report) == {
            "b": "unfinished",
            "cache": "loan",
            "4567": "scratch",
            "c~89ab~cdef": "trash",
            "gone~0000": "trash",
            "gone": "index",
        }
        assert not report.is_clean
        assert sorted(left_in_progress(dirty.root)) == left

    def test_are_removed_by_repair_and_the_log_is_kept(self, dirty: Store) -> None:
        report = dirty.fsck(repair=True)

        assert len(report.findings) == 6
        assert all(finding.repaired for finding in report.findings)
        assert report.is_clean
        assert left_in_progress(dirty.root) == os.listdir(dirty.root / "loans") == []
        assert [row.id for row in dirty._index.rows()] == ["a"]
        with dirty.log("b").tail() as reader:
            assert b"".join(reader) == b"said"
        assert dirty.fsck().findings == ()

    def test_of_a_live_build_are_none(self, store: Store) -> None:
        begun, go = threading.Event(), threading.Event()

        def fn(work: Workspace) -> None:
            (work.scratch / "f").touch()
            begun.set()
            assert go.wait(WAIT)

        build = store.start("live", fn, "base")
        assert begun.wait(WAIT)
        report = store.fsck(repair=True)
        go.set()

        assert report.findings == ()
        assert build.wait(WAIT).outcome == "built"

    def test_that_resist_are_told_as_such(self, dirty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(folder: Path) -> None:
            raise StoreError("immutable")

        monkeypatch.setattr("storebackends.trees.remove", refuse)
        report = dirty.fsck(repair=True)

        problems = {finding.kind: finding.problem for finding in report.findings if not finding.repaired}
        assert problems["scratch"] == "belongs to no build; not repaired: immutable"
        assert "it cannot be removed" in problems["trash"]
        assert not report.is_clean


class TestDamage:
    def test_of_contents_is_found_by_reading_them(self, store: Store) -> None:
        spoil(store, "lone")

        assert store.fsck().findings == ()
        assert found(store.fsck(content=True)) == {"lone": "content"}

    @pytest.mark.parametrize(
        "change",
        [
            lambda path: path.write_text("taxt"),
            pytest.param(lambda path: path.chmod(0o600), marks=needs("modes")),
            lambda path: path.unlink(),
            lambda path: path.rename(path.with_name("other")),
            lambda path: (path.parent / "more").mkdir(),
            pytest.param(lambda path: path.parent.chmod(0o700), marks=needs("modes")),
            lambda path: (path.unlink(), path.symlink_to("text")),
        ],
        ids=["bytes", "mode", "removed", "renamed", "added", "top", "type"],
    )
    def test_of_any_kind_is_found(self, store: Store, change: Callable[[Path], object]) -> None:
        change(tree(store, "lone") / "lone")

        assert found(store.fsck(content=True)) == {"lone": "content"}

    @pytest.mark.parametrize("record", [None, "{", '{"id": "other", "attempt": "1"}', '{"id": "lone"}'])
    def test_of_a_record_is_found(self, store: Store, record: str | None) -> None:
        path = store.root / "result" / "lone" / "build.json"
        path.unlink() if record is None else path.write_text(record)

        assert found(store.fsck()) == {"lone": "record"}

    def test_of_a_tree_that_is_gone_or_became_a_link_is_found(self, store: Store, tmp_path: Path) -> None:
        os.rename(tree(store, "lone"), tmp_path / "moved")
        os.rename(tree(store, "test"), tmp_path / "test")
        tree(store, "test").symlink_to(tmp_path / "test")

        assert found(store.fsck()) == {"lone": "tree", "test": "tree"}

    def test_that_the_disk_confessed_is_found(self, store: Store) -> None:
        (store.root / "result" / "lone" / "suspect").touch()

        assert found(store.fsck()) == {"lone": "suspect"}

    def test_moves_to_quarantine_with_what_was_built_on_it_and_can_be_built_anew(self, store: Store) -> None:
        spoil(store, "app")

        report = store.fsck(repair=True, content=True)

        assert [(finding.what, finding.repaired) for finding in report.findings] == [("app", True)]
        assert quarantined(store) == ["app", "test"]
        assert sorted(store.ids()) == ["base", "lone"]
        (spoilt,) = (store.root / "quarantine").glob("app~*")
        assert files(spoilt / "rootfs")["app"] == "rotten"
        with store.build("app", writes(app="new"), "base") as result:
            assert result.outcome == "built"
        assert store.fsck(content=True).findings == ()

    def test_of_what_is_in_use_is_told_and_left(self, store: Store) -> None:
        spoil(store, "app")

        with kept(store, "test"):
            (finding,) = store.fsck(repair=True, content=True).findings

        assert (finding.what, finding.repaired) == ("app", False)
        holder = "this process" if capabilities.look("proc").usable else "another process"
        assert f"not repaired: 'test' is busy: in use by {holder}" in finding.problem
        assert quarantined(store) == []

    def test_is_not_seen_in_a_tree_that_cannot_be_shown(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def view(backend: EntryBackend, id: str) -> None:
            raise NotSupported("a view", "no")

        monkeypatch.setattr(EntryBackend, "view", view)

        assert store.fsck(repair=True, content=True).findings == ()

    def test_of_the_index_is_repaired_from_the_records(self, store: Store) -> None:
        store._index.add("app", "another", None)
        assert store.children("base") == []

        report = store.fsck(repair=True)

        assert found(report) == {"app": "index"}
        assert store.children("base") == ["app"]

    def test_of_a_family_is_told(self, store: Store) -> None:
        store._index.flush()
        store._backend.delete("base")

        report = store.fsck(repair=True)

        assert {(finding.what, finding.kind, finding.repaired) for finding in report.findings} == {
            ("base", "index", True),
            ("app", "base", False),
        }


class TestDigests:
    def test_are_kept_only_where_they_are_asked_for(self, store: Store) -> None:
        store.verify = False
        store.build("plain", writes(f="1")).release()

        report = store.fsck(content=True)

        assert store.record("plain").digest is None
        assert store.record("base").digest == digest(tree(store, "base"))
        assert (report.results, report.compared, report.without_digest) == (5, 4, 1)

    def test_of_a_sample_are_compared_and_the_seed_chooses_it_again(self, store: Store) -> None:
        for id in ("base", "app", "test", "lone"):
            spoil(store, id)

        first = store.fsck(content=True, sample=2)
        again = store.fsck(content=True, sample=2, seed=first.seed)

        assert first == again
        assert len(first.findings) == first.compared == 2
        assert store.fsck(content=True, sample=99).compared == 4

    def test_do_not_depend_on_times_nor_on_who_looks(self, store: Store) -> None:
        os.utime(tree(store, "lone") / "lone", ns=(1, 1))
        os.rename(tree(store, "lone"), store.root / "elsewhere")

        assert digest(store.root / "elsewhere") == store.record("lone").digest

    @needs("symlinks")
    def test_follow_no_link(self, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "folder").symlink_to(tmp_path)
        (tmp_path / "tree" / "file").symlink_to(tmp_path / "secret")
        before = digest(tmp_path / "tree")

        (tmp_path / "secret").write_text("changed")

        assert digest(tmp_path / "tree") == before

    @needs("fork")
    def test_take_trees_that_are_hostile(self, tmp_path: Path) -> None:
        deep = os.open(tmp_path, os.O_RDONLY)
        for _ in range(2000):
            os.mkdir("deep", dir_fd=deep)
            below = os.open("deep", os.O_RDONLY, dir_fd=deep)
            os.close(deep)
            deep = below
        if sys.platform != "win32":
            os.mkfifo("fifo", dir_fd=deep)
        os.close(os.open(b"\xff\n", os.O_CREAT, dir_fd=deep))
        before = digest(tmp_path)

        os.unlink(b"\xff\n", dir_fd=deep)
        os.close(deep)

        assert digest(tmp_path) != before
        subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)

    def test_tell_an_order_of_names_from_another(self, tmp_path: Path) -> None:
        for layout in ("a/b c", "a b/c", "a b c", "a/b/c"):
            folder = tmp_path / layout.replace("/", "_")
            for name in layout.split():
                (folder / name).mkdir(parents=True)

        assert len({digest(folder) for folder in tmp_path.iterdir()}) == 4

    def test_that_cannot_be_had_cost_the_build_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def unreadable(tree: Path) -> str:
            raise StoreError("unreadable")

        monkeypatch.setattr("storebackends.life.digest", unreadable)
        store.build("plain", writes(f="1")).release()

        assert store.record("plain").digest is None
        assert "without a digest: unreadable" in caplog.text


class TestElsewhere:
    def test_unknown_files_are_told_and_never_removed(self, store: Store) -> None:
        strange = [store.root / name for name in ("notes", "result/a b", "result/README", "in-progress/x")]
        for path in strange:
            path.touch()

        report = store.fsck(repair=True)

        assert {finding.what for finding in report.findings} == set(map(str, strange))
        assert {finding.kind for finding in report.findings} == {"unknown"}
        assert report.is_clean
        assert all(path.exists() for path in strange)

    def test_what_a_backend_calls_its_own_is_known(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        (store.root / "mounts").mkdir()
        monkeypatch.setattr(EntryBackend, "rooms", frozenset({"mounts"}))

        assert store.fsck().findings == ()

    def test_a_backend_tells_of_its_resources(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        volumes = ["a", "b"]
        problems = [
            Problem("volume b", "belongs to no entry", lambda: volumes.remove("b")),
            Problem("volume c", "is gone"),
        ]
        monkeypatch.setattr(EntryBackend, "check", lambda _: iter(problems))

        report = store.fsck(repair=True)

        assert [(finding.kind, finding.what, finding.repaired) for finding in report.findings] == [
            ("outside", "volume b", True),
            ("outside", "volume c", False),
        ]
        assert volumes == ["a"]

    @needs("tmpfs")
    def test_a_mount_inside_a_result_is_told_and_left(self, store: Store) -> None:
        point = tree(store, "lone") / "a b"
        point.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
        try:
            report = store.fsck(repair=True)
            assert os.path.ismount(point)
        finally:
            subprocess.run(["umount", point], check=True)

        assert [(finding.kind, finding.what) for finding in report.findings] == [("mount", str(point))]
        assert not report.is_clean

    @needs("syncfs")
    def test_what_is_not_known_to_be_on_the_disk_is_brought_there(self, tmp_path: Path) -> None:
        with open_store(backend="copy", path=tmp_path / "store", durability="group") as store:
            store.build("new", writes(f="1")).release()
            store.build("old", writes(f="1")).release()
            store._durability.flush()
            for id in ("new", "old"):
                (store.root / "result" / id / "synced").unlink()
            record = store.root / "result" / "old" / "build.json"
            record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": 1.0}))

            assert found(store.fsck()) == {"old": "unsynced"}
            assert store.fsck(repair=True).is_clean

            assert (store.root / "result" / "old" / "synced").exists()
            assert store.fsck().findings == ()


def test_verify_takes_known_words_only(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="verify: 'md5' is none of none, digest"):
        open_copy(tmp_path / "store", verify="md5")

    assert not (tmp_path / "store").exists()
