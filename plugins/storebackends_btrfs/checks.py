"""What a btrfs store takes: Linux 5.8, the module btrfsutil, and a btrfs where this user may make subvolumes."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from storebackends.plugin import Support

assert sys.platform == "linux"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

from . import volumes  # noqa: E402

_OLDEST = (5, 8)  # before it, snapshots beside other work could deadlock in the kernel, for good


def why_not(folder: Path) -> Support:
    """Could a store in the existing *folder* be served? Looks only, and makes nothing."""
    release = os.uname().release
    if _version(release) < _OLDEST:
        reason = f"snapshots can hang for good in Linux before 5.8, and this is {release}"
        return Support(False, reason, "upgrade the kernel, or use the backend copy")
    if volumes.MISSING:
        fix = "pip install 'storebackends[btrfs]'; that takes a C compiler, Python's headers and libbtrfsutil-dev"
        return Support(False, f"the Python module btrfsutil cannot be had: {volumes.MISSING}", fix)
    if not volumes.is_btrfs(folder):
        return Support(False, f"{folder} is not on btrfs", "put the store on a btrfs")
    return Support(True)


def probe(path: Path) -> Support:
    """Look, and then make a subvolume in the folder and delete it: that is what a user may be refused."""
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    if not (support := why_not(folder)).usable:
        return support
    try:
        with tempfile.TemporaryDirectory(prefix=".storebackends-", dir=folder) as scratch:
            may_delete = _try_out(Path(scratch, "subvolume"))
    except OSError as error:
        return Support(False, f"{folder} takes no subvolume: {error}", "use a folder where this user may write")
    if not may_delete:
        reason = "clones are snapshots, but only root may delete those here: they are removed file by file"
        return Support(True, reason, "mount the file system with -o user_subvol_rm_allowed", rank=100)
    return Support(True, "clones are snapshots", rank=100)


def _version(release: str) -> tuple[int, int]:
    """The first two numbers of a kernel's release, "6.1.0-13-amd64"; (0, 0) where it has none."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _try_out(subvolume: Path) -> bool:
    """Make a subvolume, and say if this user may delete it. Where not, an empty one goes as a folder does."""
    volumes.create(subvolume)
    volumes.delete(subvolume)
    if not subvolume.exists():
        return True
    os.rmdir(subvolume)
    return False
