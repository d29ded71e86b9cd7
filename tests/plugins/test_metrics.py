from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import storebackends
import storebackends_metrics
from storebackends import BuildFailed, ConfigError, NotSupported
from tests.capabilities import PROJECT, needs
from tests.stores import WAIT, python, until, writes

pytest.importorskip("prometheus_client", reason="needs prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from storebackends_metrics import MetricsOptions, textfile
from storebackends_metrics.exporter import Exporter

Configure = Callable[[str], None]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Have the host's one store, and `[plugin.metrics]` say what the test wants; nothing stays counted after it."""
    monkeypatch.setenv("STOREBACKENDS_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(storebackends_metrics, "_exporter", None)

    def configure(text: str) -> None:
        table = text.replace("/ABS", tmp_path.as_posix())
        stores = f'[stores.main]\npath = "{tmp_path.as_posix()}/store"\ndurability = "none"\n'
        (tmp_path / "config.toml").write_text(f'plugins = ["metrics"]\n[plugin.metrics]\n{table}\n{stores}')

    return configure


def exporter() -> Exporter:
    assert storebackends_metrics._exporter is not None
    return storebackends_metrics._exporter


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Each value by the sample's name, its outcome and its bucket."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            more = [sample.labels[label] for label in ("outcome", "le") if label in sample.labels]
            found[sample.name.removeprefix("storebackends_"), *more] = sample.value
    return found


def scrape() -> dict[tuple[str, ...], float]:
    server = exporter().server
    assert server is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=WAIT) as answer:
        return samples(answer.read().decode())


def read(file: Path) -> dict[tuple[str, ...], float]:
    return samples(file.read_text())


def test_all_that_happened_is_counted(configure: Configure) -> None:
    configure("port = 0")

    with storebackends.open_store() as store:
        store.build("a", writes(f="1")).release()
        store.build("a", writes(f="1")).release()
        with pytest.raises(BuildFailed):
            store.build("b", lambda work: 1 / 0)
        store.prune(max_items=0)
        until(lambda: scrape()["pruned_results_total",] == 1)
        found, usage = scrape(), store.usage()

    counted = {name: value for name, value in found.items() if "bucket" not in name[0] and "created" not in name[0]}
    assert counted["hits_total",] == 1
    assert counted["attached_total",] == counted["recovered_total",] == counted["events_dropped_total",] == 0
    assert [counted["build_seconds_count", outcome] for outcome in ("built", "failed", "cancelled")] == [1, 1, 0]
    assert counted["build_seconds_sum", "built"] > 0
    assert counted["log_bytes_total",] == len("f\n")
    assert counted["pruned_bytes_total",] > 0
    assert counted["free_bytes",] + counted["used_bytes",] == usage.total


def test_the_endpoint_is_there_while_a_store_is_open(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    configure("port = 0")

    with storebackends.open_store(), storebackends.open_store():
        until(lambda: exporter().server)
        server = exporter().server
        assert server is not None
        assert server.server_address[0] == "127.0.0.1"
    assert exporter().server is None
    with storebackends.open_store() as store:
        store.build("a", writes(f="1")).release()
        until(lambda: exporter().server and scrape()["build_seconds_count", "built"] == 1)

    assert not [thread for thread in threading.enumerate() if "serve_forever" in thread.name]
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_a_port_that_is_taken_is_told_and_fails_nothing(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        configure(f"port = {taken.getsockname()[1]}")

        with storebackends.open_store() as store:
            store.build("a", writes(f="1")).release()

    assert "does another process export them there" in caplog.text


def test_the_programs_own_metrics_stay_its_own(configure: Configure) -> None:
    from prometheus_client import REGISTRY

    configure("port = 0")

    with storebackends.open_store():
        pass

    assert not [family for family in REGISTRY.collect() if family.name.startswith("storebackends")]


class TestTextfile:
    def test_has_the_sum_of_what_all_processes_counted(self, configure: Configure, tmp_path: Path) -> None:
        configure('textfile = "/ABS/store.prom"')
        program = (
            "import storebackends\n"
            "with storebackends.open_store() as store:\n"
            "    for id in ('a', 'b'): store.build(id, lambda work: work.log.write(b'said')).release()"
        )

        with storebackends.open_store() as store:
            store.build("a", writes(f="1")).release()
        others = [python(program) for _ in range(3)]
        for other in others:
            other.communicate(timeout=WAIT)
        with storebackends.open_store() as store:
            store.build("b", writes(f="1")).release()

        found = read(tmp_path / "store.prom")
        assert [other.returncode for other in others] == [0, 0, 0]
        assert found["hits_total",] + found["attached_total",] == 6
        assert found["build_seconds_count", "built"] == found["build_seconds_bucket", "built", "+Inf"] == 2
        assert found["log_bytes_total",] == len("f\n") + len("said")
        assert found["free_bytes",] > 0
        assert not [name for name in found if "created" in name[0]]

    def test_is_whole_readable_by_all_and_alone(self, configure: Configure, tmp_path: Path) -> None:
        (tmp_path / "metrics").mkdir()
        configure('textfile = "/ABS/metrics/store.prom"')
        before = os.umask(0o077)

        try:
            storebackends.open_store().close()
        finally:
            os.umask(before)

        assert stat.S_IMODE((tmp_path / "metrics" / "store.prom").stat().st_mode) & 0o444 == 0o444
        assert sorted(os.listdir(tmp_path / "metrics")) == [".store.prom.lock", "store.prom"]

    def test_is_written_while_the_store_is_open_too(
        self, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(textfile, "INTERVAL", 0.05)
        configure('textfile = "/ABS/store.prom"')

        with storebackends.open_store() as store:
            store.build("a", writes(f="1")).release()
            until(lambda: (tmp_path / "store.prom").exists())
            until(lambda: read(tmp_path / "store.prom")["build_seconds_count", "built"] == 1)

    def test_keeps_what_it_has_of_other_stores(self, configure: Configure, tmp_path: Path) -> None:
        (tmp_path / "store.prom").write_text(
            "# TYPE storebackends_hits_total counter\n"
            'storebackends_hits_total{store="/other"} 7\n'
            "# TYPE storebackends_free_bytes gauge\n"
            'storebackends_free_bytes{store="/other"} 8\n'
        )
        configure('textfile = "/ABS/store.prom"')

        storebackends.open_store().close()

        text = (tmp_path / "store.prom").read_text()
        assert 'storebackends_hits_total{store="/other"} 7.0' in text
        assert 'storebackends_free_bytes{store="/other"} 8.0' in text

    def test_that_is_damaged_begins_anew(
        self, configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "store.prom").write_text('storebackends_hits_total{store="')
        configure('textfile = "/ABS/store.prom"')

        storebackends.open_store().close()

        assert read(tmp_path / "store.prom")["hits_total",] == 0
        assert "begins anew" in caplog.text

    def test_that_cannot_be_written_loses_no_count(
        self, configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        configure('textfile = "/ABS/later/store.prom"')
        with storebackends.open_store() as store:
            store.build("a", writes(f="1")).release()
        assert "mend that, nothing counted is lost" in caplog.text

        (tmp_path / "later").mkdir()
        storebackends.open_store().close()

        assert read(tmp_path / "later" / "store.prom")["build_seconds_count", "built"] == 1


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "plugin.metrics: should have textfile, port, or both"),
            ("port = 70000", "plugin.metrics.port: should be less than or equal to 65535"),
            ('port = "80"', "plugin.metrics.port: should be a valid integer"),
            ('textfile = "store.prom"', "plugin.metrics.textfile: should be an absolute path that ends in .prom"),
            ('textfile = "/ABS/passwd"', "plugin.metrics.textfile: should be an absolute path that ends in .prom"),
            ("prot = 1", "plugin.metrics.prot: is no known key; did you mean 'port'"),
        ],
    )
    def test_that_are_wrong_are_told(self, configure: Configure, text: str, problem: str) -> None:
        configure(text)

        with pytest.raises(ConfigError) as caught:
            storebackends.open_store()

        assert any(told.startswith(problem) for told in caught.value.problems), caught.value.problems

    def test_that_are_new_end_what_was_exported_before(self, configure: Configure) -> None:
        configure("port = 0")
        with storebackends.open_store():
            until(lambda: exporter().server)
            before = exporter()

            configure('port = 0\ntextfile = "/ABS/store.prom"')
            storebackends.open_store().close()

            assert exporter() is not before
            assert before.server is None


@pytest.mark.docs
@needs("source")
def test_the_how_to_names_every_metric_and_option(configure: Configure) -> None:
    page = (PROJECT / "docs/how-to/metrics.md").read_text()
    configure("port = 0")

    with storebackends.open_store():
        until(lambda: exporter().server)
        found = {name[0] for name in scrape()}

    named = {name.removeprefix("storebackends_") for name in re.findall(r"`(storebackends_\w+)`", page)}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in found if not name.endswith("_created")} == named
    assert set(re.findall(r"^\| `(\w+)` \| (?:string|integer)", page, re.MULTILINE)) == set(MetricsOptions.model_fields)


def test_without_prometheus_client_the_error_says_what_to_install(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("port = 0")
    for name in [name for name in sys.modules if name.startswith("storebackends_metrics.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(NotSupported, match=r"pip install 'storebackends\[metrics\]'"):
        storebackends.open_store()


def test_the_plugin_costs_nothing_until_it_is_used() -> None:
    code = "import sys, storebackends_metrics; print('prometheus_client' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout == "False\n"
    assert storebackends_metrics.storebackends_options() is MetricsOptions
