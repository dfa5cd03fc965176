"""The types that users see. Checked by mypy, never run: see test_typing.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, assert_type

import msgspec

import dynwire


class Answer(msgspec.Struct):
    text: str


async def unary(request: dict[str, str]) -> Answer:
    return Answer(request["question"])


async def streaming(request: bytes, context: dynwire.Context) -> AsyncIterator[int]:
    assert_type(context.id, str | None)
    assert_type(context.deadline, float | None)
    assert_type(context.time_remaining(), float | None)
    assert_type(context.headers, dict[str, str])
    assert_type(context.is_stopped(), bool)
    assert_type(context.is_killed(), bool)
    assert_type(await context.stopped(), None)
    yield len(request)


def blocking(request: bytes, context: dynwire.Context) -> Iterator[bytes]:
    assert_type(context.wait_stopped(timeout=1.0), bool)
    yield request


async def async_face() -> None:
    async with dynwire.AsyncNetworkManager() as manager:
        assert_type(manager, dynwire.AsyncNetworkManager)
        endpoint = manager.endpoint("demo.worker.generate")
        assert_type(endpoint, dynwire.AsyncEndpoint)
        service = await endpoint.serve(unary)
        assert_type(service, dynwire.AsyncService)
        await endpoint.serve(streaming, request_type=bytes, metadata={"model": "m"}, max_in_flight=8)
        client = await endpoint.client(router="round_robin")
        assert_type(client, dynwire.AsyncClient)
        assert_type(await client.wait_for_instances(1, timeout=5.0), tuple[dynwire.Instance, ...])
        assert_type(await client.call(b"payload", timeout=5.0), Any)
        assert_type(await client.call({"question": "?"}, timeout=dynwire.Timeouts(total=5.0, connect=1.0)), Any)
        assert_type(await client.call({"question": "?"}, reply_type=Answer), Answer)
        async with client.stream(b"payload", headers={"traceparent": "00"}, deadline=None) as stream:
            assert_type(stream, dynwire.AsyncReplyStream)
            assert_type(stream.context, dynwire.Context)
            async for item in stream:
                assert_type(item, Any)
        assert_type(await service.drain(grace=30.0), int)
        assert_type(await client.close(), None)
        assert_type(await manager.list_instances(), tuple[dynwire.Instance, ...])
    assert_type(dynwire.get_async_manager(), dynwire.AsyncNetworkManager)


def blocking_face() -> None:
    with dynwire.NetworkManager(request_plane="nats") as manager:
        assert_type(manager, dynwire.NetworkManager)
        endpoint = manager.endpoint(dynwire.EndpointId("demo", "worker", "generate"))
        assert_type(endpoint, dynwire.Endpoint)
        assert_type(endpoint.serve(blocking), dynwire.Service)
        client = endpoint.client()
        assert_type(client, dynwire.Client)
        assert_type(client.call(b"payload"), Any)
        assert_type(client.call(b"payload", reply_type=Answer), Answer)
        with client.stream(b"payload") as stream:
            assert_type(stream, dynwire.ReplyStream)
            for item in stream:
                assert_type(item, Any)
    assert_type(dynwire.get_manager(), dynwire.NetworkManager)


def payloads(payload: dynwire.Payload) -> None:
    assert_type(len(payload), int)
    assert_type(bytes(payload), bytes)
    assert_type(memoryview(payload), "memoryview[int]")
    assert_type(payload.release(), None)
    with payload as same:
        assert_type(same, dynwire.Payload)


def errors(error: dynwire.DynwireError, too_large: dynwire.MessageTooLarge, lost: dynwire.PeerLost) -> None:
    assert_type(error.code, str)
    assert_type(error.sent, Literal["no", "maybe", "yes"])
    assert_type(error.phase, str)
    assert_type(error.peer, str | None)
    assert_type(error.retryable, bool)
    assert_type(error.request_id, str | None)
    assert_type(error.details, dict[str, Any])
    assert_type((too_large.size, too_large.limit, too_large.setting), tuple[int, int, str])
    assert_type(lost.delivered, int)


def context_of_a_call() -> None:
    context = dynwire.Context(id="mine", headers={"tracestate": "a=b"}, timeout=3.0)
    assert_type(context.stop(), None)
    assert_type(context.kill(), None)
    assert_type(dynwire.current_context(), dynwire.Context | None)


def wrong() -> None:
    """Each ignore is needed, or mypy complains about it."""
    dynwire.Context("positional")  # type: ignore[call-arg]
    dynwire.Context(id="a").deadline = 3.0  # type: ignore[misc]
    dynwire.Timeouts(totl=3.0)  # type: ignore[call-arg]
    dynwire.NetworkManager().endpoint(3)  # type: ignore[arg-type]
