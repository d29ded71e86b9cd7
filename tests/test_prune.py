from __future__ import annotations

import itertools
import logging
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from storebackends import ConfigError, Store, StoreError, Workspace
from storebackends.backend import Size, Usage
from storebackends.entries import EntryBackend
from storebackends.prune import Plan, Policy, bytes_of, seconds_of
from tests.capabilities import look, needs
from tests.stores import WAIT, kept, left_in_progress, open_copy, python, until, writes
from tests.test_docs import blocks

LEASED_HERE = "leased by this process" if look("proc").usable else "leased"

HOUR, DAY, MIB = 3600.0, 86400.0, 1 << 20

Shelf = Callable[..., None]
Disk = Callable[..., None]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


@pytest.fixture
def shelf(store: Store) -> Shelf:
    """Build results, and have them used so many seconds ago: shelf(a=(None, DAY), b=("a", HOUR))."""

    def build(size: int = 10, **results: tuple[str | None, float]) -> None:
        for id, (base, _) in results.items():
            store.build(id, lambda work, id=id: _fill(work.path / id, size), base).release()  # type: ignore[misc]
        for id, (_, ago) in results.items():
            age(store, id, ago)

    return build


def _fill(path: Path, size: int) -> None:
    path.write_bytes(os.urandom(size))


def age(store: Store, id: str, ago: float) -> None:
    """Have *id* used so many seconds ago, for every process."""
    store._index.flush()
    db = sqlite3.connect(store.root / "index.sqlite", timeout=WAIT)
    try:
        db.execute("UPDATE results SET used = ? WHERE id = ?", (time.time() - ago, id))
        db.commit()
    finally:
        db.close()


