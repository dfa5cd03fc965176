"""Makes every kind of user's handler uniform, and runs the blocking kinds in a bounded pool of threads.

| handler | becomes |
|---|---|
| coroutine function, async generator function | itself |
| plain function | a coroutine function that waits for a pool thread |
| generator function | an async generator function; one pool thread drives it, a bounded batch queue carries its items |

Callable objects, bound methods and `functools.partial` count as what they call.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from ._context import Context
from .codec import check_codec
from .errors import ConfigError, ManagerClosed, Overloaded
from .types import Handler

IDLE_THREAD_S = 10.0
"""A pool thread without work ends after this long, so that a burst leaves no threads behind (promise P5)."""

BATCH_ITEMS = 64
BATCH_BYTES = 1 << 20
"""Items of a blocking generator that may wait for the event loop: this many, and fewer when they are large."""

QUEUE_PER_THREAD = 64
"""Requests that may wait for a pool thread, per thread; one more is refused with `Overloaded`."""


class RefusedByPool(Overloaded):
    """No handler has seen the request: the pool's queue is full. Servers report it as `Overloaded` with ``sent="no"``.

    A class of its own, because an `Overloaded` that a handler raises says something about a call that the handler made.
    """

    handler_untouched = True


class _Job:
    """One call for the pool. ``started`` is set under the pool's lock, and decides whether cancelling prevents the run."""

    __slots__ = ("abandoned", "context", "failed", "finished", "function")

    def __init__(
        self, function: Callable[[], Any], finished: Callable[[Any], None], failed: Callable[[BaseException], None]
    ) -> None:
        self.function = function
        self.finished = finished
        self.failed = failed
        self.context = contextvars.copy_context()
        self.abandoned = False


