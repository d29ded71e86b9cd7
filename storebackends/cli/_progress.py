"""What is shown while things are built: nothing, plain lines, or a live display on a terminal.

progress.begin("wheel")          a step is next
progress.follow(log)             it is being built: it was not there already
progress.end("built", seconds)   it is done
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TextIO

import click

from ._common import printable

if TYPE_CHECKING:
    from rich.console import Group

    from storebackends.log import BuildLog

WORDS = {"hit": "cached", "attached": "built by another process"}
_LINE = 64 * 1024  # a line that goes on for longer is cut in pieces
_SHOWN = 8  # lines of the running step's log
_KEPT = 40  # lines of a failed one's


class Progress:
    """Shows nothing: the base of the others."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self._follower: _Follower | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, name: str) -> None:
        """The step *name* is next."""

    def follow(self, log: BuildLog) -> None:
        """It is being built, and this is its log."""

    def end(self, outcome: str, seconds: float) -> None:
        """It is done, with one of the outcomes of a result, or failed or cancelled. Raises what showing its log did."""
        self.outcomes.append(outcome)
        follower, self._follower = self._follower, None
        if follower:
            follower.finish()

    def summary(self, seconds: float) -> str:
        """How it all went, in one line."""
        words = [WORDS.get(outcome, outcome) for outcome in self.outcomes]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        return f"{len(words)} step{'s' * (len(words) != 1)} in {seconds:.1f} s: {counts}"


class Plain(Progress):
    """A line for each thing that happens, and those of the logs, indented."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out
        self._name = ""

    def begin(self, name: str) -> None:
        self._name = name

    def follow(self, log: BuildLog) -> None:
        self._line(f"-> {self._name}")
        self._follower = _Follower(log, lambda line: self._line(f"   {line}"))

    def end(self, outcome: str, seconds: float) -> None:
        super().end(outcome, seconds)
        took = "" if outcome == "hit" else f" in {seconds:.1f} s"
        self._line(f"<- {self._name}: {WORDS.get(outcome, outcome)}{took}")

    def _line(self, text: str) -> None:
        click.echo(text, file=self._out)


class Live(Progress):
    """The running step and the last lines of its log, redrawn in place below the steps that are done."""

    def __init__(self) -> None:
        # Not above: rich takes longer to import than many a command to run.
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self._name, self._since = "", 0.0
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, name: str) -> None:
        self._lines.clear()
        self._name, self._since = name, time.monotonic()

    def follow(self, log: BuildLog) -> None:
        self._follower = _Follower(log, self._lines.append)

    def end(self, outcome: str, seconds: float) -> None:
        super().end(outcome, seconds)
        if outcome == "failed":
            for line in self._lines:
                self._print(f"  {line}", "dim")
        mark, style = {"hit": ("=", "cyan"), "failed": ("x", "red"), "cancelled": ("x", "yellow")}.get(
            outcome, ("+", "green")
        )
        self._print(f"{mark} {self._name}  {seconds:.1f} s  {WORDS.get(outcome, outcome)}", style)
        self._name = ""

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style))

    def _render(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        if not self._name:
            return Group()
        head = Text(f"> {self._name}  {time.monotonic() - self._since:.1f} s", style="bold")
        tail = [Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in [*self._lines][-_SHOWN:]]
        return Group(head, *tail)


class _Follower(threading.Thread):
    """Hands on the lines of a log, in a thread of its own, as they are written."""

    def __init__(self, log: BuildLog, line: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self._log, self._reader, self._line = log, log.tail(), line
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        rest = b""
        try:
            for chunk in self._reader:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._line(_text(line))
                if len(rest) > _LINE:
                    self._line(_text(rest))
                    rest = b""
            if rest:
                self._line(_text(rest))
        except Exception as error:  # noqa: BLE001 (the thread that builds raises it)
            self._error = error
        finally:
            self._reader.close()

    def finish(self) -> None:
        """Wait for the last line. Raises what went wrong on the way, such as BrokenPipeError."""
        if self._log.state == "open":  # left behind by a second interrupt: nobody will finish it
            self._reader.close()
        self.join()
        if self._error:
            raise self._error


def choose(*, quiet: bool = False, as_json: bool = False, live: bool = True) -> Progress:
    """What suits the options and stdout, which is left to the JSON where that is asked for."""
    if quiet:
        return Progress()
    if as_json:
        return Plain(sys.stderr)
    if live and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return Live()
    return Plain(sys.stdout)


def _text(line: bytes) -> str:
    """A line as a terminal would show it in the end, and without what would steer the terminal."""
    text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
    return printable(click.unstyle(text)).expandtabs()
