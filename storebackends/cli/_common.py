"""What several commands share: the store they work on, ids cut short, and how things are shown."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from storebackends.errors import CommandFailed, NotFound, StoreError

if TYPE_CHECKING:
    from storebackends.store import Store

T = TypeVar("T")

# What moves a terminal's cursor, changes its state or the direction of its text, or cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = 10

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")


def fail(message: str, exit_code: int) -> NoReturn:
    """End the command, with a message on stderr."""
    click.echo(f"storebackends: {printable(message)}", err=True)
    raise click.exceptions.Exit(exit_code)


class FilePath(click.Path):
    """click.Path for a Path, without pathlib until there is one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pathlib import Path

        return Path(os.fsdecode(super().convert(value, param, ctx)))


def example(*lines: str) -> str:
    """The epilogue of a command's help."""
    return "\b\n" + "\n".join(["Examples:" if len(lines) > 1 else "Example:", *(f"  {line}" for line in lines)])


def with_store(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the option --store, and the open store as its first argument."""

    @click.option("--store", "store_name", metavar="NAME", help="The store to use.")
    @functools.wraps(command)
    def wrapped(*args: Any, store_name: str | None, **options: Any) -> T:
        with _open(store_name or click.get_current_context().obj) as store:
            return command(store, *args, **options)

    return wrapped


def _open(name: str | None) -> Store:
    from storebackends.opening import open_store, sync
    from storebackends.process import detach

    def hand_over() -> None:
        try:
            # -P: what lies in the current folder must not be imported.
            detach([sys.executable, "-P", "-m", "storebackends", "_sync", str(store.root)])
        except CommandFailed:
            sync(store.root)

    store = open_store(name, detach_barrier=hand_over)
    return store


def find(store: Store, text: str, more: Iterable[str] = ()) -> str:
    """The id that *text* is, or the only one it begins, among the results and *more*. Raises InvalidId, NotFound."""
    with suppress(StoreError):
        store.record(text)
        return text
    found = {id for ids in (store.ids(), more) for id in ids if text and id.startswith(text)}
    if text in found:
        return text
    if len(found) > 1:
        some = ", ".join(sorted(found)[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
        raise click.UsageError(f"{text!r} may be any of {len(found)} ids: {some}")
    if not found:
        from storebackends.ids import check_id

        raise NotFound(check_id(text))
    return found.pop()


def printable(text: str) -> str:
    """*text* with all that could play tricks on a terminal spelled out; lines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def facts(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass and their values."""
    from dataclasses import asdict

    return asdict(thing)


def print_json(value: object) -> None:
    """One JSON value, on one line."""
    sys.stdout.write(json.dumps(value) + "\n")


def print_facts(facts: dict[str, str]) -> None:
    """Names and values, in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:{width}}  {printable(value)}")


def human_size(size: int) -> str:
    """12.3 MiB"""
    value, units = float(size), iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = "B"
    while value >= 1024 and (larger := next(units, None)):
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def human_time(seconds: float) -> str:
    """A point in time, in the local zone."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
