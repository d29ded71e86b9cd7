from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storebackends import BuilderDied, Cancelled, Store, Workspace
from tests.capabilities import needs
from tests.stores import WAIT, files, left_in_progress, open_copy, python, until, writes

pytestmark = needs("proc")

# Each process builds "a" in several threads and prints, per thread, what it got: outcome or error, attempt, and the
# log as followed from its first byte (with "+" where the builder died in between).
ASKER = """if True:
    import json, os, sys, threading, storebackends, tests.stores as stores
    root, threads, kind = stores.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

    def fn(work):
        with open(f"{root}.runs", "a") as runs: runs.write("x")
        work.log.write(f"by {os.getpid()}\\n".encode())
        stores.Path(f"{root}.begun").touch()
        stores.until(lambda: work.cancelled or stores.Path(f"{root}.go").exists())
        for n in range(200): work.log.write(b"line %d\\n" % n)
        if kind == "fail": raise ValueError("no good")
        (work.path / "f").write_text("1")

    said = []
    def ask():
        log, again = b"", True
        build = store.start("a", fn)
        while again:
            try:
                with build.log.tail() as reader:
                    for chunk in reader: log += chunk
                again = False
            except storebackends.BuilderDied:
                log = b"+"
        try:
            with build.wait(stores.WAIT) as result:
                said.append([result.outcome, result.attempt, log.decode()])
        except storebackends.BuildFailed as error:
            said.append([str(error), error.attempt, log.decode()])

    with stores.open_copy(root) as store:
        asking = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in asking: thread.start()
        for thread in asking: thread.join()
    print(json.dumps(said))
"""


_started: list[subprocess.Popen[bytes]] = []


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    open_copy(tmp_path / "store").close()
    yield tmp_path / "store"
    while _started:  # only a failed test leaves any running
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=WAIT)


def asker(root: Path, threads: int = 3, kind: str = "build") -> subprocess.Popen[bytes]:
    _started.append(python(ASKER, root, str(threads), kind))
    return _started[-1]


def begun(root: Path) -> bool:
    return Path(f"{root}.begun").exists()


def go(root: Path) -> None:
    Path(f"{root}.go").touch()


def answers(processes: list[subprocess.Popen[bytes]]) -> list[Any]:
    return [answer for process in processes for answer in json.loads(process.communicate(timeout=WAIT)[0])]


def waits(process: subprocess.Popen[bytes], root: Path) -> bool:
    """Has it asked for the id, and been told to wait: does it follow the builder's log?"""
    for fd in os.listdir(f"/proc/{process.pid}/fd"):
        try:
            if os.readlink(f"/proc/{process.pid}/fd/{fd}").endswith("/log"):
                return True
        except FileNotFoundError:
            continue
    return False


