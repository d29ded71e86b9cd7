"""The log's own kit, for each strategy. What a store does with a log is in test_store.py."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from storebackends._log_posix import DupFd
from storebackends._log_windows import PathReopen
from storebackends.errors import NoSpace, NotFound, NotSupported, StoreError
from storebackends.log import NATIVE, BuildLog, LogReader, Strategy, _Waiters
from tests.capabilities import needs

PATIENCE = 60
STRATEGIES: list[type[Strategy]] = [PathReopen, DupFd] if hasattr(os, "pread") else [PathReopen]


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> type[Strategy]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The folder of a build, which publish() renames."""
    folder = tmp_path / "in-progress" / "a~1"
    folder.mkdir(parents=True)
    (tmp_path / "result").mkdir()
    return folder


@pytest.fixture
def log(entry: Path, strategy: type[Strategy]) -> BuildLog:
    return BuildLog.create(entry / "log", strategy=strategy)


def publish(log: BuildLog) -> None:
    """Rename the log's folder as a store does."""
    entry = log.path.parent
    result = entry.parents[1] / "result" / "a"
    with log.moving() as move:
        entry.rename(result)
        move.to(result / "log")


def read(log: BuildLog, start: int = 0, follow: bool = True) -> bytes:
    with log.tail(start, follow) as reader:
        return b"".join(reader)


def open_below(folder: Path) -> list[str]:
    """What this process has open there."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the listing's own
    return [path for path in found if path.startswith(f"{folder}/")]


class Thread(threading.Thread):
    """Runs *function*; result() waits for what it returns, or raises what it raised."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        super().__init__(daemon=True)
        self._call = partial(function, *args)
        self._result: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except Exception as error:  # noqa: BLE001 (result() raises it)
            self._error = error

    def result(self) -> object:
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread still waits"
        if self._error:
            raise self._error
        return self._result


def wait_until_it_waits(reader: LogReader) -> None:
    for _ in range(PATIENCE * 1000):
        if reader._waiting:
            return
        threading.Event().wait(0.001)
    pytest.fail("the reader never waited")


# Reading and writing.


def test_reader_follows_the_writer_to_the_end(log: BuildLog) -> None:
    reader = log.tail()
    log.write(b"first ")
    first = next(reader)

    rest = Thread(b"".join, reader)
    wait_until_it_waits(reader)
    log.write(bytearray(b"second "))
    log.write(memoryview(b"third"))
    length = log.finish()

    assert (first, rest.result(), length) == (b"first ", b"second third", 18)


def test_bytes_are_not_edited(log: BuildLog) -> None:
    data = bytes(range(256)) * 3 + b"\r\n\n\x1a\r"

    log.write(data)
    log.close()

    assert read(log) == log.path.read_bytes() == data


def test_writes_of_many_threads_stay_whole(log: BuildLog) -> None:
    lines = [[b"%d %d\n" % (thread, n) for n in range(500)] for thread in range(8)]
    together = threading.Barrier(len(lines))

    def write(mine: list[bytes]) -> None:
        together.wait(PATIENCE)
        for line in mine:
            log.write(line)

    threads = [Thread(write, mine) for mine in lines]
    for thread in threads:
        thread.result()
    log.finish()

    written = read(log).splitlines(keepends=True)
    assert [[line for line in written if line.startswith(b"%d " % thread)] for thread in range(8)] == lines


def test_a_hundred_followers_get_the_same_bytes(log: BuildLog, rng: random.Random) -> None:
    pieces = [rng.randbytes(rng.randrange(20_000)) for _ in range(300)]

    followers = [Thread(read, log) for _ in range(100)]
    for piece in pieces:
        log.write(piece)
    log.finish()

    data = b"".join(pieces)
    assert all(follower.result() == data for follower in followers)


def test_a_waiting_crowd_hears_of_one_byte(log: BuildLog) -> None:
    readers = [log.tail() for _ in range(20)]
    threads = [Thread(next, reader) for reader in readers]
    for reader in readers:
        wait_until_it_waits(reader)

    log.write(b"!")

    assert [thread.result() for thread in threads] == [b"!"] * 20
    log.close()


