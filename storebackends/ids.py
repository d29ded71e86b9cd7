"""What may be an id: the key of a result, and the name of a folder on every platform.

One rule everywhere, so that a store made on Linux can be carried to Windows and no id is ever a path.
"""

from __future__ import annotations

import re
import secrets
from functools import lru_cache

from .errors import InvalidId

MAX_LENGTH = 128
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
# Windows reserves these with any extension: "con.txt" is the console too.
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"] + [f"{name}{n}" for name in ("com", "lpt") for n in range(10)]
)


def check_id(id: str) -> str:
    """Return *id* if it may be one, else raise InvalidId. Touches no file."""
    if not isinstance(id, str):
        raise InvalidId(id, f"an id is a string, not {type(id).__name__}")
    _check(id)
    return id


@lru_cache(1024)
def _check(id: str) -> None:
    if not id:
        raise InvalidId(id, "an id has at least one character")
    if len(id) > MAX_LENGTH:
        raise InvalidId(id[:32] + "...", f"it has {len(id)} characters, the limit is {MAX_LENGTH}")
    if not _ID.fullmatch(id):
        raise InvalidId(id, "use letters, digits and . _ - only, starting with a letter or a digit")
    if id.endswith("."):
        raise InvalidId(id, "Windows drops a trailing dot, so two ids would be one; remove it")
    if id.split(".", 1)[0].lower() in _DEVICES:
        raise InvalidId(id, "it names a device on Windows; choose another name")


def new_attempt() -> str:
    """Return a fresh nonce for one try at building an id: 16 hexadecimal digits."""
    return secrets.token_hex(8)
