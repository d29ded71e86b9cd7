"""Every exception a store raises, in one tree.

A message names the thing, the reason and the way out. The facts behind it are attributes, and every error survives
pickling with all of them: builds are waited for across threads and processes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence


class StoreError(Exception):
    """Something went wrong in a store; the root of all its exceptions."""

    def __reduce__(self) -> tuple[object, ...]:
        # The default calls type(self)(*self.args), but args is the message and __init__ takes the facts.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[StoreError], args: tuple[object, ...], facts: dict[str, object]) -> StoreError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class InvalidId(StoreError, ValueError):
    """A string cannot be an id; raised before any file is touched, by the same rule on every platform."""

    def __init__(self, id: object, reason: str) -> None:
        super().__init__(f"{id!r} cannot be an id: {reason}")
        self.id, self.reason = id, reason


class NotFound(StoreError, LookupError):
    """Nothing is kept under an id."""

    def __init__(self, id: str, message: str | None = None) -> None:
        super().__init__(message or f"nothing is kept under {id!r}; 'storebackends ls' lists what is")
        self.id = id


class BaseNotFound(NotFound):
    """A build's base is not in the store."""

    def __init__(self, id: str, base: str) -> None:
        super().__init__(id, f"cannot build {id!r}: no result {base!r} to start from; build or import that first")
        self.base = base


class Busy(StoreError):
    """A thing is in use and stays as it is; *holders* says by whom (other ids, or processes)."""

    def __init__(self, id: str, reason: str, holders: Sequence[str] = ()) -> None:
        super().__init__(f"{id!r} is busy: {reason}")
        self.id, self.reason, self.holders = id, reason, tuple(holders)


class BuildFailed(StoreError):
    """The function of a build failed: nothing is kept under its id; its log is, under the attempt.

    The function's own exception is chained as ``__cause__`` where the build ran in this process.
    """

    def __init__(self, id: str, attempt: str, reason: str) -> None:
        super().__init__(f"build of {id!r} failed: {reason}; 'storebackends log {id}' shows its output")
        self.id, self.attempt, self.reason = id, attempt, reason


class Cancelled(StoreError):
    """A build was cancelled before it was published; nothing is kept under its id."""

    def __init__(self, id: str, attempt: str | None = None, reason: str = "cancelled by its last caller") -> None:
        super().__init__(f"build of {id!r} did not finish: {reason}")
        self.id, self.attempt, self.reason = id, attempt, reason


class BuilderDied(StoreError):
    """The log of a build that ended with its builder, without an outcome. Whoever waits for the id builds it again.

    A follower gets it after the last byte, and may ask for the log again: it is then that of the next attempt.
    """

    def __init__(self, id: str, attempt: str, reason: str) -> None:
        super().__init__(f"this build of {id!r} has no outcome: {reason}; ask for its log again to follow the next one")
        self.id, self.attempt, self.reason = id, attempt, reason


class CommandFailed(StoreError):
    """A program ended with a failure, was ended by a signal or by its time limit, or could not start.

    *returncode* is negative for a signal, as in `subprocess`, and None where it never started. *stderr* is the
    end of what it said there (all of it up to 64 KiB), or "" where that went to a build's log.
    """

    def __init__(self, argv: Sequence[str], returncode: int | None, reason: str, stderr: str = "") -> None:
        said = f": {stderr.strip()}" if stderr.strip() else ""
        super().__init__(f"{argv[0] if argv else '(no program)'} {reason}{said}")
        self.argv, self.returncode, self.reason, self.stderr = tuple(argv), returncode, reason, stderr


class NoSpace(StoreError):
    """The file system or a quota below the store is full."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"no space below {path}: {reason}; delete results or enlarge the file system")
        self.path, self.reason = path, reason


class NotSupported(StoreError):
    """This backend, file system, kernel or user cannot do what was asked; *fix* says what would help."""

    def __init__(self, what: str, reason: str, fix: str = "") -> None:
        super().__init__(f"{what} is not possible here: {reason}" + (f"; {fix}" if fix else ""))
        self.what, self.reason, self.fix = what, reason, fix


class ConfigError(StoreError):
    """The host's configuration, or a store's options, are wrong; *problems* has every one, with its dotted key."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: " + (problems[0] if len(problems) == 1 else "".join(f"\n  {p}" for p in problems)))
        self.source, self.problems = source, tuple(problems)


class RecipeError(StoreError):
    """A recipe is wrong; *problems* has every one found, each with the step or key it is in."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: " + (problems[0] if len(problems) == 1 else "".join(f"\n  {p}" for p in problems)))
        self.source, self.problems = source, tuple(problems)


class PluginError(StoreError):
    """A plugin is missing, broken or not compatible; *distribution* names the package to mend, where known."""

    def __init__(self, plugin: str, reason: str, distribution: str | None = None) -> None:
        super().__init__(f"plugin {plugin!r}{f' of {distribution}' if distribution else ''}: {reason}")
        self.plugin, self.reason, self.distribution = plugin, reason, distribution


class explained:  # noqa: N801 (a context manager is called like a function; a generator takes three times as long)
    """Turn an OSError of the block into NoSpace, or a StoreError that says *what* failed; it stays as the cause."""

    def __init__(self, what: str, path: str | os.PathLike[str]) -> None:
        self._what, self._path = what, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(os.fspath(self._path), f"{self._what}: {error.strerror}") from error
            raise StoreError(f"{self._what} failed: {error}") from error
