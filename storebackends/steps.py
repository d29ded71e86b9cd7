"""Running a recipe: each step becomes a build under an id that digests all that it depends on.

    step-HEX = digest of   the id it starts from (a result of the store by its attempt too),
                           what it copies, its commands, environment, folder and names of secrets,
                           where its caches are, the sandbox, the operating system and the architecture

So a step is built once for all recipes that have it, whatever they call it, and again when anything above changes: the
step itself or one before it. The digests are known before anything is built, which makes `plan` cheap.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import sandbox, trees
from .backend import Capability
from .errors import Cancelled, CommandFailed, RecipeError, StoreError, explained
from .log import BuildLog
from .recipe import Copy, Recipe, Secret, Step
from .results import Result
from .sources import gather, naming
from .store import Store
from .workspace import Workspace

log = logging.getLogger(__name__)

_FORMAT = 1
"""Part of every id: raised when the same step comes to mean another tree."""
_WAY = "use a path below ~, or one in the tree"


@dataclass(frozen=True, slots=True)
class Planned:
    """A step, and the id that its tree has or will have. *digests* has one for each copy from the source folder."""

    step: Step
    id: str
    base: str | None
    sandbox: sandbox.Kind
    digests: Sequence[str | None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step that is done; its tree is leased until the run ends. *warnings* are sentences, of a step built now."""

    planned: Planned
    result: Result
    seconds: float
    warnings: Sequence[str]


class Watcher:
    """Is told how a run goes, in the thread that runs it. Override what is of interest."""

    def started(self, planned: Planned) -> None:
        """A step is next: it will be built, or is there already."""

    def running(self, planned: Planned, log: BuildLog) -> None:
        """It is not there already: it is being built, and *log* can be followed."""

    def ended(self, planned: Planned, outcome: str, seconds: float) -> None:
        """It is done: built, hit, attached, failed or cancelled. After the last two no step follows."""


def plan(store: Store, recipe: Recipe, targets: Sequence[str] = ()) -> Sequence[Planned]:
    """The steps that *targets* take (with none: all), in the order they would be built in, each with its id.

    Reads every file to be copied and builds nothing. Raises RecipeError with all that is missing, and NotSupported
    where bubblewrap is asked for and cannot be had.
    """
    with ExitStack() as leases:
        return _plan(store, recipe, targets, leases)


@contextmanager
def run_recipe(
    store: Store, recipe: Recipe, targets: Sequence[str] = (), watcher: Watcher | None = None
) -> Iterator[Sequence[StepResult]]:
    """Build the steps that *targets* take (with none: all), one after the other; their leases end with the context.

    Raises what `plan` does before anything is built, and BuildFailed or Cancelled from the first step that fails: the
    steps before it are kept, those after it are not tried.
    """
    with ExitStack() as leases:
        planned = _plan(store, recipe, targets, leases)
        run = _Run(store, recipe, watcher or Watcher())
        run.check_secrets(planned)
        for step in planned:
            leases.enter_context(run.build(step).result)
        yield list(run.done.values())


def _plan(store: Store, recipe: Recipe, targets: Sequence[str], leases: ExitStack) -> Sequence[Planned]:
    # Bubblewrap needs the tree on this host; a backend that keeps it elsewhere has its own way of running a command.
    on_host = Capability.HOST_TREE in store.capabilities and not store.contained
    kind = sandbox.choose(recipe.sandbox) if on_host else "host"
    planner = _Planner(store, recipe, kind, leases)
    for step in recipe.needed(targets):
        planner.add(step)
    if planner.problems:
        raise RecipeError(str(recipe.path), planner.problems)
    return list(planner.planned.values())


class _Planner:
    """Gives each step its id. Goes on after a problem, to find the others."""

    def __init__(self, store: Store, recipe: Recipe, kind: sandbox.Kind, leases: ExitStack) -> None:
        self._store, self._recipe, self._kind, self._leases = store, recipe, kind, leases
        self.planned: dict[str, Planned] = {}
        self.problems: list[str] = []

    def add(self, step: Step) -> None:
        """Plan *step*, after those it needs."""
        self.problems += _misplaced(step, self._kind)
        digests = [None if copy.step else self._digest(step, number, copy) for number, copy in enumerate(step.copies)]
        facts = {
            "format": _FORMAT,
            "base": self._base(step),
            "copies": [self._copied(copy, digest) for copy, digest in zip(step.copies, digests, strict=True)],
            "commands": [step.argv(command) for command in step.commands],
            "env": dict(step.env),
            "workdir": step.workdir,
            "secrets": sorted(secret.name for secret in step.secrets),
            "caches": sorted(cache.path for cache in step.caches),  # not what is in them: that makes it faster, at most
            "sandbox": self._kind,
            "network": step.network,
            "system": sys.platform,
            "machine": platform.machine(),
        }
        id = f"step-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}"
        base = self.planned[step.step].id if step.step else step.base
        self.planned[step.name] = Planned(step, id, base, self._kind, digests)

    def _base(self, step: Step) -> Sequence[str]:
        if step.step:
            return [self.planned[step.step].id]
        if step.base is None:
            return []
        if (result := self._store.result(step.base)) is None:
            reason = f"there is no result {step.base!r} in the store; 'storebackends import' makes one"
            self.problems.append(f"steps.{step.name}.from: {reason}")
            return []
        self._leases.enter_context(result)  # what is digested must be what is built on
        return [step.base, result.attempt]

    def _digest(self, step: Step, number: int, copy: Copy) -> str | None:
        try:
            return gather(self._recipe.source, copy.source, copy.exclude)
        except StoreError as error:
            self.problems.append(f"steps.{step.name}.copy.{number}: {error}")
            return None

    def _copied(self, copy: Copy, digest: str | None) -> Sequence[object]:
        if copy.step is None:
            return [digest, copy.dest]
        return [self.planned[copy.step].id, copy.source, copy.exclude, copy.dest]


