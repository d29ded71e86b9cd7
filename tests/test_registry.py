from __future__ import annotations

import sys
from pathlib import Path

import pytest

from storebackends.backend import API, BackendSpec, Support
from storebackends.errors import NotSupported, PluginError
from storebackends.registry import Registry, best
from tests.distributions import PLUGIN, install

LISTENER = """
    from storebackends.plugin import hookimpl

    heard = []

    @hookimpl
    def storebackends_event(event):
        heard.append(event)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def refused(name: str) -> PluginError:
    with pytest.raises(PluginError) as caught:
        Registry().spec(name)
    return caught.value


def test_names_come_without_an_import(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin="raise AssertionError('imported')")

    names = Registry().names()

    assert {"copy", "rsync", "toy"} <= set(names)
    assert names == sorted(names)


def test_only_the_plugin_asked_for_is_imported_and_its_driver_later(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN, toy_driver="raise AssertionError('imported')")
    install(site, "other-store", {"other": "other_plugin"}, other_plugin=PLUGIN)

    spec = Registry().spec("toy")

    assert spec.name == "toy"
    assert "toy_plugin" in sys.modules
    assert not {"other_plugin", "toy_driver"} & sys.modules.keys()


def test_two_distributions_with_one_plugin_name_are_both_named(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN)
    install(site, "game-store", {"toy": "game_plugin"}, game_plugin=PLUGIN)

    error = refused("toy")

    assert error.distribution == "game-store 1.0 and toy-store 1.0"
    assert "uninstall" in str(error)


def test_a_plugin_that_cannot_be_imported_is_reported_with_its_cause(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin="import json\njson.no_such_name")

    error = refused("toy")

    assert error.distribution == "toy-store 1.0"
    assert isinstance(error.__cause__, AttributeError)
    assert "no_such_name" in str(error)


def test_a_missing_library_that_an_extra_installs_is_told_with_the_command(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, extras="toy", toy_plugin="import no_such_library")

    error = refused("toy")

    assert isinstance(error.__cause__, ModuleNotFoundError)
    assert "pip install 'toy-store[toy]'" in str(error)


def test_an_unknown_name_brings_the_close_ones() -> None:
    error = refused("rsinc")

    assert "did you mean 'rsync'?" in str(error)
    assert error.distribution is None


def test_an_unknown_name_like_no_other_brings_the_way_to_install_one() -> None:
    assert "pip install" in str(refused("zzzzzz"))


def test_a_misspelt_hook_is_refused(site: Path) -> None:
    install(
        site,
        "toy-store",
        {"toy": "toy_plugin"},
        toy_plugin="""
            from storebackends.plugin import hookimpl

            @hookimpl
            def storebackends_bakends():
                return []
        """,
    )

    error = refused("toy")

    assert error.distribution == "toy-store 1.0"
    assert "storebackends_bakends" in str(error)
    assert "storebackends_backends, storebackends_event" in str(error)


def test_a_plugin_without_any_hook_is_refused(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin="def storebackends_backends(): return []")

    assert "no function decorated with hookimpl" in str(refused("toy"))


@pytest.mark.parametrize("answer", ["None", "SPEC", "'toy'", "[SPEC, 'toy']", "1 / 0"])
def test_a_hook_that_answers_junk_or_raises_is_refused(site: Path, answer: str) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN.replace("return [SPEC]", f"return {answer}"))

    error = refused("toy")

    assert error.distribution == "toy-store 1.0"
    assert "storebackends_backends()" in str(error)


def test_a_backend_not_called_as_its_entry_point_is_refused(site: Path) -> None:
    install(site, "toy-store", {"game": "toy_plugin"}, toy_plugin=PLUGIN)

    assert "no backend of its entry point's name 'game' (it has: 'toy')" in str(refused("game"))


@pytest.mark.parametrize(("api", "upgrade"), [(0, "upgrade the plugin"), (API + 1, "upgrade storebackends")])
def test_an_api_outside_the_window_says_which_side_to_upgrade(site: Path, api: int, upgrade: str) -> None:
    source = PLUGIN.replace("Support(True))", f"Support(True), api={api})")
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=source)

    error = refused("toy")

    assert f"api {api}" in str(error)
    assert upgrade in str(error)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        ("import no_such_library", "no_such_library"),
        ("", "has no attribute 'Toy'"),
        ("class Toy: pass", "not a class derived from Backend"),
        ("from storebackends.plugin import Backend\nclass Toy(Backend): pass", "does not define build, copy_in"),
    ],
)
def test_a_driver_that_cannot_serve_names_the_distribution(site: Path, driver: str, reason: str) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN, toy_driver=driver)
    registry = Registry()
    spec = registry.spec("toy")

    with pytest.raises(PluginError) as caught:
        registry.driver(spec)

    assert caught.value.distribution == "toy-store 1.0"
    assert reason in str(caught.value)


def test_all_specs_come_with_the_errors_of_those_that_are_broken(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN)
    install(site, "broken-store", {"broken": "broken_plugin"}, broken_plugin="import no_such_library")
    install(site, "ears", {"ears": "ears_plugin"}, ears_plugin=LISTENER)

    specs = Registry().specs()

    assert isinstance(specs["toy"], BackendSpec)
    assert isinstance(specs["broken"], PluginError)
    assert "ears" not in specs


def test_one_package_may_answer_to_two_names(site: Path) -> None:
    two = PLUGIN.replace("return [SPEC]", "import dataclasses; return [SPEC, dataclasses.replace(SPEC, name='game')]")
    install(site, "toy-store", {"toy": "toy_plugin", "game": "toy_plugin"}, toy_plugin=two)

    registry = Registry()

    assert [registry.spec(name).name for name in ("toy", "game")] == ["toy", "game"]


@pytest.mark.parametrize("name", ["ears", "Big_Ears"])
def test_only_the_plugins_named_hear_events(site: Path, name: str) -> None:
    install(site, "big-ears", {"ears": "ears_plugin"}, ears_plugin=LISTENER)
    install(site, "deaf", {"deaf": "deaf_plugin"}, deaf_plugin="raise AssertionError('imported')")

    Registry().hooks([name]).storebackends_event(store=None, event="started")

    assert sys.modules["ears_plugin"].heard == ["started"]


def test_a_plugin_named_twice_hears_an_event_once(site: Path) -> None:
    install(site, "big-ears", {"ears": "ears_plugin"}, ears_plugin=LISTENER)

    Registry().hooks(["ears", "big-ears"]).storebackends_event(store=None, event="started")

    assert sys.modules["ears_plugin"].heard == ["started"]


def test_a_plugin_that_only_listens_is_no_backend(site: Path) -> None:
    install(site, "big-ears", {"ears": "ears_plugin"}, ears_plugin=LISTENER)

    assert "only listens to events" in str(refused("ears"))


def test_what_a_half_removed_distribution_left_disturbs_nobody(site: Path) -> None:
    install(site, "toy-store", {"toy": "toy_plugin"}, toy_plugin=PLUGIN)
    install(site, "gone-store", {"gone": "gone_plugin"})
    (site / "gone_store-1.0.dist-info" / "METADATA").unlink()

    registry = Registry()

    assert registry.spec("toy").name == "toy"
    assert len(registry.find("toy-store")) == 1
    assert "gone_plugin" in str(refused("gone"))


def test_every_backend_is_asked_and_what_is_broken_answers_no(site: Path, tmp_path: Path) -> None:
    install(site, "toys", {"toy": "toy_plugin"}, toy_plugin=PLUGIN.replace("Support(True)", "1 / 0"))
    install(site, "wrecks", {"wreck": "wreck_plugin"}, wreck_plugin="import missing_module")

    answers = Registry().supports(tmp_path / "not" / "yet")

    assert answers["copy"].usable
    assert answers["toy"].reason == "its probe failed with ZeroDivisionError: division by zero"
    assert not answers["wreck"].usable
    assert "missing_module" in answers["wreck"].reason


def test_the_best_is_the_usable_one_that_ranks_highest() -> None:
    answers = {
        "plain": Support(True, rank=10),
        "fast": Support(True, rank=50),
        "broken": Support(False, rank=100),
        "asked": Support(True),
    }

    assert best(answers) == "fast"


def test_what_ranks_at_nothing_is_never_chosen_unasked() -> None:
    with pytest.raises(NotSupported, match=r"asked: only where it is named; broken: no disk.*name one"):
        best({"asked": Support(True), "broken": Support(False, "no disk")})
