"""A step on containerd, beside its own calls of ctr made bare; on a containerd of the benchmark's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import storebackends
from storebackends.process import tool
from tests import capabilities
from tests.containerd import Daemon, running
from tests.stores import writes

from .harness import Case, milliseconds

_ABILITIES = {"overlayfs": "overlay", "btrfs": "btrfs", "native": "containerd"}


def cases() -> Iterator[Case]:
    """One of each snapshotter that this machine can have."""
    if not capabilities.look("containerd").usable:
        return
    with tempfile.TemporaryDirectory(prefix="storebackends-") as folder, running(Path(folder)) as daemon:
        for snapshotter, ability in _ABILITIES.items():
            if capabilities.look(ability).usable:
                yield from _steps(Path(folder) / snapshotter, daemon, snapshotter)


def _steps(root: Path, daemon: Daemon, snapshotter: str) -> Iterator[Case]:
    options: dict[str, Any] = {"address": daemon.address, "snapshotter": snapshotter}
    with storebackends.open_store(backend="hcs", path=root, durability="none", **options) as store:
        store.build("base", writes(a="1")).release()
        (base,) = daemon.snapshots(snapshotter)
        ours, theirs = (f"step-{n}" for n in count()), (f"bare-{n}" for n in count())
        words = ["ctr", "--address", daemon.address, "--connect-timeout", "5s", "--namespace", "storebackends"]
        words += ["snapshots", "--snapshotter", snapshotter]

        def bare() -> None:
            key = next(theirs)
            tool([*words, "prepare", "--mounts", key, base])
            tool([*words, "commit", f"{key}-committed", key])

        yield Case(
            f"hcs: step, snapshotter {snapshotter}",
            milliseconds(lambda: store.build(next(ours), writes(b="2"), base="base").release()),
            milliseconds(bare),
            "ctr prepare and ctr commit",
            at_most=1.2,
        )
