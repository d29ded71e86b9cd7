"""The same verbs for asyncio.

    async with aio.open_store() as store:
        async with await store.build("app-1", fn, base="tools-7") as result: ...

A build has a thread of its own, as with `Store.start()`; a task that awaits it has none. Cancelling the task is that
caller's cancel: where it was the last one the build ends, and the task goes on once that is over. Whatever blocks runs
in a thread, and a task that is cancelled meanwhile still waits for it: nothing is left behind.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from . import builds, life, opening, process, store
from .backend import Size, Usage
from .builds import Build
from .caches import Mode
from .errors import Cancelled
from .log import BuildLog, LogReader
from .prune import Plan
from .records import Record
from .results import Result
from .workspace import Workspace

AHEAD = 4
"""How many chunks of a log are read before they are asked for."""
COMMANDS = 32
"""How many programs one build's function can run at a time."""

Function = Callable[[Workspace], object] | Callable[["AsyncWorkspace"], Awaitable[object]]
"""Fills a build's tree: in a thread, or, if it is a coroutine function, in the event loop of whoever asked for it."""
T = TypeVar("T")


@asynccontextmanager
async def open_store(name: str | None = None, **arguments: Any) -> AsyncIterator[AsyncStore]:
    """Open a store as `storebackends.open_store` does; leaving the context closes it, and ends its builds."""
    opened = await _in_thread(partial(opening.open_store, name, **arguments), lambda store: AsyncStore(store).close())
    async with AsyncStore(opened) as found:
        yield found


class AsyncStore:
    """A store, for the tasks of an event loop.

    What has no method here is called in a thread: `await asyncio.to_thread(store.sync.children, id)`.
    """

    def __init__(self, sync: store.Store) -> None:
        self.sync = sync
        """The store itself."""

    async def build(self, id: str, fn: Function, base: str | None = None) -> AsyncResult:
        """See Store.build(). An asynchronous *fn* gets an AsyncWorkspace, and is cancelled when the build is."""
        function = _in_loop(fn, asyncio.get_running_loop()) if _is_async(fn) else _in_build_thread(fn)
        build = await _in_thread(partial(self.sync.start, id, function, base), _leave)
        try:
            with build.waiting():
                await _done(build)
            return AsyncResult(build.wait())
        except BaseException:
            await _leave(build)
            raise

    async def result(self, id: str) -> AsyncResult | None:
        """See Store.result()."""
        found = await _in_thread(partial(self.sync.result, id), _release)
        return AsyncResult(found) if found else None

    def log(self, id: str) -> AsyncLog:
        """See Store.log()."""
        return AsyncLog(self.sync.log(id))

    async def delete(self, id: str, recursive: bool = False) -> None:
        """See Store.delete()."""
        await _in_thread(partial(self.sync.delete, id, recursive))

    async def ids(self) -> list[str]:
        """See Store.ids()."""
        return await _in_thread(lambda: list(self.sync.ids()))

    async def size(self, id: str) -> Size:
        """See Store.size()."""
        return await _in_thread(partial(self.sync.size, id))

    async def prune(self, **rules: Any) -> Plan:
        """See Store.prune()."""
        return await _in_thread(partial(self.sync.prune, **rules))

    async def usage(self) -> Usage:
        """See Store.usage()."""
        return await _in_thread(self.sync.usage)

    async def close(self) -> None:
        """See Store.close()."""
        await _in_thread(self.sync.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncResult:
    """A finished tree, leased until release() or the end of the `async with`."""

    def __init__(self, sync: Result) -> None:
        self.sync = sync
        """The Result itself."""
        self.id, self.outcome = sync.id, sync.outcome

    @property
    def path(self) -> Path:
        """See Result.path. The first look mounts the tree where the backend must, and the event loop waits for that."""
        return self.sync.path

    @property
    def attempt(self) -> str:
        """See Result.attempt."""
        return self.sync.attempt

    @property
    def base(self) -> str | None:
        """See Result.base."""
        return self.sync.base

    @property
    def record(self) -> Record:
        """See Result.record."""
        return self.sync.record

    @property
    def log(self) -> AsyncLog:
        """See Result.log."""
        return AsyncLog(self.sync.log)

    async def release(self) -> None:
        """Let go of the result. Idempotent."""
        await _in_thread(self.sync.release)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id!r} {self.outcome}>"


class AsyncLog:
    """A build's log."""

    def __init__(self, sync: BuildLog) -> None:
        self.sync = sync
        """The BuildLog itself."""

    async def tail(self, start: int = 0, follow: bool = True) -> AsyncGenerator[bytes, None]:
        """See BuildLog.tail(). Begins with the first chunk that is asked for; `aclose()` ends it before its time."""
        pump = _Pump(self.sync.tail(start, follow))
        try:
            while (chunk := await pump.next()) is not None:
                yield chunk
        finally:
            await pump.close()


