"""Commands on the host: configuration, plugins, doctor."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from tests.cli.host import Host
from tests.distributions import PLUGIN, install
from tests.stores import open_copy


def test_config_check_names_the_file_and_the_stores(host: Host) -> None:
    assert host("config", "check").out == f"{host.config}: good; stores: only (the default)\n"


def test_config_check_reports_every_problem(host: Host) -> None:
    host.config.write_text('defualt = "x"\n[stores.only]\npath = "relative"\n')

    said = host("config", "check", code=2)

    assert "did you mean 'default'?" in said.err
    assert "stores.only.path: should be an absolute path" in said.err


def test_config_show_is_a_configuration_that_means_the_same(host: Host) -> None:
    host.configure(path=str(host.folder / 'a "quoted" \x7f folder'), reflink="never")
    facts = host("config", "show", "--json").json

    host.config.write_text(host("config", "show").out)

    assert tomllib.loads(host.config.read_text())["stores"]["only"]["reflink"] == "never"
    assert host("config", "show", "--json").json == facts


def test_plugins_lists_what_is_installed_and_what_is_broken(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    site = host.folder / "site"
    install(site, "toys", {"toy": "toy_plugin"}, toy_plugin=PLUGIN)
    install(site, "wrecks", {"wreck": "wreck_plugin"}, wreck_plugin="import missing_module")
    monkeypatch.syspath_prepend(site)

    facts = {fact["name"]: fact for fact in host("plugins", "--json").json}
    text = host("plugins").out

    assert {"copy", "rsync", "toy", "wreck"} <= facts.keys()
    assert (facts["toy"]["kind"], facts["toy"]["distribution"]) == ("backend", "toys 1.0")
    assert facts["wreck"]["kind"] == "broken"
    assert "missing_module" in facts["wreck"]["summary"]
    assert "toy          backend   toys 1.0: " in text


def test_doctor_tells_what_works_and_tries_the_stores(host: Host) -> None:
    before = host("doctor", "--json").json
    open_copy(host.root).close()
    after = host("doctor", "--json").json

    assert before["backends"]["copy"]["usable"] is True
    assert not before["stores"]["only"]["made"]
    assert after["stores"]["only"] == {"backend": "copy", "path": str(host.root), "made": True, "problem": ""}
    assert "ok  copy" in host("doctor", "--path", host.folder).out


def test_doctor_tells_what_auto_means(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    site = host.folder / "site"
    install(site, "toys", {"toy": "toy_plugin"}, toy_plugin=PLUGIN.replace("Support(True)", "Support(True, rank=1000)"))
    monkeypatch.syspath_prepend(site)
    host.configure(backend="auto")

    said = host("doctor", "--json").json
    text = host("doctor").out

    assert (said["auto"], said["backends"]["toy"]["rank"]) == ("toy", 1000)
    assert said["stores"]["only"]["backend"] == "auto: toy"
    assert "ok  auto: means toy" in text
    open_copy(host.root).close()
    assert host("doctor", "--json").json["stores"]["only"]["backend"] == "copy"


def test_doctor_makes_no_store(host: Host) -> None:
    host("doctor")

    assert not host.root.exists()


def test_doctor_says_why_a_store_cannot_be_opened(host: Host) -> None:
    open_copy(host.root).close()
    os.truncate(host.root / "store.json", 1)

    said = host("doctor", code=3)

    assert "NO  only: " in said.out
    assert "is no store's marker" in said.out
    assert "cannot be used: only" in said.err


def test_doctor_goes_on_without_a_configuration_and_past_a_broken_probe(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    install(site, "toys", {"toy": "toy_plugin"}, toy_plugin=PLUGIN.replace("Support(True)", "1 / 0"))
    monkeypatch.syspath_prepend(site)
    host.config.write_text("[")

    said = host("doctor", code=2)

    assert "ok  copy" in said.out
    assert "NO  toy: its probe failed with ZeroDivisionError" in said.out
    assert "is not valid TOML" in said.err
