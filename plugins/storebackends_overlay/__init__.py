"""The backend `overlay`: a tree is a layer over those of its bases, cloned by one mount. Linux, and never unasked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from storebackends.plugin import BackendSpec, NotSupported, Options, StoreError, Support, hookimpl


class OverlayOptions(Options):
    """What ``[stores.NAME]`` may say of an overlay store."""

    depth: int = Field(default=100, ge=1, le=150)
    """How many layers a tree may lie on. A build on one that has as many begins with a copy of it, in one layer.

    A mount takes about 10 µs for each. The kernel's own limit is 500, or 200 before Linux 6.7.
    """


def probe(path: Path) -> Support:
    """Can overlays be mounted there by this user? Tried in a temporary folder. Never chosen unasked."""
    if sys.platform == "linux":
        from .trial import trial

        folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        try:
            found = trial(folder)
        except NotSupported as error:
            return Support(False, error.reason, error.fix)
        except (StoreError, OSError) as error:
            return Support(False, str(error), "name a folder that this user may write to")
        return Support(True, "a folder of a base cannot be renamed in a user namespace" if found.unprivileged else "")
    else:  # noqa: RET505 (or the type checker would take it for unreachable)
        return Support(False, "overlayfs is a file system of Linux", "use the backend 'copy'")


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend."""
    return [
        BackendSpec(
            name="overlay",
            options=OverlayOptions,
            factory="storebackends_overlay.driver:OverlayBackend",
            probe=probe,
            summary="layers, mounted; a clone costs nothing whatever the size; Linux, as root or in a user namespace",
        )
    ]
