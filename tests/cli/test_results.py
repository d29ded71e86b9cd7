"""Commands on what a store holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.capabilities import needs
from tests.cli.host import Host
from tests.stores import WAIT, files, open_copy, writes

Mounted = Callable[..., AbstractContextManager[Path]]


@pytest.fixture
def family(host: Host) -> Host:
    """A host whose store has a base, two children of it, a grandchild, and one on its own."""
    with open_copy(host.root) as store:
        for id, base in [("base", None), ("app-1", "base"), ("app-2", "base"), ("app-1-test", "app-1"), ("lone", None)]:
            store.build(id, writes(f=id), base).release()
    return host


def test_result_prints_where_the_tree_is(family: Host) -> None:
    path = family("result", "app-2").out
    facts = family("result", "app-2", "--json").json

    assert files(Path(path.removesuffix("\n"))) == {"f": "app-2"}
    assert (facts["path"] + "\n", facts["id"], facts["base"]) == (path, "app-2", "base")


@needs("overlay")
def test_result_gives_no_path_that_ends_with_the_command(host: Host, small_tmpfs: Mounted) -> None:
    with small_tmpfs() as disk:
        host.root = disk / "store"
        host.configure(backend="overlay")
        host("run", "--id", "app", "--", "touch", "made")

        said = host("result", "app", code=3).err

        assert "storebackends run --base app -- ..." in said
        host("run", "--id", "child", "--base", "app", "--", "ls")
        assert host("log", "child").out == "$ ls\nmade\n"


def test_an_id_may_be_cut_short_where_that_leaves_no_doubt(family: Host) -> None:
    assert family("show", "l", "--json").json["id"] == "lone"
    assert family("show", "app-1", "--json").json["id"] == "app-1"
    assert "'app' may be any of 3 ids: app-1, app-1-test, app-2" in family("show", "app", code=2).err
    assert family("run", "--id", "new", "--base", "ba", "--json", "--", sys.executable, "-c", "").json["base"] == "base"


def test_ls_lists_ids_or_all_that_is_recorded(family: Host) -> None:
    ids = family("ls").out.splitlines()
    long = family("ls", "-l").out.splitlines()
    records = [json.loads(line) for line in family("ls", "--json").out.splitlines()]

    assert sorted(ids) == ["app-1", "app-1-test", "app-2", "base", "lone"]
    assert {tuple(line.split()[:2]) for line in long} == {(record["id"], record["base"] or "-") for record in records}
    assert {record["id"]: record["base"] for record in records}["app-1-test"] == "app-1"


def test_ls_passes_over_a_broken_record_and_says_so(family: Host) -> None:
    (family.root / "result" / "lone" / "build.json").write_text("{")

    said = family("ls", "--json")

    assert len(said.out.splitlines()) == 4
    assert "is not a build's record" in said.err
    family("rm", "lone")
    assert "lone" not in family("ls").out


def test_tree_shows_what_was_built_on_what(family: Host) -> None:
    assert family("tree").out == "base\n|-- app-1\n|   `-- app-1-test\n`-- app-2\nlone\n"
    assert family("tree", "app-1").out == "app-1\n`-- app-1-test\n"


def test_tree_of_a_long_chain_needs_no_recursion(host: Host) -> None:
    length = 1200
    with open_copy(host.root) as store:
        for n in range(length):
            store.build(f"n{n}", lambda work: None, f"n{n - 1}" if n else None).release()

    lines = host("tree").out.splitlines()

    assert len(lines) == length
    assert lines[-1].lstrip(" `-") == f"n{length - 1}"


def test_show_tells_what_is_known(family: Host) -> None:
    facts = family("show", "base", "--json").json
    text = family("show", "base").out

    assert facts["children"] == ["app-1", "app-2"]
    assert facts["size"]["bytes"] > 0
    assert facts["log_length"] == 2
    assert f"attempt   {facts['attempt']}\n" in text
    assert "children  app-1, app-2\n" in text


def test_rm_removes_all_it_was_asked_to(family: Host) -> None:
    family("rm", "lone", "app-2")
    assert sorted(family("ls").out.split()) == ["app-1", "app-1-test", "base"]

    family("rm", "-r", "base")
    assert family("ls").out == ""


def test_rm_removes_nothing_where_one_is_not_there(family: Host) -> None:
    family("rm", "lone", "nothing", code=3)

    assert "lone" in family("ls").out.split()


def test_df_tells_the_space_below_the_store(family: Host) -> None:
    facts = family("df", "--json").json
    text = family("df").out

    assert facts["path"] == str(family.root)
    assert 0 < facts["free"] <= facts["total"]
    assert "backend  copy\n" in text


def test_log_is_the_bytes_as_they_were_written(family: Host) -> None:
    noise = bytes(range(256)) * 300 + b"no newline"
    with open_copy(family.root) as store:
        store.build("noisy", lambda work: work.log.write(noise)).release()

    for argv in (["log", "noisy"], ["log", "-f", "nois"]):
        with family.start(*argv) as process:
            out, err = process.communicate(timeout=WAIT)
        assert (process.returncode, out, err) == (0, noise, b"")


def test_log_of_a_failure_is_kept(family: Host) -> None:
    family("run", "--id", "broken", "--", sys.executable, "-c", "print('last words'); exit(3)", code=1)

    assert family("log", "brok").out.endswith("\nlast words\n")


@needs("sh")
def test_log_follows_a_build_of_another_process_to_its_end(host: Host) -> None:
    go = host.folder / "go"
    loop = f"echo one; while [ ! -e '{go}' ]; do sleep 0.02; done; echo two"
    with host.start("run", "--id", "slow", "--", "sh", "-c", loop) as builder:
        assert builder.stdout is not None
        while builder.stdout.readline().strip() != b"one":
            assert builder.poll() is None
        with host.start("log", "-f", "slow") as follower:
            assert follower.stdout is not None
            seen = b""
            while not seen.endswith(b"\none\n"):
                seen += follower.stdout.readline()
                assert follower.poll() is None
            go.touch()
            rest, err = follower.communicate(timeout=WAIT)
        builder.communicate(timeout=WAIT)

    assert (rest, err) == (b"two\n", b"")
    assert seen + rest == host("log", "slow").out.encode()
