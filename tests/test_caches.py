"""Named caches: who gets what, who waits for whom, and what stays. The kit has what a backend must hold."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import storebackends
from storebackends import (
    BuildFailed,
    Busy,
    Cancelled,
    InvalidId,
    RecipeError,
    Store,
    StoreError,
    Workspace,
    durability,
    open_store,
    opening,
)
from storebackends.backend import CacheEntry, Size
from storebackends.recipe import Recipe, load
from storebackends.steps import plan, run_recipe
from tests.capabilities import needs
from tests.stores import WAIT, files, open_copy, python, until, writes
from tests.test_docs import blocks

BORROWER = """if True:
    import sys, tests.stores as stores
    with stores.open_copy(stores.Path(sys.argv[1])) as store, store.cache("c", sys.argv[2]) as path:
        (path / "f").write_text("theirs")
        stores.Path(sys.argv[1] + ".lent").touch()
        stores.until(lambda: stores.Path(sys.argv[1] + ".go").exists())
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


@pytest.fixture
def borrower(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the cache "c" of the store lent, in the mode that the test is given."""
    mode = request.param if hasattr(request, "param") else "shared"
    root = tmp_path / "store"
    open_copy(root).close()
    process = python(BORROWER, root, mode)
    until(lambda: Path(f"{root}.lent").exists())
    yield process
    Path(f"{root}.go").touch()
    process.communicate(timeout=WAIT)


def put(store: Store, name: str = "c", **texts: str) -> None:
    with store.cache(name) as path:
        for file, text in texts.items():
            (path / file).write_text(text)


def cached(store: Store, name: str = "c") -> dict[str, str]:
    with store.cache(name, mode="private") as path:
        return files(path)


def kept(root: Path) -> list[str]:
    """All generations and all loans."""
    return sorted(path.relative_to(root).as_posix() for room in ("caches/*/*", "loans/*") for path in root.glob(room))


def loans(root: Path) -> list[Path]:
    return list(root.glob("loans/*"))


# Who gets what.


def test_a_cache_is_what_was_last_given_back(store: Store) -> None:
    put(store, a="1")
    put(store, b="2")

    assert cached(store) == {"a": "1", "b": "2"}
    assert kept(store.root) == ["caches/c/2"]


@needs("syncfs")
def test_a_generation_on_the_disk_stays_until_a_newer_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut costs the newest generations, never the cache."""
    monkeypatch.setattr(durability, "PAUSE", 3600)
    with open_store(backend="copy", path=tmp_path / "store", durability="group") as store:
        put(store, a="1")
        put(store, a="2")
        unmarked = kept(store.root)
        store._durability.flush()
        put(store, a="3")
        one_marked = kept(store.root)
        put(store, a="4")

    with open_store(backend="copy", path=tmp_path / "store") as store:
        assert cached(store) == {"a": "4"}
        assert kept(store.root) == ["caches/c/4"]
    assert unmarked == ["caches/c/1", "caches/c/2"]
    assert one_marked == ["caches/c/2", "caches/c/3"]


def test_caches_are_apart(store: Store) -> None:
    put(store, "c", f="1")
    put(store, "c.2", f="2")

    assert (cached(store, "c"), cached(store, "c.2")) == ({"f": "1"}, {"f": "2"})


@pytest.mark.parametrize("name", ["", "../c", "a/b", "a~b", "CON"])
def test_a_name_follows_the_rule_of_ids_before_anything_is_touched(store: Store, name: str) -> None:
    with pytest.raises(InvalidId), store.cache(name):
        pass
    with pytest.raises(InvalidId):
        store.delete_cache(name)

    assert kept(store.root) == []


def test_an_unknown_mode_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="mode 'public'; use shared, private, locked"), store.cache("c", "public"):  # type: ignore[arg-type]
        pass


def test_of_many_that_borrow_at_once_exactly_one_is_given_back(store: Store) -> None:
    together = threading.Barrier(8)

    def borrow(number: int) -> None:
        with store.cache("c") as path:
            (path / "f").write_text(str(number))
            together.wait(WAIT)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(borrow, range(8)))

    assert kept(store.root) == ["caches/c/1"]
    assert cached(store)["f"] in map(str, range(8))