def test_news_between_a_reader_s_question_and_its_wait_is_not_lost() -> None:
    waiters = _Waiters()
    asked: list[int] = []

    def ready() -> bool:
        asked.append(len(asked))
        if len(asked) == 1:
            waiters.grown()
        return len(asked) > 1

    assert Thread(waiters.wait, ready).result() is None
    assert asked == [0, 1]


def test_a_lone_reader_holds_little_of_a_long_log(log: BuildLog) -> None:
    for _ in range(20):
        log.write(bytes(1 << 20))
    log.finish()
    tracemalloc.start()

    length = sum(map(len, log.tail()))
    _, peak = tracemalloc.get_traced_memory()

    tracemalloc.stop()
    assert length == 20 << 20
    assert peak < 5 << 20


def test_readers_of_one_region_share_its_bytes(log: BuildLog) -> None:
    log.write(os.urandom(3_000_000))
    log.finish()
    late, early = log.tail(1_500_000), log.tail()

    for _ in early:
        if early.offset > late.offset:
            break
    next(late)

    assert late.offset == early.offset
    assert next(late) is next(early)


def test_offsets_count_from_the_start_or_from_the_end(log: BuildLog) -> None:
    log.write(b"0123456789")

    starts = {start: read(log, start, follow=False) for start in (0, 4, 10, 11, -3, -10, -99)}

    assert starts == {
        0: b"0123456789",
        4: b"456789",
        10: b"",
        11: b"",
        -3: b"789",
        -10: b"0123456789",
        -99: b"0123456789",
    }
    log.close()


def test_reading_goes_on_from_a_reader_s_offset(log: BuildLog) -> None:
    log.write(os.urandom(2_500_000))
    log.finish()
    whole = read(log)

    with log.tail(7) as reader:
        first = next(reader)

    assert reader.offset == 7 + len(first)
    assert whole[:7] + first + read(log, reader.offset) == whole


def test_start_past_the_end_waits_for_it(log: BuildLog) -> None:
    log.write(b"abc")
    reader = log.tail(5)
    rest = Thread(b"".join, reader)
    wait_until_it_waits(reader)

    log.write(b"de")
    log.write(b"fg")
    log.finish()

    assert rest.result() == b"fg"
    assert read(log, 99) == b""


def test_without_follow_a_reader_ends_at_the_end_it_found(log: BuildLog) -> None:
    log.write(b"before")
    reader = log.tail(follow=False)

    log.write(b" after")

    assert b"".join(reader) == b"before"
    log.close()


def test_closing_a_reader_ends_the_thread_that_waits_in_it(log: BuildLog) -> None:
    readers = [log.tail() for _ in range(3)]
    threads = [Thread(list, reader) for reader in readers]
    for reader in readers:
        wait_until_it_waits(reader)

    readers[1].close()
    ended = threads[1].result()
    log.write(b"for the others")
    log.close()

    assert [ended, *(threads[n].result() for n in (0, 2))] == [[], [b"for the others"], [b"for the others"]]
    assert list(readers[1]) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs waits that a signal ends")
def test_an_interrupted_reader_strands_no_other(log: BuildLog) -> None:
    first, second = log.tail(), log.tail()

    def interrupt() -> Thread:
        wait_until_it_waits(first)
        waiting = Thread(next, second)
        wait_until_it_waits(second)
        os.kill(os.getpid(), signal.SIGINT)
        return waiting

    thread = Thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(first)
    log.write(b"heard")

    waiting = thread.result()
    assert isinstance(waiting, Thread)
    assert waiting.result() == b"heard"
    log.close()
    assert list(first) == [b"heard"]


def test_a_finished_log_takes_no_more(log: BuildLog) -> None:
    log.write(b"all")
    log.finish()

    with pytest.raises(StoreError, match="finished"):
        log.write(b"late")

    assert (log.finish(), log.length, log.path.read_bytes()) == (3, 3, b"all")


