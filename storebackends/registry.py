"""Plugins by name: which are installed, and the one that is asked for, imported and checked.

Installed is what has an entry point in the group "storebackends"; the names cost no import. Asking for one imports
that plugin only, and asking for its driver imports the module with the real work. Whatever is wrong with a plugin is
a PluginError that names the distribution to mend, for the user who reads it seldom wrote the plugin.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pluggy
from pydantic import BaseModel

from . import hookspecs
from .backend import API, OLDEST_API, Backend, BackendSpec, Support
from .errors import NotSupported, PluginError

GROUP = "storebackends"
AUTO = "auto"
"""Instead of a backend's name: the one that ranks highest where a store is made. The store keeps it."""


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'this' or 'that'?`` for a misspelt *word*, or "" where nothing known is like it."""
    matches = difflib.get_close_matches(word, sorted(known))
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


class Registry:
    """The plugins installed when it was made."""

    def __init__(self) -> None:
        self._points = entry_points(group=GROUP)

    def names(self) -> Sequence[str]:
        """All plugins by name, sorted, usable or not. Imports none."""
        return sorted(self._points.names)

    def distribution(self, name: str) -> str | None:
        """The distribution, with its version, that *name* comes from; every one where several claim it."""
        names = [f"{_project(point)} {_metadata(point, 'Version')}" for point in self._points.select(name=name)]
        return " and ".join(sorted(names)) or None

    def spec(self, name: str) -> BackendSpec:
        """Import the plugin called *name* and return its backend of that name. Its driver is not imported."""
        if (spec := self._spec(name)) is None:
            raise self._error(name, "it only listens to events and has no backend; list it under 'plugins' instead")
        return spec

    def specs(self) -> dict[str, BackendSpec | PluginError]:
        """Import every plugin; each backend by name, or why it cannot be had. Plugins that only listen are left out."""
        found: dict[str, BackendSpec | PluginError] = {}
        for name in self.names():
            try:
                if spec := self._spec(name):
                    found[name] = spec
            except PluginError as error:
                found[name] = error
        return found

    def supports(self, folder: Path) -> dict[str, Support]:
        """Import every plugin and ask each backend if it can be used in *folder*, which may not exist yet."""
        answers: dict[str, Support] = {}
        for name, spec in self.specs().items():
            answers[name] = Support(False, str(spec)) if isinstance(spec, PluginError) else probe(spec, folder)
        return answers

    def driver(self, spec: BackendSpec) -> type[Backend]:
        """Import the class that serves a store of this backend."""
        try:
            driver = pkgutil.resolve_name(spec.factory)
        except Exception as error:
            raise self._broken(spec.name, f"its driver {spec.factory!r}", error) from error
        if not (isinstance(driver, type) and issubclass(driver, Backend)):
            raise self._error(spec.name, f"its driver {spec.factory!r} is not a class derived from Backend")
        if inspect.isabstract(driver):
            missing = ", ".join(sorted(driver.__abstractmethods__))
            raise self._error(spec.name, f"its driver {spec.factory!r} does not define {missing}")
        return driver

    def hooks(self, plugins: Iterable[str]) -> pluggy.HookRelay:
        """Import the *plugins*, given by name or by distribution, and return their hooks, to be called."""
        manager = _manager()
        for plugin in plugins:
            for point in self.find(plugin):
                self._register(manager, point)
        return manager.hook

    def find(self, plugin: str) -> Sequence[EntryPoint]:
        """The entry points of a plugin given by name, or of all in a distribution given by its. Imports none."""
        if plugin in self._points.names:
            return [self._point(plugin)]
        wanted = _normal(plugin)
        points = [point for point in self._points if _normal(_project(point)) == wanted]
        if not points:
            raise _unknown(plugin, {*self._points.names, *map(_project, self._points)})
        return [self._point(point.name) for point in points]

    def _point(self, name: str) -> EntryPoint:
        points = self._points.select(name=name)
        if not points:
            raise _unknown(name, self._points.names)
        if len(points) > 1:
            raise self._error(name, "only one distribution may bring a plugin of this name; uninstall all but one")
        return points[name]

    def _spec(self, name: str) -> BackendSpec | None:
        specs = self._backends(self._point(name))
        if specs is None:
            return None
        spec = next((spec for spec in specs if spec.name == name), None)
        if spec is None:
            names = ", ".join(repr(spec.name) for spec in specs) or "none"
            raise self._error(name, f"it has no backend of its entry point's name {name!r} (it has: {names})")
        if not OLDEST_API <= spec.api <= API:
            window = f"{OLDEST_API} to {API}" if OLDEST_API < API else f"{API}"
            older = "storebackends" if spec.api > API else "the plugin"
            raise self._error(name, f"it speaks api {spec.api}, this storebackends {window}; upgrade {older}")
        return spec

    def _backends(self, point: EntryPoint) -> Sequence[BackendSpec] | None:
        """What the hook of one plugin answers, type-checked; None where it implements only other hooks."""
        manager = _manager()  # its own: another plugin's mistake must not show here
        self._register(manager, point)
        hook = manager.hook.storebackends_backends
        if not hook.get_hookimpls():
            return None
        try:
            answers = hook()
        except Exception as error:
            raise self._broken(point.name, "its storebackends_backends()", error) from error
        specs = answers[0] if answers else None  # pluggy leaves a None out
        if not isinstance(specs, list | tuple) or not all(map(_is_spec, specs)):
            raise self._error(
                point.name, f"its storebackends_backends() gave {reprlib.repr(specs)}, not a list of BackendSpec"
            )
        return specs

    def _register(self, manager: pluggy.PluginManager, point: EntryPoint) -> None:
        try:
            plugin = point.load()
        except Exception as error:
            raise self._broken(point.name, repr(point.value), error) from error
        if manager.is_registered(plugin):
            return  # one package under two names
        try:
            manager.register(plugin, point.name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise self._error(point.name, f"{error} (the hooks are: {', '.join(vars(_manager().hook))})") from error
        if not manager.get_hookcallers(plugin):
            raise self._error(point.name, f"{point.value!r} has no function decorated with hookimpl")

    def _broken(self, name: str, what: str, error: Exception) -> PluginError:
        """An error for code of the plugin that raised; where an extra may be what is missing, the way to install it."""
        fix = ""
        for point in self._points.select(name=name):
            if (
                isinstance(error, ImportError)
                and point.dist
                and name in point.dist.metadata.get_all("Provides-Extra", ())
            ):
                fix = f"; pip install '{_project(point)}[{name}]' installs what it needs"
        return self._error(name, f"{what} failed with {type(error).__name__}: {error}{fix}")

    def _error(self, name: str, reason: str) -> PluginError:
        return PluginError(name, reason, self.distribution(name))


def probe(spec: BackendSpec, folder: Path) -> Support:
    """Ask one backend; a probe that raises is an answer, too."""
    try:
        return spec.probe(folder)
    except Exception as error:  # noqa: BLE001 (a plugin's mistake; the others are still of interest)
        return Support(False, f"its probe failed with {type(error).__name__}: {error}", "tell the plugin's authors")


def best(supports: Mapping[str, Support]) -> str:
    """The one that "auto" means. Raises NotSupported, with each one's reason, where there is none."""
    ranks = {name: support.rank for name, support in supports.items() if support.usable and support.rank > 0}
    if ranks:
        return max(sorted(ranks), key=ranks.__getitem__)
    reasons = "; ".join(f"{name}: {support.reason or 'only where it is named'}" for name, support in supports.items())
    raise NotSupported(f'backend = "{AUTO}"', f"no backend offers itself ({reasons})", "name one")


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _project(point: EntryPoint) -> str:
    return _metadata(point, "Name")


def _metadata(point: EntryPoint, field: str) -> str:
    # A half-removed installation may have lost its metadata, its name included: [field] would warn or raise.
    values = point.dist.metadata.get_all(field) if point.dist else None
    return values[0] if values else "(unknown)"


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _unknown(name: str, known: Iterable[str]) -> PluginError:
    fix = close_matches(name, known) or "; pip install the distribution that brings it"
    return PluginError(name, f"no such plugin is installed{fix} ('storebackends plugins' lists those that are)")


def _is_spec(spec: object) -> bool:
    return isinstance(spec, BackendSpec) and isinstance(spec.options, type) and issubclass(spec.options, BaseModel)
