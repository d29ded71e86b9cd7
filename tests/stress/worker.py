"""One process of the stress test: threads that do at random, by a plan that follows from the seed, all a store can do.

They know nothing of each other. What they did and got goes into the journal, for the checker; what nobody may ever see
(half a tree, an error that is none of the expected ones) they report themselves, as a "violation".
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import storebackends
from storebackends import (
    BaseNotFound,
    BuilderDied,
    BuildFailed,
    BuildLog,
    Busy,
    Cancelled,
    NotFound,
    Result,
    Store,
    Workspace,
)
from storebackends.backend import Capability
from tests.stores import descriptors

from . import trees
from .journal import Journal

BASES: dict[str, str | None] = {
    root + rest: root + rest[:-2] if rest else None for root in "abcdefgh" for rest in ("", ".x", ".y", ".x.p", ".x.q")
}
"""The ids, and what each is built on: a.x on a, a.x.p on a.x."""


@dataclass(frozen=True)
class Config:
    """What all processes of one run share."""

    root: Path
    backend: str
    options: dict[str, Any]
    durability: str
    seed: int
    threads: int
    calls: int  # of each thread, at most
    forks: bool  # have forked children keep what they inherit

    @property
    def journal(self) -> Path:
        return self.root.with_name("journal")

    @property
    def stop(self) -> Path:
        """Once it is there, no thread begins anything new."""
        return self.root.with_name("stop")

    def open(self) -> Store:
        return storebackends.open_store(
            backend=self.backend, path=self.root, durability=self.durability, **self.options
        )


def work(config: Config, name: str, lifeline: Connection) -> None:
    """Be the process *name*; a forked child of it lives until *lifeline* ends."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # for a driver that waits in vain
    journal = Journal(config.journal)
    before = _open_files()
    store = config.open()
    with store:
        threads = [
            threading.Thread(target=_Actor(config, store, journal, f"{name}.{number}").run)
            for number in range(config.threads)
        ]
        for thread in threads:
            thread.start()
        if config.forks and os.fork() == 0:
            _linger(config, lifeline)
        for thread in threads:
            thread.join()
    if names := list(_threads_left()):
        journal("violation", what=f"threads are left: {names}")
    if left := _open_files() - before:
        journal("violation", what=f"descriptors are left: {dict(left)}")
    if not config.forks and (children := Path("/proc/thread-self/children").read_text()):
        journal("violation", what=f"processes are left: {children}")
    journal("closed")


def _threads_left() -> Iterator[str]:
    for thread in threading.enumerate()[1:]:
        if thread.name != "storebackends-inotify":  # which is for good
            thread.join(10)  # sh cancels a timer of its own, and does not wait for that to see it
            if thread.is_alive():
                yield thread.name


def _open_files() -> Counter[str]:
    # The process has one inotify descriptor, for good.
    return Counter(path for path in descriptors() if path != "anon_inode:inotify")


