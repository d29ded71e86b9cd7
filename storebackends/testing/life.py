"""The life of a result, cases 1 to 14: it is there if and only if its build finished, whole."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from storebackends.backend import Backend, Capability
from storebackends.errors import BaseNotFound, BuildFailed, Busy, Cancelled, StoreError
from storebackends.ids import new_attempt
from storebackends.store import Store
from storebackends.workspace import Workspace

from .harness import PATIENCE, Harness, contents, fill, filled, needs, publish, require, result, seen, write
from .kills import die, killed_at_each_step, killed_inside
from .machine import run_machine
from .trees import snapshot

OLD = {"file": b"old", "folder/inner": b"old too", "folder/deeper/last": b""}
NEW = {"new": b"new"}


def _append(tree: Path) -> None:
    with (tree / "file").open("ab") as file:
        file.write(b" and more")


def _overwrite(tree: Path) -> None:
    with (tree / "file").open("r+b") as file:
        file.write(b"NEW")


def _set_attribute(tree: Path) -> None:
    require(hasattr(os, "setxattr"), "extended attributes")
    try:
        os.setxattr(tree / "file", "user.edit", b"new")  # type: ignore[attr-defined, unused-ignore]
    except OSError as error:
        pytest.skip(f"needs extended attributes: {error}")


def _replace_folder(tree: Path) -> None:
    shutil.rmtree(tree / "folder")
    write(tree, {"folder/inner": b"new"})


def _replace_by_link(tree: Path) -> None:
    require(hasattr(os, "symlink"), "symbolic links")
    (tree / "file").unlink()
    (tree / "file").symlink_to("folder/inner")


Edit = Callable[[Path], object]

IN_PLACE: dict[str, Edit] = {
    "append": _append,
    "overwrite": _overwrite,
    "truncate": lambda tree: os.truncate(tree / "file", 1),
    "chmod": lambda tree: (tree / "file").chmod(0o400),
    "utime": lambda tree: os.utime(tree / "file", (1, 1)),
    "xattr": _set_attribute,
}
"""Edits of a file that a clone made of links would show in its base."""
REPLACING: dict[str, Edit] = {
    "rename": lambda tree: os.replace(tree / "file", tree / "folder/inner"),
    "remove": lambda tree: (tree / "file").unlink(),
    "remove and make again": lambda tree: write(tree, {"file": b"new"}),
    "remove a folder and make it again": _replace_folder,
    "rename a folder": lambda tree: os.rename(tree / "folder", tree / "moved"),
    "chmod a folder": lambda tree: (tree / "folder").chmod(0o700),
    "replace by a link": _replace_by_link,
}
"""Edits that leave every file as it is, and change folders."""


class Life(Harness):
    """Cases 1 to 15."""

    def test_an_unknown_id_has_no_result(self, backend: Backend) -> None:
        """Case 1."""
        publish(backend, "known", OLD)

        assert backend.result("unknown") is None

    @needs(Capability.HOST_TREE)
    def test_a_build_without_a_base_is_empty_and_writable(self, backend: Backend) -> None:
        """Case 2."""
        entry = filled(backend, "first", {})

        assert os.listdir(backend.tree(entry)) == []
        write(backend.tree(entry), OLD)
        assert contents(backend.tree(entry)) == OLD

    def test_a_build_on_a_base_equals_the_base(self, backend: Backend) -> None:
        """Case 3."""
        publish(backend, "base", OLD)

        entry = filled(backend, "child", {}, base="base")

        with seen(backend, entry) as tree:
            assert contents(tree) == OLD

    @needs(Capability.HOST_TREE, Capability.DETACHED)
    @pytest.mark.parametrize("edit", IN_PLACE.values(), ids=IN_PLACE)
    def test_an_edit_in_place_does_not_reach_the_base(self, backend: Backend, edit: Edit) -> None:
        """Case 3."""
        self._edit_and_publish_a_child(backend, edit)

    @needs(Capability.HOST_TREE)
    @pytest.mark.parametrize("edit", REPLACING.values(), ids=REPLACING)
    def test_a_replacing_edit_does_not_reach_the_base(self, backend: Backend, edit: Edit) -> None:
        """Case 3."""
        if edit is REPLACING["chmod a folder"]:
            require(Capability.MODES in backend.capabilities, "the capability 'modes'")
        self._edit_and_publish_a_child(backend, edit)

    def _edit_and_publish_a_child(self, backend: Backend, edit: Edit) -> None:
        publish(backend, "base", OLD)
        child = filled(backend, "child", {}, base="base")
        with backend.view("base") as tree:
            before, unedited = snapshot(tree, backend.capabilities), snapshot(backend.tree(child))

            edit(backend.tree(child))

            assert snapshot(backend.tree(child)) != unedited
            assert snapshot(tree, backend.capabilities) == before
        backend.rename("child")
        with backend.view("base") as tree:
            assert snapshot(tree, backend.capabilities) == before

    @pytest.mark.parametrize("error", [ValueError("x"), StoreError("x")], ids=["exception", "error of the store"])
    def test_a_failed_function_leaves_nothing_and_the_id_builds_afterwards(
        self, store: Store, root: Path, error: Exception
    ) -> None:
        """Cases 4 and 5."""
        with pytest.raises(BuildFailed) as caught:
            store.build("id", _failing(store, error))

        assert caught.value.__cause__ is error
        self._assert_nothing_is_left(store, root)
        self._assert_builds_afresh(store, root)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=["KeyboardInterrupt", "SystemExit"])
    def test_an_interrupt_passes_through_and_leaves_nothing(
        self, store: Store, root: Path, error: BaseException
    ) -> None:
        """Case 5."""
        with pytest.raises(type(error)) as caught:
            store.build("id", _failing(store, error))

        assert caught.value is error
        self._assert_nothing_is_left(store, root)
        self._assert_builds_afresh(store, root)

    def test_a_cancelled_build_leaves_nothing(self, store: Store, root: Path) -> None:
        """Case 5."""
        begun, cancelled = threading.Event(), threading.Event()
        first = fill(store, OLD)

        def function(work: Workspace) -> None:
            first(work)
            begun.set()
            assert cancelled.wait(PATIENCE)

        build = store.start("id", function)
        assert begun.wait(PATIENCE)
        build.cancel()
        cancelled.set()

        with pytest.raises(Cancelled):
            build.wait(PATIENCE)
        self._assert_builds_afresh(store, root)  # it waits for the cancelled one to end

    def test_there_is_no_result_before_the_rename(self, backend: Backend, root: Path) -> None:
        """Case 6."""
        observer = self.open_backend(root)

        filled(backend, "id", OLD)

        for watched in (backend, observer):
            assert watched.result("id") is None
            assert list(watched.ids()) == []
            assert [id for id, _ in watched.unfinished()] == ["id"]
        backend.rename("id")
        for watched in (backend, observer):
            assert result(watched, "id") == OLD
            assert list(watched.ids()) == ["id"]
            assert list(watched.unfinished()) == []

    def test_a_rename_killed_at_any_step_leaves_a_whole_result_or_none(self, backend: Backend, root: Path) -> None:
        """Case 6."""
        publish(backend, "base", OLD)

        def prepare() -> Backend:
            other = self.open_backend(root)
            filled(other, "id", NEW, base="base")
            return other

        for _ in killed_at_each_step(prepare, lambda other: other.rename("id")):
            assert result(backend, "id") in (None, OLD | NEW)
            self._clear(backend, root)

        assert result(backend, "id") == OLD | NEW
        assert result(backend, "base") == OLD

    def test_a_result_is_never_replaced(self, backend: Backend) -> None:
        """Case 6."""
        publish(backend, "id", OLD)
        filled(backend, "id", NEW)

        with pytest.raises(StoreError):
            backend.rename("id")

        assert result(backend, "id") == OLD

    def test_a_missing_base_is_named_and_nothing_is_left(self, store: Store, backend: Backend, root: Path) -> None:
        """Case 7."""
        with pytest.raises(BaseNotFound) as caught:
            backend.build("id", "missing", new_attempt())
        assert caught.value.base == "missing"
        with pytest.raises(BaseNotFound):
            store.build("id", fill(store, NEW), base="missing")

        assert self.leftovers(root) == []
        assert store.result("id") is None

    def test_a_builder_killed_inside_its_function_leaves_nothing_to_the_next(self, root: Path) -> None:
        """Case 8: a real process, killed for good."""
        with self.open_store(root) as store:
            store.build("base", fill(store, {"base": b""})).release()

        def builder() -> None:
            store = self.open_store(root)
            store.build("id", _dying(store), base="base")

        killed_inside(builder)

        with self.open_store(root) as store:
            assert store.result("id") is None
            self._assert_nothing_is_left(store, root)
            with store.build("id", fill(store, NEW), base="base"):
                assert result(store._backend, "id") == {"base": b""} | NEW

    def test_a_builder_killed_while_the_store_is_open_leaves_nothing_to_the_next(
        self, store: Store, root: Path
    ) -> None:
        """Case 8: no store is opened between the two builds."""

        def builder() -> None:
            other = self.open_store(root)
            other.build("id", _dying(other))

        killed_inside(builder)

        self._assert_builds_afresh(store, root)

    def test_a_clone_killed_at_any_step_is_found_and_removed(self, backend: Backend, root: Path) -> None:
        """Case 8."""
        publish(backend, "base", OLD)

        def build(other: Backend) -> object:
            return other.build("id", "base", new_attempt())

        for _ in killed_at_each_step(lambda: self.open_backend(root), build):
            assert backend.result("id") is None
            self._clear(backend, root)

        self._clear(backend, root)
        assert result(backend, "base") == OLD

    def test_delete_is_idempotent_and_the_id_is_free_again(self, store: Store, backend: Backend, root: Path) -> None:
        """Case 9."""
        store.build("id", fill(store, OLD)).release()

        for _ in range(2):
            backend.delete("id")
            store.delete("id")

        assert store.result("id") is None
        assert list(store.ids()) == []
        self._assert_builds_afresh(store, root)

    def test_discard_is_idempotent(self, backend: Backend, root: Path) -> None:
        """Case 9."""
        entry = filled(backend, "id", OLD)

        for _ in range(2):
            backend.discard("id", entry.attempt)

        assert list(backend.unfinished()) == []
        assert self.leftovers(root) == []

    def test_a_base_with_children_is_kept_unless_they_may_go_too(self, store: Store, root: Path) -> None:
        """Case 10."""
        store.build("base", fill(store, OLD)).release()
        store.build("child", fill(store, NEW), base="base").release()
        store.build("grandchild", fill(store, NEW), base="child").release()

        with pytest.raises(Busy) as caught:
            store.delete("base")
        assert caught.value.holders == ("child",)
        assert sorted(store.ids()) == ["base", "child", "grandchild"]
        store.delete("base", recursive=True)

        assert list(store.ids()) == []
        assert self.leftovers(root) == []

    def test_recursive_delete_takes_leaves_first(self, store: Store) -> None:
        """Case 10: so one that is in use keeps all that it is built on."""
        store.build("base", fill(store, OLD)).release()
        with store.build("used", fill(store, NEW), base="base"):
            store.build("leaf", fill(store, NEW), base="used").release()

            with pytest.raises(Busy):
                store.delete("base", recursive=True)

            assert sorted(store.ids()) == ["base", "used"]

    def test_ids_are_built_in_parallel_on_one_base(self, store: Store) -> None:
        """Case 11."""
        store.build("base", fill(store, OLD)).release()
        together = threading.Barrier(4)

        def function(id: str) -> Callable[[Workspace], None]:
            own = fill(store, {id: id.encode()})

            def together_with_all(work: Workspace) -> None:
                together.wait(PATIENCE)  # all are in their functions at once
                own(work)
                together.wait(PATIENCE)

            return together_with_all

        bases = {"a": "base", "b": "base", "c": None, "d": None}
        builds = [store.start(id, function(id), base=base) for id, base in bases.items()]

        for build in builds:
            with build.wait(PATIENCE) as built:
                files = {built.id: built.id.encode()} | (OLD if bases[built.id] else {})
                assert result(store._backend, built.id) == files

    def test_a_reopened_store_has_its_results_and_no_leftovers(self, root: Path) -> None:
        """Case 12."""
        with self.open_store(root) as store:
            store.build("base", fill(store, OLD)).release()
            store.build("child", fill(store, NEW), base="base").release()
        left = self.open_backend(root)
        filled(left, "left", OLD, base="base")  # not discarded, and no lock is held: what a kill leaves

        with self.open_store(root) as store:
            assert sorted(store.ids()) == ["base", "child"]
            assert result(store._backend, "child") == OLD | NEW
            assert store.children("base") == ["child"]
            self._assert_nothing_is_left(store, root)

    def test_a_delete_killed_at_any_step_shows_nothing_or_a_whole_result(self, backend: Backend, root: Path) -> None:
        """Case 13."""
        publish(backend, "base", OLD)
        publish(backend, "id", NEW, base="base")

        for _ in killed_at_each_step(lambda: self.open_backend(root), lambda other: other.delete("id")):
            shown = result(backend, "id")
            assert shown in (None, OLD | NEW)
            self._clear(backend, root)
            if shown is None:
                publish(backend, "id", NEW, base="base")

        assert backend.result("id") is None
        assert result(backend, "base") == OLD

    def test_close_twice_is_fine(self, store: Store, backend: Backend) -> None:
        """Case 14."""
        for _ in range(2):
            backend.close()
            store.close()

        with pytest.raises(StoreError):
            store.result("id")

    def test_whatever_is_done_the_store_agrees_with_the_disk(self, area: Path) -> None:
        """Case 15."""
        require(Capability.HOST_TREE in self.capabilities, "the capability 'host_tree'")

        run_machine(self, area)

    def _assert_nothing_is_left(self, store: Store, root: Path) -> None:
        assert store.result("id") is None
        assert store.running() == []
        assert self.leftovers(root) == []

    def _assert_builds_afresh(self, store: Store, root: Path) -> None:
        with store.build("id", fill(store, NEW)) as built:
            assert built.outcome == "built"
            assert result(store._backend, "id") == NEW
        assert self.leftovers(root) == []

    def _clear(self, backend: Backend, root: Path) -> None:
        """Do what opening a store does with what a kill left, and see that it is all."""
        for id, attempt in list(backend.unfinished()):
            backend.discard(id, attempt)
        backend.sweep()
        assert self.leftovers(root) == []


def _failing(store: Store, error: BaseException) -> Callable[[Workspace], None]:
    first = fill(store, OLD)

    def function(work: Workspace) -> None:
        first(work)
        raise error

    return function


def _dying(store: Store) -> Callable[[Workspace], None]:
    first = fill(store, OLD)

    def function(work: Workspace) -> None:
        first(work)
        die()

    return function
