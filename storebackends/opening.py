"""Opening a store: by its name in the host's configuration, or spelled out. The one place where all the rooms meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import index
from .backend import Backend, BackendSpec
from .durability import Durability, boot_id
from .errors import ConfigError, PluginError, StoreError, explained
from .events import Deaths, Event, Events, Opened, Recovered
from .locks import Lock, Locks
from .marker import DURABILITIES, Marker, kept_backend, load, prepare
from .recovery import drop_unsynced, recover
from .store import Store

if TYPE_CHECKING:
    from pluggy import HookImpl

    from .config import Config
    from .registry import Registry

VERIFIES = ("none", "digest")
Listeners = Sequence[Callable[[Store, Event], object]]


def open_store(
    name: str | None = None,
    *,
    backend: str | None = None,
    path: str | os.PathLike[str] | None = None,
    durability: str | None = None,
    verify: str | None = None,
    recover: bool = True,
    detach_barrier: Callable[[], None] | None = None,
    **options: Any,
) -> Store:
    """Open a store, making it where there is none, and mend what a crash left in it. Never waits for a live build.

    With a *name*, the one of the host's configuration; with *backend* and *path*, the one spelled out, *options* being
    the backend's own (some backends know by them where the store is, and need no *path*); with neither, the
    configuration's default. The backend "auto" takes no options; it is the best there is for *path*, chosen when the
    store is made. So is *durability*: "group", "full" or "none". *verify* "digest"
    keeps the digest of each tree that is published, for fsck(). With *recover* False what a crash left stays until
    fsck() repairs it. *detach_barrier* is called at close() instead of the last disk barrier, where one is due.

    Raises ConfigError, PluginError, NotSupported with the fix, or StoreError where the folder cannot be used.
    """
    # Here, not above: importing storebackends must not import pydantic.
    from .config import NO_OPTIONS, store_folder, validate_options
    from .config import load as load_config
    from .registry import AUTO, Registry

    registry = Registry()
    listeners: Listeners = ()
    prune = None
    if backend is None and path is None and not options:
        config = load_config()
        found = config.store(name)
        spec, root, model = found.spec, found.folder(), found.options
        if spec is None:
            spec = _chosen(registry, root)
            model = validate_options(spec, {}, f"{config.source}: stores.{found.name}")
        durability, verify, prune = durability or found.durability, verify or found.verify, found.prune
        listeners = _listeners(registry, config)
    elif backend is None or name is not None or (path is None and not _finds_its_folder(registry, backend)):
        raise ConfigError("open_store()", ["give a store's name, or backend= and path= (and options), or nothing"])
    else:
        if backend == AUTO and options:
            raise ConfigError("open_store()", [f"{key}: {NO_OPTIONS}" for key in options])
        given = Path(path).expanduser().absolute() if path else None
        spec = _chosen(registry, given) if backend == AUTO and given else registry.spec(backend)
        model = validate_options(spec, options, "open_store()")
        root = store_folder(spec, given, model)
    for key, value, known in (("durability", durability, DURABILITIES), ("verify", verify, VERIFIES)):
        if value not in (None, *known):
            raise ConfigError("open_store()", [f"{key}: {value!r} is none of {', '.join(known)}"])
    store = _open(root, spec, registry.driver(spec), model, durability, detach_barrier, listeners, recover)
    store.prune_policy, store.verify = prune, verify == "digest"
    return store


def sync(root: Path) -> None:
    """Bring all results of the store in *root* that lack their mark to the disk, and mark them; open nothing else.

    Raises ConfigError where *root* is no store, StoreError where the disk fails.
    """
    marker = load(root)
    with closing(Locks(root / "locks")) as locks, locks.store(exclusive=False):
        durability = Durability(marker.durability, [root], root / "result")
        try:
            durability.flush()
        finally:
            durability.close(flush=False)


def _finds_its_folder(registry: Registry, backend: str) -> bool:
    from .registry import AUTO

    return backend != AUTO and registry.spec(backend).folder is not None


def _chosen(registry: Registry, root: Path) -> BackendSpec:
    """What "auto" means for the store in *root*: what it was made with or, for a new one, what ranks highest there."""
    from .registry import best

    return registry.spec(kept_backend(root) or best(registry.supports(root)))


def _listeners(registry: Registry, config: Config) -> Listeners:
    """The plugins that the configuration lists and that listen; each by itself, so that none can fail the others."""
    for name, options in config.plugin_options.items():
        try:
            registry.hooks([name]).storebackends_use_options(options=options)
        except StoreError:
            raise
        except Exception as error:
            reason = f"its storebackends_use_options() failed with {type(error).__name__}: {error}"
            raise PluginError(name, reason, registry.distribution(name)) from error

    def call(hook: HookImpl, store: Store, event: Event) -> None:
        given = {"store": store, "event": event}
        hook.function(*[given[name] for name in hook.argnames])  # an answer need not take both

    return [partial(call, hook) for hook in registry.hooks(config.plugins).storebackends_event.get_hookimpls()]


def _open(
    root: Path,
    spec: BackendSpec,
    driver: type[Backend],
    options: object,
    durability: str | None,
    detach_barrier: Callable[[], None] | None,
    listeners: Listeners,
    recovers: bool,
) -> Store:
    marker = prepare(root, spec.name, durability, boot_id())
    with ExitStack() as undo, explained(f"opening the store {root}", root):
        locks = Locks(root / "locks")
        undo.callback(locks.close)
        scratch = root / "scratch"
        scratch.mkdir(mode=0o700, exist_ok=True)
        events = Events(root, marker.uuid)
        store: Store  # made below, before the first event is delivered
        for listener in listeners:
            events.listen(lambda event, listener=listener: listener(store, event))  # type: ignore[misc]
        events.tell(Opened)
        failures = Deaths(root, events)
        backend = driver(root, options, marker.uuid)
        backend.open()
        undo.callback(backend.close)
        marker, presence = _catch_up(root, marker, backend, locks, events)
        if recovers:
            recover(backend, locks, failures, scratch)
        store = Store(
            root,
            marker,
            backend,
            locks=locks,
            presence=presence,
            failures=failures,
            events=events,
            detach_barrier=detach_barrier,
        )
        events.deliver()  # not before: the listeners get the store
        undo.pop_all()
    return store


def _catch_up(root: Path, marker: Marker, backend: Backend, locks: Locks, events: Events) -> tuple[Marker, Lock]:
    """Share the store with all who have it open; first, if the host was restarted, drop what that may have broken."""
    boot = boot_id()
    while marker.boot != boot:
        with locks.store(exclusive=True):
            marker = load(root)
            if marker.boot != boot:
                index.check(root)
                if marker.durability != "none":
                    for id in drop_unsynced(backend, root / "result", boot):
                        reason = "it may not have reached the disk before the host went down"
                        events.tell(Recovered, id=id, attempt=None, reason=reason)
                marker = marker.booted(boot)
                marker.save(root)
    return marker, locks.store(exclusive=False)
