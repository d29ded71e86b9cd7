"""`python -m tests.benchmarks [NAME…]`: run each bench_NAME.py, or those named; fail where a promise is broken."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .harness import measure, report


def main(wanted: list[str]) -> int:
    names = wanted or sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    modules = [importlib.import_module(f"{__package__}.bench_{name}") for name in names]
    outcomes = [measure(case) for module in modules for case in module.cases()]
    return 0 if report(outcomes) else 1


sys.exit(main(sys.argv[1:]))
