"""What opening a store repairs: all that a kill, a crash or a power cut can have left. Never waits for a live build.

A build whose `work` lock is free has no builder. Its log moves to failed/, its resources and its entry go. Files that
nobody here made are left alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from . import caches, trees
from .backend import Backend, Entry
from .durability import unsynced
from .errors import NotFound, StoreError
from .failures import Failures
from .locks import Locks
from .records import Record

log = logging.getLogger(__name__)


def recover(backend: Backend, locks: Locks, failures: Failures, scratch: Path) -> None:
    """Discard every build without a builder, then what lies about. Logs what it could not mend; raises OSError."""
    strays = set(os.listdir(scratch))  # before the builds are listed: a build is there before its scratch
    unfinished = set(backend.unfinished())
    for id, attempt in sorted(unfinished):
        with _logged(id):
            if lock := locks.try_work(id):
                with lock:
                    discard_dead(backend, failures, id, attempt)
    for name in strays - {attempt for _, attempt in backend.unfinished()}:
        with _logged(name):
            trees.remove(scratch / name)
    caches.sweep(backend, locks)
    backend.sweep()


def discard_dead(backend: Backend, failures: Failures, id: str, attempt: str) -> None:
    """Discard one attempt whose builder is gone, keeping its log; the caller holds the `work` lock of *id*."""
    entry = Entry(id, failures.folder.parent / "in-progress" / f"{id}~{attempt}")
    try:
        record = entry.read()
    except (NotFound, StoreError):
        record = Record(id, attempt)  # killed before the record was whole
    if record.outcome in (None, "built"):  # the second is written just before the rename, which did not come
        reason = f"its builder (pid {record.pid}) died" if record.pid else "its builder died"
        record = replace(record, finished=time.time(), outcome="died", reason=reason)
    if entry.folder.is_dir():
        failures.bury(entry, record)
    backend.discard(id, attempt)


def drop_unsynced(backend: Backend, results: Path, boot: str) -> list[str]:
    """Delete the results that an unclean end of an earlier boot may have broken, and all that was built on them.

    Caches are dealt with alike. The caller holds the store for itself alone. Returns the ids.
    """
    caches.drop_unsynced(backend, boot)
    lost = unsynced(results, boot)
    bases: dict[str, str | None] = {}
    for id in backend.ids():
        with suppress(StoreError):
            bases[id] = Entry(id, results / id).read().base
    doomed = [id for id in [*bases, *(lost - bases.keys())] if _has_lost_ancestor(id, bases, lost)]
    for id in doomed:
        log.warning("%s: its files may not have reached the disk before the host went down; dropped", id)
        backend.delete(id)
    return doomed


def _has_lost_ancestor(id: str | None, bases: dict[str, str | None], lost: set[str]) -> bool:
    seen: set[str] = set()
    while id is not None and id not in seen:
        if id in lost:
            return True
        seen.add(id)
        id = bases.get(id)
    return False


@contextmanager
def _logged(name: str) -> Iterator[None]:
    """One leftover that resists must not keep the store from opening."""
    try:
        yield
    except (StoreError, OSError) as error:
        log.warning("%s could not be cleaned up and is tried again at the next open: %s", name, error)
