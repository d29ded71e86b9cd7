"""Pruning small results, all of them at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tests.stores import open_copy

from .bench_open import fill
from .harness import Case, microseconds_each, scratch

RESULTS = 10_000


def cases() -> Iterator[Case]:
    """Each round has a new store, and the same trees again for the plain removal."""
    with scratch() as folder:
        numbers = count()
        yield Case(
            f"prune {RESULTS} results, each",
            lambda: _prune(folder / f"ours-{next(numbers)}"),
            lambda: _remove(folder / f"theirs-{next(numbers)}"),
            "shutil.rmtree of the same trees",
            unit="µs",
            at_most=3,
            rounds=5,
            warm_up=False,
        )


def _prune(root: Path) -> float:
    open_copy(root).close()
    fill(root, RESULTS)
    with open_copy(root) as store:
        list(store.children("app-0"))  # the rows that builds would have left
        return microseconds_each(RESULTS, lambda: store.prune(max_items=0))()


def _remove(root: Path) -> float:
    open_copy(root).close()
    fill(root, RESULTS)
    return microseconds_each(RESULTS, lambda: _remove_each(f"{root}/result"))()


def _remove_each(folder: str) -> None:
    for name in os.listdir(folder):
        shutil.rmtree(f"{folder}/{name}")
