"""Connections of the native HTTP/2 engine in known situations, and what they say, as frames. Frames: tests/http2/frames.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

Event = tuple[Any, ...]
Field = tuple[bytes, bytes]

GET: list[Field] = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"localhost"), (b":path", b"/")]
POST: list[Field] = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"localhost"), (b":path", b"/echo")]
HEAD: list[Field] = [(b":method", b"HEAD"), *GET[1:]]
OK: list[Field] = [(b":status", b"200")]
TRAILERS: list[Field] = [(b"x-checksum", b"1234")]

GET_BLOCK, POST_BLOCK, HEAD_BLOCK, OK_BLOCK = map(f.block, (GET, POST, HEAD, OK))


def server(*peer_settings: tuple[int, int], **limits: int | bool) -> Http2Connection:
    """Greeted, greetings taken from its output."""
    conn = Http2Connection("server", **limits)
    conn.start(0.0)
    conn.receive(f.PREFACE + f.settings(*peer_settings) + f.SETTINGS_ACK)
    conn.output()
    return conn


def client(*peer_settings: tuple[int, int], **limits: int) -> Http2Connection:
    conn = Http2Connection("client", **limits)
    conn.start(0.0)
    conn.receive(f.settings(*peer_settings) + f.SETTINGS_ACK)
    conn.output()
    return conn


def frames(conn: Http2Connection) -> list[f.Frame]:
    """Everything that the connection wants to send now."""
    return list(f.FrameReader().feed(conn.output()))


def data_frames(conn: Http2Connection) -> list[f.Frame]:
    return [frame for frame in frames(conn) if frame.type == f.DATA]


def error(conn: Http2Connection, *pieces: bytes, now: float = 0.0) -> tuple[int, str]:
    """Code and text of the connection error that the bytes cause; it has been told to the peer."""
    events = conn.receive(b"".join(pieces), now)
    assert events and events[-1][0] == "error", f"no connection error: {events}"
    last = frames(conn)[-1]
    assert last.type == f.GOAWAY and last.code == events[-1][1]
    assert conn.dead and conn.receive(f.ping()) == []
    return events[-1][1], events[-1][2]


def resets(conn: Http2Connection) -> list[tuple[int, int]]:
    """``(stream, code)`` of every RST_STREAM that the connection wants to send."""
    return [(frame.stream, frame.code) for frame in frames(conn) if frame.type == f.RST_STREAM]


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring pieces of a body put together: how a body is cut is not part of what it means."""
    out: list[Event] = []
    for event in events:
        if event[0] == "data" and out and out[-1][:2] == event[:2] and not out[-1][3]:
            event = ("data", event[1], out[-1][2] + event[2], event[3])
            out.pop()
        out.append(event)
    return out


def opened(conn: Http2Connection, fields: list[Field] = POST, end: bool = False) -> int:
    """(client) A stream whose request has been sent."""
    sid = conn.open_stream()
    assert sid is not None
    conn.send_headers(sid, fields, end)
    conn.output()
    return sid


def exchange(a: Http2Connection, b: Http2Connection) -> tuple[list[Event], list[Event]]:
    """Carry bytes both ways until both are silent; returns what each has seen."""
    seen: tuple[list[Event], list[Event]] = ([], [])
    while True:
        to_b, to_a = a.output(), b.output()
        if not to_a and not to_b:
            return seen
        seen[1].extend(b.receive(to_b))
        seen[0].extend(a.receive(to_a))
