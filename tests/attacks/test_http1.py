"""Attacks over HTTP/1.1 on the same port."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from .conftest import Connection, Server

StartServer = Callable[..., Server]

POST = b"POST /v1/rpc/a/t/%s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
SMUGGLED = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"


def post(name: bytes = b"echo", *lines: bytes, body: bytes = b"") -> bytes:
    return POST % name + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


@pytest.mark.parametrize(
    "data",
    [
        post(b"echo", b"content-length: 4", b"transfer-encoding: chunked", body=b"0\r\n\r\n"),
        post(b"echo", b"transfer-encoding: chunked", b"content-length: 5", body=b"0\r\n\r\n"),
        post(b"echo", b"content-length: 0", b"content-length: 5"),
        post(b"echo", b"content-length: +0"),
        post(b"echo", b"content-length: 0, 5"),
        post(b"echo", b"content-length: -1"),
        post(b"echo", b"transfer-encoding: xchunked"),
        post(b"echo", b"transfer-encoding: chunked, identity"),
        post(b"echo", b"content-length : 0"),
        post(b"echo", b"x: a\rcontent-length: 0"),
        post(b"echo", b"x: a\ncontent-length: 0"),
        post(b"echo", b"x: a", b" folded: 1", b"content-length: 0"),
        post(b"echo", b"x: a\x00b", b"content-length: 0"),
        post(b"echo", b"host: elsewhere", b"content-length: 0"),
        post(b"echo", b"transfer-encoding: chunked", body=b"0x0\r\n\r\n"),
        post(b"echo", b"transfer-encoding: chunked", body=b"1\r\nab\r\n0\r\n\r\n"),
        post(b"echo", b"content-length: 0").replace(b"HTTP/1.1", b"HTTP/2.0"),
        post(b"echo", b"transfer-encoding: chunked", body=b"0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(b"echo", b"content-length: 0").replace(b" /v1", b"  /v1"),
        post(b"echo", b"content-length: 0").replace(b" HTTP", b"\tHTTP"),
    ],
    ids=repr,
)
def test_smuggling(server: Server, data: bytes) -> None:
    """Whatever two parties may read in two ways is refused, and what comes behind it is not taken for a request."""
    attacker = server.attacker(handshake=False)
    attacker.send(data + SMUGGLED)
    attacker.until_closed()
    assert attacker.raw.count(b"HTTP/1.1 ") <= 1
    assert b"HTTP/1.1 2" not in attacker.raw
    assert b'"live"' not in attacker.raw
    server.check()


def test_a_request_behind_another_is_answered_on_its_own(server: Server) -> None:
    """That the smuggled request would be seen, if it were taken."""
    attacker = server.attacker(handshake=False)
    attacker.send(post(b"echo", b"content-length: 0") + SMUGGLED)
    attacker.until(lambda: attacker.raw.count(b"HTTP/1.1 200") == 2)
    server.check()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"x" * 8192 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", b"414"),
        (b"GET /" + b"x" * 1_000_000, b"414"),
        (b"GET /live HTTP/1.1\r\nhost: localhost\r\n" + b"x-field: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /live HTTP/1.1\r\nhost: localhost\r\nx-field: " + b"y" * 1_000_000, b"431"),
        (b"GET /live HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", b"400"),
        (b"GET /live HTTP/1.1\r\n\r\n", b"400"),
        (post(b"size", b"content-length: 99999999999"), b"413"),
        (post(b"size", b"transfer-encoding: chunked", body=b"fffffffffffffff\r\n" + bytes(1_100_000)), b"4"),
    ],
    ids=["URL", "URL without end", "fields", "field without end", "two hosts", "no host", "length", "chunk"],
)
def test_too_much(start_server: StartServer, data: bytes, status: bytes) -> None:
    server = start_server("tcp_max_message_size=1000000")
    attacker = server.attacker(handshake=False)
    attacker.send(data)
    attacker.until(lambda: b"\r\n\r\n" in attacker.raw)
    assert attacker.raw.startswith(b"HTTP/1.1 " + status), attacker.raw[:200]
    attacker.until_closed()
    server.check()


HEADS = {
    "half a request line": b"GET /live HT",
    "half a head": b"GET /live HTTP/1.1\r\nhost: localhost\r\n",
    "a body that nobody wants": b"GET /live HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n12345",
}


@pytest.mark.parametrize("kind", HEADS)
def test_slowloris(start_server: StartServer, kind: str) -> None:
    server = start_server("--handshake_s=0.5")
    attackers = [server.attacker(handshake=False) for _ in range(20)]
    for attacker in attackers:
        attacker.send(HEADS[kind])
    server.victim.call()
    for attacker in attackers:
        attacker.until_closed()
    server.check()


def test_a_head_that_never_ends(start_server: StartServer) -> None:
    """A field now and then gives no more time; nor does a complete request before it."""
    server = start_server("--handshake_s=0.5")
    attacker = server.attacker(handshake=False)
    attacker.send(SMUGGLED)
    attacker.until(lambda: attacker.raw.count(b"HTTP/1.1 200") == 1)
    started = time.monotonic()
    attacker.send(b"GET /live HTTP/1.1\r\nhost: localhost\r\n")
    while not attacker.closed and time.monotonic() < started + 20:
        attacker.send(b"x-field: y\r\n")
        server.victim.call()
        time.sleep(0.05)  # the attacker's pace
        attacker.take()
    assert attacker.closed
    server.check()


def test_an_idle_connection_is_kept(start_server: StartServer) -> None:
    """Between requests nothing is due."""
    server = start_server("--handshake_s=0.3")
    with Connection(server.port) as other:
        for count in (1, 2):
            other.send(SMUGGLED)
            other.until(lambda count=count: other.raw.count(b"HTTP/1.1 200") == count)  # type: ignore[misc]
            with Connection(server.port) as silent:  # closed at the same bound, so that has passed
                silent.send(b"GET")
                silent.until_closed()


def test_pipelining_flood(server: Server) -> None:
    """Requests behind one that is not answered: 64 KiB of them are kept, then the connection ends."""
    attacker = server.attacker(handshake=False)
    server.flood(attacker, [post(b"wait", b"content-length: 0"), *[SMUGGLED] * 400_000])
    attacker.until_closed()
    assert attacker.raw == b""
    server.check()


def test_pipelined_requests_are_served(server: Server) -> None:
    attacker = server.attacker(handshake=False)
    server.flood(attacker, [SMUGGLED] * 500)
    attacker.until(lambda: attacker.raw.count(b"HTTP/1.1 200") == 500)
    server.check()


def test_a_reader_that_does_not_read(start_server: StartServer) -> None:
    server = start_server("--stall_s=1")
    attackers = [server.attacker(handshake=False) for _ in range(5)]
    for attacker in attackers:
        attacker.send(post(b"endless", b"accept: application/x-ndjson", b"content-length: 0"))
    server.victim.call()
    deadline = time.monotonic() + 20
    descriptors = server.descriptors()
    while server.descriptors() > descriptors - 5 and time.monotonic() < deadline:
        server.victim.call()
        time.sleep(0.05)
    assert server.descriptors() == descriptors - 5, "the server still waits for them to read"
    server.check()
