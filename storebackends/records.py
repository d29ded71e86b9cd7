"""build.json: what is known of one build, kept beside its log.

Written before the tree exists, so that a crash always leaves a name for what it left; rewritten once at the end, before
the entry is published. Rewritten whole or not at all: into a new file, renamed over the old one. A kill can leave it
torn in its very first writing only, and then nothing else is there yet.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from json.encoder import encode_basestring_ascii as _quoted
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any

from . import renames
from .errors import StoreError

# A build can put a link in its place.
_FLAGS = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Record:
    """One attempt at building an id. Times are seconds since the epoch, by this host's clock."""

    id: str
    attempt: str
    base: str | None = None
    base_attempt: str | None = None
    boot: str = ""  # the boot the build ran in; "" where the platform tells none
    pid: int = 0  # the builder's
    started: float = 0.0
    finished: float | None = None
    outcome: str | None = None  # None while it runs; built, failed, cancelled or died
    reason: str | None = None  # why there is no result, as the caller was told
    log_length: int | None = None  # in bytes, fixed when the log was finished
    digest: str | None = None  # of the tree as it was published, where the store keeps that (see digests.py)
    waits_for: tuple[str, ...] = ()  # the builds and locked caches it waits for, so that a circle can be seen

    def begin(self, path: str) -> None:
        """Write the record to *path*, where there must be none; killed midway, it leaves a torn one. Raises OSError."""
        _write(path, os.O_EXCL, self._encoded())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to *path*, whole or not at all. Raises OSError."""
        path = os.fspath(path)
        part = f"{path}.part"
        _write(part, os.O_TRUNC, self._encoded())
        renames.replace(part, path)

    def _encoded(self) -> bytes:
        # What json.dumps() gives, in two thirds of the time, as this is done twice for each build.
        members = ['{"format": 1']
        for name, value in zip(_NAMES, _values(self), strict=True):
            if value is not None and value != ():
                members.append(f'"{name}": {_quoted(value) if type(value) is str else _json(value)}')
        return f"{', '.join(members)}}}".encode()

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record. Raises FileNotFoundError, or StoreError where it is no record of ours."""
        return cls.parse(_read(path), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Record:
        """Make a record of the bytes that *path* held; keys that a later version added are passed over."""
        try:
            content: dict[str, Any] = json.loads(data)
            content["waits_for"] = tuple(content.get("waits_for", ()))
            record = cls(**{key: value for key, value in content.items() if key in _NAMES})
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is not a build's record ({error}); 'storebackends doctor' may tell more"
            ) from error
        if not isinstance(record.id, str) or not isinstance(record.attempt, str):
            raise StoreError(f"{path} is not a build's record: its id or its attempt is no string")
        return record


_read = renames.patiently(Path.read_bytes)  # it may just be replaced
_NAMES = tuple(field.name for field in fields(Record))
_values = attrgetter(*_NAMES)


def _json(value: object) -> str:
    plain = type(value) is int or (type(value) is float and isfinite(value))
    return repr(value) if plain else json.dumps(value)


def _write(path: str, flag: int, content: bytes) -> None:
    descriptor = os.open(path, _FLAGS | flag, 0o666)  # open() takes twice as long
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)
