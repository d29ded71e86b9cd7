"""The plugin `metrics`: counts what happens in the stores of a host, for Prometheus.

It counts once it is listed under ``plugins``, and exports what ``[plugin.metrics]`` asks for: a file for the textfile
collector of node_exporter, an HTTP endpoint, or both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from storebackends.plugin import NotSupported, Options, hookimpl

if TYPE_CHECKING:
    from .exporter import Exporter

_exporter: Exporter | None = None  # of the options that were used last


def _prom(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_absolute() or path.suffix != ".prom":
        raise ValueError("should be an absolute path that ends in .prom, which the collector looks for")
    return path


class MetricsOptions(Options):
    """What ``[plugin.metrics]`` may say."""

    textfile: Annotated[Path, AfterValidator(_prom)] | None = None
    """The file to keep; all processes that name it add what they count."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The port to listen at while a store is open; 0 takes a free one, and logs it."""
    host: str = "127.0.0.1"
    """The address to listen at."""

    @model_validator(mode="after")
    def _export_something(self) -> MetricsOptions:
        if self.textfile is None and self.port is None:
            raise ValueError("should have textfile, port, or both")
        return self


@hookimpl
def storebackends_options() -> type[MetricsOptions]:
    """Announce the options."""
    return MetricsOptions


@hookimpl
def storebackends_use_options(options: MetricsOptions) -> None:
    """Make the exporter, or keep the one of these options. Raises NotSupported without prometheus_client."""
    global _exporter
    if _exporter and _exporter.options == options:
        return
    try:
        from .exporter import Exporter
    except ImportError as error:
        fix = "pip install 'storebackends[metrics]'"
        raise NotSupported("exporting metrics", f"prometheus_client cannot be imported: {error}", fix) from error
    if _exporter:
        _exporter.close()
    _exporter = Exporter(options)


@hookimpl
def storebackends_event(store: Any, event: Any) -> None:
    """Count it."""
    if _exporter:
        _exporter.hear(store, event)