def test_states(log: BuildLog) -> None:
    states = [log.state]

    for step in (log.finish, log.finish, log.close, log.close, log.finish):
        step()
        states.append(log.state)

    saved = BuildLog.saved(log.path)
    saved.close()
    assert states == ["open", "finished", "finished", "closed", "closed", "closed"]
    assert saved.state == "saved"


# Moving.


def test_log_is_readable_after_its_folder_was_renamed(log: BuildLog) -> None:
    """Before OBuilder's PR #208 a late reader was sent to the folder that the store had renamed."""
    data = os.urandom(3_000_000)
    log.write(data)
    mid_read = log.tail()
    begun = next(mid_read)
    log.finish()
    between = log.tail()

    publish(log)
    after = log.tail()
    log.close()

    assert log.path.parent.name == "a"
    assert begun + b"".join(mid_read) == data
    assert [b"".join(between), b"".join(after), read(log), read(BuildLog.saved(log.path))] == [data] * 4


def test_a_follower_that_waits_lives_through_the_move(log: BuildLog) -> None:
    readers = [log.tail() for _ in range(10)]
    threads = [Thread(b"".join, reader) for reader in readers]
    for reader in readers:
        wait_until_it_waits(reader)

    log.write(b"the end")
    log.finish()
    publish(log)
    log.close()

    assert [thread.result() for thread in threads] == [b"the end"] * 10


def test_a_slow_reader_delays_no_move(log: BuildLog) -> None:
    data = os.urandom(2_000_000)
    log.write(data)
    log.finish()
    slow = log.tail()
    begun = next(slow)

    publish(log)  # in this very thread: had the reader to go on first, this would hang
    log.close()

    assert begun + b"".join(slow) == data


@pytest.mark.parametrize("closed", [False, True])
def test_a_reader_that_comes_during_the_move_misses_nothing(log: BuildLog, closed: bool) -> None:
    log.write(b"whole")
    log.finish()
    if closed:
        log.close()
    result = log.path.parents[2] / "result" / "a"

    with log.moving() as move:
        log.path.parent.rename(result)
        reader = Thread(read, log)
        reader.join(0.1)  # long enough to fail at the old path, if it went there
        move.to(result / "log")

    assert reader.result() == b"whole"


def test_an_exception_keeps_the_old_path(log: BuildLog) -> None:
    log.write(b"still here")
    log.close()
    before = log.path

    with pytest.raises(RuntimeError, match="no rename"), log.moving() as move:
        move.to(before.with_name("elsewhere"))
        raise RuntimeError("no rename")

    assert log.path == before
    assert read(log) == b"still here"


def test_a_reader_elsewhere_finds_a_log_that_moved_before_it_was_told(
    entry: Path, log: BuildLog, strategy: type[Strategy]
) -> None:
    log.write(b"all of it")
    found: list[Path] = []

    def locate() -> Path:
        found.append(log.path)
        return log.path

    followed = BuildLog.elsewhere(entry / "log", locate, strategy=strategy)
    followed.grew(4)
    reader = followed.tail()
    assert next(reader) == b"all "
    log.finish()
    publish(log)
    followed.grew(9)

    assert next(reader) == b"of it"
    assert found == ([log.path] if strategy is PathReopen else [])
    followed.settled(9, log.path)
    assert list(reader) == []
    log.close()


def test_a_log_elsewhere_that_is_nowhere_any_more_is_not_found(entry: Path) -> None:
    log = BuildLog.create(entry / "log")
    log.write(b"gone")
    log.close()
    followed = BuildLog.elsewhere(entry / "log", lambda: None, strategy=PathReopen)
    followed.grew(4)
    os.unlink(entry / "log")

    with pytest.raises(NotFound), followed.tail() as reader:
        next(reader)


def test_an_interrupt_after_the_rename_does_not_lose_the_log(log: BuildLog) -> None:
    log.write(b"moved")
    log.close()
    result = log.path.parents[2] / "result" / "a"

    with pytest.raises(KeyboardInterrupt), log.moving() as move:
        move.to(result / "log")
        log.path.parent.rename(result)
        raise KeyboardInterrupt

    assert read(log) == b"moved"


