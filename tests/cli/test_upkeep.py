"""Commands that keep a store small and sound: prune and fsck."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.cli.host import Host
from tests.stores import open_copy, writes


@pytest.fixture
def family(host: Host) -> Host:
    """A host whose store has a base, an app on it, and one on its own, whose digests are kept."""
    with open_copy(host.root, verify="digest") as store:
        for id, base in [("base", None), ("app", "base"), ("lone", None)]:
            store.build(id, writes(f=id), base).release()
    return host


def rules(host: Host, **rules: str | int) -> None:
    host.configure()
    lines = [f"{rule} = {json.dumps(value)}" for rule, value in rules.items()]
    host.config.write_text("\n".join([host.config.read_text(), "[stores.only.prune]", *lines]))


def test_prune_tells_what_goes_and_why_the_rest_stays(family: Host) -> None:
    planned = family("prune", "--max-items", "2", "--dry-run").out.splitlines()
    done = family("prune", "--max-items", "2").out.splitlines()

    assert planned[0].startswith("would go  app  ") or planned[0].startswith("would go  lone  ")
    assert "(estimate)  used 0 s ago; max_items 2: there are 3" in planned[0]
    assert done[-1].startswith("1 results gone, ")
    assert len(family("ls").out.splitlines()) == 2


def test_prune_goes_by_the_configured_rules_and_ends_with_3_where_one_is_not_met(family: Host) -> None:
    rules(family, keep_for="1h", max_items=1)

    said = family("prune", code=3)
    plan = family("prune", "--json", code=3)

    assert "not met: max_items 1: there are 3; held back by 1 built on, 2 used within keep_for 1h" in said.err
    assert {kept["id"] for kept in plan.json["kept"]} == {"base", "app", "lone"}
    assert plan.json["steps"] == []
    assert len(family("ls").out.splitlines()) == 3


def test_prune_all_takes_what_is_not_in_use_whatever_is_configured(family: Host) -> None:
    rules(family, keep_for="1h", max_items=1)

    with open_copy(family.root) as store, store.result("lone") or pytest.fail("it is there"):
        plan = family("prune", "--all", "--json").json

    assert [step["id"] for step in plan["steps"]] == ["app", "base"]
    assert plan["freed"]["bytes"] == sum(step["frees"]["bytes"] for step in plan["steps"]) > 0
    assert [kept["id"] for kept in plan["kept"]] == ["lone"]
    assert family("ls").out == "lone\n"


@pytest.mark.parametrize("argv", [[], ["--keep-for", "7d"], ["--min-free", "much"], ["--all", "--keep-for", "7 days"]])
def test_prune_without_a_rule_or_with_a_wrong_one_is_refused(family: Host, argv: list[str]) -> None:
    assert "prune" in family("prune", *argv, code=2).err

    assert len(family("ls").out.splitlines()) == 3


def test_a_build_makes_room_first_by_the_configured_rules(family: Host) -> None:
    rules(family, min_free="100%")

    said = family("run", "--base", "base", "--id", "new", "--", sys.executable, "-c", "")

    assert "before a build: min_free 100%" in said.err
    assert sorted(family("ls").out.split()) == ["base", "new"]


def test_fsck_tells_what_a_crash_left_and_repairs_when_asked(family: Host) -> None:
    (family.root / "in-progress" / "dead~0123").mkdir()
    (family.root / "notes").touch()

    told = family("fsck", code=3)
    repaired = family("fsck", "--repair", "--json").json

    assert "unfinished: dead: " in told.out
    assert "--repair mends what it can" in told.err
    assert [finding["kind"] for finding in repaired["findings"]] == ["unfinished", "unknown"]
    assert repaired["is_clean"]
    assert os.listdir(family.root / "in-progress") == []


def test_fsck_compares_a_sample_and_says_how_to_choose_it_again(family: Host) -> None:
    for id in ("base", "app", "lone"):
        (family.root / "result" / id / "rootfs" / "f").write_text("rotten")

    said = family("fsck", "--content", "--sample", "1", code=3).out.splitlines()
    seed = said[-1].split("--seed ")[1].split()[0]

    assert said[-1].startswith("3 results checked, 1 of them compared; 1 findings")
    assert family("fsck", "--content", "--sample", "1", "--seed", seed, code=3).out.splitlines() == said
    assert "give both" in family("fsck", "--sample", "1", code=2).err


def test_digests_are_kept_where_the_configuration_says_so(host: Host) -> None:
    host.configure(verify="digest")

    host("run", "--id", "app", "--", sys.executable, "-c", "")

    assert "1 results checked, 1 of them compared; 0 findings" in host("fsck", "--content").out
