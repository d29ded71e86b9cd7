"""Pruning small results, all of them at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ..stores import open_copy
from .bench_open import fill
from .harness import Case, microseconds_each, scratch, seconds

RESULTS = 10_000


def cases() -> Iterator[Case]:
    """Each round has a new store, and the same trees again for the plain removal."""
    with scratch() as folder:
        numbers = count()
        yield Case(
            f"prune {RESULTS} results, each",
            lambda: _prune(folder / f"ours-{next(numbers)}"),
            lambda: _remove(folder / f"theirs-{next(numbers)}"),
            "unlink and rmdir of the same trees",
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
    return 1e6 * seconds(lambda: _remove_below(f"{root}/result")) / RESULTS


def _remove_below(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                _remove_below(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)
