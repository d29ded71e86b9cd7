"""Case 15: a store driven at random beside a dict that says what should be in it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from storebackends.errors import BaseNotFound, BuildFailed, Busy
from storebackends.workspace import Workspace

from .harness import Files, Harness, fill, filled, result

_IDS = ["a", "b", "c", "d"]
# Not shrunk: with a slow backend that takes longer than any test may, and these examples are short.
_SETTINGS = settings(
    stateful_step_count=15,
    phases=[Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_ids = st.sampled_from(_IDS)
_bases = st.none() | _ids
_files = st.dictionaries(st.sampled_from(["x", "y", "z"]), st.binary(max_size=4), max_size=2)


class _Known(NamedTuple):
    base: str | None
    files: Files


def run_machine(harness: Harness, area: Path) -> None:
    """Run the machine on new stores below *area*."""
    numbers = itertools.count()

    class Machine(_StoreMachine):
        def __init__(self) -> None:
            super().__init__(harness, area / f"machine-{next(numbers)}")

    run_state_machine_as_test(Machine, settings=settings(_SETTINGS, max_examples=harness.examples))


class _StoreMachine(RuleBasedStateMachine):
    """Builds, failures, kills, deletions and reopenings, in any order."""

    def __init__(self, harness: Harness, root: Path) -> None:
        super().__init__()
        self.harness, self.root = harness, root
        self.results: dict[str, _Known] = {}
        self.killed: set[str] = set()
        self.store, self.backend = harness.open_store(root), harness.open_backend(root)

    def teardown(self) -> None:
        self.store.close()
        self.backend.close()

    @rule(id=_ids, base=_bases, files=_files)
    def build(self, id: str, base: str | None, files: Files) -> None:
        if base == id:
            return
        if id not in self.results and base is not None and base not in self.results:
            with pytest.raises(BaseNotFound):
                self.store.build(id, fill(self.store, files), base=base)
            return
        with self.store.build(id, fill(self.store, files), base=base) as built:
            assert built.outcome == ("hit" if id in self.results else "built")
        if id not in self.results:
            self.results[id] = _Known(base, self._cloned(base) | dict(files))
            self.killed.discard(id)

    @rule(id=_ids, base=_bases, files=_files)
    def fail(self, id: str, base: str | None, files: Files) -> None:
        if id in self.results or (base is not None and base not in self.results):
            return
        write = fill(self.store, files)

        def function(work: Workspace) -> None:
            write(work)
            raise ValueError(id)

        with pytest.raises(BuildFailed):
            self.store.build(id, function, base=base)
        self.killed.discard(id)

    @rule(id=_ids, base=_bases, files=_files)
    def kill(self, id: str, base: str | None, files: Files) -> None:
        """A build that is neither published nor discarded, with no lock held: what a killed builder leaves."""
        if id not in self.results and (base is None or base in self.results):
            filled(self.harness.open_backend(self.root), id, files, base)
            self.killed.add(id)

    @precondition(lambda self: self.results)
    @rule(id=_ids, recursive=st.booleans())
    def delete(self, id: str, recursive: bool) -> None:
        family = self._family(id)
        if len(family) > 1 and not recursive:
            with pytest.raises(Busy):
                self.store.delete(id)
            return
        self.store.delete(id, recursive=recursive)
        for gone in family:
            del self.results[gone]

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.harness.open_store(self.root)
        self.killed.clear()

    @invariant()
    def the_store_agrees_with_the_dict_and_with_the_disk(self) -> None:
        assert sorted(self.store.ids()) == sorted(self.backend.ids()) == sorted(self.results)
        assert sorted(os.listdir(self.root / "result")) == sorted(self.results)
        assert {id for id, _ in self.backend.unfinished()} == self.killed
        assert {id: result(self.backend, id) for id in _IDS if self.backend.result(id)} == {
            id: known.files for id, known in self.results.items()
        }

    def _cloned(self, base: str | None) -> dict[str, bytes]:
        return dict(self.results[base].files) if base is not None else {}

    def _family(self, id: str) -> list[str]:
        """*id*, if it is there, and all that was built on it."""
        family = [id] if id in self.results else []
        for member in family:
            family += [child for child, known in self.results.items() if known.base == member]
        return family
