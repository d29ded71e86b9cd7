"""Judges what a power cut left, by the journal and by what contents follow from ids and attempts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from storebackends import Result, Store, StoreError

from . import contents

Event = dict[str, Any]


class Checker:
    """Follows the journal from boot to boot. What is promised: an attempt of each id, a count of the cache."""

    def __init__(self, journal: Path, *, synced_only: bool = False) -> None:
        """With *synced_only* a promise is what was returned before a sync() that ended; else what was returned."""
        self.journal, self._synced_only, self._read = journal, synced_only, 0
        self._filled: set[str] = set()
        self._returned: dict[str, Any] = {}
        self._covered: dict[str, Any] = {}  # by the sync() under way
        self._synced: dict[str, Any] = {}
        self._deletions: dict[int, set[str]] = {}
        self.promises = self.wholes = self.losses = 0
        """How many results and caches had to be there after the cuts, were there, and were lost without a promise."""

    @property
    def _promised(self) -> dict[str, Any]:
        return self._synced if self._synced_only else self._returned

    def before_cut(self) -> None:
        """All that the journal has now came before the cut."""
        for event in self._events():
            self._follow(event)

    def after_cut(self) -> list[str]:
        """What came since may or may not have come before: nothing is promised by it, but what it deletes is not."""
        problems = []
        for event in self._events():
            if event["event"] == "deleting":
                self._forget(event["ids"])
            elif event["event"] == "filled":
                self._filled.add(event["attempt"])
            elif event["event"] == "violation":
                problems.append(event["what"])
        self._deletions.clear()
        return problems

    def look(self, store: Store) -> Iterator[str]:
        """Everything that is wrong with the store as it was opened after the cut."""
        there: dict[str, Any] = {}
        for id in store.ids():
            try:
                there[id] = self._attempt(store, id)
            except (OSError, StoreError, ValueError, contents.Broken) as error:
                yield f"{id} is broken: {type(error).__name__}: {error}"
        try:
            with store.cache(contents.CACHE, mode="private") as folder:
                there[contents.CACHE] = contents.check_cache(folder)
        except (OSError, StoreError, ValueError, contents.Broken) as error:
            yield f"the cache is broken: {type(error).__name__}: {error}"
        for id, promised in self._promised.items():
            if id not in there or (there[id] < promised if id == contents.CACHE else there[id] != promised):
                yield f"{id} is {there.get(id)} and was to be {promised}"
        self.promises += len(self._promised)
        self.wholes += len(there)
        self.losses += len(self._returned.keys() - there.keys())
        self._returned, self._covered, self._synced = there, {}, dict(there)

    def _attempt(self, store: Store, id: str) -> str:
        result = store.result(id)
        assert isinstance(result, Result), f"{id} is among the ids and no result"
        with result:
            attempts = contents.check(result.path, id, result.attempt)
            record = result.record
            logged = b"".join(result.log.tail())
        if logged != b"".join(contents.log(id, result.attempt)):
            raise contents.Broken(f"its log has {logged[:500]!r}")
        if record.base_attempt != attempts.get(record.base or ""):
            raise contents.Broken(f"its record has base {record.base} {record.base_attempt}, its tree {attempts}")
        if unknown := set(attempts.values()) - self._filled:
            raise contents.Broken(f"no function that wrote it ever ended: {unknown}")
        return result.attempt

    def _events(self) -> Iterator[Event]:
        """Those that the journal has got since."""
        with open(self.journal, "rb") as file:
            file.seek(self._read)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]  # the rest is being written
        self._read += len(data)
        for line in data.splitlines():
            with suppress(ValueError):  # empty, or torn by a kill
                yield json.loads(line)

    def _follow(self, event: Event) -> None:
        kind = event["event"]
        if kind == "filled":
            self._filled.add(event["attempt"])
        elif kind == "returned":
            # While it is being deleted it may be gone again.
            if not any(event["id"] in ids for ids in self._deletions.values()):
                self._returned[event["id"]] = event["what"]
        elif kind == "deleting":
            self._deletions[event["call"]] = set(event["ids"])
            self._forget(event["ids"])
        elif kind == "deleted":
            del self._deletions[event["call"]]
        elif kind == "syncing":
            self._covered = dict(self._returned)
        elif kind == "synced":
            self._synced |= self._covered

    def _forget(self, ids: list[str]) -> None:
        for id in ids:
            for known in (self._returned, self._covered, self._synced):
                known.pop(id, None)


def unfinished(root: Path) -> list[str]:
    """What recovery should have removed."""
    return [
        f"{room}/{name}" for room in ("in-progress", "trash", "scratch", "loans") for name in os.listdir(root / room)
    ]