def _linger(config: Config, lifeline: Connection) -> None:
    """Keep what was inherited, but for what is open in a tree that is mounted: as long as it is, that is not built."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{config.root}/overlay/"):
                os.close(int(fd))
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(0)


class _Stopped(Exception):
    """A function saw that it is cancelled."""


@dataclass
class _Actor:
    """One thread. Each of its calls has its own random numbers, so that no outcome changes what comes next."""

    config: Config
    store: Store
    journal: Journal
    name: str
    calls: int = 0
    rng: random.Random = field(default_factory=random.Random)

    def run(self) -> None:
        kinds: dict[Callable[[], object], int] = {
            self.build: 10,
            self.start_and_follow: 6,
            self.start_and_cancel: 5,
            self.hit: 3,
            self.use: 2,
            self.read_log: 5,
            self.delete: 15,
            self.prune: 6,
            self.borrow: 4,
            self.borrow_locked: 2,
            self.delete_cache: 1,
            self.look: 1,
        }
        for number in range(self.config.calls):
            self.rng = random.Random(f"{self.config.seed} {self.name} {number}")
            if self.config.stop.exists():
                return
            try:
                self.rng.choices([*kinds], [*kinds.values()])[0]()
            except BaseException:  # noqa: BLE001 (a thread that died silently would check nothing)
                self.journal("violation", what=traceback.format_exc())

    # Getting results.

    def build(self) -> None:
        id = self.rng.choice([*BASES])
        with ExitStack() as held:
            base_is_held = self._hold_base(id, held)
            if result := self._outcome(id, base_is_held, lambda fn: self.store.build(id, fn, BASES[id])):
                with result:
                    self._keep_reading(result)

    def start_and_follow(self) -> None:
        id = self.rng.choice([*BASES])
        with ExitStack() as held:
            base_is_held = self._hold_base(id, held)

            def follow(fn: Callable[[Workspace], None]) -> Result:
                build = self.store.start(id, fn, BASES[id])
                self._read(build.log)
                return build.wait()

            if result := self._outcome(id, base_is_held, follow):
                with result:
                    self._keep_reading(result)

    def start_and_cancel(self) -> None:
        id = self.rng.choice([*BASES])
        call = self._new_call(id)
        build = self.store.start(id, self._function(call, id), BASES[id])
        self._pause(0.03)
        build.cancel()
        self.journal("left", call=call, id=id)
        with suppress(Cancelled):
            build.wait()
            self.journal("violation", what=f"{call} cancelled and still got a result")

    def hit(self) -> None:
        id = self.rng.choice([*BASES])
        result = self.store.result(id)
        if result:
            with result:
                self._got(None, result)
                self._keep_reading(result)

    def use(self) -> None:
        id = self.rng.choice([*BASES])
        with suppress(NotFound), self.store.use(id) as result:
            self._got(None, result)
            self._keep_reading(result)

    def _hold_base(self, id: str, held: ExitStack) -> bool:
        """Mostly, have the base there and lease it, so that it cannot be missing."""
        base = BASES[id]
        if base is None or self.rng.random() < 0.2:
            return False
        base_is_held = self._hold_base(base, held)
        result = self._outcome(base, base_is_held, lambda fn: self.store.build(base, fn, BASES[base]))
        if result:
            held.enter_context(result)
        return result is not None

    def _outcome(
        self, id: str, base_is_held: bool, call: Callable[[Callable[[Workspace], None]], Result]
    ) -> Result | None:
        name = self._new_call(id)
        try:
            result = call(self._function(name, id))
        except BuildFailed as error:
            self.journal("failed", call=name, id=id, attempt=error.attempt, message=str(error))
        except BaseNotFound:
            self.journal("no base", call=name, id=id)
            if base_is_held:
                self.journal("violation", what=f"{name}: the base of {id} is leased and was not found")
        else:
            self._got(name, result)
            return result
        return None

    def _got(self, call: str | None, result: Result) -> None:
        self.journal("got", call=call, id=result.id, attempt=result.attempt, outcome=result.outcome)

    def _keep_reading(self, result: Result) -> None:
        """For as long as it is leased it is whole, and nobody can delete it."""
        for _ in range(self.rng.choice([1, 1, 1, 3])):
            manifest, digest = trees.whole(result.path)
            record = result.record
            assert (manifest["id"], manifest["attempt"]) == (result.id, result.attempt)
            assert (record.base, record.base_attempt) == (manifest["base"], manifest["base_attempt"])
            lines, complete = _parse(b"".join(result.log.tail()), result.id, result.attempt)
            assert (lines, complete) == (manifest["lines"], True), f"its log has {lines} lines"
            self.journal("read", id=result.id, attempt=result.attempt, digest=digest)
            self._pause(0.003)
        if self.rng.random() < 0.2:
            try:
                self._deletes([result.id], lambda: self.store.delete(result.id, recursive=self.rng.random() < 0.5))
                self.journal("violation", what=f"{result.id} was deleted though it is leased")
            except Busy:
                trees.whole(result.path)

    # Deleting.

    def delete(self) -> None:
        id, recursive = self.rng.choice([*BASES]), self.rng.random() < 0.7
        with suppress(Busy):
            self._deletes([id], lambda: self.store.delete(id, recursive=recursive))

    def prune(self) -> None:
        if self.rng.random() < 0.2:
            self.store.prune(max_items=0, dry_run=True)
            return
        rule = self.rng.choice([{"all": True}, {"max_items": 2}, {"max_items": 4}, {"max_used": "20kB"}])
        self._deletes([*BASES], lambda: self.store.prune(**rule))  # type: ignore[arg-type]

    def _deletes(self, ids: list[str], delete: Callable[[], object]) -> None:
        """Tell before and after that these, and what is built on them, may go."""
        call = self._new_call(None)
        self.journal("deleting", call=call, ids=_family(ids))
        try:
            delete()
        finally:
            self.journal("deleted", call=call)

    # Logs.

    def read_log(self) -> None:
        with suppress(NotFound):
            self._read(self.store.log(self.rng.choice([*BASES])))

    def _read(self, log: BuildLog) -> None:
        """To the end, or to somewhere. It is the log of one attempt, every byte of it in its place."""
        follow, patience = self.rng.random() < 0.7, self.rng.choice([1, 2, 1000, 1000])
        data, ended = b"", False
        with log.tail(follow=follow) as reader:
            try:
                for _ in range(patience):
                    data += next(reader)
            except StopIteration:
                ended = follow
            except BuilderDied:
                pass
        if data:
            id, attempt = data.split(b" ", 2)[:2]
            lines, complete = _parse(data, id.decode(), attempt.decode())
            if ended or complete:
                self.journal("log", id=id.decode(), attempt=attempt.decode(), lines=lines, ended=ended and complete)

    # Caches.

    def borrow(self) -> None:
        mode = self.rng.choice(["shared", "shared", "private"])
        with suppress(_Stopped), self.store.cache("cache", mode=mode) as folder:  # type: ignore[arg-type]
            self._change(folder)
            if self.rng.random() < 0.3:
                raise _Stopped

    def borrow_locked(self) -> None:
        """Nothing that one gave back is ever lost to the next."""
        call = self._new_call(None)
        kept = self.rng.random() < 0.7
        with suppress(_Stopped), self.store.cache("locked", mode="locked") as folder:
            found = self._change(folder)
            self.journal("borrowed", call=call, found=found)
            self._pause(0.01)
            self.journal("returning", call=call, kept=kept)
            if not kept:
                raise _Stopped

    def _change(self, folder: Path) -> int:
        """Count up in a private copy of a cache; what it was at before."""
        files: dict[str, str] = {}
        count = 0
        if os.listdir(folder):
            manifest, _ = trees.whole(folder)
            count, files = manifest["count"], manifest["files"]
            trees.extend(folder, "grows", b"x", files)
        else:
            trees.put(folder, "grows", b"", files)
        trees.put(folder, f"folder/{count % 5}", self.rng.randbytes(100), files)
        trees.seal(folder, {"count": count + 1, "files": files})
        self._pause(0.005)
        assert trees.whole(folder)[0]["count"] == count + 1
        return count

    def delete_cache(self) -> None:
        with suppress(Busy):
            self.store.delete_cache("cache")

    def look(self) -> None:
        assert set(self.store.ids()) <= BASES.keys()
        assert {info.name for info in self.store.caches()} <= {"cache", "locked"}
        self.store.running()
        self.store.usage()

    # Building.

    def _function(self, call: str, id: str) -> Callable[[Workspace], None]:
        rng = random.Random(self.rng.getrandbits(64))

        def function(work: Workspace) -> None:
            self.journal("begin", call=call, id=id, attempt=work.attempt)
            try:
                _Filling(self, work, rng).fill()
            except (_Stopped, Cancelled):
                self.journal("stopped", id=id, attempt=work.attempt)
            except _Fails as error:
                self.journal("raised", id=id, attempt=work.attempt, lines=error.args[0])
                raise
            except BaseException:
                self.journal("violation", what=traceback.format_exc())
                raise

        return function

    def _new_call(self, id: str | None) -> str:
        self.calls += 1
        name = f"{self.name}.{self.calls}"
        if id is not None:
            self.journal("call", call=name, id=id)
        return name

    def _pause(self, longest: float) -> None:
        threading.Event().wait(self.rng.random() * longest)


class _Fails(Exception):
    """A function was to fail; it has how many lines it logged."""


@dataclass
class _Filling:
    """One run of a function."""

    actor: _Actor
    work: Workspace
    rng: random.Random
    lines: int = 0
    files: dict[str, str] = field(default_factory=dict)

    def fill(self) -> None:
        work, id, base = self.work, self.work.id, BASES[self.work.id]
        below, digest = self._base(base)
        for number in range(self.rng.randint(1, 3)):
            self._log(self.rng.randint(1, 5))
            trees.put(work.path, f"{id}/{number}", self.rng.randbytes(self.rng.choice([0, 100, 20_000])), self.files)
            self._tick()
        if base and Capability.DETACHED in self.actor.store.capabilities:
            trees.extend(work.path, f"{base}/0", b"more", self.files)
        if self.rng.random() < 0.15:
            self._run()
        if self.rng.random() < 0.1:
            self.actor._change(work.cache("cache"))
        if self.rng.random() < 0.15:
            raise _Fails(self.lines)
        manifest = {
            "id": id,
            "attempt": work.attempt,
            "base": base,
            "base_attempt": below["attempt"] if below else None,
            "lines": self.lines,
            "files": self.files,
        }
        sealed = trees.seal(work.path, manifest)
        self.actor.journal(
            "ended",
            id=id,
            attempt=work.attempt,
            digest=sealed,
            lines=self.lines,
            base_attempt=manifest["base_attempt"],
            base_digest=digest,
        )

    def _base(self, base: str | None) -> tuple[trees.Manifest | None, str | None]:
        if base is None:
            assert os.listdir(self.work.path) == [], "something of another build is in a new tree"
            return None, None
        below, digest = trees.whole(self.work.path)
        assert below["id"] == base
        self.files.update(below["files"])
        return below, digest

    def _log(self, lines: int) -> None:
        for _ in range(lines):
            self.work.log.write(f"{self.work.id} {self.work.attempt} {self.lines}\n".encode())
            self.lines += 1

    def _run(self) -> None:
        """A command that works for a moment, with a child of its own."""
        lines = " ".join(str(self.lines + n) for n in range(3))
        script = f"for n in {lines}; do echo {self.work.id} {self.work.attempt} $n; done; (sleep 0.03)"
        self.work.run(["sh", "-c", f"{script}; printf x >new; mv new child"])
        self.lines += 3
        trees.put(self.work.path, "child", b"x", self.files)

    def _tick(self) -> None:
        self.actor.journal("alive", id=self.work.id, attempt=self.work.attempt)
        threading.Event().wait(self.rng.random() * 0.02)
        if self.work.cancelled:
            raise _Stopped


def _family(ids: list[str]) -> list[str]:
    return [id for id in BASES if any(id == one or id.startswith(f"{one}.") for one in ids)]


def _parse(data: bytes, id: str, attempt: str) -> tuple[int, bool]:
    """How many lines these are, and is the last one whole? AssertionError where a byte is not in its place."""
    count = data.count(b"\n")
    expected = b"".join(f"{id} {attempt} {number}\n".encode() for number in range(count + 1))
    assert expected.startswith(data), f"the log of {id} has {data[:500]!r}"
    return count, data.endswith(b"\n") or not data
