"""Requests of people and tools, byte by byte: deadlines, uploads, HTTP/1.1 connections, request ids and traces."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynwire import Context
from tests.plane.faces import PATIENCE_S, Manager, Signal, eventually

from . import frames as f
from .live import ENGINES, ONE_LOOP, PATH, h1, managing, raw_client

pytestmark = [pytest.mark.usefixtures("discovery_dir"), ONE_LOOP]

POST = b"POST /v1/rpc/test/http/live HTTP/1.1\r\nhost: x\r\n"
CLOSE = b"connection: close\r\n"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def echo(request: Any) -> Any:
    return request


async def never(request: Any) -> None:
    await asyncio.get_running_loop().create_future()


async def address_of(manager: Manager, handler: Any = echo) -> str:
    return (await manager.serve(PATH, handler)).instance.address


def responses(data: bytes) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """Status, fields and body of every reply in a row, all with content-length or without a body."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (text.partition(b":") for text in lines)}
        size = int(fields.get(b"content-length", b"0"))
        found.append((int(line.split()[1]), fields, data[:size].rstrip(b"\n")))  # JSON ends its line, for terminals
        data = data[size:]
    return found


# Deadlines and uploads -------------------------------------------------------------------------------------------------------


@ENGINES
async def test_deadline_of_a_raw_request(engine: str) -> None:
    ended = Signal()

    async def handler(request: Any) -> None:
        try:
            await never(request)
        finally:
            ended.set()

    async with managing(http_engine=engine) as manager:
        address = await address_of(manager, handler)
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, (b"x-request-timeout-ms", b"50"), (b"x-request-id", b"late"))
            status, _, body = await raw.reply(1)
            assert status == 504
            problem = json.loads(body)
            assert (problem["code"], problem["status"], problem["instance"]) == ("deadline_exceeded", 504, "late")
            await ended.wait()
        (reply,) = responses(await h1(address, POST + CLOSE + b"x-request-timeout-ms: 50\r\ncontent-length: 1\r\n\r\n1"))
        assert (reply[0], json.loads(reply[2])["code"]) == (504, "deadline_exceeded")


@ENGINES
async def test_an_upload_that_stops_arriving(engine: str) -> None:
    async with managing(http_engine=engine) as manager:
        address = await address_of(manager)
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, (b"x-request-timeout-ms", b"50"), (b"content-length", b"10"), body=None)
            raw.send(f.data(1, b"12345"))
            status, _, body = await raw.reply(1)
            assert status == 408
            assert "10 bytes only 5 arrived" in json.loads(body)["detail"]
            assert manager.real.server().stats()[0]["body_bytes"] == 0
            raw.post(3)
            assert (await raw.reply(3))[0] == 200, "the connection goes on"
        (reply,) = responses(await h1(address, POST + b"x-request-timeout-ms: 50\r\ncontent-length: 10\r\n\r\n12345"))
        assert (reply[0], reply[1][b"connection"]) == (408, b"close")


@ENGINES
async def test_a_body_over_the_limit(engine: str) -> None:
    """413 before it has been read: by its content-length, and without one as soon as the limit is passed."""
    async with managing(http_engine=engine, tcp_max_message_size=1000) as manager:
        address = await address_of(manager)
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, (b"content-length", b"1001"), body=None)
            status, _, body = await raw.reply(1)
            assert (status, json.loads(body)["size"], json.loads(body)["limit"]) == (413, 1001, 1000)
            assert "DYN_TCP_MAX_MESSAGE_SIZE" in json.loads(body)["detail"]
            raw.post(3, body=None)
            raw.send(f.data(3, bytes(900)), f.data(3, bytes(101)))
            assert (await raw.reply(3))[0] == 413
            raw.send(f.data(3, bytes(900)))  # it was under way when the answer came
            raw.post(5, body=b'"%b"' % (b"1" * 998))
            assert (await raw.reply(5))[0] == 200
            assert manager.real.server().stats()[0]["body_bytes"] == 0
        (reply,) = responses(await h1(address, POST + b"content-length: 1001\r\n\r\n" + bytes(500)))
        assert (reply[0], reply[1][b"connection"]) == (413, b"close")
        (reply,) = responses(await h1(address, POST + b"transfer-encoding: chunked\r\n\r\n3e9\r\n" + bytes(1001)))
        assert reply[0] == 413


