"""What a build's function receives: the tree to fill, the log, and a way to run programs that end with the build."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import process, trees
from .backend import Backend, Entry
from .caches import Caches, Loan, Mode, locked_here
from .errors import Cancelled, CommandFailed, StoreError
from .log import BuildLog


class Workspace:
    """One build, seen from inside. Valid until the function returns."""

    def __init__(
        self, backend: Backend, entry: Entry, log: BuildLog, cancel: process.Cancel, scratches: Path, caches: Caches
    ) -> None:
        self._backend, self._entry, self._cancel, self._scratches = backend, entry, cancel, scratches
        self._scratch: Path | None = None  # made when first asked for, as most builds need none
        self._caches = caches
        self._loans: dict[tuple[str, Mode], Loan] = {}
        locked_here()  # one list for all that the function does, in whatever context
        self._ended = False
        self.log = log
        """The build's log: `log.write(b"...")`. What run() prints goes there by itself."""

    @property
    def id(self) -> str:
        """The id that is being built."""
        return self._entry.id

    @property
    def attempt(self) -> str:
        """The nonce of this try."""
        return self._entry.attempt

    @property
    def path(self) -> Path:
        """The tree, a folder of this host. It moves when the build is published: put no absolute path to it into it.

        Raises NotSupported where the backend's trees are not on this host; run() and copy_in() work there too.
        """
        return self._backend.tree(self._entry)

    @property
    def scratch(self) -> Path:
        """A folder outside the tree for what the build needs and the result does not; removed when it ends."""
        self._check()
        self._scratch = self._scratches / self.attempt
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        return self._scratch

    @property
    def cancelled(self) -> bool:
        """Has the last caller gone? A function that works long by itself should look, and return."""
        return self._cancel.is_set()

    def copy_in(self, source: str | os.PathLike[str], dest: str) -> None:
        """Copy a file, link or folder of this host to *dest* in the tree, with its metadata.

        *dest* is relative to the tree; its parents are made; a folder merges into a folder. Raises StoreError for a
        *dest* that would leave the tree, by ``..`` or through a link.
        """
        self._check()
        self._backend.copy_in(self._entry, Path(source), dest)

    def import_image(self, image: str) -> None:
        """Fill the tree, still empty, with what an image of a container runtime holds, where the backend has images.

        Raises NotSupported, or StoreError where there is no such image.
        """
        self._check()
        self._backend.import_image(self._entry, image)

    def cache(self, name: str, mode: Mode = "shared", owner: tuple[int, int] | None = None) -> Path:
        """Borrow a private copy of a cache, a folder outside the tree, until the function returns; see Store.cache().

        It is given back if the function succeeds. Asked for again in the same mode, it is the same copy.
        """
        self._check()
        if (name, mode) not in self._loans:
            self._loans[name, mode] = self._caches.borrow(name, mode, owner, self._cancel.is_set, self.id)
        return self._loans[name, mode].path

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        user: str | int | None = None,
        capture: bool = False,
        check: bool = True,
    ) -> process.Finished:
        """Run a program in the tree; its output goes to the log.

        It, and all it started, is ended before this returns, but for a daemon that leaves its process group: that
        only a sandbox ends.

        The environment is PATH, HOME, TMPDIR and LANG (on Windows what stands for them, and what the system itself
        needs), and *env* over them; HOME and TMPDIR are empty folders outside the tree. *cwd* is relative to the tree.
        *timeout* is in seconds. With *capture* its standard output is returned, not logged. Raises CommandFailed where
        it cannot start, runs out of time or, with *check*, fails; Cancelled when the build is.
        """
        return self._run_under(
            self._cancel, argv, env=env, cwd=cwd, input=input, timeout=timeout, user=user, capture=capture, check=check
        )

    def _run_under(
        self,
        cancel: process.Cancel,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None,
        cwd: str | None,
        input: bytes | None,
        timeout: float | None,
        user: str | int | None,
        capture: bool,
        check: bool,
    ) -> process.Finished:
        """As run(), but *cancel* ends the program, and not the build. Raises Cancelled then."""
        self._check()
        with self._homes(user) as homes:
            words = [os.fspath(word) for word in argv]
            merged = {**process.environment(*homes), **(env or {})}
            command = self._backend.command(self._entry, words, merged, cwd, user)
            try:
                done = process.run(
                    command,
                    output=self.log.write,
                    input=input,
                    timeout=timeout,
                    cancelled=cancel,
                    capture=capture,
                )
            except process.Interrupted:
                raise Cancelled(self.id, self.attempt) from None
        if check and done.returncode != 0:
            raise CommandFailed(words, done.returncode, process.ending(done.returncode))
        return done

    def end(self, *, give_back: bool = False) -> None:
        """Refuse whatever a thread that outlives the function still asks for, and remove all but the tree. Idempotent.

        With *give_back*, give back what was borrowed first. Raises Cancelled, or StoreError where that fails.
        """
        if give_back:
            self._check()  # a function that is cancelled may have returned in the middle of its work
            for loan in self._loans.values():
                loan.give_back()
        self._ended = True
        while self._loans:
            self._loans.popitem()[1].drop()
        if self._scratch:
            trees.remove(self._scratch)

    def _check(self) -> None:
        if self._ended:
            raise StoreError(f"the build of {self.id!r} has ended; its workspace cannot be used any more")
        if self.cancelled:
            raise Cancelled(self.id, self.attempt)

    @contextmanager
    def _homes(self, user: str | int | None) -> Iterator[tuple[str, str]]:
        """HOME and TMPDIR of a command."""
        if inside := self._backend.home:
            yield inside, inside
            return
        if user is None:
            home, tmp = self.scratch / "home", self.scratch / "tmp"
            home.mkdir(exist_ok=True)
            tmp.mkdir(exist_ok=True)
            yield str(home), str(tmp)
            return
        # The store's root is closed to every other user, so theirs lies outside.
        folder = tempfile.mkdtemp(prefix="storebackends-")
        try:
            process.give_to(folder, user)
            yield folder, folder
        finally:
            trees.remove(Path(folder))
