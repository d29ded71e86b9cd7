"""Snapshots as the layers of Windows containers, which is where their programs run: no folder of the host shows a tree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


class WindowsHost(Host):
    """See Host."""

    def __init__(self, room: Path, options: HcsOptions, prepare: Prepare, reclaim: Reclaim) -> None:
        super().__init__(room, options, prepare, reclaim)
        self._layers: dict[str, Mount] = {}
        """Of the builds under way in this process."""

    def attach(self, tree: Tree, made: Sequence[Mount], writable: bool = True) -> None:
        """Remember the layers."""
        self._layers[tree.nonce] = made[0]

    def detach(self, nonce: str) -> None:
        """Forget them, and end what a killed build runs in them."""
        self._layers.pop(nonce, None)

    def command(
        self,
        folder: Path,
        nonce: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str | None,
        user: str | int | None,
    ) -> Command:
        """``ctr run`` with the layers in a configuration of its own, which lies in the entry."""
        where = _inside_root(cwd or ".")
        config = folder / "container.json"
        config.write_text(json.dumps(windows_spec(self._layers[nonce], argv, env, where, str(user or _USER))))
        name = f"storebackends-{nonce}"
        words = self._options.ctr("run", "--rm", "--config", str(config), name)
        return Command(words, {}, None, stop=partial(self._stop, name))

    def _stop(self, name: str) -> None:
        for words in (("tasks", "delete", "--force", name), ("containers", "delete", name)):
            with suppress(CommandFailed):  # it ended, and with --rm its container went
                tool(self._options.ctr(*words), timeout=60)


def windows_spec(mount: Mount, argv: Sequence[str], env: Mapping[str, str], cwd: str, user: str) -> dict[str, object]:
    """The OCI configuration of a process in a snapshot: what ``ctr run --config`` reads."""
    return {
        "ociVersion": "1.1.0",
        "process": {
            "args": list(argv),
            "cwd": cwd,
            "env": [f"{key}={value}" for key, value in env.items()],
            "user": {"username": user},
        },
        "root": {"path": ""},
        "windows": {"layerFolders": [*mount.parents, mount.source], "ignoreFlushesDuringBoot": True},
    }


def _inside_root(relative: str) -> str:
    parts = relative.replace("\\", "/").split("/")
    if not relative or not parts[0] or ".." in parts or ":" in relative:
        raise StoreError(f"{relative!r} is no path inside a tree; give a relative one without '..'")
    return _ROOT + "\\".join(part for part in parts if part != ".")
