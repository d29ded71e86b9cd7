"""What a platform does with a snapshot. `_linux` mounts it on a folder; `_windows` runs containers in it.

The class here does neither: it is what both have in common, and the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

from storebackends.plugin import Capability, Command, NotSupported

from . import HcsOptions
from .ctr import Mount
from .records import Tree

Prepare = Callable[[Tree, Path], list[Mount]]
"""Make the snapshot of a tree; the path is that of its record."""
Reclaim = Callable[[Tree, Path], None]
"""Unmount and remove it, idempotently."""


class Host:
    """That of one open store. *room* is the store's folder for it."""

    def __init__(self, room: Path, options: HcsOptions, prepare: Prepare, reclaim: Reclaim) -> None:
        self.room, self._options, self._prepare, self._reclaim = room, options, prepare, reclaim

    def open(self) -> None:
        """Raises NotSupported where this user cannot do it."""

    def try_out(self) -> tuple[Path, frozenset[Capability]]:
        """A folder on the file system of the snapshots, to be measured and synced; what their trees can hold."""
        return self.room, frozenset()

    def attach(self, tree: Tree, made: Sequence[Mount], writable: bool = True) -> None:
        """Make a snapshot ready to be written or read."""

    def end(self, nonce: str) -> None:
        """End what a killed build still runs in it, where that does not end by itself."""

    def detach(self, nonce: str) -> bool:
        """Undo it; False where somebody else has. Idempotent. Raises Busy where the tree is in use; then it stays."""
        return True

    def attached(self) -> Sequence[str]:
        """The nonces of what is or was attached, whoever did it."""
        return ()

    def path(self, nonce: str) -> Path:
        """Where a tree is attached."""
        raise NotSupported("a folder of the tree", "this platform shows snapshots to containers only", "use run()")

    def view(self, parent: str) -> AbstractContextManager[Path]:
        """The tree of the committed snapshot *parent*, read-only, for the length of a block."""
        raise NotSupported("reading a tree", "this platform shows snapshots to containers only", "use run()")

    def viewed(self) -> Sequence[str]:
        """The nonces of the snapshots that results are read through, by any process."""
        return ()

    def sweep(self) -> None:
        """Reclaim the views of dead processes."""

    def calling(self, record: Path) -> AbstractContextManager[IO[bytes] | None]:
        """What one ctr that makes something gets as its standard input, so that await_calls() can wait for its end."""
        return nullcontext()

    def await_calls(self, record: Path) -> None:
        """Wait for the end of every ctr that makes what *record* is of, also of those whose callers are dead."""

    def command(self, folder: Path, nonce: str, wanted: Command, cwd: str | None) -> Command | None:
        """How to run *wanted* in the attached tree of the entry in *folder*, if not as a plain process of this host."""
        return None
