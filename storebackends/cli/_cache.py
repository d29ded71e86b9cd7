"""Commands on a store's caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from storebackends.errors import NotFound

from ._common import as_json, example, facts, human_size, human_time, print_json, with_store

if TYPE_CHECKING:
    from storebackends.store import Store


@click.group(epilog=example("storebackends cache ls"))
def cache() -> None:
    """Look at the caches that builds share, and remove them."""


@cache.command("ls", epilog=example("storebackends cache ls --json | jq -r 'select(.borrowers == []).name'"))
@as_json
@with_store
def ls_caches(store: Store, as_json: bool) -> None:
    """List the caches, as NAME SIZE LAST-USED, with who has borrowed them now.

    Each is measured, which may take long. With --json there is one JSON object on each line.
    """
    for info in store.caches():
        if as_json:
            print_json(facts(info))
        else:
            size = human_size(info.size.bytes)
            lent = f"  lent to {', '.join(f'pid {pid}' for pid in info.borrowers)}" if info.borrowers else ""
            click.echo(f"{info.name:40} {size:>10} {human_time(info.last_used)}{lent}")


@cache.command("rm", epilog=example("storebackends cache rm pip ccache"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@with_store
def rm_caches(store: Store, names: tuple[str, ...]) -> None:
    """Remove caches, by their full names. One that is lent is refused."""
    for name in names:
        if not store.delete_cache(name):
            raise NotFound(name, f"there is no cache {name!r}; 'storebackends cache ls' lists those there are")
