"""What is counted, and where it is exported. Its registry is its own: the program's metrics stay as they are."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from storebackends.plugin import StoreError

from . import MetricsOptions
from .textfile import Textfile

log = logging.getLogger("storebackends.metrics")

OUTCOMES = {"finished": "built", "failed": "failed", "cancelled": "cancelled"}
BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400)
"""Seconds: from a step that only clones to a build of hours."""


class Exporter:
    """The counts of one process, by store; a store is known by its folder."""

    def __init__(self, options: MetricsOptions) -> None:
        self.options = options
        self.registry = CollectorRegistry()
        self._builds = Histogram(
            "storebackends_build_seconds",
            "Builds that ended, and how long they took.",
            ["store", "outcome"],
            registry=self.registry,
            buckets=BUCKETS,
        )
        self._counters: list[Counter] = []
        self._hits = self._counter("hits", "Calls that found their result.")
        self._attached = self._counter("attached", "Calls that got the result of a build another call had begun.")
        self._log_bytes = self._counter("log_bytes", "Output of the builds that ended.")
        self._pruned = self._counter("pruned_results", "Results deleted to make room.")
        self._pruned_bytes = self._counter("pruned_bytes", "What that freed; in part estimated.")
        self._recovered = self._counter("recovered", "Attempts and results removed after a crash.")
        self._dropped = self._counter("events_dropped", "Events that came too fast to be counted.")
        self._space = _Space()
        self.registry.register(self._space)
        self._textfile = Textfile(options.textfile, self.registry) if options.textfile else None
        self._serving = threading.Lock()
        self.server: WSGIServer | None = None
        """The endpoint, while a store is open."""

    def _counter(self, name: str, documentation: str) -> Counter:
        counter = Counter(f"storebackends_{name}", documentation, ["store"], registry=self.registry)
        self._counters.append(counter)
        return counter

    def hear(self, store: Any, event: Any) -> None:
        """Count *event*, which happened in *store*. Kinds that are not known are passed over."""
        label = str(event.root)
        match event.kind:
            case "opened":
                self._open(store, label)
            case "hit":
                self._hits.labels(label).inc()
            case "attached":
                self._attached.labels(label).inc()
            case "finished" | "failed" | "cancelled":
                self._builds.labels(label, OUTCOMES[event.kind]).observe(event.seconds)
                self._log_bytes.labels(label).inc(event.log_bytes)
            case "pruned":
                self._pruned.labels(label).inc(len(event.ids))
                self._pruned_bytes.labels(label).inc(event.bytes)
            case "recovered":
                self._recovered.labels(label).inc()
            case "dropped":
                self._dropped.labels(label).inc(event.count)
        if self._textfile:
            self._textfile.write() if event.kind == "closed" else self._textfile.write_soon()
        if event.kind == "closed":
            self._close(store)

    def close(self) -> None:
        """Export nothing more."""
        if self._textfile:
            self._textfile.write()
        with self._serving:
            self._stop()

    def _open(self, store: Any, label: str) -> None:
        # A series that begins with its first count hides that count from rate().
        for counter in self._counters:
            counter.labels(label)
        for outcome in OUTCOMES.values():
            self._builds.labels(label, outcome)
        self._space.stores.append(store)
        with self._serving:
            if self.server is None and self.options.port is not None:
                self._serve(self.options.host, self.options.port)

    def _close(self, store: Any) -> None:
        with self._serving, suppress(ValueError):  # opened before these options were used
            self._space.stores.remove(store)
            if not self._space.stores:
                self._stop()

    def _serve(self, host: str, port: int) -> None:
        try:
            self.server, self._thread = start_http_server(port, host, self.registry)
        except OSError as error:
            log.warning(
                "metrics cannot be had at %s:%d: %s; does another process export them there?", host, port, error
            )
        else:
            log.info("metrics are at http://%s:%d/metrics", host, self.server.server_port)

    def _stop(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self._thread.join()
            self.server = None


class _Space(Collector):
    """Asks the open stores when it is asked."""

    def __init__(self) -> None:
        self.stores: list[Any] = []

    def collect(self) -> Iterable[Metric]:
        free = GaugeMetricFamily(
            "storebackends_free_bytes", "Space that is free where the trees are.", labels=["store"]
        )
        used = GaugeMetricFamily("storebackends_used_bytes", "Space in use there, by whomever.", labels=["store"])
        for label, usage in self._usages():
            free.add_metric([label], usage.free)
            used.add_metric([label], usage.total - usage.free)
        return [free, used]

    def _usages(self) -> Iterator[tuple[str, Any]]:
        for label, store in {str(store.root): store for store in list(self.stores)}.items():
            try:
                yield label, store.usage()
            except (StoreError, OSError) as error:  # no value tells more than an old one
                log.warning("the space of %s is not known: %s", label, error)
