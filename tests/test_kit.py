"""The kit can fail: a backend with one fault is caught by the case that is there for it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storebackends.backend import Capability
from storebackends.testing import trees
from tests.capabilities import needs
from tests.distributions import install

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]

PLUGIN = """
import os, shutil
from pathlib import Path
from storebackends.plugin import BackendSpec, Capability, Entry, EntryBackend, Options, Support, hookimpl, trees

class Faulty(Options):
    fault: str = ""

class Backend(EntryBackend):
    def open(self):
        super().open()
        self.capabilities = trees.capabilities(self.trash)
        if self.options.fault == "forgets its results when it is opened":
            for name in os.listdir(self.results):
                self.delete(name)
        if self.options.fault == "promises what it does not do":
            self.capabilities |= {Capability.READONLY}

    def close(self):
        if self.options.fault == "can be closed only once":
            del self.options

    def result(self, id):
        shown = super().result(id)
        if self.options.fault == "shows unfinished builds" and not shown:
            return self._builds.get(id)
        return shown

    def ids(self):
        found = sorted(super().ids())
        return iter(found[:1] if self.options.fault == "lists one id at most" else found)

    def _base(self, id, base):
        if self.options.fault == "takes a missing base for none" and not self.result(base or id):
            return None
        return super()._base(id, base)

    def clone(self, source, entry):
        tree, stash = self.tree(entry), self.root / "stash" / entry.id
        fault = self.options.fault
        if fault == "takes up what a failed build left" and stash.exists():
            os.rename(stash, tree)
        elif source is None:
            trees.create(tree)
        elif fault == "clones by links":
            trees.link(self.tree(source), tree)
        elif fault == "copies without hard links":
            shutil.copytree(self.tree(source), tree, symlinks=True)
        elif fault == "leaves out symbolic links":
            trees.copy(self.tree(source), tree)
            for path in tree.rglob("*"):
                if path.is_symlink():
                    path.unlink()
        else:
            trees.copy(self.tree(source), tree)
            if fault == "writes to the base":
                self.tree(source).joinpath("scratch").write_text("mine")

    def rename(self, id):
        fault, entry, result = self.options.fault, self._building(id), Entry(id, self.results / id)
        if fault == "replaces a result":
            self.delete(id)
        if fault == "leaks a descriptor":
            os.open(os.devnull, os.O_RDONLY)
        if fault == "fills a result in place":
            result.folder.mkdir()
            shutil.copy(entry.record, result.record)
            trees.copy(self.tree(entry), self.tree(result))
            if entry.log.exists():
                os.rename(entry.log, result.log)
            self.discard(id, entry.attempt)
            return result
        published = super().rename(id)
        return entry if fault == "tells the old place" else published

    def discard(self, id, attempt):
        tree = self.tree(Entry(id, self.in_progress / f"{id}~{attempt}"))
        if self.options.fault == "takes up what a failed build left" and tree.exists():
            tree.parents[2].joinpath("stash").mkdir(exist_ok=True)
            trees.remove(self.root / "stash" / id)
            os.rename(tree, self.root / "stash" / id)
        if self.options.fault != "does not discard":
            super().discard(id, attempt)

    def delete(self, id):
        if self.options.fault == "deletes in place":
            return trees.remove(self.results / id)
        if self.options.fault == "cannot delete twice":
            os.stat(self.results / id)
        return super().delete(id)

    def sweep(self):
        super().sweep()
        if self.options.fault == "removes what it does not know":
            for name in set(os.listdir(self.results)) - set(self.ids()):
                trees.remove(self.results / name)

@hookimpl
def storebackends_backends():
    return [BackendSpec("faulty", Faulty, "faulty:Backend", lambda path: Support(True))]
