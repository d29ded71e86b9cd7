from __future__ import annotations

import json
from pathlib import Path

import pytest

from storebackends.errors import StoreError
from storebackends.records import Record
from tests.capabilities import needs

RECORD = Record("a", "0123", "b", "4567", "boot", 7, 1.5, 2.5, "failed", "no good", 42)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "build.json")

    assert Record.load(tmp_path / "build.json") == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"]


def test_the_first_record_goes_into_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "build.json"

    RECORD.begin(str(path))

    assert Record.load(path) == RECORD
    with pytest.raises(FileExistsError):
        RECORD.begin(str(path))


@pytest.mark.parametrize("odd", [r'"\u2028\n\\\ud800"', "1e400", "NaN", "[1, null]", "true", "0"])
def test_what_a_foreign_record_holds_is_written_as_json(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "build.json"
    path.write_text(
        f'{{"format": 1, "id": "a", "attempt": "0123", "pid": 0, "started": {odd}, "waits_for": ["b", "c"]}}'
    )
    before = json.dumps(json.loads(path.read_text()))

    Record.load(path).save(path)

    assert path.read_text().replace('"boot": "", ', "") == before


def test_keys_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "build.json"
    path.write_text(json.dumps({"format": 1, "id": "a", "attempt": "0123", "colour": "blue"}))

    assert Record.load(path) == Record("a", "0123")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[]", b"{}", b'{"id": 1, "attempt": "x"}', b"\xff"])
def test_what_is_no_record_is_told_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "build.json"
    path.write_bytes(content)

    with pytest.raises(StoreError, match="build.json"):
        Record.load(path)


def test_a_missing_record_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Record.load(tmp_path / "build.json")


@needs("symlinks")
def test_a_link_planted_where_a_record_is_written_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "build.json.part").symlink_to(precious)

    with pytest.raises(OSError, match=r"build\.json\.part"):
        RECORD.save(tmp_path / "build.json")

    assert precious.read_text() == "mine"
