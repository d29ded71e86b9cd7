from __future__ import annotations

import errno
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from storebackends import (
    BaseNotFound,
    BuildFailed,
    Busy,
    Cancelled,
    CommandFailed,
    InvalidId,
    NoSpace,
    NotFound,
    Store,
    StoreError,
    Workspace,
)
from tests import capabilities
from tests.capabilities import needs
from tests.stores import WAIT, descriptors, files, kept, left_in_progress, open_copy, python, until, writes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


def log_of(store: Store, id: str) -> bytes:
    with store.log(id).tail() as reader:
        return b"".join(reader)


class TestBuild:
    def test_publishes_what_the_function_wrote(self, store: Store) -> None:
        with store.build("a", writes(f="1")) as result:
            assert (result.id, result.outcome, result.base) == ("a", "built", None)
            assert files(result.path) == {"f": "1"}

    def test_starts_from_a_private_copy_of_its_base(self, store: Store) -> None:
        store.build("base", writes(f="1", g="2")).release()

        with store.build("child", writes(f="changed"), base="base") as child, kept(store, "base") as base:
            assert files(child.path) == {"f": "changed", "g": "2"}
            assert files(base.path) == {"f": "1", "g": "2"}
            assert child.base == "base"

    def test_of_a_known_id_is_a_hit_that_runs_nothing(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()

        with store.build("a", writes(f="2")) as again:
            assert again.outcome == "hit"
            assert files(again.path) == {"f": "1"}

    def test_keeps_its_log_and_its_length(self, store: Store) -> None:
        with store.build("a", writes(f="1", g="2")) as result, result.log.tail() as reader:
            assert b"".join(reader) == b"f\ng\n"
            assert result.record.log_length == 4
        assert log_of(store, "a") == b"f\ng\n"

    def test_without_its_base_raises_and_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(BaseNotFound, match="build or import"):
            store.build("a", writes(f="1"), base="nowhere")

        assert left_in_progress(store.root) == []
        with pytest.raises(NotFound):
            store.log("a")

    @pytest.mark.parametrize("id", ["a/b", "..", "", "a\0b", "x" * 129, "CON", "con.txt", "a.", "-a", ".a", "ä", 7])
    def test_refuses_a_bad_id_before_touching_a_file(self, store: Store, id: str) -> None:
        before = sorted(os.listdir(store.root))

        for call in (
            lambda: store.build(id, writes(f="1")),
            lambda: store.build("a", writes(f="1"), base=id),
            lambda: store.start(id, writes(f="1")),
            lambda: store.result(id),
            lambda: store.log(id),
            lambda: store.delete(id),
        ):
            with pytest.raises(InvalidId):
                call()

        assert sorted(os.listdir(store.root)) == before


class TestFailure:
    def test_keeps_nothing_but_the_log(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            (work.path / "f").write_text("partial")
            work.log.write(b"so far\n")
            raise ValueError("no good")

        with pytest.raises(BuildFailed, match="ValueError: no good") as caught:
            store.build("a", fn)

        assert isinstance(caught.value.__cause__, ValueError)
        assert store.result("a") is None
        assert left_in_progress(store.root) == []
        assert log_of(store, "a") == b"so far\n"

    def test_leaves_the_id_free(self, store: Store) -> None:
        with pytest.raises(BuildFailed):
            store.build("a", lambda work: 1 / 0)

        with store.build("a", writes(f="1")) as result:
            assert result.outcome == "built"
            assert files(result.path) == {"f": "1"}

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
    def test_by_interrupt_passes_through_after_the_clean_up(self, store: Store, interrupt: type[BaseException]) -> None:
        original = interrupt("now")

        def fn(work: Workspace) -> None:
            raise original

        with pytest.raises(interrupt) as caught:
            store.build("a", fn)

        assert caught.value is original
        assert store.result("a") is None
        assert left_in_progress(store.root) == []

    def test_of_the_backend_leaves_no_trace_in_the_index(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.build("base", writes()).release()

        def full(*_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(store._backend, "build", full)
            with pytest.raises(NoSpace):
                store.build("a", writes(), base="base")

        assert [row.id for row in store._index.rows()] == ["base"]
        store.delete("base")

    @needs("sh")
    def test_of_a_command_names_it_and_its_status(self, store: Store) -> None:
        with pytest.raises(BuildFailed, match="sh ended with status 7") as caught:
            store.build("a", lambda work: work.run(["sh", "-c", "echo out; echo err >&2; exit 7"]))

        assert isinstance(caught.value.__cause__, CommandFailed)
        assert caught.value.__cause__.returncode == 7
        assert log_of(store, "a") == b"out\nerr\n"

    def test_logs_are_kept_newest_first_and_bounded(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("storebackends.failures.KEPT", 3)

        for n in range(5):

            def fn(work: Workspace, n: int = n) -> None:
                work.log.write(b"try %d" % n)
                raise ValueError

            with pytest.raises(BuildFailed):
                store.build("a", fn)

        assert len(os.listdir(store.root / "failed")) == 3
        assert log_of(store, "a") == b"try 4"


class TestSharing:
    def test_a_hundred_threads_run_the_function_once_and_all_get_its_log(self, store: Store) -> None:
        runs: list[int] = []
        begun, go_on = threading.Event(), threading.Event()

        def fn(work: Workspace) -> None:
            runs.append(1)
            begun.set()
            assert go_on.wait(WAIT)
            for n in range(1000):
                work.log.write(b"line %d\n" % n)

        def ask(_: int) -> tuple[str, bytes]:
            build = store.start("a", fn)
            with build.log.tail() as reader:
                log = b"".join(reader)
            with build.wait(WAIT) as result:
                return result.outcome, log

        with ThreadPoolExecutor(100) as pool:
            answers = [pool.submit(ask, n) for n in range(100)]
            assert begun.wait(WAIT)
            go_on.set()
            outcomes = [answer.result(WAIT) for answer in answers]

        assert len(runs) == 1
        assert {log for _, log in outcomes} == {b"".join(b"line %d\n" % n for n in range(1000))}
        assert [outcome for outcome, _ in outcomes].count("built") == 1

    def test_a_failure_reaches_every_caller_as_an_error_of_its_own(self, store: Store) -> None:
        go_on = threading.Event()

        def fn(work: Workspace) -> None:
            assert go_on.wait(WAIT)
            raise ValueError("no good")

        builds = [store.start("a", fn) for _ in range(3)]
        go_on.set()
        errors = []
        for build in builds:
            with pytest.raises(BuildFailed) as caught:
                build.wait(WAIT)
            errors.append(caught.value)

        assert len({str(error) for error in errors}) == 1
        assert len({id(error) for error in errors}) == 3
        assert all(isinstance(error.__cause__, ValueError) for error in errors)

    def test_a_timeout_ends_nothing(self, store: Store) -> None:
        go_on = threading.Event()
        build = store.start("a", lambda work: go_on.wait(WAIT))

        with pytest.raises(TimeoutError):
            build.wait(0)
        go_on.set()

        with build.wait(WAIT) as result:
            assert result.outcome == "built"
            assert build.wait(WAIT) is result

    def test_only_the_last_caller_to_go_cancels(self, store: Store) -> None:
        begun = threading.Event()

        def fn(work: Workspace) -> None:
            begun.set()
            work.run(["sleep", "1000"])

        first, second = store.start("a", fn), store.start("a", fn)
        assert begun.wait(WAIT)
        log = second.log

        first.cancel()
        with pytest.raises(Cancelled):
            first.wait()
        with pytest.raises(TimeoutError):
            second.wait(0)
        second.cancel()

        with log.tail() as reader:
            assert b"".join(reader) == b""  # ends when the build does
        with store.build("a", writes(f="after")) as result:
            assert result.outcome == "built"
        assert left_in_progress(store.root) == []

    def test_a_child_waits_for_a_base_that_is_being_built(self, store: Store) -> None:
        go_on, begun = threading.Event(), threading.Event()

        def fn(work: Workspace) -> None:
            begun.set()
            assert go_on.wait(WAIT)
            (work.path / "f").write_text("1")

        base = store.start("base", fn)
        assert begun.wait(WAIT)
        child = store.start("child", writes(g="2"), base="base")
        go_on.set()

        with child.wait(WAIT) as result:
            assert files(result.path) == {"f": "1", "g": "2"}
        base.wait(WAIT).release()

    def test_building_an_id_inside_its_own_function_is_an_error(self, store: Store) -> None:
        with pytest.raises(BuildFailed, match="a -> a") as caught:
            store.build("a", lambda work: store.build("a", writes(f="1")))

        assert isinstance(caught.value.__cause__, Busy)
        assert left_in_progress(store.root) == []

    def test_a_circle_of_functions_that_wait_for_each_other_is_an_error(self, store: Store) -> None:
        both = threading.Barrier(2, timeout=WAIT)

        def waits_for(other: str) -> Callable[[Workspace], None]:
            def fn(work: Workspace) -> None:
                both.wait()
                store.build(other, writes(f="1")).release()

            return fn

        builds = [store.start("x", waits_for("y")), store.start("y", waits_for("x"))]
        errors = []
        for build in builds:
            with pytest.raises(BuildFailed) as caught:
                build.wait(WAIT)
            errors.append(str(caught.value))

        assert any("x -> y -> x" in error or "y -> x -> y" in error for error in errors)

    def test_a_function_may_build_others(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            with store.build("part", writes(p="1")) as part:
                work.copy_in(part.path / "p", "p")

        with store.build("whole", fn) as result:
            assert files(result.path) == {"p": "1"}

    @needs("sh")
    def test_processes_that_want_one_id_wait_for_each_other(self, store: Store) -> None:
        program = """if True:
            import sys, tests.stores as stores
            with stores.open_copy(stores.Path(sys.argv[1])) as store:
                def fn(work):
                    with open(sys.argv[1] + ".runs", "a") as runs: runs.write("x")
                    work.run(["sh", "-c", "echo hello"])
                with store.build("a", fn) as result:
                    print(result.outcome, result.attempt)
        """
        others = [python(program, store.root) for _ in range(4)]
        said = [other.communicate(timeout=WAIT)[0].decode().split() for other in others]

        assert Path(f"{store.root}.runs").read_text() == "x"
        assert sorted(outcome for outcome, _ in said)[-1:] != ["attached"] * 4
        assert [outcome for outcome, _ in said].count("built") == 1
        assert len({attempt for _, attempt in said}) == 1


class TestDelete:
    def test_is_idempotent_and_frees_the_id(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()

        store.delete("a")
        store.delete("a")

        assert store.result("a") is None
        with store.build("a", writes(f="2")) as result:
            assert files(result.path) == {"f": "2"}

    def test_of_a_leased_result_is_busy_and_names_the_holder(self, store: Store) -> None:
        result = store.build("a", writes(f="1"))

        with pytest.raises(Busy, match="this process" if capabilities.look("proc").usable else "another process"):
            store.delete("a")
        result.release()
        store.delete("a")

    def test_of_a_base_with_children_is_busy_unless_recursive(self, store: Store) -> None:
        for id, base in (("a", None), ("b", "a"), ("c", "b"), ("d", "a"), ("other", None)):
            store.build(id, writes(f=id), base=base).release()

        with pytest.raises(Busy) as caught:
            store.delete("a")
        assert set(caught.value.holders) == {"b", "d"}
        store.delete("a", recursive=True)

        assert list(store.ids()) == ["other"]

    def test_finds_children_that_the_index_lost(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()
        store.build("b", writes(f="2"), base="a").release()
        root = store.root
        store.close()
        for name in root.glob("index.sqlite*"):
            name.unlink()

        with open_copy(root) as again, pytest.raises(Busy):
            again.delete("a")

    def test_of_a_result_that_is_being_built_on_is_busy(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()
        begun, go_on = threading.Event(), threading.Event()

        def fn(work: Workspace) -> None:
            begun.set()
            assert go_on.wait(WAIT)

        child = store.start("b", fn, base="a")
        assert begun.wait(WAIT)

        for recursive in (False, True):
            with pytest.raises(Busy):
                store.delete("a", recursive)
        go_on.set()
        child.wait(WAIT).release()


class TestResult:
    def test_is_leased_until_released_closed_or_collected(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()

        with kept(store, "a") as held, pytest.raises(Busy):
            store.delete("a")
        with pytest.raises(StoreError, match="released"):
            _ = held.path
        forgotten = kept(store, "a")
        del forgotten
        gc.collect()

        store.delete("a")

    @pytest.mark.parametrize("when", ["showing", "ending the view of"])
    def test_whose_tree_cannot_be_mounted_or_unmounted_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        @contextmanager
        def view(_: str) -> Iterator[Path]:
            if when == "showing":
                raise OSError(errno.EIO, "broken")
            yield tmp_path
            raise OSError(errno.EIO, "broken")

        with open_copy(tmp_path / "store") as store:
            result = store.build("a", writes(f="1"))
            monkeypatch.setattr(store._backend, "view", view)

            with pytest.raises(StoreError, match=f"{when} 'a' failed.*broken"):
                print(result.path)
                result.release()

            result.release()
            store.delete("a")

    def test_of_a_closed_store_is_released(self, tmp_path: Path) -> None:
        store = open_copy(tmp_path / "store")
        store.build("a", writes(f="1"))
        store.close()

        with open_copy(tmp_path / "store") as again:
            again.delete("a")
        with pytest.raises(StoreError, match="closed"):
            store.result("a")
        store.close()


class TestUse:
    def test_builds_what_is_missing_and_holds_it(self, store: Store) -> None:
        with store.use("a", writes(f="1")) as built, store.use("a") as hit:
            assert (built.outcome, hit.outcome) == ("built", "hit")
            with pytest.raises(Busy):
                store.delete("a")
        store.delete("a")

    def test_of_nothing_without_a_function_is_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound), store.use("a"):
            pass


class TestClose:
    def test_ends_the_builds_under_way(self, tmp_path: Path) -> None:
        begun = threading.Event()

        def fn(work: Workspace) -> None:
            begun.set()
            work.run(["sleep", "1000"])

        store = open_copy(tmp_path / "store")
        build = store.start("a", fn)
        assert begun.wait(WAIT)

        store.close()

        with pytest.raises(Cancelled):
            build.wait(WAIT)
        assert left_in_progress(store.root) == []

    @needs("fork")
    def test_a_forked_child_cannot_use_its_parents_store(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()
        with kept(store, "a"):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    store.result("a")
                except StoreError:
                    store.close()  # does nothing to the parent's
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            with pytest.raises(Busy):
                store.delete("a")

    @needs("proc")
    @needs("sh")
    def test_many_builds_leave_no_descriptor(self, store: Store) -> None:
        store.build("warm", writes(f="1")).release()
        before = _descriptors()

        for n in range(300):
            with store.build(f"a{n}", writes(f="1")) as result, result.log.tail() as reader:
                assert b"".join(reader) == b"f\n"

        assert _descriptors() == before


def _descriptors() -> list[str]:
    """What is open, but for the files of the locks: one is kept for each of the 64 that leases have used."""
    found = sorted(descriptors())
    locks = [path for path in found if "/locks/use-" in path]
    assert len(locks) == len(set(locks))
    return [path for path in found if path not in locks]


KILLED = '''if True:
    import sys, tests.stores as stores
    with stores.open_copy(stores.Path(sys.argv[1])) as store:
        def fn(work):
            (work.path / "first").write_text("1")
            work.log.write(b"the first attempt\\n")
            work.run(["sh", "-c", """
            trap '' TERM
            (while :; do echo more >> written; mkdir -p deep/er; done) &
            echo going
            wait"""])
        store.build("a", fn)
'''


class TestKill:
    @needs("fork")
    def test_of_a_builder_whose_child_writes_on_leaves_only_the_second_attempts_files(self, tmp_path: Path) -> None:
        root = tmp_path / "store"
        builder = python(KILLED, root)
        until(lambda: list(root.glob("in-progress/a~*/rootfs/deep")))

        os.kill(builder.pid, signal.SIGKILL)
        builder.communicate(timeout=WAIT)
        try:
            with open_copy(root) as store, store.build("a", writes(second="2")) as result:
                assert files(result.path) == {"second": "2"}
        finally:
            os.killpg(builder.pid, signal.SIGKILL) if _alive(builder.pid) else None
            _end_strays(root)

    @needs("proc", "sh")
    def test_leaves_nothing_after_the_next_open_but_its_log(self, tmp_path: Path) -> None:
        root = tmp_path / "store"
        builder = python(KILLED.replace("while :; do", "while :; do sleep 1;"), root)
        until(lambda: list(root.glob("in-progress/a~*/rootfs/first")) and _log_has(root, b"going"))

        os.kill(builder.pid, signal.SIGKILL)
        builder.communicate(timeout=WAIT)
        _end_strays(root)

        with open_copy(root) as store:
            assert store.result("a") is None
            assert log_of(store, "a") == b"the first attempt\ngoing\n"
        assert left_in_progress(root) == []


def _log_has(root: Path, text: bytes) -> bool:
    return any(text in log.read_bytes() for log in root.glob("in-progress/a~*/log"))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _end_strays(root: Path) -> None:
    """End the commands of a killed builder that outlived it, known by the folder they work in."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd").startswith(str(root)):
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            continue


class TestHostileFunction:
    def fails(self, store: Store, fn: Callable[[Workspace], object], match: str) -> None:
        with pytest.raises(BuildFailed, match=match):
            store.build("a", fn)
        assert left_in_progress(store.root) == []

    def test_that_removes_its_tree_fails(self, store: Store) -> None:
        self.fails(store, lambda work: os.rmdir(work.path), "removed or replaced its tree")

    def test_that_replaces_its_tree_by_a_link_fails_and_the_target_stays(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "f").write_text("precious")

        def fn(work: Workspace) -> None:
            os.rmdir(work.path)
            os.symlink(tmp_path / "outside", work.path)

        self.fails(store, fn, "removed or replaced its tree")
        assert files(tmp_path / "outside") == {"f": "precious"}

    def test_that_makes_read_only_folders_is_cleaned_up(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            (work.path / "d" / "e").mkdir(parents=True)
            (work.path / "d" / "e" / "f").write_text("1")
            os.chmod(work.path / "d" / "e", 0o500)
            os.chmod(work.path / "d", 0)
            raise ValueError

        self.fails(store, fn, "ValueError")

    @needs("symlinks")
    def test_that_links_out_of_its_tree_reaches_nothing(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "f").write_text("in")

        def fn(work: Workspace) -> None:
            os.symlink(tmp_path / "outside", work.path / "out")
            with pytest.raises(StoreError, match="out"):
                work.copy_in(tmp_path / "f", "out/f")
            with pytest.raises(StoreError, match="out"):
                work.run(["pwd"], cwd="out")
            with pytest.raises(StoreError):
                work.copy_in(tmp_path / "f", "../f")

        with store.build("a", fn) as result:
            assert os.readlink(result.path / "out") == str(tmp_path / "outside")
        assert os.listdir(tmp_path / "outside") == []

    @needs("sh")
    def test_that_truncates_its_standard_output_keeps_the_whole_log(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            work.run(["sh", "-c", "echo before; echo twice | tee /dev/stderr; : > /dev/stdout; echo after"])

        store.build("a", fn).release()

        assert log_of(store, "a") == b"before\ntwice\ntwice\nafter\n"

    @needs("sh")
    def test_that_leaves_a_daemon_on_its_output_ends_and_keeps_the_whole_log(
        self, store: Store, tmp_path: Path
    ) -> None:
        pid = tmp_path / "pid"
        script = (
            f"echo before; setsid sh -c 'echo $$ > {pid}; sleep 1000' & while ! test -s {pid}; do :; done; echo after"
        )
        try:
            store.build("a", lambda work: work.run(["sh", "-c", script])).release()
        finally:
            os.killpg(int(pid.read_text()), signal.SIGKILL)

        assert log_of(store, "a") == b"before\nafter\n"

    @needs("sh")
    def test_whose_thread_outlives_it_cannot_use_the_workspace(self, store: Store, tmp_path: Path) -> None:
        kept: list[Workspace] = []

        store.build("a", kept.append).release()

        for call in (
            lambda: kept[0].run(["true"]),
            lambda: kept[0].copy_in(tmp_path, "x"),
            lambda: kept[0].scratch,
            lambda: kept[0].log.write(b"late"),
        ):
            with pytest.raises(StoreError):
                call()

    def test_that_leaves_a_sealed_looking_entry_cannot_publish_twice(self, store: Store) -> None:
        def fn(work: Workspace) -> None:
            (store.root / "result" / "a").mkdir()

        with pytest.raises(StoreError, match="exists"):
            store.build("a", fn)
        (store.root / "result" / "a").rmdir()
        assert left_in_progress(store.root) == []


@needs("modes")
def test_the_root_and_all_in_it_are_closed_to_others(store: Store) -> None:
    store.build("a", writes(f="1")).release()

    assert stat.S_IMODE(os.stat(store.root).st_mode) == 0o700


def test_importing_and_building_needs_no_helper_program(tmp_path: Path) -> None:
    program = """if True:
        import sys, tests.stores as stores
        with stores.open_copy(stores.Path(sys.argv[1])) as store:
            store.build("a", stores.writes(f="1")).release()
            with store.build("b", stores.writes(g="2"), base="a") as result:
                assert stores.files(result.path) == {"f": "1", "g": "2"}
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
