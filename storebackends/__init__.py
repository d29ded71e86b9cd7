"""Pluggable storage backends for anything that builds in steps.

    with storebackends.open_store() as store:
        with store.build("app-1", fn, base="tools-7") as result: ...

Importing this imports no plugin, no configuration and no command line.
"""

import logging

from .builds import Build
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

logging.getLogger(__name__).addHandler(logging.NullHandler())
