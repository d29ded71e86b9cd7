from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from storebackends import index as index_module
from storebackends.backend import Entry, Size
from storebackends.index import Index, check
from storebackends.records import Record
from tests.capabilities import needs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "result").mkdir()
    return tmp_path


def publish(root: Path, id: str, base: str | None = None, attempt: str = "0") -> None:
    (root / "result" / id).mkdir(exist_ok=True)
    Record(id, attempt, base, started=1.0, finished=2.0).save(root / "result" / id / "build.json")


def opened(root: Path) -> Index:
    return Index(root, root / "result")


def test_knows_the_children_it_was_told(root: Path) -> None:
    index = opened(root)
    for id, base in (("a", None), ("b", "a"), ("c", "a"), ("d", "b")):
        index.add(id, "0", base)
    index.remove("c")

    assert index.children("a") == ["b"]
    index.close()
    again = opened(root)
    assert again.children("b") == ["d"]
    again.close()


def test_reads_back_from_the_disk_what_it_lost(root: Path) -> None:
    publish(root, "a")
    publish(root, "b", base="a")
    (root / "result" / "foreign").mkdir()
    (root / "result" / "broken").mkdir()
    (root / "result" / "broken" / "build.json").write_text("{")

    index = opened(root)

    assert index.children("a") == ["b"]
    assert [(row.id, row.base, row.used) for row in index.rows()] == [("a", None, 2.0), ("b", "a", 2.0)]
    index.close()


@pytest.mark.parametrize(
    "damage", [b"this is no database at all, but long enough to be taken for one" * 20, b"\0" * 4096]
)
def test_a_damaged_file_is_made_anew_from_the_disk(root: Path, damage: bytes) -> None:
    publish(root, "b", base="a")
    (root / "index.sqlite").write_bytes(damage)

    index = opened(root)

    assert index.children("a") == ["b"]
    index.close()


@pytest.mark.parametrize("damage", [b"", b"no database, but as long as one" * 500])
def test_what_the_hosts_end_damaged_is_found_and_made_anew(root: Path, damage: bytes) -> None:
    publish(root, "b", base="a")
    opened(root).close()
    path = root / "index.sqlite"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(damage)

    check(root)

    assert path.exists() is not bool(damage)
    index = opened(root)
    assert index.children("a") == ["b"]
    index.close()


@needs("btrfs")
def test_on_btrfs_no_file_is_mapped_into_memory(loop_fs: Callable[..., AbstractContextManager[Path]]) -> None:
    """On a full one a write to mapped memory ends the process; tests/plugins/test_btrfs.py fills one."""
    with loop_fs("btrfs", size=128 << 20) as folder:
        (folder / "result").mkdir()
        index = opened(folder)
        index.add("b", "0", "a")

        assert "index.sqlite" not in Path("/proc/self/maps").read_text()
        assert index.children("a") == ["b"]
        index.close()


def test_a_write_that_fails_is_mended_by_every_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = opened(root), opened(root)
    first.add("b", "0", "a")
    assert second.children("a") == ["b"]
    publish(root, "b", base="other", attempt="1")

    first._db.execute("PRAGMA query_only = ON")
    first.add("b", "1", "other")

    assert second.children("other") == ["b"]
    assert second.children("a") == []
    first.close()
    second.close()


def test_uses_are_written_in_batches_and_on_closing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200)).__next__
    monkeypatch.setattr("storebackends.index.time.time", clock)
    monkeypatch.setattr(index_module, "BATCH", 3)
    index = opened(root)
    for id in ("a", "b", "c"):
        index.add(id, "0", None)  # at 100, 101, 102
    publish(root, "a")

    index.touch("a")

    assert used(root)["a"] == 100
    index.touch("b")
    index.touch("c")
    assert used(root)["a"] == 103
    index.touch("b")
    index.close()
    assert used(root) == {"a": 103, "c": 105, "b": 106}


def used(root: Path) -> dict[str, float]:
    db = sqlite3.connect(root / "index.sqlite")
    try:
        return dict(db.execute("SELECT id, used FROM results"))
    finally:
        db.close()


