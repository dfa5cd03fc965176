from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import dynwire

from .conftest import Managers
from .faces import PATIENCE_S, Signal, eventually

PATH = "test.worker.limit"


async def echo(request: Any) -> Any:
    return request


@pytest.mark.parametrize("size", [1 << 20, (16 << 20) + 1])
async def test_large_payloads(managers: Managers, plane: str, size: int) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        if plane == "nats" and size > 16 << 20:
            with pytest.raises(dynwire.MessageTooLarge, match="tcp plane"):
                await client.call(bytes(size))
            return
        data = b"0123456789abcdef" * (size // 16) + b"!" * (size % 16)
        reply = await client.call(data)
        assert reply == data
        del reply


async def test_too_large_requests_and_replies(managers: Managers) -> None:
    calls = 0

    async def grow(request: dynwire.Payload) -> bytes:
        nonlocal calls
        calls += 1
        return bytes(request) * 2

    async with managers(tcp_max_message_size=100_000) as manager:
        await manager.serve(PATH, grow)
        client = await manager.client(PATH)
        with pytest.raises(dynwire.MessageTooLarge) as caught:
            await client.call(b"x" * 100_001)
        assert caught.value.sent == "no"
        assert caught.value.limit == 100_000
        assert caught.value.setting == "DYN_TCP_MAX_MESSAGE_SIZE"
        assert caught.value.setting in str(caught.value)
        assert calls == 0
        assert len(await client.call(b"x" * 50_000)) == 100_000
        with pytest.raises(dynwire.MessageTooLarge) as caught:
            await client.call(b"x" * 50_001)
        assert caught.value.sent == "yes"
        assert len(await client.call(b"x")) == 2  # nothing else was harmed


@pytest.mark.not_queued("what exceeds the limit waits in the queue")
async def test_max_in_flight(managers: Managers) -> None:
    release = Signal()
    running = 0

    async def handler(request: Any) -> Any:
        nonlocal running
        running += 1
        await release.wait()
        return request

    async with managers() as manager:
        await manager.serve(PATH, handler, max_in_flight=2)
        client = await manager.client(PATH)
        calls = [asyncio.create_task(client.call(i)) for i in range(2)]
        await eventually(lambda: running == 2)
        with pytest.raises(dynwire.Overloaded) as caught:
            await client.call(3)
        assert caught.value.sent == "no"
        assert caught.value.retryable
        with pytest.raises(dynwire.Overloaded):
            await client.items(3)
        assert running == 2
        release.set()
        assert await asyncio.gather(*calls) == [0, 1]
        assert await client.call(4) == 4


@pytest.mark.not_queued("workers take what they can run, nobody refuses")
async def test_an_overloaded_instance_is_not_the_only_one(managers: Managers) -> None:
    release = Signal()
    running = 0

    async def handler(request: Any) -> Any:
        nonlocal running
        running += 1
        await release.wait()
        return request

    async with managers() as one, managers() as two, managers() as caller:
        await one.serve(PATH, handler, max_in_flight=1)
        await two.serve(PATH, handler, max_in_flight=1)
        client = await caller.client(PATH, wait=2)
        # Whichever instance the router prefers: the refused request goes to the other one.
        calls = [asyncio.create_task(client.call(i)) for i in range(2)]
        await eventually(lambda: running == 2)
        with pytest.raises(dynwire.Overloaded):
            await client.call(3)
        release.set()
        assert await asyncio.gather(*calls) == [0, 1]


@pytest.mark.not_queued("workers take what they can run, nobody refuses")
async def test_a_stream_that_is_refused_goes_to_another_instance(managers: Managers) -> None:
    """As a call does, although the refusal comes when the stream is open. Its context stays the same."""
    release = Signal()
    ids: list[str | None] = []

    def handler_of(name: str) -> Any:
        async def handler(request: Any, context: dynwire.Context) -> AsyncIterator[list[Any]]:
            ids.append(context.id)
            yield [name, 0]
            if request == "hold":
                await release.wait()
            yield [name, 1]

        return handler

    async with managers() as one, managers() as two, managers() as caller:
        full = await one.serve(PATH, handler_of("one"), max_in_flight=1)
        await two.serve(PATH, handler_of("two"))
        client = await caller.client(PATH, wait=2)
        async with client.stream("hold", instance=full.instance.id) as held:
            assert await held.next() == ["one", 0]
            for n in range(4):
                async with client.stream(n) as stream:
                    context = stream.context
                    assert await stream.next() == ["two", 0]
                    assert await stream.next() == ["two", 1]
                    assert stream.context is context
                    assert context.id == ids[-1]
                assert [item async for item in client.stream(n)] == [["two", 0], ["two", 1]], "without `with`"
            # an instance that was named is the only one
            with pytest.raises(dynwire.Overloaded) as caught:
                await client.items(5, instance=full.instance.id)
            assert caught.value.sent == "no"
            release.set()
            assert await held.next() == ["one", 1]
        assert len(ids) == 9


@pytest.mark.faces("async")
@pytest.mark.planes("tcp", "http", "nats")
@pytest.mark.not_queued("a queue keeps what nobody serves")
async def test_a_stream_that_is_being_opened_anew_may_be_cancelled_or_closed(managers: Managers) -> None:
    """Whoever was cancelled may come again, and gets the first item; a stream that was closed gives none."""

    async def numbers(request: int) -> AsyncIterator[int]:
        for n in range(request):
            yield n

    async with managers() as worker, managers() as caller:
        await worker.serve(PATH, numbers)
        server: Any = worker.real.server()
        client = await caller.client(PATH)
        assert await client.items(2) == [0, 1]
        entry = client.real._home.table.entries[0]
        for ends in ("cancelled", "closed"):
            handler = server.entries[PATH].handler
            await server.remove_endpoint(PATH)  # its record is still there
            await eventually(lambda: time.monotonic() >= entry.retry_at)
            async with client.stream(2) as stream:
                waiting = asyncio.create_task(stream.next())
                await eventually(lambda stream=stream: stream.real._opening._failure is not None)
                server.add_endpoint(PATH, handler)
                if ends == "cancelled":
                    waiting.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                    await eventually(lambda: time.monotonic() >= entry.retry_at)
                    assert [item async for item in stream] == [0, 1]
                else:
                    stream.close()
                    with pytest.raises(dynwire.DynwireError) as caught:
                        await waiting
                    assert isinstance(caught.value, (dynwire.Cancelled, dynwire.EndpointNotFound))


async def test_blocking_handlers_do_not_hold_up_others(managers: Managers) -> None:
    release = threading.Event()
    threads = set()

    def block(request: Any) -> Any:
        threads.add(threading.get_ident())
        release.wait(PATIENCE_S)
        return request

    async with managers(handler_threads=2) as manager:
        await manager.serve(PATH, block)
        await manager.serve("test.worker.other", echo)
        client = await manager.client(PATH)
        other = await manager.client("test.worker.other")
        calls = [asyncio.create_task(client.call(i)) for i in range(6)]
        await eventually(lambda: len(threads) == 2)
        assert await other.call(1) == 1
        release.set()
        assert await asyncio.gather(*calls) == list(range(6))
        assert len(threads) == 2


async def test_a_full_queue_before_the_threads_refuses(managers: Managers) -> None:
    release = threading.Event()
    started = 0

    def block(request: Any) -> Any:
        nonlocal started
        started += 1
        release.wait(PATIENCE_S)
        return request

    async with managers(handler_threads=1) as manager:
        await manager.serve(PATH, block)
        pool = manager.real._handler_executor()
        pool.queue_limit = 2
        client = await manager.client(PATH)
        calls = [asyncio.create_task(client.call(0))]
        await eventually(lambda: started == 1)
        calls += [asyncio.create_task(client.call(i)) for i in (1, 2)]
        await eventually(lambda: pool.waiting == 2)
        with pytest.raises(dynwire.Overloaded) as caught:
            await client.call(3)
        assert (caught.value.sent, caught.value.limit) == ("no", 2)
        release.set()
        assert await asyncio.gather(*calls) == [0, 1, 2]
        assert started == 3


async def test_a_handler_that_is_overloaded_itself_is_a_remote_error(managers: Managers) -> None:
    async def handler(request: Any) -> Any:
        raise dynwire.Overloaded("what I called was overloaded")

    async with managers() as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        with pytest.raises(dynwire.RemoteError) as caught:
            await client.call(1)
        assert caught.value.type_name == "Overloaded"
        assert caught.value.sent == "yes"


@pytest.mark.parametrize("enabled", [False, True])
async def test_tracebacks_only_if_enabled(managers: Managers, enabled: bool) -> None:
    async def handler(request: Any) -> Any:
        raise ValueError("secret")

    async with managers(remote_tracebacks=enabled) as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        with pytest.raises(dynwire.RemoteError) as caught:
            await client.call(1)
        assert ("raise ValueError" in str(caught.value.to_dict())) == enabled
