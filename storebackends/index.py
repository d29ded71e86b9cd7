"""What would cost a walk over the disk to find out: who was built on whom, and when a result was last used.

An index, never the truth: the disk is. It may be lost, stale or unwritable, and then costs time or order, nothing else.
A parent edge is written before the child's tree exists; what a lost index forgot is read back from the records of the
results when it is first asked.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .backend import Entry, Size
from .errors import StoreError

if sys.platform == "linux":
    import fcntl

log = logging.getLogger(__name__)

BATCH = 256  # uses of results that may wait in memory to be written
PAUSE = 1.0  # seconds that they wait, once another follows: other processes prune by what is written
_HEAD = 1024  # bytes of a record that hold the attempt
_READ: int = sum(getattr(os, name, 0) for name in ("O_RDONLY", "O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"))
_CHUNK = 1000  # records that one transaction reads from the disk
# With a write-ahead log SQLite maps a file into memory. On a full btrfs a write to mapped memory needs new blocks, and
# ends the process by SIGBUS. So there it keeps a plain journal, and leaves it to the host when that reaches the disk: a
# sync takes longer there than all else in a build, and check() finds what a power cut broke.
_LOGGED = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
_PLAIN = "PRAGMA journal_mode = TRUNCATE; PRAGMA synchronous = OFF;"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    id TEXT PRIMARY KEY, attempt TEXT NOT NULL, base TEXT, created REAL NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS children ON results (base) WHERE base IS NOT NULL;
CREATE TABLE IF NOT EXISTS sizes (
    id TEXT PRIMARY KEY, attempt TEXT NOT NULL, bytes INTEGER NOT NULL, exact INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON results BEGIN DELETE FROM sizes WHERE id = OLD.id; END;
"""
_ROWS = """
SELECT results.id, results.attempt, base, created, used, bytes, exact FROM results
    LEFT JOIN sizes ON sizes.id = results.id AND sizes.attempt = results.attempt
"""
_STATE = "SELECT attempt, used, EXISTS (SELECT 1 FROM results WHERE base = ?1) FROM results WHERE id = ?1"


@dataclass(frozen=True, slots=True)
class Row:
    """What the index knows of an id. *created* and *used* are seconds since the epoch; *size* if it was measured."""

    id: str
    attempt: str
    base: str | None
    created: float
    used: float
    size: Size | None = None


