"""The protocol between the store and the storage below it. Its doc comments are the specification.

An *id* is the key of a result. An *attempt* is one try at building it, a nonce. An *entry* is a plain folder that
holds the build's log, its record (build.json) and the *tree* the caller's function writes to, or that tree's name
where it lives elsewhere. A build is the entry in-progress/ID~ATTEMPT, a result is result/ID, and the one rename(2)
from the first to the second is what publishes:

    result(id) is there if and only if the build finished, whole.

The Store holds the locks of an id around every call here, so a backend needs no locking of its own; but any system
call in it may be the last before a kill, and what is left then must be found and removed by the next `open()`.
Most backends derive from `storebackends.entries.EntryBackend` and write four verbs; this class is for the others.
"""

from __future__ import annotations

import enum
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NotFound, NotSupported, StoreError
from .records import Record

if TYPE_CHECKING:
    from pydantic import BaseModel

API = 1
"""The version of this protocol. A plugin states the one it was written for; the store takes OLDEST_API to API."""
OLDEST_API = 1


class Capability(enum.StrEnum):
    """What a backend's trees can hold or do. A test of the conformance kit is skipped by the one that is missing."""

    HOST_TREE = "host_tree"  # the tree is a folder of this host, so a function can write to it
    READONLY = "readonly"  # a published tree refuses writes, even by root
    DETACHED = "detached"  # a build may edit in place what it has of its base, and the base stays as it is
    OWNERS = "owners"
    MODES = "modes"
    NS_MTIME = "ns_mtime"
    SYMLINKS = "symlinks"
    HARDLINKS = "hardlinks"
    LINKED = "linked"  # an edit of a file that the base has by several names is an edit of all of them
    SPARSE = "sparse"
    XATTRS = "xattrs"
    ACLS = "acls"
    FIFOS = "fifos"
    DEVICES = "devices"


@dataclass(frozen=True, slots=True)
class Entry:
    """One build or one result: a folder, and where its parts are. Says nothing of whether they exist."""

    id: str
    folder: Path  # in-progress/ID~ATTEMPT or result/ID

    @property
    def attempt(self) -> str:
        """The nonce of the try that made it: in a build's path; read from the record of a result."""
        return self.folder.name.partition("~")[2] or self.read().attempt

    def read(self) -> Record:
        """Read build.json. Raises NotFound where there is none, StoreError where it is broken or unreadable."""
        try:
            return Record.load(self.record)
        except FileNotFoundError:
            raise NotFound(self.id, f"{self.record} is not there: {self.id!r} was deleted, or is not ours") from None
        except OSError as error:
            raise StoreError(f"{self.record} cannot be read: {error.strerror}; look into the kernel's log") from error

    def begin(self, record: Record) -> None:
        """Write the first build.json of a folder that was just made. Raises OSError."""
        record.begin(self.file("build.json"))

    def save(self, record: Record) -> None:
        """Write build.json, whole or not at all. Raises OSError."""
        record.save(self.file("build.json"))

    def file(self, name: str) -> str:
        """The path of one of its files, as a string: making a Path can take longer than what it is for."""
        return f"{self.folder}{os.sep}{name}"

    @property
    def log(self) -> Path:
        """The build's output; never inside the tree."""
        return self.folder / "log"

    @property
    def record(self) -> Path:
        """build.json: base, attempt, boot id, builder; at the end also outcome and the log's length."""
        return self.folder / "build.json"

    @property
    def tree_record(self) -> Path:
        """tree.json: the name of a tree that lives outside the entry, written before that tree exists."""
        return self.folder / "tree.json"

    @property
    def synced(self) -> Path:
        """Where it is, all of the entry reached the disk; under `full` its name did, too, if it is not empty."""
        return self.folder / "synced"


@dataclass(frozen=True, slots=True)
class CacheEntry(Entry):
    """One generation of a cache, or a loan: a private copy in the hands of one borrower. Its id is the cache's name."""

    @property
    def generation(self) -> int:
        """The number of a generation, caches/NAME/GEN, from 1; 0 of a loan, loans/NAME~ATTEMPT."""
        return 0 if "~" in self.folder.name else int(self.folder.name)


