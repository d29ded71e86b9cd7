"""What a power cut may cost: the newest results under `group`, none under `full`; never a broken one that looks whole.

A rename can survive a crash that the files' contents do not. So an entry bears the empty file `synced` once all of it
is known to be on the disk, and the first open in another boot drops the entries that lack it.

    group   publish at once; a barrier in the background, then the marks
    full    barrier, mark, publish, fsync of the folder; then build() returns, the builder's and everybody else's
    none    nothing, for throw-away stores

Where there is no syncfs(2) (macOS, Windows) the files are flushed one by one before the rename.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from .backend import Entry
from .errors import NoSpace, StoreError
from .records import Record

log = logging.getLogger(__name__)

SYNCED, SUSPECT = "synced", "suspect"
PAUSE = 2.0  # seconds between a publication and the barrier that covers it and all that follow meanwhile


def boot_id() -> str:
    """The kernel's id of the running boot, or "" where it tells none."""
    if sys.platform == "linux":
        with suppress(OSError):
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


@functools.cache
def _syncfs() -> Callable[[int], int] | None:
    function: Callable[[int], int] | None = None
    if sys.platform == "linux":
        function = ctypes.CDLL(None, use_errno=True).syncfs
    return function


class Durability:
    """The barrier of one open store."""

    def __init__(self, mode: str, paths: Sequence[Path], results: Path) -> None:
        """*paths*: a folder on each file system that holds trees; *results*: that of the results, beside the caches."""
        self._mode, self._results = mode, results
        self._wake = threading.Condition()
        self._pending: dict[Path, str] = {}  # folder -> attempt, published and not known to be on the disk
        self._scanned = self._closing = False
        self._thread: threading.Thread | None = None
        # Opened now: the kernel reports a failed write-back to descriptors that were open before it.
        self._descriptors = [] if mode == "none" else [os.open(p, os.O_RDONLY) for p in paths if _syncfs()]

    def before_rename(self, entry: Entry, tree: Path | None, sealed_durably: bool) -> None:
        """Called with the entry finished and before it is published. Raises StoreError where the disk fails."""
        if self._mode == "none" or self.marks_later:
            return
        if sealed_durably:
            _flush(entry.folder, None)  # what lies beside the tree: the log and the records
        elif self._descriptors:
            self.barrier()
        else:
            _flush(entry.folder, tree)
        _touch(entry.synced)
        _fsync(entry.synced)
        _fsync_folder(entry.folder)

    def published(self, entry: Entry, attempt: str) -> None:
        """Called after the rename."""
        if self._mode == "full":
            self._name(entry)
        if self.marks_later:
            with self._wake:
                self._pending[entry.folder] = attempt
                self._start_thread()
                self._wake.notify()

    def settle(self, entry: Entry) -> None:
        """Called before *entry* is given to somebody who did not build it.

        It can be seen as soon as it is renamed, and its builder may be killed before it has that on the disk.
        """
        if self._mode == "full" and not _is_named(entry):
            try:
                self._name(entry)
            except OSError as error:
                log.warning("%s is published, but it is not known to be on the disk: %s", entry.id, error)

    def barrier(self) -> None:
        """Bring all that was written before the call to the disk. Raises StoreError where the disk fails."""
        syncfs = _syncfs()
        for descriptor in self._descriptors:
            if syncfs and syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                reason = os.strerror(number)
                if number in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace(str(self._results), reason)
                raise StoreError(
                    f"the disk below {self._results} failed to write: {reason}; look into the kernel's log"
                )

    @property
    def marks_later(self) -> bool:
        """Is there a time in which what was published lacks its mark?"""
        return self._mode == "group" and bool(self._descriptors)

    def pending(self) -> bool:
        """Is there something published by this store object that a power cut could still cost?"""
        return bool(self._pending)

    def flush(self) -> None:
        """One barrier now, then the marks of all that was published before it, whoever published that, and another.

        Once this returns, a power cut costs none of it. Where the disk fails, they are marked `suspect`: the kernel
        tells of a failure once, and drops the data it could not write, so that a later barrier which succeeds proves
        nothing for them. Raises StoreError then.
        """
        if _syncfs() is None:
            return  # what was published had reached the disk by itself
        attempts, mark = self._take(), SUSPECT
        try:
            self.barrier()
            mark = SYNCED
        finally:
            self._mark_all(attempts, mark)
        if not attempts:
            return
        try:
            self.barrier()  # for the marks: what lacks its mark after a power cut is dropped, however whole it is
        except StoreError:
            self._mark_all(self._take(), SUSPECT)  # what was published meanwhile may be what could not be written
            raise

    def close(self, flush: bool = True) -> None:
        """End the thread; unless *flush* is False, bring the last publications to the disk. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        try:
            if flush and self._pending:
                self.flush()
        finally:
            while self._descriptors:
                os.close(self._descriptors.pop())

    def abandon(self) -> None:
        """In a forked child: close what it inherited, do nothing else."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    # Inside.

    def _name(self, entry: Entry) -> None:
        """Bring the rename to the disk, and tell others so by a mark that is not empty any more."""
        _fsync_folder(entry.folder.parent)
        with suppress(OSError):  # then the next one syncs once more
            descriptor = os.open(entry.synced, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                os.write(descriptor, b"named\n")
            finally:
                os.close(descriptor)

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="storebackends-barrier", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pending or self._closing)
                # More publications are sure to follow a first one: let them share the barrier.
                if self._closing or self._wake.wait_for(lambda: self._closing, PAUSE):
                    return
            try:
                self.flush()
            except StoreError as error:
                log.error("%s", error)

    def _take(self) -> dict[Path, str]:
        with self._wake:
            attempts, self._pending = self._pending, {}
            scanned, self._scanned = self._scanned, True
        if not scanned:  # once: what earlier processes published and did not live to mark
            caches = self._results.with_name("caches")
            rooms = [self._results, *(caches / name for name in _names(caches))]
            found = {room / name: attempt for room in rooms for name, attempt in _unmarked(room) if attempt}
            attempts = found | attempts
        return attempts

    def _mark_all(self, attempts: dict[Path, str], mark: str) -> None:
        for folder, attempt in attempts.items():
            self._mark(folder, attempt, mark)

    def _mark(self, path: Path, attempt: str, mark: str) -> None:
        # By descriptor, and only if it is the attempt that the barrier covered: the id may have been built again since.
        with suppress(FileNotFoundError):
            folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
            try:
                if _attempt_in(folder) == attempt:
                    _touch(mark, dir_fd=folder)
            except (OSError, StoreError) as error:
                log.warning("%s stays unmarked: %s", path, error)
            finally:
                os.close(folder)


