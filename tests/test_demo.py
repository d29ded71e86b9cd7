"""`make demo` is the first thing a newcomer runs, so it is run here too."""

from __future__ import annotations

import os
import subprocess
import sysconfig

import pytest

from tests.capabilities import PROJECT, needs

pytestmark = pytest.mark.slow


@pytest.mark.docs
@needs("source", "bash")
def test_the_demo_builds_all_then_nothing_then_what_changed() -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    demo = [str(PROJECT / "docs" / "examples" / "demo.sh")]

    done = subprocess.run(
        demo, env=os.environ | {"PATH": path}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )

    assert done.returncode == 0, done.stdout + done.stderr
    summaries = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("3 steps in ")]
    assert summaries == ["3 built", "3 cached", "1 cached, 2 built"]
    assert ".whl" in done.stdout.splitlines()[-1]
