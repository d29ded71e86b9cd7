"""What overlays can do on a file system, for this user: one is mounted there, tried out, and gone again."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from storebackends.plugin import Capability, NotSupported, trees

assert sys.platform == "linux", "overlayfs is a file system of Linux"  # noqa: S101 (tells the type checker, too)

from . import mounting  # noqa: E402

_FIXES = {
    errno.EPERM: "run it as root, or all of it in a user namespace: unshare --user --map-root-user --mount",
    errno.EINVAL: "keep the store on ext4, XFS, btrfs or tmpfs (not on an overlay), under Linux 5.11 or newer",
    errno.ENODEV: "load the module: modprobe overlay",
}


class Found(NamedTuple):
    """*unprivileged*: layers are described by attributes that every user may set, not by those that only root may."""

    unprivileged: bool
    capabilities: frozenset[Capability]


def trial(folder: Path, unprivileged: bool | None = None) -> Found:
    """Mount an overlay in a new folder in *folder*, unseen by others, and see what it keeps.

    Privileged attributes are chosen where this user may set them, unless *unprivileged* says which. Raises
    NotSupported where it cannot be.
    """
    with _scratch(folder) as scratch:
        privileged = _sets_privileged_attributes(scratch)
        if unprivileged is None:
            unprivileged = not privileged
        elif not unprivileged and not privileged:
            raise NotSupported(
                "this overlay store", "only root can read its layers: it was made by root", "run as root"
            )
        names = ("lower", "upper", "work", "tree")
        lower, upper, work, tree = (f"{scratch}/{name}" for name in names)
        for name in names:
            os.mkdir(f"{scratch}/{name}")
        try:
            with mounting.unseen(tree, [lower], upper, work, unprivileged=unprivileged) as mounted:
                return Found(unprivileged, trees.capabilities(Path(mounted)))
        except OSError as error:
            reason = f"the kernel refused to mount one: {error.strerror}"
            raise NotSupported(
                "an overlay", reason, _FIXES.get(error.errno or 0, "look into the kernel's log")
            ) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[str]:
    scratch = tempfile.mkdtemp(prefix="overlay~", dir=folder)
    try:
        yield scratch
    finally:
        trees.remove(Path(scratch))


def _sets_privileged_attributes(folder: str) -> bool:
    try:
        os.setxattr(folder, "trusted.storebackends", b"")
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            raise NotSupported(
                "an overlay",
                "this file system has no extended attributes",
                "keep the store on ext4, XFS, btrfs or tmpfs",
            ) from error
        return False
    return True
