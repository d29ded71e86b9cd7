from __future__ import annotations

import importlib
import os
import queue
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import storebackends
from storebackends import BuildFailed, ConfigError, Store, StoreError, events, opening
from storebackends.events import Attached, Cancelled, Closed, Dropped, Event, Failed, Finished, Hit, Pruned, Started
from tests.capabilities import PROJECT, needs
from tests.distributions import install
from tests.stores import WAIT, open_copy, python, until, writes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_copy(tmp_path / "store") as store:
        yield store


class Ears:
    """Hears all, and can be asked for it one by one."""

    def __init__(self, store: Store) -> None:
        self._heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.listener = store.listen(self._heard.put)

    def next(self) -> Any:
        return self._heard.get(timeout=WAIT)

    def rest(self) -> list[str]:
        """The kinds of what is left; for when no more can come."""
        return [self._heard.get_nowait().kind for _ in range(self._heard.qsize())]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "storebackends-events"]


class TestTold:
    def test_is_what_became_of_an_attempt(self, store: Store) -> None:
        store.build("base", writes(f="1")).release()
        ears = Ears(store)

        store.build("a", writes(f="1", g="2"), base="base").release()

        started, finished = ears.next(), ears.next()
        assert [type(started), type(finished)] == [Started, Finished]
        assert (started.id, started.base, started.attempt) == ("a", "base", store.record("a").attempt)
        assert (finished.id, finished.base, finished.attempt) == ("a", "base", started.attempt)
        assert (finished.root, finished.log_bytes) == (store.root, len("f\ng\n"))
        assert finished.seconds > 0
        assert finished.time >= started.time > 0

    def test_says_why_there_is_no_result(self, store: Store) -> None:
        ears = Ears(store)

        with pytest.raises(BuildFailed):
            store.build("a", lambda work: 1 / 0)
        running = store.start("b", lambda work: work.run(["sleep", "1000"]))
        assert running.log
        running.cancel()

        told = [ears.next() for _ in range(4)]
        assert [type(event) for event in told] == [Started, Failed, Started, Cancelled]
        assert told[1].reason == "ZeroDivisionError: division by zero"
        assert told[3].reason == "cancelled by its last caller"

    def test_is_a_failure_of_the_storage_too(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        ears = Ears(store)
        monkeypatch.setattr(store._backend, "build", full)

        with pytest.raises(StoreError):
            store.build("a", writes(f="1"))

        assert isinstance(ears.next(), Started)
        assert "No space left" in ears.next().reason

    def test_is_who_found_a_result_and_who_waited_for_it(self, store: Store) -> None:
        going = threading.Event()
        first = store.start("a", lambda work: going.wait(WAIT))
        assert first.log  # so it has started
        ears = Ears(store)

        second = store.start("a", writes(f="no"))
        going.set()
        first.wait()
        second.wait()
        store.build("a", writes(f="no")).release()

        kinds = {type(ears.next()) for _ in range(3)}
        assert kinds == {Finished, Attached, Hit}

    def test_is_what_a_prune_deleted(self, store: Store) -> None:
        store.build("a", writes(f="1")).release()
        ears = Ears(store)

        plan = store.prune(max_items=0)

        told = ears.next()
        assert isinstance(told, Pruned)
        assert (told.ids, told.bytes) == (("a",), plan.freed.bytes)

    def test_is_finished_when_an_interrupt_comes_after_the_publication(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        ears = Ears(store)
        monkeypatch.setattr(store._durability, "published", interrupt)

        with pytest.raises(KeyboardInterrupt):
            store.build("a", writes(f="1"))

        assert [type(ears.next()), type(ears.next())] == [Started, Finished]


class TestListener:
    def test_is_called_in_no_builders_thread_and_may_use_the_store(self, store: Store) -> None:
        seen: queue.SimpleQueue[tuple[int, list[str]]] = queue.SimpleQueue()

        def listener(event: Event) -> None:
            if isinstance(event, Finished) and event.id == "a":
                store.build("b", writes(f="1"), base="a").release()
                store.delete("b")
                seen.put((threading.get_ident(), list(store.ids())))

        store.listen(listener)
        store.build("a", writes(f="1")).release()

        thread, ids = seen.get(timeout=WAIT)
        assert thread != threading.get_ident()
        assert ids == ["a"]

    def test_that_raises_is_logged_and_the_others_hear_the_same(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(event: Event) -> None:
            raise SystemExit("broken ears")

        store.listen(broken)
        ears = Ears(store)

        store.build("a", writes(f="1")).release()

        assert [type(ears.next()), type(ears.next())] == [Started, Finished]
        store.close()
        assert "broken ears" in caplog.text
        assert str(store.root) in caplog.text

    def test_that_is_slow_delays_no_build_and_learns_what_it_missed(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(events, "LIMIT", 4)
        entered, going = threading.Event(), threading.Event()
        heard: list[Event] = []

        def slow(event: Event) -> None:
            heard.append(event)
            entered.set()
            assert going.wait(WAIT)

        store.listen(slow)
        store.build("first", writes(f="1")).release()
        assert entered.wait(WAIT)

        for n in range(10):
            store.build(f"id-{n}", writes(f="1")).release()
        going.set()
        store.close()

        # One event of the first build was taken, one waited; of the 22 that waited in the end, with Closed, 4 are left.
        assert [event.kind for event in heard] == ["started", "dropped", "finished", "started", "finished", "closed"]
        assert isinstance(heard[1], Dropped)
        assert heard[1].count == 18
        assert [record.levelname for record in caplog.records if "too slow" in record.message] == ["WARNING"]

    def test_hears_nothing_more_once_it_is_closed(self, store: Store) -> None:
        going, heard = threading.Event(), queue.SimpleQueue[str]()

        def one(event: Event) -> None:
            heard.put(event.kind)
            assert going.wait(WAIT)

        first = store.listen(one)
        store.build("a", writes(f="1")).release()
        assert heard.get(timeout=WAIT) == "started"  # "finished" is in the queue
        first.close()
        first.close()
        ears = Ears(store)
        going.set()
        store.build("b", writes(f="1")).release()

        assert ears.next().id == "b"
        assert heard.empty()

    def test_hears_at_the_end_of_its_context_what_was_told_before(self, store: Store) -> None:
        heard: list[str] = []
        go_on = threading.Event()

        def slow(event: Event) -> None:
            assert go_on.wait(WAIT)
            heard.append(event.kind)

        with store.listen(slow):
            store.build("a", writes(f="1")).release()
            threading.Timer(0.05, go_on.set).start()

        assert heard == ["started", "finished"]
        assert not store._events.heard

    def test_that_is_stuck_holds_up_no_close(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(events, "PATIENCE", 0.01)
        going = threading.Event()
        store = open_copy(tmp_path / "store")
        store.listen(lambda event: going.wait(WAIT))
        store.build("a", writes(f="1")).release()

        store.close()

        assert "too slow for the last" in caplog.text
        going.set()
        until(lambda: not threads())

    def test_hears_the_last_event_while_the_store_still_answers(self, tmp_path: Path) -> None:
        last: list[tuple[type[Event], list[str]]] = []
        store = open_copy(tmp_path / "store")
        store.listen(lambda event: last.append((type(event), list(store.ids()))))
        store.build("a", writes(f="1")).release()

        store.close()

        assert last[-1] == (Closed, ["a"])

    def test_may_close_the_store(self, tmp_path: Path) -> None:
        store = open_copy(tmp_path / "store")
        store.listen(lambda event: store.close() if isinstance(event, Finished) else None)

        store.build("a", writes(f="1")).release()

        until(lambda: not threads())
        with pytest.raises(StoreError, match="closed"):
            store.listen(print)


@pytest.mark.docs
@needs("source")
def test_the_reference_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page = (PROJECT / "docs/reference/events.md").read_text()
    for example in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(example, {})

    assert re.fullmatch(r"hello [0-9.e-]+\n", capsys.readouterr().out)
    told = {name for name, value in vars(events).items() if isinstance(value, type) and issubclass(value, Event)}
    assert {name for name in told if name[0] != "_"} - {"Event"} == set(
        re.findall(r"^\| `([A-Z]\w+)`", page, re.MULTILINE)
    )


def test_there_is_a_thread_only_while_somebody_listens(store: Store) -> None:
    store.build("a", writes(f="1")).release()
    store.build("a", writes(f="1")).release()
    assert threads() == []

    with store.listen(lambda event: None), store.listen(lambda event: None):
        assert len(threads()) == 1
    until(lambda: not threads())

    Ears(store)
    assert len(threads()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_tells_nobody(store: Store) -> None:
    ears = Ears(store)

    if sys.platform != "win32":
        if (child := os.fork()) == 0:
            store._events.tell(Hit, id="in the child")
            ears.listener.close()
            os._exit(store._events.heard or bool(store._events._queue))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    store.build("a", writes(f="1")).release()
    assert [type(ears.next()), type(ears.next())] == [Started, Finished]


PLUGIN = """
    from storebackends.plugin import Options, hookimpl

    heard, options = [], []

    class EarsOptions(Options):
        loud: bool
        level: int = 3

    @hookimpl
    def storebackends_options():
        return EarsOptions

    @hookimpl
    def storebackends_use_options(options):
        globals()["options"].append(options)

    @hookimpl
    def storebackends_event(event):
        heard.append(event)
"""
BROKEN = """
    from storebackends.plugin import hookimpl

    @hookimpl
    def storebackends_event(store, event):
        raise ValueError(f"no ears for {event.kind} of {store.root.name}")
"""


class Host:
    """A host whose configuration lists plugins that listen."""

    def __init__(self, folder: Path) -> None:
        self.file, self.path = folder / "config.toml", folder / "store"

    def configure(self, text: str) -> None:
        self.file.write_text(f'{text}\n[stores.main]\npath = "{self.path.as_posix()}"\n')

    def problems(self, text: str) -> list[str]:
        self.configure(text)
        with pytest.raises(ConfigError) as caught:
            storebackends.open_store()
        return list(caught.value.problems)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    install(tmp_path / "site", "hearing", {"ears": "ears", "broken": "broken"}, ears=PLUGIN, broken=BROKEN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    host = Host(tmp_path)
    monkeypatch.setenv("STOREBACKENDS_CONFIG", str(host.file))
    return host


LISTED = 'plugins = ["ears", "broken"]\n[plugin.ears]\nloud = true'


class TestPlugin:
    def test_hears_from_the_opening_to_the_end_and_one_that_fails_is_nobody_elses_loss(
        self, host: Host, caplog: pytest.LogCaptureFixture
    ) -> None:
        host.configure(LISTED)

        with storebackends.open_store() as store:
            store.build("a", writes(f="1")).release()

        ears = importlib.import_module("ears")
        assert [event.kind for event in ears.heard] == ["opened", "started", "finished", "closed"]
        assert {event.uuid for event in ears.heard} == {store._marker.uuid}
        assert "no ears for opened of store" in caplog.text
        assert ears.options[-1].model_dump() == {"loud": True, "level": 3}

    def test_that_is_not_listed_hears_nothing(self, host: Host) -> None:
        host.configure("")

        with storebackends.open_store():
            assert threads() == []

    def test_hears_what_a_dead_builder_left(self, host: Host) -> None:
        builder = python(
            "import storebackends, sys, os\n"
            "store = storebackends.open_store(backend='copy', path=sys.argv[1])\n"
            "store.build('a', lambda work: os._exit(1))",
            host.path,
        )
        builder.communicate(timeout=WAIT)
        host.configure(LISTED)

        storebackends.open_store().close()

        (found,) = [event for event in importlib.import_module("ears").heard if event.kind == "recovered"]
        assert found.id == "a"
        assert found.reason == f"its builder (pid {builder.pid}) died"

    def test_hears_what_a_power_cut_may_have_cost(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        host.configure(LISTED)
        monkeypatch.setattr(opening, "boot_id", lambda: "first")
        with storebackends.open_store() as store:
            store.build("a", writes(f="1")).release()
        (host.path / "result" / "a" / "synced").unlink()
        ears = importlib.import_module("ears")
        ears.heard.clear()

        monkeypatch.setattr(opening, "boot_id", lambda: "second")
        storebackends.open_store().close()

        assert [(event.kind, getattr(event, "id", None)) for event in ears.heard] == [
            ("opened", None),
            ("recovered", "a"),
            ("closed", None),
        ]

    def test_of_a_store_that_cannot_be_opened_leaves_no_thread(
        self, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host.configure(LISTED)
        monkeypatch.setattr(opening, "recover", lambda *_: 1 / 0)

        with pytest.raises(ZeroDivisionError):
            storebackends.open_store()

        assert threads() == []

    def test_of_another_process_hears_only_its_own(self, host: Host) -> None:
        host.configure(LISTED)
        with storebackends.open_store():
            program = (
                "import storebackends, sys\nwith storebackends.open_store(backend='copy', path=sys.argv[1]) as s:\n"
            )
            other = python(f"{program} s.build('a', lambda work: None)", host.path)
            other.communicate(timeout=WAIT)

        assert other.returncode == 0
        assert [event.kind for event in importlib.import_module("ears").heard] == ["opened", "closed"]


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ('plugins = ["ears"]', "plugin.ears.loud: is missing"),
            ('plugins = ["ears"]\n[plugin.ears]\nloud = 1', "plugin.ears.loud: should be a valid boolean, not 1"),
            ('plugins = ["ears"]\n[plugin.ears]\nlod = true\nloud = true', "plugin.ears.lod: is no known key; did you"),
            ('plugins = ["ears"]\nplugin.ears = 7', "plugin.ears: should be a table, not 7"),
            (
                'plugins = ["broken"]\n[plugin.broken]\nx = 1',
                "plugin.broken: is given, but the plugin takes no options",
            ),
            ("[plugin.ears]\nloud = true", "plugin.ears: is the table of no plugin under 'plugins'"),
            (f"{LISTED}\n[plugin.eras]", "plugin.eras: is the table of no plugin under 'plugins'; did you mean 'ears'"),
        ],
    )
    def test_that_are_wrong_are_told_with_their_key(self, host: Host, text: str, problem: str) -> None:
        (told,) = host.problems(text)

        assert told.startswith(problem)

    def test_are_those_of_a_plugin_listed_by_its_distribution(self, host: Host) -> None:
        assert host.problems('plugins = ["hearing"]') == ["plugin.ears.loud: is missing"]

    def test_are_shown_with_the_defaults(self, host: Host) -> None:
        from storebackends.config import load

        host.configure(LISTED)

        assert load().show()["plugin"] == {"ears": {"loud": True, "level": 3}}

    @pytest.mark.parametrize(("answer", "reason"), [("7", "gave 7, not a class"), ("1 / 0", "ZeroDivisionError")])
    def test_without_a_model_are_the_plugins_mistake(
        self, host: Host, tmp_path: Path, answer: str, reason: str
    ) -> None:
        source = f"""
            from storebackends.plugin import hookimpl

            @hookimpl
            def storebackends_options():
                return {answer}
        """
        install(tmp_path / "site", "odd-ears", {"odd": "odd"}, odd=source)

        (told,) = host.problems('plugins = ["odd"]\n[plugin.odd]\nx = 1')

        assert told.startswith("plugins.0: plugin 'odd' of odd-ears 1.0: its storebackends_options()")
        assert reason in told
