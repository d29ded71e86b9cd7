"""The host's one TOML file: which stores there are. Read whole, checked whole, every problem reported at once.

The first of these files is the configuration; they are never merged, so what one reads is what holds:

    $STOREBACKENDS_CONFIG                 set and missing is an error
    the user's configuration folder       ~/.config/storebackends/config.toml, or what the platform has instead
    /etc/storebackends/config.toml        on Windows below %ProgramData%

Where none is, or it names no store, there is one: "default", of the backend `copy`, in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import platformdirs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, to_json

from .backend import BackendSpec
from .errors import ConfigError, PluginError
from .prune import Policy, bytes_of, seconds_of
from .registry import AUTO, Registry, close_matches

APP = "storebackends"
VARIABLE = "STOREBACKENDS_CONFIG"
SITE = platformdirs.site_config_path(APP, appauthor=False) if sys.platform == "win32" else Path("/etc", APP)

Durability = Literal["group", "full", "none"]
Verify = Literal["none", "digest"]
_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)
_Where = tuple[str | int, ...]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
NO_OPTIONS = 'is an option of no backend while that is "auto"; name the backend that it is for'
_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """One ``[stores.NAME]``: everything that opening the store takes. *options* is an instance of spec.options.

    *path* is None where it is left to the backend; then folder() asks that.
    With the backend "auto" *spec* is None, until the store is opened, and there are no options.
    """

    name: str
    backend: str
    path: Path | None
    durability: Durability
    verify: Verify
    prune: Policy | None
    options: BaseModel
    spec: BackendSpec | None

    def folder(self) -> Path:
        """The store's folder. Raises StoreError where it is the backend's to say and that cannot."""
        return store_folder(self.spec, self.path, self.options)

    def show(self) -> dict[str, Any]:
        """The table, defaults filled in."""
        path = None if self.path is None else str(self.path)
        common = {"backend": self.backend, "path": path, "durability": self.durability}
        rules = {} if self.prune is None else {"prune": asdict(self.prune)}
        return {**common, "verify": self.verify, **rules, **self.options.model_dump(mode="json", by_alias=True)}


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration without problems; *source* is its file, None where there is none."""

    source: Path | None
    default: str
    plugins: Sequence[str]
    plugin_options: Mapping[str, BaseModel]  # of each of these that takes any, by the name of its entry point
    stores: Mapping[str, StoreConfig]

    def store(self, name: str | None = None) -> StoreConfig:
        """Return the store called *name*, or the default one. Raises ConfigError with close matches."""
        name = self.default if name is None else name
        if name not in self.stores:
            raise ConfigError(_named(self.source), [f"stores: {_no_store(name, self.stores)}"])
        return self.stores[name]

    def show(self) -> dict[str, Any]:
        """All of it, defaults filled in, as `json.dumps` takes it."""
        stores = {name: store.show() for name, store in self.stores.items()}
        source = None if self.source is None else str(self.source)
        shown = {"source": source, "default": self.default, "plugins": list(self.plugins), "stores": stores}
        options = {name: model.model_dump(mode="json", by_alias=True) for name, model in self.plugin_options.items()}
        return shown | ({"plugin": options} if options else {})


def places() -> Sequence[Path]:
    """The files that may be the configuration, the first that exists wins; an empty variable is as good as none."""
    if named := os.environ.get(VARIABLE):
        return (Path(named),)
    return tuple(folder / "config.toml" for folder in (platformdirs.user_config_path(APP, appauthor=False), SITE))


def load(path: Path | None = None) -> Config:
    """Read the configuration from *path*, or from the first of `places()` that exists.

    Imports the plugins it lists, and those of the backends that its stores name, not their drivers; touches no store.
    Raises ConfigError with every problem there is.
    """
    candidates = places() if path is None else (path,)
    for place in candidates:
        try:
            data = place.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reason = f"cannot be read: {error.strerror}; mend that, or name another file in ${VARIABLE}"
            raise ConfigError(str(place), [reason]) from error
        return _Check(place).config(_parse(place, data))
    if path is not None or os.environ.get(VARIABLE):
        by = f", though ${VARIABLE} names it" if path is None else ""
        raise ConfigError(str(candidates[0]), [f"there is no such file{by}; create it or name another"])
    return _Check(None).config({})


def store_folder(spec: BackendSpec | None, path: Path | None, options: BaseModel) -> Path:
    """Return *path*, or what the backend says where none is given. Raises StoreError where it cannot say it."""
    if path is None:
        assert spec is not None and spec.folder is not None  # noqa: S101, PT018 (else a path was asked for)
        return spec.folder(options)
    return path


