"""Commands on what a store holds: finding, reading and removing results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import click

from storebackends.errors import NotFound, NotSupported, StoreError

from ._common import (
    as_json,
    example,
    facts,
    find,
    human_size,
    human_time,
    print_facts,
    print_json,
    printable,
    with_store,
)

if TYPE_CHECKING:
    from storebackends.records import Record
    from storebackends.store import Store


@click.command(epilog=example("cp -a $(storebackends result app-1)/dist ."))
@click.argument("id")
@as_json
@with_store
def result(store: Store, id: str, as_json: bool) -> None:
    """Print where the tree of ID can be read.

    Do not write to it, and do not count on it after ID was removed.
    """
    id = find(store, id)
    with store.result(id) or _vanished(id) as found:
        record, path = found.record, found.path
    if not path.is_dir():
        raise NotSupported(
            f"telling where {id!r} is",
            "a store of this backend shows a tree for as long as a process holds it, and this one ends",
            f"run a command on it: storebackends run --base {id} -- ...",
        )
    if as_json:
        print_json({**facts(record), "path": str(path)})
    elif sys.stdout.isatty():
        click.echo(printable(str(path)))
    else:
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")


@click.command(epilog=example("storebackends log -f app-2"))
@click.argument("id")
@click.option("-f", "--follow", is_flag=True, help="Go on until the build ends.")
@with_store
def log(store: Store, id: str, follow: bool) -> None:
    """Print the log of ID, byte for byte.

    It is the one of the build under way, else of the result, else of the newest attempt that failed.
    """
    id = find(store, id, _without_result(store))
    out = sys.stdout.buffer
    with store.log(id).tail(follow=follow) as reader:
        for chunk in reader:
            out.write(chunk)
            out.flush()


def _without_result(store: Store) -> Iterator[str]:
    yield from (id for id, _ in store.running())
    yield from store.failures()


@click.command(epilog=example("storebackends ls --json | jq -r 'select(.base == \"tools-7\").id'"))
@click.option("-l", "--long", is_flag=True, help="With each one's base and time, as ID BASE TIME.")
@as_json
@with_store
def ls(store: Store, long: bool, as_json: bool) -> None:
    """List the ids of all results, in no order, as they are found.

    With --json there is one JSON object on each line.
    """
    if not long and not as_json:
        for id in store.ids():
            sys.stdout.write(f"{id}\n")
        return
    for record in _records(store):
        if as_json:
            print_json(facts(record))
        else:
            when = human_time(record.finished or record.started)
            sys.stdout.write(f"{record.id:40} {record.base or '-':40} {when}\n")


def _records(store: Store) -> Iterator[Record]:
    for id in store.ids():
        try:
            yield store.record(id)
        except NotFound:
            continue  # deleted meanwhile
        except StoreError as error:
            click.echo(f"storebackends: {printable(str(error))}", err=True)


@click.command(epilog=example("storebackends tree tools-7"))
@click.argument("id", required=False)
@with_store
def tree(store: Store, id: str | None) -> None:
    """Show what was built on what: all of it, or ID and what was built on it."""
    bases = {record.id: record.base for record in _records(store)}
    children: dict[str, list[str]] = {}
    for child in sorted(bases):
        children.setdefault(bases[child] or "", []).append(child)
    roots = [find(store, id)] if id else [child for child in sorted(bases) if bases[child] not in bases]
    # Not by recursion: chains of builds may be of any length.
    todo = [(root, "", "") for root in reversed(roots)]
    while todo:
        name, lead, below = todo.pop()
        sys.stdout.write(f"{lead}{name}\n")
        here = children.get(name, [])
        ends = [(f"{below}|-- ", f"{below}|   ")] * (len(here) - 1) + [(f"{below}`-- ", f"{below}    ")]
        todo += reversed([(child, *end) for child, end in zip(here, ends, strict=False)])


@click.command(epilog=example("storebackends show app-1"))
@click.argument("id")
@as_json
@with_store
def show(store: Store, id: str, as_json: bool) -> None:
    """Tell what is known of the result ID: its base, its times, its size and what was built on it."""
    id = find(store, id)
    record, size, children = store.record(id), store.size(id), store.children(id)
    if as_json:
        print_json({**facts(record), "size": facts(size), "children": children})
        return
    finished = record.finished or record.started
    print_facts(
        {
            "id": id,
            "attempt": record.attempt,
            "base": f"{record.base}, attempt {record.base_attempt}" if record.base else "-",
            "built": f"{human_time(finished)}, in {finished - record.started:.1f} s",
            "size": human_size(size.bytes) + ("" if size.exact else ", an estimate"),
            "log": human_size(record.log_length or 0),
            "children": ", ".join(children) or "-",
        }
    )


@click.command(epilog=example("storebackends rm -r tools-7"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("-r", "--recursive", is_flag=True, help="And all that was built on it.")
@with_store
def rm(store: Store, ids: tuple[str, ...], recursive: bool) -> None:
    """Remove results. One in use, or with others built on it, is refused."""
    for id in [find(store, id) for id in ids]:  # a wrong one is found before anything is gone
        store.delete(id, recursive=recursive)


@click.command(epilog=example("storebackends df --json"))
@as_json
@with_store
def df(store: Store, as_json: bool) -> None:
    """Show how much space there is below the store."""
    usage = store.usage()
    if as_json:
        print_json({"path": str(store.root), "backend": store.backend, **facts(usage)})
        return
    shown = {
        "store": str(store.root),
        "backend": store.backend,
        "free": f"{human_size(usage.free)} of {human_size(usage.total)}",
    }
    if usage.inodes_total is not None:
        shown["inodes"] = f"{usage.inodes_free} free of {usage.inodes_total}"
    if usage.metadata_total is not None:
        shown["metadata"] = f"{human_size(usage.metadata_free or 0)} free of {human_size(usage.metadata_total)}"
    print_facts(shown)


def _vanished(id: str) -> NoReturn:
    raise NotFound(id)
