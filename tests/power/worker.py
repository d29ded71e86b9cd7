"""Works on a store until it is killed, and tells a journal outside of the machine what it was promised.

python -m tests.power.worker ROOT BACKEND OPTIONS DURABILITY BOOT JOURNAL SEED

opened      the store is open
filled      a function ended, so there may be a result of that attempt
returned    build() returned it, or the cache was given back
synced      all that had "returned" before it began is on the disk, says sync()
deleting    these may be gone from here on; until
deleted     the call returned
violation   what never may be
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import storebackends
from storebackends import BaseNotFound, Busy, Store, Workspace, durability, opening
from tests.stress.journal import Journal

from . import contents

THREADS = 3


@dataclass(frozen=True)
class Host:
    """How the store is opened in one boot of the machine."""

    backend: str
    options: dict[str, Any]
    durability: str
    boot: str

    @contextmanager
    def open(self, root: Path) -> Iterator[Store]:
        """The store, for this process to think that it runs in that boot."""
        with (
            patch.object(opening, "boot_id", lambda: self.boot),
            storebackends.open_store(
                backend=self.backend, path=root, durability=self.durability, **self.options
            ) as store,
        ):
            yield store


class Worker:
    """Some threads, each with its own random numbers."""

    def __init__(self, store: Store, journal: Journal, seed: int) -> None:
        self._store, self._journal, self._seed = store, journal, seed
        self._calls = itertools.count()
        self._cache = threading.Lock()  # nobody deletes it between its return and the line that tells of it

    def work(self) -> None:
        for number in range(THREADS):
            threading.Thread(target=self._act, args=(random.Random(f"{self._seed} {number}"),)).start()
        if self._store.durability == "group":
            threading.Thread(target=self._guarded, args=(self._sync,)).start()

    def _act(self, rng: random.Random) -> None:
        acts = {self._build: 10, self._delete: 4, self._rebuild: 2, self._borrow: 3, self._delete_cache: 0.2}
        while True:
            act = rng.choices([*acts], [*acts.values()])[0]
            self._guarded(act, rng)

    def _guarded(self, act: Any, *arguments: random.Random) -> None:
        try:
            act(*arguments)
        except Exception:  # noqa: BLE001 (a thread that died silently would test nothing)
            self._journal("violation", what=traceback.format_exc())

    def _build(self, rng: random.Random) -> None:
        self._make(rng.choice([*contents.BASES]))

    def _rebuild(self, rng: random.Random) -> None:
        id = rng.choice([*contents.BASES])
        self._remove(id)
        self._make(id)

    def _delete(self, rng: random.Random) -> None:
        self._remove(rng.choice([*contents.BASES]))

    def _make(self, id: str) -> None:
        base = contents.BASES[id]
        if base:
            self._make(base)
        with suppress(BaseNotFound), self._store.build(id, self._fill, base) as result:
            self._journal("returned", id=id, what=result.attempt)

    def _fill(self, work: Workspace) -> None:
        contents.fill(work.path, work.id, work.attempt)
        for piece in contents.log(work.id, work.attempt):
            work.log.write(piece)
        self._journal("filled", attempt=work.attempt)

    def _remove(self, id: str) -> None:
        gone = [other for other in contents.BASES if other == id or other.startswith(f"{id}.")]
        with suppress(Busy), self._deleting(*gone):
            self._store.delete(id, recursive=True)

    def _borrow(self, rng: random.Random) -> None:
        with self._cache:
            with self._store.cache(contents.CACHE, mode="locked") as folder:
                count = contents.count_up(folder)
            self._journal("returned", id=contents.CACHE, what=count)

    def _delete_cache(self, rng: random.Random) -> None:
        with self._cache, suppress(Busy), self._deleting(contents.CACHE):
            self._store.delete_cache(contents.CACHE)

    @contextmanager
    def _deleting(self, *ids: str) -> Iterator[None]:
        call = next(self._calls)
        self._journal("deleting", call=call, ids=ids)
        try:
            yield
        finally:
            self._journal("deleted", call=call)

    def _sync(self) -> None:
        for number in itertools.count():
            self._journal("syncing", number=number)
            opening.sync(self._store.root)
            self._journal("synced", number=number)


def main(root: str, backend: str, options: str, mode: str, boot: str, journal: str, seed: str) -> None:
    durability.PAUSE = 0.1
    told = Journal(Path(journal))
    with Host(backend, json.loads(options), mode, boot).open(Path(root)) as store:
        told("opened")
        Worker(store, told, int(seed)).work()
        sys.stdin.read()  # until whoever started it is gone
        os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
