from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from dynwire import ConfigError, Context, ManagerClosed, Overloaded
from dynwire.handlers import BATCH_ITEMS, HandlerExecutor, RefusedByPool, prepare
from dynwire.types import Handler

PATIENCE_S = 20.0


@pytest.fixture
def pool() -> Iterator[HandlerExecutor]:
    executor = HandlerExecutor(2)
    yield executor
    executor.close()


async def run(handler: Handler, request: Any = None, context: Context | None = None) -> Any:
    """What a plane does with a handler."""
    args = (request, context or Context()) if handler.takes_context else (request,)
    if handler.streaming:
        return [item async for item in handler.function(*args)]
    return await handler.function(*args)


async def coroutine(request: Any) -> Any:
    return ["coroutine", request]


async def coroutine_with_context(request: Any, context: Context) -> Any:
    return ["coroutine", request, context.id]


async def async_generator(request: Any) -> AsyncIterator[Any]:
    yield request
    yield request


async def async_generator_with_context(request: Any, ctx: Context) -> AsyncIterator[Any]:
    yield ctx.id


def plain(request: Any) -> Any:
    return ["plain", request]


def plain_with_context(request: Any, context: Context) -> Any:
    return ["plain", request, context.id]


def generator(request: Any) -> Iterator[Any]:
    yield request
    yield request


def generator_with_context(request: Any, context: Context) -> Iterator[Any]:
    yield context.id


class Object:
    def __call__(self, request: Any) -> Any:
        return ["object", request]

    async def method(self, request: Any, context: Context) -> Any:
        return ["method", request, context.id]

    @classmethod
    async def of_class(cls, request: Any) -> Any:
        return [cls.__name__, request]

    @staticmethod
    def static(request: Any) -> Iterator[Any]:
        yield request


class AsyncObject:
    async def __call__(self, request: Any, context: Context) -> AsyncIterator[Any]:
        yield context.id


async def three(first: str, request: Any, context: Context) -> Any:
    return [first, request, context.id]


async def with_option(request: Any, scale: int = 3) -> Any:
    return request * scale


async def with_keyword(request: Any, *, context: Context) -> Any:
    return context.id


def with_keyword_in_thread(request: Any, *, ctx: Context) -> Iterator[Any]:
    yield ctx.id


async def optional_context(request: Any, context: Context | None = None) -> Any:
    return context.id if context else None


async def anything(*args: Any) -> Any:
    return len(args)


@pytest.mark.parametrize("loop_factory", ["asyncio"], indirect=True)
@pytest.mark.parametrize(
    ("function", "streaming", "expected"),
    [
        (coroutine, False, ["coroutine", 7]),
        (coroutine_with_context, False, ["coroutine", 7, "id"]),
        (async_generator, True, [7, 7]),
        (async_generator_with_context, True, ["id"]),
        (plain, False, ["plain", 7]),
        (plain_with_context, False, ["plain", 7, "id"]),
        (generator, True, [7, 7]),
        (generator_with_context, True, ["id"]),
        (Object(), False, ["object", 7]),
        (Object().method, False, ["method", 7, "id"]),
        (Object.of_class, False, ["Object", 7]),
        (Object.static, True, [7]),
        (AsyncObject(), True, ["id"]),
        (functools.partial(three, "first"), False, ["first", 7, "id"]),
        (functools.partial(functools.partial(three, "first")), False, ["first", 7, "id"]),
        (functools.partial(AsyncObject()), True, ["id"]),
        (with_option, False, 21),
        (with_keyword, False, "id"),
        (with_keyword_in_thread, True, ["id"]),
        (optional_context, False, "id"),
        (anything, False, 2),
        (str, False, "7"),
        (lambda request: request + 1, False, 8),
    ],
)
async def test_every_kind_becomes_uniform(
    pool: HandlerExecutor, function: Callable[..., Any], streaming: bool, expected: Any
) -> None:
    handler = prepare(function, pool)
    assert handler.streaming == streaming
    assert await run(handler, 7, Context(id="id")) == expected


def test_async_functions_are_not_wrapped(pool: HandlerExecutor) -> None:
    assert prepare(coroutine, pool).function is coroutine
    assert prepare(async_generator, pool).function is async_generator


def test_the_pool_is_only_made_for_blocking_handlers() -> None:
    def never() -> HandlerExecutor:
        raise AssertionError("not needed")

    prepare(coroutine, never)
    with pytest.raises(AssertionError):
        prepare(plain, never)


@pytest.mark.parametrize(
    "function", [lambda: None, lambda a, b, c: None, lambda a, *, needed: None, "text", None], ids=["0", "3", "kw", "str", "None"]
)
def test_what_cannot_be_a_handler(pool: HandlerExecutor, function: Any) -> None:
    with pytest.raises(ConfigError):
        prepare(function, pool)


def test_wrong_options(pool: HandlerExecutor) -> None:
    with pytest.raises(ConfigError):
        prepare(coroutine, pool, max_in_flight=0)
    with pytest.raises(ConfigError):
        prepare(coroutine, pool, codec="pickle")


async def test_context_variables_come_along(pool: HandlerExecutor) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    def read(request: Any) -> str:
        return variable.get()

    def read_often(request: Any) -> Iterator[str]:
        yield variable.get()
        variable.set("the generator's own")
        yield variable.get()

    variable.set("caller's")
    assert await run(prepare(read, pool)) == "caller's"
    assert await run(prepare(read_often, pool)) == ["caller's", "the generator's own"]
    assert variable.get() == "caller's"