def test_many_threads_and_handles_may_write(root: Path) -> None:
    indexes = [opened(root) for _ in range(2)]

    def write(index: Index, prefix: str) -> Callable[[], None]:
        def run() -> None:
            for n in range(50):
                index.add(f"{prefix}{n}", "0", "base")

        return run

    threads = [threading.Thread(target=write(index, f"{n}-{m}-")) for n, index in enumerate(indexes) for m in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(indexes[0].children("base")) == 200
    for index in indexes:
        index.close()


def test_a_use_is_written_soon_where_uses_are_few(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "PAUSE", 0.0)
    publish(root, "a")
    index = opened(root)
    index.add("a", "0", None)
    before = used(root)["a"]

    index.touch("a")

    assert used(root)["a"] > before
    index.close()


def test_forgets_an_attempt_but_not_the_next_one_at_that_id(root: Path) -> None:
    index = opened(root)
    for id, attempt in (("a", "old"), ("b", "old"), ("b", "new")):
        index.add(id, attempt, "base")

    index.forget([("a", "old"), ("b", "old")])

    assert index.children("base") == ["b"]
    assert index.state("a") is None
    index.close()


def test_keeps_the_size_of_an_attempt_for_as_long_as_the_attempt(root: Path) -> None:
    index = opened(root)
    for id in ("a", "b", "c"):
        index.add(id, "0", None)
    index.measured([("a", "0", Size(5, exact=True)), ("b", "0", Size(6, exact=False)), ("c", "0", Size(7, exact=True))])

    index.add("b", "1", None)
    index.remove("c")
    index.add("c", "0", None)

    assert {row.id: row.size for row in index.rows()} == {"a": Size(5, exact=True), "b": None, "c": None}
    index.close()


def test_tells_the_state_of_an_id_with_the_uses_not_yet_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storebackends.index.time.time", iter(range(100, 200)).__next__)
    index = opened(root)
    index.add("base", "0", None)
    index.add("child", "1", "base")

    assert index.state("base") == ("0", 100, True)
    index.touch("child")
    assert index.state("child") == ("1", 102, False)
    index.close()


@needs("unprivileged")
def test_an_unwritable_folder_costs_the_last_uses_only(root: Path) -> None:
    publish(root, "b", base="a")
    os.chmod(root, 0o500)
    try:
        index = opened(root)
        assert index.children("a") == ["b"]
        index.touch("b")
        index.close()
    finally:
        os.chmod(root, 0o700)


def test_results_without_a_base_are_written_in_batches_and_on_closing(root: Path) -> None:
    index = opened(root)
    publish(root, "a")
    publish(root, "gone")
    index.built("a", "0")
    index.built("gone", "0")
    (root / "result" / "gone" / "build.json").unlink()
    (root / "result" / "gone").rmdir()
    assert used(root) == {}

    index.close()

    assert set(used(root)) == {"a"}


def test_a_late_batch_does_not_hide_what_another_process_has_built_since(root: Path) -> None:
    early, late = opened(root), opened(root)
    publish(root, "a", attempt="0123")
    early.built("a", "0123")
    shutil.rmtree(root / "result" / "a")
    late.remove("a")
    late.add("a", "4567", "base")
    publish(root, "a", base="base", attempt="4567")

    early.close()

    assert late.children("base") == ["a"]
    late.close()


def test_what_is_read_back_does_not_hide_what_another_process_builds_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, building = opened(root), opened(root)
    publish(root, "a", attempt="0123")
    record = Entry.read
    rebuild = threading.Thread(target=lambda: building.add("a", "4567", "base"))

    def slow_read(entry: Entry) -> Record:
        found = record(entry)
        shutil.rmtree(entry.folder)
        rebuild.start()
        rebuild.join(0.5)  # it is to come between the look and the row, and must not be able to
        return found

    monkeypatch.setattr(Entry, "read", slow_read)
    list(reading.rows())
    rebuild.join()

    assert building.children("base") == ["a"]
    reading.close()
    building.close()
