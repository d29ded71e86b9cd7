"""What processes that share a store are to each other, cases 32, 33 and 35 to 38."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from storebackends.backend import Capability
from storebackends.errors import BuilderDied, BuildFailed, Busy, NoSpace
from storebackends.log import BuildLog
from storebackends.store import Store
from storebackends.workspace import Workspace

from .harness import PATIENCE, Files, Harness, fill, put, require
from .harness import result as tree_result

LINE = b"0123456789abcdef"
PROCESSES = 4


class Processes(Harness):
    """Cases 32, 33 and 35 to 38."""

    def test_a_log_is_followed_from_another_process(self, root: Path, area: Path) -> None:
        """Case 32: from its first byte, while it is written and after."""
        self.open_store(root).close()
        builder = self._elsewhere(area, "builder", lambda: self._build(root, area, LINE * 1000))
        _await(area / "begun")

        with self.open_store(root) as store, store.log("id").tail() as reader:
            first = next(reader)
            (area / "go").touch()
            rest = b"".join(reader)
            builder.join()
            with store.log("id").tail() as after:
                assert first + rest == b"".join(after) == LINE * 1001
            with store.log("id").tail(-5) as end:
                assert b"".join(end) == LINE[-5:]

    def test_a_reader_of_a_killed_writer_is_told_and_then_follows_the_next(self, root: Path, area: Path) -> None:
        """Case 33."""
        self.open_store(root).close()
        builder = self._elsewhere(area, "builder", lambda: self._build(root, area, LINE))
        _await(area / "begun")

        with self.open_store(root) as store, store.log("id").tail() as reader:
            assert next(reader) == LINE
            builder.kill()
            with pytest.raises(BuilderDied):
                next(reader)
            with store.build("id", lambda work: work.log.write(b"again")), store.log("id").tail() as next_one:
                assert b"".join(next_one) == b"again"

    def test_a_reader_in_another_process_ends_with_a_failure_like_with_a_success(self, root: Path, area: Path) -> None:
        """Case 33."""
        self.open_store(root).close()
        builder = self._elsewhere(area, "builder", lambda: self._build(root, area, LINE, fails=True))
        _await(area / "begun")

        with self.open_store(root) as store:
            build = store.start("id", fill(store, {}))
            with build.log.tail() as reader:
                (area / "go").touch()
                assert b"".join(reader) == LINE * 2
            with pytest.raises(BuildFailed, match="meant to fail"):
                build.wait(PATIENCE)
        assert "meant to fail" in builder.join()

    def test_processes_that_ask_for_one_id_run_its_function_once(self, root: Path, area: Path) -> None:
        """Case 35: all get the same result and the same log."""
        self.open_store(root).close()
        askers = [self._elsewhere(area, f"asker-{n}", lambda: self._build(root, area, LINE)) for n in range(PROCESSES)]
        _await(area / "begun")

        (area / "go").touch()

        said = [json.loads(asker.join()) for asker in askers]
        assert (area / "runs").read_bytes() == b"x"
        assert sorted(outcome for outcome, _, _ in said).count("built") == 1
        assert len({(attempt, log) for _, attempt, log in said}) == 1
        assert said[0][2].encode() == LINE * 2

    def test_of_a_killed_builder_one_waiter_takes_over(self, root: Path, area: Path) -> None:
        """Case 36: while its command runs, and a forked child of it lives on with all that it inherited."""
        require(Capability.HOST_TREE in self.capabilities, "the capability 'host_tree'")
        self.open_store(root).close()
        builder = self._elsewhere(area, "builder", lambda: self._build(root, area, LINE, forks=True))
        _await(area / "begun")
        waiters = [
            self._elsewhere(area, f"waiter-{n}", lambda: self._build(root, area, LINE)) for n in range(PROCESSES)
        ]
        _await(area / "forked")

        builder.kill()
        _await_text(area / "runs", b"xx")
        (area / "go").touch()
        said = [json.loads(waiter.join()) for waiter in waiters]

        assert (area / "runs").read_bytes() == b"xx"
        assert [outcome for outcome, _, _ in said].count("built") == 1
        assert len({attempt for _, attempt, _ in said}) == 1
        with self.open_store(root) as store, store.use("id"):
            assert tree_of(store, "id") == {"file": b"whole"}
        assert self.leftovers(root) == []

    def test_deletions_beside_builds_take_nothing_that_is_in_use(self, root: Path, area: Path) -> None:
        """Case 37: of a base that is being built on, and of a result that is held."""
        with self.open_store(root) as store:
            store.build("base", fill(store, {"base": b"base"})).release()
            store.build("unused", fill(store, {})).release()
        builder = self._elsewhere(area, "builder", lambda: self._build(root, area, LINE, base="base"))
        _await(area / "begun")

        with self.open_store(root) as store:
            for recursive in (False, True):
                with pytest.raises(Busy):
                    store.delete("base", recursive=recursive)
            plan = store.prune(all=True)
            assert [step.id for step in plan.steps] == ["unused"]
            assert [kept.id for kept in plan.kept] == ["base"]
            (area / "go").touch()
            builder.join()
            with store.use("id"):
                assert tree_of(store, "id") == {"base": b"base", "file": b"whole"}
                assert store.prune(all=True).steps == ()
            assert [step.id for step in store.prune(all=True).steps] == ["id", "base"]

    def test_deletions_race_with_builds_and_lose_nothing(self, root: Path) -> None:
        """Case 37."""
        with self.open_store(root) as store, self.open_store(root) as other, ThreadPoolExecutor(1) as thread:
            over = threading.Event()
            pruner = thread.submit(_prune_until, other, over)
            try:
                for number in range(20):
                    with store.build("base", fill(store, {"base": b"base"})):
                        files = {str(number): b"new"}
                        with store.build(f"id-{number}", fill(store, files), base="base") as result:
                            assert tree_of(store, result.id) == {"base": b"base"} | files
            finally:
                over.set()
            pruner.result(PATIENCE)

            assert self.leftovers(root) == []

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["ENOSPC", "EDQUOT"])
    def test_a_full_disk_fails_the_build_and_the_store_goes_on(self, store: Store, root: Path, code: int) -> None:
        """Case 38: in the function or its log, or when a tree is half made or half sealed."""
        store.build("base", fill(store, {"base": b"base"})).release()
        backend = store._backend
        phases = [
            (BuildLog, "write"),
            *((backend, verb) for verb in ("clone", "seal", "rename") if hasattr(backend, verb)),
        ]

        for owner, verb in phases:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    owner, verb, _full_after(getattr(owner, verb) if verb in ("clone", "seal") else None, code)
                )
                with pytest.raises((BuildFailed, NoSpace), match=os.strerror(code)):
                    store.build("id", fill(store, {"file": b""}), base="base")

            assert store.result("id") is None, verb
            assert store.running() == []
            assert self.leftovers(root) == [], verb
        with store.build("id", fill(store, {"file": b"whole"}), base="base"):
            assert tree_of(store, "id") == {"base": b"base", "file": b"whole"}

    def _elsewhere(self, area: Path, name: str, action: Callable[[], str]) -> _Process:
        """Run *action* in a process of its own; it has to end once there is the file `go`."""
        process = _Process(area / f"{name}.said", action)
        self._open.callback(process.kill)
        self._open.callback((area / "go").touch)
        return process

    def _build(
        self,
        root: Path,
        area: Path,
        text: bytes,
        *,
        base: str | None = None,
        fails: bool = False,
        forks: bool = False,
    ) -> str:
        """Build `id` once there is the file `go`; what came of it, as JSON."""

        def function(work: Workspace) -> None:
            with (area / "runs").open("ab") as runs:
                runs.write(b"x")
            work.log.write(LINE)
            (area / "begun").touch()
            if forks:
                _fork_and_run(work, area)
            _await(area / "go")
            work.log.write(text)
            if fails:
                raise ValueError("meant to fail")
            put(store, work, {"file": b"whole"})

        with self.open_store(root) as store, store.build("id", function, base=base) as result:
            return json.dumps([result.outcome, result.attempt, b"".join(result.log.tail()).decode()])


class _Process:
    """A forked process, and what its action returned or raised."""

    def __init__(self, said: Path, action: Callable[[], str]) -> None:
        require(hasattr(os, "fork"), "fork()")
        self._said, self._pid = said, 0
        if sys.platform != "win32":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # other threads hold nothing that is used there
                self._pid = os.fork()
        if self._pid == 0:
            try:
                said.write_text(action())
            except BaseException as error:  # noqa: BLE001 (nothing may reach the tests' own frames below this one)
                traceback.print_exc()
                said.write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)

    def join(self) -> str:
        """Wait for its end, and return what it said."""
        if sys.platform != "win32" and self._pid:
            _until(lambda: os.waitpid(self._pid, os.WNOHANG)[0] == self._pid, "the process did not end")
            self._pid = 0
        return self._said.read_text()

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if sys.platform != "win32" and self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _fork_and_run(work: Workspace, area: Path) -> None:
    """Leave a child that does nothing, with all that it inherits, and run a command until this process is killed."""
    if sys.platform != "win32":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            with suppress(AssertionError):
                _await(area / "go")
            os._exit(0)
        work.run(["sh", "-c", ': >"$1"; exec sleep 600', "sh", str(area / "forked")])


def tree_of(store: Store, id: str) -> Files | None:
    """The files of a result."""
    return tree_result(store._backend, id)


def _prune_until(store: Store, over: threading.Event) -> None:
    while not over.is_set():
        store.prune(all=True)


def _full_after(verb: Callable[..., object] | None, code: int) -> Callable[..., None]:
    """Do what *verb* does, and then find the disk full."""

    def failing(*arguments: object, **options: object) -> None:
        if verb:
            verb(*arguments, **options)
        raise OSError(code, os.strerror(code))

    return failing


def _await(path: Path) -> None:
    _until(path.exists, f"{path} did not come")


def _await_text(path: Path, text: bytes) -> None:
    _until(lambda: path.read_bytes() == text, f"{path} did not become {text!r}")


def _until(ready: Callable[[], bool], failure: str) -> None:
    """Look until *ready*, which another process brings about."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if ready():
            return
        pause.wait(0.01)
    raise AssertionError(failure)