def test_in_mode_locked_nothing_that_was_added_is_lost(tmp_path: Path) -> None:
    stores = [open_copy(tmp_path / "store") for _ in range(8)]

    def borrow(number: int) -> None:
        for turn in range(3):
            with stores[number].cache("c", mode="locked") as path:
                (path / f"{number}-{turn}").touch()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(borrow, range(8)))

    assert len(cached(stores[0])) == 24
    for store in stores:
        store.close()
    assert kept(tmp_path / "store") == ["caches/c/24"]


def test_the_source_of_a_loan_stays_until_it_ends(store: Store) -> None:
    put(store, f="1")

    with store.cache("c", mode="private"):
        put(store, f="2")
        put(store, f="3")
        assert [path for path in kept(store.root) if path.startswith("caches")] == ["caches/c/1", "caches/c/3"]

    assert kept(store.root) == ["caches/c/3"]


def test_removing_the_last_generation_leaves_the_folder_to_who_is_about_to_give_back(store: Store) -> None:
    folder = store.root / "caches" / "c"
    folder.mkdir()

    store._backend.cache_drop(CacheEntry("c", folder / "1"))  # late: another process dropped it already

    assert folder.is_dir()


def test_a_copy_that_was_replaced_is_not_given_back(store: Store) -> None:
    put(store, f="1")

    with pytest.raises(StoreError, match="removed or replaced"), store.cache("c") as path:
        path.rename(path.with_name("moved"))
        path.symlink_to("/etc")

    assert cached(store) == {"f": "1"}
    assert loans(store.root) == []


def test_a_store_that_is_closed_meanwhile_takes_nothing_back(tmp_path: Path) -> None:
    store = open_copy(tmp_path / "store")

    with pytest.raises(StoreError, match="closed"), store.cache("c"):
        store.close()

    assert kept(store.root) == []


@needs("fork")
def test_a_forked_child_leaves_its_parents_copy_alone(store: Store) -> None:
    with store.cache("c") as path:
        child = os.fork()
        if child == 0:
            try:
                raise SystemExit  # through the context, as a child that forgets os._exit does
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        (path / "f").write_text("1")

    assert cached(store) == {"f": "1"}


# Who waits for whom.