@dataclass(frozen=True, slots=True)
class Usage:
    """Space below a store. Bytes; inodes and metadata are None where the file system has no such limit."""

    total: int
    free: int
    inodes_total: int | None = None
    inodes_free: int | None = None
    metadata_total: int | None = None
    metadata_free: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """What deleting one result would free, in bytes: *exact*, or an estimate where data is shared unseen."""

    bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be. *what* names it; *repair* mends it, where that can lose nothing."""

    what: str
    problem: str
    repair: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Support:
    """A backend's answer for one folder on this host. With *usable* False, *reason* and *fix* are sentences.

    *rank* orders the usable ones for ``backend = "auto"``: the highest wins; 0 is never chosen unasked.
    """

    usable: bool
    reason: str = ""
    fix: str = ""
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a program where a tree is. *stop* ends what a daemon runs for it, after its client was killed."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path | None
    user: str | int | None = None
    stop: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What a plugin's hook answers: enough to choose, check and explain a backend without importing its driver."""

    name: str  # the entry point's name, and `backend = "..."` in the configuration
    options: type[BaseModel]  # derive from storebackends.plugin.Options: frozen, unknown keys refused
    factory: str  # "package.module:Class", imported when a store is opened; called as Class(root, options, uuid)
    probe: Callable[[Path], Support]  # can this host keep such a store in that folder (which may not exist yet)?
    api: int = API
    summary: str = ""  # half a line for `storebackends plugins`
    folder: Callable[[Any], Path] | None = None
    """Where a store without a `path` is, by its options; may ask the system. None: a path has to be given."""


