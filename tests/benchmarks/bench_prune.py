"""Pruning small results, all of them at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
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
        yield Case(
            "prune 10000 results, each",
            lambda: _prune(folder / f"ours-{next(numbers)}"),
            lambda: _remove(folder / f"theirs-{next(numbers)}", _unlink_each),
            "unlink and rmdir by names known before, without a look",
            unit="µs",
            rounds=5,
            warm_up=False,
        )


def _prune(root: Path) -> float:
    open_copy(root).close()
    fill(root, RESULTS)
    with open_copy(root) as store:
        list(store.children("app-0"))  # the rows that builds would have left
        return microseconds_each(RESULTS, lambda: store.prune(max_items=0))()


def _remove(root: Path, remove: Callable[[str], None] = shutil.rmtree) -> float:
    open_copy(root).close()
    fill(root, RESULTS)
    return microseconds_each(RESULTS, lambda: _remove_each(f"{root}/result", remove))()


def _remove_each(folder: str, remove: Callable[[str], None]) -> None:
    for name in os.listdir(folder):
        remove(f"{folder}/{name}")


def _unlink_each(entry: str) -> None:
    """The system calls alone, for who knows what is there: no listing, and no care for links."""
    os.unlink(f"{entry}/build.json")
    os.unlink(f"{entry}/log")
    os.rmdir(f"{entry}/rootfs")
    os.rmdir(entry)
