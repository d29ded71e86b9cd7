"""Waiting for builds of other processes: how soon one wakes, and what many cost while nothing happens."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count

from storebackends import Store, Workspace
from tests.stores import open_copy

from .harness import Case, scratch

PROCESSES, THREADS = 4, 250
WATCHED = 10.0
"""Seconds over which the cost of waiting is counted: two nets of those who poll."""

_WAITER = """
import sys, threading, time, storebackends
with storebackends.open_store(backend="copy", path=sys.argv[1], durability="none") as store:
    def wait(id):
        with store.start(id, None).wait():
            print(time.monotonic(), flush=True)
    ids = sys.argv[2].split(",")
    threads = [threading.Thread(target=wait, args=(ids[n % len(ids)],)) for n in range(int(sys.argv[3]))]
    for thread in threads:
        thread.start()
    print("waits", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    print("watched", flush=True)
    sys.stdin.readline()
    print(time.process_time() - before, flush=True)
    for thread in threads:
        thread.join()
"""


def cases() -> Iterator[Case]:
    """Gates of their own, as there is nothing to compare with."""
    with scratch() as folder, open_copy(folder / "store") as store:
        numbers = count()
        yield Case(
            "a waiter in another process wakes after",
            lambda: _wake(store, f"app-{next(numbers)}"),
            at_most=50,
            rounds=11,
        )
        for many, words in ((1, "one build"), (THREADS, f"{THREADS} builds")):
            yield Case(
                f"{PROCESSES * THREADS} waiters for {words} cost",
                lambda many=many: _cost(store, [f"app-{next(numbers)}" for _ in range(many)]),  # type: ignore[misc]
                unit="% of a core",
                at_most=5,
                rounds=3,
                warm_up=False,
            )


class _Builds:
    """Builds that last until end()."""

    def __init__(self, store: Store, ids: Sequence[str]) -> None:
        self._end = threading.Event()
        self._builds = [store.start(id, self._fn) for id in ids]
        for build in self._builds:
            _ = build.log  # there, so that others can follow

    def _fn(self, work: Workspace) -> None:
        self._end.wait()

    def end(self) -> float:
        """End them; the moment when the last was published."""
        self._end.set()
        for build in self._builds:
            build.wait().release()
        return time.monotonic()


def _wake(store: Store, id: str) -> float:
    """Milliseconds from the outcome in this process to that in the other."""
    builds = _Builds(store, [id])
    with _waiter(store, [id], 1) as child:
        _settle()
        published = builds.end()
        woken = float(_line(child))
        child.communicate(b"\n\n")
    return 1e3 * (woken - published)


def _cost(store: Store, ids: Sequence[str]) -> float:
    """What the waiting processes use of a processor, all in all."""
    builds = _Builds(store, ids)
    with ExitStack() as started:
        children = [started.enter_context(_waiter(store, ids, THREADS)) for _ in range(PROCESSES)]
        _settle()
        for child in children:
            _tell(child)
            assert _line(child) == b"watched\n"
        time.sleep(WATCHED)
        for child in children:
            _tell(child)
        used = sum(float(_line(child)) for child in children)
        builds.end()
        for child in children:
            child.communicate()
    return 100 * used / WATCHED


def _waiter(store: Store, ids: Sequence[str], threads: int) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", _WAITER, store.root, ",".join(ids), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert _line(child) == b"waits\n"
    return child


def _settle() -> None:
    """Threads that were started are not waiting yet, and nobody can see when they are."""
    time.sleep(0.5)


def _tell(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()


def _line(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout is not None
    return child.stdout.readline()
