"""A recipe: a TOML file of named steps, each a build on another step, on a kept result or on nothing.

Read whole and checked whole: `load` reports every problem at once, in a RecipeError, with its dotted key. What it
returns is plain facts: each step with its base, its copies and its commands, in an order in which they can be built.
Nothing here touches a store or the source folder; steps.py does. docs/reference/recipes.md is the format.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import reprlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePath, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from .caches import Mode
from .errors import RecipeError
from .ids import check_id
from .registry import close_matches
from .sandbox import Setting

SCRATCH = "scratch"
"""``from = "scratch"`` starts with an empty tree, so no step may be called that."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_ARG = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}", re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Copy:
    """Files for a step's tree: *source* in the source folder, or in the tree of another *step*, goes to *dest*."""

    source: str
    dest: str
    step: str | None
    exclude: Sequence[str]


@dataclass(frozen=True, slots=True)
class Secret:
    """A file that a step can read while it runs: what a variable of our environment holds, or a file of this host."""

    name: str
    env: str | None
    file: Path | None


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache of the store that the commands find at *path*: in the tree, below ``~``, or an absolute one."""

    name: str
    path: str
    mode: Mode


@dataclass(frozen=True, slots=True)
class Step:
    """One build. Its tree is that of *step* or of the result *base*, or empty; then come its copies and commands."""

    name: str
    step: str | None
    base: str | None
    copies: Sequence[Copy]
    commands: Sequence[str | Sequence[str]]
    shell: Sequence[str]
    env: Mapping[str, str]
    workdir: str
    timeout: float | None  # seconds, for all the commands together
    network: bool
    secrets: Sequence[Secret]
    caches: Sequence[Cache]

    @property
    def inputs(self) -> Sequence[str]:
        """The steps that come before this one because it needs them."""
        return [name for name in (self.step, *(copy.step for copy in self.copies)) if name is not None]

    def argv(self, command: str | Sequence[str]) -> Sequence[str]:
        """One of its commands as a program and its arguments."""
        return [*self.shell, command] if isinstance(command, str) else command


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe without problems. Its *steps* are ordered: each after those it needs."""

    path: Path
    source: Path
    sandbox: Setting
    steps: Mapping[str, Step]

    def needed(self, targets: Sequence[str] = ()) -> Sequence[Step]:
        """The steps that *targets* take, themselves included, in order; with no target all of them.

        Raises RecipeError for a target that is no step.
        """
        if unknown := [name for name in targets if name not in self.steps]:
            raise RecipeError(str(self.path), [_no_step(name, self.steps) for name in unknown])
        wanted = set(targets or self.steps)
        for step in reversed(list(self.steps.values())):
            if step.name in wanted:
                wanted.update(step.inputs)
        return [step for step in self.steps.values() if step.name in wanted]


def load(path: Path, args: Mapping[str, str] | None = None, source: Path | None = None) -> Recipe:
    """Read the recipe in *path*, with *args* in place of the defaults under its ``[args]``.

    *source*, where given, is the folder its copies come from. Raises RecipeError with every problem there is.
    """
    problems: list[str] = []
    data = _filled(_parse(path), args or {}, problems)
    try:
        document = _Document.model_validate(data)
    except ValidationError as error:
        raise RecipeError(str(path), problems + [_described(details) for details in error.errors()]) from None
    steps = _steps(document, path.parent, problems)
    if problems:
        raise RecipeError(str(path), problems)
    return Recipe(path, source or path.parent / document.recipe.source, document.recipe.sandbox, _ordered(path, steps))


# The format, as the file has it.


def _inside(path: str) -> str:
    parts = PurePath(path)
    if not path:
        raise ValueError("is empty; '.' is the whole folder")
    if parts.anchor or ".." in parts.parts:
        raise ValueError(f"{path!r} leads out of its folder; use a relative path without '..'")
    return parts.as_posix()


def _place(path: str) -> str:
    """A path for a cache, as bubblewrap has it: below the tree, which is at /build, or the home folder, in /tmp."""
    parts = PurePosixPath(path).parts
    if ".." in parts or path.startswith("//") or len(parts) < 1 + (parts[:1] in (("/",), ("~",))):
        raise ValueError(f"{path!r} is no place for a cache; name a folder in the tree, below ~, or an absolute one")
    if parts[0] == "/" and parts[1] in ("build", "dev", "proc", "run", "tmp"):
        raise ValueError(f"{path!r} is a step's own; use a path in the tree (relative), below ~, or another folder")
    return PurePosixPath(path).as_posix()


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        value = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f'should be a positive number of seconds, or one with a unit as in "10m", not {value!r}')
    return float(value)


