"""The backend `hcs`, also called `containerd`: trees as snapshots of a containerd, driven by its client `ctr`.

HCS, the Host Compute Service, is what containerd's snapshots are kept by on Windows. On Linux they are overlays,
subvolumes or plain folders, as its snapshotter has it, and mounted here for as long as they are written or read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from storebackends.plugin import BackendSpec, CommandFailed, Options, Support, hookimpl, tool

WINDOWS = sys.platform == "win32"
CONNECT = "5s"
"""How long ctr waits for a daemon that does not answer; without it, for ever."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$", max_length=76)]
"""What containerd takes as a name of this kind."""


class HcsOptions(Options):
    """What ``[stores.NAME]`` may say of a store on containerd."""

    address: str = ""
    """Where the daemon listens; "" is $CONTAINERD_ADDRESS or else what ctr itself takes for the default."""
    namespace: Name = "storebackends"
    """containerd's namespace of the snapshots. Stores may share one. Kept: a store cannot change it later."""
    snapshotter: Name = "windows" if WINDOWS else "overlayfs"
    """containerd's plugin that keeps the trees. Kept, too. On Linux overlayfs, btrfs and native are known to work."""

    def ctr(self, *words: str) -> list[str]:
        """The argv of a ctr for this daemon and namespace."""
        address = ["--address", self.address] if self.address else []
        return ["ctr", *address, "--connect-timeout", CONNECT, "--namespace", self.namespace, *words]


def probe(path: Path) -> Support:
    """Is there a containerd at the default address, and may this user mount? Never chosen unasked."""
    if sys.platform != "win32" and os.geteuid() != 0:
        return Support(False, "only root can mount the snapshots", "run as root")
    try:
        tool(HcsOptions().ctr("version"), timeout=60)
    except CommandFailed as error:
        return Support(False, f"there is no containerd: {error}", "install containerd and start it, or set `address`")
    return Support(True, "containerd answers")


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend, by both its names."""
    return [
        BackendSpec(
            name=name,
            options=HcsOptions,
            factory="storebackends_hcs.driver:HcsBackend",
            probe=probe,
            summary="snapshots of a containerd: HCS layers on Windows; overlays, subvolumes or folders on Linux",
        )
        for name in ("hcs", "containerd")
    ]
