"""Logs of builds in stores of the backend under test, cases 25 to 31 and 34: every reader gets every byte."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storebackends.backend import Backend
from storebackends.errors import BuildFailed
from storebackends.log import BuildLog, LogReader
from storebackends.store import Store
from storebackends.workspace import Workspace

from .harness import PATIENCE, Harness, filled, require
from .kills import die, killed_inside

LINE = b"0123456789abcdef"
READERS = 20


class Logs(Harness):
    """Cases 25 to 31, and 34."""

    def test_a_log_is_read_while_its_function_writes(self, store: Store) -> None:
        """Case 25."""
        read = threading.Event()

        def function(work: Workspace) -> None:
            work.log.write(b"first ")
            assert read.wait(PATIENCE), "nobody could read what was written"
            work.log.write(b"second")

        build = store.start("id", function)
        with build.log.tail() as reader:
            first = next(reader)
            read.set()
            rest = b"".join(reader)

        assert first == b"first "
        assert rest == b"second"
        build.wait(PATIENCE).release()

    def test_a_log_is_readable_after_its_folder_was_renamed(self, store: Store) -> None:
        """Case 26: by the object that was there before, and by a new one."""
        logs: list[BuildLog] = []

        def function(work: Workspace) -> None:
            logs.append(work.log)
            work.log.write(LINE)

        with store.build("id", function) as result:
            logs += [result.log, store.log("id")]

            assert [_read(log) for log in logs] == [LINE] * 3
            assert (result.record.log_length, result.log.length) == (len(LINE), len(LINE))

    def test_a_reader_in_mid_read_misses_nothing_of_the_move(self, store: Store) -> None:
        """Case 27."""
        readers: list[LogReader] = []

        def function(work: Workspace) -> None:
            work.log.write(LINE)
            readers.extend(work.log.tail() for _ in range(2))
            assert next(readers[0]) == LINE
            work.log.write(LINE)

        store.build("id", function).release()

        assert b"".join(readers[0]) == LINE
        assert b"".join(readers[1]) == LINE * 2

    def test_readers_that_come_between_finish_and_rename_or_after_get_every_byte(self, backend: Backend) -> None:
        """Case 28, by the steps that a store takes."""
        entry = filled(backend, "id", {"file": b""})
        log = BuildLog.create(entry.log)
        log.write(LINE)
        log.finish()
        between = log.tail()
        begun = log.tail(4)
        assert next(begun)

        with log.moving() as move:
            move.to(backend.rename("id").log)
        after = log.tail()

        assert (b"".join(between), b"".join(after), b"".join(begun)) == (LINE, LINE, b"")
        log.close()
        assert _read(log) == LINE

    def test_a_slow_reader_delays_neither_the_move_nor_the_others(self, store: Store) -> None:
        """Case 29."""
        published, text = threading.Event(), LINE * 10_000
        reading = threading.Barrier(READERS + 2)

        def read(log: BuildLog, slow: bool) -> bytes:
            with log.tail() as reader:
                first = next(reader)
                reading.wait(PATIENCE)
                assert not slow or published.wait(PATIENCE), "the move waited for its slow reader"
                return first + b"".join(reader)

        def function(work: Workspace) -> None:
            work.log.write(text[:100])
            reading.wait(PATIENCE)
            for start in range(100, len(text), 10_000):
                work.log.write(text[start : start + 10_000])

        with ThreadPoolExecutor(READERS + 1) as threads:
            build = store.start("id", function)
            texts = [threads.submit(read, build.log, slow=number == 0) for number in range(READERS + 1)]
            try:
                build.wait(PATIENCE).release()
                quick = [text.result(PATIENCE) for text in texts[1:]]
            finally:
                published.set()

            assert [*quick, texts[0].result(PATIENCE)] == [text] * (READERS + 1)

    def test_readers_that_are_cancelled_leak_no_descriptor(self, store: Store) -> None:
        """Case 30: whether they have read nothing, a part, or wait for more in another thread."""
        require(sys.platform != "win32" and os.path.isdir("/proc/self/fd"), "/proc")

        def function(work: Workspace) -> None:
            work.log.write(LINE)
            readers = [work.log.tail() for _ in range(READERS)]
            assert [next(reader) for reader in readers[1:]] == [LINE] * (READERS - 1)
            with ThreadPoolExecutor(1) as thread:
                waiting = thread.submit(list, readers[-1])
                for reader in readers:
                    reader.close()
                assert waiting.result(PATIENCE) == []

        open_after = []
        for _ in range(3):  # the first round opens what stays open, such as the files of the ids' locks
            for number in range(3):
                store.build(f"id-{number}", function).release()
                with store.log(f"id-{number}").tail() as reader:
                    next(reader)
                store.delete(f"id-{number}")
            open_after.append(_descriptors())

        assert open_after[1] == open_after[0]
        assert open_after[2] == open_after[0]

    def test_offsets_count_from_either_end_and_a_reader_can_be_resumed(self, store: Store) -> None:
        """Case 31."""
        with store.build("id", lambda work: work.log.write(LINE)) as result:
            log = result.log

            with log.tail(5) as reader:
                next(reader)

            assert reader.offset == len(LINE)
            assert b"".join(log.tail(5)) == LINE[5:]
            assert b"".join(log.tail(-3)) == LINE[-3:]
            assert b"".join(log.tail(-1000)) == LINE
            assert b"".join(log.tail(reader.offset)) == b""
            assert b"".join(log.tail(3, follow=False)) == LINE[3:]

    def test_the_log_of_a_failed_build_stays_readable(self, root: Path) -> None:
        """Case 34: at once, and in a store that is opened later."""

        def function(work: Workspace) -> None:
            work.log.write(LINE)
            raise ValueError

        with self.open_store(root) as store:
            with pytest.raises(BuildFailed):
                store.build("id", function)
            assert _read(store.log("id")) == LINE
        with self.open_store(root) as store:
            assert _read(store.log("id")) == LINE

    def test_the_log_of_a_killed_build_stays_readable(self, root: Path) -> None:
        """Case 34."""

        def function(work: Workspace) -> None:
            work.log.write(LINE)
            die()

        def builder() -> None:
            self.open_store(root).build("id", function)

        killed_inside(builder)

        with self.open_store(root) as store:
            assert _read(store.log("id")) == LINE
            store.build("id", lambda work: work.log.write(b"again")).release()
            assert _read(store.log("id")) == b"again"


def _read(log: BuildLog) -> bytes:
    with log.tail() as reader:
        return b"".join(reader)


def _descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the one that listed them
    return sorted(found)
