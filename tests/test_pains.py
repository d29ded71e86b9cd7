"""Twenty pains that stores of builds gave in production: each has a test by name, or a sentence why not yet.

The table says where; what has no better place is below it, with the regressions that the stress test has found.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storebackends import BuildLog, open_store, process
from storebackends._log_posix import DupFd
from storebackends.backend import Entry
from storebackends.durability import Durability
from storebackends.failures import Failures
from storebackends.following import Followed
from storebackends.records import Record
from tests.capabilities import needs
from tests.stores import files, kept, open_copy, writes

PAINS: dict[str, list[str]] = {
    "1 prune removed the parent of a running job": [
        "tests.test_prune::TestStays::test_what_is_being_built_on",
        "storebackends.testing.processes::Processes::test_deletions_beside_builds_take_nothing_that_is_in_use",
    ],
    "2 prune spun for ever, deleting nothing": [
        "tests.test_prune::TestStays::test_what_cannot_be_deleted_and_the_next_goes",
        "tests.test_prune::TestSpace::test_that_does_not_come_back_ends_the_deletions",
    ],
    "3 index and disk drift apart after a crash": [
        "tests.test_index::test_reads_back_from_the_disk_what_it_lost",
        "tests.test_index::test_a_write_that_fails_is_mended_by_every_process",
        "tests.test_fsck::TestDamage::test_of_the_index_is_repaired_from_the_records",
    ],
    "4 late log reader finds no file, and a race when the log is already closed": [
        "tests.test_log::test_log_is_readable_after_its_folder_was_renamed",
        "tests.test_log::test_a_reader_that_comes_during_the_move_misses_nothing",
        "tests.test_pains::test_a_reader_that_comes_as_the_last_one_leaves_opens_the_log_anew",
        "tests.test_pains::test_the_log_of_a_failure_elsewhere_is_there_once_its_outcome_is",
    ],
    "5 the log of a failed build is deleted with it": [
        "storebackends.testing.logs::Logs::test_the_log_of_a_failed_build_stays_readable",
        "storebackends.testing.logs::Logs::test_the_log_of_a_killed_build_stays_readable",
    ],
    "6 leftovers of a crash leak into the next build of that id": [
        "storebackends.testing.life::Life::test_a_builder_killed_inside_its_function_leaves_nothing_to_the_next",
        "tests.test_store::TestKill::test_of_a_builder_whose_child_writes_on_leaves_only_the_second_attempts_files",
        "tests.test_pains::test_a_builder_killed_just_before_its_rename_has_built_nothing",
    ],
    "7 partial results are visible": [
        "storebackends.testing.life::Life::test_a_rename_killed_at_any_step_leaves_a_whole_result_or_none",
        "tests.test_stress::test_builders_that_are_killed_cost_nobody_else_anything",
    ],
    "11 free space lied": [
        "tests.test_prune::TestPolicy::test_min_free_holds_for_the_tightest_of_bytes_inodes_and_metadata",
        "tests.test_faults::test_wherever_the_disk_gets_full_it_is_said_and_nothing_is_lost",
    ],
    "14 a program is run per look-up": ["tests.test_pains::test_looking_up_starts_no_program"],
    "15 caches lost between delete and install; losers leaked; busy test inverted": [
        "storebackends.testing.caches::Caches::test_a_cache_is_lent_whole_whenever_its_giver_is_killed",
        "storebackends.testing.caches::Caches::test_of_two_borrowers_the_first_to_give_back_wins",
        "storebackends.testing.caches::Caches::test_a_cache_that_is_lent_is_not_deleted",
    ],
    "16 one process per store only": [
        "tests.test_sharing::test_processes_and_threads_run_the_function_once_and_all_get_its_result_and_its_log",
        "tests.test_stress::test_whatever_many_processes_and_threads_do_at_once_all_is_whole_and_nothing_is_left",
    ],
    "17 disks filled all the same: prune by count of items": [
        "tests.test_prune::TestSpace::test_goes_on_until_enough_is_free",
        "tests.test_prune::TestBeforeABuild::test_room_is_made_where_less_is_free_than_the_policy_asks_for",
    ],
    "18 corrupt results cached after an unclean stop": [
        "tests.test_durability::test_full_marks_before_build_returns",
        "tests.test_durability::test_group_never_marks_what_a_failing_disk_may_have_lost",
        "tests.test_opening::TestReboot::test_drops_what_may_not_have_reached_the_disk_and_what_was_built_on_it",
    ],
    "19 fsync storms slow builds": ["tests.test_pains::test_builds_share_one_barrier_and_sync_nothing_by_themselves"],
    "10 hung for days in `btrfs subvolume sync`": ["tests.plugins.test_btrfs::TestSpace::test_settling_ends_in_time"],
    "8 overlay mounts stacked up after exceptions": [
        "tests.plugins.test_overlay::test_what_a_killed_process_left_mounted_is_undone_and_what_others_use_stays",
    ],
    "9 overlay depth": ["tests.plugins.test_overlay::test_kernels_that_take_layers_in_another_way_serve_as_well"],
    "12 qgroups slow down": ["tests.plugins.test_btrfs::TestSpace::test_a_store_whose_quotas_are_on_works_the_same"],
    '13 ZFS "dataset is busy" at random': [
        "tests.plugins.test_zfs::TestBusy::test_who_holds_a_tree_is_named_and_it_goes_later"
    ],
    "20 little to see": [
        "tests.test_events::TestTold::test_is_what_became_of_an_attempt",
        "tests.test_prune::TestStays::test_what_is_leased_and_its_bases_with_the_reason",
        "tests.plugins.test_metrics::test_all_that_happened_is_counted",
    ],
}


def test_every_pain_has_its_place() -> None:
    numbers = sorted(int(pain.split()[0]) for pain in PAINS)

    assert numbers == list(range(1, 21))


@pytest.mark.parametrize("test", [test for tests in PAINS.values() for test in tests])
def test_the_named_test_is_there(test: str) -> None:
    module, *names = test.split("::")
    own = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    found = None if own.exists() else importlib.util.find_spec(module)
    source = Path(found.origin) if found and found.origin else own

    body: list[ast.stmt] = ast.parse(source.read_text(encoding="utf-8")).body
    for name in names:
        node = next((n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name), None)
        assert node is not None, f"there is no {name} in {source}"
        body = node.body


class _Reopened(DupFd):
    """While one of its descriptors closes, somebody asks for another."""

    asked: Callable[[], object] | None = None

    def close(self, handle: int) -> None:
        super().close(handle)
        if asked := self.asked:
            self.asked = None
            asked()


@needs("fork")
def test_a_reader_that_comes_as_the_last_one_leaves_opens_the_log_anew(tmp_path: Path) -> None:
    log = BuildLog.create(tmp_path / "log", strategy=_Reopened)
    log.write(b"text")
    log.close()
    strategy = log._strategy
    assert isinstance(strategy, _Reopened)
    late: list[bytes] = []
    strategy.asked = lambda: late.extend(log.tail(1))

    assert b"".join(log.tail()) == b"text"

    assert late == [b"ext"]


def test_the_log_of_a_failure_elsewhere_is_there_once_its_outcome_is(tmp_path: Path) -> None:
    open_copy(tmp_path).close()
    entry = Entry("a", tmp_path / "in-progress" / "a~0123")
    entry.folder.mkdir()
    entry.log.write_bytes(b"text")
    followed = Followed(tmp_path, "a", "0123")
    grave = Entry("a", Failures(tmp_path).folder / "a~0123")
    grave.folder.mkdir()

    Record("a", "0123", outcome="failed", reason="no good", log_length=4).save(grave.record)
    assert followed.look() is None
    os.rename(entry.log, grave.log)

    assert followed.look()
    assert b"".join(followed.log.tail()) == b"text"


def test_a_builder_killed_just_before_its_rename_has_built_nothing(tmp_path: Path) -> None:
    open_copy(tmp_path).close()
    entry = Entry("a", tmp_path / "in-progress" / "a~0123")
    (entry.folder / "rootfs").mkdir(parents=True)
    Record("a", "0123", pid=77, outcome="built", log_length=0).save(entry.record)

    with open_copy(tmp_path) as store:
        assert store.result("a") is None
        died = json.loads((tmp_path / "failed" / "a~0123" / "build.json").read_text())
        assert died["outcome"] == "died"


@pytest.mark.parametrize("backend", ["copy", pytest.param("rsync", marks=needs("rsync"))])
def test_looking_up_starts_no_program(tmp_path: Path, backend: str) -> None:
    with open_store(backend=backend, path=tmp_path / "store", durability="none") as store:
        store.build("a", writes(f="1")).release()
        store.build("b", writes(g="2"), base="a").release()
        before = process.started

        for id in ("a", "b"):
            with kept(store, id) as result:
                assert files(result.path)
                assert b"".join(store.log(id).tail()) == b"".join(result.log.tail())
        assert store.result("c") is None
        assert (sorted(store.ids()), store.children("a"), store.record("b").base) == (["a", "b"], ["b"], "a")

        assert process.started == before


def test_builds_share_one_barrier_and_sync_nothing_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("storebackends.durability.PAUSE", 3600.0)
    with open_store(backend="copy", path=tmp_path / "store", durability="group") as store:
        monkeypatch.setattr(os, "fsync", lambda _: synced.append("fsync"))
        barrier = Durability.barrier

        def counted(durability: Durability) -> None:
            synced.append("barrier")
            barrier(durability)

        monkeypatch.setattr(Durability, "barrier", counted)

        for number in range(20):
            store.build(f"a{number}", writes(f="1")).release()
        assert synced == []

    assert synced == ["barrier", "barrier"]  # for all the results, and for all their marks
    assert len(list((tmp_path / "store" / "result").glob("*/synced"))) == 20