def unsynced(room: Path, boot: str) -> set[str]:
    """The entries of a folder that an unclean end of another boot may have broken, by name: unmarked, not of *boot*."""
    lost = set()
    for name, _ in _unmarked(room):
        try:
            if Entry(name, room / name).read().boot == boot:
                continue
        except StoreError as error:  # a torn record is the very sign that is looked for
            log.warning("%s", error)
        lost.add(name)
    return lost


def _is_named(entry: Entry) -> bool:
    try:
        return os.stat(entry.file("synced")).st_size > 0
    except OSError:
        return False


def _unmarked(room: Path) -> Iterable[tuple[str, str]]:
    """(name, attempt) of what lacks the mark; no attempt where the record is broken, or the disk failed to write it."""
    for name in _names(room):
        folder = room / name
        if os.path.lexists(folder / SYNCED) or not folder.is_dir():
            continue
        try:
            attempt = Entry(name, folder).attempt
        except StoreError:
            attempt = ""
        yield name, "" if os.path.lexists(folder / SUSPECT) else attempt


def _names(folder: Path) -> list[str]:
    """What is in a folder, which may be gone meanwhile, or a file of somebody else's."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.listdir(folder)
    return []


def _attempt_in(folder: int) -> str:
    descriptor = os.open("build.json", os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0), dir_fd=folder)
    with open(descriptor, "rb") as file:
        return Record.parse(file.read(), Path("build.json")).attempt


def _touch(path: Path | str, dir_fd: int | None = None) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=dir_fd))


def _fsync(file: Path) -> None:
    # Windows flushes only what is open for writing.
    descriptor = os.open(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    # Windows has no call for it: NTFS keeps a journal of names.
    if sys.platform != "win32":
        _fsync(folder)


def _flush(folder: Path, tree: Path | None) -> None:
    """Flush every regular file below an entry; following no link."""
    for top in (folder, tree):
        for parent, _, names in os.walk(top) if top else ():
            for name in names:
                path = Path(parent, name)
                if path.is_file() and not path.is_symlink():
                    with suppress(PermissionError):  # a read-only file of Windows was flushed when it was closed
                        _fsync(path)
