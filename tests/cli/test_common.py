"""How things are shown."""

from __future__ import annotations

import pytest

from storebackends.cli._common import human_size, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünicode 漢字\n\tkept", "plain, ünicode 漢字\n\tkept"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("right \u202e left", "right \\u202e left"),
        ("not \udcff text", "not \\udcff text"),
    ],
)
def test_printable_spells_out_what_is_not(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 60, "3072.0 PiB")],
)
def test_sizes_are_shown_in_the_unit_that_fits(size: int, shown: str) -> None:
    assert human_size(size) == shown
