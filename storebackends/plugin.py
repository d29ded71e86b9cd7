"""Everything a plugin imports from storebackends, in one place.

A name outside ``__all__`` may move or vanish in any release. These stay for as long as their `API` is in the window.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from . import events, mounts, trees
from .backend import (
    API,
    OLDEST_API,
    Backend,
    BackendSpec,
    CacheEntry,
    Capability,
    Command,
    Entry,
    Problem,
    Size,
    Support,
    Usage,
)
from .entries import EntryBackend
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
from .hookspecs import hookimpl, hookspec
from .ids import check_id
from .locks import Locks
from .process import Finished, tool

__all__ = [
    "API",
    "OLDEST_API",
    "Backend",
    "BackendSpec",
    "BaseNotFound",
    "BuildFailed",
    "BuilderDied",
    "Busy",
    "CacheEntry",
    "Cancelled",
    "Capability",
    "Command",
    "CommandFailed",
    "ConfigError",
    "Entry",
    "EntryBackend",
    "Finished",
    "InvalidId",
    "Locks",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "Options",
    "PluginError",
    "Problem",
    "RecipeError",
    "Size",
    "StoreError",
    "Support",
    "Usage",
    "check_id",
    "events",
    "hookimpl",
    "hookspec",
    "mounts",
    "tool",
    "trees",
]


class Options(BaseModel):
    """Base of a backend's options: what ``[stores.NAME]`` may hold beside the keys every store has.

    They are validated as JSON is: "1" is no integer and 1 is no boolean, but a string may become a Path or an Enum
    and an array a tuple. Unknown keys are refused. Give every option a default where one makes sense.
    """

    # Not validate_default: a default of Path("x") is no JSON, and would be refused.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
