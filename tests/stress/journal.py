"""What the stress test's processes did, in one order: a file outside the store, a line an event, each one write(2).

    {"event": "begin", "pid": 7, "call": "7.3.12", "id": "a", "attempt": "…"}

O_APPEND puts every line after all that were there, whoever writes; so a line that stands before another was written
before it. A process that is killed in its write may leave a torn line: each begins with a line feed for that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Journal:
    """One process's hand on the journal; for all its threads."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, event: str, **facts: object) -> None:
        os.write(self._fd, f"\n{json.dumps({'event': event, 'pid': os.getpid(), **facts})}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> list[Event]:
    """All events, in their order; torn lines are passed over, as nobody who lives wrote them."""
    events = []
    for line in path.read_bytes().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
