"""Goaway as the asyncio client sees it: the one rule of the wire that needs a driver to be tested."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from dynwire._frames import EventConnection
from dynwire._tcpio import AsyncClientConnection, AsyncSocketChannel, RequestOptions
from dynwire.errors import PeerLost

from . import oracle as o
from . import pair


class Target:
    path = "a.b.c"
    address = "server:1"


class Connected:
    """A client connection whose peer is a codec in this test's hands."""

    def __init__(self, **limits: int) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.loop = asyncio.get_running_loop()
        options = RequestOptions(accept_timeout=30.0)
        self.client = AsyncClientConnection(self.loop, ours, Target.address, options)
        self.server = EventConnection(False, **limits)
        self.channel: Any = AsyncSocketChannel(Target(), self, options, self.loop)

    def best(self) -> AsyncClientConnection:
        return self.client

    async def __aenter__(self) -> Connected:
        waiter = self.loop.create_future()
        self.client.handshake(waiter, software="test", connection_id=pair.CLIENT_ID, token=None)
        await self.receive(1)
        self.server.start(software="test")
        await self.send(self.server.output())
        await waiter
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.client.close()
        self.sock.close()
        pair.close(self.server)

    async def receive(self, events: int) -> None:
        found: list[Any] = []
        while len(found) < events:
            found += self.server.receive(await self.loop.sock_recv(self.sock, 65536))

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)


async def test_requests_after_the_last_one_taken_may_be_repeated() -> None:
    async with Connected() as c:
        first, second = c.channel.call(b"1"), c.channel.call(b"2")
        await c.receive(2)
        await c.send(o.encode(o.Frame(o.GOAWAY, 0, 0, 0, 1, b"bye"), o.item(0, b"answer", last=True)))
        with pytest.raises(PeerLost, match="bye") as caught:
            await second
        assert caught.value.sent == "no"
        assert bytes(await first) == b"answer"


async def test_a_refusal_of_a_request_that_crossed_the_goaway() -> None:
    """`AsyncServerConnection.on_request` answers with ERROR while draining; that must not end the requests that go on."""
    async with Connected() as c:
        first, second = c.channel.call(b"1"), c.channel.call(b"2")
        await c.receive(2)
        c.server.send_error(1, 0, b"\x82\xa1c\xaaoverloaded\xa1m\xa1x")
        c.server.send_item(0, b"answer", last=True)
        await c.send(o.encode(o.Frame(o.GOAWAY, 0, 0, 0, 1, b"bye")) + c.server.output())
        with pytest.raises(PeerLost):
            await second
        assert bytes(await first) == b"answer"


async def test_waiting_requests_are_not_sent_after_a_goaway() -> None:
    async with Connected(max_streams=1) as c:
        first, second = c.channel.call(b"1"), c.channel.call(b"2")  # the second waits for the only stream
        await c.receive(1)
        await c.send(o.encode(o.Frame(o.GOAWAY, 0, 0, 0, 0, b"bye")))
        with pytest.raises(PeerLost):
            await first
        refused = second.done()
        second.cancel()
        assert refused
