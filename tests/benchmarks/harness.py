"""Times two ways to do a thing, in turns, and holds their ratio to a promise.

Absolute times say more about a machine than about us, so only ratios of one run are gates. The turns alternate, so that
a machine that slows down midway slows both sides, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Case:
    """*ours* beside *theirs*, *rounds* times each; *gate* is the highest ratio promised, None to report only."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    beside: str  # what theirs does, for the table
    gate: float | None = None
    rounds: int = 21


@dataclass(frozen=True)
class Outcome:
    """The seconds of each round, ours and theirs side by side."""

    case: Case
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def kept(self) -> bool:
        return self.case.gate is None or self.ratio <= self.case.gate


def measure(case: Case) -> Outcome:
    """Run one case: a round of each to warm up, then the rounds that count."""
    case.ours(), case.theirs()
    pairs = [(_seconds(case.ours), _seconds(case.theirs)) for _ in range(case.rounds)]
    return Outcome(case, [ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def report(outcomes: Sequence[Outcome]) -> bool:
    """Print the table; True if every gate was kept."""
    table = Table("what", "ours", "beside", "theirs", "ratio", "at most", title=_machine())
    for outcome in outcomes:
        case = outcome.case
        gate = "" if case.gate is None else f"{case.gate:g}" + ("" if outcome.kept else " BROKEN")
        table.add_row(
            case.name, _spread(outcome.ours), case.beside, _spread(outcome.theirs), f"{outcome.ratio:.2f}", gate
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return all(outcome.kept for outcome in outcomes)


def _seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def _spread(seconds: Sequence[float]) -> str:
    """The median and the middle half, in milliseconds."""
    low, middle, high = (1000 * quartile for quartile in statistics.quantiles(seconds, n=4))
    return f"{middle:.3g} ms ({low:.3g}–{high:.3g})"


def _machine() -> str:
    today = time.strftime("%Y-%m-%d")
    return (
        f"{today}, {platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
