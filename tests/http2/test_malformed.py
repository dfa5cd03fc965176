"""Malformed requests, the 29 kinds of HTTP2.md section 3 and more: refused on their stream, the connection goes on."""

from __future__ import annotations

import pytest

from . import frames as f
from .malformed import KINDS_29, MALFORMED, Malformed
from .peer import EnginePeer


def test_there_are_29_kinds() -> None:
    assert len({item.name for item in KINDS_29}) == 29
    assert len({item.name for item in MALFORMED}) == len(MALFORMED)


@pytest.mark.parametrize("kind", [f.WITHOUT_INDEXING, f.INDEXING, f.NEVER_INDEXED], ids=["plain", "indexed", "never-indexed"])
@pytest.mark.parametrize("item", MALFORMED, ids=str)
def test_refused_on_its_stream(item: Malformed, kind: int) -> None:
    """RST_STREAM PROTOCOL_ERROR, no event for the application, and the next request is served with the HPACK state intact."""
    p = EnginePeer("server", "native")
    p.handshake()
    # a field before the malformed request and one inside of it go into the dynamic table
    p.send(f.headers(1, f.block(p.fields()) + f.literal(b"x-before", b"1", f.INDEXING), end=True))
    p.complete(1)
    malformed = item.frames(3, p.fields(item.method), kind)
    p.send(*malformed)
    p.stream_error(3, f.PROTOCOL_ERROR)
    assert [event for event in p.events if event[0] == "headers" and event[1] == 3] == [] or item.body is not None
    assert [event for event in p.events if event[0] in ("error", "goaway")] == []
    # the same bytes again: with indexing the table now holds the malformed field
    p.send(*item.frames(5, p.fields(item.method), kind))
    p.stream_error(5, f.PROTOCOL_ERROR)
    added = len(item.fields(p.fields(item.method))) * 2 if kind == f.INDEXING else 0
    p.send(f.headers(7, f.block(p.fields()) + f.indexed(62 + added), end=True))
    p.response(7)
    p.complete(7)
    served = [event for event in p.events if event[0] == "headers" and event[1] == 7]
    assert [event[2][-1] for event in served] == [(b"x-before", b"1")]
    assert p.conn.live == 0


@pytest.mark.parametrize("item", [item for item in MALFORMED if item.method == b"GET" and item.extra], ids=str)
def test_indexed_malformed_field_stays_malformed(item: Malformed) -> None:
    """A bad field that is only named by its index (a list that the decoder may have cached) is refused like the literal."""
    p = EnginePeer("server", "native")
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()) + f.block(item.extra, f.INDEXING), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)
    names = b"".join(f.indexed(62 + at) for at in reversed(range(len(item.extra))))
    for stream in (3, 5):
        p.send(f.headers(stream, f.block(p.fields()) + names, end=True))
        p.stream_error(stream, f.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "field",
    [
        (b"x-test", b"a\nb"), (b"x-test", b"a\x00"), (b"x-test", b" a"), (b"X-Test", b"a"), (b"x test", b"a"), (b"", b"a"),
        (b":path", b"/"), (b"connection", b"close"), (b"transfer-encoding", b"chunked"), (b"te", b"gzip"),
    ],
    ids=repr,
)  # fmt: skip
def test_trailers(field: f.Field) -> None:
    """The rules hold for trailers as well."""
    p = EnginePeer("server", "native")
    p.handshake()
    p.send(p.post(1), f.data(1, b"test"), f.headers(1, f.block([field]), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)
    assert ("reset", 1, f.PROTOCOL_ERROR, False) in p.events
    p.send(p.get(3))
    p.response(3)


def test_every_byte_of_names_and_values() -> None:
    """Names are tokens without upper case (RFC 9113 8.2.1, RFC 9110 5.1); values have no control characters but HTAB. RFC 9113
    names NUL, CR and LF only, RFC 9110 5.5 calls the others invalid as well and lets the recipient choose."""
    token = set(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
    in_value = {9, *range(0x20, 0x7F), *range(0x80, 0x100)}
    p = EnginePeer("server", "native")
    p.handshake()
    stream = 1
    for byte in range(256):
        inner = bytes([byte])
        for field, good in (((b"x" + inner + b"y", b"v"), byte in token), ((b"x-test", b"v" + inner + b"w"), byte in in_value)):
            first = len(p.seen)
            p.send(p.get(stream, field))
            while p.read():
                pass
            refused = any(frame.type == f.RST_STREAM and frame.stream == stream for frame in p.seen[first:])
            assert refused is not good, f"{field} was {'refused' if refused else 'accepted'}"
            stream += 2
    assert p.error is None


@pytest.mark.parametrize("value", [b"trailers", b"Trailers", b"TRAILERS"])
def test_te_trailers_in_any_case(value: bytes) -> None:
    """A word of a grammar, so case does not matter (RFC 9110 section 10.1.4)."""
    p = EnginePeer("server", "native")
    p.handshake()
    p.send(p.get(1, (b"te", value)))
    p.response(1)