def test_a_log_being_written_does_not_move(log: BuildLog) -> None:
    before = log.path

    with pytest.raises(StoreError, match="finish"), log.moving():
        pytest.fail("the move began")

    assert log.path == before
    log.close()


def test_the_log_of_a_failed_build_is_kept_apart(log: BuildLog, tmp_path: Path) -> None:
    log.write(b"it broke")
    reader, length = log.tail(), log.finish()
    grave = tmp_path / "failed"
    grave.mkdir()

    with log.moving() as move:
        log.path.rename(grave / "log")
        move.to(grave / "log")
    (tmp_path / "in-progress" / "a~1").rmdir()
    log.close()

    assert [b"".join(reader), read(log), read(BuildLog.saved(grave / "log", length=length))] == [b"it broke"] * 3


@needs("proc")
def test_by_path_nothing_is_open_during_a_move(entry: Path) -> None:
    log = BuildLog.create(entry / "log", strategy=PathReopen)
    log.write(os.urandom(1_500_000))
    log.finish()
    stop = threading.Event()

    def read_on() -> int:
        rounds = 0
        while not stop.is_set():
            assert len(read(log)) == 1_500_000
            rounds += 1
        return rounds

    threads = [Thread(read_on) for _ in range(4)]
    seen = []
    for n in range(100):
        with log.moving() as move:
            seen += open_below(entry.parents[1])
            target = entry.with_name(f"a~{n + 2}")
            log.path.parent.rename(target)
            move.to(target / "log")
    stop.set()

    assert all(thread.result() for thread in threads)
    assert seen == []


# Descriptors.


@needs("proc")
def test_descriptors_go_as_early_as_they_may(log: BuildLog, strategy: type[Strategy], entry: Path) -> None:
    log.write(b"x")
    counts = [len(open_below(entry))]
    reader = log.tail()

    for step in (log.finish, log.close, lambda: next(reader), lambda: next(reader, None)):
        step()
        counts.append(len(open_below(entry)))

    assert counts == ([1, 1, 1, 1, 0] if strategy is DupFd else [1, 0, 0, 0, 0])


@needs("proc")
@pytest.mark.parametrize("saved", [False, True])
def test_no_reader_leaks_a_descriptor(log: BuildLog, strategy: type[Strategy], entry: Path, saved: bool) -> None:
    log.write(b"x" * 10)
    log.close()
    log = BuildLog.saved(log.path, strategy=strategy) if saved else log

    never_read, half_read, cancelled, exhausted = (log.tail() for _ in range(4))
    next(half_read)
    cancelled.close()
    list(exhausted)
    del never_read, half_read
    gc.collect()

    assert open_below(entry) == []


