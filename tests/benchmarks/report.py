"""`python -m tests.benchmarks.report FILE…`: the tables and the plot of docs/reference/benchmarks.md, of saved runs."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from tests.capabilities import PROJECT

from .harness import short_ratio, spread

_BEGIN, _END = "<!-- the runs: written by make bench-docs -->", "<!-- the end of the runs -->"
_MET, _MISSED = "#1b7837", "#c51b7d"


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.report", description=__doc__)
    parser.add_argument(
        "runs", metavar="FILE", nargs="+", type=Path, help="what python -m tests.benchmarks --save wrote"
    )
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().runs]
    page = PROJECT / "docs" / "reference" / "benchmarks.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    page.write_text(f"{before}{_BEGIN}\n{_markdown(runs)}{_END}{after}", encoding="utf-8")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):  # small, and the same each time
        _plot(runs).savefig(page.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})


def _markdown(runs: Sequence[dict[str, Any]]) -> str:
    lines = []
    for run in runs:
        lines += ["", f"{_title(run)}:", ""]
        lines += ["| what | ours | beside | theirs | ratio | gate | met |", "|---|---|---|---|---|---|---|"]
        lines += [_row(case) for case in run["cases"]]
    return "\n".join([*lines, "", ""])


def _title(run: dict[str, Any]) -> str:
    return f"{run['date']}, {run['system']}, {run['python']}, {run['cpus']} CPUs, load {run['load']}"


def _row(case: dict[str, Any]) -> str:
    theirs = spread(case["theirs"], case["unit"]) if case["theirs"] else ""
    ratio = short_ratio(case["ratio"]) if case["ratio"] is not None else ""
    met = {True: "yes", False: "**no**"}[case["kept"]] if case["gate"] else ""
    words = (case["name"], spread(case["ours"], case["unit"]), case["beside"], theirs, ratio, case["gate"], met)
    return f"| {' | '.join(words)} |"


def _plot(runs: Sequence[dict[str, Any]]) -> Figure:
    """Every ratio that has a gate, with the middle half of its rounds."""
    cases = [case for run in runs for case in run["cases"] if case["ratio"] is not None and case["gate"]]
    figure = Figure(figsize=(9, 0.28 * len(cases) + 1.2))
    axes = figure.subplots()
    for place, case in enumerate(reversed(cases)):
        ratios = [a / b for a, b in zip(case["ours"], case["theirs"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        color = _MET if case["kept"] else _MISSED
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot(case["ratio"], place, "o", color=color, markersize=5)
        for gate, marker in ((case["at_most"], "<"), (case["at_least"], ">")):
            if gate is not None:
                axes.plot(gate, place, marker, color="black", markersize=6, fillstyle="none")
    axes.set_yticks(range(len(cases)), [f"{case['name']}  /  {case['beside']}" for case in reversed(cases)], fontsize=7)
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "ours / theirs, green where the gate is met: the triangle, which points to where the ratio has to be",
        fontsize=8,
    )
    axes.set_title("\n".join(_title(run) for run in runs), fontsize=8)
    return figure


if __name__ == "__main__":
    main()
