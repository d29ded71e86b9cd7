from __future__ import annotations

import os
import signal as signals
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from storebackends import watching
from storebackends.watching import Signal
from tests.capabilities import needs
from tests.stores import WAIT, descriptors, until


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the net, only a real event ends a wait before the test's own limit does."""
    monkeypatch.setattr(watching, "NET", WAIT)


def woken_by(signal: Signal) -> threading.Thread:
    thread = threading.Thread(target=signal.wait, args=(WAIT,))
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(WAIT / 2)
    return not thread.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
@pytest.mark.usefixtures("patient")
class TestInotify:
    def test_a_write_a_close_and_a_move_wake(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        with Signal([path]) as signal:
            os.write(descriptor, b"1")
            assert ended(woken_by(signal))
            os.close(descriptor)
            assert ended(woken_by(signal))
            os.rename(path, tmp_path / "g")
            assert ended(woken_by(signal))

    def test_one_change_wakes_every_signal_and_no_other(self, tmp_path: Path) -> None:
        for name in "fg":
            (tmp_path / name).touch()
        with Signal([tmp_path / "f"]) as one, Signal([tmp_path / "f"]) as two, Signal([tmp_path / "g"]) as other:
            threads = [woken_by(signal) for signal in (one, two, other)]
            (tmp_path / "f").write_text("1")

            assert ended(threads[0])
            assert ended(threads[1])
            assert threads[2].is_alive()
            other.set()
            assert ended(threads[2])

    def test_a_deleted_file_wakes(self, tmp_path: Path) -> None:
        (tmp_path / "f").touch()
        with Signal([tmp_path / "f"]) as signal:
            (tmp_path / "f").unlink()
            assert ended(woken_by(signal))

    def test_a_killed_writers_close_wakes(self, tmp_path: Path) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
            os.write(writing, b"1")
            signals.pause()
            os._exit(0)
        os.read(reading, 1)
        with Signal([tmp_path / "f"]) as signal:
            thread = woken_by(signal)
            os.kill(child, 9)
            os.waitpid(child, 0)
            assert ended(thread)
        os.close(reading)
        os.close(writing)

    @needs("proc")
    def test_many_signals_take_one_descriptor_and_give_up_their_watches(self, tmp_path: Path) -> None:
        (tmp_path / "f").touch()
        with Signal([tmp_path / "f"]):
            before = sorted(descriptors())
            for _ in range(500):
                with Signal([tmp_path / "f"]):
                    pass
            assert sorted(descriptors()) == before
        assert not watching._watcher._signals


def test_what_cannot_be_watched_is_polled(tmp_path: Path) -> None:
    with Signal([tmp_path / "missing"]) as signal:
        assert ended(woken_by(signal))


@needs("fork")
def test_a_forked_child_polls_what_its_parent_watches(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with Signal([tmp_path / "f"]) as signal:
        child = os.fork()
        if child == 0:
            signal.wait()
            signal.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
@pytest.mark.usefixtures("patient")
def test_the_more_wait_the_more_seldom_each_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOKS", 0.01)
    due: list[float | None] = []
    (tmp_path / "f").touch()

    with ExitStack() as undo:
        signals = [undo.enter_context(Signal([tmp_path / "f"])) for _ in range(4)]
        threads = [woken_by(signal) for signal in signals[1:]]
        until(lambda: len(watching._asleep) == len(threads))
        monkeypatch.setattr(signals[0]._event, "wait", due.append)
        signals[0].wait()
        signals[0].wait(1)
        for signal in signals[1:]:
            signal.set()
        assert all(ended(thread) for thread in threads)

    assert due == [400, 1]
    assert not watching._asleep