@needs("proc")
def test_ten_thousand_logs_leave_no_descriptor(strategy: type[Strategy], entry: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    for n in range(10_000):
        log = BuildLog.create(entry / "log", strategy=strategy)
        reader = log.tail() if n % 3 else None
        log.write(b"x")
        if n % 5:  # one in five is forgotten, open
            log.close()
        assert reader is None or next(reader) == b"x"
        os.unlink(entry / "log")
    del log, reader

    assert len(os.listdir("/proc/self/fd")) <= before


@needs("fork", "proc")
def test_a_forked_child_keeps_nothing_of_a_log(strategy: type[Strategy], entry: Path) -> None:
    script = textwrap.dedent(f"""
        import os, sys
        from storebackends._log_posix import DupFd
        from storebackends._log_windows import PathReopen
        from storebackends.errors import StoreError
        from storebackends.log import BuildLog

        log = BuildLog.create("log", strategy={strategy.__name__})
        log.write(b"parent")
        finished = BuildLog.create("finished", strategy={strategy.__name__})
        reader, late = log.tail(), finished.tail()
        finished.close()
        child = os.fork()
        if not child:
            files = [os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd") if int(fd) != 3]
            print("kept", [file for file in files if file.endswith(("/log", "/finished"))])
            for use in (lambda: log.write(b"child"), log.finish, log.tail, lambda: next(reader), lambda: next(late)):
                try:
                    print("used", use())
                except StoreError as error:
                    print("refused")
            reader.close()
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        log.write(b" goes on")
        log.close()
        print(b"".join(reader), list(late))
    """)

    done = subprocess.run([sys.executable, "-c", script], cwd=entry, capture_output=True, text=True, timeout=PATIENCE)

    assert done.stderr == ""
    assert done.stdout.splitlines() == ["kept []", *["refused"] * 5, "b'parent goes on' []"]


# What goes wrong.


def test_a_log_has_one_writer(log: BuildLog, strategy: type[Strategy]) -> None:
    log.write(b"mine")

    with pytest.raises(StoreError, match="exist"):
        BuildLog.create(log.path, strategy=strategy)

    log.close()
    assert read(log) == b"mine"


def test_a_log_that_is_gone_is_not_found(log: BuildLog, strategy: type[Strategy]) -> None:
    saved = BuildLog.saved(log.path, strategy=strategy)
    log.close()
    os.unlink(log.path)

    for look in (log.tail, saved.tail, lambda: BuildLog.saved(log.path, strategy=strategy)):
        with pytest.raises(NotFound, match="ask the store"):
            look()


@pytest.mark.skipif(not hasattr(os, "pread"), reason="needs pread()")
def test_by_descriptor_a_build_that_replaces_its_own_log_deceives_no_reader(entry: Path) -> None:
    log = BuildLog.create(entry / "log", strategy=DupFd)
    log.write(b"as written")
    os.unlink(log.path)
    log.path.write_bytes(b"a forgery.")

    with log.tail(follow=False) as reader:
        assert b"".join(reader) == b"as written"
    log.close()


def test_a_saved_log_ends_at_its_length(log: BuildLog, strategy: type[Strategy]) -> None:
    log.write(b"the log, and what a stray process added")
    log.close()

    saved = BuildLog.saved(log.path, length=7, strategy=strategy)

    assert (saved.length, read(saved), read(saved, -3)) == (7, b"the log", b"log")


def test_a_log_that_lost_its_end_is_read_as_far_as_it_goes(log: BuildLog, strategy: type[Strategy]) -> None:
    log.write(b"half")
    log.close()
    reader = BuildLog.saved(log.path, length=8, strategy=strategy).tail()

    begun = next(reader)

    assert begun == b"half"
    with pytest.raises(StoreError, match="4 of at least 8"):
        next(reader)
    reader.close()


@needs("symlinks")
@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_a_link_in_a_log_s_place_is_not_followed(log: BuildLog, strategy: type[Strategy], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"not a log")
    log.write(b"its log..")
    log.close()
    os.unlink(log.path)
    log.path.symlink_to(secret)

    for look in (lambda: read(log), lambda: BuildLog.saved(log.path), lambda: BuildLog.create(log.path)):
        with pytest.raises(StoreError, match="cannot"):
            look()

    assert secret.read_bytes() == b"not a log"


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_a_fifo_in_a_log_s_place_is_not_waited_for(log: BuildLog) -> None:
    log.write(b"x")
    log.close()
    os.unlink(log.path)
    if sys.platform != "win32":
        os.mkfifo(log.path)

    for look in (lambda: read(log), lambda: BuildLog.saved(log.path)):
        with pytest.raises(StoreError, match="cannot read"):
            look()


@needs("tmpfs")
def test_a_full_disk_ends_the_log_with_its_last_byte(
    strategy: type[Strategy], small_tmpfs: Callable[..., AbstractContextManager[Path]], rng: random.Random
) -> None:
    data = rng.randbytes(200_000)

    with small_tmpfs(size=65536) as folder:
        log = BuildLog.create(folder / "log", strategy=strategy)
        with pytest.raises(NoSpace):
            log.write(data)
        log.close()
        kept = read(log)

    assert 0 < len(kept) == log.length
    assert kept == data[: len(kept)]


@pytest.mark.skipif(hasattr(os, "pread"), reason="needs a platform without pread()")
def test_reading_by_descriptor_is_refused_where_it_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="PathReopen"):
        BuildLog.create(tmp_path / "log", strategy=DupFd)


