"""A build of another process, followed by its files: its log as it grows, and its outcome, matched by the attempt.

in-progress/ID~ATTEMPT/log   it runs
result/ID, of that attempt   built
failed/ID~ATTEMPT            failed, cancelled or died, as the record there says
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ._log_windows import Turnstile
from .backend import Entry
from .errors import BuilderDied, BuildFailed, NotFound, StoreError, explained
from .log import BuildLog
from .records import Record


class Followed:
    """One attempt. NotFound where its log is not there (yet, or any more)."""

    def __init__(self, root: Path, id: str, attempt: str, turnstile: Turnstile | None = None) -> None:
        self._root = root
        self.id, self.attempt = id, attempt
        path = root / "in-progress" / f"{id}~{attempt}" / "log"
        self.log = BuildLog.elsewhere(path, self._locate, turnstile=turnstile)
        self.outcome: Record | None = None

    def look(self) -> Record | None:
        """Take in what is new; the attempt's final record once there is one."""
        if self.outcome is None:
            try:
                # Where its log still is, it runs. That is all that a thousand waiters look at while nothing happens.
                self.log.grew(os.stat(self.log.path).st_size)
                return None
            except OSError:
                pass
            for folder in self._ends():
                if record := self._final(folder):
                    self._settle(record, folder / "log")
        return self.outcome

    def abandon(self, error: StoreError) -> None:
        """Nobody will look any more: without an outcome by now, the log ends with *error*, or with an earlier one."""
        if self.look() is None and self.log.state == "open":
            self.log.settled(self.log.length, self.log.path, error)

    def failure(self) -> StoreError | None:
        """The builder's error, equal to the one its own callers get; None unless it was the function that failed."""
        if self.outcome and self.outcome.outcome == "failed":
            return BuildFailed(self.id, self.attempt, self.outcome.reason or "")
        return None

    def _ends(self) -> tuple[Path, Path]:
        return self._root / "result" / self.id, self._root / "failed" / f"{self.id}~{self.attempt}"

    def _locate(self) -> Path | None:
        """Where its log is now that it ended; None where it is gone."""
        return next((folder / "log" for folder in self._ends() if self._final(folder)), None)

    def _final(self, folder: Path) -> Record | None:
        with suppress(NotFound):
            record = Entry(self.id, folder).read()
            return record if record.attempt == self.attempt and record.outcome else None
        return None

    def _settle(self, record: Record, log: Path) -> None:
        length = record.log_length
        if length is None:  # it died, so nobody fixed the length, and nobody writes any more
            length = os.stat(log).st_size if log.exists() else 0
        error = None
        if record.outcome not in ("built", "failed"):
            error = BuilderDied(self.id, self.attempt, record.reason or "it was cancelled")
        self.log.settled(length, log, error)
        self.outcome = record


def attempt_of(root: Path, id: str) -> str | None:
    """The attempt at *id* that is under way, or was when its builder died."""
    prefix = f"{id}~"
    with explained(f"looking for a build of {id!r}", root):
        names = [name for name in os.listdir(root / "in-progress") if name.startswith(prefix)]
    return names[0].removeprefix(prefix) if names else None


def note_waits(entry: Entry, record: Record, waits_for: tuple[str, ...]) -> None:
    """Write into *record*, that of *entry*, what its builder or borrower waits for."""
    # Another process may miss a circle for want of it, and wait until somebody cancels; all else is well.
    with suppress(OSError):
        replace(record, waits_for=waits_for).save(entry.record)


def waits_of(root: Path, id: str) -> tuple[str, ...]:
    """The ids that the function which builds *id*, in whatever process, waits for."""
    attempt = attempt_of(root, id)
    if attempt is None:
        return ()
    try:
        return tuple(Entry(id, root / "in-progress" / f"{id}~{attempt}").read().waits_for)
    except StoreError:  # it ended just now
        return ()
