"""The hooks a plugin may answer. pluggy calls them; `storebackends.registry` decides which plugins are asked.

A plugin is what an entry point of the group "storebackends" names, most often a package. It decorates its answers
with `hookimpl`; a name that is not below is a misspelling and refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

from .backend import BackendSpec

if TYPE_CHECKING:
    from pydantic import BaseModel

    from .events import Event
    from .store import Store

PROJECT = "storebackends"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def storebackends_backends() -> Sequence[BackendSpec]:  # type: ignore[empty-body]
    """The backends of this plugin, one named as each of its entry points. Cheap: imports no driver, starts nothing."""


@hookspec
def storebackends_options() -> type[BaseModel]:  # type: ignore[empty-body]
    """The model of the table ``[plugin.NAME]``, NAME being the entry point's: derive it from Options. Cheap, too."""


@hookspec
def storebackends_use_options(options: BaseModel) -> None:
    """That table, checked. Called before each opening of a store that the plugin will hear of; the last call holds."""


@hookspec
def storebackends_event(store: Store, event: Event) -> None:
    """Something happened in *store*, as *event* tells (see `storebackends.events`).

    Called for stores that are opened by name, and only if the configuration lists the plugin under ``plugins``: in a
    thread of the store's, one event at a time, the first being Opened and the last Closed. What it raises is logged.
    """
