"""What an import costs, what the package promises, and what the wheel holds."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile

import pytest

import storebackends
from tests.capabilities import PROJECT

# Promised to callers; more names are welcome, these stay.
PROMISED = {
    "BaseNotFound",
    "BuildFailed",
    "BuildLog",
    "Busy",
    "Cancelled",
    "CommandFailed",
    "ConfigError",
    "InvalidId",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "PluginError",
    "RecipeError",
    "StoreError",
    "open_store",
}
HEAVY = {"click", "pydantic", "rich", "sh", "storebackends.cli", "storebackends_copy", "storebackends_rsync"}
HEAVY |= {"btrfsutil", "storebackends_btrfs"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The built wheel: the one under test where there is one, else made here."""
    built = os.environ.get("STOREBACKENDS_WHEEL")
    if built is None:
        folder = tmp_path_factory.mktemp("dist")
        argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(argv, cwd=PROJECT, check=True, capture_output=True)
        built = str(next(folder.glob("*.whl")))
    return zipfile.Path(built)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, storebackends; print(*sys.modules)"

    # -I: neither this folder nor the environment may lend a module.
    printed = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True).stdout

    assert "storebackends" in printed.split()
    assert not HEAVY & set(printed.split())


def test_every_promised_name_is_public_and_there() -> None:
    public = set(storebackends.__all__)

    assert public >= PROMISED
    assert all(hasattr(storebackends, name) for name in public)
    assert public <= set(dir(storebackends))


def test_a_program_that_configures_no_logging_hears_nothing_on_stderr() -> None:
    code = "import logging, storebackends; logging.getLogger('storebackends.store').error('heard')"

    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)

    assert done.stderr == ""


@pytest.mark.parametrize("name", ["storebackends/py.typed", "storebackends/testing/__init__.py"])
def test_the_wheel_holds_what_others_build_on(wheel: zipfile.Path, name: str) -> None:
    assert (wheel / name).is_file()


def test_the_wheel_holds_every_plugin_it_registers(wheel: zipfile.Path) -> None:
    metadata = next(path for path in wheel.iterdir() if path.name.endswith(".dist-info"))
    entries = configparser.ConfigParser()
    entries.read_string((metadata / "entry_points.txt").read_text())

    registered = dict(entries["storebackends"])

    assert set(registered) >= {"copy", "rsync"}
    assert [name for name, module in registered.items() if not (wheel / module / "__init__.py").is_file()] == []


def test_the_wheel_holds_no_tests_and_nothing_beside_the_packages(wheel: zipfile.Path) -> None:
    top = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}

    assert {name for name in top if not name.startswith("storebackends")} == set()
