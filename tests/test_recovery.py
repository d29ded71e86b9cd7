from __future__ import annotations

import os
from pathlib import Path

import pytest

from storebackends import StoreError
from storebackends.locks import Locks
from storebackends.opening import open_store
from tests.stores import left_in_progress, open_copy, python, until, writes

BUILDER = """if True:
    import sys, tests.stores as stores
    with stores.open_copy(stores.Path(sys.argv[1])) as store:
        def fn(work):
            work.log.write(b"begun")
            stores.Path(sys.argv[1] + ".begun").touch()
            work.scratch
            stores.until(lambda: stores.Path(sys.argv[1] + ".go").exists())
        store.build("live", fn).release()
"""


def leftover(root: Path, id: str, attempt: str = "0123") -> Path:
    """A build as a kill leaves it: before its record was whole, before its tree or in the middle of it."""
    folder = root / "in-progress" / f"{id}~{attempt}"
    folder.mkdir()
    return folder


def test_opening_discards_dead_builds_at_any_stage(tmp_path: Path) -> None:
    root = tmp_path / "store"
    open_copy(root).close()
    leftover(root, "a")
    (leftover(root, "b") / "build.json.part").write_text('{"form')
    (leftover(root, "c") / "build.json").write_text('{"form')
    tree = leftover(root, "d") / "rootfs"
    (tree / "sub").mkdir(parents=True)
    os.chmod(tree / "sub", 0)
    (tree.parent / "log").write_text("said")
    (root / "scratch" / "0123").mkdir()
    (root / "trash" / "e~0123~ab").mkdir()

    with open_copy(root) as store:
        assert list(store.ids()) == []
        with store.log("d").tail() as reader:
            assert b"".join(reader) == b"said"
    assert left_in_progress(root) == []


def test_opening_leaves_a_live_build_of_another_process_alone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    builder = python(BUILDER, root)
    until(lambda: Path(f"{root}.begun").exists())
    until(lambda: os.listdir(root / "scratch"))

    with open_copy(root) as store:
        assert [id for id, _ in store.running()] == ["live"]
        assert len(os.listdir(root / "scratch")) == 1
        Path(f"{root}.go").touch()
        assert builder.wait(60) == 0
        assert list(store.ids()) == ["live"]
    assert builder.stdout is not None
    builder.stdout.close()


def test_a_leftover_that_resists_is_logged_and_does_not_keep_the_store_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "store"
    open_copy(root).close()
    leftover(root, "a")
    leftover(root, "b")

    def remove(folder: Path) -> None:
        if folder.name.startswith("a~"):
            raise StoreError("immutable")

    monkeypatch.setattr("storebackends.trees.remove", remove)
    with open_copy(root) as store:
        store.build("c", writes(f="1")).release()

    assert "a could not be cleaned up" in caplog.text
    monkeypatch.undo()
    open_copy(root).close()
    assert left_in_progress(root) == []


def test_what_a_lock_holder_works_on_is_not_touched(tmp_path: Path) -> None:
    root = tmp_path / "store"
    open_copy(root).close()
    leftover(root, "a")
    locks = Locks(root / "locks")

    with locks.work("a") or pytest.fail("no lock"):
        open_copy(root).close()
        assert left_in_progress(root) == ["a~0123"]
    locks.close()
    open_copy(root).close()
    assert left_in_progress(root) == []


def test_a_dead_builds_record_says_so(tmp_path: Path) -> None:
    root = tmp_path / "store"
    open_store(backend="copy", path=root).close()
    (leftover(root, "a") / "build.json").write_text('{"id": "a", "attempt": "0123", "pid": 77}')

    with open_store(backend="copy", path=root) as store:
        failed = store._failures.newest("a")
        assert failed is not None
        assert (failed.read().outcome, failed.read().reason) == ("died", "its builder (pid 77) died")