class Backend(ABC):
    """Where the trees of one store are kept."""

    capabilities: frozenset[Capability] = frozenset()
    seals_durably: bool = False
    """True where seal() writes the whole tree to the disk itself (a ZFS snapshot), so no barrier is needed."""
    rooms: frozenset[str] = frozenset()
    """The names of what this backend keeps in the store's folder beside what every store has."""

    contained: bool = False
    """Do commands run in a container, where the tree is at a path that never changes? Then no sandbox is put in it."""
    home: str | None = None
    """What a command has for HOME and TMPDIR, where it runs with other folders than this host's."""

    def __init__(self, root: Path, options: Any, uuid: str) -> None:
        """*root* is the store's folder, *uuid* the store's own: it goes into the name of every outside resource."""
        self.root, self.options, self.uuid = root, options, uuid

    @abstractmethod
    def open(self) -> None:
        """Get ready. Raises NotSupported with reason and fix where this host cannot serve the store."""

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Let go of what open() took. Twice is fine."""

    @abstractmethod
    def build(self, id: str, base: str | None, attempt: str, record: Record | None = None) -> Entry:
        """Begin a build: a private writable tree, equal to that of result *base* or empty.

        *record* (by default one that names no builder) is on disk before any resource that a crash could leave.
        Raises BaseNotFound before any change; on every failure nothing is left. Costs what a clone costs here.
        """

    @abstractmethod
    def rename(self, id: str) -> Entry:
        """Publish the build of *id*: once this returns, result(id) is its tree.

        Killed midway, it leaves the unfinished build or the whole result, nothing between. Raises StoreError with
        the build intact: retry, or discard(). A result already there is an error, never replaced.
        """

    @abstractmethod
    def result(self, id: str) -> Entry | None:
        """Return what is published under *id*. A stat; starts no process. The tree itself is not looked at."""

    def has(self, id: str) -> bool:
        """Is there a result of *id*? As result(), for who wants to know no more."""
        return self.result(id) is not None

    @abstractmethod
    def discard(self, id: str, attempt: str) -> None:
        """Remove a build that was not published, and all its resources: hidden first, reclaimed after. Idempotent."""

    @abstractmethod
    def delete(self, id: str) -> None:
        """Remove the result of *id*: hidden first by one rename, reclaimed after. Idempotent.

        Interrupted, it leaves trash that the next open() empties, never half a result.
        """

    def hide(self, id: str) -> Path | None:
        """The first half of delete(): a folder for reclaim(), or None where nothing is left to do.

        By default nothing is, for it deletes. Where trees may wait in the trash, a folder there is given: to hide many,
        and then to reclaim them, costs less than both for each in turn.
        """
        self.delete(id)
        return None

    def reclaim(self, hidden: Path) -> None:
        """The other half: remove what hide() gave, and all its resources. The locks of its id are others' by now."""
        raise NotSupported(f"reclaiming {hidden}", "this backend deletes at once and hides nothing")

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """The ids of all results, in no order, as the disk has them."""

    @abstractmethod
    def unfinished(self) -> Iterator[tuple[str, str]]:
        """(id, attempt) of every build not published: running ones and what crashes left."""

    @abstractmethod
    def sweep(self) -> None:
        """Reclaim what no lock protects: trash, stale mounts, outside resources without an entry. Never waits."""

    @abstractmethod
    def usage(self) -> Usage:
        """Space on the tightest file system or pool that holds trees."""

    @abstractmethod
    def size(self, id: str) -> Size:
        """What deleting *id* would free. NotFound where there is no such result."""

    # Caches. The highest generation of a name is the current one; the Store leases what is cloned.

    def cache_list(self, name: str | None = None) -> Iterator[CacheEntry]:
        """Every generation and every loan there is, of the cache *name* or of all, in no order."""
        return iter(())

    def cache_clone(self, source: CacheEntry | None, record: Record) -> CacheEntry:
        """Make a loan of the cache `record.id`: a private writable tree, equal to generation *source*'s or empty.

        It must stay whole when *source* is dropped, and whatever is written to it, in place too, must not reach
        *source*. *record* is on disk before any resource that a crash could leave; on every failure nothing is left.
        """
        raise _keeps_none()

    def cache_install(self, loan: CacheEntry, generation: int) -> CacheEntry | None:
        """Seal *loan* and make it that *generation*, by one rename; None where there is one, and the loan stays."""
        raise _keeps_none()

    def cache_drop(self, entry: CacheEntry) -> None:
        """Remove a generation or a loan, and all its resources: hidden first, reclaimed after. Idempotent."""
        raise _keeps_none()

    def cache_size(self, entry: CacheEntry) -> Size:
        """What dropping *entry* would free."""
        raise _keeps_none()

    def settle(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds until what was deleted is free again; False where it is not yet."""
        return True

    def check(self) -> Iterator[Problem]:
        """For fsck: what is wrong with resources outside of the entries, the store being in use. Changes nothing."""
        return iter(())

    @abstractmethod
    def view(self, id: str) -> AbstractContextManager[Path]:
        """The whole readable tree of a result as a folder of this host, for as long as the context is open.

        Raises NotFound, or NotSupported where no folder can show it.
        """

    @abstractmethod
    def tree(self, entry: Entry) -> Path:
        """The folder of this host where the tree of a running build is written. NotSupported where there is none."""

    def command(
        self, entry: Entry, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, user: str | int | None = None
    ) -> Command:
        """How to run *argv* with its working folder *cwd* (relative to the tree, default the tree) in a build.

        The default is a plain process on this host. Raises StoreError for a *cwd* that leaves the tree by ``..``
        or by a link.
        """
        raise NotSupported("running a command", "this backend has no command() and its trees are not on this host")

    @abstractmethod
    def copy_in(self, entry: Entry, source: Path, dest: str) -> None:
        """Copy a file, link or folder of this host into a build's tree, with all its metadata.

        *dest* is relative to the tree; its parents are made; a folder merges into a folder. No link in the tree is
        followed. Raises StoreError for a *dest* outside the tree.
        """

    def import_image(self, entry: Entry, image: str) -> None:
        """Fill a build's empty tree with what an image of a container runtime holds; nothing of it is run.

        Raises NotSupported where the backend knows of no images, StoreError where there is no such one.
        """
        raise NotSupported(f"taking the image {image!r}", "this backend has none", "import a folder or an archive")

    def sync_paths(self) -> Sequence[Path]:
        """A folder on each file system that a tree's data is written to, for the durability barrier.

        Asked only of a store that a power cut may not cost. Raises NotSupported where the data cannot be brought to
        the disk from here, so that the store has to be one of durability "none".
        """
        return (self.root,)


def _keeps_none() -> NotSupported:
    return NotSupported("a cache", "this backend keeps none", "use a store of another backend for it")