class _Run:
    """One run of a recipe: what it is told to, and what it has done so far."""

    def __init__(self, store: Store, recipe: Recipe, watcher: Watcher) -> None:
        self._store, self._recipe, self._watcher = store, recipe, watcher
        self.done: dict[str, StepResult] = {}

    def check_secrets(self, planned: Sequence[Planned]) -> None:
        """Read the secrets that will be needed, so that none is found missing after an hour of building."""
        problems = []
        for step in planned:
            if not step.step.secrets or self._is_kept(step.id):
                continue
            for secret in step.step.secrets:
                try:
                    _read(secret)
                except StoreError as error:
                    problems.append(f"steps.{step.step.name}.secrets.{secret.name}: {error}")
        if problems:
            raise RecipeError(str(self._recipe.path), problems)

    def build(self, planned: Planned) -> StepResult:
        """Build one step, or find it built; the watcher is told."""
        warnings: list[str] = []
        started, outcome = time.monotonic(), "failed"
        self._watcher.started(planned)
        try:
            result = self._store.build(planned.id, lambda work: self._fill(work, planned, warnings), planned.base)
            outcome = result.outcome
        except (Cancelled, KeyboardInterrupt, SystemExit):
            outcome = "cancelled"
            raise
        except StoreError as error:
            error.add_note(f"in step {planned.step.name!r} of {self._recipe.path}")
            raise
        finally:
            self._watcher.ended(planned, outcome, time.monotonic() - started)
        done = self.done[planned.step.name] = StepResult(planned, result, time.monotonic() - started, warnings)
        return done

    def _is_kept(self, id: str) -> bool:
        result = self._store.result(id)
        if result:
            result.release()
        return result is not None

    def _fill(self, work: Workspace, planned: Planned, warnings: list[str]) -> None:
        started_ns = time.time_ns()
        self._watcher.running(planned, work.log)
        for copy, digest in zip(planned.step.copies, planned.digests, strict=True):
            self._copy(work, copy, digest, started_ns)
        if planned.step.commands:
            self._run(work, planned)
        if planned.sandbox == "host" and Capability.HOST_TREE in self._store.capabilities and not self._store.contained:
            # A second earlier: the clock of a file system lags behind ours.
            warnings += _warnings(planned.step, naming(work.path, work.path, started_ns - 10**9))

    def _copy(self, work: Workspace, copy: Copy, digest: str | None, time_ns: int) -> None:
        top = self.done[copy.step].result.path if copy.step else self._recipe.source
        work.log.write(f"copy {copy.source} -> {copy.dest}\n".encode())
        stage = work.scratch / "copy"
        if gather(top, copy.source, copy.exclude, stage, time_ns) != digest and digest is not None:
            raise RecipeError(str(self._recipe.path), [f"{copy.source} changed while it was copied; build again"])
        work.copy_in(stage, copy.dest)
        trees.remove(stage)

    def _run(self, work: Workspace, planned: Planned) -> None:
        step = planned.step
        caches = {}
        for cache in sorted(step.caches, key=lambda cache: cache.name):  # in one order: a locked one may be waited for
            work.log.write(f"cache {cache.name} -> {cache.path}\n".encode())
            caches[cache.path] = work.cache(cache.name, cache.mode)
        deadline = None if step.timeout is None else time.monotonic() + step.timeout
        with _secrets(step.secrets, work.scratch) as secrets:
            for command in step.commands:
                shown = command if isinstance(command, str) else shlex.join(command)
                work.log.write(f"$ {shown}\n".encode())
                with _placed(work, planned.sandbox, caches) as binds:
                    argv, cwd, env = self._call(work, planned, step.argv(command), secrets, binds)
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    try:
                        work.run(argv, cwd=cwd, env=env, timeout=left)
                    except CommandFailed as error:  # of the shell or of bubblewrap, which are not what the user wrote
                        raise CommandFailed([textwrap.shorten(shown, 80)], error.returncode, error.reason) from None

    def _call(
        self, work: Workspace, planned: Planned, argv: Sequence[str], secrets: Path | None, binds: Mapping[str, Path]
    ) -> tuple[Sequence[str], str | None, Mapping[str, str]]:
        """What to run, in which folder of the tree and in which environment, for *argv* to run in the sandbox."""
        step = planned.step
        if planned.sandbox == "host":
            return argv, step.workdir, {**step.env, **({"SECRETS": str(secrets)} if secrets else {})}
        inside = sandbox.bwrap(
            argv,
            tree=work.path,
            tmp=_tmp(work),
            cwd=step.workdir,
            network=step.network,
            secrets=secrets,
            caches=binds,
            # A recipe may well use the Python we run in, as our own does, and that may be below /tmp.
            show=[self._recipe.source, Path(sys.prefix), Path(sys.base_prefix)],
            hide=[self._store.root],
        )
        homes = {"HOME": f"{sandbox.TMP}/home", "TMPDIR": sandbox.TMP}
        return inside, None, {**homes, **step.env, **({"SECRETS": sandbox.SECRETS} if secrets else {})}


