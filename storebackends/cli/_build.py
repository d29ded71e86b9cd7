"""Commands that build: a recipe, one command, or a first base."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from storebackends.errors import Cancelled, StoreError

from ._common import FilePath, as_json, example, find, print_json, with_store
from ._progress import Progress, choose

if TYPE_CHECKING:
    from pathlib import Path

    from storebackends.log import BuildLog
    from storebackends.recipe import Recipe
    from storebackends.steps import Planned, StepResult, Watcher
    from storebackends.store import Store
    from storebackends.workspace import Workspace

quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but the id.")


@click.command(
    epilog=example(
        "storebackends build recipe.toml",
        "storebackends build recipe.toml wheel --set PYTHON=python3.12",
        "storebackends result $(storebackends build -q recipe.toml wheel)",
    )
)
@click.argument("recipe", type=FilePath(exists=True, dir_okay=False))
@click.argument("targets", metavar="[STEP]...", nargs=-1)
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Set one of the recipe's args.")
@click.option(
    "--source",
    type=FilePath(exists=True, file_okay=False),
    help="The folder that copies come from, instead of the recipe's.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only tell which steps are there already, and which would run.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the ids of the steps asked for.")
@as_json
@with_store
def build(
    store: Store,
    recipe: Path,
    targets: tuple[str, ...],
    settings: tuple[str, ...],
    source: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build the steps of RECIPE, or those that the STEPs take; what was built before is not built again.

    On a terminal the running step is shown live; elsewhere, what happens and the logs come line by line.
    """
    from storebackends.recipe import load

    loaded = load(recipe, _settings(settings), source)
    if dry_run:
        _show_plan(store, loaded, targets, as_json)
    else:
        _build(store, loaded, targets, quiet, as_json)


def _settings(settings: tuple[str, ...]) -> dict[str, str]:
    if wrong := [setting for setting in settings if "=" not in setting]:
        raise click.BadParameter(f"{wrong[0]!r} is not of the form NAME=VALUE", param_hint="--set")
    return dict(setting.split("=", 1) for setting in settings)


def _show_plan(store: Store, recipe: Recipe, targets: tuple[str, ...], as_json: bool) -> None:
    from storebackends.steps import plan

    present = set(store.ids())
    facts = [
        {"step": planned.step.name, "id": planned.id, "base": planned.base, "cached": planned.id in present}
        for planned in plan(store, recipe, targets)
    ]
    if as_json:
        print_json(facts)
        return
    for fact in facts:
        click.echo(f"{fact['step']}: {'cached' if fact['cached'] else 'would be built'} ({fact['id']})")


def _build(store: Store, recipe: Recipe, targets: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    from storebackends.steps import run_recipe

    started = time.monotonic()
    with (
        choose(quiet=quiet, as_json=as_json) as progress,
        run_recipe(store, recipe, targets, _watcher(progress)) as results,
    ):
        took = time.monotonic() - started
    if as_json:
        print_json([_facts(result) for result in results])
    elif quiet:
        ids = {result.planned.step.name: result.planned.id for result in results}
        for name in targets or list(ids)[-1:]:
            click.echo(ids[name])
    else:
        click.echo(progress.summary(took))


def _watcher(progress: Progress) -> Watcher:
    from storebackends.steps import Watcher

    class Watching(Watcher):
        def started(self, planned: Planned) -> None:
            progress.begin(planned.step.name)

        def running(self, planned: Planned, log: BuildLog) -> None:
            progress.follow(log)

        def ended(self, planned: Planned, outcome: str, seconds: float) -> None:
            progress.end(outcome, seconds)

    return Watching()


def _facts(result: StepResult) -> dict[str, object]:
    return {
        "step": result.planned.step.name,
        "id": result.planned.id,
        "base": result.planned.base,
        "outcome": result.result.outcome,
        "seconds": result.seconds,
        "warnings": list(result.warnings),
    }


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=example(
        "storebackends run --base debian-12 --id tools -- make install DESTDIR=.",
        "storebackends run -- sh -c 'date > built'",
    ),
)
@click.argument("command", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--base", metavar="ID", help="Start from a copy of this result, instead of an empty tree.")
@click.option("--id", metavar="ID", help="Keep the tree under this id, instead of one that digests base and command.")
@quiet
@as_json
@with_store
def run(store: Store, command: tuple[str, ...], base: str | None, id: str | None, quiet: bool, as_json: bool) -> None:
    """Run CMD on this host, in a new tree, and keep that under an id if it succeeds.

    The tree is its working folder; its environment is clean. Without --id the same command on the same base is not run
    again.
    """
    base = base and find(store, base)
    id = id or _digest(store, base, command)

    def fn(work: Workspace) -> None:
        work.log.write(f"$ {shlex.join(command)}\n".encode(errors="surrogateescape"))
        work.run(command)

    _build_one(store, id, fn, base, quiet, as_json)


def _digest(store: Store, base: str | None, command: tuple[str, ...]) -> str:
    import hashlib

    facts = [base, base and store.record(base).attempt, command]
    return f"run-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}"


@click.command(
    "import",
    epilog=example(
        "storebackends import rootfs.tar.gz --id debian-12",
        "docker export box | storebackends import - --id box",
        "storebackends import ./rootfs --id local",
        "storebackends --store docker import debian:12 --id debian-12",
    ),
)
@click.argument("source", metavar="DIR|TAR|IMAGE", type=FilePath(allow_dash=True))
@click.option("--id", metavar="ID", required=True, help="Keep the tree under this id.")
@quiet
@as_json
@with_store
def import_(store: Store, source: Path, id: str, quiet: bool, as_json: bool) -> None:
    """Make a first base: a copy of the folder DIR, or what the archive TAR holds ("-": from standard input).

    The archive may be packed by gzip, bzip2 or xz. One with members that would lie outside the tree is refused. What is
    neither is an IMAGE, which stores of some backends take.
    """
    from storebackends.importing import fill, unpack

    def fn(work: Workspace) -> None:
        if str(source) == "-":
            with open(0, "rb", closefd=False) as stdin:
                unpack(work, stdin, "standard input")
        elif source.exists():
            fill(work, source)
        else:
            work.log.write(f"there is no file {source}, so it is taken for an image\n".encode(errors="surrogateescape"))
            work.import_image(source.as_posix())

    if _build_one(store, id, fn, None, quiet, as_json) != "built":
        reason = f"{id!r} was there already, and nothing was imported"
        raise StoreError(f"{reason}; 'storebackends rm {id}' makes room, or choose another id")


def _build_one(
    store: Store, id: str, fn: Callable[[Workspace], None], base: str | None, quiet: bool, as_json: bool
) -> str:
    """Build one id, shown as a recipe of one step; return the outcome."""
    with choose(quiet=quiet, as_json=as_json, live=False) as progress:

        def followed(work: Workspace) -> None:
            progress.follow(work.log)
            fn(work)

        outcome, started = "failed", time.monotonic()
        progress.begin(id)
        try:
            with store.build(id, followed, base) as result:
                outcome = result.outcome
        except (Cancelled, KeyboardInterrupt):
            outcome = "cancelled"
            raise
        finally:
            progress.end(outcome, seconds := time.monotonic() - started)
    if as_json:
        print_json({"id": id, "base": base, "outcome": outcome, "seconds": seconds})
    elif quiet:
        click.echo(id)
    return outcome
