from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storebackends import (
    BuildFailed,
    BuildLog,
    Busy,
    Cancelled,
    CommandFailed,
    NotFound,
    StoreError,
    Workspace,
    aio,
    opening,
)
from storebackends.aio import AsyncResult, AsyncStore, AsyncWorkspace
from storebackends.locks import Locks
from tests.capabilities import PROJECT, needs
from tests.stores import WAIT, files, left_in_progress, open_copy, until, writes

Main = Callable[[AsyncStore], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Main], None]:
    """Run an asynchronous test with a store of its own; a failure is reached if anything hangs."""

    async def main(test: Main) -> None:
        async with asyncio.timeout(WAIT), opened(tmp_path / "store") as store:
            await test(store)

    return lambda test: asyncio.run(main(test))


def opened(root: Path) -> Any:
    return aio.open_store(backend="copy", path=root, durability="none")


def awrites(**texts: str) -> Callable[[AsyncWorkspace], Awaitable[None]]:
    """As `writes`, for the event loop."""

    async def fn(work: AsyncWorkspace) -> None:
        for name, text in texts.items():
            (work.path / name).write_text(text)
            work.log.write(name.encode() + b"\n")
            await asyncio.sleep(0)

    return fn


async def log_of(store: AsyncStore, id: str) -> bytes:
    return b"".join([chunk async for chunk in store.log(id).tail()])


@asynccontextmanager
async def building(store: AsyncStore, id: str, fn: aio.Function) -> AsyncIterator[asyncio.Task[AsyncResult]]:
    """A task that builds; the block begins when the function has written "begun" to its log."""
    task = asyncio.create_task(store.build(id, fn))
    while not task.done():
        try:
            async with aclosing(store.log(id).tail()) as chunks:
                assert b"begun" in await anext(chunks)
                break
        except NotFound:
            await asyncio.sleep(0.01)
    yield task
    await asyncio.wait([task])


async def stays(work: AsyncWorkspace) -> None:
    """A function that ends only by being cancelled."""
    work.log.write(b"begun")
    await asyncio.get_running_loop().create_future()


def test_builds_in_a_thread_or_in_the_callers_loop(run: Callable[[Main], None]) -> None:
    places: dict[str, int] = {}

    def plain(work: Workspace) -> None:
        places["plain"] = threading.get_ident()
        (work.path / "f").write_text("plain")

    async def coroutine(work: AsyncWorkspace) -> None:
        places["coroutine"] = threading.get_ident()
        (work.path / "f").write_text("coroutine")

    async def test(store: AsyncStore) -> None:
        places["loop"] = threading.get_ident()
        async with await store.build("a", plain) as one, await store.build("b", coroutine, base="a") as other:
            assert (one.outcome, other.outcome, other.base) == ("built", "built", "a")
            assert [files(one.path), files(other.path)] == [{"f": "plain"}, {"f": "coroutine"}]
        async with await store.build("a", coroutine) as again:
            assert again.outcome == "hit"

    run(test)

    assert places["coroutine"] == places["loop"] != places["plain"]


@pytest.mark.parametrize("as_async", [True, False])
def test_a_function_may_be_partial_or_an_object(run: Callable[[Main], None], as_async: bool) -> None:
    class Called:
        async def __call__(self, work: AsyncWorkspace) -> None:
            await work.run([sys.executable, "-c", ""])

    async def fn(argument: str, work: AsyncWorkspace) -> None:
        await work.run([sys.executable, "-c", ""])

    async def test(store: AsyncStore) -> None:
        await store.build("a", Called() if as_async else partial(fn, "x"))

        assert await store.ids() == ["a"]

    run(test)


def test_a_coroutine_that_nobody_would_await_fails_the_build(run: Callable[[Main], None]) -> None:
    async def fn(work: Any, argument: str) -> None: ...

    async def test(store: AsyncStore) -> None:
        with pytest.raises(BuildFailed, match="returned a coroutine; pass an `async def`"):
            await store.build("a", lambda work: fn(work, "x"))

    run(test)


