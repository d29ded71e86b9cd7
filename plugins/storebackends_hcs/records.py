"""What is written down of a snapshot before there is one: tree.json of an entry, and the like of what has no entry.

The names of all snapshots of a store begin with its uuid, so they are told from those of other stores of the daemon.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

COMMITTED = "-committed"
_NONCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tree:
    """A snapshot of ours: *nonce* tells it from all others, *parent* is the key of the one it is made of."""

    nonce: str
    parent: str | None = None
    sealed: bool = False  # known to be committed, and so to have its other key

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises OSError."""
        part = Path(f"{path}.part")
        part.write_bytes(self.dump())
        os.replace(part, path)

    def dump(self) -> bytes:
        """What load() reads."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def load(cls, path: Path) -> Tree | None:
        """Read it; None where there is none, or where it is torn or made up: it then names no snapshot of ours."""
        try:
            tree = cls(**json.loads(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None
        is_ours = isinstance(tree.nonce, str) and _NONCE.fullmatch(tree.nonce) and isinstance(tree.parent, str | None)
        return tree if is_ours else None


class Keys:
    """The names of the snapshots of one store."""

    def __init__(self, uuid: str) -> None:
        self._prefix = f"storebackends-{uuid}-"

    def active(self, nonce: str) -> str:
        """The key of a tree that is written."""
        return f"{self._prefix}{nonce}"

    def committed(self, nonce: str) -> str:
        """The key of a tree that is finished."""
        return f"{self._prefix}{nonce}{COMMITTED}"

    def nonce(self, key: str) -> str | None:
        """Whose key it is; None where it is not of this store."""
        nonce = key.removeprefix(self._prefix).removesuffix(COMMITTED)
        return nonce if key.startswith(self._prefix) and _NONCE.fullmatch(nonce) else None
