"""Renames and removals that a program which looks at a file for a moment cannot stop.

Windows refuses to rename a folder while a file below it is open, and to rename or remove a file while it is itself, by
whomever: a scanner for viruses, an indexer, a reader of a log in another process. Most of them let go within moments,
so such a refusal is tried again, within a bound. Elsewhere nothing is refused, and these are the calls of `os`.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from .errors import StoreError

LIMIT = 10.0
"""Seconds after which a program that keeps a file open is not waited for any more."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

if sys.platform == "win32":
    # ERROR_ACCESS_DENIED, which is also what a folder with an open file below it gives; sharing and lock violation.
    _REFUSALS = (5, 32, 33)
    _FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1

    def patiently(verb: Callable[_P, _R]) -> Callable[_P, _R]:
        """*verb* as it is, but tried again while a file is open elsewhere. StoreError once that takes too long."""

        @functools.wraps(verb)
        def patient(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            deadline, pause = time.monotonic() + LIMIT, _FIRST_PAUSE
            while True:
                try:
                    return verb(*args, **kwargs)
                except PermissionError as error:
                    if error.winerror not in _REFUSALS:
                        raise
                    if time.monotonic() >= deadline:
                        raise StoreError(
                            f"Windows refused to touch {error.filename} for {LIMIT:g} s ({error.strerror}): a program "
                            "has it or a file below it open, or this user may not; Resource Monitor tells which "
                            "(CPU, Associated Handles); close it, or leave the store out of the virus scanner's reach"
                        ) from error
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

        return patient

else:

    def patiently(verb: Callable[_P, _R]) -> Callable[_P, _R]:
        """*verb* as it is."""
        return verb


rename, replace = patiently(os.rename), patiently(os.replace)