@pytest.fixture
def disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Give the store a disk on which each result takes so many of 1,000 bytes, and of 1,000 inodes."""

    def make(bytes: int = 100, inodes: int = 0, others: int = 0, frees: Callable[[], bool] = lambda: True) -> None:
        count = [len(list(store.ids()))]

        def usage(backend: EntryBackend) -> Usage:
            if frees():
                count[0] = len(list(store.ids()))
            return Usage(1000, 1000 - others - bytes * count[0], 1000, 1000 - inodes * count[0])

        monkeypatch.setattr(EntryBackend, "usage", usage)
        monkeypatch.setattr(EntryBackend, "size", lambda *_: Size(bytes, exact=True))

    return make


def gone(plan: Plan) -> list[str]:
    return [step.id for step in plan.steps]


def why_kept(plan: Plan) -> dict[str, str]:
    return {kept.id: kept.reason for kept in plan.kept}


class TestAmounts:
    @pytest.mark.parametrize(
        ("amount", "bytes"),
        [(7, 7), ("10GiB", 10 << 30), ("10 GB", 10**10), ("1.5kib", 1536), ("3 B", 3), ("15%", 30), ("100 %", 200)],
    )
    def test_are_bytes_or_a_share(self, amount: int | str, bytes: int) -> None:
        assert bytes_of(amount, total=200) == bytes

    @pytest.mark.parametrize("amount", [-1, True, 1.5, "", "10", "10G", "iB", "101%", "-3%", "1 e3B", "٣%", None])
    def test_that_are_none_are_refused(self, amount: object) -> None:
        with pytest.raises(ValueError, match="10GiB"):
            bytes_of(amount, total=200)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("duration", "seconds"), [(5, 5), (0.5, 0.5), ("90 s", 90), ("2min", 120), ("12h", 12 * HOUR), ("1w", 7 * DAY)]
    )
    def test_of_time_are_seconds_or_have_a_unit(self, duration: float | str, seconds: float) -> None:
        assert seconds_of(duration) == seconds

    @pytest.mark.parametrize("duration", [-1, True, float("nan"), float("inf"), "", "7", "7 days", "1y", None])
    def test_of_time_that_are_none_are_refused(self, duration: object) -> None:
        with pytest.raises(ValueError, match="12h"):
            seconds_of(duration)  # type: ignore[arg-type]


class TestPolicy:
    def test_reports_all_that_is_wrong_with_it(self) -> None:
        with pytest.raises(ConfigError) as caught:
            Policy(min_free="much", keep_for="long", max_items=True)

        assert [problem.split(":")[0] for problem in caught.value.problems] == ["min_free", "keep_for", "max_items"]

    def test_min_free_holds_for_the_tightest_of_bytes_inodes_and_metadata(self) -> None:
        policy, usage = Policy(min_free="10%"), Usage(1000, 100, 1000, 100, 1000, 100)

        assert policy.short_of(usage) == []
        assert policy.short_of(replace(usage, free=99)) == ["bytes"]
        assert policy.short_of(replace(usage, inodes_free=99, metadata_free=0)) == ["inodes", "metadata"]
        assert policy.short_of(replace(usage, inodes_total=None, inodes_free=None)) == []

    def test_that_asks_for_nothing_is_refused(self, store: Store) -> None:
        with pytest.raises(ConfigError, match="min_free, max_used or max_items"):
            store.prune(keep_for="1h")

    def test_of_the_store_holds_where_nothing_else_is_given(self, store: Store, shelf: Shelf) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY), c=(None, HOUR))
        store.prune_policy = Policy(keep_for="1d", max_items=2)

        assert gone(store.prune(dry_run=True)) == ["a"]
        assert gone(store.prune(max_items=0, dry_run=True)) == ["a", "b"]
        assert gone(store.prune(all=True, dry_run=True)) == ["a", "b", "c"]


class TestOrder:
    def test_the_least_recently_used_go_first(self, store: Store, shelf: Shelf) -> None:
        shelf(a=(None, 5 * HOUR), b=(None, 3 * DAY), c=(None, 2 * DAY), d=(None, HOUR))

        plan = store.prune(max_items=2)

        assert gone(plan) == ["b", "c"]
        assert sorted(store.ids()) == ["a", "d"]
        assert [step.reason for step in plan.steps] == [
            "used 3 d ago; max_items 2: there are 4",
            "used 2 d ago; max_items 2: there are 3",
        ]
        assert why_kept(plan) == {
            "a": "used 5 h ago; no rule needs it to go",
            "d": "used 1 h ago; no rule needs it to go",
        }
        assert plan.unmet == ()

    def test_a_base_goes_after_all_that_was_built_on_it(self, store: Store, shelf: Shelf) -> None:
        shelf(base=(None, 9 * DAY), x=("base", HOUR), y=("base", 2 * HOUR), x1=("x", 2 * DAY), lone=(None, 3 * HOUR))

        assert gone(store.prune(all=True, dry_run=True)) == ["x1", "lone", "y", "x", "base"]
        assert gone(store.prune(max_items=1)) == ["x1", "lone", "y", "x"]
        assert gone(store.prune(all=True)) == ["base"]

    def test_a_dry_run_says_what_a_run_then_does(self, store: Store, shelf: Shelf) -> None:
        shelf(a=(None, 2 * DAY), b=("a", DAY), c=(None, 3 * DAY), d=("c", HOUR))

        planned = store.prune(max_items=1, dry_run=True)
        assert sorted(store.ids()) == ["a", "b", "c", "d"]
        done = store.prune(max_items=1)

        assert gone(planned) == gone(done)
        assert [step.frees for step in planned.steps] == [step.frees for step in done.steps]
        assert all(step.frees.bytes > 0 and not step.frees.exact for step in done.steps)

    def test_a_use_in_any_process_counts_and_so_does_building_on_it(self, store: Store, shelf: Shelf) -> None:
        shelf(hit=(None, 9 * DAY), base=(None, 8 * DAY), other=(None, DAY))
        with open_copy(store.root) as elsewhere:
            kept(elsewhere, "hit").release()
            elsewhere.build("child", writes(f="1"), "base").release()
            elsewhere.delete("child")

        assert gone(store.prune(max_items=2)) == ["other"]


class TestStays:
    def test_what_is_leased_and_its_bases_with_the_reason(self, store: Store, shelf: Shelf) -> None:
        shelf(base=(None, 3 * DAY), app=("base", 2 * DAY), old=(None, DAY))

        with kept(store, "app"):
            age(store, "app", 2 * DAY)
            plan = store.prune(max_items=0)

        assert gone(plan) == ["old"]
        assert why_kept(plan) == {"app": LEASED_HERE, "base": "base of app, used 2 d ago"}
        assert plan.unmet == ("max_items 0: there are 2; held back by 1 built on, 1 in use",)

    @needs("proc")
    def test_what_another_process_leases_with_its_number(self, store: Store, shelf: Shelf, tmp_path: Path) -> None:
        shelf(app=(None, DAY))
        holder = python(HOLDER, store.root, tmp_path / "held")
        until((tmp_path / "held").exists)

        plan = store.prune(all=True)

        holder.kill()
        holder.communicate(timeout=WAIT)
        assert why_kept(plan)["app"].startswith(f"leased by pid {holder.pid} (")
        assert list(store.ids()) == ["app"]
        assert plan.unmet == ()

    def test_what_was_used_within_keep_for_whatever_the_other_rules_ask(self, store: Store, shelf: Shelf) -> None:
        shelf(base=(None, 9 * DAY), new=("base", HOUR), old=(None, 2 * DAY))

        plan = store.prune(keep_for="1d", max_items=0)

        assert gone(plan) == ["old"]
        assert why_kept(plan) == {"new": "used 1 h ago, keep_for 1d", "base": "base of new, used 1 h ago"}
        assert plan.unmet == ("max_items 0: there are 2; held back by 1 built on, 1 used within keep_for 1d",)

    def test_what_is_being_built_on(self, store: Store, shelf: Shelf) -> None:
        shelf(base=(None, DAY), other=(None, 2 * DAY))
        begun, go = threading.Event(), threading.Event()

        def fn(work: Workspace) -> None:
            begun.set()
            assert go.wait(WAIT)

        build = store.start("child", fn, "base")
        assert begun.wait(WAIT)
        plan = store.prune(all=True)
        go.set()

        assert gone(plan) == ["other"]
        assert build.wait(WAIT).base == "base"
        assert why_kept(plan)["base"].startswith(LEASED_HERE)

    def test_what_was_used_after_the_plan_was_made(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY), c=(None, DAY))
        hide = EntryBackend.hide

        def use_b_first(backend: EntryBackend, id: str) -> Path | None:
            kept(store, "b").release()
            return hide(backend, id)

        monkeypatch.setattr(EntryBackend, "hide", use_b_first)
        plan = store.prune(max_items=1)

        assert gone(plan) == ["a", "c"]
        assert why_kept(plan) == {"b": "used a moment ago"}

    def test_what_was_built_on_after_the_plan_was_made(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))
        monkeypatch.setattr("storebackends.index.PAUSE", math.inf)  # the use of the base is not yet written
        hide = EntryBackend.hide

        with open_copy(store.root) as elsewhere:

            def build_on_b_first(backend: EntryBackend, id: str) -> Path | None:
                elsewhere.build("child", writes(f="1"), "b").release()
                return hide(backend, id)

            monkeypatch.setattr(EntryBackend, "hide", build_on_b_first)
            plan = store.prune(max_items=0)

        assert gone(plan) == ["a"]
        assert why_kept(plan) == {"b": "base of child, built a moment ago"}

    def test_what_cannot_be_deleted_and_the_next_goes(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))
        hide = EntryBackend.hide

        def refuse_a(backend: EntryBackend, id: str) -> Path | None:
            if id == "a":
                raise StoreError("the disk says no")
            return hide(backend, id)

        monkeypatch.setattr(EntryBackend, "hide", refuse_a)
        plan = store.prune(max_items=0)

        assert gone(plan) == ["b"]
        assert why_kept(plan) == {"a": "could not be deleted: the disk says no"}
        assert "the disk says no" in caplog.text

    def test_nothing_that_was_hidden_but_could_not_be_reclaimed(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))

        def refuse(backend: EntryBackend, folder: Path) -> None:
            raise StoreError("something is mounted there")

        monkeypatch.setattr(EntryBackend, "remove", refuse)
        plan = store.prune(all=True)

        assert (plan.steps, plan.kept) == ((), ())
        assert not [*store.ids(), *store._index.rows()]
        assert "something is mounted there" in caplog.text

    def test_only_what_could_not_be_reclaimed_is_told_so_and_the_others_go(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY), c=(None, DAY))
        reclaim = EntryBackend.reclaim

        def refuse_b(backend: EntryBackend, hidden: Path) -> None:
            if hidden.name.startswith("b~"):
                raise StoreError("something is mounted there")
            reclaim(backend, hidden)

        monkeypatch.setattr(EntryBackend, "reclaim", refuse_b)
        plan = store.prune(all=True)

        assert gone(plan) == ["a", "c"]
        assert [name.partition("~")[0] for name in left_in_progress(store.root)] == ["b"]
        assert ["b is deleted" in record.message for record in caplog.records] == [True]

    def test_what_cannot_be_measured_goes_all_the_same(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))

        def fail(backend: EntryBackend, id: str) -> Size:
            raise StoreError("the disk says no")

        monkeypatch.setattr(EntryBackend, "size", fail)

        assert gone(store.prune(max_used=0)) == []
        assert gone(store.prune(max_items=1)) == ["a"]

    def test_of_many_the_size_of_the_last_is_an_estimate(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("storebackends.prune.SAMPLE", 2)
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY))
        disk(bytes=100)

        planned, done = store.prune(all=True, dry_run=True), store.prune(all=True)

        assert [step.frees for step in planned.steps] == [Size(100, exact=True)] * 3
        assert [step.frees for step in done.steps] == [Size(100, exact=True)] * 2 + [Size(100, exact=False)]

    def test_all_from_a_store_that_is_closed_meanwhile(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))
        hide = EntryBackend.hide

        def close_after(backend: EntryBackend, id: str) -> Path | None:
            hidden = hide(backend, id)
            store._locks.close()
            return hidden

        monkeypatch.setattr(EntryBackend, "hide", close_after)
        with pytest.raises(StoreError, match="closed"):
            store.prune(all=True)

        assert sorted(store.ids()) == ["b"]

    def test_what_has_no_readable_record(self, store: Store, shelf: Shelf) -> None:
        shelf(a=(None, DAY))
        (store.root / "result" / "broken").mkdir()

        plan = store.prune(max_items=0)

        assert gone(plan) == ["a"]
        assert "fsck --repair" in why_kept(plan)["broken"]
        assert plan.unmet == ("max_items 0: there are 1; held back by 1 damaged",)


class TestSpace:
    def test_goes_on_until_enough_is_free(self, store: Store, shelf: Shelf, disk: Disk) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY), d=(None, DAY))
        disk(bytes=100, others=400)

        planned = store.prune(min_free="40%", dry_run=True)
        done = store.prune(min_free="40%")

        assert gone(planned) == gone(done) == ["a", "b"]
        assert done.steps[0].reason == "used 4 d ago; min_free 40%: 200 B are free"
        assert done.freed == Size(200, exact=True)
        assert done.unmet == ()

    def test_is_measured_as_it_is_freed_not_by_sizes(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY), d=(None, DAY))
        disk(bytes=100, others=400)
        monkeypatch.setattr(EntryBackend, "size", lambda *_: Size(100_000, exact=False))

        assert gone(store.prune(min_free=500)) == ["a", "b", "c"]

    def test_of_inodes_counts_too(self, store: Store, shelf: Shelf, disk: Disk) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY))
        disk(bytes=1, inodes=300)

        planned = store.prune(min_free="50%", dry_run=True)
        done = store.prune(min_free="50%")

        # Before, nobody knows how many inodes each will free.
        assert (gone(planned), planned.unmet) == (["a", "b", "c"], ())
        assert (gone(done), done.unmet) == (["a", "b"], ())
        assert done.steps[0].reason == "used 4 d ago; min_free 50%: 100 inodes are free"

    @pytest.mark.parametrize("rule", ["min_free", "max_used"])
    def test_of_what_was_hidden_is_reclaimed_before_the_next_is_chosen(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch, rule: str
    ) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY), d=(None, DAY))
        disk(bytes=100, frees=lambda: not left_in_progress(store.root))
        hide, left = EntryBackend.hide, list[str]()

        def look_first(backend: EntryBackend, id: str) -> Path | None:
            left.extend(left_in_progress(store.root))
            return hide(backend, id)

        monkeypatch.setattr(EntryBackend, "hide", look_first)
        plan = store.prune(**{rule: {"min_free": "80%", "max_used": 200}[rule]})  # type: ignore[arg-type]

        assert (gone(plan), plan.unmet) == (["a", "b"], ())
        assert left == []

    def test_of_large_results_does_not_wait_for_more(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("storebackends.prune.LARGE", 200)
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY))
        disk(bytes=100)
        waiting = list[int]()
        hide = EntryBackend.hide

        def count(backend: EntryBackend, id: str) -> Path | None:
            waiting.append(len(left_in_progress(store.root)))
            return hide(backend, id)

        monkeypatch.setattr(EntryBackend, "hide", count)
        plan = store.prune(all=True)

        assert gone(plan) == ["a", "b", "c"]
        assert waiting == [0, 1, 0]

    def test_that_nothing_can_free_is_said(self, store: Store, shelf: Shelf, disk: Disk) -> None:
        shelf(a=(None, DAY))
        disk(bytes=100, others=900)

        plan = store.prune(min_free="50%")

        assert gone(plan) == ["a"]
        assert plan.unmet == ("min_free 50%: 100 B are free; no result is left, and the rest is not this store's",)

    def test_that_does_not_come_back_ends_the_deletions(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # https://github.com/ocurrent/obuilder/pull/209
        monkeypatch.setattr("storebackends.prune._PAUSES", (0.0, 0.0))
        monkeypatch.setattr("storebackends.prune.GIVE_UP", 2)
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY), d=(None, DAY))
        disk(bytes=100, frees=lambda: False)

        plan = store.prune(min_free="90%")

        assert gone(plan) == ["a", "b"]
        assert why_kept(plan)["c"] == "used 2 d ago; deleting more frees nothing"
        assert len(plan.unmet) == 1
        assert "others fill it, or still hold the data" in plan.unmet[0]

    def test_that_comes_back_later_is_waited_for(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY))
        settled: list[float] = []
        disk(bytes=100, frees=lambda: bool(settled))

        def settle(backend: EntryBackend, timeout: float) -> bool:
            settled.append(timeout)
            return True

        monkeypatch.setattr(EntryBackend, "settle", settle)
        plan = store.prune(min_free="80%")

        assert gone(plan) == ["a"]
        assert len(settled) == 1

    def test_max_used_is_what_the_results_take_not_what_others_do(self, store: Store, shelf: Shelf, disk: Disk) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY))
        disk(bytes=100, others=500)

        assert gone(store.prune(max_used="30%")) == []
        assert gone(store.prune(max_used=250)) == ["a"]
        plan = store.prune(max_used="5%", keep_for="2.5d")

        assert gone(plan) == ["b"]
        assert plan.unmet == ("max_used 5%: 100 B are used; held back by 1 used within keep_for 2.5d",)

    def test_sizes_are_measured_once(self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        shelf(a=(None, DAY), b=(None, HOUR))
        store.prune(max_used="99%")
        monkeypatch.setattr(EntryBackend, "size", lambda *_: pytest.fail("measured again"))

        assert gone(store.prune(max_used=0)) == ["a", "b"]

    @needs("tmpfs")
    def test_of_a_real_tmpfs_is_made(self, small_tmpfs: Callable[..., AbstractContextManager[Path]]) -> None:
        with small_tmpfs(size=20 * MIB) as folder:
            make_room_in(folder, MIB)

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
    def test_of_a_real_disk_is_made(self, loop_fs: Callable[..., AbstractContextManager[Path]], kind: str) -> None:
        with loop_fs(kind) as folder:
            make_room_in(folder, 5 * MIB)


def make_room_in(folder: Path, size: int) -> None:
    """Of twelve results of this size as many go as it takes to free four and a half, and no more."""
    with open_copy(folder / "store") as store:
        for n in range(12):
            store.build(f"r{n:02}", lambda work: _fill(work.path / "f", size)).release()
            age(store, f"r{n:02}", DAY - n)
        if sys.platform != "win32":
            os.sync()
        goal = store.usage().free + 9 * size // 2

        plan = store.prune(min_free=goal)

        assert gone(plan) == [f"r{n:02}" for n in range(5)]
        assert plan.unmet == ()
        assert store.usage().free >= goal
        assert left_in_progress(store.root) == []


class TestMany:
    def test_a_long_chain_and_more_than_one_batch(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storebackends.prune.BATCH", 16)
        ids = [f"r{n:03}" for n in range(70)]
        for id, base in zip(ids, [None, *ids], strict=False):
            store.build(id, writes(f=id), base).release()

        plan = store.prune(max_items=1)

        assert gone(plan) == ids[:0:-1]
        assert [row.id for row in store._index.rows()] == ids[:1]

    def test_several_prunes_at_once_share_the_work(self, store: Store) -> None:
        for n in range(60):
            store.build(f"r{n}", writes(f="1")).release()
        plans: list[Plan] = []
        threads = [threading.Thread(target=lambda: plans.append(store.prune(all=True))) for _ in range(4)]

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)

        done = list(itertools.chain.from_iterable(map(gone, plans)))
        assert len(plans) == 4
        assert len(done) == len(set(done))
        assert {*done, *store.ids()} == {f"r{n}" for n in range(60)}

    def test_an_interrupted_prune_leaves_an_index_that_agrees_with_the_disk(
        self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 4 * DAY), b=(None, 3 * DAY), c=(None, 2 * DAY))
        hide = EntryBackend.hide

        def interrupted(backend: EntryBackend, id: str) -> Path | None:
            if id == "b":
                raise KeyboardInterrupt
            return hide(backend, id)

        monkeypatch.setattr(EntryBackend, "hide", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.prune(all=True)

        assert [row.id for row in store._index.rows()] == ["b", "c"] == sorted(store.ids())
        assert left_in_progress(store.root) == []


class TestHidden:
    """What a prune has hidden, and not yet reclaimed."""

    def test_is_trash_and_no_more_after_a_kill(self, store: Store, shelf: Shelf) -> None:
        shelf(base=(None, 9 * DAY), a=("base", 3 * DAY), b=(None, 2 * DAY))

        killed = python(KILLED, store.root)
        killed.communicate(timeout=WAIT)

        assert killed.returncode == 9
        assert list(store.ids()) == ["b"]
        assert sorted(name.partition("~")[0] for name in left_in_progress(store.root)) == ["a", "base"]
        with open_copy(store.root) as again:
            assert left_in_progress(store.root) == []
            assert gone(again.prune(all=True)) == ["b"]

    def test_is_nothing_that_fsck_minds(self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))
        kinds, reclaim = list[set[str]](), EntryBackend.reclaim

        def check_first(backend: EntryBackend, hidden: Path) -> None:
            kinds.append({finding.kind for finding in store.fsck().findings})
            reclaim(backend, hidden)

        monkeypatch.setattr(EntryBackend, "reclaim", check_first)
        store.prune(all=True)

        assert kinds == [set(), set()]

    def test_can_be_built_anew_at_once(self, store: Store, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))
        reclaim = EntryBackend.reclaim

        def build_first(backend: EntryBackend, hidden: Path) -> None:
            store.build(hidden.name.partition("~")[0], writes(new="1")).release()
            reclaim(backend, hidden)

        monkeypatch.setattr(EntryBackend, "reclaim", build_first)
        plan = store.prune(all=True)

        assert gone(plan) == ["a", "b"]
        assert sorted(store.ids()) == ["a", "b"] == sorted(row.id for row in store._index.rows())
        with kept(store, "a") as result:
            assert os.listdir(result.path) == ["new"]


class TestBeforeABuild:
    def test_room_is_made_where_less_is_free_than_the_policy_asks_for(
        self, store: Store, shelf: Shelf, disk: Disk
    ) -> None:
        shelf(base=(None, 9 * DAY), a=(None, 3 * DAY), b=(None, 2 * DAY))
        store.prune_policy = Policy(min_free="80%")
        disk(bytes=100)

        store.build("new", writes(f="1"), "base").release()

        assert sorted(store.ids()) == ["b", "base", "new"]

    def test_the_space_is_looked_at_every_few_seconds_only(
        self, store: Store, shelf: Shelf, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shelf(a=(None, 3 * DAY), b=(None, 2 * DAY))
        store.prune_policy = Policy(min_free="95%", keep_for="1d")
        looks = itertools.count()
        monkeypatch.setattr(EntryBackend, "usage", lambda _: Usage(100, 99 - next(looks)))

        for n in range(5):
            store.build(f"n{n}", writes(f="1")).release()

        assert next(looks) == 1

    def test_a_build_does_not_fail_for_what_prune_cannot_do(
        self, store: Store, disk: Disk, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.prune_policy = Policy(min_free="99%")
        disk(bytes=100, others=900)

        with caplog.at_level(logging.WARNING):
            store.build("new", writes(f="1")).release()

        assert "before a build: min_free 99%: 100 B are free" in caplog.text
        assert list(store.ids()) == ["new"]


@pytest.mark.docs
@needs("source")
def test_the_how_to_works_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("docs/how-to/keep-the-disk-free.md", "python")
    exec(example.replace("/tmp/room", str(tmp_path / "room")), {})

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["app-0", "app-1", "app-2", "app-3"]


KILLED = """if True:
    import os, sys, tests.stores as stores
    from storebackends.entries import EntryBackend
    EntryBackend.reclaim = lambda *_: os._exit(9)  # nothing is done after it
    with stores.open_copy(stores.Path(sys.argv[1])) as store:
        store.prune(max_items=1)
"""
HOLDER = """if True:
    import sys, tests.stores as stores
    store = stores.open_copy(stores.Path(sys.argv[1]))
    held = stores.kept(store, "app")
    stores.Path(sys.argv[2]).touch()
    stores.until(lambda: False)
"""
