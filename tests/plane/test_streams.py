from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import dynwire
from dynwire import Context

from .conftest import Managers
from .faces import Signal, eventually

PATH = "test.worker.stream"


async def count(request: int) -> AsyncIterator[int]:
    for i in range(request):
        yield i


def count_in_thread(request: int) -> Iterator[int]:
    yield from range(request)


@pytest.mark.parametrize("handler", [count, count_in_thread], ids=["async", "thread"])
@pytest.mark.parametrize("length", [0, 1, 1000])
async def test_items_arrive_once_and_in_order(managers: Managers, handler: Any, length: int) -> None:
    async with managers() as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        assert await client.items(length) == list(range(length))
        assert [item async for item in client.stream(length)] == list(range(length))


async def test_a_unary_handler_is_a_stream_of_one(managers: Managers) -> None:
    async def echo(request: Any) -> Any:
        return request

    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        assert await client.items({"a": 1}) == [{"a": 1}]


async def test_raw_items(managers: Managers) -> None:
    async def pieces(request: dynwire.Payload) -> AsyncIterator[bytes]:
        for i in range(0, len(request), 1000):
            yield bytes(request)[i : i + 1000]

    async with managers() as manager:
        await manager.serve(PATH, pieces)
        client = await manager.client(PATH)
        data = bytes(range(256)) * 40
        items = await client.items(data)
        assert all(isinstance(item, dynwire.Payload) for item in items)
        assert b"".join(items) == data
        items.clear()


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_slow_reader_makes_the_writer_wait(managers: Managers, kind: str) -> None:
    produced = 0
    closed = Signal()

    async def produce(request: Any) -> AsyncIterator[bytes]:
        nonlocal produced
        try:
            while True:
                produced += 1
                yield b"x" * 65536
        finally:
            closed.set()

    def produce_in_thread(request: Any) -> Iterator[bytes]:
        nonlocal produced
        try:
            while True:
                produced += 1
                yield b"x" * 65536
        finally:
            closed.set()

    async with managers() as manager:
        await manager.serve(PATH, produce if kind == "async" else produce_in_thread)
        other = "test.worker.other"
        await manager.serve(other, count)
        client = await manager.client(PATH)
        busy = await manager.client(other)
        async with client.stream(1) as stream:
            for _ in range(10):
                await stream.next()
            # others are not held up by it, however long it stands still
            for _ in range(20):
                assert await busy.items(100) == list(range(100))
            # A window of 256 KiB, what the batch queue of a thread holds, and what a socket takes; on http the window may have
            # adapted to its largest, 16 MiB, because a path through a busy machine looks like a long one.
            assert produced < 400
            before = produced
            for _ in range(100):
                await stream.next()
            await eventually(lambda: produced > before)
        await closed.wait()


@pytest.mark.parametrize("kind", ["async", "thread"])
@pytest.mark.parametrize("way", ["exit", "close", "drop", "kill"])
async def test_giving_up_a_stream_ends_the_handler(managers: Managers, kind: str, way: str) -> None:
    closed = Signal()
    killed = []

    async def forever(request: Any, context: Context) -> AsyncIterator[int]:
        try:
            for i in range(1 << 40):
                yield i
                await asyncio.sleep(0)
        finally:
            killed.append(context.is_killed())
            closed.set()

    def forever_in_thread(request: Any, context: Context) -> Iterator[int]:
        try:
            yield from range(1 << 40)
        finally:
            killed.append(context.is_killed())
            closed.set()

    async with managers() as manager:
        await manager.serve(PATH, forever if kind == "async" else forever_in_thread)
        client = await manager.client(PATH)
        if way == "drop":
            stream = client.stream(1)
            await stream.__aenter__()
            assert await stream.next() == 0
            del stream
            gc.collect()
        else:
            async with client.stream(1) as stream:
                assert await stream.next() == 0
                if way == "close":
                    stream.close()
                    stream.close()
                elif way == "kill":
                    stream.context.kill()
                    with pytest.raises(dynwire.Cancelled):
                        while True:
                            await stream.next()
        await closed.wait()
        assert killed == [True]


async def test_leaving_in_the_middle_of_a_loop(managers: Managers) -> None:
    closed = Signal()

    async def forever(request: Any) -> AsyncIterator[int]:
        try:
            for i in range(1 << 40):
                yield i
        finally:
            closed.set()

    async with managers() as manager:
        await manager.serve(PATH, forever)
        client = await manager.client(PATH)
        with pytest.raises(ZeroDivisionError):
            async with client.stream(1) as stream:
                async for item in stream:
                    1 / (2 - item)
        await closed.wait()


async def test_stop_is_cooperative(managers: Managers) -> None:
    async def until_stopped(request: Any, context: Context) -> AsyncIterator[str]:
        yield "first"
        await context.stopped()
        yield "last"

    async with managers() as manager:
        await manager.serve(PATH, until_stopped)
        client = await manager.client(PATH)
        async with client.stream(1) as stream:
            assert await stream.next() == "first"
            assert not stream.context.is_stopped()
            stream.context.stop()
            assert [item async for item in stream] == ["last"]


