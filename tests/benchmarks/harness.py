"""Measures two ways to do a thing, in turns, and holds their ratio to a promise.

Absolute figures say more about a machine than about us, so only ratios of one run are gates. The turns alternate, so
that a machine that slows down midway slows both sides, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Figure = Callable[[], float]
"""Does the work once and returns what it took, in the unit of its case."""


@dataclass(frozen=True)
class Case:
    """*ours* beside *theirs*, *rounds* times each; the gates bound the ratio, or *ours* itself where nothing is beside.

    Without a gate it is only reported. A case that wears out what it is measured on goes without a *warm_up*.
    """

    name: str
    ours: Figure
    theirs: Figure | None = None
    beside: str = ""  # what theirs does, for the table
    unit: str = "ms"
    at_most: float | None = None
    at_least: float | None = None
    rounds: int = 21
    warm_up: bool = True


@dataclass(frozen=True)
class Outcome:
    """The figures of each round, ours and theirs side by side."""

    case: Case
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratio(self) -> float | None:
        """The median over the rounds; None where there is nothing beside."""
        if not self.theirs:
            return None
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def kept(self) -> bool:
        """Is each gate met?"""
        case, found = self.case, statistics.median(self.ours) if self.ratio is None else self.ratio
        return (case.at_most is None or found <= case.at_most) and (case.at_least is None or found >= case.at_least)

    @property
    def gate(self) -> str:
        """In words."""
        gates = {"at most": self.case.at_most, "at least": self.case.at_least}
        return ", ".join(f"{words} {gate:g}" for words, gate in gates.items() if gate is not None)

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        case = self.case
        return {
            "name": case.name,
            "unit": case.unit,
            "ours": list(self.ours),
            "beside": case.beside,
            "theirs": list(self.theirs),
            "ratio": self.ratio,
            "at_most": case.at_most,
            "at_least": case.at_least,
            "gate": self.gate,
            "kept": self.kept,
        }


def measure(case: Case) -> Outcome:
    """Run one case: a round of each to warm up, then the rounds that count."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(case.rounds + case.warm_up):
        ours.append(case.ours())
        if case.theirs:
            theirs.append(case.theirs())
    return Outcome(case, ours[case.warm_up :], theirs[case.warm_up :])


def seconds(*works: Callable[[], object]) -> float:
    """How long *works* take, one after the other."""
    before = time.perf_counter()
    for work in works:
        work()
    return time.perf_counter() - before


def milliseconds(work: Callable[[], object]) -> Figure:
    """The figure of *work* as a whole."""
    return lambda: 1e3 * seconds(work)


def microseconds_each(count: int, work: Callable[[], object]) -> Figure:
    """The figure of one of the *count* things that *work* does."""
    return lambda: 1e6 * seconds(work) / count


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where the system has one: a disk's own pace is not what is measured."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="storebackends-", dir=shared if shared.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def print_table(outcomes: Sequence[Outcome], facts: Mapping[str, object]) -> None:
    """All outcomes as a table, under what is known of the machine."""
    title = ", ".join(str(facts[key]) for key in ("date", "system", "python")) + f", {facts['cpus']} CPUs"
    table = Table("what", "ours", "beside", "theirs", "ratio", "gate", "met", title=f"{title}, load {facts['load']}")
    for outcome in outcomes:
        case, ratio = outcome.case, outcome.ratio
        theirs = spread(outcome.theirs, case.unit) if outcome.theirs else ""
        met = ("yes" if outcome.kept else "NO") if outcome.gate else ""
        ours = spread(outcome.ours, case.unit)
        table.add_row(case.name, ours, case.beside, theirs, short_ratio(ratio) if ratio else "", outcome.gate, met)
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def machine() -> dict[str, object]:
    """Where and when this runs. The load tells whether the figures are worth much."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"Python {platform.python_version()}",
        "cpus": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
    }


def spread(figures: Sequence[float], unit: str) -> str:
    """The median and the middle half."""
    if len(figures) == 1:
        return f"{_short(figures[0])} {unit}"
    low, middle, high = (_short(quartile) for quartile in statistics.quantiles(figures, n=4, method="inclusive"))
    return f"{middle} {unit} ({low}–{high})"


def short_ratio(ratio: float) -> str:
    """Two decimals, or one digit of what is less."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


def _short(figure: float) -> str:
    return f"{figure:.3g}" if figure < 1000 else f"{figure:,.0f}"
