"""Snapshots as the layers of Windows containers, where their programs run: no folder of the host shows a tree."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from storebackends.plugin import Command, CommandFailed, StoreError, tool

from . import HcsOptions
from .ctr import Mount
from .host import Host, Prepare, Reclaim
from .records import Tree

_ROOT = "C:\\"
_USER = "ContainerAdministrator"
_OF_THE_HOST = frozenset(["HOME", "TMPDIR"])  # folders that a container does not see


class WindowsHost(Host):
    """See Host."""

    def __init__(self, room: Path, options: HcsOptions, prepare: Prepare, reclaim: Reclaim) -> None:
        super().__init__(room, options, prepare, reclaim)
        self._layers: dict[str, Mount] = {}
        """Of the builds under way in this process."""

    def attach(self, tree: Tree, made: Sequence[Mount], writable: bool = True) -> None:
        """Remember the layers."""
        self._layers[tree.nonce] = made[0]

    def end(self, nonce: str) -> None:
        """Remove its container: a snapshot in use cannot be removed."""
        for words in (("tasks", "delete", "--force"), ("containers", "delete")):
            with suppress(CommandFailed):  # it ended, and with --rm its container went
                tool(self._options.ctr(*words, _container(nonce)), timeout=60)

    def detach(self, nonce: str) -> bool:
        """Forget them."""
        self._layers.pop(nonce, None)
        return True

    def command(self, folder: Path, nonce: str, wanted: Command, cwd: str | None) -> Command:
        """``ctr run`` with the layers in a configuration of its own, which lies in the entry."""
        config = folder / "container.json"
        config.write_text(json.dumps(windows_spec(self._layers[nonce], wanted, _inside_root(cwd or "."))))
        words = self._options.ctr("run", "--rm", "--config", str(config), _container(nonce))
        return Command(words, os.environ, None, stop=partial(self.end, nonce))


def _container(nonce: str) -> str:
    return f"storebackends-{nonce}"


def windows_spec(mount: Mount, wanted: Command, cwd: str) -> dict[str, object]:
    """The OCI configuration of a process in a snapshot: what ``ctr run --config`` reads."""
    return {
        "ociVersion": "1.1.0",
        "process": {
            "args": list(wanted.argv),
            "cwd": cwd,
            "env": [f"{key}={value}" for key, value in wanted.env.items() if key not in _OF_THE_HOST],
            "user": {"username": str(wanted.user or _USER)},
        },
        "root": {"path": ""},
        "windows": {"layerFolders": [*mount.parents, mount.source], "ignoreFlushesDuringBoot": True},
    }


def _inside_root(relative: str) -> str:
    parts = relative.replace("\\", "/").split("/")
    if not relative or not parts[0] or ".." in parts or ":" in relative:
        raise StoreError(f"{relative!r} is no path inside a tree; give a relative one without '..'")
    return _ROOT + "\\".join(part for part in parts if part not in ("", "."))
