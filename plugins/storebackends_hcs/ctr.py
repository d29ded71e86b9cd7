"""The client `ctr`: a call each, its answers parsed, its complaints told apart by their text: it gives no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Literal

from storebackends.plugin import CommandFailed, NoSpace, NotSupported, StoreError, tool

from . import HcsOptions

_TIMEOUT = 3600.0  # a bound, not an expectation: the native snapshotter copies whole trees
_UNREACHABLE = (
    "failed to dial",
    "connection refused",
    "connection error",
    "code = Unavailable",
    "transport is closing",
)
_FULL = ("no space left on device", "disk quota exceeded", "not enough space on the disk")

Removal = Literal["removed", "missing", "needed"]


@dataclass(frozen=True, slots=True)
class Mount:
    """How a snapshot is mounted, as containerd tells it."""

    kind: str
    source: str
    options: Sequence[str]

    def values(self, key: str) -> list[str]:
        """The values of the options ``key=value``."""
        return [option.partition("=")[2] for option in self.options if option.startswith(f"{key}=")]

    @property
    def layers(self) -> int:
        """How many trees are read through this mount below its own; 0 where they are not stacked."""
        return sum(value.count(":") + 1 for value in self.values("lowerdir")) if self.kind == "overlay" else 0

    @property
    def parents(self) -> list[str]:
        """The folders of the layers below on Windows, the nearest first."""
        return [str(path) for value in self.values("parentLayerPaths") for path in json.loads(value)]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One line of ``ctr snapshots ls``."""

    key: str
    parent: str | None
    committed: bool


class Missing(StoreError):
    """A snapshot, or what it was to be made of, is not in containerd."""


class Ctr:
    """The ctr of one store."""

    def __init__(self, options: HcsOptions) -> None:
        self._options = options

    def prepare(self, key: str, parent: str | None, record: IO[bytes] | None) -> list[Mount]:
        """Make the writable snapshot *key* of the committed one *parent*, or an empty one. Raises Missing.

        ctr has *record* open until it ends, also where this process is killed first.
        """
        return parse_mounts(self._snapshots("prepare", "--mounts", key, *([parent] if parent else []), input=record))

    def commit(self, name: str, key: str) -> None:
        """Turn the writable snapshot *key* into the read-only one *name*. Raises Missing."""
        self._snapshots("commit", name, key)

    def remove(self, key: str) -> Removal:
        """Remove a snapshot; "needed" where another was made of it, which has to go first."""
        try:
            self._snapshots("rm", key)
        except Missing:
            return "missing"
        except CommandFailed as error:
            if "with child" in error.stderr:
                return "needed"
            raise
        return "removed"

    def size(self, key: str) -> int:
        """The bytes that a snapshot has for itself. Raises Missing."""
        return int(self._snapshots("usage", "-b", key).split()[-2])

    def snapshots(self) -> list[Snapshot]:
        """All of the namespace, whoever made them."""
        lines = [line.split() for line in self._snapshots("ls").decode().splitlines()[1:]]
        return [Snapshot(words[0], words[1] if len(words) == 3 else None, words[-1] == "Committed") for words in lines]

    def import_archive(self, path: str, name: str, record: IO[bytes] | None) -> str:
        """Take in and unpack the images of an archive, called *name* with a tag or a digest; what ctr says of it."""
        words = ("--snapshotter", self._options.snapshotter, "--digests", "--base-name", name)
        return self.call("images", "import", *words, path, input=record).decode(errors="replace")

    def unpack(self, digest: str, record: IO[bytes] | None) -> None:
        """Make the snapshots of an image that is there."""
        self._snapshots("unpack", digest, input=record)

    def images(self) -> list[tuple[str, str]]:
        """(name, digest) of all of the namespace, whoever made them."""
        lines = [line.split() for line in self.call("images", "ls").decode().splitlines()[1:]]
        return [(words[0], words[2]) for words in lines]

    def remove_images(self, names: Sequence[str]) -> None:
        """Remove images, and what nothing else refers to, before it returns."""
        self.call("images", "rm", "--sync", *names)

    def content(self, digest: str) -> bytes:
        """A manifest or a configuration. Raises Missing."""
        return self.call("content", "get", digest)

    def call(self, *words: str, input: IO[bytes] | None = None) -> bytes:
        """What a ctr says. Raises StoreError: Missing, NoSpace, or one that tells how to mend it."""
        try:
            return tool(self._options.ctr(*words), timeout=_TIMEOUT, input=input).stdout
        except CommandFailed as error:
            raise self._explained(error) from error

    def _snapshots(self, *words: str, input: IO[bytes] | None = None) -> bytes:
        return self.call("snapshots", "--snapshotter", self._options.snapshotter, *words, input=input)

    def _explained(self, error: CommandFailed) -> StoreError:
        said = error.stderr.strip()
        if error.returncode is None:
            return NotSupported("a store on containerd", str(error), "install containerd, which brings ctr")
        if any(text in said for text in _UNREACHABLE):
            where = self._options.address or "its default address"
            return StoreError(f"containerd does not answer at {where}: start it, or set `address` ({said})")
        if any(text in said for text in _FULL):
            return NoSpace(f"containerd's snapshotter {self._options.snapshotter}", said)
        if "snapshotter not loaded" in said:
            fix = "'ctr plugins ls' lists those it has; set `snapshotter` to one of them"
            return NotSupported(f"the snapshotter {self._options.snapshotter!r}", said, fix)
        if said.endswith(": not found"):
            return Missing(said)
        return error


def parse_mounts(text: bytes) -> list[Mount]:
    """Read what ``prepare --mounts`` prints: some versions of ctr write the keys in lower case, and in any order.

    >>> parse_mounts(b'[{"Options": ["rw"], "Type": "bind", "Source": "/x", "Target": ""}]')
    [Mount(kind='bind', source='/x', options=('rw',))]
    """
    try:
        found = [{key.lower(): value for key, value in mount.items()} for mount in json.loads(text)]
        mounts = [Mount(mount["type"], mount["source"], tuple(mount.get("options") or ())) for mount in found]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreError(f"ctr says {text[:200]!r} where it should tell the mounts; is it containerd's?") from error
    if not mounts:
        raise StoreError("ctr tells no mounts of the snapshot; does the snapshotter work? See containerd's log")
    return mounts
