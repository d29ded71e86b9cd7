from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

import storebackends
from storebackends import backend, errors, plugin
from tests.distributions import install

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(folder.name for folder in (ROOT / "plugins").glob("storebackends_*"))


# A promise to other people's plugins: adding a name is a decision, removing one breaks them.
NAMES = """
    API OLDEST_API Backend BackendSpec CacheEntry Capability Command Entry EntryBackend Problem Size Support Usage
    BaseNotFound BuildFailed BuilderDied Busy Cancelled CommandFailed ConfigError InvalidId NoSpace NotFound
    NotSupported PluginError RecipeError StoreError
    Finished Locks Options check_id events hookimpl hookspec mounts tool trees
"""


def test_the_names_a_plugin_may_import_are_these() -> None:
    assert sorted(plugin.__all__) == sorted(NAMES.split())
    assert all(hasattr(plugin, name) for name in plugin.__all__)


@pytest.mark.parametrize("module", [backend, errors], ids=["backend", "errors"])
def test_all_that_a_backend_is_written_with_is_among_them(module: ModuleType) -> None:
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    classes = {name for name in own if isinstance(getattr(module, name), type) and name[0].isupper()}

    assert classes
    assert classes <= set(plugin.__all__)


def _imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_builtin_plugin_imports_what_anybodys_may(package: str) -> None:
    names = {name for source in (ROOT / "plugins" / package).rglob("*.py") for name in _imports(source)}

    ours = {name for name in names if name.split(".")[0] == "storebackends"}
    allowed = {f"storebackends.plugin.{name}" for name in plugin.__all__}
    assert ours
    assert ours <= allowed


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_plugin_imports_neither_its_driver_nor_sh(package: str) -> None:
    code = f"import sys, {package}; print(*sys.modules)"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = {name for name in run.stdout.split() if name.startswith("storebackends_") or name == "sh"}
    assert package in loaded
    assert not loaded & {"sh", *_drivers(package)}


def _drivers(package: str) -> set[str]:
    """The modules of a plugin that a factory is in: its strings of the form "package.module:Class"."""
    source = ast.parse((ROOT / "plugins" / package / "__init__.py").read_text())
    texts = [node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {
        module for module, colon, _ in (text.partition(":") for text in texts) if colon and module.startswith(package)
    }


class Toy(plugin.Options):
    level: int = 1
    quick: bool = False
    folder: Path = Path("here")
    parts: tuple[str, ...] = ()


def test_options_take_what_toml_can_say_of_a_path_and_a_tuple() -> None:
    toy = Toy.model_validate_json('{"folder": "/srv", "parts": ["a", "b"]}')

    assert toy == Toy(folder=Path("/srv"), parts=("a", "b"))


@pytest.mark.parametrize("text", ['{"level": "1"}', '{"level": true}', '{"quick": 1}', '{"folder": 1}', '{"lvel": 1}'])
def test_options_take_no_other_type_and_no_other_key(text: str) -> None:
    with pytest.raises(ValidationError):
        Toy.model_validate_json(text)


def test_options_do_not_change() -> None:
    toy = Toy()

    with pytest.raises(ValidationError):
        toy.level = 2  # type: ignore[misc]


HOW_TO = (ROOT / "docs" / "how-to" / "write-a-backend.md").read_text(encoding="utf-8")


@pytest.fixture
def how_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the plugin of the how-to: each of its files follows a line with nothing but the name."""
    files = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", HOW_TO, re.MULTILINE | re.DOTALL))
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    modules = {name.removesuffix(".py"): source for name, source in files.items()}
    install(tmp_path / "site", project["name"], project["entry-points"]["storebackends"], **modules)
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.mark.skipif(shutil.which("cp") is None, reason="needs the program cp")
def test_the_backend_of_the_how_to_gives_a_child_its_own_copy(how_to: None, tmp_path: Path) -> None:
    with storebackends.open_store(backend="cp", path=tmp_path / "store") as store:
        base = store.build("base", lambda work: (work.path / "file").write_text("base"))

        child = store.build("child", lambda work: (work.path / "file").write_text("child"), base="base")

        assert [(result.path / "file").read_text() for result in (base, child)] == ["base", "child"]


@pytest.mark.skipif(shutil.which("cp") is None, reason="needs the program cp")
def test_the_how_to_prints_what_it_says(how_to: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = next(code for code in re.findall(r"```python\n(.*?)```", HOW_TO, re.DOTALL) if "open_store" in code)

    exec(example.replace("/tmp/cp-store", str(tmp_path / "store")))

    assert capsys.readouterr().out == "hello\n"