class Index:
    """The SQLite file of one open store; safe to use from several threads."""

    def __init__(self, root: Path, results: Path) -> None:
        self._path, self._dirty, self._results = root / "index.sqlite", root / "index.dirty", results
        self._lock = threading.RLock()
        self._uses: dict[str, float] = {}
        self._built: dict[str, tuple[str, float]] = {}  # id -> attempt and when, of results on no base
        self._flushed = time.monotonic()
        self._reconciled = False
        self._db = self._connect()

    def add(self, id: str, attempt: str, base: str | None) -> None:
        """Remember that *attempt* at *id* builds on *base*; before its tree exists."""
        now = time.time()
        self._write("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)", [(id, attempt, base, now, now)])

    def built(self, id: str, attempt: str) -> None:
        """Remember that *attempt* left a result without a base; written in batches, since no deletion depends on it."""
        self._built[id] = attempt, time.time()
        self._flush_if_due()

    def remove(self, id: str) -> None:
        """Forget *id*."""
        with self._lock:
            self._uses.pop(id, None)
            self._built.pop(id, None)
        self._write("DELETE FROM results WHERE id = ?", [(id,)])

    def forget(self, attempts: Iterable[tuple[str, str]]) -> None:
        """Forget each (id, attempt) that is still the last one known of its id; in one transaction."""
        self._write("DELETE FROM results WHERE id = ? AND attempt = ?", list(attempts))

    def measured(self, sizes: Iterable[tuple[str, str, Size]]) -> None:
        """Remember the size of each (id, attempt)."""
        rows = [(id, attempt, size.bytes, size.exact) for id, attempt, size in sizes]
        self._write("INSERT OR REPLACE INTO sizes VALUES (?, ?, ?, ?)", rows)

    def touch(self, id: str) -> None:
        """Note a use of *id* now; written in batches."""
        self._uses[id] = time.time()  # one bytecode under the GIL; a use lost in a race with flush() costs nothing
        self._flush_if_due()

    def flush(self) -> None:
        """Write what was noted so far."""
        with self._lock:
            built, self._built = self._built, {}
            uses, self._uses = self._uses, {}
            self._flushed = time.monotonic()
        if built:
            there = ((id, at, None, when, when) for id, (at, when) in built.items() if self._is_there(id, at))
            self._write("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?)", there)
        if uses:
            self._write("UPDATE results SET used = ? WHERE id = ?", [(when, id) for id, when in uses.items()])

    def children(self, id: str) -> list[str]:
        """The ids last built, or being built, on *id*; some may be gone again: ask the disk."""
        with self._reading():
            self._reconcile()
            return [row[0] for row in self._db.execute("SELECT id FROM results WHERE base = ? ORDER BY id", (id,))]

    def rows(self) -> Iterator[Row]:
        """All that is known, oldest use first."""
        with self._reading():
            self.flush()
            self._reconcile(anew=True)  # other processes have results that they did not write a row of yet
            found = self._db.execute(f"{_ROWS} ORDER BY used").fetchall()
        return map(_row, found)

    def state(self, id: str) -> tuple[str, float, bool] | None:
        """The attempt and the last use of *id*, also one not yet written, and if anything may have been built on it."""
        with self._reading():
            self._reconcile()
            found = self._db.execute(_STATE, (id,)).fetchone()
        return found and (found[0], max(found[1], self._uses.get(id, 0)), bool(found[2]))

    def close(self) -> None:
        """Write what is waiting and let go of the file. Idempotent."""
        with self._lock:
            self.flush()
            self._db.close()

    # Inside.

    def _connect(self) -> sqlite3.Connection:
        try:
            return self._open(str(self._path))
        except sqlite3.OperationalError as error:  # a read-only or full disk
            log.warning("%s cannot be used (%s): last uses are not recorded", self._path, error)
            return self._open(":memory:")
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged (%s) and made anew from the results", self._path, error)
            _unlink(self._path)
            return self._open(str(self._path))

    def _open(self, path: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=30, check_same_thread=False)
        try:
            db.executescript((_PLAIN if _is_btrfs(self._path.parent) else _LOGGED) + _SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _flush_if_due(self) -> None:
        if len(self._uses) + len(self._built) >= BATCH or time.monotonic() - self._flushed > PAUSE:
            self.flush()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What cannot be read is asked again later, of the records too; who asks now gets a StoreError, no guess."""
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            self._mistrust()
            reason = f"{self._path} cannot be read: {error}"
            raise StoreError(f"{reason}; should that last, remove it: it is made anew from the results") from error

    def _mistrust(self) -> None:
        """Have every process read the records again."""
        self._reconciled = False
        with suppress(OSError):
            self._dirty.touch()

    def _write(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        """A failed write is logged, and leaves a note on the disk for every process to read the records again."""
        try:
            with self._lock, self._db:  # a transaction: all rows or none
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            log.warning("%s was not written (%s); the results are whole, the index is mended later", self._path, error)
            self._mistrust()

    def _reconcile(self, anew: bool = False) -> None:
        """Once, and after a failed write of any process: take in what the disk has and the index lacks."""
        dirty = os.path.exists(self._dirty)
        if self._reconciled and not dirty and not anew:
            return
        self._reconciled = True
        with suppress(OSError):
            self._dirty.unlink(missing_ok=True)
        # After a failed write any row may be of an earlier attempt; else only the missing ones are read.
        known = set() if dirty else {row[0] for row in self._db.execute("SELECT id FROM results")}
        self._take_in([name for name in os.listdir(self._results) if name not in known])

    # What is learnt from the disk is looked at in the transaction that writes it. A result that is there then has no
    # later attempt in the index, since its removal comes before that; and who removes it has to wait with its row.

    def _is_there(self, id: str, attempt: str) -> bool:
        with suppress(OSError):
            record = os.open(f"{self._results}{os.sep}{id}{os.sep}build.json", _READ)
            try:  # open() takes twice as long, and this is done for each build
                return attempt.encode() in os.read(record, _HEAD)
            finally:
                os.close(record)
        return False

    def _take_in(self, ids: list[str]) -> None:
        for start in range(0, len(ids), _CHUNK):
            self._write(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET attempt = excluded.attempt, base = excluded.base",
                self._recorded(ids[start : start + _CHUNK]),
            )

    def _recorded(self, ids: list[str]) -> Iterator[tuple[object, ...]]:
        for id in ids:
            try:
                record = Entry(id, self._results / id).read()
            except (StoreError, OSError) as error:
                log.warning("%s", error)
                continue
            when = record.finished or record.started
            yield id, record.attempt, record.base, when, when


def check(root: Path) -> None:
    """Remove the index if the host's end has damaged it: it is made anew from the results. Nobody may have it open."""
    path = root / "index.sqlite"
    if not path.exists():
        return
    db = sqlite3.connect(path)
    try:
        answers = db.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.Error as error:
        answers = [(str(error),)]
    finally:
        db.close()
    if answers != [("ok",)]:
        log.warning("%s is damaged (%s) and made anew from the results", path, answers[0][0])
        _unlink(path)


def _unlink(path: Path) -> None:
    for end in ("", "-journal", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(f"{path}{end}")


def _is_btrfs(folder: Path) -> bool:
    if sys.platform == "linux":
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x8400941F, bytearray(1024))  # BTRFS_IOC_FS_INFO
        except OSError:
            return False
        finally:
            os.close(fd)
        return True
    else:  # noqa: RET505 (or the type checker would take it for unreachable)
        return False


def _row(row: tuple[str, str, str | None, float, float, int | None, int | None]) -> Row:
    size, exact = row[5:]
    return Row(*row[:5], None if size is None else Size(size, bool(exact)))
