"""Snapshots that no entry names: what a result is read through, for as long as a process does.

    ROOT/containerd/views/NONCE    its record, claimed by the process that uses it
    ROOT/containerd/mounts/NONCE   where it is mounted

A record that nobody claims is of a process that died.
"""

from __future__ import annotations

import sys

assert sys.platform == "linux"  # noqa: S101 (tells the type checker to skip the rest elsewhere)

import logging  # noqa: E402
import os  # noqa: E402
import secrets  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import ExitStack, contextmanager, suppress  # noqa: E402
from pathlib import Path  # noqa: E402

from storebackends.plugin import StoreError  # noqa: E402

from .claims import Life  # noqa: E402
from .records import Tree  # noqa: E402

log = logging.getLogger(__name__)


class Views:
    """Those of one open store. In a forked child what the parent shows stays as it is, and nothing new can be shown."""

    def __init__(
        self, folder: Path, show: Callable[[Tree, Path, bool], Path], reclaim: Callable[[Tree, Path], None]
    ) -> None:
        """*show* makes and mounts a snapshot, writable or not; *reclaim* unmounts and removes it, idempotently."""
        self._folder, self._show, self._reclaim, self._pid = folder, show, reclaim, os.getpid()
        self._mutex = threading.RLock()  # re-entrant, since a result is also released by the garbage collector
        self._shared: dict[str, _Shared] = {}

    @contextmanager
    def shared(self, parent: str) -> Iterator[Path]:
        """The tree of the committed snapshot *parent*, read-only: one mount for all who read it in this process."""
        self._check()
        with self._mutex:
            view = self._shared.get(parent) or self._shared.setdefault(parent, _Shared())
            view.users += 1
        try:
            with view.lock:
                if view.path is None:
                    view.path = view.held.enter_context(self.own(parent))
            yield view.path
        finally:
            if self._pid == os.getpid():
                self._leave(parent, view)

    @contextmanager
    def own(self, parent: str | None, writable: bool = False) -> Iterator[Path]:
        """A snapshot made of *parent*, or an empty one, mounted for the length of the block."""
        self._check()
        tree = Tree(secrets.token_hex(8), parent)
        life = self._begin(tree)
        try:
            yield self._show(tree, self._folder / tree.nonce, writable)
        finally:
            if self._pid == os.getpid():
                with life:
                    self._end(tree, self._folder / tree.nonce)

    def sweep(self) -> None:
        """Reclaim what dead processes left. Never waits for a live one."""
        for name in os.listdir(self._folder):
            record = self._folder / name
            try:
                fd = os.open(record, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:  # ended meanwhile, or nothing of ours
                continue
            with Life(fd) as life:
                if life.claim():
                    self._end(Tree.load(record), record)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise StoreError("the store was opened before fork(): open it again in the child")

    def _leave(self, parent: str, view: _Shared) -> None:
        with self._mutex:
            view.users -= 1
            last = view.users == 0
            if last and self._shared.get(parent) is view:
                del self._shared[parent]
        if last:
            with view.lock:
                view.held.close()

    def _begin(self, tree: Tree) -> Life:
        """Have the record of *tree* there, claimed before it has its name."""
        hidden = self._folder / f".{tree.nonce}"
        while True:
            life = Life(os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            try:
                if life.claim():
                    life.write(tree.dump())
                    os.rename(hidden, self._folder / tree.nonce)
                    return life
            except FileNotFoundError:  # somebody who sweeps was between the two
                pass
            except BaseException:
                life.close()
                raise
            life.close()

    def _end(self, tree: Tree | None, record: Path) -> None:
        try:
            if tree:
                self._reclaim(tree, record)
            with suppress(FileNotFoundError):
                record.unlink()
        except (OSError, StoreError) as error:
            log.warning("%s is removed at the next open: %s", record, error)


class _Shared:
    """One mount, and how many use it."""

    def __init__(self) -> None:
        self.users, self.lock, self.held = 0, threading.RLock(), ExitStack()
        self.path: Path | None = None
