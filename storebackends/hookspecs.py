"""The hooks a plugin may answer. pluggy calls them; `storebackends.registry` decides which plugins are asked.

A plugin is what an entry point of the group "storebackends" names, most often a package. It decorates its answers
with `hookimpl`; a name that is not below is a misspelling and refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from .backend import BackendSpec

PROJECT = "storebackends"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def storebackends_backends() -> Sequence[BackendSpec]:  # type: ignore[empty-body]
    """The backends of this plugin, one named as each of its entry points. Cheap: imports no driver, starts nothing."""


@hookspec
def storebackends_event(store: object, event: object) -> None:
    """Something happened in *store*. Only plugins that the configuration lists under ``plugins`` hear of it."""