@pytest.mark.planes("tcp", "http")
async def test_stop_of_a_request_that_waits_for_a_stream(managers: Managers) -> None:
    """It is not on the wire yet: its handler is told when it is, and nobody else's is."""
    stopped = []
    over = Signal()

    async def until_stopped(request: str, context: Context) -> AsyncIterator[str]:
        yield "begun"
        if request == "waits":
            await context.stopped()
        else:
            await over.wait()
        if context.is_stopped():
            stopped.append(request)

    async with managers(tcp_max_streams=2, http_max_concurrent_streams=2, tcp_pool_size=1) as manager:
        await manager.serve(PATH, until_stopped)
        client = await manager.client(PATH)
        async with client.stream("first") as first, client.stream("second") as second:
            assert (await first.next(), await second.next()) == ("begun", "begun")
            async with client.stream("waits") as waits:
                waits.context.stop()
                with pytest.raises(dynwire.DynwireError):
                    await client.call("refused at its own deadline", timeout=0.05)  # and what was to be written is written
                assert stopped == []
                over.set()
                assert [item async for item in waits] == ["begun"]
        assert stopped == ["waits"]


async def test_stop_reaches_a_thread(managers: Managers) -> None:
    def until_stopped(request: Any, context: Context) -> Iterator[str]:
        yield "first"
        assert context.wait_stopped(20)
        yield "last"

    async with managers() as manager:
        await manager.serve(PATH, until_stopped)
        client = await manager.client(PATH)
        async with client.stream(1) as stream:
            assert await stream.next() == "first"
            stream.context.stop()
            assert await stream.next() == "last"


@pytest.mark.parametrize("kind", ["async", "thread", "unary"])
async def test_cancelling_before_the_first_item(managers: Managers, kind: str) -> None:
    started, ended = Signal(), Signal()

    async def unary(request: Any) -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    async def stream(request: Any) -> AsyncIterator[int]:
        await unary(request)
        yield 1

    def thread(request: Any, context: Context) -> Iterator[int]:
        started.set()
        assert context.wait_stopped(20)
        assert context.is_killed()
        ended.set()
        yield 1

    handlers: dict[str, Any] = {"async": stream, "thread": thread, "unary": unary}
    async with managers() as manager:
        await manager.serve(PATH, handlers[kind])
        client = await manager.client(PATH)
        async with client.stream(1):
            await started.wait()
        await ended.wait()


@pytest.mark.faces("async")
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_cancelling_the_awaiting_task_kills_the_handler(managers: Managers, kind: str) -> None:
    started, ended = Signal(), Signal()

    async def handler(request: Any, context: Context) -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            assert context.is_killed()
            ended.set()

    def thread(request: Any, context: Context) -> None:
        started.set()
        assert context.wait_stopped(20)
        assert context.is_killed()
        ended.set()

    async with managers() as manager:
        service = await manager.serve(PATH, handler if kind == "async" else thread)
        client = await manager.client(PATH)
        task = asyncio.create_task(client.call(1))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended.wait()
        await eventually(lambda: service.real.in_flight == 0)


async def test_a_context_cancels_a_call_from_elsewhere(managers: Managers) -> None:
    started, ended = Signal(), Signal()

    async def handler(request: Any) -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    async with managers() as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        context = Context()
        task = asyncio.create_task(client.call(1, context=context))
        await started.wait()
        context.kill()
        with pytest.raises(dynwire.Cancelled):
            await task
        await ended.wait()


async def test_a_handler_may_clean_up_after_kill(managers: Managers) -> None:
    cleaned = Signal()

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    async with managers() as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        async with client.stream(1) as stream:
            await stream.next()
        await cleaned.wait()


@pytest.mark.faces("blocking")
async def test_any_thread_may_close_a_stream(managers: Managers) -> None:
    started = Signal()

    def handler(request: Any, context: Context) -> Iterator[int]:
        yield 1
        started.set()
        context.wait_stopped(20)

    async with managers() as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        async with client.stream(1) as stream:
            await stream.next()
            waiting = asyncio.create_task(stream.next())
            await started.wait()
            closer = threading.Thread(target=stream.close)
            closer.start()
            with pytest.raises(dynwire.Cancelled):
                await waiting
            closer.join()


async def test_a_stream_of_a_closed_manager(managers: Managers) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.get_running_loop().create_future()

    async with managers() as server, managers() as caller:
        await server.serve(PATH, handler)
        client = await caller.client(PATH)
        stream = client.stream(1)
        await stream.__aenter__()
        await stream.next()
        await caller.close()
        with pytest.raises(dynwire.ManagerClosed):
            await stream.next()
        with pytest.raises(dynwire.ManagerClosed):
            await client.call(1)
        with pytest.raises(dynwire.ManagerClosed):
            await client.items(1)
        with pytest.raises(dynwire.ManagerClosed):
            await caller.client(PATH)


@pytest.mark.faces("async")
@pytest.mark.planes("tcp", "http")
async def test_a_stream_whose_items_take_long_leaves_the_loop_to_others(managers: Managers) -> None:
    """What a worker is ahead of its caller does not become one long turn of the caller's loop."""
    items, turns = 1000, 0

    async def produce(request: Any) -> AsyncIterator[bytes]:
        for _ in range(items):
            yield bytes(1024)

    def turn() -> None:
        nonlocal turns
        turns += 1
        loop.call_soon(turn)

    async with managers() as manager:
        await manager.serve(PATH, produce)
        client = await manager.client(PATH)
        loop = asyncio.get_running_loop()
        seen = 0
        async for _ in client.stream(None):
            if not seen:
                turn()
            seen += 1
            time.sleep(0.0003)  # noqa: ASYNC251 - the loop's thread is meant to be busy
        assert seen == items
        assert turns > 30  # some 200; without the limit 3 to 17
