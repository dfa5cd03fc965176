"""HTTP/1.1 on the http plane: order of replies, requests that come before their turn, and how a connection ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from .conftest import Managers
from .faces import PATIENCE_S, Manager, Signal, eventually

pytestmark = [pytest.mark.planes("http"), pytest.mark.faces("async")]
PATH = "test.worker.h1"
ROUTE = b"/v1/rpc/test/worker/h1"
LIVE = b"GET /live HTTP/1.1\r\nhost: a\r\n\r\n"


def post(body: bytes, path: bytes = ROUTE, method: bytes = b"POST") -> bytes:
    return b"%s %s HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (method, path, len(body), body)


async def echo(request: Any) -> Any:
    await asyncio.sleep(0)
    return request


class Raw:
    """A connection that says what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def replies(self, count: int) -> list[tuple[int, bytes]]:
        """The next replies: status and body."""
        found = []
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(count):
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                found.append((int(head[9:12]), await self.reader.readexactly(length)))
        return found

    async def rest(self) -> bytes:
        """Everything up to the end, which the server has to make."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()


async def talk(service: Any, *requests: bytes) -> Raw:
    address = service.instance.address.split("/")[2]
    host, _, port = address.rpartition(":")
    raw = Raw(*await asyncio.open_connection(host, int(port)))
    for request in requests:
        raw.writer.write(request)
    return raw


def server_of(manager: Manager) -> Any:
    (runtime,) = manager.real._runtimes.values()  # type: ignore[union-attr]
    return runtime._server


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\nno colon here\r\n\r\n", b"400"),
        (b"GET /live HTTP/1.1\r\nhost: a\r\n folded: yes\r\n\r\n", b"400"),
        (b"GET /live HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", b"431"),
        (b"POST %s HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n" % ROUTE, b"400"),
        (b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n", b"404"),
        (b"GET /live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", b"200"),
        (b"GET /live HTTP/1.0\r\n\r\n", b"200"),
    ],
    ids=["header", "folded", "long", "chunk", "unfinished", "close", "http/1.0"],
)
async def test_the_last_reply_ends_the_connection(managers: Managers, request_: bytes, status: bytes) -> None:
    async with managers() as manager:
        service = await manager.serve(PATH, echo)
        raw = await talk(service, request_)
        reply = await raw.rest()
        assert reply.startswith(b"HTTP/1.1 " + status), reply[:200]
        raw.writer.close()
        await eventually(lambda: not server_of(manager).stats())


async def test_a_body_that_breaks_off_frees_its_stream(managers: Managers) -> None:
    async with managers() as manager:
        service = await manager.serve(PATH, echo)
        head = b"POST %s HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3e8\r\n" % ROUTE
        raw = await talk(service, head + b"x" * 500)
        await eventually(lambda: server_of(manager).stats() and server_of(manager).stats()[0]["body_bytes"] == 500)
        raw.writer.write(b"x" * 500 + b"not a chunk\r\n")
        assert (await raw.rest()).startswith(b"HTTP/1.1 400")
        stats = server_of(manager).stats()
        assert [(one["streams"], one["body_bytes"]) for one in stats] == [(0, 0)]
        raw.writer.close()


async def test_many_requests_in_one_write_are_answered_in_turn(managers: Managers) -> None:
    async with managers() as manager:
        service = await manager.serve(PATH, echo)
        raw = await talk(service, LIVE * 20 + b"".join(post(b"%d" % i) for i in range(20)) + LIVE * 20)
        replies = await raw.replies(60)
        assert [body for _, body in replies[20:40]] == [b"%d\n" % i for i in range(20)]
        assert {status for status, _ in replies} == {200}
        raw.writer.close()


@pytest.mark.parametrize("refused", [post(b'"refused"', b"/nowhere"), post(b'"refused"', method=b"PUT")], ids=["404", "405"])
async def test_the_body_of_a_refused_request_is_not_that_of_the_next(managers: Managers, refused: bytes) -> None:
    begun = Signal()
    go_on = asyncio.Event()
    seen = []

    async def handler(request: Any) -> Any:
        seen.append(request)
        begun.set()
        await go_on.wait()
        return request

    async with managers() as manager:
        service = await manager.serve(PATH, handler)
        raw = await talk(service, refused + post(b'"wanted"') + post(b'"next"'))
        await begun.wait()
        go_on.set()
        replies = await raw.replies(3)
        assert [status for status, _ in replies[1:]] == [200, 200]
        assert [body for _, body in replies[1:]] == [b'"wanted"\n', b'"next"\n']
        assert seen == ["wanted", "next"]
        await eventually(lambda: server_of(manager).in_flight() == 0)
        raw.writer.close()


async def test_requests_that_come_before_their_turn_are_bounded(managers: Managers) -> None:
    """Who sends on and on while its request has not been answered is cut off, also when it is looked at between two replies."""
    go_on = asyncio.Event()

    async def handler(request: Any) -> Any:
        await go_on.wait()
        return request

    async with managers() as manager:
        service = await manager.serve(PATH, handler)
        raw = await talk(service, post(b"1") + post(b'"%s"' % (b"x" * 60_000)) * 4)
        await eventually(lambda: not server_of(manager).stats())
        go_on.set()
        await eventually(lambda: server_of(manager).in_flight() == 0)
        raw.writer.close()


async def test_closing_server_ends_the_connection_after_the_reply(managers: Managers) -> None:
    begun = Signal()
    go_on = asyncio.Event()

    async def handler(request: Any) -> Any:
        begun.set()
        await go_on.wait()
        return request

    async with managers() as manager:
        service = await manager.serve(PATH, handler)
        raw, idle = await talk(service, post(b'"last"') + post(b'"not this"')), await talk(service, LIVE)
        await idle.replies(1)
        await begun.wait()
        server = server_of(manager)
        closing = asyncio.create_task(manager.close(PATIENCE_S))
        await eventually(lambda: server.entries[PATH].draining)
        go_on.set()
        assert [body for _, body in await raw.replies(1)] == [b'"last"\n']
        assert b"200" not in await raw.rest()
        assert await idle.rest() == b""
        await closing
        raw.writer.close()
        idle.writer.close()
