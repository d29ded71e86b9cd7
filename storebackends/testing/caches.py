"""Named caches, cases 20 to 24: lent as private copies, given back whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from storebackends.backend import Backend, CacheEntry, Capability
from storebackends.errors import Busy
from storebackends.ids import new_attempt
from storebackends.records import Record
from storebackends.store import Store

from .harness import Harness, contents, needs, write
from .kills import die, killed_at_each_step, killed_inside
from .life import IN_PLACE, Edit
from .trees import is_root, make_rich, snapshot

FIRST = {"file": b"old", "folder/inner": b"first"}
SECOND = {"second": b"2"}


class Caches(Harness):
    """Cases 20 to 24."""

    @needs(Capability.HOST_TREE)
    def test_a_new_cache_is_empty_and_belongs_to_whom_was_asked(self, store: Store) -> None:
        """Case 20."""
        free = is_root() and Capability.OWNERS in store.capabilities
        asked = (1234, 5678) if free else _owner(store.root)

        with store.cache("name", owner=None if sys.platform == "win32" else asked) as path:
            assert os.listdir(path) == []
            assert _owner(path) == asked
            write(path, FIRST)

        with store.cache("name") as path:
            assert _owner(path) == asked

    @needs(Capability.HOST_TREE)
    def test_what_is_given_back_is_lent_next(self, store: Store, root: Path) -> None:
        """Case 21."""
        _put(store, FIRST)
        _put(store, SECOND)

        assert self._cached(store) == FIRST | SECOND
        assert [info.generation for info in store.caches()] == [2]
        assert _entries(self.open_backend(root)) == [2]

    @needs(Capability.HOST_TREE)
    def test_what_is_private_or_interrupted_is_not_given_back(self, store: Store, root: Path) -> None:
        """Case 21."""
        _put(store, FIRST)

        with store.cache("name", mode="private") as path:
            assert contents(path) == FIRST
            write(path, SECOND)
        with pytest.raises(KeyboardInterrupt):
            _put(store, SECOND, KeyboardInterrupt())

        assert self._cached(store) == FIRST
        assert self.leftovers(root) == []

    @needs(Capability.HOST_TREE)
    @pytest.mark.parametrize("edit", IN_PLACE.values(), ids=IN_PLACE)
    def test_an_edit_in_place_of_a_copy_does_not_reach_the_cache(self, store: Store, edit: Edit) -> None:
        """Case 21: in every mode of every backend, as that is how caches are written."""
        _put(store, FIRST)
        with store.cache("name", mode="private") as path, store.cache("name", mode="private") as other:
            before = snapshot(other, store.capabilities)

            edit(path)

            assert snapshot(path) != before
            assert snapshot(other, store.capabilities) == before
        with store.cache("name", mode="private") as path:
            assert snapshot(path, store.capabilities) == before

    @needs(Capability.HOST_TREE)
    def test_a_cache_keeps_all_that_a_tree_can_hold(self, store: Store) -> None:
        """Case 21."""
        with store.cache("name") as path:
            make_rich(path, store.capabilities)
            before = snapshot(path, store.capabilities)

        for _ in range(2):
            with store.cache("name") as path:
                assert snapshot(path, store.capabilities) == before

    @needs(Capability.HOST_TREE)
    def test_of_two_borrowers_the_first_to_give_back_wins(self, store: Store, root: Path) -> None:
        """Case 22."""
        other = self.open_store(root)

        for early in (FIRST, SECOND):  # into a new cache, and into one that was there
            with store.cache("name") as path:
                _put(other, early)
                write(path, {"late": b""})

        assert self._cached(store) == FIRST | SECOND
        assert self.leftovers(root) == []

    @needs(Capability.HOST_TREE)
    def test_a_cache_that_is_lent_is_not_deleted(self, store: Store, root: Path) -> None:
        """Case 23."""
        other = self.open_store(root)
        for _ in range(2):  # a new one, and one that was there
            with store.cache("name") as path:
                for one in (store, other):
                    with pytest.raises(Busy):
                        one.delete_cache("name")
                write(path, FIRST)

        assert self._cached(store) == FIRST
        assert other.delete_cache("name")
        assert not store.delete_cache("name")
        assert store.caches() == []
        assert self._cached(store) == {}
        assert self.leftovers(root) == []

    @needs(Capability.HOST_TREE)
    def test_a_borrower_that_is_killed_leaves_the_cache_as_it_was(self, root: Path) -> None:
        """Case 24."""
        with self.open_store(root) as store:
            _put(store, FIRST)

        def borrower() -> None:
            other = self.open_store(root)
            with other.cache("name") as path:
                write(path, SECOND)
                die()

        killed_inside(borrower)

        with self.open_store(root) as store:
            assert self.leftovers(root) == []
            assert self._cached(store) == FIRST
            _put(store, SECOND)
            assert self._cached(store) == FIRST | SECOND

    @needs(Capability.HOST_TREE)
    def test_a_cache_is_lent_whole_whenever_its_giver_is_killed(self, backend: Backend, root: Path) -> None:
        """Case 24: there is no moment between the old generation and the new one."""
        first = _installed(backend, None, FIRST)

        def prepare() -> tuple[Backend, CacheEntry]:
            other = self.open_backend(root)
            return other, _loan(other, first, SECOND)

        for _ in killed_at_each_step(prepare, lambda given: given[0].cache_install(given[1], 2)):
            assert _entries(backend) == [1]
            self._clear_loans(backend, root)

        self._clear_loans(backend, root)
        assert _entries(backend) == [1, 2]
        (newest,) = (entry for entry in backend.cache_list("name") if entry.generation == 2)
        assert contents(backend.tree(_loan(backend, newest, {}))) == FIRST | SECOND

    @needs(Capability.HOST_TREE)
    def test_a_copy_killed_at_any_step_is_found_and_removed(self, backend: Backend, root: Path) -> None:
        """Case 24."""
        first = _installed(backend, None, FIRST)

        for _ in killed_at_each_step(lambda: self.open_backend(root), lambda other: _loan(other, first, {})):
            self._clear_loans(backend, root)

        self._clear_loans(backend, root)
        assert contents(backend.tree(_loan(backend, first, {}))) == FIRST

    def _cached(self, store: Store) -> dict[str, bytes]:
        with store.cache("name", mode="private") as path:
            return contents(path)

    def _clear_loans(self, backend: Backend, root: Path) -> None:
        for entry in list(backend.cache_list()):
            if not entry.generation:
                backend.cache_drop(entry)
        backend.sweep()
        assert self.leftovers(root) == []


def _put(store: Store, files: dict[str, bytes], error: BaseException | None = None) -> None:
    with store.cache("name") as path:
        write(path, files)
        if error:
            raise error


def _loan(backend: Backend, source: CacheEntry | None, files: dict[str, bytes]) -> CacheEntry:
    loan = backend.cache_clone(source, Record("name", new_attempt()))
    write(backend.tree(loan), files)
    return loan


def _installed(backend: Backend, source: CacheEntry | None, files: dict[str, bytes]) -> CacheEntry:
    installed = backend.cache_install(_loan(backend, source, files), source.generation + 1 if source else 1)
    assert installed is not None
    return installed


def _entries(backend: Backend) -> list[int]:
    return sorted(entry.generation for entry in backend.cache_list() if entry.generation)


def _owner(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid
