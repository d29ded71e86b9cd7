"""A log that many follow while it is written: from threads of the builder's process, and from other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from storebackends import BuildLog, Store, Workspace
from tests.stores import open_copy, python, until

from .harness import Case, scratch, seconds

MIB = 1 << 20
SIZE, WRITE = 64 * MIB, 4096
THREADS, PROCESSES = 100, 16

_FOLLOWER = """
import sys, storebackends
with storebackends.open_store(backend="copy", path=sys.argv[1], durability="none") as store:
    with store.log(sys.argv[2]).tail() as reader:
        next(reader)
        print("follows", flush=True)
        print(1 + sum(map(len, reader)), flush=True)
"""
_WRITER = f"""
import os, sys
file, data = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), bytes({WRITE})
sys.stdin.read()
for _ in range({SIZE // WRITE}):
    os.write(file, data)
"""


def cases() -> Iterator[Case]:
    """The followers' speed in all, and the writer's."""
    with scratch() as folder, open_copy(folder / "store") as store:
        ids = (f"app-{n}" for n in count())
        file = folder / "file"
        file.write_bytes(bytes(SIZE))
        yield Case(
            f"log, {THREADS} followers in one process",
            lambda: _rate(THREADS, _follow(store, next(ids), THREADS)[0]),
            lambda: _rate(THREADS, _read(file)),
            f"{THREADS} threads that read(4096) the finished file",
            unit="MiB/s",
            at_least=3,
            rounds=5,
        )
        yield Case(
            f"log, its writer beside {THREADS} followers",
            lambda: 1e3 * _follow(store, next(ids), THREADS)[1],
            lambda: 1e3 * _follow(store, next(ids), 0)[1],
            "the writer alone",
            at_most=2,
            rounds=9,
        )
        yield Case(
            f"log, {PROCESSES} followers in {PROCESSES} processes",
            lambda: _rate(PROCESSES, _follow_elsewhere(store, next(ids))),
            lambda: _rate(PROCESSES, _tail(folder / "tailed")),
            f"{PROCESSES} tail -c +1 -f -s 0.01 --pid",
            unit="MiB/s",
            at_least=0.8,
            rounds=5,
        )


def _rate(followers: int, took: float) -> float:
    return followers * SIZE / MIB / took


class _Build:
    """A build whose function writes one byte, waits for go(), and then writes its log as fast as it can."""

    def __init__(self, store: Store, id: str) -> None:
        self._begun, self._go = threading.Event(), threading.Event()
        self.writing = 0.0
        self._build = store.start(id, self._fn)
        self.log: BuildLog = self._build.log
        self._begun.wait()

    def _fn(self, work: Workspace) -> None:
        work.log.write(b"x")
        self._begun.set()
        self._go.wait()
        self.writing = seconds(lambda: self._write(work.log))

    def _write(self, log: BuildLog) -> None:
        data = bytes(WRITE)
        for _ in range(SIZE // WRITE):
            log.write(data)

    def go(self) -> None:
        """Write, and return when the build is done."""
        self._go.set()
        self._build.wait().release()


def _follow(store: Store, id: str, followers: int) -> tuple[float, float]:
    """How long until all have read all; and how long the writer wrote."""
    build = _Build(store, id)
    with _Threads(followers, lambda: _drain(build.log)) as threads:
        took = seconds(build.go, threads.join)
    store.delete(id)
    return took, build.writing


def _drain(log: BuildLog) -> None:
    with log.tail() as reader:
        assert sum(map(len, reader)) == SIZE + 1


def _read(file: Path) -> float:
    def read() -> None:
        start.wait()
        descriptor = os.open(file, os.O_RDONLY)
        while os.read(descriptor, 4096):
            pass
        os.close(descriptor)

    start = threading.Event()
    with _Threads(THREADS, read) as threads:
        return seconds(start.set, threads.join)


class _Threads:
    """Some threads that do the same, started."""

    def __init__(self, number: int, work: Callable[[], None]) -> None:
        self._threads = [threading.Thread(target=work) for _ in range(number)]

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> _Threads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()


def _follow_elsewhere(store: Store, id: str) -> float:
    """How long until the followers in other processes, all of which have its first byte, have read all."""
    build = _Build(store, id)
    children = [python(_FOLLOWER, store.root, id) for _ in range(PROCESSES)]
    _expect(children, b"follows\n")
    took = seconds(build.go, lambda: _expect(children, b"%d\n" % (SIZE + 1)))
    for child in children:
        child.communicate()
    store.delete(id)
    return took


def _tail(file: Path) -> float:
    """The same by tail(1), which looks for the writer's end only so often: every hundredth of a second here."""
    file.write_bytes(b"x")
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, file], stdin=subprocess.PIPE)
    argv: list[str | Path] = ["tail", "-c", "+1", "-s", "0.01", "-f", f"--pid={writer.pid}", file]
    children = [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(PROCESSES)]
    for child in children:
        until(lambda child=child: _has_read(child.pid, file))  # type: ignore[misc]
    took = seconds(writer.communicate, lambda: [child.wait() for child in children])
    file.unlink()
    return took


def _expect(children: Sequence[subprocess.Popen[bytes]], line: bytes) -> None:
    for child in children:
        assert child.stdout is not None
        found = child.stdout.readline()
        assert found == line, f"a follower said {found!r} instead of {line!r}"


def _has_read(pid: int, file: Path) -> bool:
    """Has the process the file open, past its first byte?"""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if link.resolve() == file:
            return "pos:\t1\n" in Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
    return False
