"""Making room, and telling why what goes does, and what stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._common import as_json, example, facts, fail, human_size, print_json, printable, with_store

if TYPE_CHECKING:
    from storebackends.prune import Plan
    from storebackends.store import Store

_SHOWN = 20  # results that stay, each with its reason; --json has all


def _number(_: click.Context, __: click.Parameter, value: str | None) -> int | str | None:
    return int(value) if value and value.isascii() and value.isdigit() else value


@click.command(
    epilog=example("storebackends prune --dry-run --min-free 20%", "storebackends prune --all --keep-for 7d")
)
@click.option("--min-free", metavar="AMOUNT", callback=_number, help="Go on until so much is free: bytes, 10GiB, 15%.")
@click.option("--max-used", metavar="AMOUNT", callback=_number, help="Go on until the results take no more than that.")
@click.option("--max-items", metavar="N", type=click.IntRange(min=0), help="Go on until there are no more results.")
@click.option("--keep-for", metavar="TIME", callback=_number, help="Keep what was used within that time: 12h, 7d.")
@click.option(
    "--all", "everything", is_flag=True, help="All that is not in use; of the rules only those given here hold."
)
@click.option("-n", "--dry-run", is_flag=True, help="Only tell what would go.")
@as_json
@with_store
def prune(
    store: Store,
    min_free: int | str | None,
    max_used: int | str | None,
    max_items: int | None,
    keep_for: int | str | None,
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove the least recently used results until the rules are met: those given here, and the configured ones.

    Nothing in use is removed, nor anything that others are built on before those are. Ends with 3 where a rule cannot
    be met, and says what holds it back.
    """
    plan = store.prune(
        min_free=min_free,
        max_used=max_used,
        max_items=max_items,
        keep_for=keep_for,
        all=everything,
        dry_run=dry_run,
    )
    if as_json:
        print_json({**facts(plan), "freed": facts(plan.freed)})
    else:
        _tell(plan)
    if plan.unmet:
        fail("\n".join(f"not met: {reason}" for reason in plan.unmet), 3)


def _tell(plan: Plan) -> None:
    verb = "would go" if plan.dry_run else "gone"
    for step in plan.steps:
        size = human_size(step.frees.bytes) + ("" if step.frees.exact else " (estimate)")
        click.echo(printable(f"{verb}  {step.id}  {size}  {step.reason}"))
    for kept in plan.kept[:_SHOWN]:
        click.echo(printable(f"stays  {kept.id}  {kept.reason}"))
    if len(plan.kept) > _SHOWN:
        click.echo(f"stays  {len(plan.kept) - _SHOWN} more, each with its reason in --json")
    freed = human_size(plan.freed.bytes) + ("" if plan.freed.exact else " (estimate)")
    click.echo(f"{len(plan.steps)} results {verb}, {freed}; {len(plan.kept)} stay")
