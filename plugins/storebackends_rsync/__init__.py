"""The backend `rsync`: plain folders, copied by rsync, which may share unchanged files with the base by hard links."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from storebackends.plugin import BackendSpec, CommandFailed, Options, Support, hookimpl, tool

_OLDEST = (3, 1, 3)  # the first with --modify-window=-1, without which times are kept to the second


class RsyncOptions(Options):
    """What ``[stores.NAME]`` may say of an rsync store."""

    mode: Literal["copy", "hardlink", "hardlink_unsafe"] = "copy"
    """How a tree relates to its base.

    "copy": not at all. "hardlink": when a build is published, its files that equal the base's, metadata included,
    become hard links to them; it has written to private copies only. "hardlink_unsafe": it starts as hard links
    already. That is fast, and right only for builds that replace files and never write to, chmod or truncate one in
    place: such a write changes the base, and every result that shares the file. Nothing here can prevent it.
    """


def probe(path: Path) -> Support:
    """Is there an rsync that keeps times to the nanosecond? Never chosen unasked."""
    fix = "install rsync {}.{}.{} or newer from your system's packages".format(*_OLDEST)
    try:
        said = tool(["rsync", "--version"], timeout=30).stdout.decode(errors="replace")
    except CommandFailed as error:
        return Support(False, f"rsync does not run: {error}", fix)
    found = re.match(r"rsync\s+version v?(\d+)\.(\d+)\.(\d+)", said)
    if not found:
        return Support(False, f"this is not the rsync of samba.org, or not one we know: {said[:60]!r}", fix)
    if tuple(map(int, found.groups())) < _OLDEST:
        return Support(False, f"{found[0]} is too old: it keeps times to the second only", fix)
    if lacking := [word for word in ("ACLs", "xattrs") if f"no {word}" in said]:
        return Support(False, f"{found[0]} was built without {' and '.join(lacking)}", fix)
    return Support(True, found[0])


@hookimpl
def storebackends_backends() -> Sequence[BackendSpec]:
    """Announce the backend."""
    return [
        BackendSpec(
            name="rsync",
            options=RsyncOptions,
            factory="storebackends_rsync.driver:RsyncBackend",
            probe=probe,
            summary="plain folders, copied by rsync; can share unchanged files by hard links",
        )
    ]
