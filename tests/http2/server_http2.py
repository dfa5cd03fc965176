"""What a server has to refuse and how: h2spec's section "http2" in numbers and order (RFC 7540 numbering of sections)."""

from __future__ import annotations

from collections.abc import Callable

from . import frames as f
from .peer import Case, Peer, Section

CASES: list[Case] = []


def section(number: str, rfc: str = "") -> Section:
    return Section(CASES, f"http2/{number}", f"RFC 9113 {rfc or number}")


DUMMY = f.literal(b"x-dummy0", b"x" * 99)


def is_connection_error(code: int, *pieces: bytes) -> Callable[[Peer], None]:
    def run(p: Peer) -> None:
        p.handshake_and_hold()
        p.send(*pieces)
        p.connection_error(code)

    return run


def malformed(*extra: f.Field, drop: bytes = b"", replace: dict[bytes, bytes] | None = None) -> Callable[[Peer], None]:
    """A GET with wrong fields is a stream error of type PROTOCOL_ERROR (RFC 9113 section 8.1.1)."""

    def run(p: Peer) -> None:
        p.handshake_and_hold()
        fields = [(name, (replace or {}).get(name, value)) for name, value in p.fields() if name != drop]
        p.send(f.headers(1, f.block([*fields, *extra]), end=True))
        p.stream_error(1, f.PROTOCOL_ERROR)

    return run


# --- 3.5 preface ----------------------------------------------------------------------------------------------------------

s = section("3.5", "3.4")


@s("The server answers a valid preface with SETTINGS as its first frame.")
def _(p: Peer) -> None:
    p.send(f.PREFACE, f.settings())
    first = p.until("a frame", lambda frame: True)
    assert first.type == f.SETTINGS and not first.ack, f"the first frame has to be SETTINGS; the endpoint sent {p.story()}"


@s("An invalid preface ends the connection.")
def _(p: Peer) -> None:
    p.send(b"INVALID CONNECTION PREFACE\r\n\r\n")
    p.until_closed()
    assert all(frame.type != f.GOAWAY or frame.code == f.PROTOCOL_ERROR for frame in p.seen), p.story()


# --- 4 frames -------------------------------------------------------------------------------------------------------------

s = section("4.1")


