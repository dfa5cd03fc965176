from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import msgspec
import pytest

import dynwire
from dynwire import Context, Payload, current_context

from .conftest import Managers
from .faces import Signal

PATH = "test.worker.run"


async def echo(request: Any) -> Any:
    return request


class Point(msgspec.Struct):
    x: int
    y: int = 0


@pytest.mark.parametrize("payload", [None, 1, "text", [1, 2.5, None], {"a": {"b": [True]}}, "ü" * 1000])
@pytest.mark.parametrize("codec", ["msgpack", "json"])
async def test_objects_come_back_equal(managers: Managers, payload: object, codec: str) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH, codec=codec)
        assert await client.call(payload) == payload


@pytest.mark.parametrize("size", [0, 1, 104, 105, 65536, 1 << 20])
async def test_bytes_travel_raw(managers: Managers, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        for payload in (data, bytearray(data), memoryview(data), Payload(data)):
            reply = await client.call(payload)
            assert isinstance(reply, Payload)
            assert len(reply) == size
            assert reply == data
        assert await client.call(data, reply_type=bytes) == data


async def test_payloads_are_read_only_and_outlive_the_call(managers: Managers) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        reply = await client.call(b"x" * 100_000)
        view = memoryview(reply)
        assert view.readonly
        del reply
        await client.call(b"y" * 100_000)
        gc.collect()
        assert view == b"x" * 100_000
    assert bytes(view[:3]) == b"xxx"
    view.release()


async def test_the_sender_may_reuse_its_buffer(managers: Managers) -> None:
    kept: list[Payload] = []

    async def keep(request: Payload) -> int:
        kept.append(request)
        return len(request)

    async with managers() as manager:
        await manager.serve(PATH, keep)
        client = await manager.client(PATH)
        buffer = bytearray(b"before")
        assert await client.call(buffer) == 6
        buffer[:] = b"after!"
        assert kept[0] == b"before"
    kept.clear()


async def test_typed_requests_and_replies(managers: Managers) -> None:
    seen: list[object] = []

    async def mirror(request: Point) -> Point:
        seen.append(request)
        return Point(request.y, request.x)

    async with managers() as manager:
        await manager.serve(PATH, mirror, request_type=Point)
        client = await manager.client(PATH)
        assert await client.call(Point(1, 2), reply_type=Point) == Point(2, 1)
        assert await client.call({"x": 5}) == {"x": 0, "y": 5}
        assert seen == [Point(1, 2), Point(5, 0)]
        with pytest.raises(dynwire.DecodeError) as caught:
            await client.call({"x": "five"})
        assert not caught.value.retryable
        with pytest.raises(dynwire.DecodeError):
            await client.call({"x": 1}, reply_type=list[int])
        assert len(seen) == 3  # the request that did not match never reached the handler


async def test_raw_requests_with_object_replies(managers: Managers) -> None:
    async def size(request: Payload) -> dict[str, int]:
        return {"size": len(request)}

    async with managers() as manager:
        await manager.serve(PATH, size, codec="json")
        client = await manager.client(PATH)
        assert await client.call(b"1234") == {"size": 4}


def plain(request: Any) -> Any:
    return [request, current_context() is not None]


class Callable_:
    async def __call__(self, request: Any, context: Context) -> Any:
        return [request, context is current_context()]


@pytest.mark.parametrize("handler", [plain, Callable_(), Callable_().__call__], ids=["plain", "object", "method"])
async def test_kinds_of_handlers(managers: Managers, handler: Any) -> None:
    async with managers() as manager:
        await manager.serve(PATH, handler)
        client = await manager.client(PATH)
        assert await client.call(5) == [5, True]


@pytest.mark.parametrize("kind", ["coroutine", "plain", "generator", "async generator"])
async def test_errors_of_handlers(managers: Managers, kind: str) -> None:
    async def coroutine(request: Any) -> Any:
        raise KeyError("not there")

    def function(request: Any) -> Any:
        raise KeyError("not there")

    def generator(request: Any) -> Any:
        yield 1
        raise KeyError("not there")

    async def async_generator(request: Any) -> Any:
        yield 1
        raise KeyError("not there")

    handlers = {"coroutine": coroutine, "plain": function, "generator": generator, "async generator": async_generator}
    async with managers() as manager:
        await manager.serve(PATH, handlers[kind])
        client = await manager.client(PATH)
        items = []
        with pytest.raises(dynwire.RemoteError) as caught:
            async with client.stream(1) as stream:
                async for item in stream:
                    items.append(item)
        assert items == ([1] if "generator" in kind else [])
        assert caught.value.type_name == "KeyError"
        assert caught.value.message == "'not there'"
        assert caught.value.sent == "yes"
        assert not caught.value.retryable
        assert "Traceback" not in str(caught.value.to_dict())
        with pytest.raises(dynwire.RemoteError):
            await client.call(1)


@pytest.mark.not_queued("requests wait for the first worker")
async def test_unknown_endpoint(managers: Managers) -> None:
    async with managers() as manager:
        client = await manager.client(PATH, wait=0)
        with pytest.raises(dynwire.NoInstances) as caught:
            await client.call(1)
        assert caught.value.endpoint == PATH
        assert caught.value.sent == "no"
        with pytest.raises(dynwire.NoInstances):
            await client.items(1)
        with pytest.raises(dynwire.NoInstances) as caught:
            await client.wait_for_instances(1, timeout=0.01)
        assert "0.01 s" in str(caught.value)


async def test_the_deadline_ends_a_call_and_its_handler(managers: Managers) -> None:
    ended = Signal()
    deadlines = []

    async def never(request: Any, context: Context) -> None:
        deadlines.append(context.deadline)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    async with managers() as manager:
        await manager.serve(PATH, never)
        client = await manager.client(PATH)
        before = time.monotonic()
        with pytest.raises(dynwire.DeadlineExceeded) as caught:
            await client.call(1, timeout=0.1)
        assert caught.value.phase == "total"
        assert caught.value.sent == "yes" or caught.value.sent == "maybe"
        await ended.wait()
        assert deadlines[0] == pytest.approx(before + 0.1, abs=5.0)


@pytest.mark.parametrize("phase", ["first_item", "between_items"])
async def test_phases_have_deadlines_of_their_own(managers: Managers, phase: str) -> None:
    ended = Signal()

    async def stalls(request: Any) -> Any:
        try:
            if phase == "between_items":
                yield 1
            await asyncio.get_running_loop().create_future()
            yield 2
        finally:
            ended.set()

    async with managers() as manager:
        await manager.serve(PATH, stalls)
        client = await manager.client(PATH)
        with pytest.raises(dynwire.DeadlineExceeded) as caught:
            await client.items(1, timeout=dynwire.Timeouts(**{phase: 0.05}))
        assert caught.value.phase == phase
        assert caught.value.timeout == 0.05
        await ended.wait()


async def test_a_reader_that_comes_back_late_waits_no_longer(managers: Managers) -> None:
    """The gap is timed from when it waits, and nothing else happens on the connection then that would look at the time."""

    async def stalls(request: Any) -> Any:
        yield 1
        await asyncio.get_running_loop().create_future()

    quiet = ("tcp_keepalive_interval", "tcp_request_timeout", "http_keep_alive_interval")
    async with managers(**dict.fromkeys(quiet, 3600.0)) as manager:
        await manager.serve(PATH, stalls)
        client = await manager.client(PATH)
        async with client.stream(1, timeout=dynwire.Timeouts(between_items=0.05)) as stream:
            assert await stream.next() == 1
            await asyncio.sleep(0.01)
            with pytest.raises(dynwire.DeadlineExceeded) as caught:
                await stream.next()
        assert caught.value.phase == "between_items"


async def test_the_default_timeout_is_a_setting(managers: Managers) -> None:
    async def never(request: Any) -> None:
        await asyncio.get_running_loop().create_future()

    async with managers(default_timeout=0.05) as manager:
        await manager.serve(PATH, never)
        client = await manager.client(PATH)
        with pytest.raises(dynwire.DeadlineExceeded):
            await client.call(1, timeout=None)


@pytest.mark.not_queued("every request has a deadline, the age of the queue")
async def test_nested_calls_inherit_deadline_and_trace(managers: Managers) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with managers() as manager:

        async def inner(request: Any, context: Context) -> Any:
            return [context.deadline is not None, context.headers.get("traceparent"), context.headers.get("x-own")]

        async def outer(request: Any) -> Any:
            inner_client = await manager.client("test.worker.inner")
            return [
                await inner_client.call(1, timeout=None),
                await inner_client.call(1, timeout=None, headers={"X-Own": "yes"}),
                await inner_client.call(1, timeout=None, context=Context()),
                await inner_client.call(1, timeout=None, deadline=None),
                await inner_client.items(1, timeout=None),
            ]

        await manager.serve("test.worker.inner", inner)
        await manager.serve("test.worker.outer", outer)
        client = await manager.client("test.worker.outer")
        replies = await client.call(1, headers={"Traceparent": trace, "x-own": "outer only"})
        assert replies[:3] == [[True, trace, None], [True, trace, "yes"], [True, trace, None]]
        assert replies[3] == [False, None, None]
        assert replies[4] == [[True, trace, None]]


async def test_the_context_of_a_call(managers: Managers) -> None:
    async def describe(request: Any, context: Context) -> Any:
        return [context.id, context.headers, context.time_remaining() is not None]

    async with managers() as manager:
        await manager.serve(PATH, describe)
        client = await manager.client(PATH)
        context = Context(id="mine", headers={"A": "b"}, timeout=30)
        request_id, headers, limited = await client.call(1, context=context)
        assert (request_id, headers["a"], limited) == ("mine", "b", True)
        with pytest.raises(dynwire.ConfigError):
            await client.call(1, context=Context(), headers={"a": "b"})


async def test_one_reply_item_exactly(managers: Managers) -> None:
    async def some(request: int) -> Any:
        for i in range(request):
            yield i

    async with managers() as manager:
        await manager.serve(PATH, some)
        client = await manager.client(PATH)
        assert await client.call(1) == 0
        for count in (0, 2):
            with pytest.raises(dynwire.ProtocolError, match="stream"):
                await client.call(count)


async def test_replies_that_no_codec_knows(managers: Managers) -> None:
    async def odd(request: Any) -> Any:
        return object()

    async with managers() as manager:
        await manager.serve(PATH, odd)
        client = await manager.client(PATH)
        with pytest.raises(dynwire.DecodeError) as caught:
            await client.call(1)
        assert caught.value.sent == "yes"
        with pytest.raises(dynwire.DecodeError) as caught:
            await client.call(object())
        assert caught.value.sent == "no"


async def test_many_calls_at_once(managers: Managers) -> None:
    async def later(request: int) -> int:
        await asyncio.sleep(0)
        return request + 1

    async with managers() as manager:
        await manager.serve(PATH, later)
        client = await manager.client(PATH)
        replies = await asyncio.gather(*(client.call(i) for i in range(200)))
        assert replies == list(range(1, 201))