@ENGINES
async def test_many_uploads_stay_within_the_budget(engine: str) -> None:
    """Of 1 MiB uploads that do not end, a connection holds 64 MiB and one of the largest size; one more is refused."""
    mib = 1 << 20
    async with managing(http_engine=engine, tcp_max_message_size=2 * mib) as manager:
        address = await address_of(manager)
        async with raw_client(address) as raw:
            await raw.greet()
            held = 0
            for number in range(80):
                stream = 2 * number + 1
                raw.post(stream, (b"content-length", str(mib).encode()), body=None)
                raw.send(*(f.data(stream, bytes(mib // 8)) for _ in range(7)))
                await raw.writer.drain()
            raw.send(f.ping(b"--all---"))
            seen = await raw.until(lambda frame: frame.type == f.PING and frame.payload == b"--all---")
            assert seen.ack
            held = manager.real.server().stats()[0]["body_bytes"]
            assert 60 * mib < held <= 66 * mib
            refused = [stream for stream, lists in raw.fields.items() if lists[0][b":status"] == b"429"]
            assert 80 - 75 <= len(refused) <= 80 - 64
            assert raw.fields[refused[0]][0][b"retry-after"] == b"1"
            open_ones = [2 * number + 1 for number in range(80) if 2 * number + 1 not in refused]
            for stream in open_ones:
                raw.send(f.rst_stream(stream))
            await eventually(lambda: manager.real.server().stats()[0]["body_bytes"] == 0)
            raw.post(1001)
            assert (await raw.reply(1001))[0] == 200


# Methods ---------------------------------------------------------------------------------------------------------------------


@ENGINES
async def test_head_and_options(engine: str) -> None:
    async with managing(http_engine=engine) as manager:
        address = await address_of(manager)
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, path="/live", method=b"GET", body=b"")
            status, fields, body = await raw.reply(1)
            assert status == 200
            raw.post(3, path="/live", method=b"HEAD", body=b"")
            assert await raw.reply(3) == (200, {**fields}, b"")
            assert int(fields[b"content-length"]) in (len(body), len(body) + 1)
            raw.post(5, method=b"OPTIONS", body=b"")
            status, fields, body = await raw.reply(5)
            assert (status, fields[b"allow"]) == (405, b"POST")
            raw.post(7, method=b"HEAD", body=b"")
            status, fields, body = await raw.reply(7)
            assert (status, fields[b"allow"], body) == (405, b"POST", b"")
        answers = await h1(address, b"HEAD /live HTTP/1.1\r\nhost: x\r\n\r\nGET /live HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")
        head, _, rest = answers.partition(b"\r\n\r\n")
        (reply,) = responses(rest)
        assert reply[0] == 200
        assert b"content-length: " + reply[1][b"content-length"] in head.lower()


# HTTP/1.1 connections --------------------------------------------------------------------------------------------------------


async def test_pipelining_and_keep_alive() -> None:
    async with managing() as manager:
        address = await address_of(manager)
        requests = b"".join(POST + b"content-length: 1\r\n\r\n%d" % number for number in range(9))
        last = POST + CLOSE + b"content-length: 1\r\n\r\n9"
        found = responses(await h1(address, requests + last))
        assert [(status, body) for status, _, body in found] == [(200, b"%d" % number) for number in range(10)]
        assert [fields.get(b"connection") for _, fields, _ in found] == [None] * 9 + [b"close"]


async def test_pipelined_behind_a_handler_that_waits() -> None:
    """Replies keep their order; the second request runs when the first one is answered."""
    release, ran = Signal(), []

    async def handler(request: int) -> int:
        ran.append(request)
        if request == 1:
            await release.wait()
        return request

    async with managing() as manager:
        address = await address_of(manager, handler)
        async with raw_client(address) as raw:
            raw.send(POST + b"content-length: 1\r\n\r\n1" + POST + CLOSE + b"content-length: 1\r\n\r\n2")
            await eventually(lambda: ran == [1])
            release.set()
            async with asyncio.timeout(PATIENCE_S):
                found = responses(await raw.reader.read())
        assert [body for _, _, body in found] == [b"1", b"2"]


@pytest.mark.parametrize("size", [10, 100_000])
async def test_connection_close(size: int) -> None:
    """The server closes after the reply, and the reply arrives also at a client that goes on sending."""
    async with managing() as manager:
        address = await address_of(manager)
        body = json.dumps("x" * size).encode()
        async with raw_client(address) as raw:
            raw.send(POST + CLOSE + b"content-length: %d\r\n\r\n%s" % (len(body), body))
            raw.send(b"and more that nobody wants" * 100)
            async with asyncio.timeout(PATIENCE_S):
                (reply,) = responses(await raw.reader.read())
            assert (reply[0], reply[2]) == (200, body)
            raw.send(b"still more")
        await eventually(lambda: manager.real.server().stats() == [])


async def test_http_1_0() -> None:
    async with managing() as manager:
        address = await address_of(manager)
        (reply,) = responses(await h1(address, b"GET /live HTTP/1.0\r\n\r\n"))
        assert reply[0] == 200


async def test_errors_of_the_protocol_close() -> None:
    async with managing() as manager:
        address = await address_of(manager)
        both = b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1"
        for data, status in ((POST + both, 400), (b"GET /live HTTP/1.1\r\nhost: x\r\nx: \x01\r\n\r\n", 400)):
            (reply,) = responses(await h1(address, data + b"x" * 100000))
            assert (reply[0], reply[1][b"connection"]) == (status, b"close")
            assert reply[1][b"content-type"] == b"application/problem+json"


async def test_expect_100_continue() -> None:
    async with managing(tcp_max_message_size=1000) as manager:
        address = await address_of(manager)
        expect = b"expect: 100-continue\r\n"
        async with raw_client(address) as raw, asyncio.timeout(PATIENCE_S):
            raw.send(POST + CLOSE + expect + b"content-length: 5\r\n\r\n")
            assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
            raw.send(b"12345")
            (reply,) = responses(await raw.reader.read())
            assert (reply[0], reply[2]) == (200, b"12345")
        # what is refused by its head is refused without asking for the body
        (reply,) = responses(await h1(address, POST + expect + b"content-length: 5000\r\n\r\n"))
        assert reply[0] == 413


# Ids and traces --------------------------------------------------------------------------------------------------------------


@ENGINES
async def test_request_id_in_every_response(engine: str) -> None:
    async def handler(request: Any, context: Context) -> Any:
        if request == "fail":
            raise ValueError("no")
        return context.id

    async with managing(http_engine=engine) as manager:
        address = await address_of(manager, handler)
        async with raw_client(address) as raw:
            await raw.greet()
            for stream, body, status in ((1, b'"ok"', 200), (3, b'"fail"', 500), (5, b"{no json", 400)):
                raw.post(stream, (b"x-request-id", b"id-%d" % stream), body=body)
                found, fields, answer = await raw.reply(stream)
                assert (found, fields[b"x-request-id"]) == (status, b"id-%d" % stream)
            raw.post(7, (b"x-request-id", b"id-7"), path="test.http.nobody")
            assert (await raw.reply(7))[1][b"x-request-id"] == b"id-7"
            raw.post(9, body=b"1")
            _, fields, answer = await raw.reply(9)
            assert json.loads(answer) == fields[b"x-request-id"].decode(), "the server chooses one"
            raw.post(11, (b"x-request-id", b"id-11"), path="/nowhere")
            assert (await raw.reply(11))[1][b"x-request-id"] == b"id-11"
            raw.post(13, (b"x-request-id", b"id-13"), path="/live", method=b"GET", body=b"")
            assert (await raw.reply(13))[1][b"x-request-id"] == b"id-13"
            raw.post(15, (b"x-request-id", b"id-15"), (b"accept", b"text/event-stream"))
            assert (await raw.reply(15))[1][b"x-request-id"] == b"id-15"


@ENGINES
async def test_traceparent_reaches_the_handler_and_nested_calls(engine: str) -> None:
    inner_headers: list[dict[str, str]] = []

    async def inner(request: Any, context: Context) -> None:
        inner_headers.append(dict(context.headers))

    async with managing(http_engine=engine) as manager:
        await manager.serve("test.http.inner", inner)
        client = await manager.real.endpoint("test.http.inner").client()
        await client.wait_for_instances()

        async def outer(request: Any, context: Context) -> dict[str, str]:
            await client.call(1, timeout=PATIENCE_S)
            return dict(context.headers)

        address = await address_of(manager, outer)
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, (b"traceparent", TRACE.encode()), (b"tracestate", b"a=1"), (b"x-own", b"mine"))
            status, _, body = await raw.reply(1)
            assert (status, json.loads(body)) == (200, {"traceparent": TRACE, "tracestate": "a=1", "x-own": "mine"})
            assert inner_headers == [{"traceparent": TRACE, "tracestate": "a=1"}]
            raw.post(3, (b"traceparent", b"00-zz-zz-01"), (b"tracestate", b"a=1"))
            status, _, body = await raw.reply(3)
            assert (status, json.loads(body)) == (200, {}), "a bad one is ignored, never an error"


@ENGINES
async def test_stream_shapes_of_a_raw_client(engine: str) -> None:
    async def items(request: Any) -> AsyncIterator[int]:
        yield 1
        yield 2

    async with managing(http_engine=engine) as manager:
        address = await address_of(manager, items)
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, (b"accept", b"application/x-ndjson"))
            status, fields, body = await raw.reply(1)
            assert (status, fields[b"content-type"], body) == (200, b"application/x-ndjson", b"1\n2")
            raw.post(3, (b"accept", b"text/event-stream"))
            _, fields, body = await raw.reply(3)
            assert fields[b"content-type"].startswith(b"text/event-stream")
            assert re.findall(rb"^data: (\d)$", body, re.MULTILINE) == [b"1", b"2"]
