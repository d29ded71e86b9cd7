"""The stress test by itself, on any backend; tests/test_stress.py runs it on each.

    python -m tests.stress --root /var/tmp/stress --backend copy --seconds 60 --kills 500 --seed 1

Processes with threads do at random all that a store can do, on a few ids that they share. With --kills, one of them is
killed at a random moment, again and again, and another takes its place; after each kill the store is opened and all it
shows must be whole. In the end the checker judges, and nothing may be left: no temporary, lock, process or descriptor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from storebackends.locks import Locks
from tests import leftovers

from . import trees
from .checker import Checker
from .journal import Journal, read
from .worker import Config, work

PATIENCE = 60.0
"""Seconds that a process may take to end once it is asked to."""
LINGERING = 8
"""Of so many killed processes the forked children still live, with all they inherited."""


class Driver:
    """One run."""

    def __init__(self, config: Config, processes: int) -> None:
        self._config, self._journal = config, Journal(config.journal)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [f"{__package__}.worker", "storebackends.config", f"storebackends_{config.backend}.driver"]
        )
        self._rng = random.Random(config.seed)
        self._started = 0
        self._lifelines: list[Connection] = []
        config.open().close()
        self._processes = [self._start() for _ in range(processes)]

    def _start(self) -> ForkServerProcess:
        ours, theirs = multiprocessing.Pipe()
        process = self._context.Process(target=work, args=(self._config, str(self._started), theirs))
        process.start()
        theirs.close()
        self._started += 1
        self._lifelines.append(ours)
        while len(self._lifelines) > LINGERING + len(self._processes if hasattr(self, "_processes") else ()):
            self._lifelines.pop(0).close()
        return process

    def kill_some(self, kills: int) -> None:
        for _ in range(kills):
            threading.Event().wait(self._rng.uniform(0, 0.3))
            place = self._rng.randrange(len(self._processes))
            victim = self._processes[place]
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            if victim.exitcode == -signal.SIGKILL:  # else it had just ended by itself
                self._journal("killed", killed=victim.pid)
            victim.close()
            self._look()
            self._processes[place] = self._start()

    def _look(self) -> None:
        """Open the store, and see that what it shows is whole."""
        with self._config.open() as store:
            for id in store.ids():
                if result := store.result(id):
                    with result:
                        manifest, _ = trees.whole(result.path)
                        assert (manifest["id"], manifest["attempt"]) == (id, result.attempt)

    def end(self, patience: float) -> None:
        """Wait for all; who does not end shows where it hangs."""
        for process in self._processes:
            process.join(patience)
            if process.exitcode is None and process.pid:
                self._journal("violation", what=f"process {process.pid} does not end; its threads are on stderr")
                os.kill(process.pid, signal.SIGUSR1)
                process.join(2)
                process.kill()
                process.join()
            elif process.exitcode:
                self._journal("violation", what=f"process {process.pid} ended with {process.exitcode}")
            process.close()
        for lifeline in self._lifelines:
            lifeline.close()
        self._journal.close()

    def problems(self) -> Iterator[str]:
        """What the checker finds, and what is left."""
        checker = Checker(read(self._config.journal))
        print(checker.summary())
        if self._config.forks:
            self._config.open().close()  # what the killed ones left goes when the store is opened
        yield from list(self._left())  # before the store is opened, which would remove it
        with self._config.open() as store:
            with ExitStack() as held:
                yield from checker.problems({id: held.enter_context(store.use(id)).path for id in store.ids()})
            # A row of the index may outlive its killed builder: it is asked of the disk before it is believed.
            harmless = {"unsynced", *(["index"] if self._config.forks else [])}
            findings = store.fsck(content=True).findings
            yield from (f"fsck: {finding}" for finding in findings if finding.kind not in harmless)
            for id in [id for id in store.ids() if "." not in id]:
                store.delete(id, recursive=True)
            yield from (f"{id} is there, and nothing it was built on" for id in store.ids())
            for name in ("cache", "locked"):
                store.delete_cache(name)
            yield from (f"{info} cannot be deleted" for info in store.caches())
        yield from self._left()

    def _left(self) -> Iterator[str]:
        root = self._config.root
        for room in ("in-progress", "trash", "scratch", "loans"):
            yield from (f"{room}/{name} is left" for name in os.listdir(root / room))
        for cache in (root / "caches").iterdir():
            names = sorted(os.listdir(cache), key=int)
            # The newest that is marked stays until a newer one is; without durability none is marked, nor needed.
            synced = [name for name in names if (cache / name / "synced").exists()]
            if names and names[0] != (synced or names)[-1]:
                yield f"old generations of {cache.name} are left: {names}"
        yield from leftovers.below(root)
        locks = Locks(root / "locks")
        with ExitStack() as held:
            held.callback(locks.close)
            if (lock := locks.try_store(exclusive=True)) is None:
                yield f"somebody has the store: {locks.holders(None)}"
            else:
                lock.release()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__, allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help="an empty folder")
    parser.add_argument("--backend", default="copy")
    parser.add_argument("--options", type=json.loads, default={}, help='as JSON: {"mode": "hardlink"}')
    parser.add_argument("--durability", default="none")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=sys.maxsize, help="of each thread")
    parser.add_argument("--seconds", type=float, default=0, help="for how long, before or without kills")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a process may take to end")
    given = parser.parse_args(argv)
    folder = given.root.absolute()
    config = Config(
        folder / "store",
        given.backend,
        given.options,
        given.durability,
        given.seed,
        given.threads,
        given.calls,
        forks=given.kills > 0,
    )
    print(f"{given.backend} {given.options}, {given.processes} x {given.threads}, seed {given.seed}", flush=True)
    driver = Driver(config, given.processes)
    try:
        threading.Event().wait(given.seconds)
        driver.kill_some(given.kills)
    finally:
        if given.calls == sys.maxsize:
            config.stop.touch()
        driver.end(given.patience)
    problems = list(driver.problems())
    print(*problems[:20], sep="\n")
    print(f"{len(problems)} problems" if problems else "no problem", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