async def test_exceptions_come_back(pool: HandlerExecutor) -> None:
    def fail(request: Any) -> None:
        raise request

    def fail_later(request: Any) -> Iterator[int]:
        yield 1
        raise request

    for error in (KeyError("a"), SystemExit(3)):
        with pytest.raises(type(error)):
            await run(prepare(fail, pool), error)
    with pytest.raises(KeyError):
        await run(prepare(fail_later, pool), KeyError("a"))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await run(prepare(fail, pool), StopIteration(1))


async def test_plain_functions_that_should_have_been_async(pool: HandlerExecutor) -> None:
    with pytest.raises(TypeError, match="async def"):
        await run(prepare(lambda request: coroutine(request), pool))
    with pytest.raises(TypeError, match="yield"):
        await run(prepare(lambda request: generator(request), pool))


async def test_generators_run_in_one_thread(pool: HandlerExecutor) -> None:
    def idents(request: Any) -> Iterator[int]:
        for _ in range(1000):
            yield threading.get_ident()

    items = await run(prepare(idents, pool))
    assert len(items) == 1000
    assert len(set(items)) == 1
    assert items[0] != threading.get_ident()


async def test_a_generator_waits_for_its_reader(pool: HandlerExecutor) -> None:
    produced = 0
    closed = threading.Event()

    def produce(request: Any) -> Iterator[int]:
        nonlocal produced
        try:
            while True:
                produced += 1
                yield produced
        finally:
            closed.set()

    stream = prepare(produce, pool).function(None, Context())
    assert [await anext(stream) for _ in range(3)] == [1, 2, 3]
    # beside the three, one batch was taken, one is waiting, one item is in the generator's hand
    for _ in range(10):
        await asyncio.sleep(0)
        assert produced <= 3 + 2 * BATCH_ITEMS + 1
    assert [await anext(stream) for _ in range(1000)] == list(range(4, 1004))
    await stream.aclose()
    assert await asyncio.to_thread(closed.wait, PATIENCE_S)


async def test_large_items_make_small_batches(pool: HandlerExecutor) -> None:
    produced = 0

    def produce(request: Any) -> Iterator[bytes]:
        nonlocal produced
        while True:
            produced += 1
            yield bytes(700_000)

    stream = prepare(produce, pool).function(None, Context())
    await anext(stream)
    for _ in range(10):
        await asyncio.sleep(0)
        assert produced <= 4
    await stream.aclose()


async def test_a_full_queue_refuses_at_once() -> None:
    pool = HandlerExecutor(1, queue_limit=1)
    started, release = threading.Event(), threading.Event()

    def block(request: Any) -> Any:
        started.set()
        release.wait(PATIENCE_S)
        return request

    def never(request: Any) -> Iterator[int]:
        yield request

    handler = prepare(block, pool)
    first = asyncio.create_task(run(handler, 1))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    second = asyncio.create_task(run(handler, 2))
    await asyncio.sleep(0)
    for refused in (handler, prepare(never, pool)):
        with pytest.raises(RefusedByPool) as caught:
            await run(refused, 3)
        assert isinstance(caught.value, Overloaded)
        assert caught.value.depth == caught.value.limit == 1
        assert caught.value.sent == "no"
    release.set()
    assert [await first, await second] == [1, 2]
    pool.close()


async def test_cancelling_a_queued_request_prevents_it() -> None:
    pool = HandlerExecutor(1)
    started, release = threading.Event(), threading.Event()
    seen = []

    def block(request: Any) -> Any:
        seen.append(request)
        started.set()
        release.wait(PATIENCE_S)
        return request

    handler = prepare(block, pool)
    first = asyncio.create_task(run(handler, 1))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    second, third = asyncio.create_task(run(handler, 2)), asyncio.create_task(run(handler, 3))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert pool.waiting == 1
    release.set()
    assert await first == 1
    assert await third == 3
    assert seen == [1, 3]
    pool.close()


async def test_closing_the_pool_ends_what_is_queued() -> None:
    pool = HandlerExecutor(1)
    started, release = threading.Event(), threading.Event()

    def block(request: Any) -> Any:
        started.set()
        release.wait(PATIENCE_S)
        return request

    handler = prepare(block, pool)
    first = asyncio.create_task(run(handler, 1))
    assert await asyncio.to_thread(started.wait, PATIENCE_S)
    second = asyncio.create_task(run(handler, 2))
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(ManagerClosed):
        await second
    with pytest.raises(ManagerClosed):
        await run(handler, 3)
    release.set()
    assert await first == 1
    pool.close()


async def test_threads_are_bounded_and_reused() -> None:
    pool = HandlerExecutor(3)
    names = set()

    def name(request: Any) -> None:
        names.add(threading.current_thread().name)

    handler = prepare(name, pool)
    for _ in range(5):
        await asyncio.gather(*(run(handler) for _ in range(50)))
    assert 1 <= len(names) <= 3
    pool.close()


async def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynwire.handlers.IDLE_THREAD_S", 0.01)
    pool = HandlerExecutor(2)
    threads = set()

    def remember(request: Any) -> None:
        threads.add(threading.current_thread())

    handler = prepare(remember, pool)
    await run(handler)
    for thread in threads:
        await asyncio.to_thread(thread.join, PATIENCE_S)
        assert not thread.is_alive()
    await run(handler)  # a new one
    assert len(threads) == 2
    pool.close()