# At random.


def test_readers_at_random_read_what_was_written(log: BuildLog, rng: random.Random) -> None:
    pieces = [rng.randbytes(rng.choice([1, 100, 5_000, 300_000])) for _ in range(100)]
    data = b"".join(pieces)
    starts = [rng.randrange(len(data)) for _ in range(30)]

    threads = []
    for n, piece in enumerate(pieces):
        log.write(piece)
        if n % 5 == 0 and n // 5 < 20:
            threads.append(Thread(read, log, starts[n // 5]))
    log.finish()
    threads += [Thread(read, log, start) for start in starts[20:]]
    publish(log)
    log.close()

    assert all(thread.result() == data[start:] for thread, start in zip(threads, starts, strict=True))


class LogMachine(RuleBasedStateMachine):
    """One log and its readers, against the bytes that were written and the offset that each reader is at."""

    strategy: type[Strategy]

    def __init__(self) -> None:
        super().__init__()
        self.room = tempfile.TemporaryDirectory()
        self.moves = 0
        self.written = b""
        self.readers: list[tuple[LogReader, int]] = []

    @initialize()
    def create(self) -> None:
        folder = Path(self.room.name, "0")
        folder.mkdir()
        self.log = BuildLog.create(folder / "log", strategy=self.strategy)

    @precondition(lambda self: self.log.state == "open")
    @rule(data=st.binary(max_size=50), times=st.sampled_from([1, 1, 30_000]))
    def write(self, data: bytes, times: int) -> None:
        self.log.write(data * times)
        self.written += data * times
        assert self.log.length == len(self.written)

    @rule(start=st.integers(-60, 60))
    def tail(self, start: int) -> None:
        self.readers.append((self.log.tail(start), start if start >= 0 else max(0, len(self.written) + start)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.readers) - 1))
        reader, offset = self.readers[n]
        assert reader.offset == offset
        if offset >= len(self.written):
            if self.log.state != "open":
                assert list(reader) == []
            return  # it would wait
        chunk = next(reader)
        assert chunk
        assert chunk == self.written[offset : offset + len(chunk)]
        self.readers[n] = (reader, offset + len(chunk))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_reader(self, data: st.DataObject) -> None:
        reader, _ = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        reader.close()
        assert list(reader) == []

    @rule()
    def finish(self) -> None:
        assert self.log.finish() == len(self.written)

    @rule()
    def close(self) -> None:
        self.log.close()

    @precondition(lambda self: self.log.state != "open")
    @rule(fails=st.booleans())
    def move(self, fails: bool) -> None:
        target = Path(self.room.name, str(self.moves + 1))
        try:
            with self.log.moving() as move:
                move.to(target / "log")
                if fails:
                    raise OSError("the rename failed")
                self.log.path.parent.rename(target)
                self.moves += 1
        except OSError:
            assert fails
        assert self.log.path == Path(self.room.name, str(self.moves), "log")

    @precondition(lambda self: self.log.state != "open")
    @rule()
    def read_saved(self) -> None:
        assert read(BuildLog.saved(self.log.path, strategy=self.strategy)) == self.written

    def teardown(self) -> None:
        self.log.close()
        for reader, offset in self.readers:
            assert b"".join(reader) == self.written[offset:]
        self.room.cleanup()


class PathReopenMachine(LogMachine):
    strategy = PathReopen


TestPathReopenMachine = PathReopenMachine.TestCase
TestPathReopenMachine.settings = settings(max_examples=50, stateful_step_count=30)

if DupFd in STRATEGIES:

    class DupFdMachine(LogMachine):
        strategy = DupFd

    TestDupFdMachine = DupFdMachine.TestCase
    TestDupFdMachine.settings = settings(max_examples=50, stateful_step_count=30)


def test_the_platform_s_own_strategy_is_the_default(tmp_path: Path) -> None:
    log = BuildLog.create(tmp_path / "log")

    log.close()

    assert type(log._strategy) is NATIVE
    assert STRATEGIES[-1] is NATIVE
