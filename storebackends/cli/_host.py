"""Commands on this host: its configuration, its plugins, and what works here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from storebackends.errors import ConfigError, NotSupported, StoreError

from ._common import FilePath, as_json, example, fail, print_json, printable

if TYPE_CHECKING:
    from pathlib import Path

    from storebackends.backend import Support
    from storebackends.config import Config, StoreConfig
    from storebackends.registry import Registry


@click.group(epilog=example("storebackends config check"))
def config() -> None:
    """Look at this host's configuration."""


@config.command(epilog=example("STOREBACKENDS_CONFIG=new.toml storebackends config check"))
def check() -> None:
    """Report all that is wrong with the configuration."""
    from storebackends.config import load

    loaded = load()
    where = loaded.source or "there is no file, so the defaults hold"
    names = ", ".join(f"{name} (the default)" if name == loaded.default else name for name in loaded.stores)
    click.echo(printable(f"{where}: good; stores: {names}"))


@config.command("show", epilog=example("storebackends config show > config.toml"))
@as_json
def show_config(as_json: bool) -> None:
    """Print the configuration as TOML, with every default filled in."""
    from storebackends.config import load, places

    shown = load().show()
    if as_json:
        print_json(shown)
        return
    source = shown.pop("source") or f"no file; looked for {', '.join(map(str, places()))}"
    click.echo(printable(f"# {source}"))
    stores = shown.pop("stores")
    for name, table in {"": shown, **{f"stores.{json.dumps(name)}": table for name, table in stores.items()}}.items():
        if name:
            click.echo(f"\n[{name}]")
        for key, value in table.items():
            if value is not None:
                click.echo(f"{key} = {_toml(value)}")


def _toml(value: object) -> str:
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items() if item is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value).replace("\x7f", "\\u007f")  # the one character that JSON leaves as it is and TOML does not


@click.command(epilog=example("storebackends plugins --json"))
@as_json
def plugins(as_json: bool) -> None:
    """List the plugins that are installed, and what each is for."""
    from storebackends.registry import Registry

    registry = Registry()
    specs = registry.specs()
    facts = []
    for name in registry.names():
        spec = specs.get(name)
        kind = "listener" if spec is None else "broken" if isinstance(spec, StoreError) else "backend"
        summary = "" if spec is None else str(spec) if isinstance(spec, StoreError) else spec.summary
        facts.append({"name": name, "distribution": registry.distribution(name), "kind": kind, "summary": summary})
    if as_json:
        print_json(facts)
        return
    for fact in facts:
        click.echo(printable("{name:12} {kind:9} {distribution}: {summary}".format(**fact)))


@click.command(epilog=example("storebackends doctor --path /srv"))
@click.option("--path", type=FilePath(), help="Ask for stores in this folder, instead of the default one's.")
@as_json
def doctor(path: Path | None, as_json: bool) -> None:
    """Tell which backends can be used on this host, and if not, why and what would help; and try the stores.

    It also tells which one a new store of backend "auto" would get.

    Ends with 3 where a configured store cannot be opened, and with 2 where the configuration is wrong.
    """
    from pathlib import Path

    from storebackends.config import load
    from storebackends.registry import Registry
    from storebackends.sandbox import why_not

    registry = Registry()
    loaded: Config | None = None
    problem = ""
    try:
        loaded = load()
    except ConfigError as error:
        problem = str(error)
    # Where the backend has to say where its store is, what it says is asked for below.
    folder = path or (loaded and loaded.store().path) or Path.cwd()
    backends = registry.supports(folder.absolute())
    auto = _auto(backends)
    stores = {name: _try(registry, store) for name, store in loaded.stores.items()} if loaded else {}
    bwrap = why_not()
    if as_json:
        answers = {name: asdict(support) for name, support in backends.items()}
        facts = {"folder": str(folder), "backends": answers, "auto": auto, "configuration": problem, "stores": stores}
        print_json({**facts, "bubblewrap": bwrap})
    else:
        _report(folder, backends, auto, bwrap, stores)
    if problem:
        fail(problem, 2)
    if broken := [name for name, answer in stores.items() if answer["problem"]]:
        fail(f"cannot be used: {', '.join(broken)}", 3)


def _auto(backends: Mapping[str, Support]) -> str | None:
    from storebackends.registry import best

    try:
        return best(backends)
    except NotSupported:
        return None


def _try(registry: Registry, store: StoreConfig) -> dict[str, object]:
    """Can it be opened? One that was not made yet is not made for that."""
    from storebackends.marker import NAME
    from storebackends.opening import open_store
    from storebackends.registry import best, probe

    facts: dict[str, object] = {"backend": store.backend, "path": str(store.path or ""), "made": False, "problem": ""}
    try:
        folder = store.folder()
        facts["path"] = str(folder)
        if os.path.exists(folder / NAME):
            facts["made"] = True
            with open_store(store.name) as opened:
                facts["backend"] = opened.backend
        elif store.spec is None:
            facts["backend"] = f"{store.backend}: {best(registry.supports(folder))}"
        elif not (support := probe(store.spec, folder)).usable:
            facts["problem"] = f"{support.reason}; {support.fix}"
    except StoreError as error:
        facts["problem"] = str(error)
    return facts


def _report(
    folder: Path, backends: Mapping[str, Support], auto: str | None, bwrap: str, stores: dict[str, dict[str, object]]
) -> None:
    click.echo(printable(f"Backends, for a store in {folder}:"))
    for name, support in backends.items():
        _verdict(name, support.usable, support.reason, support.fix)
    _verdict("auto", auto is not None, f"means {auto}" if auto else "none offers itself", "")
    click.echo("Sandbox:")
    _verdict("bubblewrap", not bwrap, bwrap, "")
    click.echo("Stores:")
    for name, answer in stores.items():
        state = answer["path"] if answer["made"] else f"{answer['path']}, made when it is first used"
        _verdict(name, not answer["problem"], answer["problem"] or state, "")


def _verdict(name: str, good: bool, reason: object, fix: object) -> None:
    text = "; ".join(str(part) for part in (reason, fix) if part)
    click.echo(printable(f"  {'ok ' if good else 'NO '} {name}{': ' if text else ''}{text}"))


@click.command("_sync", hidden=True, epilog=example("storebackends _sync /srv/builds"))
@click.argument("root", type=FilePath())
def sync(root: Path) -> None:
    """Bring what is in the store at ROOT to the disk; started by other commands as they end."""
    from storebackends.opening import sync

    sync(root)
