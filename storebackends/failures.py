"""What stays of attempts that left no result: their log and their record, for whoever asks why.

    ROOT/failed/ID~ATTEMPT/   log, build.json

Bounded: the newest are kept.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path

from . import renames, trees
from .backend import Entry
from .errors import StoreError
from .log import BuildLog
from .records import Record

KEPT = 100


class Failures:
    """The failed attempts of one store."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "failed"
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def bury(self, entry: Entry, record: Record, log: BuildLog | None = None) -> None:
        """Keep the log of *entry*, a build that is about to be discarded, and *record*, its final one.

        *log* is the build's own object where it has one here: its readers follow the move. Raises OSError, and the
        log is still where it was.
        """
        grave = Entry(record.id, self.folder / entry.folder.name)
        grave.folder.mkdir(mode=0o700, exist_ok=True)
        record.save(grave.record)
        with log.moving() if log else nullcontext() as move, suppress(FileNotFoundError):
            renames.rename(entry.log, grave.log)
            if move:
                move.to(grave.log)
        self._trim()

    def ids(self) -> set[str]:
        """The ids that some failure is kept of."""
        return {name.partition("~")[0] for name in os.listdir(self.folder) if "~" in name}

    def newest(self, id: str) -> Entry | None:
        """The latest attempt at *id* that failed and is still kept."""
        names = [name for name in os.listdir(self.folder) if name.startswith(f"{id}~")]
        return Entry(id, self.folder / max(names, key=self._age)) if names else None

    def _trim(self) -> None:
        names = sorted(os.listdir(self.folder), key=self._age)
        for name in names[: max(0, len(names) - KEPT)]:
            with suppress(StoreError):  # another process trims too
                trees.remove(self.folder / name)

    def _age(self, name: str) -> int:
        with suppress(FileNotFoundError):
            return os.stat(self.folder / name).st_mtime_ns
        return 0
