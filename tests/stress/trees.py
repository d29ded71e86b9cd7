"""Trees that tell by themselves whether they are whole: all their files are in one list, with digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"
Manifest = dict[str, Any]


class NotWhole(Exception):
    """A tree has not what its manifest says."""


def put(tree: Path, name: str, data: bytes, files: dict[str, str]) -> None:
    """Write a new file, never over an old one, which may be linked from elsewhere; note it in *files*."""
    path = tree / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    files[name] = _digest(data)


def extend(tree: Path, name: str, data: bytes, files: dict[str, str]) -> None:
    """Write into a file in place."""
    with (tree / name).open("ab") as file:
        file.write(data)
    files[name] = _digest((tree / name).read_bytes())


def seal(tree: Path, manifest: Manifest) -> str:
    """Write the manifest, last of all; return its digest, which stands for all of the tree."""
    sealed: dict[str, str] = {}
    put(tree, NAME, json.dumps(manifest).encode(), sealed)
    return sealed[NAME]


def whole(tree: Path) -> tuple[Manifest, str]:
    """The manifest of a tree and its digest. Raises NotWhole, or OSError where something vanishes meanwhile."""
    data = (tree / NAME).read_bytes()
    manifest: Manifest = json.loads(data)
    names = {os.path.relpath(os.path.join(folder, name), tree) for folder, _, names in os.walk(tree) for name in names}
    if names != {NAME, *manifest["files"]}:
        raise NotWhole(f"{tree} differs in {sorted(names ^ {NAME, *manifest['files']})}")
    for name, digest in manifest["files"].items():
        if _digest((tree / name).read_bytes()) != digest:
            raise NotWhole(f"{tree / name} has other content")
    return manifest, _digest(data)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