class HandlerExecutor:
    """Threads for blocking handlers: at most ``threads``, started on demand, with a bounded queue before them.

    Any thread may submit. Threads are daemons: a handler that blocks for ever does not keep the interpreter from exiting.
    """

    def __init__(self, threads: int, queue_limit: int | None = None, name: str = "dynwire-handler") -> None:
        self.threads = threads
        self.queue_limit = threads * QUEUE_PER_THREAD if queue_limit is None else queue_limit
        self._name = name
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queue: collections.deque[_Job] = collections.deque()
        self._alive: set[threading.Thread] = set()
        self._idle = 0
        self._number = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        """Jobs that no thread has taken yet."""
        return len(self._queue)

    def submit(self, job: _Job) -> None:
        """Queue a job. Raises `RefusedByPool` if the queue is full, `ManagerClosed` after `close`."""
        with self._lock:
            if self._closed:
                raise ManagerClosed("the threads for blocking handlers are closed")
            depth = len(self._queue)
            free = self._idle + self.threads - len(self._alive)
            if depth >= self.queue_limit + free:
                raise RefusedByPool(
                    f"{depth} requests wait for the {self.threads} threads that run blocking handlers, the limit is "
                    f"{self.queue_limit} (more threads: DYNWIRE_HANDLER_THREADS)",
                    depth=depth,
                    limit=self.queue_limit,
                )
            self._queue.append(job)
            if self._idle > depth:
                self._work.notify()
            elif len(self._alive) < self.threads:
                self._number += 1
                thread = threading.Thread(target=self._run, name=f"{self._name}-{self._number}", daemon=True)
                self._alive.add(thread)
                thread.start()

    def abandon(self, job: _Job) -> None:
        """Forget a job that nobody waits for; one that runs already is not interrupted."""
        with self._lock:
            job.abandoned = True
            if job in self._queue:
                self._queue.remove(job)

    def _next(self) -> _Job | None:
        with self._lock:
            while not self._queue:
                if self._closed:
                    break
                self._idle += 1
                try:
                    worked = self._work.wait(IDLE_THREAD_S)
                finally:
                    self._idle -= 1
                if not worked and not self._queue:
                    break
            if self._queue:
                return self._queue.popleft()
            self._alive.discard(threading.current_thread())
            return None

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if job.abandoned:
                continue
            try:
                result = job.context.run(job.function)
            except BaseException as error:  # noqa: BLE001  # user code: whatever it raises belongs to whoever waits for it
                job.failed(error)
            else:
                job.finished(result)
            # The frame would keep the last request and its reply alive while the thread waits for the next one.
            del job
            result = None

    async def run(self, function: Callable[[], Any]) -> Any:
        """Run ``function()`` in a pool thread with the caller's context variables.

        Cancelling gives up waiting; the thread is not interrupted (handlers look at ``context.is_killed()``).
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def deliver(setter: Callable[[Any], None], value: Any) -> None:
            if not future.done():
                setter(value)

        def finished(result: Any) -> None:
            _from_thread(loop, deliver, future.set_result, result)

        def failed(error: BaseException) -> None:
            if isinstance(error, StopIteration):  # a future cannot carry it: it would end the coroutine silently
                translated = RuntimeError("the handler raised StopIteration")
                translated.__cause__ = error
                error = translated
            _from_thread(loop, deliver, future.set_exception, error)

        job = _Job(function, finished, failed)
        self.submit(job)
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(job)
            raise

    def close(self) -> None:
        """Drop what is queued and let idle threads end. Handlers that run are not waited for. May be called twice."""
        with self._lock:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._work.notify_all()
            idle = [] if threading.current_thread() in self._alive else list(self._alive)
        for job in dropped:
            job.failed(ManagerClosed("the manager was closed before a thread was free for the request", sent="no"))
        for thread in idle:
            # Only for threads that are about to end; one that is stuck in a handler must not delay us.
            thread.join(0.05)


def _from_thread(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


class _ItemQueue:
    """Carries a blocking generator's items to the event loop: bounded, in batches, closed from either side."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed = threading.Condition()
        self._items: list[Any] = []
        self._bytes = 0
        self._ended = False
        self._error: BaseException | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    # In the pool thread

    def put(self, item: Any) -> bool:
        """Wait for room and add an item; False if the consumer is gone."""
        size = len(item) if isinstance(item, (bytes, bytearray)) else item.nbytes if isinstance(item, memoryview) else 0
        with self._changed:
            while self._items and not self._closed and (len(self._items) >= BATCH_ITEMS or self._bytes + size > BATCH_BYTES):
                self._changed.wait()
            if self._closed:
                return False
            self._items.append(item)
            self._bytes += size
            first = len(self._items) == 1
        if first:
            _from_thread(self._loop, self._wake)
        return True

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended = True
            self._error = error
        _from_thread(self._loop, self._wake)

    # On the loop

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Any]:
        """All items that are there, at least one; an empty list at the end. Raises what the generator raised."""
        while True:
            with self._changed:
                if self._items:
                    items, self._items, self._bytes = self._items, [], 0
                    self._changed.notify()
                    return items
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return []
                self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def close(self) -> None:
        """The consumer is gone: the generator is closed at its next item."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


async def _items_of(executor: HandlerExecutor, make: Callable[[], Generator[Any, Any, Any]]) -> AsyncGenerator[Any, None]:
    """The items of a blocking generator that one pool thread creates and drives from its first line to its last.

    One thread for all items: generators hold locks, database sessions and thread-local modes across ``yield``.
    """
    queue = _ItemQueue(asyncio.get_running_loop())

    def drive() -> None:
        generator = make()
        try:
            for item in generator:
                if not queue.put(item):
                    break
        finally:
            generator.close()

    job = _Job(drive, lambda _result: queue.end(None), queue.end)
    executor.submit(job)
    try:
        while items := await queue.take():
            for item in items:
                yield item
    finally:
        queue.close()
        executor.abandon(job)


# Looking at a handler ----------------------------------------------------------------------------------------------------------


def _target(function: Callable[..., Any]) -> Callable[..., Any]:
    """What decides about the kind: the function inside partials, or the ``__call__`` of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isfunction(function) or inspect.ismethod(function) or inspect.isbuiltin(function) or inspect.isclass(function):
        return function
    call = getattr(function, "__call__", None)  # noqa: B004  # not the question whether, but which one
    return _target(call) if inspect.ismethod(call) else function


