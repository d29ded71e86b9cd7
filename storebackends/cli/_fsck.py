"""Checking a store, and repairing it."""

from __future__ import annotations

import click

from ._common import as_json, example, facts, fail, print_json, printable


@click.command(epilog=example("storebackends fsck", "storebackends fsck --repair --content --sample 100"))
@click.option("--store", "name", metavar="NAME", help="The store to check.")
@click.option("--repair", is_flag=True, help="Mend what can be mended; what is damaged moves to quarantine/.")
@click.option("--content", is_flag=True, help="Read the trees whose digest was kept, and compare.")
@click.option("--sample", metavar="N", type=click.IntRange(min=1), help="Compare N results only, chosen at random.")
@click.option("--seed", metavar="N", type=int, help="Choose the same sample again.")
@as_json
@click.pass_context
def fsck(
    ctx: click.Context,
    name: str | None,
    repair: bool,
    content: bool,
    sample: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Hold the disk against the index, the locks and the mounts, and report what does not fit.

    Safe while builds run. Files that storebackends did not make are reported and never removed. Ends with 3 where a
    problem is left.
    """
    from storebackends.opening import open_store

    if sample is not None and not content:
        raise click.UsageError("--sample chooses what --content reads: give both")
    # What a crash left is to be told here, not swept up in silence by opening the store.
    with open_store(name or ctx.obj, recover=False) as store:
        report = store.fsck(repair=repair, content=content, sample=sample, seed=seed)
    if as_json:
        print_json({**facts(report), "is_clean": report.is_clean})
    else:
        for finding in report.findings:
            end = " (repaired)" if finding.repaired else ""
            click.echo(printable(f"{finding.kind}: {finding.what}: {finding.problem}{end}"))
        compared = f", {report.compared} of them compared" if content else ""
        lacking = f" ({report.without_digest} have no digest)" if report.without_digest else ""
        chosen = "" if report.seed is None else f"; --seed {report.seed} chooses the same"
        click.echo(f"{report.results} results checked{compared}{lacking}; {len(report.findings)} findings{chosen}")
    if not report.is_clean:
        fail("problems are left" + ("" if repair else "; --repair mends what it can"), 3)
