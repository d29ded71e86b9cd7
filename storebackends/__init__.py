"""Pluggable storage backends for anything that builds in steps.

    with storebackends.open_store() as store:
        with store.build("app-1", fn, base="tools-7") as result: ...

Importing this imports the errors and nothing else; each other name brings its module when it is first used. So a
command line that only prints its help does not pay for locks and SQLite, and nobody pays for a plugin they do not open.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    BaseNotFound,
    BuilderDied,
    BuildFailed,
    Busy,
    Cancelled,
    CommandFailed,
    ConfigError,
    InvalidId,
    NoSpace,
    NotFound,
    NotSupported,
    PluginError,
    RecipeError,
    StoreError,
)

if TYPE_CHECKING:
    from .builds import Build
    from .log import BuildLog, LogReader
    from .opening import open_store
    from .results import Result
    from .store import Store
    from .workspace import Workspace

__all__ = [
    "BaseNotFound",
    "Build",
    "BuildFailed",
    "BuildLog",
    "BuilderDied",
    "Busy",
    "Cancelled",
    "CommandFailed",
    "ConfigError",
    "InvalidId",
    "LogReader",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "PluginError",
    "RecipeError",
    "Result",
    "Store",
    "StoreError",
    "Workspace",
    "open_store",
]

_HOMES = {
    "Build": "builds",
    "BuildLog": "log",
    "LogReader": "log",
    "Result": "results",
    "Store": "store",
    "Workspace": "workspace",
    "open_store": "opening",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return globals().setdefault(name, getattr(import_module(f".{home}", __name__), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
