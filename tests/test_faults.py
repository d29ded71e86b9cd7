"""Disks that are full, fail or turn read-only, and clocks that jump: clear errors, nothing lost, and it goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

import storebackends
from storebackends import BuildFailed, NoSpace, Result, Store, StoreError, Workspace
from tests.capabilities import look, needs, probe, run
from tests.stores import files, kept, left_in_progress, open_copy, writes

pytestmark = pytest.mark.slow

SHIM = Path(__file__).with_name("faults") / "shim.c"
YEAR = 365 * 86400
Mounted = Callable[..., AbstractContextManager[Path]]


@probe("cc", "apt-get install gcc libc6-dev")
def _cc() -> None:
    run("cc", "--version")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    run("cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, SHIM, "-ldl")
    return library


@pytest.fixture
def area(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder in memory, if that can be had: thousands of syncs are no pleasure on a disk."""
    if not look("tmpfs").usable:
        yield tmp_path
        return
    with request.getfixturevalue("small_tmpfs")(size=64 << 20) as folder:
        yield folder


# Each system call fails once.

KINDS = {
    "copy": ("copy", {}),
    "rsync-copy": ("rsync", {"mode": "copy"}),
    "rsync-hardlink": ("rsync", {"mode": "hardlink"}),
    "overlay": ("overlay", {"depth": 1}),
}
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[needs(ability) for ability in ("rsync", "overlay") if ability in name])
        for name in KINDS
    ],
)


def sweep(shim: Path, area: Path, kind: str, fault: str, first: int, step: int) -> None:
    backend, options = KINDS[kind]
    numbers = [str(number) for number in (getattr(errno, fault), first, step)]
    command = [sys.executable, "-m", "tests.faults", str(area / "store"), backend, json.dumps(options), *numbers]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | {"LD_PRELOAD": str(shim)}
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("cc", "proc")
@pytest.mark.parametrize("fault", ["EIO", "EDQUOT"])
@pytest.mark.parametrize("kind", ["copy", pytest.param("overlay", marks=needs("overlay"))])
def test_a_system_call_that_fails_costs_a_clear_error_and_nothing_else(
    shim: Path, area: Path, kind: str, fault: str, rng: random.Random
) -> None:
    sweep(shim, area, kind, fault, rng.randint(1, 7), 7)


@pytest.mark.soak
@needs("cc", "proc")
@pytest.mark.parametrize("fault", ["EIO", "EDQUOT", "ENOSPC"])
@every_kind
def test_every_system_call_that_fails_costs_a_clear_error_and_nothing_else(
    shim: Path, area: Path, kind: str, fault: str
) -> None:
    sweep(shim, area, kind, fault, 1, 1)


# Full disks.