def _tmp(work: Workspace) -> Path:
    """The folder that is /tmp in the sandbox, and has the home folder in it."""
    tmp = work.scratch / "inside"
    (tmp / "home").mkdir(parents=True, exist_ok=True)
    tmp.chmod(0o1777)  # programs that drop root's rights expect it
    return tmp


def _misplaced(step: Step, kind: sandbox.Kind) -> Iterator[str]:
    for number, path in enumerate(cache.path for cache in step.caches):
        where = f"steps.{step.name}.cache.{number}.path"
        if path.startswith("/") and kind == "host":
            yield f"{where}: {path} would be the host's own, as there is no sandbox; {_WAY}"
        elif path.startswith("/") and os.path.lexists(f"/{path.split('/')[1]}") and not os.path.isdir(path):
            yield f"{where}: there is no folder {path} on this host, and the sandbox cannot make one in it; {_WAY}"


@contextmanager
def _placed(work: Workspace, kind: sandbox.Kind, caches: Mapping[str, Path]) -> Iterator[Mapping[str, Path]]:
    """Have each cache at its path while a command runs, and nothing of it there afterwards.

    On the host by a link; for bubblewrap there is a folder to cover, and what comes out is what to bind where. The way
    there may be anything that an earlier command left, so no link on it is followed.
    """
    binds: dict[str, Path] = {}
    with ExitStack() as undo:
        for path, cache in caches.items():
            if path.startswith("/"):
                binds[path] = cache
                continue
            root, at, relative = work.path, sandbox.TREE, path
            if path.startswith("~/"):
                root, at, relative = (work.scratch if kind == "host" else _tmp(work)), sandbox.TMP, f"home/{path[2:]}"
            _place(work, root, relative, cache if kind == "host" else None, undo)
            if kind == "bwrap":
                binds[f"{at}/{relative}"] = cache
        yield binds


def _place(work: Workspace, root: Path, relative: str, link: Path | None, undo: ExitStack) -> None:
    """Have a link to *link*, or a folder, at *relative* in *root*."""
    names = relative.split("/")
    ways = ["/".join(names[: number + 1]) for number in range(len(names))]
    missing = [way for way in ways if not os.path.lexists(root / way)]
    if link and relative not in missing:
        raise StoreError(f"there is a {relative!r} where the step has a cache; remove it, or use another path")
    undo.callback(_unplace, root, missing, link)
    if not missing:
        trees.resolve_inside(root, relative)
        return
    with tempfile.TemporaryDirectory(dir=work.scratch) as folder:
        new = Path(folder, "new")
        if link:
            new.symlink_to(link, target_is_directory=True)
        else:
            trees.create(new)
        trees.copy_into(new, root, relative)


def _unplace(root: Path, made: Sequence[str], link: Path | None) -> None:
    """Remove what _place() made; not what a command put there instead, or into those folders."""
    for relative in reversed(made):
        parent, _, name = relative.rpartition("/")
        with suppress(StoreError):  # the parent is no folder any more
            path = trees.resolve_inside(root, parent or ".") / name
            if not path.is_symlink():
                with suppress(OSError):
                    path.rmdir()
            elif os.readlink(path).removeprefix("\\\\?\\") == str(link):  # Windows adds that
                path.unlink()


def _warnings(step: Step, names: Sequence[str]) -> Iterator[str]:
    if names:
        warning = (
            f"step {step.name!r}: {', '.join(names)} hold the path that the tree had while it was built, and it has "
            'another now; with sandbox = "bwrap" it is always at one path'
        )
        log.warning("%s", warning)
        yield warning


@contextmanager
def _secrets(secrets: Sequence[Secret], scratch: Path) -> Iterator[Path | None]:
    """A folder that holds the secrets for as long as the context is open. In scratch: a crash's is removed, too."""
    if not secrets:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="secrets-", dir=scratch) as folder:
        for secret in secrets:
            path = Path(folder, secret.name)
            path.touch(0o600)
            path.write_bytes(_read(secret))
        yield Path(folder)


def _read(secret: Secret) -> bytes:
    if secret.env is not None:
        if (value := os.environ.get(secret.env)) is None:
            raise StoreError(f"the variable {secret.env} is not set; set it to the secret")
        return os.fsencode(value)
    assert secret.file is not None  # noqa: S101 (one of the two is there)
    with explained("reading the secret", secret.file):
        return secret.file.read_bytes()
