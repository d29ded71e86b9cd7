"""Folders that are no place for a store, and what is not the store's own in one, case 39."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from storebackends.errors import StoreError
from storebackends.store import Store

from .harness import Harness, fill, require, result, write
from .trees import is_root, snapshot


class Roots(Harness):
    """Case 39."""

    def test_a_missing_root_is_made(self, area: Path) -> None:
        """Case 39."""
        root = area / "a" / "new" / "folder"

        self._assert_works(self.open_store(root))

        assert root.is_dir()

    def test_a_root_that_is_a_file_is_refused(self, area: Path) -> None:
        """Case 39."""
        (area / "file").write_bytes(b"precious")

        for root in (area / "file", area / "file" / "below"):
            with pytest.raises(StoreError, match="file"):
                self.open_store(root)

        assert (area / "file").read_bytes() == b"precious"

    def test_a_root_with_other_things_in_it_is_refused_and_left_alone(self, area: Path) -> None:
        """Case 39."""
        root = area / "other"
        write(root, {"result/precious": b"1", "trash/precious": b"2", "in-progress/id~0123/log": b"3"})
        before = snapshot(root)

        with pytest.raises(StoreError, match=re.escape(str(root))):
            self.open_store(root)

        assert snapshot(root) == before

    def test_foreign_files_in_a_store_survive_all_it_does(self, root: Path) -> None:
        """Case 39."""
        with self.open_store(root) as store:
            self._assert_works(store)
        foreign = {"notes": b"1", "result/.hidden": b"2", "result/a b/file": b"3", "in-progress/notes": b"4"}
        write(root, foreign)

        with self.open_store(root) as store:
            self._assert_works(store)
            assert list(store.ids()) == []
            assert store.running() == []
        self.open_store(root).close()

        assert {name: (root / name).read_bytes() for name in foreign} == foreign

    def test_a_root_that_cannot_be_written_is_refused(self, area: Path) -> None:
        """Case 39."""
        require(sys.platform != "win32", "permission bits")
        closed = Path("/sys") if is_root() else area  # there even root makes no folder
        require(closed.is_dir(), "a folder that root cannot write")
        mode = closed.stat().st_mode

        if not is_root():
            closed.chmod(0o500)
        try:
            with pytest.raises(StoreError, match=re.escape(str(closed / "new"))):
                self.open_store(closed / "new")
        finally:
            if not is_root():
                closed.chmod(mode)

        assert not (closed / "new").exists()

    def test_a_room_that_cannot_be_read_is_named_and_nothing_is_deleted(self, root: Path) -> None:
        """Case 39."""
        require(sys.platform != "win32" and not is_root(), "an unprivileged user")
        with self.open_store(root) as store:
            store.build("id", fill(store, {"file": b"old"})).release()
        room = root / "in-progress"

        room.chmod(0)
        try:
            with pytest.raises(StoreError, match=re.escape(str(room))):
                self.open_store(root)
        finally:
            room.chmod(0o700)

        with self.open_store(root) as store, store.build("id", fill(store, {})) as found:
            assert (found.outcome, result(store._backend, "id")) == ("hit", {"file": b"old"})

    def _assert_works(self, store: Store) -> None:
        with store.build("id", fill(store, {"file": b"new"})):
            assert result(store._backend, "id") == {"file": b"new"}
        store.delete("id")