def validate_options(spec: BackendSpec, options: Mapping[str, Any], where: str) -> BaseModel:
    """Return *options* as the model of the backend *spec*; ConfigError of the source *where* has every problem."""
    problems: list[str] = []
    checked = _validate(spec.options, options, problems)
    if checked is None:
        raise ConfigError(where, problems)
    return checked


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Host(_Table):
    default: str | None = None
    plugins: tuple[str, ...] = ()
    plugin: dict[str, Any] = {}
    stores: dict[str, Any] = {}


def _absolute(path: Path) -> Path:
    path = Path(os.path.expanduser(path))
    if not path.is_absolute():
        raise ValueError("should be an absolute path, or start with ~/")
    if "\0" in str(path):  # Windows' realpath() passes it over
        raise ValueError("no file system can hold a NUL")
    os.path.realpath(path)  # ValueError for what else none can hold
    return path


def _checked(check: Callable[..., object], *arguments: object) -> Callable[[Any], Any]:
    def validate(value: Any) -> Any:
        check(value, *arguments)
        return value

    return validate


class _Store(_Table):
    """The keys that every ``[stores.NAME]`` may have; all others are options of its backend."""

    path: Annotated[Path, AfterValidator(_absolute)] | None = None
    backend: str = "copy"
    durability: Durability = "group"
    verify: Verify = "none"
    prune: dict[str, Any] | None = None


class _Prune(_Table):
    """See storebackends.prune.Policy."""

    min_free: Annotated[Any, AfterValidator(_checked(bytes_of, 0))] = None
    max_used: Annotated[Any, AfterValidator(_checked(bytes_of, 0))] = None
    keep_for: Annotated[Any, AfterValidator(_checked(seconds_of))] = None
    max_items: Annotated[int, Field(ge=0)] | None = None


class _Check:
    """One pass over a parsed file. Goes on after a problem, with what can still be judged, to find the others."""

    def __init__(self, source: Path | None) -> None:
        self.source = source
        self.problems: list[str] = []
        self.registry = Registry()

    def config(self, data: Mapping[str, Any]) -> Config:
        keys: dict[str, Any] = {}
        for key, value in data.items():  # one by one: a wrong one must not hide what the others say
            if part := _validate(_Host, {key: value}, self.problems):
                keys |= part.model_dump(exclude_unset=True)
        host = _Host(**keys)
        plugin_options = self._plugin_options(host.plugins, host.plugin)
        tables = host.stores or {"default": {"path": str(_user_cache() / "store")}}
        stores = {name: store for name, table in tables.items() if (store := self._store(name, table))}
        self._check_paths(stores.values())
        default = self._default(host.default, list(tables))
        if self.problems:
            raise ConfigError(_named(self.source), self.problems)
        return Config(self.source, default, host.plugins, MappingProxyType(plugin_options), MappingProxyType(stores))

    def _plugin_options(self, plugins: Sequence[str], tables: Mapping[str, Any]) -> dict[str, BaseModel]:
        """The options of the listed plugins that take any, each judged by its own model."""
        models: dict[str, type[BaseModel] | None] = {}  # None where that is a problem already
        for number, plugin in enumerate(plugins):
            for point in self._plugin(self.registry.find, plugin, "plugins", number) or ():
                models[point.name] = self._plugin(self._model, point.name, "plugins", number)
        found: dict[str, BaseModel] = {}
        for name in {**models, **tables}:
            where, table, model = ("plugin", name), tables.get(name, {}), models.get(name)
            if not isinstance(table, dict):
                self._problem(where, f"should be a table, not {reprlib.repr(table)}")
            elif name not in models:
                self._problem(where, f"is the table of no plugin under 'plugins'{_suggest(name, models)}")
            elif model is _Table and table:
                self._problem(where, "is given, but the plugin takes no options; remove it")
            elif model and model is not _Table and (options := _validate(model, table, self.problems, where)):
                found[name] = options
        return found

    def _model(self, name: str) -> type[BaseModel]:
        """What the plugin's options are an instance of; the empty table where it takes none."""
        try:
            answers = self.registry.hooks([name]).storebackends_options()
        except PluginError:
            raise
        except Exception as error:
            reason = f"its storebackends_options() failed with {type(error).__name__}: {error}"
            raise PluginError(name, reason, self.registry.distribution(name)) from error
        model = answers[0] if answers else _Table
        if isinstance(model, type) and issubclass(model, BaseModel):
            return model
        reason = f"its storebackends_options() gave {reprlib.repr(model)}, not a class derived from Options"
        raise PluginError(name, reason, self.registry.distribution(name))

    def _store(self, name: str, table: object) -> StoreConfig | None:
        where = ("stores", name)
        if not isinstance(table, dict):
            self._problem(where, f"should be a table, not {reprlib.repr(table)}")
            return None
        if not _NAME.fullmatch(name):
            self._problem(where, "a store's name has letters, digits and . _ - only, and starts with no . _ or -")
        own = {key: table[key] for key in table.keys() & _Store.model_fields.keys()}
        common = _validate(_Store, own, self.problems, where)
        # Judged even when `path` is missing; a backend that is no string was reported just now.
        backend = own.get("backend", "copy")
        rest = {key: table[key] for key in table if key not in own}
        spec, options = self._backend(backend, rest, where) if isinstance(backend, str) else (None, None)
        prune = own.get("prune")  # judged even when another key is wrong; one that is no table was reported just now
        rules = _validate(_Prune, prune, self.problems, (*where, "prune")) if isinstance(prune, dict) else None
        if common and common.path is None and (spec.folder is None if spec else backend == AUTO):
            self._problem((*where, "path"), "is missing")
        if common is None or options is None:
            return None
        policy = Policy(**rules.model_dump()) if rules else None
        return StoreConfig(name, common.backend, common.path, common.durability, common.verify, policy, options, spec)

    def _backend(
        self, name: str, rest: Mapping[str, Any], where: _Where
    ) -> tuple[BackendSpec | None, BaseModel | None]:
        """The backend, None for "auto", and its options, None where they are wrong."""
        if name == AUTO:
            for key in rest:
                self._problem((*where, key), NO_OPTIONS + close_matches(key, _Store.model_fields))
            return None, None if rest else _Table()
        spec = self._plugin(self.registry.spec, name, *where, "backend")
        return spec, _validate(spec.options, rest, self.problems, where) if spec else None

    def _plugin(self, look_up: Callable[[str], _T], name: str, *where: str | int) -> _T | None:
        try:
            return look_up(name)
        except PluginError as error:
            self._problem(where, str(error))
            return None

    def _check_paths(self, stores: Iterable[StoreConfig]) -> None:
        owners: dict[str, str] = {}
        for store in stores:
            if store.path is None:
                continue
            owner = owners.setdefault(os.path.normcase(os.path.realpath(store.path)), store.name)
            if owner != store.name:
                reason = f"{str(store.path)!r} is the folder of stores.{owner} already; give each store its own"
                self._problem(("stores", store.name, "path"), reason)

    def _default(self, default: str | None, names: Sequence[str]) -> str:
        """The store meant when none is named: the one that is said to be, or the only one, or the one so called."""
        if default is None and len(names) == 1:
            return names[0]
        if default is None and "default" not in names:
            self._problem(("default",), f"is missing; name one of the stores: {', '.join(map(repr, names))}")
        elif default is not None and default not in names:
            self._problem(("default",), _no_store(default, names))
        return default or "default"

    def _problem(self, where: _Where, reason: str) -> None:
        self.problems.append(_at(where, reason))