@pytest.mark.parametrize("borrower", ["locked"], indirect=True)
def test_a_killed_holder_in_mode_locked_is_not_waited_for(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    with open_copy(tmp_path / "store") as store:
        begun, got = threading.Event(), []

        def function(work: Workspace) -> None:
            begun.set()
            got.append(files(work.cache("c", "locked")))

        build = store.start("a", function)
        assert begun.wait(WAIT)
        borrower.kill()
        build.wait(WAIT).release()

        assert got == [{}]


@pytest.mark.parametrize("borrower", ["locked"], indirect=True)
def test_a_build_that_waits_for_a_cache_can_be_cancelled(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    with open_copy(tmp_path / "store") as store:
        begun = threading.Event()

        def function(work: Workspace) -> None:
            begun.set()
            work.cache("c", "locked")

        build = store.start("a", function)
        assert begun.wait(WAIT)

        build.cancel()

        with pytest.raises(Cancelled):
            build.wait(WAIT)
        store.close()  # waits for the function to end


@pytest.mark.parametrize("borrower", ["locked"], indirect=True)
def test_the_other_modes_do_not_wait_for_mode_locked(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    with open_copy(tmp_path / "store") as store:
        put(store, f="ours")

        assert cached(store) == {"f": "ours"}


def test_locking_caches_against_the_order_of_their_names_is_no_deadlock(store: Store) -> None:
    has, together = threading.Event(), threading.Event()
    refused: list[Busy] = []

    def upwards(work: Workspace) -> None:
        work.cache("a", "locked")
        has.set()
        assert together.wait(WAIT)
        work.cache("b", "locked")

    def downwards(work: Workspace) -> None:
        work.cache("b", "locked")
        assert has.wait(WAIT)
        together.set()
        try:
            work.cache("a", "locked")
        except Busy as busy:
            refused.append(busy)

    builds = [store.start("up", upwards), store.start("down", downwards)]

    for build in builds:
        build.wait(WAIT).release()
    assert [str(busy) for busy in refused] == [
        "'a' is busy: it is lent, and waiting for it with 'b' locked could last for ever: lock in the order of names"
    ]


def test_locking_a_cache_twice_is_no_deadlock(store: Store) -> None:
    with store.cache("c", "locked"), pytest.raises(Busy, match="with 'c' locked"), store.cache("c", "locked"):
        pass
    with store.cache("c", "locked"):
        pass


# Circles of waits: "r" has the cache locked and waits for the build "x", which wants the cache.


def holds(store: Store, root: Path) -> None:
    """Build "r"."""

    def fn(work: Workspace) -> None:
        work.cache("c", "locked")
        reached(root, "holds")
        until(lambda: Path(f"{root}.r").exists())
        store.build("x", writes(f="1")).release()

    store.build("r", fn).release()


def borrows(store: Store, root: Path) -> None:
    """Do the same in no build."""
    with store.cache("c", "locked"):
        reached(root, "holds")
        until(lambda: Path(f"{root}.r").exists())
        store.build("x", writes(f="1")).release()


def wants(store: Store, root: Path) -> None:
    """Build "x"."""

    def fn(work: Workspace) -> None:
        reached(root, "wants")
        until(lambda: Path(f"{root}.x").exists())
        work.cache("c", "locked")

    store.build("x", fn).release()


def waits_of(root: Path, record: str) -> list[str]:
    """What is noted in the record of a build or of a loan."""
    found = [path.read_text() for path in root.glob(f"{record}~*/build.json")]
    return [name for text in found for name in json.loads(text).get("waits_for", ())]


def reached(root: Path, what: str) -> None:
    Path(f"{root}.{what}").touch()


PART = """if True:
    import sys, storebackends, tests.test_caches as test
    root = test.Path(sys.argv[1])
    with test.open_copy(root) as store:
        print(test.outcome(getattr(test, sys.argv[2]), store, root))
"""


def outcome(part: Callable[[Store, Path], None], store: Store, root: Path) -> str:
    try:
        part(store, root)
    except StoreError as error:
        return str(error)
    return "done"


class Circle:
    """Two parts, each in a process or in a thread of its own, at a point where one waits for the word."""

    def __init__(self, root: Path, holder: str, elsewhere: bool) -> None:
        self._root, self._threads = root, ThreadPoolExecutor()
        with ExitStack() as undo:
            self._store = undo.enter_context(open_copy(root))
            undo.callback(self._threads.shutdown)
            self._ends = [self._begin(globals()[holder]), self._begin(wants, elsewhere)]
            self._undo = undo.pop_all()
        for what in ("holds", "wants"):
            until(lambda what=what: Path(f"{root}.{what}").exists())  # type: ignore[misc]

    def _begin(self, part: Callable[[Store, Path], None], elsewhere: bool = False) -> Callable[[], str]:
        if elsewhere:
            child = python(PART, self._root, part.__name__)
            return lambda: child.communicate(timeout=WAIT)[0].decode().strip()
        return self._threads.submit(outcome, part, self._store, self._root).result

    def close(self, first: str, record: str, waits: str) -> tuple[str, str]:
        """Let *first* wait; once *record* says that it *waits*, the other. What came of the holder, and of "x"."""
        reached(self._root, first)
        until(lambda: waits in waits_of(self._root, record))
        reached(self._root, "x" if first == "r" else "r")
        with self._undo:
            return self._ends[0](), self._ends[1]()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in one process", "in two"])
class TestACircleThroughALockedCache:
    def test_is_seen_by_the_build_that_has_it(self, tmp_path: Path, elsewhere: bool) -> None:
        circle = Circle(tmp_path / "store", "holds", elsewhere)

        holder, wanter = circle.close("x", "in-progress/x", "cache/c")

        assert "'r' is busy: it would wait for itself: r -> x -> cache/c -> r" in holder
        assert wanter == "done"

    def test_is_seen_by_the_build_that_wants_it(self, tmp_path: Path, elsewhere: bool) -> None:
        circle = Circle(tmp_path / "store", "holds", elsewhere)

        holder, wanter = circle.close("r", "in-progress/r", "x")

        assert "'x' is busy: it would wait for itself: x -> cache/c -> r -> x" in wanter
        assert "build of 'x' failed" in holder

    def test_is_seen_by_who_has_it_in_no_build(self, tmp_path: Path, elsewhere: bool) -> None:
        circle = Circle(tmp_path / "store", "borrows", elsewhere)

        holder, wanter = circle.close("x", "in-progress/x", "cache/c")

        assert "'cache/c' is busy: it would wait for itself: cache/c -> x -> cache/c" in holder
        assert wanter == "done"

    def test_is_seen_by_the_build_that_wants_it_of_who_is_in_none(self, tmp_path: Path, elsewhere: bool) -> None:
        circle = Circle(tmp_path / "store", "borrows", elsewhere)

        holder, wanter = circle.close("r", "loans/c", "x")

        assert "'x' is busy: it would wait for itself: x -> cache/c -> x" in wanter
        assert "build of 'x' failed" in holder


def test_a_wait_for_a_build_that_waits_for_a_cache_of_others_is_no_circle(store: Store, tmp_path: Path) -> None:
    lent, waits = threading.Event(), threading.Event()

    def lends() -> None:
        with store.cache("theirs", "locked"):
            lent.set()
            assert waits.wait(WAIT)

    def part(work: Workspace) -> None:
        work.cache("theirs", "locked")

    def whole(work: Workspace) -> None:
        work.cache("mine", "locked")
        store.build("part", part).release()

    lender = threading.Thread(target=lends)
    lender.start()
    assert lent.wait(WAIT)
    build = store.start("whole", whole)
    until(lambda: waits_of(store.root, "in-progress/whole") == ["part", "cache/theirs"])
    waits.set()

    build.wait(WAIT).release()
    lender.join()


@pytest.mark.parametrize("borrower", ["locked"], indirect=True)
def test_what_a_killed_borrower_left_closes_no_circle(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    root = tmp_path / "store"
    with open_copy(root) as store:
        (left,) = (root / "loans").glob("c~*/build.json")
        record = json.loads(left.read_text())
        left.write_text(json.dumps({**record, "waits_for": ["r"]}))  # as if it had been a build of "r"
        borrower.kill()
        borrower.wait()
        lent, go = threading.Event(), threading.Event()

        def lends() -> None:
            with store.cache("c", "locked"):
                lent.set()
                assert go.wait(WAIT)

        lender = threading.Thread(target=lends)
        lender.start()
        assert lent.wait(WAIT)
        wanter = store.start("x", lambda work: work.cache("c", "locked"))
        until(lambda: waits_of(root, "in-progress/x") == ["cache/c"])
        waiter = store.start("r", lambda work: store.build("x", writes(f="1")).release())
        until(lambda: "x" in waits_of(root, "in-progress/r"))
        go.set()

        for build in (wanter, waiter):
            build.wait(WAIT).release()
        lender.join()


def test_a_cache_locked_in_another_context_of_a_build_is_no_deadlock(store: Store) -> None:
    def function(work: Workspace) -> None:
        contextvars.copy_context().run(work.cache, "c", "locked")  # as a task of asyncio does
        with pytest.raises(Busy), store.cache("c", "locked"):
            pass

    store.build("a", function).release()

    assert kept(store.root) == ["caches/c/1"]


def test_a_cache_lent_elsewhere_is_busy_and_says_to_whom(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    with open_copy(tmp_path / "store") as store:
        with pytest.raises(Busy) as caught:
            store.delete_cache("c")
        (info,) = store.caches()

        assert (info.name, info.generation, info.borrowers) == ("c", 0, (borrower.pid,))
        if sys.platform == "linux":
            assert any(f"pid {borrower.pid} " in holder for holder in caught.value.holders)


def test_opening_leaves_what_is_lent_elsewhere_alone(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    root = tmp_path / "store"
    open_copy(root).close()

    Path(f"{root}.go").touch()
    until(lambda: loans(root) == [])

    with open_copy(root) as store:
        assert cached(store) == {"f": "theirs"}


def test_opening_drops_what_a_killed_borrower_left(tmp_path: Path, borrower: subprocess.Popen[bytes]) -> None:
    root = tmp_path / "store"
    borrower.kill()
    borrower.wait(WAIT)
    assert len(loans(root)) == 1

    open_copy(root).close()

    assert kept(root) == []


def test_foreign_files_among_the_caches_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with open_copy(root) as store:
        put(store, f="1")
    foreign = ["caches/notes", "caches/c/notes", "caches/c/007", "caches/c/~x/y", "loans/notes"]
    for name in foreign:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("kept")

    with open_copy(root) as store:
        put(store, f="2")
        assert [info.name for info in store.caches()] == ["c"]
        store.delete_cache("c")

    assert [(root / name).read_text() for name in foreign] == ["kept"] * len(foreign)


def test_facts_of_all_caches(store: Store) -> None:
    put(store, "b", f="x" * 100_000)
    with store.cache("a"):
        before = store.caches()
    after = store.caches()

    assert [(info.name, info.generation, info.borrowers) for info in before] == [("a", 0, (os.getpid(),)), ("b", 1, ())]
    assert [(info.name, info.generation, info.borrowers) for info in after] == [("a", 1, ()), ("b", 1, ())]
    assert before[1].size.bytes >= 100_000
    assert before[0].size.bytes == 0


def test_a_cache_that_goes_and_comes_back_while_it_is_measured_is_no_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, f="1")
    measure = store._backend.cache_size

    def late(entry: CacheEntry) -> Size:
        store.delete_cache("c")
        with store.cache("c", mode="private"):
            return measure(entry)

    monkeypatch.setattr(store._backend, "cache_size", late)

    assert store.caches() == []


def test_borrowing_is_a_use(store: Store) -> None:
    put(store, f="1")
    os.utime(store.root / "caches" / "c" / "1", (5, 5))
    assert [info.last_used for info in store.caches()] == [5]

    cached(store)

    assert store.caches()[0].last_used > 5


# In builds.


def test_a_build_gives_back_what_it_borrowed(store: Store) -> None:
    def function(work: Workspace) -> None:
        (work.cache("c") / "f").write_text("1")
        (work.cache("c") / "g").write_text("2")  # the same copy
        (work.cache("c", "private") / "f").write_text("another")

    store.build("a", function).release()

    assert cached(store) == {"f": "1", "g": "2"}
    assert loans(store.root) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_build_that_fails_gives_nothing_back(store: Store, error: BaseException) -> None:
    def function(work: Workspace) -> None:
        (work.cache("c") / "f").write_text("half")
        raise error

    with pytest.raises(BuildFailed if isinstance(error, Exception) else KeyboardInterrupt):
        store.build("a", function)

    assert cached(store) == {}
    assert loans(store.root) == []


def test_a_build_that_is_cancelled_gives_nothing_back(store: Store) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    def function(work: Workspace) -> None:
        (work.cache("c") / "f").write_text("half")
        begun.set()
        assert cancelled.wait(WAIT)

    build = store.start("a", function)
    assert begun.wait(WAIT)
    build.cancel()
    cancelled.set()

    with pytest.raises(Cancelled):
        build.wait(WAIT)
    store.build("a", writes()).release()  # after the cancelled one
    assert cached(store) == {}


def test_a_build_whose_cache_cannot_be_kept_fails(store: Store) -> None:
    with pytest.raises(BuildFailed, match="the cache 'c' is not given back"):
        store.build("a", lambda work: work.cache("c").rmdir())

    assert store.result("a") is None
    assert loans(store.root) == []


# Across power cuts.


def reboot(monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
    monkeypatch.setattr(opening, "boot_id", lambda: boot)


def test_after_a_restart_a_cache_is_there_if_it_had_reached_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    reboot(monkeypatch, "first")
    with storebackends.open_store(backend="copy", path=root) as store:
        for name in ("kept", "lost", "torn"):
            put(store, name, f="1")
    (root / "caches" / "lost" / "1" / "synced").unlink()
    (root / "caches" / "torn" / "1" / "synced").unlink()
    (root / "caches" / "torn" / "1" / "build.json").write_bytes(b"\0" * 200)

    reboot(monkeypatch, "second")
    with storebackends.open_store(backend="copy", path=root) as store:
        assert [info.name for info in store.caches()] == ["kept"]
        assert cached(store, "kept") == {"f": "1"}


@needs("syncfs")
def test_the_barrier_marks_what_earlier_processes_gave_back(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with storebackends.open_store(backend="copy", path=root, detach_barrier=lambda: None) as store:
        put(store, f="1")
    assert not list(root.glob("caches/*/*/synced"))

    opening.sync(root)

    assert list(root.glob("caches/*/*/synced"))


def test_full_marks_before_the_cache_can_be_lent(tmp_path: Path) -> None:
    with storebackends.open_store(backend="copy", path=tmp_path / "store", durability="full") as store:
        put(store, f="1")

        assert list(store.root.glob("caches/*/*/synced"))


def test_a_copy_is_never_marked(tmp_path: Path) -> None:
    with storebackends.open_store(backend="copy", path=tmp_path / "store") as store:
        put(store, f="1")
        with store.cache("c"):
            opening.sync(store.root)

            assert not list(store.root.glob("loans/*/synced"))


@pytest.mark.docs
@needs("source")
def test_the_how_to_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    exec("\n".join(blocks("docs/how-to/caches.md", "python")), {})

    assert capsys.readouterr().out == "['downloaded']\n"


# In recipes.

SANDBOXES = [pytest.param("bwrap", marks=needs("bwrap")), "host"]
posix = needs("sh")


def recipe(folder: Path, sandbox: str, step: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(f'[recipe]\nsandbox = "{sandbox}"\n[steps.only]\n{step}\n', encoding="utf-8")
    return load(path)


def build(store: Store, folder: Path, sandbox: str, step: str) -> dict[str, str]:
    """Run a recipe of one step; what is in its tree."""
    with run_recipe(store, recipe(folder, sandbox, step)) as done:
        tree = done[-1].result.path
        assert not [path for path in tree.rglob("*") if path.is_symlink()]
        return {**files(tree), **{f"{path.relative_to(tree)}/": "" for path in tree.rglob("*") if path.is_dir()}}


@posix
@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("path", ["made/by/it", "~/.cache/tool"])
def test_a_step_finds_its_cache_and_leaves_nothing_of_it_in_the_tree(
    store: Store, tmp_path: Path, sandbox: str, path: str
) -> None:
    step = f"""cache = {{ name = "c", path = "{path}" }}
    run = ["cd {path}; ls >>$OLDPWD/found; echo 1 >one", "cat {path}/one >>found; echo 2 >{path}/two"]"""

    assert build(store, tmp_path, sandbox, step) == {"found": "1\n"}
    assert build(store, tmp_path, sandbox, f"{step}\ntimeout = 60\nenv = {{ AGAIN = '1' }}") == {
        "found": "one\ntwo\n1\n"
    }

    assert cached(store) == {"one": "1\n", "two": "2\n"}
    assert loans(store.root) == []


@posix
@needs("bwrap")
def test_in_bubblewrap_a_cache_may_be_at_a_path_of_its_own(store: Store, tmp_path: Path) -> None:
    found = build(
        store,
        tmp_path,
        "bwrap",
        """cache = [{ name = "a", path = "/storebackends-test/a" }, { name = "b", path = "/storebackends-test/b" }]
        run = "touch /storebackends-test/a/1 /storebackends-test/b/2" """,
    )

    assert (found, cached(store, "a"), cached(store, "b")) == ({}, {"1": ""}, {"2": ""})
    assert not Path("/storebackends-test").exists()


@posix
@needs("bwrap")
def test_in_bubblewrap_a_cache_may_cover_a_folder_of_the_tree(store: Store, tmp_path: Path) -> None:
    def base(work: Workspace) -> None:
        (work.path / "d").mkdir()
        (work.path / "d" / "f").write_text("1")

    store.build("base", base).release()

    found = build(
        store, tmp_path, "bwrap", 'from = { id = "base" }\ncache = { name = "c", path = "d" }\nrun = "ls d >listed"'
    )

    assert found == {"d/": "", "d/f": "1", "listed": ""}


@posix
def test_on_the_host_a_cache_takes_the_place_of_nothing(store: Store, tmp_path: Path) -> None:
    store.build("base", writes(d="1")).release()

    with pytest.raises(BuildFailed, match="there is a 'd' where the step has a cache"):
        build(store, tmp_path, "host", 'from = { id = "base" }\ncache = { name = "c", path = "d" }\nrun = "true"')


@posix
@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("path", ["link/in/it", "~/link/in/it"])
def test_no_link_is_followed_to_the_place_of_a_cache(store: Store, tmp_path: Path, sandbox: str, path: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = f"cd {Path(path).parts[0] if path.startswith('~') else '.'}; mv link aside; ln -s {outside} link"
    step = f'cache = {{ name = "c", path = "{path}" }}\nrun = ["{run}", "true"]'

    with pytest.raises(BuildFailed, match="link"):
        build(store, tmp_path, sandbox, step)

    assert os.listdir(outside) == []
    assert loans(store.root) == []


@posix
def test_what_a_command_puts_in_the_place_of_its_cache_stays(store: Store, tmp_path: Path) -> None:
    step = 'cache = { name = "c", path = "d/e" }\nrun = "rm d/e; mkdir d/e; touch d/e/f d/g"'

    assert build(store, tmp_path, "host", step) == {"d/": "", "d/e/": "", "d/e/f": "", "d/g": ""}


@posix
def test_the_id_of_a_step_has_the_place_of_its_cache_and_no_more(store: Store, tmp_path: Path) -> None:
    def id_with(cache: str) -> str:
        return plan(store, recipe(tmp_path, "host", f'run = "true"\n{cache}'))[0].id

    plain = id_with('cache = { name = "c", path = "d" }')
    put(store, f="1")

    assert plain == id_with('cache = [{ name = "other", path = "./d/", mode = "locked" }]')
    assert plain != id_with('cache = { name = "c", path = "e" }')
    assert plain != id_with("")


@posix
def test_an_absolute_place_is_refused_where_the_host_would_be_written(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"steps.only.cache.0.path: /cache would be the host's own"):
        plan(store, recipe(tmp_path, "host", 'run = "true"\ncache = { name = "c", path = "/cache" }'))


@posix
@needs("bwrap")
def test_an_absolute_place_is_refused_where_it_cannot_be_made(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"steps.only.cache.0.path: there is no folder /usr/none on this host"):
        plan(store, recipe(tmp_path, "bwrap", 'run = "true"\ncache = { name = "c", path = "/usr/none" }'))


@pytest.mark.parametrize(
    ("cache", "problem"),
    [
        ('{ path = "d" }', "cache.0.name: is missing"),
        ('{ name = "a/b", path = "d" }', "cache.0.name: 'a/b' cannot be an id"),
        ('{ name = "c", path = "" }', "cache.0.path: '' is no place"),
        ('{ name = "c", path = "." }', "cache.0.path: '.' is no place"),
        ('{ name = "c", path = "~/" }', "cache.0.path: '~/' is no place"),
        ('{ name = "c", path = "/" }', "cache.0.path: '/' is no place"),
        ('{ name = "c", path = "../d" }', "cache.0.path: '../d' is no place"),
        ('{ name = "c", path = "/tmp/d" }', "cache.0.path: '/tmp/d' is a step's own"),
        ('{ name = "c", path = "d", mode = "public" }', "cache.0.mode: should be 'shared', 'private' or 'locked'"),
        ('{ name = "c", path = "d", moed = "shared" }', "cache.0.moed: is no known key; did you mean 'mode'?"),
        ('[{ name = "c", path = "d" }, { name = "c", path = "e" }]', "has the cache 'c' twice"),
        ('[{ name = "c", path = "d/e" }, { name = "b", path = "d" }]', "the cache 'c' inside the cache 'b'"),
    ],
)
def test_a_wrong_cache_in_a_recipe_is_a_problem(tmp_path: Path, cache: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, "host", f'run = "true"\ncache = {cache}')

    assert problem in str(caught.value)
