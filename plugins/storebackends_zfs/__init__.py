"""The backend `zfs`: each tree is a dataset, cloned from its base's snapshot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from storebackends.plugin import BackendSpec, CommandFailed, NotSupported, Options, StoreError, Support, hookimpl

from .commands import LONGEST_DATASET, Zfs, is_root, may_mount, mount_point, run

_OLDEST = (2, 0)  # has `zpool wait`
_DATASET = re.compile(r"[A-Za-z][A-Za-z0-9_.: -]*(/[A-Za-z0-9_.: -]+)*", re.ASCII)


def _dataset(name: str) -> str:
    if not _DATASET.fullmatch(name) or {".", ".."} & set(name.split("/")) or name != name.strip():
        raise ValueError('should be a ZFS file system, such as "tank/builds": letters, digits and - _ . : between /')
    if len(name) > LONGEST_DATASET:
        raise ValueError(f"should have at most {LONGEST_DATASET} characters, so that ZFS can name trees below it")
    return name


class ZfsOptions(Options):
    """What ``[stores.NAME]`` may say of a zfs store."""

    dataset: Annotated[str, AfterValidator(_dataset)]
    """A ZFS file system that is there and has a mount point; the trees become datasets below it."""
    sudo: bool = False
    """Run `zfs` by `sudo -n`, for a user who may not mount."""


def probe(path: Path) -> Support:
    """Is there OpenZFS, and may this user mount? Never chosen unasked: it needs the name of a dataset."""
    fix = "install OpenZFS {}.{} or newer and load its module".format(*_OLDEST)
    try:
        said = run(["zfs", "version"], timeout=30).stdout.decode(errors="replace")
    except CommandFailed as error:
        return Support(False, f"there is no ZFS: {error}", fix)
    found = re.search(r"^zfs-(\d+)\.(\d+)\S*", said, re.MULTILINE)
    if not found:
        return Support(False, f"this is not OpenZFS, or not one we know: {said[:60]!r}", fix)
    if tuple(map(int, found.groups())) < _OLDEST:
        return Support(False, f"{found[0]} is too old", fix)
    return _mounting(found[0])


def _mounting(version: str) -> Support:
    if is_root():
        return Support(True, f"{version}, as root")
    try:
        run(["sudo", "-n", "-l", "zfs", "list"], timeout=30)
    except CommandFailed:
        if may_mount():
            return Support(True, f"{version}, with what 'zfs allow' gives this user and where users may mount")
        fix = "run as root, or allow this user 'sudo -n zfs' and set sudo = true; 'zfs allow' is not enough on Linux"
        return Support(False, f"{version}, but on Linux only root mounts it", fix)
    return Support(True, f"{version}, by sudo: set sudo = true")


def folder(options: ZfsOptions) -> Path:
    """Where the store's own folder is, if no path is given: in the dataset. Raises StoreError where it is not there."""
    try:
        return mount_point(Zfs(options.sudo), options.dataset) / "storebackends"
    except CommandFailed as error:
        raise explained(error) from error


def explained(error: CommandFailed) -> StoreError:
    """What is wrong where the first look at a dataset failed: that there is no ZFS, if so."""
    support = probe(Path())
    return error if support.usable else NotSupported("a zfs store", support.reason, support.fix)


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend."""
    return [
        BackendSpec(
            name="zfs",
            options=ZfsOptions,
            factory="storebackends_zfs.driver:ZfsBackend",
            probe=probe,
            summary="ZFS datasets; cloned at once, exact sizes",
            folder=folder,
        )
    ]
