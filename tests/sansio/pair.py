"""A client and a server that hand each other bytes, and single connections in a given state."""

from __future__ import annotations

import random
from typing import Any

from dynwire._buffers import get_pool
from dynwire._frames import EventConnection
from tests.sansio import oracle as o

Event = tuple[Any, ...]
CLIENT_ID = b"\x01\x02\x03\x04\x05\x06\x07\x08"


class Pair:
    """``client`` and ``server`` after HELLO. ``to_server`` and ``to_client`` carry bytes, in random cuts if ``rng`` is given."""

    def __init__(
        self, *, client: dict[str, Any] | None = None, server: dict[str, Any] | None = None, rng: random.Random | None = None
    ):
        self.client = EventConnection(True, **(client or {}))
        self.server = EventConnection(False, **(server or {}))
        self.rng = rng
        self.sent_to_server = b""
        self.sent_to_client = b""
        self.client.start(software="test client", connection_id=CLIENT_ID)
        self.server.start(software="test server")
        self.to_server()
        self.to_client()
        self.sent_to_server = self.sent_to_client = b""

    def _carry(self, source: EventConnection, sink: EventConnection) -> tuple[bytes, list[Event]]:
        if self.rng is None:
            data = source.output()
            return data, sink.receive(data)
        data = b""
        while piece := source.output(limit=self.rng.choice((1, 15, 16, 17, 1000, 65536, 300000))):
            data += piece
        events = []
        at = 0
        while at < len(data):
            size = self.rng.choice((1, 15, 16, 17, 1000, 65536, 300000))
            events += sink.receive(data[at : at + size])
            at += size
        return data, events

    def to_server(self) -> list[Event]:
        data, events = self._carry(self.client, self.server)
        self.sent_to_server += data
        return events

    def to_client(self) -> list[Event]:
        data, events = self._carry(self.server, self.client)
        self.sent_to_client += data
        return events

    def settle(self) -> tuple[list[Event], list[Event]]:
        """Until nobody has anything to say; returns the server's events and the client's."""
        at_server: list[Event] = []
        at_client: list[Event] = []
        while True:
            before = len(self.sent_to_server) + len(self.sent_to_client)
            at_server += self.to_server()
            at_client += self.to_client()
            if len(self.sent_to_server) + len(self.sent_to_client) == before:
                return at_server, at_client


def server(hello: o.Frame | None = None, **limits: Any) -> EventConnection:
    """A server that has seen a client's HELLO."""
    conn = EventConnection(False, **limits)
    conn.receive(o.PREFACE + o.encode(hello or o.hello()))
    return conn


def client(streams: int = 0, hello: o.Frame | None = None, **limits: Any) -> EventConnection:
    """A client that has seen a server's HELLO and has made requests on streams 0, 1, …; its output so far is gone."""
    conn = EventConnection(True, **limits)
    conn.receive(o.PREFACE + o.encode(hello or o.hello()))
    for i in range(streams):
        assert conn.request("a.b.c", b"") == i
    conn.output()
    return conn


def feed(conn: EventConnection, *frames: o.Frame) -> list[Event]:
    return conn.receive(o.encode(*frames))


def frames_of(conn: EventConnection) -> list[o.Frame]:
    """What the connection has to send."""
    return list(o.parse(conn.output()))


def close(conn: EventConnection) -> None:
    """End the open streams: a connection with open streams refers to itself. Not while part of a frame has arrived (client)."""
    for sid in range(64):
        if conn.stream(sid) is not None:
            if conn.is_client:
                feed(conn, o.Frame(o.ERROR, stream=sid))
            else:
                conn.send_error(sid, 0, b"")


def in_use() -> tuple[int, int]:
    """Blocks and bytes of the process's pool that somebody holds."""
    stats = get_pool().stats()
    return stats["in_use_blocks"], stats["in_use_bytes"]
