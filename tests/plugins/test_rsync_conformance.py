"""The conformance kit, run on `rsync` in each of its modes."""

from __future__ import annotations

from storebackends.testing import BackendConformance
from tests.capabilities import needs


@needs("rsync")
class TestCopy(BackendConformance):
    name = "rsync"


@needs("rsync")
class TestHardlink(BackendConformance):
    name = "rsync"
    options = {"mode": "hardlink"}


@needs("rsync")
class TestHardlinkUnsafe(BackendConformance):
    name = "rsync"
    options = {"mode": "hardlink_unsafe"}
