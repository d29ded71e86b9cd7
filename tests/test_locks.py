from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from storebackends.errors import StoreError
from storebackends.locks import NATIVE, Lease, Locks, Strategy

STRATEGIES: list[Strategy] = [NATIVE]
if sys.platform == "linux":
    from storebackends._locks_posix import WholeFile

    STRATEGIES.append(WholeFile())

byte_range = pytest.mark.skipif(sys.platform != "linux", reason="no open-file-description locks and /proc here")
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")


@pytest.fixture(params=STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def locks(tmp_path: Path, strategy: Strategy) -> Iterator[Locks]:
    locks = Locks(tmp_path / "locks", strategy)
    yield locks
    locks.close()


# Starts a program beside this one, with `locks` on the same folder and kind; it says what it holds on its stdout.
Elsewhere = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def elsewhere(tmp_path: Path, strategy: Strategy) -> Iterator[Elsewhere]:
    kind = type(strategy)
    prelude = f"""if True:
        import os, sys, threading
        from pathlib import Path
        from storebackends.errors import StoreError
        from storebackends.locks import Locks
        from {kind.__module__} import {kind.__name__}
        folder = {str(tmp_path / "locks")!r}
        locks = Locks(Path(folder), {kind.__name__}())
        def say(*what): print(*what, flush=True)
        """
    with ExitStack() as started:

        def start(script: str) -> subprocess.Popen[str]:
            child = subprocess.Popen(
                [sys.executable, "-W", "ignore::DeprecationWarning", "-c", prelude + script.strip()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.enter_context(child)  # leaving it closes the pipes and waits
            started.callback(child.kill)
            return child

        yield start


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_work_has_one_holder_among_threads(locks: Locks) -> None:
    held = locks.try_work("app")
    seen: list[object] = []

    thread = threading.Thread(target=lambda: seen.append(locks.try_work("app")))
    thread.start()
    thread.join()

    assert held is not None
    assert seen == [None]


def test_work_has_one_holder_among_processes(locks: Locks, elsewhere: Elsewhere) -> None:
    child = elsewhere("held = locks.try_work('app'); say(held is not None); sys.stdin.read()")
    assert said(child) == "True"

    while_held, other = locks.try_work("app"), locks.try_work("other")
    child.communicate()
    after = locks.try_work("app")

    assert while_held is None
    assert other is not None
    assert after is not None


def test_work_of_many_processes_never_overlaps(locks: Locks, elsewhere: Elsewhere, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    script = f"""
        count = Path({str(count)!r})
        def add():
            for _ in range(25):
                with locks.work('app'): count.write_text(str(int(count.read_text()) + 1))
        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        """

    children = [elsewhere(script) for _ in range(3)]
    codes = [(child.communicate(), child.returncode)[1] for child in children]

    assert codes == [0, 0, 0]
    assert count.read_text() == "150"


def test_killed_holder_holds_nothing(locks: Locks, elsewhere: Elsewhere) -> None:
    child = elsewhere("held = locks.try_work('app'), locks.try_lease('app'); say('held'); sys.stdin.read()")
    assert said(child) == "held"

    child.kill()
    child.wait()

    assert locks.try_work("app") is not None
    assert locks.try_use("app") is not None


@can_fork
def test_forked_child_of_a_killed_holder_holds_nothing(locks: Locks, elsewhere: Elsewhere) -> None:
    parent = elsewhere("""
        held = locks.try_work('app'), locks.try_lease('app')
        if os.fork() == 0:
            say('forked')
            sys.stdin.read()  # until the test, which has the other end, closes it
            os._exit(0)
        os.wait()
        """)
    assert said(parent) == "forked"

    parent.kill()
    parent.wait()
    work, use = locks.try_work("app"), locks.try_use("app")

    assert work is not None
    assert use is not None


@can_fork
def test_forked_child_can_neither_use_nor_release_its_parents_locks(locks: Locks, elsewhere: Elsewhere) -> None:
    parent = elsewhere("""
        held = locks.try_work('app'), locks.try_lease('app')
        if os.fork() == 0:
            for lock in held: lock.release()
            locks.close()
            try: locks.try_lease('app')
            except StoreError as error: say(error)
            os._exit(0)
        os.wait()
        say('waited')
        sys.stdin.read()
        """)

    error, waited = said(parent), said(parent)
    work, use = locks.try_work("app"), locks.try_use("app")

    assert "opened before fork(): open the store again in the child" in error
    assert waited == "waited"
    assert work is None
    assert use is None


@byte_range
def test_fork_beside_threads_that_lock_inherits_no_lock_file(locks: Locks, elsewhere: Elsewhere) -> None:
    child = elsewhere("""
        def inherited():
            links = [os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')]
            return any(link.startswith(folder) for link in links)
        def lock(name):
            while not done.is_set():
                with locks.lease(name), locks.work(name): pass
        done = threading.Event()
        threads = [threading.Thread(target=lock, args=(f'app-{n}',)) for n in range(4)]
        for thread in threads: thread.start()
        codes = set()
        for _ in range(100):
            pid = os.fork()
            if pid == 0: os._exit(inherited())
            codes.add(os.waitpid(pid, 0)[1])
        done.set()
        for thread in threads: thread.join()
        locks.close()
        say(codes, inherited())
        """)

    assert said(child) == "{0} False"


def test_use_is_refused_while_the_id_is_leased_in_this_process(locks: Locks) -> None:
    lease = locks.try_lease("app")
    assert lease is not None

    while_leased, other = locks.try_use("app"), locks.try_use("other")
    lease.release()

    assert while_leased is None
    assert other is not None
    assert locks.try_use("app") is not None


def test_use_is_refused_while_the_id_is_leased_in_another_process(locks: Locks, elsewhere: Elsewhere) -> None:
    child = elsewhere("lease = locks.try_lease('app'); say('leased'); sys.stdin.read()")
    assert said(child) == "leased"

    shared, use = locks.try_lease("app"), locks.try_use("app")

    assert shared is not None
    assert use is None


def test_lease_is_refused_while_use_is_held(locks: Locks) -> None:
    with locks.try_use("app") or pytest.fail("not free"):
        while_held = locks.try_lease("app")

    assert while_held is None
    assert locks.try_lease("app") is not None


def test_leases_of_an_id_are_counted_and_released_once_each(locks: Locks) -> None:
    first, second = locks.lease("app"), locks.lease("app")

    first.release()
    first.release()
    after_first = locks.try_use("app")
    second.release()

    assert after_first is None
    assert locks.try_use("app") is not None


def test_collected_lease_is_free(locks: Locks) -> None:
    lease = locks.lease("app")
    cycle: list[object] = [lease]
    cycle.append(cycle)

    del lease, cycle
    gc.collect()

    assert locks.try_use("app") is not None


def test_lease_collected_in_the_midst_of_locking_is_free_afterwards(tmp_path: Path) -> None:
    class Collecting:
        """What the garbage collector may do at any point: end a lease while the same thread takes another."""

        per_id, unlock, holders = NATIVE.per_id, NATIVE.unlock, NATIVE.holders
        open = staticmethod(NATIVE.open)

        def lock(self, fd: int, offset: int, exclusive: bool) -> bool:
            if leases:
                leases.pop().release()
            return NATIVE.lock(fd, offset, exclusive)

    leases: list[Lease] = []
    locks = Locks(tmp_path / "locks", Collecting())
    leases.append(locks.lease("old"))

    new = locks.lease("new")
    old = locks.try_use("old")

    assert leases == []
    assert old is not None
    assert locks.try_use("new") is None
    new.release()
    locks.close()


@byte_range
def test_ten_thousand_leases_share_the_descriptors_of_64_files(tmp_path: Path) -> None:
    locks = Locks(tmp_path / "locks")
    before = descriptors()

    leases = [locks.lease(f"app-{n}") for n in range(10_000)]
    held = descriptors()
    for lease in leases:
        lease.release()

    assert held - before == 64
    assert descriptors() == held  # they stay, for the next lease
    assert locks.try_use("app-5000") is not None
    locks.close()
    assert descriptors() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to count descriptors with")
def test_ten_thousand_locks_one_after_the_other_leave_no_descriptor(locks: Locks) -> None:
    before = descriptors()

    for n in range(2_500):
        locks.lease(f"app-{n % 100}").release()
        for lock in (locks.try_work(f"app-{n % 100}"), locks.try_use(f"app-{n % 100}"), locks.try_store(n % 2 == 0)):
            assert lock is not None
            lock.release()
    locks.close()

    assert descriptors() == before


def test_waiter_gets_the_work_that_another_thread_releases(locks: Locks) -> None:
    held = locks.try_work("app")
    assert held is not None
    waiting = threading.Event()

    def never_but_tell() -> bool:
        waiting.set()
        return False

    def release() -> None:
        waiting.wait(60)
        held.release()

    thread = threading.Thread(target=release)
    thread.start()
    got = locks.work("app", cancelled=never_but_tell, timeout=60)
    thread.join()

    assert got is not None


def test_cancelled_waiter_gets_none(locks: Locks) -> None:
    held = locks.try_work("app")
    answers = iter([False, False, True])

    got = locks.work("app", cancelled=lambda: next(answers))

    assert held is not None
    assert got is None


def test_waiting_too_long_is_an_error_that_says_for_what(locks: Locks) -> None:
    held = [locks.try_work("app"), locks.try_use("app"), locks.try_store(True)]

    waits: dict[str, Callable[[], object]] = {
        "the lock of 'app'": lambda: locks.work("app", timeout=0.01),
        "a lease of 'app'": lambda: locks.lease("app", timeout=0.01),
        "the store's lock": lambda: locks.store(False, timeout=0.01),
    }

    for what, wait in waits.items():
        with pytest.raises(TimeoutError, match=rf"waited 0\.01 s: {what} is held by .+; wait longer, or end that"):
            wait()

    assert None not in held


def test_store_lock_is_shared_by_many_or_held_by_one(locks: Locks, elsewhere: Elsewhere) -> None:
    child = elsewhere("held = locks.store(False); say('held'); sys.stdin.read(); held.release(); say('released')")
    assert said(child) == "held"

    shared, exclusive = locks.try_store(False), locks.try_store(True)
    assert shared is not None
    shared.release()
    child.communicate()
    alone = locks.try_store(True)

    assert exclusive is None
    assert alone is not None
    assert locks.try_store(False) is None


@byte_range
def test_holders_are_named_by_pid_and_program(tmp_path: Path) -> None:
    locks = Locks(tmp_path / "locks")
    script = "import sys, pathlib, storebackends.locks as l; k = l.Locks(pathlib.Path(sys.argv[1])); k.lease('app')"
    script += "; lease = k.lease('app'); print('leased', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "locks")]

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        said(child)
        leased = locks.holders("app")
        work = locks.try_work("app")
        both = locks.holders("app")
        child.communicate()

    assert leased == [f"pid {child.pid} ({sys.executable})"]
    assert work is not None
    assert sorted(both) == sorted([*leased, "this process"])
    assert locks.holders("other") == []
    locks.close()


def test_holders_of_another_store_with_the_same_id_are_not_named(locks: Locks, tmp_path: Path) -> None:
    other = Locks(tmp_path / "other")
    held, seen = other.try_work("app"), locks.try_work("seen")

    named = locks.holders("app")

    assert held is not None
    assert seen is not None
    assert named == []
    other.close()


def test_closing_releases_everything_and_ends_the_object(locks: Locks, strategy: Strategy, tmp_path: Path) -> None:
    other = Locks(tmp_path / "locks", strategy)
    held = [other.lease("app"), other.work("app"), other.store(True)]

    other.close()
    other.close()
    taken = [locks.try_use("app"), locks.try_work("app"), locks.try_store(True)]
    for lock in held:
        assert lock is not None
        lock.release()

    assert None not in taken
    assert locks.try_work("app") is None
    with pytest.raises(StoreError, match="is closed: open it again"):
        other.try_lease("app")


def test_lock_left_to_the_interpreters_end_is_no_error(locks: Locks, elsewhere: Elsewhere) -> None:
    child = elsewhere("held = locks.lease('app')")

    output, _ = child.communicate()

    assert (child.returncode, output) == (0, "")
    assert locks.try_use("app") is not None


@pytest.mark.skipif(sys.platform == "win32", reason="no modes here")
def test_folder_is_closed_to_others(locks: Locks, tmp_path: Path) -> None:
    assert os.stat(tmp_path / "locks").st_mode & 0o777 == 0o700


@pytest.mark.skipif(sys.platform == "win32", reason="no O_NOFOLLOW here")
def test_link_in_place_of_a_lock_file_is_not_followed(locks: Locks, tmp_path: Path) -> None:
    (tmp_path / "locks" / "store").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StoreError, match=r"cannot lock .*store: Too many levels of symbolic links"):
        locks.try_store(True)

    assert not (tmp_path / "elsewhere").exists()


def test_folder_that_is_gone_is_explained(locks: Locks, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "locks")

    with pytest.raises(StoreError, match=r"cannot lock .*; check that you may write there"):
        locks.try_lease("app")


class TestKeys:
    def test_exclude_all_others_and_one_another(self, locks: Locks) -> None:
        with locks.keys() as keys, locks.keys() as others:
            work, use = keys.try_work("app"), keys.try_use("app")

            assert work is not None
            assert use is not None
            assert [keys.try_work("app"), others.try_work("app"), locks.try_work("app")] == [None] * 3
            assert [keys.try_use("app"), others.try_use("app"), locks.try_lease("app")] == [None] * 3
            assert keys.try_work("other") is not None

    def test_let_go_of_each_lock_by_itself_and_of_all_at_the_end(self, locks: Locks) -> None:
        with locks.keys() as keys:
            first, second = keys.try_work("a"), keys.try_work("b")
            assert first is not None
            first.release()
            assert locks.try_work("a") is not None
            assert locks.try_work("b") is None
        assert second is not None
        assert locks.try_work("b") is not None
        second.release()  # too late, and harmless: it is another's now
        assert locks.try_work("b") is not None

    def test_are_refused_what_is_leased(self, locks: Locks) -> None:
        with locks.lease("app"), locks.keys() as keys:
            assert keys.try_use("app") is None
        with locks.keys() as keys:
            assert keys.try_use("app") is not None

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
    def test_of_many_ids_take_few_descriptors_and_leave_none(self, locks: Locks) -> None:
        before = descriptors()
        with locks.keys() as keys:
            for number in range(1000):
                work = keys.try_work(f"app-{number}")
                assert work is not None
                work.release()
            assert descriptors() - before <= 64
        assert descriptors() == before


# a turnstile


def test_who_moves_a_log_waits_for_the_reads_in_flight_and_is_overtaken_by_none(
    tmp_path: Path, strategy: Strategy
) -> None:
    """Each Locks stands for a process."""
    readers = [Locks(tmp_path / "locks", strategy) for _ in range(4)]
    mover = Locks(tmp_path / "locks", strategy)
    inside, most, moved = set[int](), list[int](), threading.Event()

    def read(number: int) -> None:
        turnstile = readers[number].turnstile("id")
        while not moved.is_set():
            with turnstile.reading():
                inside.add(number)
                inside.discard(number)

    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        with mover.turnstile("id").moving():
            most.extend(len(inside) for _ in range(100))
    moved.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for locks in (*readers, mover):
        locks.close()

    assert set(most) == {0}


def test_two_may_read_at_once(tmp_path: Path, strategy: Strategy) -> None:
    first, second = (Locks(tmp_path / "locks", strategy) for _ in range(2))

    with first.turnstile("id").reading(), second.turnstile("id").reading():
        pass

    first.close()
    second.close()
