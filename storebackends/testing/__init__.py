"""The conformance kit: what every backend has to hold, as tests for its author to run. Needs the extra `testing`.

    from storebackends.testing import BackendConformance

    class TestMine(BackendConformance):
        name = "mine"                      # its entry point
        options = {"level": 3}             # as in the host's configuration

Set-up and inspection go round what is tested: entries are filled and read as folders. A case that a backend, a user or
a machine cannot meet is skipped by the name of what is missing, never passed over. Each case bears its number.
"""

import pytest

KIT = 1
"""The version of the kit. A higher one has cases that a backend which passed the last one may fail."""

for _module in ("caches", "fidelity", "harness", "kills", "life", "logs", "machine", "processes", "roots", "trees"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from .caches import Caches  # noqa: E402 (asserts are rewritten on import, so only after the above)
from .fidelity import Fidelity  # noqa: E402
from .harness import Harness, needs  # noqa: E402
from .life import Life  # noqa: E402
from .logs import Logs  # noqa: E402
from .processes import Processes  # noqa: E402
from .roots import Roots  # noqa: E402

__all__ = ["KIT", "BackendConformance", "Caches", "Fidelity", "Harness", "Life", "Logs", "Processes", "Roots", "needs"]


class BackendConformance(Life, Fidelity, Logs, Caches, Processes, Roots):
    """Every case. Derive a class named Test…, and give it `name`; see Harness for what else can be set."""