"""

FAULTS = [
    ("shows unfinished builds", "test_there_is_no_result_before_the_rename"),
    ("takes a missing base for none", "test_a_missing_base_is_named_and_nothing_is_left"),
    ("clones by links", "test_an_edit_in_place_does_not_reach_the_base[append]"),
    ("clones by links", "test_an_edit_in_place_does_not_reach_the_base[chmod]"),
    ("does not discard", "test_discard_is_idempotent"),
    ("does not discard", "test_an_interrupt_passes_through_and_leaves_nothing[KeyboardInterrupt]"),
    ("does not discard", "test_a_clone_killed_at_any_step_is_found_and_removed"),
    ("does not discard", "test_a_reopened_store_has_its_results_and_no_leftovers"),
    (
        "takes up what a failed build left",
        "test_a_failed_function_leaves_nothing_and_the_id_builds_afterwards[exception]",
    ),
    ("takes up what a failed build left", "test_a_builder_killed_inside_its_function_leaves_nothing_to_the_next"),
    ("takes up what a failed build left", "test_whatever_is_done_the_store_agrees_with_the_disk"),
    ("fills a result in place", "test_a_rename_killed_at_any_step_leaves_a_whole_result_or_none"),
    ("replaces a result", "test_a_result_is_never_replaced"),
    ("cannot delete twice", "test_delete_is_idempotent_and_the_id_is_free_again"),
    ("deletes in place", "test_a_delete_killed_at_any_step_shows_nothing_or_a_whole_result"),
    ("forgets its results when it is opened", "test_a_reopened_store_has_its_results_and_no_leftovers"),
    ("can be closed only once", "test_close_twice_is_fine"),
    ("lists one id at most", "test_whatever_is_done_the_store_agrees_with_the_disk"),
    ("copies without hard links", "test_a_clone_keeps[hard links]"),
    ("copies without hard links", "test_a_clone_keeps[sparse files]"),
    ("copies without hard links", "test_a_chain_of_builds_equals_their_edits_replayed_on_one_folder"),
    ("leaves out symbolic links", "test_a_clone_keeps[symlinks]"),
    ("promises what it does not do", "test_a_published_tree_refuses_every_change"),
    ("writes to the base", "test_no_later_build_or_deletion_writes_to_a_result"),
    ("tells the old place", "test_readers_that_come_between_finish_and_rename_or_after_get_every_byte"),
    ("leaks a descriptor", "test_readers_that_are_cancelled_leak_no_descriptor"),
    ("removes what it does not know", "test_foreign_files_in_a_store_survive_all_it_does"),
]


@pytest.fixture
def kit(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.Pytester]:
    """A project whose tests run the kit on a backend with the fault that $FAULT names, or none."""
    install(pytester.path / "site", "faulty", {"faulty": "faulty"}, faulty=PLUGIN)
    monkeypatch.syspath_prepend(pytester.path / "site")
    pytester.makepyfile("""
        import os
        from storebackends.testing import BackendConformance

        class TestFaulty(BackendConformance):
            name = "faulty"
            options = {"fault": os.environ["FAULT"]}
    """)
    yield pytester
    sys.modules.pop("faulty", None)


@pytest.mark.parametrize(("fault", "case"), FAULTS)
def test_a_fault_is_found_by_the_case_for_it(
    kit: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, fault: str, case: str
) -> None:
    monkeypatch.setenv("FAULT", fault)

    run = kit.runpytest_inprocess(
        "--hypothesis-seed=0", f"test_a_fault_is_found_by_the_case_for_it.py::TestFaulty::{case}"
    )

    assert run.parseoutcomes()["failed"] == 1


def test_without_a_fault_the_same_cases_pass(kit: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "")
    cases = sorted({case for _, case in FAULTS})

    run = kit.runpytest_inprocess(
        *[f"test_without_a_fault_the_same_cases_pass.py::TestFaulty::{case}" for case in cases]
    )

    run.assert_outcomes(passed=len(cases) - 1, skipped=1)  # nobody promises to be read-only
    run.stdout.no_fnmatch_line("*warning*")


def test_asserts_of_the_kit_say_what_they_compared(kit: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "lists one id at most")

    monkeypatch.setenv("PYTHONPATH", str(kit.path / "site"), prepend=os.pathsep)

    run = kit.runpytest_subprocess("--hypothesis-seed=0", "-k", "whatever")

    run.stdout.fnmatch_lines(["E * assert [[]'?'[]] == [[]'?', '?'*"])


def _fill_hole(tree: Path) -> None:
    size = (tree / "sparse").stat().st_size
    (tree / "sparse").write_bytes(bytes(size))


def _unlink_and_copy(tree: Path) -> None:
    (tree / "other name").unlink()
    shutil.copy2(tree / "file", tree / "other name")


def _point_elsewhere(tree: Path) -> None:
    (tree / "link").unlink()
    (tree / "link").symlink_to("folder")


def _make_a_file_of_the_folder(tree: Path) -> None:
    (tree / "folder").rmdir()
    (tree / "folder").write_bytes(b"")


CHANGES: dict[str, Callable[[Path], object]] = {
    "contents": lambda tree: (tree / "file").write_bytes(b"b"),
    "size": lambda tree: os.truncate(tree / "sparse", (2 << 20) + 1),
    "hole": _fill_hole,
    "mode": lambda tree: (tree / "file").chmod(0o604),
    "time": lambda tree: os.utime(tree / "file", ns=(1, 1)),
    "time of a folder": lambda tree: os.utime(tree / "folder", ns=(1, 1)),
    "aim of a link": _point_elsewhere,
    "type": _make_a_file_of_the_folder,
    "names": lambda tree: (tree / "file").rename(tree / "moved"),
    "hard link": _unlink_and_copy,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"a")
    os.link(tmp_path / "file", tmp_path / "other name")
    (tmp_path / "link").symlink_to("file")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2 << 20)
    trees.stamp(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_snapshot_shows_a_change(tree: Path, change: Callable[[Path], object]) -> None:
    before = trees.snapshot(tree)

    change(tree)
    if change not in (CHANGES["time"], CHANGES["time of a folder"]):
        trees.stamp(tree)

    assert trees.snapshot(tree) != before


@needs("xattrs")
def test_a_snapshot_shows_a_change_of_an_attribute(tree: Path) -> None:
    if sys.platform == "linux":
        before = trees.snapshot(tree)

        os.setxattr(tree / "file", "user.new", b"")

        assert trees.snapshot(tree) != before


@needs("root")
def test_a_snapshot_shows_a_change_of_an_owner(tree: Path) -> None:
    if sys.platform != "win32":
        before = trees.snapshot(tree)

        os.lchown(tree / "link", 1, 1)

        assert trees.snapshot(tree) != before


def test_a_snapshot_has_only_what_is_promised(tree: Path) -> None:
    promised = {Capability.HOST_TREE, Capability.SYMLINKS}
    before = trees.snapshot(tree, promised)

    for name in ("mode", "time", "hole", "hard link"):
        CHANGES[name](tree)

    assert trees.snapshot(tree, promised) == before


def test_a_rich_tree_has_all_that_this_user_can_make(tmp_path: Path) -> None:
    trees.make_rich(tmp_path)

    made = {name for name, (make, _) in trees.FEATURES.items() if trees.is_root() or make not in trees.ROOT_ONLY}
    assert set(os.listdir(tmp_path)) == made
    assert all(os.listdir(tmp_path / name) for name in made)