def _commands(value: Any) -> list[str | list[str]]:
    commands = [value] if isinstance(value, str) else value
    if not isinstance(commands, list) or not all(map(_is_command, commands)):
        raise ValueError("should be a command for the shell, or a list of commands: strings, or lists of strings")
    return commands


def _is_command(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return isinstance(words, list) and all(isinstance(word, str) for word in words) and bool(words and words[0])


def _matching(pattern: re.Pattern[str], allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is no name; use {allowed}")
        return value

    return AfterValidator(check)


_Name = Annotated[str, _matching(_NAME, "letters, digits and . _ -, not a dot or a dash first")]
_Variable = Annotated[str, _matching(_VARIABLE, "letters, digits and _, not a digit first")]
_Inside = Annotated[str, AfterValidator(_inside)]
_Shell = Annotated[list[str], Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Options(_Table):
    """``[recipe]``: what holds for every step."""

    source: str = "."
    sandbox: Setting = "auto"
    network: bool = False
    shell: _Shell = ["/bin/sh", "-ec"]
    env: dict[_Variable, str] = {}


class _From(_Table):
    step: str | None = None
    id: Annotated[str | None, AfterValidator(lambda id: id if id is None else check_id(id))] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.step is None) == (self.id is None):
            raise ValueError('should name a step, or a result of the store as { id = "..." }')
        return self


class _Copy(_Table):
    source: _Inside
    dest: _Inside | None = None
    step: str | None = None
    exclude: list[str] = []


class _Cache(_Table):
    name: Annotated[str, AfterValidator(check_id)]
    path: Annotated[str, AfterValidator(_place)]
    mode: Mode = "shared"


class _Secret(_Table):
    env: str | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("should have either 'env' or 'file'")
        return self


def _short(key: str) -> BeforeValidator:
    """Let a plain string stand for a table with nothing but *key*."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class _Step(_Table):
    start: Annotated[_From | None, _short("step")] = Field(None, alias="from")
    copies: Annotated[
        list[Annotated[_Copy, _short("source")]],
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    ] = Field([], alias="copy")
    run: Annotated[list[str | list[str]], PlainValidator(_commands)] = []
    env: dict[_Variable, str] = {}
    workdir: _Inside = "."
    shell: _Shell | None = None
    timeout: Annotated[float | None, PlainValidator(_seconds)] = None
    network: bool | None = None
    secrets: dict[_Name, _Secret] = {}
    caches: Annotated[list[_Cache], BeforeValidator(lambda value: value if isinstance(value, list) else [value])] = (
        Field([], alias="cache")
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.copies and not self.run:
            raise ValueError("does nothing; give it 'run' or 'copy'")
        return self

    @model_validator(mode="after")
    def _caches_apart(self) -> Self:
        for one, other in itertools.permutations(self.caches, 2):
            if one.name == other.name:
                raise ValueError(f"has the cache {one.name!r} twice; a step gets one copy of each")
            if PurePosixPath(one.path).is_relative_to(other.path):
                raise ValueError(f"has the cache {one.name!r} inside the cache {other.name!r}; put them apart")
        return self


class _Document(_Table):
    recipe: _Options = _Options()
    args: dict[_Variable, str] = {}
    steps: Annotated[dict[_Name, _Step], Field(min_length=1)]


# From the file to the facts.


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # Windows editors write the mark
    except OSError as error:
        raise RecipeError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: it may be no UTF-8
        raise RecipeError(str(path), [f"is not valid TOML: {error}"]) from error


def _filled(data: dict[str, Any], given: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """Put the values of the args in place of every ``{{ NAME }}``, whatever else is wrong with *data*."""
    defaults = data.get("args", {})
    args = dict(defaults) if isinstance(defaults, dict) else {}
    problems += [f"args: there is no {name!r} to set{close_matches(name, args)}" for name in given if name not in args]
    args |= given

    def fill(value: Any, *loc: str | int) -> Any:
        if isinstance(value, dict):
            return {key: fill(item, *loc, key) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item, *loc, number) for number, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        problems.extend(
            f"{_dotted(loc)}: there is no {name!r} under [args]{close_matches(name, args)}"
            for name in _ARG.findall(value)
            if name not in args
        )
        filled = _ARG.sub(lambda match: str(args.get(match[1], match[0])), value)
        if "\0" in filled:
            problems.append(f"{_dotted(loc)}: holds a NUL, which no path, command or variable can; remove it")
        return filled

    return {key: value if key == "args" else fill(value, key) for key, value in data.items()}


def _steps(document: _Document, folder: Path, problems: list[str]) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    before = SCRATCH
    for name, table in document.steps.items():
        start = table.start or _From(step=before)
        steps[name] = Step(
            name=name,
            step=None if start.step == SCRATCH else start.step,
            base=start.id,
            copies=[_copy(copy) for copy in table.copies],
            commands=table.run,
            shell=table.shell or document.recipe.shell,
            env=document.recipe.env | table.env,
            workdir=table.workdir,
            timeout=table.timeout,
            network=document.recipe.network if table.network is None else table.network,
            secrets=[_secret(key, secret, folder) for key, secret in table.secrets.items()],
            caches=[Cache(cache.name, cache.path, cache.mode) for cache in table.caches],
        )
        before = name
    if SCRATCH in steps:
        problems.append(f"steps.{SCRATCH}: stands for the empty tree; give the step another name")
    problems += _dangling(steps)
    return steps


def _copy(table: _Copy) -> Copy:
    # A trailing slash, as .gitignore has it for folders, adds nothing here.
    exclude = tuple(pattern.rstrip("/") for pattern in table.exclude)
    return Copy(table.source, table.dest or table.source, table.step, exclude)


def _secret(name: str, table: _Secret, folder: Path) -> Secret:
    return Secret(name, table.env, None if table.file is None else folder / os.path.expanduser(table.file))


def _dangling(steps: Mapping[str, Step]) -> Iterator[str]:
    for step in steps.values():
        if step.step is not None and step.step not in steps:
            yield f"steps.{step.name}.from: {_no_step(step.step, steps)}; a result of the store is {{ id = ... }}"
        for number, copy in enumerate(step.copies):
            if copy.step is not None and copy.step not in steps:
                yield f"steps.{step.name}.copy.{number}.step: {_no_step(copy.step, steps)}"


def _no_step(name: str, steps: Mapping[str, Step]) -> str:
    return f"there is no step {name!r}{close_matches(name, steps)}"


def _ordered(path: Path, steps: Mapping[str, Step]) -> Mapping[str, Step]:
    try:
        order = tuple(TopologicalSorter({step.name: step.inputs for step in steps.values()}).static_order())
    except CycleError as error:
        cycle = " needs ".join(reversed(error.args[1]))
        raise RecipeError(str(path), [f"steps: {cycle}; no step can need itself"]) from None
    return MappingProxyType({name: steps[name] for name in order})


# Problems, as the user reads them.


def _described(details: ErrorDetails) -> str:
    loc, kind = details["loc"], details["type"]
    if kind == "extra_forbidden":
        keys = sorted(_keys(loc))
        reason = close_matches(str(loc[-1]), keys) or f"; these are: {', '.join(keys)}"
        return f"{_dotted(loc)}: is no known key{reason}"
    if kind == "missing":
        return f"{_dotted(loc)}: is missing"
    if kind == "value_error":
        return f"{_dotted(loc)}: {details['ctx']['error']}"
    if not details["msg"].startswith("Input "):
        return f"{_dotted(loc)}: {details['msg'].replace(' after validation', '')}"
    reason = details["msg"].removeprefix("Input ").replace("valid dictionary", "table").replace("valid list", "list")
    return f"{_dotted(loc)}: {reason}, not {reprlib.repr(details['input'])}"


def _keys(loc: tuple[str | int, ...]) -> Iterator[str]:
    """The keys of the table that the last of *loc* is in."""
    table: type[_Table] = _Document
    match loc:
        case ("recipe", _):
            table = _Options
        case ("steps", _, _):
            table = _Step
        case ("steps", _, "from", _):
            table = _From
        case ("steps", _, "copy", _, _):
            table = _Copy
        case ("steps", _, "secrets", _, _):
            table = _Secret
        case ("steps", _, "cache", _, _):
            table = _Cache
    return (field.alias or name for name, field in table.model_fields.items())


def _dotted(loc: Sequence[str | int]) -> str:
    """``steps.wheel.copy.0.source``."""
    return ".".join(str(part) for part in loc if part != "[key]")  # pydantic's mark for a wrong key of a dict
