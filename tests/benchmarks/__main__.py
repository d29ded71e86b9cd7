"""`python -m tests.benchmarks [--only NAME]… [--json]`: run each bench_NAME.py; exit 1 where a promise is broken."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from .harness import Outcome, machine, measure, print_table


def main() -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--json", action="store_true", help="every figure, instead of a table")
    parser.add_argument("--save", metavar="FILE", type=Path, help="write what --json prints to FILE, too")
    arguments = parser.parse_args()
    facts: dict[str, object] = machine()  # of the load before
    outcomes = [outcome for name in arguments.only or names for outcome in run(name)]
    said = json.dumps({**facts, "cases": [outcome.facts() for outcome in outcomes]}, indent=1)
    if arguments.save:
        arguments.save.write_text(said, encoding="utf-8")
    if arguments.json:
        print(said)
    else:
        print_table(outcomes, facts)
    return 0 if all(outcome.kept for outcome in outcomes) else 1


def run(name: str) -> Iterator[Outcome]:
    """Measure the cases of one module while each is on offer: what it stands on is cleared away with the next."""
    with closing(importlib.import_module(f"{__package__}.bench_{name}").cases()) as cases:
        for case in cases:
            print(f"{case.name} ...", file=sys.stderr)
            yield measure(case)


sys.exit(main())
