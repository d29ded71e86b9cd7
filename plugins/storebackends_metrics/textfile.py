"""A file for the textfile collector of node_exporter, which many processes share and which outlives them.

A process that builds for a minute is gone before anybody asks it. So each adds what it counted since its last writing
to what the file has, under a lock, and replaces the file by a rename: the collector never sees half of it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("storebackends.metrics")

INTERVAL = 15.0
"""Seconds within which what happened is in the file."""

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels, sorted."""


class Textfile(Collector):
    """One process's share in the file *path*."""

    def __init__(self, path: Path, registry: CollectorRegistry) -> None:
        self._path, self._registry = path, registry
        self._lock_path, self._part = (path.with_name(f".{path.name}.{end}") for end in ("lock", "part"))
        self._written: dict[Series, float] = {}  # this process's counts that the file has
        self._counted: dict[Series, float] = {}  # and those that it has once it is replaced
        self._writing = threading.Lock()
        self._scheduling = threading.Lock()
        self._timer: threading.Timer | None = None

    def write_soon(self) -> None:
        """Have it written within INTERVAL seconds."""
        with self._scheduling:
            if self._timer is None:
                self._timer = threading.Timer(INTERVAL, self.write)
                self._timer.daemon = True
                self._timer.start()

    def write(self) -> None:
        """Write it now. What cannot be written is logged, and written the next time."""
        with self._scheduling:
            timer, self._timer = self._timer, None
        if timer:
            timer.cancel()
        try:
            with self._writing, _locked(self._lock_path):
                self._part.write_bytes(generate_latest(self))
                self._part.chmod(0o644)  # the collector is another user
                os.replace(self._part, self._path)
                self._written = self._counted
        except OSError as error:
            log.warning("the metrics are not in %s: %s; mend that, nothing counted is lost", self._path, error)

    def collect(self) -> Iterator[Metric]:
        """The file's families with this process's counts added; its gauges replace those of the file."""
        before, self._counted = self._read(), {}
        for family in self._registry.collect():
            values = before.get(family.name, {})
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue  # says when a process began, and the file has many
                series = _series(sample)
                if family.type == "gauge":
                    values[series] = sample.value
                else:
                    self._counted[series] = sample.value
                    values[series] = values.get(series, 0) + sample.value - self._written.get(series, 0)
            merged = Metric(family.name, family.documentation, family.type)
            merged.samples = [Sample(name, dict(labels), value) for (name, labels), value in values.items()]
            yield merged

    def _read(self) -> dict[str, dict[Series, float]]:
        try:
            families = list(text_string_to_metric_families(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            log.warning("%s is not a file of metrics (%s); it begins anew", self._path, error)
            return {}
        return {family.name: {_series(sample): sample.value for sample in family.samples} for family in families}


def _series(sample: Sample) -> Series:
    return sample.name, tuple(sorted(sample.labels.items()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out; the file stays, since one that is removed could be locked twice."""
    with path.open("ab") as file:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if sys.platform == "win32":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