@contextmanager
def builder_elsewhere(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    builder = asker(root, threads=1)
    try:
        until(lambda: begun(root))
        yield builder
    finally:
        go(root)
        builder.communicate(timeout=WAIT)


def test_processes_and_threads_run_the_function_once_and_all_get_its_result_and_its_log(root: Path) -> None:
    processes = [asker(root) for _ in range(4)]
    until(lambda: begun(root) and all(waits(process, root) for process in processes))
    go(root)
    said = answers(processes)

    assert Path(f"{root}.runs").read_text() == "x"
    assert sorted(outcome for outcome, _, _ in said) == ["attached"] * 11 + ["built"]
    assert len({attempt for _, attempt, _ in said}) == 1
    logs = {log for _, _, log in said}
    assert len(logs) == 1
    assert logs.pop().splitlines()[1:] == [f"line {n}" for n in range(200)]


def test_a_failure_is_the_same_for_every_process(root: Path) -> None:
    processes = [asker(root, kind="fail") for _ in range(3)]
    until(lambda: begun(root) and all(waits(process, root) for process in processes))
    go(root)
    said = answers(processes)

    assert Path(f"{root}.runs").read_text() == "x"
    assert len({tuple(answer) for answer in said}) == 1
    assert "ValueError: no good" in said[0][0]
    assert left_in_progress(root) == []


def test_of_a_killed_builder_exactly_one_waiter_takes_over_and_the_others_are_told(root: Path) -> None:
    builder = asker(root, threads=1)
    until(lambda: begun(root))
    waiters = [asker(root) for _ in range(3)]
    until(lambda: all(waits(process, root) for process in waiters))

    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate(timeout=WAIT)
    until(lambda: Path(f"{root}.runs").read_text() == "xx")
    go(root)
    said = answers(waiters)

    assert Path(f"{root}.runs").read_text() == "xx"
    assert sorted(outcome for outcome, _, _ in said) == ["attached"] * 8 + ["built"]
    assert len({attempt for _, attempt, _ in said}) == 1
    assert all(log.startswith("+by ") and log.endswith("line 199\n") for _, _, log in said)
    assert left_in_progress(root) == []


def test_of_a_builder_that_is_interrupted_a_waiter_takes_over(root: Path) -> None:
    builder = asker(root, threads=1)
    until(lambda: begun(root))
    with open_copy(root) as store:
        build = store.start("a", writes(f="2"))
        log = build.log
        os.kill(builder.pid, signal.SIGINT)

        with build.wait(WAIT) as result:
            assert result.outcome == "built"
            assert files(result.path) == {"f": "2"}
        with log.tail() as reader, pytest.raises(BuilderDied):
            list(reader)
    builder.communicate(timeout=WAIT)


def test_a_waiter_that_cancels_leaves_the_builder_alone(root: Path) -> None:
    with builder_elsewhere(root), open_copy(root) as store:
        build = store.start("a", writes(f="2"))
        log = build.log

        build.cancel()
        with log.tail() as reader, pytest.raises(Cancelled):
            list(reader)
    with open_copy(root) as store, store.build("a", writes(f="2")) as result:
        assert result.outcome == "hit"


def test_a_reader_who_only_asked_for_the_log_does_not_lose_it_with_a_waiter_that_cancels(root: Path) -> None:
    with builder_elsewhere(root), open_copy(root) as store:
        build = store.start("a", writes(f="2"))
        assert build.log.state == "open"
        with store.log("a").tail() as reader:
            build.cancel()
            go(root)
            assert b"".join(reader).endswith(b"line 199\n")


def test_a_closed_store_ends_its_waiters(root: Path) -> None:
    with builder_elsewhere(root):
        store = open_copy(root)
        build = store.start("a", writes(f="2"))
        assert build.log.state == "open"
        store.close()

        with pytest.raises(Cancelled):
            build.wait(WAIT)


def test_a_base_that_is_built_elsewhere_is_awaited(root: Path) -> None:
    with builder_elsewhere(root), open_copy(root) as store:
        child = store.start("child", writes(g="2"), base="a")
        with pytest.raises(TimeoutError):
            child.wait(0)
        go(root)

        with child.wait(WAIT) as result:
            assert files(result.path) == {"f": "1", "g": "2"}


class TestLog:
    def test_is_followed_from_its_first_byte_to_the_end(self, root: Path) -> None:
        with builder_elsewhere(root) as builder, open_copy(root) as store, store.log("a").tail() as reader:
            first = next(reader)
            assert first == f"by {builder.pid}\n".encode()
            go(root)
            assert (first + b"".join(reader)).endswith(b"line 199\n")
            assert reader.offset == store.log("a").length

    def test_is_read_as_far_as_it_is(self, root: Path) -> None:
        with builder_elsewhere(root) as builder, open_copy(root) as store:
            log = store.log("a")
            until(lambda: log.length)
            with log.tail(follow=False) as reader:
                assert b"".join(reader) == f"by {builder.pid}\n".encode()
            with log.tail(start=-2, follow=False) as reader:
                assert b"".join(reader) == f"by {builder.pid}\n".encode()[-2:]

    def test_of_a_killed_builder_ends_with_an_error_and_is_kept(self, root: Path) -> None:
        with builder_elsewhere(root) as builder, open_copy(root) as store, store.log("a").tail() as reader:
            first = next(reader)
            os.kill(builder.pid, signal.SIGKILL)

            with pytest.raises(BuilderDied, match="died"):
                list(reader)
            with store.log("a").tail() as again:
                assert b"".join(again) == first
        assert left_in_progress(root) == []

    def test_of_a_closed_store_ends_with_an_error(self, root: Path) -> None:
        with builder_elsewhere(root):
            store = open_copy(root)
            with store.log("a").tail() as reader:
                next(reader)
                threading.Timer(0.05, store.close).start()
                with pytest.raises(Exception, match="closed|opened"):
                    list(reader)
            store.close()


# Builds sys.argv[2] by a function that says so, waits for the word, and then builds sys.argv[3].
CIRCLE = """if True:
    import sys, storebackends, tests.stores as stores
    root, mine, other = stores.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    def fn(work):
        stores.Path(f"{root}.{mine}").touch()
        stores.until(lambda: stores.Path(f"{root}.go").exists())
        store.build(other, stores.writes(f="1")).release()
    with stores.open_copy(root) as store:
        try:
            store.build(mine, fn).release()
            print("built")
        except storebackends.BuildFailed as error:
            print(type(error.__cause__).__name__, error)
"""


def circle(root: Path, mine: str, other: str) -> subprocess.Popen[bytes]:
    _started.append(python(CIRCLE, root, mine, other))
    return _started[-1]


def test_a_circle_between_processes_is_an_error_that_names_it(root: Path) -> None:
    processes = [circle(root, mine, other) for mine, other in (("x", "y"), ("y", "z"), ("z", "x"))]
    until(lambda: all(Path(f"{root}.{id}").exists() for id in "xyz"))
    go(root)
    said = [process.communicate(timeout=WAIT)[0].decode() for process in processes]

    assert any(line.startswith("Busy") and "would wait for itself" in line and " -> " in line for line in said)
    assert left_in_progress(root) == []


def test_a_function_may_wait_for_what_another_process_builds(root: Path) -> None:
    def fn(work: Workspace) -> None:
        with store.build("a", writes(f="2")) as part:
            work.copy_in(part.path / "f", "f")

    with builder_elsewhere(root), open_copy(root) as store:
        build = store.start("b", fn)
        until(lambda: _waits_for(store, "b") == ["a"])
        go(root)
        with build.wait(WAIT) as result:
            assert files(result.path) == {"f": "1"}
        assert not result.record.waits_for


def _waits_for(store: Store, id: str) -> list[str]:
    return [
        name
        for path in store.root.glob(f"in-progress/{id}~*/build.json")
        for name in json.loads(path.read_text()).get("waits_for", ())
    ]


# Each of two processes builds "x" on "y" and "y" on "x", or each in the other's function, in two threads at a time, and
# prints what came of it; the result's tree must be whole for as long as it is held. Each call waits until the result of
# the last one was pruned.
BOTH = """if True:
    import json, random, sys, threading, storebackends, tests.stores as stores
    root, way, seed = stores.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    other = {"x": "y", "y": "x"}
    def inside(id, pause):
        def fn(work):
            threading.Event().wait(pause)  # for the other one to begin meanwhile, or not
            with store.build(other[id], stores.writes(f=other[id])) as part:
                stores.writes(f=id, part=stores.files(part.path)["f"])(work)
        return fn
    def once(id, rng):
        fn, base = stores.writes(f=id), rng.choice([None, other[id], other[id]])
        if way == "function":
            fn, base = inside(id, rng.random() / 20) if rng.random() < 0.8 else fn, None
        stores.until(lambda: not (root / "result" / id).exists())
        try:
            with store.build(id, fn, base) as result:
                tree = stores.files(result.path)
                assert tree["f"] == id and tree.get("part") in (None, other[id]), tree
                return [result.outcome, ""]
        except storebackends.StoreError as error:
            return [type(error).__name__, str(error)]
    def calls(id):
        rng = random.Random(f"{seed} {id}")
        said[id] += [once(id, rng) for _ in range(15)]
    with stores.open_copy(root) as store:
        said = {"x": [], "y": []}
        threads = [threading.Thread(target=calls, args=(id,)) for id in said]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    print(json.dumps(said["x"] + said["y"]))
"""
PRUNER = """if True:
    import sys, tests.stores as stores
    gone = 0
    with stores.open_copy(stores.Path(sys.argv[1])) as store:
        while not stores.Path(sys.argv[1] + ".go").exists():
            gone += len(store.prune(all=True).steps)
            stores.Path(sys.argv[1] + ".prunes").touch()
        gone += len(store.prune(all=True).steps)
    print(gone)
"""


@pytest.mark.parametrize("way", ["base", "function"])
def test_builds_on_each_other_beside_a_prune_end_in_a_result_or_name_the_circle(
    root: Path, way: str, rng: random.Random
) -> None:
    pruner = python(PRUNER, root)
    _started.append(pruner)
    until(lambda: Path(f"{root}.prunes").exists())
    builders = [python(BOTH, root, way, str(rng.random())) for _ in range(2)]
    _started.extend(builders)

    said = [json.loads(builder.communicate(timeout=WAIT)[0]) for builder in builders]
    go(root)
    gone = int(pruner.communicate(timeout=WAIT)[0])

    assert [len(outcomes) for outcomes in said] == [30, 30]
    for outcome, message in said[0] + said[1]:
        circle = "would wait for itself" in message and " -> " in message
        assert outcome in ("built", "attached", "hit", "BaseNotFound") or circle, message
    assert any(outcome == "built" for outcome, _ in said[0] + said[1])
    assert gone > 0
    assert left_in_progress(root) == []
    with open_copy(root) as store:
        store.prune(all=True)
        for id, base in (("x", None), ("y", "x")):
            store.build(id, writes(f=id), base).release()