def _life(store: Store) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All that takes space, in the order of a life."""

    def failing(work: Workspace) -> None:
        work.log.write(b"x" * 5000)
        raise ValueError("meant to fail")

    def borrow() -> None:
        with store.cache("cache"):
            pass

    yield "reopen", lambda: open_copy(store.root).close()
    yield "build", lambda: store.build("child", writes(f="1" * 9000), base="base").release()
    yield "command", lambda: store.build("run", lambda work: work.run(["sh", "-c", "echo a; echo b > b"])).release()
    yield "fail", lambda: store.build("failing", failing)
    yield "borrow", borrow
    yield "hit", lambda: kept(store, "base").release()


def _refusal(act: Callable[[], Any]) -> StoreError | None:
    try:
        act()
    except StoreError as error:
        return error
    return None


def _fill_bytes(folder: Path, left: int) -> None:
    with suppress(OSError):
        (folder / "filler").write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left * 4096)))


def _fill_inodes(folder: Path, left: int) -> None:
    with suppress(OSError):
        for number in range(os.statvfs(folder).f_ffree - left):
            (folder / f"filler-{number}").touch()


@needs("tmpfs")
@pytest.mark.parametrize(
    ("options", "fill"),
    [({"size": 4 << 20}, _fill_bytes), ({"nr_inodes": 400}, _fill_inodes)],
    ids=["bytes", "inodes"],
)
def test_wherever_the_disk_gets_full_it_is_said_and_nothing_is_lost(
    small_tmpfs: Mounted, options: dict[str, int], fill: Callable[[Path, int], None]
) -> None:
    with small_tmpfs(**options) as folder, open_copy(folder / "store") as store:
        store.build("base", writes(f="0")).release()
        store.build("warm", lambda work: work.run(["cp", "/dev/null", "f"])).release()
        refused = set()

        for left in range(0, 60, 3):  # pages or inodes
            fill(folder, left)
            for phase, act in _life(store):
                if error := _refusal(act):
                    refused.add(phase)
                    assert isinstance(error, NoSpace | BuildFailed), f"{phase} with {left} left"
                    # A failed command says itself what was wrong, in the log.
                    assert phase in ("fail", "command") or "space" in str(error).lower(), f"{phase} with {left} left"
            for id in list(store.ids()):
                assert files(kept(store, id).path), f"{id} has lost something with {left} left"
            for filler in folder.glob("filler*"):
                filler.unlink()
            store.build("child", writes(f="1" * 9000), base="base").release()
            for id in ("child", "run"):
                store.delete(id)
            assert left_in_progress(store.root) == [], f"{left} left"

        assert {"build", "command", "fail"} <= refused


@needs("tmpfs")
def test_on_a_full_disk_results_can_be_read_deleted_and_pruned(small_tmpfs: Mounted) -> None:
    with small_tmpfs(size=4 << 20) as folder, open_copy(folder / "store") as store:
        for id in ("a", "b", "c"):
            store.build(id, writes(f="1" * 100_000)).release()
        _fill_bytes(folder, 0)
        with pytest.raises((NoSpace, BuildFailed)):
            store.build("d", writes(f="1" * 100_000))

        with kept(store, "c") as result:
            assert len(files(result.path)["f"]) == 100_000
        store.delete("a")
        plan = store.prune(max_items=1)

        assert [step.id for step in plan.steps] == ["b"]
        store.build("d", writes(f="1" * 100_000)).release()
        assert sorted(store.ids()) == ["c", "d"]


# Read-only disks.


@needs("ext4")
def test_a_disk_that_turns_read_only_refuses_changes_and_keeps_what_is_there(loop_fs: Mounted) -> None:
    with loop_fs("ext4", size=64 << 20) as folder:
        with open_copy(folder / "store") as store:
            store.build("a", writes(f="1")).release()
            store.build("b", writes(f="1"), base="a").release()
            held = kept(store, "a")
            run("sync", "-f", folder)

            run("mount", "-o", "remount,abort", folder)  # what a kernel does that finds an error

            refused: dict[str, Callable[[], Any]] = {
                "build": lambda: store.build("c", writes(f="2")),
                "build on": lambda: store.build("c", writes(f="2"), base="a"),
                "delete": lambda: store.delete("b"),
                "cache": lambda: store.cache("cache").__enter__(),
                "open": lambda: open_copy(folder / "store"),
            }
            for what, act in refused.items():
                with pytest.raises(StoreError, match=r"(?i)read-only"):
                    pytest.fail(f"{what}: {act()!r}")
            assert (files(held.path), held.record.outcome) == ({"f": "1"}, "built")
            assert files(kept(store, "a").path) == {"f": "1"}
            assert sorted(store.ids()) == ["a", "b"]

        run("umount", folder)
        run("mount", "-o", "loop", folder.parent / "image", folder)
        with open_copy(folder / "store") as store, store.build("c", writes(g="2"), base="b") as result:
            assert files(result.path) == {"f": "1", "g": "2"}
            assert left_in_progress(store.root) == []


def fails(work: Workspace) -> None:
    work.log.write(b"why")
    raise ValueError(work.id)


@needs("ext4")
def test_what_needs_no_write_works_on_a_disk_that_turned_read_only(loop_fs: Mounted) -> None:
    with loop_fs("ext4", size=64 << 20) as folder:
        root = folder / "store"
        with open_copy(root) as store:
            store.build("a", writes(f="1")).release()
            store.build("b", writes(g="1"), base="a").release()
            with pytest.raises(BuildFailed):
                store.build("failed", fails)
            with store.cache("c") as path:
                (path / "f").write_text("1")
        with open_copy(root) as idle:  # it has read and locked nothing yet
            run("sync", "-f", folder)
            run("mount", "-o", "remount,abort", folder)

            with kept(idle, "a") as result:
                assert (files(result.path), b"".join(result.log.tail())) == ({"f": "1"}, b"f\n")
            with idle.build("b", writes(f="other"), base="a") as result, idle.use("b") as same:
                assert (result.outcome, files(same.path)) == ("hit", {"f": "1", "g": "1"})
            assert b"".join(idle.log("b").tail()) == b"g\n"
            assert b"".join(idle.log("failed").tail()) == b"why"
            assert idle.result("none") is None
            assert (sorted(idle.ids()), idle.children("a"), idle.record("b").base) == (["a", "b"], ["b"], "a")
            assert (idle.running(), idle.failures()) == ([], {"failed"})
            assert idle.size("a").bytes > 0
            assert idle.usage().total > 0
            assert [info.name for info in idle.caches()] == ["c"]
            assert idle.fsck().is_clean

            for act in (lambda: idle.build("c", writes(f="2")), lambda: idle.prune(all=True), lambda: open_copy(root)):
                with pytest.raises(StoreError, match=r"(?i)read-only file system; ") as refused:
                    act()
                assert str(root) in str(refused.value)


@needs("tmpfs")
def test_a_store_on_a_read_only_disk_is_not_opened_and_says_why(small_tmpfs: Mounted) -> None:
    with small_tmpfs() as folder:
        with open_copy(folder / "store") as store:
            store.build("a", writes(f="1")).release()
        run("mount", "-o", "remount,ro", folder)

        for root in (folder / "store", folder / "new"):
            with pytest.raises(StoreError, match="(?i)read-only file system; mount it writable"):
                open_copy(root)

        run("mount", "-o", "remount,rw", folder)
        with open_copy(folder / "store") as store:
            assert list(store.ids()) == ["a"]


# Folders of the store that another hand damaged.

VERBS: dict[str, Callable[[Store], Any]] = {
    "result": lambda store: _release(store.result("a")),
    "use": lambda store: store.use("a").__enter__().release(),
    "ids": lambda store: list(store.ids()),
    "log": lambda store: b"".join(store.log("a").tail()),
    "log of a failure": lambda store: b"".join(store.log("failed").tail()),
    "log of nothing": lambda store: store.log("none"),
    "children": lambda store: store.children("a"),
    "record": lambda store: store.record("a"),
    "running": lambda store: store.running(),
    "failures": lambda store: store.failures(),
    "size": lambda store: store.size("a"),
    "usage": lambda store: store.usage(),
    "caches": lambda store: store.caches(),
    "cache": lambda store: store.cache("c").__enter__(),
    "cache delete": lambda store: store.delete_cache("none"),
    "fsck": lambda store: store.fsck(),
    "repair": lambda store: store.fsck(repair=True),
    "dry run": lambda store: store.prune(all=True, dry_run=True),
    "hit": lambda store: store.build("a", writes(f="1")).release(),
    "miss": lambda store: store.build("new", writes(f="1")).release(),
    "start": lambda store: store.start("other", writes(f="1"), base="a").wait().release(),
    "log of a start": lambda store: b"".join(store.start("third", writes(f="1")).log.tail()),
    "function that builds": lambda store: store.build("4th", lambda _: store.build("5th", writes(f="1"))).release(),
    "delete": lambda store: store.delete("b"),
    "recursive": lambda store: store.delete("a", recursive=True),
    "prune": lambda store: store.prune(all=True),
    "close": lambda store: store.close(),
    "open": lambda store: open_copy(store.root).close(),
}


def _release(result: Result | None) -> None:
    if result:
        result.release()


@pytest.mark.parametrize(
    "room", ["result", "in-progress", "failed", "caches", "loans", "trash", "scratch", "locks", "index.sqlite", ""]
)
@pytest.mark.parametrize("damage", ["gone", "a file"])
def test_whatever_is_asked_of_a_store_without_one_of_its_folders_is_a_store_error(
    tmp_path: Path, room: str, damage: str
) -> None:
    root = tmp_path / "store"
    with open_copy(root) as store:
        store.build("a", writes(f="1")).release()
        store.build("b", writes(f="1"), base="a").release()
        with pytest.raises(BuildFailed):
            store.build("failed", lambda _: 1 / 0)
    for verb, act in VERBS.items():
        with open_copy(root) as store:
            place, aside = root / room, tmp_path / "aside"
            place.rename(aside)
            if damage == "a file":
                place.write_text("damaged")
            try:
                act(store)
            except StoreError:
                pass
            except Exception as error:
                raise AssertionError(f"{verb} raises {error!r}") from error
            finally:
                if place.is_dir():
                    shutil.rmtree(place)
                place.unlink(missing_ok=True)
                aside.rename(place)


# Clocks.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the clock jump; kernels keep the times of files, which are not in this test's hands."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def jump(seconds: float) -> None:
        offset[0] += seconds

    return jump


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_changes_what_goes_first_and_nothing_else(
    tmp_path: Path, clock: Callable[[float], None], years: int
) -> None:
    with open_copy(tmp_path / "store") as store:
        store.build("before", writes(f="1")).release()
        store.build("used", writes(f="1"), base="before").release()

        clock(years * YEAR)
        store.build("after", writes(f="2"), base="before").release()
        with kept(store, "used"):
            plan = store.prune(max_items=0, keep_for="7d")

            # What was used in the future counts as used now.
            assert set(store.ids()) == {"before", "used", "after"}
            assert plan.steps == ()
            assert all(kept.reason for kept in plan.kept)
        clock(years * YEAR)
        store.prune(max_items=0)
        assert list(store.ids()) == []


def test_failures_are_kept_and_found_though_the_clock_jumps(tmp_path: Path, clock: Callable[[float], None]) -> None:
    def failing(work: Workspace) -> None:
        work.log.write(f"at {time.time():.0f}".encode())
        raise ValueError(work.id)

    with storebackends.open_store(backend="copy", path=tmp_path / "store", durability="none") as store:
        for years in (0, 5, -10):
            clock(years * YEAR)
            with pytest.raises(BuildFailed):
                store.build("a", failing)

            with store.log("a").tail() as reader:
                assert b"".join(reader) == f"at {time.time():.0f}".encode()
