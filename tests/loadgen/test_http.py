"""The client's reading of replies, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from dynwire.loadgen import http
from dynwire.loadgen.http import Connection, Exchange, LoadError, Target

from .server import STREAM_HEAD, chunk, chunked, error, reply, stream, whole

GONE = b"data: " + error("gone", "lost") + b"\n\n"


class Transport:
    def __init__(self) -> None:
        self.sent = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True


async def exchange_of(*parts: bytes, lost: bool = False) -> tuple[Exchange, Connection]:
    """What comes of a reply that arrives in these parts, each at its own second from 1 on."""
    connection, exchange, transport = Connection(), Exchange(0.0), Transport()
    connection.connection_made(cast(Any, transport))
    running = asyncio.ensure_future(connection.run(b"request", exchange))
    await asyncio.sleep(0)
    assert transport.sent == b"request"
    for part in parts:
        connection.data_received(part)
    if lost:
        connection.connection_lost(None)
    await running
    return exchange, connection


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock moves by one second whenever somebody looks."""
    now = iter(range(10**9))
    monkeypatch.setattr(http, "clock", lambda: float(next(now)))


async def test_a_stream_cut_at_every_offset() -> None:
    data = whole(4)
    for at in range(1, len(data)):
        exchange, connection = await exchange_of(data[:at], data[at:])
        assert (exchange.events, exchange.tokens, exchange.finish_reason) == (4, 4, "length")
        assert (exchange.prompt_tokens, exchange.cached_tokens) == (11, 8)
        assert len(exchange.gaps) + exchange.together == 3 and connection.usable


async def test_a_stream_byte_by_byte() -> None:
    exchange, _ = await exchange_of(*(bytes([byte]) for byte in whole(4)))
    assert exchange.events == 4 and len(exchange.gaps) == 3 and exchange.together == 0


async def test_times(seconds: None) -> None:
    head, contents, rest = stream(6)[0], stream(6)[1:-3], stream(6)[-3:]
    parts = [STREAM_HEAD, chunked(head), chunked(contents[0]), chunked(contents[1]) + chunked(contents[2])]
    parts += [b"".join(map(chunked, contents[3:])), b"".join(map(chunked, rest)) + b"0\r\n\r\n"]
    exchange, _ = await exchange_of(*parts)
    # sent at 0; the role alone, at 2, is no token
    assert (exchange.sent, exchange.first, exchange.last, exchange.finished) == (0.0, 3.0, 5.0, 6.0)
    assert exchange.gaps.tolist() == [1.0, 1.0] and exchange.together == 3 and exchange.events == 6


async def test_crlf_between_events_and_comments() -> None:
    events = [b": still here\n\n", *stream(3)]
    data = b"".join(chunked(event.replace(b"\n", b"\r\n")) for event in events)
    exchange, _ = await exchange_of(STREAM_HEAD + data + b"0\r\n\r\n")
    assert exchange.events == 3


async def test_events_count_as_tokens_when_nobody_says_better() -> None:
    events = b"".join(chunked(chunk(text)) for text in "abc") + chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    exchange, _ = await exchange_of(STREAM_HEAD + events)
    assert exchange.tokens == 3 and exchange.completion_tokens is None


async def test_a_body_that_ends_with_the_connection() -> None:
    exchange, connection = await exchange_of(
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"usage": {"completion_tokens": 3}}', lost=True
    )
    assert exchange.tokens == 3 and not connection.usable


@pytest.mark.parametrize(
    ("data", "lost", "kind", "text"),
    [
        (reply(error("busy", "overloaded"), "503 Service Unavailable"), False, "HTTP 503 overloaded", "busy"),
        (reply(b"<h1>no</h1>", "502 Bad Gateway"), False, "HTTP 502", "<h1>no</h1>"),
        (reply(b'{"error": "no"}', "404 Not Found"), False, "HTTP 404", "no"),
        (
            STREAM_HEAD + chunked(chunk("a") + chunk("b") + b"data: " + error("gone", "lost") + b"\n\n"),
            False,
            "in stream lost",
            "gone",
        ),
        (
            STREAM_HEAD + chunked(chunk("a")) + chunked(b"data: " + error("gone", "lost") + b"\n\n"),
            False,
            "in stream lost",
            "gone",
        ),
        (STREAM_HEAD + chunked(b"data: {oops\n\n"), False, "bad event", ""),
        (STREAM_HEAD + chunked(chunk("a")) + b"0\r\n\r\n", False, "stream without an end", "[DONE]"),
        (STREAM_HEAD + chunked(chunk("a")), True, "reply cut off", ""),
        (b"", True, "closed without a reply", ""),
        (b"SSH-2.0\r\n\r\n", False, "bad HTTP", ""),
        (reply(b"{"), False, "bad reply", ""),
    ],
)
async def test_failures(data: bytes, lost: bool, kind: str, text: str) -> None:
    parts = [data] if data else []
    with pytest.raises(LoadError) as raised:
        await exchange_of(*parts, lost=lost)
    assert raised.value.kind == kind and text in str(raised.value)


async def test_an_error_page_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_ERROR_BYTES", 1000)
    with pytest.raises(LoadError) as raised:
        await exchange_of(b"HTTP/1.1 500 No\r\ncontent-length: 100000\r\n\r\n" + bytes(2000))
    assert raised.value.kind == "reply too large"


async def test_a_connection_that_says_close_is_not_used_again() -> None:
    _, connection = await exchange_of(reply(b"{}").replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert not connection.usable


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://host:8000", "host:8000", b"/v1/models"),
        ("localhost:8000/", "localhost:8000", b"/v1/models"),
        ("https://[::1]/base/", "[::1]:443", b"/base/v1/models"),
    ],
)
def test_targets(url: str, authority: str, path: bytes) -> None:
    target = Target(url, {"authorization": "Bearer x"})
    assert target.authority == authority
    assert target.get("/v1/models").startswith(b"GET " + path + b" HTTP/1.1\r\nhost: " + authority.encode())
    assert b"\r\nauthorization: Bearer x\r\n" in target.post("/", b"{}")


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_wrong_targets(url: str) -> None:
    with pytest.raises(ValueError):
        Target(url)
    with pytest.raises(ValueError, match="line break"):
        Target("http://host", {"a": "b\r\nc: d"})