@needs("sh")
def test_the_verbs_are_those_of_the_store(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def fn(work: AsyncWorkspace) -> None:
        (work.scratch / "part").write_text("copied")
        await work.copy_in(work.scratch / "part", "f")
        (await work.cache("downloads") / "g").write_text("kept")
        done = await work.run(["cat", "f"], capture=True)
        work.log.write(done.stdout)

    async def test(store: AsyncStore) -> None:
        assert await store.result("a") is None
        async with await store.build("a", fn) as built:
            assert (built.record.attempt, built.attempt) == (store.sync.record("a").attempt,) * 2
            assert b"".join([chunk async for chunk in built.log.tail()]) == b"copied"
            with pytest.raises(Busy):
                await store.delete("a")
        found = await store.result("a")
        assert found is not None
        assert files(found.path) == {"f": "copied"}
        await found.release()
        assert ((await store.size("a")).bytes > 0, (await store.usage()).total > 0) == (True, True)
        assert [step.id for step in (await store.prune(max_items=0)).steps] == ["a"]
        assert await store.ids() == []

    run(test)


@needs("sh")
def test_failures_are_the_same(run: Callable[[Main], None]) -> None:
    async def fn(work: AsyncWorkspace) -> None:
        await work.run(["sh", "-c", "echo said; exit 7"])

    async def test(store: AsyncStore) -> None:
        with pytest.raises(BuildFailed, match="sh ended with status 7") as caught:
            await store.build("a", fn)
        assert isinstance(caught.value.__cause__, CommandFailed)
        assert await log_of(store, "a") == b"said\n"
        with pytest.raises(NotFound):
            await store.build("b", fn, base="nowhere")
        with pytest.raises(NotFound):
            store.log("b")
        assert left_in_progress(store.sync.root) == []

    run(test)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes with a name")
@needs("sh")
def test_programs_of_one_build_run_beside_each_other_and_the_loop(run: Callable[[Main], None]) -> None:
    async def fn(work: AsyncWorkspace) -> None:
        if sys.platform != "win32":
            os.mkfifo(work.scratch / "to")
            os.mkfifo(work.scratch / "back")
        # Each waits for the other: run one after the other they would never end.
        await asyncio.gather(
            work.run(["sh", "-c", f"echo x > {work.scratch}/to; cat {work.scratch}/back"]),
            work.run(["sh", "-c", f"cat {work.scratch}/to; echo y > {work.scratch}/back"]),
        )

    async def test(store: AsyncStore) -> None:
        await store.build("a", fn)

        assert sorted((await log_of(store, "a")).split()) == [b"x", b"y"]

    run(test)


class TestCancel:
    @pytest.mark.parametrize("kind", ["plain", "coroutine"])
    @needs("sh")
    def test_of_the_only_task_ends_the_build_before_the_await_ends(
        self, run: Callable[[Main], None], kind: str
    ) -> None:
        def plain(work: Workspace) -> None:
            work.run(["sh", "-c", "echo begun; exec sleep 1000"])

        async def coroutine(work: AsyncWorkspace) -> None:
            await work.run(["sh", "-c", "echo begun; exec sleep 1000"])

        async def test(store: AsyncStore) -> None:
            async with building(store, "a", plain if kind == "plain" else coroutine) as task:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert left_in_progress(store.sync.root) == []
                assert not store.sync.running()
                assert await log_of(store, "a") == b"begun\n"

        run(test)

    def test_again_and_again_still_waits_for_the_functions_own_clean_up(self, run: Callable[[Main], None]) -> None:
        tidied: list[bool] = []

        async def test(store: AsyncStore) -> None:
            tidy = asyncio.Event()

            async def fn(work: AsyncWorkspace) -> None:
                try:
                    await stays(work)
                finally:
                    await tidy.wait()
                    tidied.append(work.path.is_dir() and work.cancelled)

            async with building(store, "a", fn) as task:
                for _ in range(3):
                    task.cancel()
                    await asyncio.sleep(0)
                assert not task.done()
                tidy.set()
                with pytest.raises(asyncio.CancelledError):
                    await task

        run(test)

        assert tidied == [True]

    def test_of_one_of_two_tasks_leaves_the_build_to_the_other(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            going = asyncio.Event()

            async def fn(work: AsyncWorkspace) -> None:
                work.log.write(b"begun")
                await going.wait()

            async with building(store, "a", fn) as one:
                other = asyncio.create_task(store.build("a", fn))
                until_joined = store.sync._builds.get("a")
                assert until_joined is not None
                while until_joined.callers < 2:
                    await asyncio.sleep(0.01)
                one.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await one
                going.set()
                async with await other as result:
                    assert result.outcome == "attached"

        run(test)

    @needs("sh")
    def test_of_a_run_ends_the_program_and_not_the_build(self, run: Callable[[Main], None]) -> None:
        async def fn(work: AsyncWorkspace) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await work.run(["sh", "-c", "sleep 1000; touch late"])
            assert not work.cancelled
            await work.run(["touch", "after"])

        async def test(store: AsyncStore) -> None:
            async with await store.build("a", fn) as result:
                assert files(result.path) == {"after": ""}

        run(test)

    def test_by_closing_the_store_reaches_the_function(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            async with building(store, "a", stays) as task:
                await store.close()
                with pytest.raises(Cancelled):
                    await task

        run(test)

    def test_by_a_caller_in_a_thread_reaches_the_function(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            build = await asyncio.to_thread(store.sync.start, "a", aio._in_loop(stays, asyncio.get_running_loop()))
            assert await asyncio.to_thread(lambda: next(build.log.tail())) == b"begun"

            build.cancel()

            while store.sync.running():
                await asyncio.sleep(0.01)

        run(test)

    def test_of_the_functions_own_task_is_no_cancel_of_the_build(self, run: Callable[[Main], None]) -> None:
        async def fn(work: AsyncWorkspace) -> None:
            raise asyncio.CancelledError

        async def test(store: AsyncStore) -> None:
            with pytest.raises(BuildFailed, match="its function's task was cancelled"):
                await store.build("a", fn)

        run(test)

    def test_while_the_store_opens_closes_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entered, going = threading.Event(), threading.Event()

        def slow(*arguments: object, **options: object) -> None:
            entered.set()
            assert going.wait(WAIT)

        async def main() -> None:
            async with opened(tmp_path):
                raise AssertionError("opened")

        async def test() -> None:
            task = asyncio.create_task(main())
            await asyncio.to_thread(entered.wait, WAIT)
            task.cancel()
            await asyncio.sleep(0)
            going.set()
            with pytest.raises(asyncio.CancelledError):
                await task

        monkeypatch.setattr(opening, "recover", slow)
        asyncio.run(test())

        with Locks(tmp_path / "locks").store(exclusive=True, timeout=0):
            pass

    def test_while_a_build_begins_leaves_it(self, run: Callable[[Main], None], monkeypatch: pytest.MonkeyPatch) -> None:
        entered, going = threading.Event(), threading.Event()

        async def test(store: AsyncStore) -> None:
            start = store.sync.start

            def slow(*arguments: Any) -> Any:
                entered.set()
                assert going.wait(WAIT)
                return start(*arguments)

            monkeypatch.setattr(store.sync, "start", slow)
            task = asyncio.create_task(store.build("a", stays))
            await asyncio.to_thread(entered.wait, WAIT)
            task.cancel()
            await asyncio.sleep(0)
            going.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not store.sync.running()
            assert await store.ids() == []

        run(test)

    @needs("sh")
    def test_ends_programs_of_tasks_that_the_function_forgot(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            forgotten: list[asyncio.Task[Any]] = []

            async def fn(work: AsyncWorkspace) -> None:
                forgotten.append(asyncio.create_task(work.run(["sh", "-c", "echo begun; exec sleep 1000"])))
                async with aclosing(store.log("a").tail()) as chunks:
                    await anext(chunks)

            await store.build("a", fn)
            with pytest.raises(Cancelled):
                await forgotten[0]

        run(test)


def test_a_thousand_tasks_that_want_one_id_take_few_threads(run: Callable[[Main], None]) -> None:
    runs: list[int] = []

    async def test(store: AsyncStore) -> None:
        going = asyncio.Event()

        async def fn(work: AsyncWorkspace) -> None:
            runs.append(1)
            work.log.write(b"begun")
            await going.wait()

        async with building(store, "a", fn) as first:
            others = [asyncio.create_task(store.build("a", fn)) for _ in range(1000)]
            running = store.sync._builds.get("a")
            assert running is not None
            while running.callers < 1001:
                await asyncio.sleep(0.01)
            assert threading.active_count() < 60  # pytest's own, the default pool's, the build's
            going.set()
            results = [await first, *await asyncio.gather(*others)]
            assert {result.attempt for result in results} == {(await first).attempt}
            for result in results:
                await result.release()

    run(test)

    assert runs == [1]


def test_a_function_that_waits_for_its_own_build_is_told(run: Callable[[Main], None]) -> None:
    async def test(store: AsyncStore) -> None:
        async def fn(work: AsyncWorkspace) -> None:
            await store.build("a", fn)

        with pytest.raises(BuildFailed, match="it would wait for itself: a -> a"):
            await store.build("a", fn)

    run(test)


def test_two_builds_that_wait_for_each_other_are_told(run: Callable[[Main], None]) -> None:
    async def test(store: AsyncStore) -> None:
        begun = asyncio.Barrier(2)

        async def fn(other: str, work: AsyncWorkspace) -> None:
            await begun.wait()
            await store.build(other, awrites(f="1"))

        outcomes = await asyncio.gather(
            store.build("x", partial(fn, "y")), store.build("y", partial(fn, "x")), return_exceptions=True
        )

        failed = [outcome for outcome in outcomes if isinstance(outcome, BuildFailed)]
        assert failed
        assert "it would wait for itself" in str(failed[0]) + str(failed[-1])

    run(test)


class TestTail:
    def test_follows_a_running_build_from_its_first_byte(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            seen = asyncio.Event()

            async def fn(work: AsyncWorkspace) -> None:
                work.log.write(b"begun")
                await seen.wait()
                work.log.write(b" and done")

            async with building(store, "a", fn) as task:
                chunks = []
                async for chunk in store.log("a").tail():
                    chunks.append(chunk)
                    seen.set()
                assert chunks == [b"begun", b" and done"]
                await task

        run(test)

    def test_can_start_anywhere_and_not_wait(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            async with building(store, "a", stays) as task:
                assert [chunk async for chunk in store.log("a").tail(start=2, follow=False)] == [b"gun"]
                assert [chunk async for chunk in store.log("a").tail(start=-1, follow=False)] == [b"n"]
                task.cancel()

        run(test)

    def test_gives_a_slow_reader_every_byte_and_reads_little_ahead(self, tmp_path: Path) -> None:
        size, chunk = 20 << 20, 1 << 20  # a saved log is read a MiB at a time
        data = os.urandom(chunk) * (size // chunk)
        (tmp_path / "log").write_bytes(data)

        async def main() -> None:
            reader = BuildLog.saved(tmp_path / "log").tail()
            pump, got = aio._Pump(reader), b""
            while (part := await pump.next()) is not None:
                got += part
                await asyncio.sleep(0.001)
                assert reader.offset <= len(got) + (aio.AHEAD + 1) * chunk
            assert got == data

        asyncio.run(main())

    @pytest.mark.parametrize("how", ["aclose", "break", "cancel"])
    def test_that_is_left_early_leaves_no_thread(self, run: Callable[[Main], None], how: str) -> None:
        def tails() -> bool:
            return any(thread.name == "storebackends-tail" for thread in threading.enumerate())

        async def reads(store: AsyncStore, got: asyncio.Event) -> None:
            async with aclosing(store.log("a").tail()) as chunks:
                async for _ in chunks:
                    got.set()
                    if how == "aclose":
                        return

        async def breaks(store: AsyncStore, got: asyncio.Event) -> None:
            async for _ in store.log("a").tail():
                got.set()
                break

        async def test(store: AsyncStore) -> None:
            async with building(store, "a", stays) as task:
                got = asyncio.Event()
                reader = asyncio.create_task((breaks if how == "break" else reads)(store, got))
                await got.wait()
                if how == "cancel":
                    reader.cancel()
                await asyncio.wait([reader])
                await asyncio.to_thread(until, lambda: not tails())
                task.cancel()

        run(test)

    def test_ends_with_the_error_of_the_log(self, run: Callable[[Main], None]) -> None:
        async def test(store: AsyncStore) -> None:
            async with await store.build("a", awrites(f="1")) as result:
                log = result.log
                os.truncate(log.sync.path, 1)
                with pytest.raises(StoreError, match="lost its end"):
                    [chunk async for chunk in log.tail()]

        run(test)


@pytest.mark.docs
@needs("source")
def test_the_how_to_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (PROJECT / "docs/how-to/asyncio.md").read_text()
    program, *parts = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {"contextlib": contextlib}
    exec(program, names)
    exec("\n".join(parts), names)

    said = capsys.readouterr().out.splitlines()
    assert said[:1] == ["built hello"]
    assert sum(int(line.split()[0]) for line in said[1:]) == len("hello\n" + "6 hello.txt\n")
    asyncio.run(_the_parts_of_the_how_to(tmp_path / "store", names))


async def _the_parts_of_the_how_to(root: Path, names: dict[str, Any]) -> None:
    async with aio.open_store(backend="copy", path=root) as store:
        assert b"hello" in await names["first"](store, "hello")
        assert await names["children"](store, "hello") == []
        with pytest.raises(BuildFailed, match="make"):
            await store.build("checked", names["fn"])


def test_a_store_that_is_open_already_can_be_used(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncStore(open_copy(tmp_path)) as store, await store.build("a", writes(f="1")) as result:
            assert repr(result) == "<AsyncResult 'a' built>"
        with pytest.raises(StoreError, match="closed"):
            await store.ids()

    asyncio.run(main())