def _context_style(function: Callable[..., Any], name: str) -> str:
    """``"none"``, ``"positional"`` or ``"keyword"``: how the handler wants its context. Raises `ConfigError`."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some builtins have none
        return "none"
    positional = []
    style = "none"
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(parameter)
        elif parameter.kind == parameter.VAR_POSITIONAL:
            style = "positional"
        elif parameter.kind == parameter.KEYWORD_ONLY and parameter.name in ("context", "ctx"):
            style = parameter.name
        elif parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise _bad_signature(name, signature)
    if sum(p.default is p.empty for p in positional) > 2 or (not positional and style != "positional"):
        raise _bad_signature(name, signature)
    if len(positional) >= 2:
        second = positional[1]
        # A second parameter with a default is the handler's own option, unless it says that it is the context.
        if second.default is second.empty or second.name in ("context", "ctx") or second.annotation in (Context, "Context"):
            return "positional"
        return style if style in ("context", "ctx") else "none"
    return style


def _bad_signature(name: str, signature: inspect.Signature) -> ConfigError:
    return ConfigError(
        f"the handler {name}{signature} cannot be called with (request) or (request, context)",
        name="handler",
        value=f"{name}{signature}",
        allowed="(request) or (request, context)",
    )


def prepare(
    function: Callable[..., Any],
    executor: Callable[[], HandlerExecutor] | HandlerExecutor,
    *,
    request_type: Any = None,
    codec: str = "msgpack",
    max_in_flight: int = 65536,
    name: str | None = None,
) -> Handler:
    """Make a handler uniform for the planes.

    ``executor`` runs plain functions and generators; given as a function it is called when the first of them is prepared.
    The signature is looked at here, once. Raises `ConfigError` for something that cannot be a handler.
    """
    check_codec(codec)
    if not callable(function):
        raise ConfigError(
            f"a handler must be callable, got {type(function).__name__}",
            name="handler",
            value=repr(function),
            allowed="a callable",
        )
    if max_in_flight < 1:
        raise ConfigError(
            f"max_in_flight is {max_in_flight}; allowed is 1 or more", name="max_in_flight", value=max_in_flight, allowed=">= 1"
        )
    target = _target(function)
    shown = name or getattr(target, "__qualname__", None) or type(function).__name__
    style = _context_style(function, shown)
    takes_context = style != "none"
    call = function
    if style in ("context", "ctx"):
        keyword = style

        def call(request: Any, context: Context) -> Any:
            return function(request, **{keyword: context})

    streaming = inspect.isasyncgenfunction(target) or inspect.isgeneratorfunction(target)
    if not (inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target)):
        pool = executor if isinstance(executor, HandlerExecutor) else executor()
        call = _blocking_stream(call, takes_context, pool) if streaming else _blocking_call(call, takes_context, pool, shown)
        takes_context = True
    return Handler(call, streaming, takes_context, request_type, codec, max_in_flight, shown)


def _blocking_call(call: Callable[..., Any], takes_context: bool, pool: HandlerExecutor, name: str) -> Callable[..., Any]:
    async def run_in_thread(request: Any, context: Context) -> Any:
        result = await pool.run(functools.partial(call, request, context) if takes_context else functools.partial(call, request))
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError(f"the handler {name} is a plain function that returned a coroutine; declare it with async def")
        if inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError(f"the handler {name} is a plain function that returned a generator; it must yield itself")
        return result

    return run_in_thread


def _blocking_stream(call: Callable[..., Any], takes_context: bool, pool: HandlerExecutor) -> Callable[..., Any]:
    def run_in_thread(request: Any, context: Context) -> AsyncGenerator[Any, None]:
        return _items_of(pool, functools.partial(call, request, context) if takes_context else functools.partial(call, request))

    return run_in_thread