def _parse(place: Path, data: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode("utf-8-sig"))  # Windows editors write the mark
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        reason = f"is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}; save it as UTF-8"
        raise ConfigError(str(place), [reason]) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is not a TOMLDecodeError
        raise ConfigError(str(place), [f"is not valid TOML: {error}"]) from error


def _validate(model: type[_Model], data: Mapping[str, Any], problems: list[str], where: _Where = ()) -> _Model | None:
    """Return *data*, the table at *where*, as a *model*; or None, and add what is wrong to *problems*.

    By way of JSON: pydantic's strict mode then takes a string for a path, which TOML cannot tell apart, but not for
    an integer, which it can.
    """
    try:
        return model.model_validate_json(to_json(data, inf_nan_mode="constants"))
    except ValidationError as error:
        names = [field.alias or name for name, field in model.model_fields.items()]
        known = {*names, *(_Store.model_fields if where[:1] == ("stores",) and len(where) == 2 else ())}
        details = error.errors(include_url=False)
        problems += [_at((*where, *detail["loc"]), _reason(detail, known)) for detail in details]
    except ValueError as error:
        problems.append(_at(where, f"cannot be written as TOML: {error}"))
    return None


def _reason(detail: ErrorDetails, known: Iterable[str]) -> str:
    kind, loc = detail["type"], detail["loc"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is no known key" + (_suggest(str(loc[0]), known) if len(loc) == 1 else "")
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("an object", "a table")
    return f"{message}, not {reprlib.repr(detail['input'])}"


def _at(where: _Where, reason: str) -> str:
    dotted = ".".join(part if _BARE.fullmatch(part) else json.dumps(part) for part in map(str, where))
    return f"{dotted}: {reason}" if dotted else reason


def _suggest(word: str, known: Iterable[str]) -> str:
    return close_matches(word, known) or f"; those known: {', '.join(sorted(known))}"


def _no_store(name: str, names: Iterable[str]) -> str:
    return f"there is no store {name!r}" + _suggest(name, names)


def _named(source: Path | None) -> str:
    return "the configuration without a file" if source is None else str(source)


def _user_cache() -> Path:
    return platformdirs.user_cache_path(APP, appauthor=False)
