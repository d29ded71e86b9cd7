"""What a build leaves: a finished tree, leased for as long as the caller holds it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from .backend import Entry
from .errors import StoreError, explained
from .locks import Lease
from .log import BuildLog
from .records import Record


def saved_log(entry: Entry) -> BuildLog:
    """The log of a result or of a failure, as long as its record says. Raises NotFound."""
    return BuildLog.saved(entry.log, length=entry.read().log_length)


class Result:
    """A finished tree, leased: nobody can delete it until release(), the end of the context, or collection.

    *outcome* is "built" (this call ran the function), "attached" (another's run of it was awaited) or "hit".
    """

    _view: AbstractContextManager[Path] | None = None
    _path: Path | None = None
    _released = True

    def __init__(
        self, entry: Entry, lease: Lease, outcome: str, show: Callable[[Result], AbstractContextManager[Path]]
    ) -> None:
        self._entry, self._lease, self._show = entry, lease, show
        self.id, self.outcome = entry.id, outcome
        self._released = False

    @property
    def path(self) -> Path:
        """The whole readable tree. Valid while the lease is held; do not write to it.

        Raises NotSupported where the backend cannot show it as a folder of this host.
        """
        if self._released:
            raise StoreError(f"the result {self.id!r} was released; ask the store for it again")
        if self._path is None:
            view = self._show(self)
            with explained(f"showing {self.id!r}", self._entry.folder):
                self._path, self._view = view.__enter__(), view
        return self._path

    @property
    def attempt(self) -> str:
        """The nonce of the try that made this result: another one means another tree."""
        return self.record.attempt

    @property
    def base(self) -> str | None:
        """The id it was built on."""
        return self.record.base

    @property
    def record(self) -> Record:
        """All that is recorded of the build. Raises NotFound where the lease is gone and the result with it."""
        return self._entry.read()

    @property
    def log(self) -> BuildLog:
        """The whole log of the build."""
        return saved_log(self._entry)

    def release(self) -> None:
        """Let go of the result. Idempotent."""
        self._released = True
        view, self._view = self._view, None
        try:
            if view:
                with explained(f"ending the view of {self.id!r}", self._entry.folder):
                    view.__exit__(None, None, None)
        finally:
            self._lease.release()

    def __enter__(self) -> Result:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if not self._released:
            self.release()

    def __repr__(self) -> str:
        return f"<Result {self.id!r} {self.outcome}>"
