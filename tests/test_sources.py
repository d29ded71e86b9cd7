"""What a copy's digest depends on, what a copy keeps, and how a tree is searched for a path."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from storebackends import StoreError, sources
from storebackends.sources import gather, naming
from tests.capabilities import needs


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A folder that holds one of each."""
    folder = tmp_path / "top"
    (folder / "src" / "empty").mkdir(parents=True)
    (folder / "src" / "file").write_bytes(b"content")
    (folder / "src" / "program").write_bytes(b"#!/bin/sh\n")
    (folder / "src" / "program").chmod(0o755)
    (folder / "src" / "link").symlink_to("file")
    return folder


def make_pipe(path: Path) -> None:
    if sys.platform != "win32":
        os.mkfifo(path)


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@needs("symlinks")
def test_the_copy_has_the_digest_of_its_source(top: Path, tmp_path: Path) -> None:
    copied = gather(top, "src", into=tmp_path / "copy", time_ns=10**18)

    assert copied == gather(top, "src") == gather(tmp_path, "copy")
    assert os.readlink(tmp_path / "copy" / "link") == "file"
    assert {path.lstat().st_mtime_ns for path in (tmp_path / "copy").rglob("[!l]*")} == {10**18}


@needs("symlinks")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda src: (src / "file").write_bytes(b"Content"), id="content"),
        pytest.param(lambda src: (src / "file").rename(src / "other"), id="name"),
        pytest.param(lambda src: (src / "empty").rmdir(), id="an empty folder"),
        pytest.param(lambda src: (src / "empty" / "new").touch(), id="a new file"),
        pytest.param(lambda src: relink(src / "link", "program"), id="the target of a link"),
        pytest.param(
            lambda src: (src / "file").chmod(0o755),
            id="executable",
            marks=pytest.mark.skipif(os.name == "nt", reason="needs permission bits"),
        ),
    ],
)
def test_what_a_copy_keeps_changes_the_digest(top: Path, change: Callable[[Path], object]) -> None:
    before = gather(top, "src")

    change(top / "src")

    assert gather(top, "src") != before


@needs("symlinks")
def test_times_and_the_rest_of_a_mode_do_not_change_the_digest(top: Path) -> None:
    before = gather(top, "src")

    os.utime(top / "src" / "file", (0, 0))
    (top / "src" / "file").chmod(0o600)
    (top / "src").chmod(0o700)

    assert gather(top, "src") == before


@needs("symlinks")
def test_what_is_excluded_is_neither_digested_nor_copied(top: Path, tmp_path: Path) -> None:
    before = gather(top, "src")
    (top / "src" / "sub" / "cache").mkdir(parents=True)
    (top / "src" / "sub" / "cache" / "file").touch()
    (top / "src" / "a.o").touch()

    digest = gather(top, "src", ["cache", "*.o", "sub"], tmp_path / "copy")

    assert digest == before
    assert not list((tmp_path / "copy").rglob("cache")) + list((tmp_path / "copy").rglob("*.o"))


def test_a_pattern_with_a_slash_is_of_the_whole_path(top: Path) -> None:
    (top / "a").mkdir()
    for path in ("a/x.c", "x.c"):
        (top / path).touch()

    one, none = gather(top, ".", ["src", "a/*.c"]), gather(top, ".", ["src", "b/*.c"])

    (top / "a" / "x.c").unlink()
    assert one == gather(top, ".", ["src"]) != none


@needs("symlinks")
def test_the_way_to_a_source_may_lead_through_a_link_inside(top: Path) -> None:
    (top / "current").symlink_to("src")

    digest = gather(top, "current/file")

    assert digest == gather(top, "src/file")


@needs("symlinks")
@pytest.mark.parametrize("target", ["/", ".."])
def test_the_way_to_a_source_may_not_lead_outside(top: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").touch()
    (top / "out").symlink_to(target)

    with pytest.raises(StoreError, match="leads out of"):
        gather(top, "out/secret" if target == ".." else f"out{tmp_path}/secret")


@needs("symlinks")
def test_a_source_that_is_a_link_is_copied_as_a_link(top: Path, tmp_path: Path) -> None:
    (top / "out").symlink_to("/etc")

    gather(top, "out", into=tmp_path / "copy")

    assert os.readlink(tmp_path / "copy") == "/etc"


@pytest.mark.parametrize("source", ["none", "none/below", "src/file/below"])
def test_a_source_that_is_not_there_is_named(top: Path, source: str) -> None:
    with pytest.raises(StoreError, match=f"copying '{source}' from .*top failed"):
        gather(top, source)


@needs("fork")
def test_a_pipe_is_refused_and_not_waited_for(top: Path) -> None:
    make_pipe(top / "src" / "pipe")

    with pytest.raises(StoreError, match="'pipe' is neither file, folder nor link; exclude it"):
        gather(top, "src")

    assert gather(top, "src", ["pipe"])


@needs("fork")
def test_names_that_are_no_text_are_copied(top: Path, tmp_path: Path) -> None:
    try:
        (top / os.fsdecode(b"\xff\n")).touch()
    except OSError:
        pytest.skip("needs a file system with any names: put TMPDIR on one")

    gather(top, ".", into=tmp_path / "copy")

    assert os.fsencode(tmp_path / "copy" / os.fsdecode(b"\xff\n")) in map(os.fsencode, (tmp_path / "copy").iterdir())


@needs("unprivileged")
def test_a_folder_that_cannot_be_read_is_no_empty_one(top: Path) -> None:
    (top / "src" / "empty").chmod(0)

    with pytest.raises(StoreError, match="Permission denied"):
        gather(top, "src")

    (top / "src" / "empty").chmod(0o700)


@needs("symlinks")
def test_files_and_links_that_hold_a_path_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    path.mkdir()
    (path / "a").write_text(f"x{path}/y")
    (path / "b").write_text("nothing")
    (path / "c").symlink_to(path / "b")

    named = naming(path, path, 0)

    assert named == ["a", "c"]


def test_a_path_is_found_where_two_reads_meet(tmp_path: Path) -> None:
    needle = os.fsencode(tmp_path)
    (tmp_path / "file").write_bytes(b"\0" * (sources._CHUNK - len(needle) // 2) + needle)

    named = naming(tmp_path, tmp_path, 0)

    assert named == ["file"]


def test_at_most_five_are_named(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}").write_text(str(tmp_path))

    named = naming(tmp_path, tmp_path, 0)

    assert named == ["0", "1", "2", "3", "4"]


def test_what_is_older_than_the_build_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(str(tmp_path))
    written = (tmp_path / "file").stat().st_mtime_ns

    named = naming(tmp_path, tmp_path, written + 1)

    assert named == []


@needs("fork")
def test_a_search_passes_over_what_cannot_be_read(tmp_path: Path) -> None:
    make_pipe(tmp_path / "a pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # one hole
    (tmp_path / "last").write_text(str(tmp_path))

    named = naming(tmp_path, tmp_path, 0)

    assert named == ["last"]
    assert stat.S_ISFIFO((tmp_path / "a pipe").lstat().st_mode)
