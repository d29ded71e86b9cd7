"""The command line.

It starts fast: importing this imports click and nothing heavier, and each command imports what it needs. What a
command is asked for goes to stdout, what it has to say about that to stderr, and how it went is its exit code:

    0  done
    1  a build failed
    2  the command, the configuration, a recipe or a plugin is wrong
    3  refused: not there, in use, not possible here, no space, or the storage failed
    130  interrupted, by Ctrl-C or SIGTERM, after cleaning up
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from typing import Any

import click

from storebackends.errors import (
    BuildFailed,
    Cancelled,
    CommandFailed,
    ConfigError,
    InvalidId,
    PluginError,
    RecipeError,
    StoreError,
)

from ._build import build, import_, run
from ._cache import cache
from ._common import example, fail, printable
from ._fsck import fsck
from ._host import config, doctor, plugins, sync
from ._prune import prune
from ._results import df, log, ls, result, rm, show, tree

FAILED, WRONG, REFUSED, BUG, INTERRUPTED, UNREAD = 1, 2, 3, 70, 130, 141


class _Commands(click.Group):
    """The group, and the one place where an exception becomes a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            value = super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            ctx.exit(UNREAD)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (each has its message and its code)
            if ctx.params["debug"]:
                traceback.print_exc()
            fail(_message(error), _code(error))
        return value


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "storebackends import rootfs.tar.gz --id debian-12",
        "storebackends run --base debian-12 --id tools -- make install",
        "storebackends build recipe.toml",
    )
    + "\n\n\b\nExit codes:\n  0 done; 1 a build failed; 2 usage or configuration; 3 refused or busy; 130 interrupted",
)
@click.option("--store", metavar="NAME", help="The store to use, by its name in the configuration.")
@click.option("--debug", is_flag=True, envvar="STOREBACKENDS_DEBUG", help="Show tracebacks, and log all there is.")
@click.version_option(package_name="storebackends", message="%(version)s")
@click.pass_context
def cli(ctx: click.Context, store: str | None, debug: bool) -> None:
    """Keep what builds in steps: every finished tree under an id, published by one atomic rename.

    An id may be shortened to its first letters wherever that leaves no doubt.
    """
    ctx.obj = store
    _log_to_stderr(debug)


for group in (
    (build, run, import_, result, log, ls, tree, show, rm, df),
    (cache, prune, fsck, config, plugins, doctor, sync),
):
    for command in group:
        cli.add_command(command)


def main() -> None:
    """Run the command line and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a log may have what the terminal's encoding has not
    # As Ctrl-C does, so that the store's clean-up runs. Under nohup it stays ignored.
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    cli(prog_name="storebackends")


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"storebackends: {record.levelname.lower()}: {printable(record.getMessage())}", err=True)


def _log_to_stderr(debug: bool) -> None:
    logger = logging.getLogger("storebackends")
    logger.handlers = [_Echo()]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)


def _message(error: BaseException) -> str:
    match error:
        case KeyboardInterrupt():
            return "interrupted"
        case StoreError() | OSError():
            return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return f"this is a bug: {type(error).__name__}: {error}; --debug shows where"


def _code(error: BaseException) -> int:
    match error:
        case KeyboardInterrupt() | Cancelled():
            return INTERRUPTED
        case BuildFailed() | CommandFailed():
            return FAILED
        case ConfigError() | RecipeError() | InvalidId() | PluginError():
            return WRONG
        case StoreError() | OSError():
            return REFUSED
    return BUG