@s("A frame of unknown type is ignored.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(0x16, 0, 0, bytes(8)))
    p.alive()


@s("Undefined flags are ignored.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(f.PING, 0x16, 0, b"h2-flags"))
    frame = p.until("PING(ACK)", lambda frame: frame.type == f.PING)
    assert frame.ack and frame.payload == b"h2-flags", p.story()


@s("The reserved bit of the stream identifier is ignored.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(f.PING, 0, 0x80000000, b"h2-rsrvd"))
    frame = p.until("PING(ACK)", lambda frame: frame.type == f.PING)
    assert frame.ack and frame.payload == b"h2-rsrvd", p.story()


s = section("4.2")


@s("A DATA frame of 2^14 bytes is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"x" * 16384, end=True))
    p.response()


@s("A DATA frame longer than MAX_FRAME_SIZE is an error FRAME_SIZE_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"x" * (p.settings.get(f.MAX_FRAME_SIZE, 16384) + 1), end=True))
    p.either_error(1, f.FRAME_SIZE_ERROR)


@s("A HEADERS frame longer than MAX_FRAME_SIZE is a connection error FRAME_SIZE_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    filler = f.literal(b"x-dummy0", b"x" * (p.settings.get(f.MAX_FRAME_SIZE, 16384) + 1))
    p.send(f.headers(1, f.block(p.fields()) + filler, end=True))
    p.connection_error(f.FRAME_SIZE_ERROR)


s = section("4.3")
s.add(
    "A header block that does not decode is a connection error COMPRESSION_ERROR.",
    is_connection_error(f.COMPRESSION_ERROR, f.headers(1, b"\x40", end=True)),
)


def _interrupted_by(piece: Callable[[Peer], bytes]) -> Callable[[Peer], None]:
    def run(p: Peer) -> None:
        p.handshake()
        p.send(f.headers(1, f.block(p.fields()), end_headers=False), piece(p), f.continuation(1, DUMMY))
        p.connection_error(f.PROTOCOL_ERROR)

    return run


s.add("A PRIORITY frame inside of a header block is a connection error PROTOCOL_ERROR.", _interrupted_by(lambda p: f.priority(1)))
s.add(
    "A HEADERS frame of another stream inside of a header block is a connection error PROTOCOL_ERROR.",
    _interrupted_by(lambda p: p.get(3)),
)

# --- 5.1 stream states ----------------------------------------------------------------------------------------------------

s = section("5.1")
s.add("idle: DATA is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.data(1, b"test", end=True)))
s.add("idle: RST_STREAM is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.rst_stream(1)))
s.add("idle: WINDOW_UPDATE is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.window_update(1, 100)))
s.add("idle: CONTINUATION is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.continuation(1, DUMMY)))


@s("half-closed (remote): DATA is a stream error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.data(1, b"test", end=True))
    p.stream_error(1, f.STREAM_CLOSED)


@s("half-closed (remote): HEADERS is a stream error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), p.get())
    p.stream_error(1, f.STREAM_CLOSED)


@s("half-closed (remote): CONTINUATION is a connection error PROTOCOL_ERROR or a STREAM_CLOSED error.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.continuation(1, f.block(p.fields())))
    p.either_error(1, f.STREAM_CLOSED, f.PROTOCOL_ERROR)


@s("closed by the peer's RST_STREAM: DATA is a stream error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.rst_stream(1), f.data(1, b"test", end=True))
    p.stream_error(1, f.STREAM_CLOSED)


@s("closed by the peer's RST_STREAM: HEADERS is a stream error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.rst_stream(1), p.get())
    p.stream_error(1, f.STREAM_CLOSED)


@s("closed by the peer's RST_STREAM: CONTINUATION is a connection error PROTOCOL_ERROR or a STREAM_CLOSED error.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.rst_stream(1), f.continuation(1, DUMMY))
    p.either_error(1, f.STREAM_CLOSED, f.PROTOCOL_ERROR)


@s("closed by END_STREAM: DATA is a connection error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.complete()
    p.send(f.data(1, b"test", end=True))
    p.connection_error(f.STREAM_CLOSED)


@s("closed by END_STREAM: HEADERS is a connection error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.complete()
    p.send(p.get())
    p.connection_error(f.STREAM_CLOSED)


@s("closed by END_STREAM: CONTINUATION is a connection error STREAM_CLOSED or PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.complete()
    p.send(f.continuation(1, DUMMY))
    p.connection_error(f.STREAM_CLOSED, f.PROTOCOL_ERROR)


s = section("5.1.1")


@s("A request on a stream with an even number is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(2))
    p.connection_error(f.PROTOCOL_ERROR)


@s("A request on a lower stream than the one before is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(5), p.get(3))
    p.connection_error(f.PROTOCOL_ERROR)


s = section("5.1.2")


@s("One stream above MAX_CONCURRENT_STREAMS is a stream error PROTOCOL_ERROR or REFUSED_STREAM.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    limit = p.settings[f.MAX_CONCURRENT_STREAMS]
    p.send(*(p.get(1 + 2 * number) for number in range(limit + 1)))
    p.stream_error(1 + 2 * limit, f.PROTOCOL_ERROR, f.REFUSED_STREAM)


# --- 5.3 priority, 5.4 errors, 5.5 extensions -----------------------------------------------------------------------------

s = section("5.3.1", "5.3.2")


@s("HEADERS of a stream that depends on itself is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.headers(1, f.block(p.fields()), end=True, priority=f.priority_fields(1, 256)))
    p.stream_error(1, f.PROTOCOL_ERROR)


@s("PRIORITY of a stream that depends on itself is an error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.priority(1, 1, 256))
    p.either_error(1, f.PROTOCOL_ERROR)


s = section("5.4.1")


@s("After a connection error the connection is closed.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(f.PING, 0, 3, bytes(8)))
    p.until_closed()


@s("A connection error is announced by GOAWAY with the last stream that was processed.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(), p.get(3))
    p.complete(3)
    p.send(f.frame(f.PING, 0, 3, bytes(8)))
    goaway = p.until("GOAWAY", lambda frame: frame.type == f.GOAWAY)
    assert (goaway.code, goaway.last_stream) == (f.PROTOCOL_ERROR, 3), p.story()


s = section("5.5")


@s("A frame of an unknown extension is ignored.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(0x16, 0, 0, b"unknown extension"))
    p.alive()


@s("A frame of an unknown extension inside of a header block is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        f.headers(1, f.block(p.fields()), end=True, end_headers=False),
        f.frame(0x16, 0, 0, b"unknown extension"),
        f.continuation(1, DUMMY),
    )
    p.connection_error(f.PROTOCOL_ERROR)


# --- 6 frame definitions --------------------------------------------------------------------------------------------------

s = section("6.1")
s.add(
    "DATA on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.data(0, b"test", end=True))
)


@s("DATA on a stream that is not open or half-closed (local) is a stream error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.headers(1, f.block(p.fields(b"POST")), end=True), f.data(1, b"test", end=True))
    p.stream_error(1, f.STREAM_CLOSED)


@s("DATA with more padding than payload is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"4")), f.frame(f.DATA, f.END_STREAM | f.PADDED, 1, b"\x06test"))
    p.connection_error(f.PROTOCOL_ERROR)


s = section("6.2")
s.add(
    "HEADERS without END_HEADERS, then PRIORITY, is a connection error PROTOCOL_ERROR.", _interrupted_by(lambda p: f.priority(1))
)
s.add(
    "HEADERS without END_HEADERS, then HEADERS of another stream, is a connection error PROTOCOL_ERROR.",
    _interrupted_by(lambda p: p.get(3)),
)


@s("HEADERS on stream 0 is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(0))
    p.connection_error(f.PROTOCOL_ERROR)


@s("HEADERS with more padding than payload is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    block = f.block(p.fields())
    p.send(f.frame(f.HEADERS, f.END_STREAM | f.END_HEADERS | f.PADDED, 1, bytes([len(block) + 2]) + block))
    p.connection_error(f.PROTOCOL_ERROR)


s = section("6.3")
s.add(
    "PRIORITY on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.priority(0, weight=256))
)


@s("PRIORITY with another length than 5 is a stream error FRAME_SIZE_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.frame(f.PRIORITY, 0, 1, b"\x80\x00\x00\x01"))
    p.stream_error(1, f.FRAME_SIZE_ERROR)


s = section("6.4")
s.add("RST_STREAM on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.rst_stream(0)))
s.add(
    "RST_STREAM on an idle stream is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.rst_stream(1))
)


@s("RST_STREAM with another length than 4 is a connection error FRAME_SIZE_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.frame(f.RST_STREAM, 0, 1, bytes(3)))
    p.connection_error(f.FRAME_SIZE_ERROR)


s = section("6.5")
s.add(
    "SETTINGS with ACK and a payload is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.SETTINGS, f.ACK, 0, b"\x00")),
)
s.add(
    "SETTINGS on a stream is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.frame(f.SETTINGS, 0, 1, b"\x00\x03\x00\x00\x00\x64")),
)
s.add(
    "SETTINGS with a length that is no multiple of 6 is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.SETTINGS, 0, 0, b"\x00\x03\x00\x00\x00\x64\x00\x02")),
)

s = section("6.5.2")
s.add(
    "ENABLE_PUSH other than 0 and 1 is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.settings((f.ENABLE_PUSH, 2))),
)
s.add(
    "INITIAL_WINDOW_SIZE above 2^31-1 is a connection error FLOW_CONTROL_ERROR.",
    is_connection_error(f.FLOW_CONTROL_ERROR, f.settings((f.INITIAL_WINDOW_SIZE, 1 << 31))),
)
s.add(
    "MAX_FRAME_SIZE below 2^14 is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.settings((f.MAX_FRAME_SIZE, 16383))),
)
s.add(
    "MAX_FRAME_SIZE above 2^24-1 is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.settings((f.MAX_FRAME_SIZE, 1 << 24))),
)


@s("An unknown parameter is ignored.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.settings((0xFF, 1)))
    p.settings_ack()
    p.alive()


s = section("6.5.3")


@s("Values of SETTINGS are applied in the order they appear.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.settings((f.INITIAL_WINDOW_SIZE, 100), (f.INITIAL_WINDOW_SIZE, 1)))
    p.settings_ack()
    p.send(p.get())
    p.data_of_length(1, 1)


@s("SETTINGS is acknowledged at once.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.settings((f.ENABLE_PUSH, 0)))
    p.settings_ack()


s = section("6.7")


@s("PING is answered with ACK and the same payload.")
def _(p: Peer) -> None:
    p.handshake()
    p.alive(b"h2 tests")


@s("PING with ACK is not answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.ping(b"invalid!", ack=True), f.ping(b"h2 tests"))
    frame = p.until("PING", lambda frame: frame.type == f.PING)
    assert frame.ack and frame.payload == b"h2 tests", p.story()


s.add(
    "PING on a stream is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.frame(f.PING, 0, 1, bytes(8))),
)
s.add(
    "PING with another length than 8 is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.ping(bytes(6))),
)

s = section("6.8")
s.add(
    "GOAWAY on a stream is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.frame(f.GOAWAY, 0, 1, bytes(8))),
)

s = section("6.9")
s.add(
    "WINDOW_UPDATE by 0 for the connection is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.window_update(0, 0)),
)


@s("WINDOW_UPDATE by 0 for a stream is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.window_update(1, 0))
    p.stream_error(1, f.PROTOCOL_ERROR)


s.add(
    "WINDOW_UPDATE with another length than 4 is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.WINDOW_UPDATE, 0, 0, b"\x00\x00\x01")),
)

s = section("6.9.1")


@s("No more DATA is sent than the window of the stream allows.")
def _(p: Peer) -> None:
    p.handshake((f.INITIAL_WINDOW_SIZE, 1))
    p.send(p.get())
    p.data_of_length(1, 1)
    p.alive()
    sent = sum(len(frame.payload) for frame in p.seen if frame.type == f.DATA)
    assert sent == 1, f"{sent} bytes for a window of 1: {p.story()}"


s.add(
    "A connection window above 2^31-1 is a connection error FLOW_CONTROL_ERROR.",
    is_connection_error(f.FLOW_CONTROL_ERROR, f.window_update(0, f.MAX_WINDOW), f.window_update(0, f.MAX_WINDOW)),
)


@s("A stream window above 2^31-1 is a stream error FLOW_CONTROL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.window_update(1, f.MAX_WINDOW), f.window_update(1, f.MAX_WINDOW))
    p.stream_error(1, f.FLOW_CONTROL_ERROR)


s = section("6.9.2")


@s("A changed INITIAL_WINDOW_SIZE changes the windows of open streams.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get())
    p.response()
    p.send(f.settings((f.INITIAL_WINDOW_SIZE, 1)))
    p.data_of_length(1, 1)


@s("A window made negative has to become positive again before DATA is sent.")
def _(p: Peer) -> None:
    p.handshake((f.INITIAL_WINDOW_SIZE, 3))
    p.send(p.get())
    p.data_of_length(1, 3)
    p.send(f.settings((f.INITIAL_WINDOW_SIZE, 2)))
    p.settings_ack()
    p.send(f.window_update(1, 1))
    p.alive()
    assert [len(frame.payload) for frame in p.seen if frame.type == f.DATA] == [3], p.story()
    p.send(f.window_update(1, 1))
    p.data_of_length(1, 1)


s.add(
    "INITIAL_WINDOW_SIZE above 2^31-1 is a connection error FLOW_CONTROL_ERROR.",
    is_connection_error(f.FLOW_CONTROL_ERROR, f.settings((f.INITIAL_WINDOW_SIZE, 1 << 31))),
)

s = section("6.10")


@s("Several CONTINUATION frames after HEADERS are accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        f.headers(1, f.block(p.fields()), end=True, end_headers=False),
        f.continuation(1, DUMMY, end_headers=False),
        f.continuation(1, DUMMY),
    )
    p.response()


@s("CONTINUATION without END_HEADERS, then another frame, is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        f.headers(1, f.block(p.fields(b"POST")), end_headers=False),
        f.continuation(1, DUMMY, end_headers=False),
        f.data(1, b"test", end=True),
    )
    p.connection_error(f.PROTOCOL_ERROR)


@s("CONTINUATION on stream 0 is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()), end=True, end_headers=False), f.continuation(0, DUMMY))
    p.connection_error(f.PROTOCOL_ERROR)


@s("CONTINUATION after HEADERS with END_HEADERS is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.continuation(1, DUMMY))
    p.connection_error(f.PROTOCOL_ERROR)


@s("CONTINUATION after CONTINUATION with END_HEADERS is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.headers(1, f.block(p.fields()), end=True, end_headers=False), f.continuation(1, DUMMY), f.continuation(1, DUMMY))
    p.connection_error(f.PROTOCOL_ERROR)


@s("CONTINUATION after DATA is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.data(1, b"test", end=True), f.continuation(1, DUMMY))
    p.connection_error(f.PROTOCOL_ERROR)


# --- 7 error codes --------------------------------------------------------------------------------------------------------

s = section("7")


@s("GOAWAY with an unknown error code triggers nothing special.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.goaway(0, 0xFF))
    p.alive_or_closed()


@s("RST_STREAM with an unknown error code triggers nothing special.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.rst_stream(1, 0xFF))
    p.alive()


# --- 8 messages -----------------------------------------------------------------------------------------------------------

s = section("8.1")


@s("Trailers without END_STREAM are a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test"), f.headers(1, f.block([(b"x-test", b"ok")])))
    p.stream_error(1, f.PROTOCOL_ERROR)


s = section("8.1.2", "8.2.1")
s.add("A field name in upper case is a stream error PROTOCOL_ERROR.", malformed((b"X-TEST", b"ok")))

s = section("8.1.2.1", "8.3")
s.add("An unknown pseudo-header field is a stream error PROTOCOL_ERROR.", malformed((b":test", b"ok")))
s.add("A pseudo-header field of responses is a stream error PROTOCOL_ERROR.", malformed((b":status", b"200")))


@s("A pseudo-header field in trailers is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test"), f.headers(1, f.block([(b":method", b"200")]), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)


@s("A pseudo-header field after a regular field is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.headers(1, f.block([(b"x-test", b"ok"), *p.fields()]), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)


s = section("8.1.2.2", "8.2.2")
s.add("A connection-specific field is a stream error PROTOCOL_ERROR.", malformed((b"connection", b"keep-alive")))
s.add("te with another value than trailers is a stream error PROTOCOL_ERROR.", malformed((b"te", b"trailers, deflate")))

s = section("8.1.2.3", "8.3.1")
s.add("An empty :path is a stream error PROTOCOL_ERROR.", malformed(replace={b":path": b""}))
s.add("A request without :method is a stream error PROTOCOL_ERROR.", malformed(drop=b":method"))
s.add("A request without :scheme is a stream error PROTOCOL_ERROR.", malformed(drop=b":scheme"))
s.add("A request without :path is a stream error PROTOCOL_ERROR.", malformed(drop=b":path"))
s.add("A second :method is a stream error PROTOCOL_ERROR.", malformed((b":method", b"GET")))
s.add("A second :scheme is a stream error PROTOCOL_ERROR.", malformed((b":scheme", b"http")))
s.add("A second :path is a stream error PROTOCOL_ERROR.", malformed((b":path", b"/")))

s = section("8.1.2.6", "8.1.1")


@s("content-length other than the DATA that follows is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"1")), f.data(1, b"test", end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)


@s("content-length other than the sum of several DATA frames is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"1")), f.data(1, b"test"), f.data(1, b"test", end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)


s = section("8.2", "8.4")


@s("PUSH_PROMISE from a client is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.push_promise(1, 3, f.block(p.fields())))
    p.connection_error(f.PROTOCOL_ERROR)
