from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storebackends import InvalidId
from storebackends.ids import MAX_LENGTH, check_id, new_attempt

ALPHABET = string.ascii_letters + string.digits + "._-"


@pytest.mark.parametrize("id", ["a", "A.b-c_9", "0", "x" * MAX_LENGTH, "console", "com", "a..b", "sha256-ab"])
def test_an_id_may_be(id: str) -> None:
    assert check_id(id) == id


@pytest.mark.parametrize(
    ("id", "reason"),
    [
        ("", "at least one"),
        ("x" * 129, "129 characters"),
        ("a/b", "letters, digits"),
        ("..", "letters, digits"),
        ("a\0", "letters, digits"),
        ("a\n", "letters, digits"),
        ("a b", "letters, digits"),
        ("a~b", "letters, digits"),
        ("١", "letters, digits"),
        ("a.", "trailing dot"),
        ("CON", "device"),
        ("com1.tar.gz", "device"),
        (None, "not NoneType"),
        (b"a", "not bytes"),
    ],
)
def test_an_id_may_not_be(id: object, reason: str) -> None:
    with pytest.raises(InvalidId, match=reason):
        check_id(id)  # type: ignore[arg-type]


@given(st.text(max_size=140))
def test_what_passes_is_one_plain_file_name(text: str) -> None:
    try:
        id = check_id(text)
    except InvalidId:
        return
    assert set(id) <= set(ALPHABET)
    assert id[0] in string.ascii_letters + string.digits
    assert id not in (".", "..")
    assert len(id) <= MAX_LENGTH


def test_attempts_differ() -> None:
    assert len({new_attempt() for _ in range(1000)}) == 1000
