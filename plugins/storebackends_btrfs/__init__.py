"""The backend `btrfs`: every tree is a subvolume, cloned by a snapshot and sealed read-only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from storebackends.plugin import BackendSpec, Options, Support, hookimpl


class BtrfsOptions(Options):
    """What ``[stores.NAME]`` may say of a btrfs store: nothing; the file system's own settings decide."""


def probe(path: Path) -> Support:
    """Is there a btrfs, with all it takes to work with it? The choice where it is."""
    if sys.platform == "linux":
        from . import checks  # not above: it imports btrfsutil

        return checks.probe(path)
    else:  # noqa: RET505 (or the type checker would take it for unreachable)
        return Support(False, "btrfs is a file system of Linux", "use the backend copy")


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend."""
    return [
        BackendSpec(
            name="btrfs",
            options=BtrfsOptions,
            factory="storebackends_btrfs.driver:BtrfsBackend",
            probe=probe,
            summary="subvolumes, cloned by snapshots; whatever its size a tree costs milliseconds",
        )
    ]