class AsyncWorkspace:
    """What an asynchronous build function receives: see Workspace."""

    def __init__(self, sync: Workspace, pool: concurrent.futures.Executor) -> None:
        self.sync = sync
        """The Workspace itself."""
        self._pool = pool
        self._borrowing = asyncio.Lock()
        self._running: set[process.Cancel] = set()
        self.id, self.attempt, self.log = sync.id, sync.attempt, sync.log

    @property
    def path(self) -> Path:
        """See Workspace.path."""
        return self.sync.path

    @property
    def scratch(self) -> Path:
        """See Workspace.scratch."""
        return self.sync.scratch

    @property
    def cancelled(self) -> bool:
        """See Workspace.cancelled. The function's task has been cancelled then."""
        return self.sync.cancelled

    async def copy_in(self, source: str | os.PathLike[str], dest: str) -> None:
        """See Workspace.copy_in()."""
        await _in_thread(partial(self.sync.copy_in, source, dest), pool=self._pool)

    async def import_image(self, image: str) -> None:
        """See Workspace.import_image()."""
        await _in_thread(partial(self.sync.import_image, image), pool=self._pool)

    async def cache(self, name: str, mode: Mode = "shared", owner: tuple[int, int] | None = None) -> Path:
        """See Workspace.cache()."""
        async with self._borrowing:  # the workspace borrows for one thread at a time
            return await _in_thread(partial(self.sync.cache, name, mode, owner), pool=self._pool)

    async def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
        user: str | int | None = None,
        capture: bool = False,
        check: bool = True,
    ) -> process.Finished:
        """See Workspace.run(). Cancelled, it ends the program and all that it started, and then is over."""
        cancel = process.Cancel()

        call = partial(
            self.sync._run_under,
            cancel,
            argv,
            env=env,
            cwd=cwd,
            input=input,
            timeout=timeout,
            user=user,
            capture=capture,
            check=check,
        )
        self._running.add(cancel)
        try:
            return await _in_thread(call, pool=self._pool, cancel=cancel.set)
        finally:
            self._running.discard(cancel)
            cancel.close()

    def _end(self) -> None:
        """End the programs that tasks of the function's own still run."""
        for cancel in list(self._running):
            cancel.set()


class _Pump:
    """A thread that reads a log some chunks ahead of a task."""

    def __init__(self, reader: LogReader) -> None:
        self._reader, self._loop = reader, asyncio.get_running_loop()
        self._room = threading.Semaphore(AHEAD)
        self._chunks: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._over = False
        threading.Thread(target=self._run, name="storebackends-tail", daemon=True).start()

    async def next(self) -> bytes | None:
        """The next chunk, None at the end."""
        chunk = await self._chunks.get()
        self._room.release()
        self._over = not isinstance(chunk, bytes)
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    async def close(self) -> None:
        """End the thread."""
        self._reader.close()
        self._room.release(AHEAD)
        while not self._over:
            with suppress(Exception):
                await self.next()

    def _run(self) -> None:
        end: Exception | None = None
        # The loop may be closed before the generator that reads here.
        with suppress(RuntimeError), self._reader:
            try:
                for chunk in self._reader:
                    self._room.acquire()
                    self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
            except Exception as error:  # noqa: BLE001 (the reader's)
                end = error
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, end)


async def _in_thread(
    call: Callable[[], T],
    undo: Callable[[T], Awaitable[object]] | None = None,
    *,
    pool: concurrent.futures.Executor | None = None,
    cancel: Callable[[], None] | None = None,
) -> T:
    """Call it in a thread. Cancelled, call *cancel*, wait for its end all the same, and *undo* what came of it."""
    job = asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, call)
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        if cancel:
            cancel()
        await _ended(job)
        if undo and job.exception() is None:
            await _ended(asyncio.ensure_future(undo(job.result())))
        raise


async def _ended(future: asyncio.Future[Any]) -> None:
    """Return when it is done, however often the task is cancelled; what it raised has been seen."""
    while not future.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    with suppress(asyncio.CancelledError):
        future.exception()


async def _release(result: Result | None) -> None:
    if result:
        await _in_thread(result.release)


async def _leave(build: Build) -> None:
    """One caller goes. Where that ends the build, wait until it has ended."""
    if build.cancel():
        await _ended(_done(build))


def _done(build: Build) -> asyncio.Future[None]:
    """Done when the build is."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle() -> None:
        if not done.done():
            done.set_result(None)

    def tell(_: Build) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle)

    build.add_done_callback(tell)
    return done


def _is_async(fn: Function) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def _in_build_thread(fn: Function) -> life.Function:
    def function(work: Workspace) -> None:
        made = cast(life.Function, fn)(work)
        if inspect.iscoroutine(made):
            made.close()
            raise TypeError(f"{fn!r} returned a coroutine; pass an `async def` function itself, or a partial() of one")

    return function


def _in_loop(fn: Function, loop: asyncio.AbstractEventLoop) -> life.Function:
    """A function for the build's thread, which runs *fn* in the loop and waits for its end."""

    def function(work: Workspace) -> None:
        with concurrent.futures.ThreadPoolExecutor(COMMANDS, f"build {work.id}") as pool:
            inner = AsyncWorkspace(work, pool)
            try:
                task = _run_task(lambda: cast(Awaitable[object], fn(cast(Any, inner))), loop)
            finally:
                inner._end()
        if task.cancelled():
            raise Cancelled(work.id, work.attempt, "its function's task was cancelled")
        task.result()

    return function


def _run_task(make: Callable[[], Awaitable[object]], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
    """Wait in the build's thread for a task of the loop, which is cancelled when the build is; return it when done."""
    ended: concurrent.futures.Future[asyncio.Task[None]] = concurrent.futures.Future()
    tasks: list[asyncio.Task[None]] = []

    async def main() -> None:
        await make()

    def begin() -> None:
        # The context is that of the build's thread: what the function waits for counts as what its build waits for.
        tasks.append(loop.create_task(main()))
        tasks[0].add_done_callback(ended.set_result)

    def interrupt() -> None:
        if not interrupted:
            interrupted.append(tasks[0].cancel())

    interrupted: list[bool] = []
    loop.call_soon_threadsafe(begin)
    builds.current().interrupt_by(partial(loop.call_soon_threadsafe, interrupt))
    return ended.result()
