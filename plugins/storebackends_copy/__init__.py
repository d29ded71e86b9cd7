"""The backend `copy`: every tree is a plain folder, cloned by copying; with shared blocks where the file system can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storebackends.plugin import BackendSpec, NotSupported, Options, StoreError, Support, hookimpl, trees


class CopyOptions(Options):
    """What ``[stores.NAME]`` may say of a copy store."""

    reflink: trees.Reflink = "auto"
    """Share blocks between trees ("auto": where possible, "always": or refuse to open, "never")."""


def probe(path: Path) -> Support:
    """Copying always works; it is the best choice where copies share blocks and a last resort elsewhere."""
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    try:
        trees.check_reflink(folder)
    except (StoreError, OSError) as error:
        reason = error.reason if isinstance(error, NotSupported) else str(error)
        return Support(True, f"every clone copies all data: {reason}", "put the store on XFS or btrfs", rank=10)
    return Support(True, "clones share blocks", rank=50)


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend."""
    return [
        BackendSpec(
            name="copy",
            options=CopyOptions,
            factory="storebackends_copy.driver:CopyBackend",
            probe=probe,
            summary="plain folders, copied; works everywhere, fast on XFS and btrfs",
        )
    ]
