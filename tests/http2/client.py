"""What a client has to accept and refuse: the sections of h2spec's client tests, then responses (RFC 9113 section 8).

The case plays the server. The client under test has sent a GET on stream 1 unless the case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from . import frames as f
from .peer import RESPONSE, Case, EnginePeer, Section, ok

CASES: list[Case] = []

DUMMY = f.literal(b"x-dummy0", b"x" * 99)
BLOCK = f.block(RESPONSE)


def section(number: str, rfc: str = "", prefix: str = "client") -> Section:
    return Section(CASES, f"{prefix}/{number}", f"RFC 9113 {rfc or number}")


def is_connection_error(code: int, *pieces: bytes) -> Callable[[EnginePeer], None]:
    def run(p: EnginePeer) -> None:
        p.greet_and_request()
        p.send(*pieces)
        p.connection_error(code)

    return run


def is_stream_error(code: int, *pieces: bytes) -> Callable[[EnginePeer], None]:
    def run(p: EnginePeer) -> None:
        p.greet_and_request()
        p.send(*pieces)
        p.stream_error(1, code)

    return run


def is_either_error(codes: tuple[int, ...], *pieces: bytes) -> Callable[[EnginePeer], None]:
    def run(p: EnginePeer) -> None:
        p.greet_and_request()
        p.send(*pieces)
        p.either_error(1, *codes)

    return run


# --- 1 to 4 ---------------------------------------------------------------------------------------------------------------

s = section("1", "3.4")


@s("The client sends preface, SETTINGS and its request, and takes the response.")
def _(p: EnginePeer) -> None:
    sid = p.greet_and_request()
    p.send(ok(sid), f.data(sid, b"test", end=True))
    p.alive()
    p.got(("headers", 1, RESPONSE, "response", False), ("data", 1, b"test", True), ("closed", 1))


s = section("4.1")


@s("A frame of unknown type is ignored.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.frame(0x16, 0, 0, bytes(8)))
    p.alive()


@s("Undefined flags are ignored.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.frame(f.PING, 0x16, 0, b"h2-flags"))
    frame = p.until("PING(ACK)", lambda frame: frame.type == f.PING)
    assert frame.ack and frame.payload == b"h2-flags", p.story()


@s("The reserved bit of the stream identifier is ignored.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.frame(f.PING, 0, 0x80000000, b"h2-rsrvd"))
    frame = p.until("PING(ACK)", lambda frame: frame.type == f.PING)
    assert frame.ack and frame.payload == b"h2-rsrvd", p.story()


s = section("4.2")


@s("A DATA frame of 2^14 bytes is accepted.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(ok(1), f.data(1, b"x" * 16384, end=True))
    p.alive()
    assert b"".join(event[2] for event in p.events if event[0] == "data") == b"x" * 16384


@s("A DATA frame longer than MAX_FRAME_SIZE is an error FRAME_SIZE_ERROR.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(ok(1), f.data(1, b"x" * (p.settings[f.MAX_FRAME_SIZE] + 1), end=True))
    p.either_error(1, f.FRAME_SIZE_ERROR)


@s("A HEADERS frame longer than MAX_FRAME_SIZE is a connection error FRAME_SIZE_ERROR.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.headers(1, BLOCK + f.literal(b"x-dummy0", b"x" * p.settings[f.MAX_FRAME_SIZE]), end=True))
    p.connection_error(f.FRAME_SIZE_ERROR)


s = section("4.3")
s.add(
    "A header block that does not decode is a connection error COMPRESSION_ERROR.",
    is_connection_error(f.COMPRESSION_ERROR, f.headers(1, b"\x40", end=True)),
)
s.add(
    "A PRIORITY frame inside of a header block is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.headers(1, BLOCK, end_headers=False), f.priority(1), f.continuation(1, DUMMY)),
)


@s("A HEADERS frame of another stream inside of a header block is a connection error PROTOCOL_ERROR.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.request()
    p.send(f.headers(1, BLOCK, end_headers=False), ok(3), f.continuation(1, DUMMY))
    p.connection_error(f.PROTOCOL_ERROR)


# --- 5 streams ------------------------------------------------------------------------------------------------------------

s = section("5.1")
s.add("idle: DATA is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.data(2, b"test", end=True)))
s.add("idle: RST_STREAM is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.rst_stream(2)))
s.add("idle: WINDOW_UPDATE is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.window_update(2, 100)))
s.add("idle: CONTINUATION is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.continuation(2, BLOCK)))
s.add(
    "closed by the peer's RST_STREAM: DATA is a stream error STREAM_CLOSED.",
    is_stream_error(f.STREAM_CLOSED, ok(1), f.rst_stream(1), f.data(1, b"test", end=True)),
)
s.add(
    "closed by the peer's RST_STREAM: HEADERS is a stream error STREAM_CLOSED.",
    is_stream_error(f.STREAM_CLOSED, ok(1), f.rst_stream(1), ok(1, end=True)),
)
s.add(
    "closed by the peer's RST_STREAM: CONTINUATION is a connection error PROTOCOL_ERROR or a STREAM_CLOSED error.",
    is_either_error((f.STREAM_CLOSED, f.PROTOCOL_ERROR), ok(1), f.rst_stream(1), f.continuation(1, DUMMY)),
)
s.add(
    "closed by END_STREAM: DATA is a connection error STREAM_CLOSED.",
    is_connection_error(f.STREAM_CLOSED, ok(1, end=True), f.data(1, b"test", end=True)),
)
s.add(
    "closed by END_STREAM: HEADERS is a connection error STREAM_CLOSED.",
    is_connection_error(f.STREAM_CLOSED, ok(1, end=True), ok(1, end=True)),
)


@s("closed by END_STREAM: CONTINUATION is a connection error STREAM_CLOSED or PROTOCOL_ERROR.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(ok(1, end=True), f.continuation(1, DUMMY))
    p.connection_error(f.STREAM_CLOSED, f.PROTOCOL_ERROR)


s = section("5.1.1")
s.add(
    "A response on a stream that the client has not opened is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, ok(101, end=True)),
)

s = section("5.4.1")


@s("After a connection error the connection is over.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.frame(f.PING, 0, 3, bytes(8)))
    p.until_closed()
    assert p.conn.open_stream() is None


s.add(
    "A connection error is announced by GOAWAY.",
    is_connection_error(f.PROTOCOL_ERROR, f.frame(f.PING, 0, 3, bytes(8))),
)

s = section("5.5")


@s("A frame of an unknown extension is ignored.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.frame(0x16, 0xFF, 1, b"unknown extension"))
    p.alive()


s.add(
    "A frame of an unknown extension inside of a header block is a connection error PROTOCOL_ERROR.",
    is_connection_error(
        f.PROTOCOL_ERROR, f.headers(1, BLOCK, end_headers=False), f.frame(0x16, 0, 0, b"unknown"), f.continuation(1, DUMMY)
    ),
)

# --- 6 frame definitions --------------------------------------------------------------------------------------------------

s = section("6.1")
s.add(
    "DATA on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.data(0, b"test", end=True))
)


@s("DATA on a stream that is not open or half-closed (local) is a stream error STREAM_CLOSED.")
def _(p: EnginePeer) -> None:
    p.greet_and_request(b"POST", end=False)
    p.send(ok(1, end=True), f.data(1, b"test", end=True))
    p.stream_error(1, f.STREAM_CLOSED)


s.add(
    "DATA with more padding than payload is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, ok(1), f.frame(f.DATA, f.END_STREAM | f.PADDED, 1, b"\x06test")),
)

s = section("6.2")
s.add(
    "HEADERS without END_HEADERS, then PRIORITY, is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.headers(1, BLOCK, end_headers=False), f.priority(1, weight=256)),
)


@s("HEADERS without END_HEADERS, then HEADERS of another stream, is a connection error PROTOCOL_ERROR.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.request()
    p.send(f.headers(1, BLOCK, end_headers=False), ok(3))
    p.connection_error(f.PROTOCOL_ERROR)


s.add("HEADERS on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, ok(0)))
s.add(
    "HEADERS with more padding than payload is a connection error PROTOCOL_ERROR.",
    is_connection_error(
        f.PROTOCOL_ERROR,
        f.frame(f.HEADERS, f.END_STREAM | f.END_HEADERS | f.PADDED, 1, bytes([len(BLOCK) + 2]) + BLOCK),
    ),
)

s = section("6.3")
s.add("PRIORITY on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.priority(0)))
s.add(
    "PRIORITY with another length than 5 is a stream error FRAME_SIZE_ERROR.",
    is_stream_error(f.FRAME_SIZE_ERROR, f.frame(f.PRIORITY, 0, 1, b"\x80\x00\x00\x01")),
)

s = section("6.4")
s.add("RST_STREAM on stream 0 is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.rst_stream(0)))
s.add(
    "RST_STREAM on an idle stream is a connection error PROTOCOL_ERROR.", is_connection_error(f.PROTOCOL_ERROR, f.rst_stream(3))
)
s.add(
    "RST_STREAM with another length than 4 is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.RST_STREAM, 0, 1, bytes(3))),
)

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
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.SETTINGS, 0, 0, b"\x00\x03\x00")),
)

s = section("6.5.2")
s.add(
    "ENABLE_PUSH other than 0 is a connection error PROTOCOL_ERROR: a server must not send 1.",
    is_connection_error(f.PROTOCOL_ERROR, f.settings((f.ENABLE_PUSH, 1))),
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
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.settings((0xFF, 1)))
    p.settings_ack()
    p.alive()


s = section("6.5.3")


@s("SETTINGS is acknowledged at once.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.settings((f.MAX_CONCURRENT_STREAMS, 5)))
    p.settings_ack()


s = section("6.7")


@s("PING is answered with ACK and the same payload.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.alive(b"h2 tests")


@s("PING with ACK is not answered.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
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
s.add(
    "WINDOW_UPDATE by 0 for a stream is a stream error PROTOCOL_ERROR.", is_stream_error(f.PROTOCOL_ERROR, f.window_update(1, 0))
)
s.add(
    "WINDOW_UPDATE with another length than 4 is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.WINDOW_UPDATE, 0, 0, b"\x00\x00\x01")),
)

s = section("6.9.1")
s.add(
    "A connection window above 2^31-1 is a connection error FLOW_CONTROL_ERROR.",
    is_connection_error(f.FLOW_CONTROL_ERROR, f.window_update(0, f.MAX_WINDOW), f.window_update(0, f.MAX_WINDOW)),
)
s.add(
    "A stream window above 2^31-1 is a stream error FLOW_CONTROL_ERROR.",
    is_stream_error(f.FLOW_CONTROL_ERROR, ok(1), f.window_update(1, f.MAX_WINDOW), f.window_update(1, f.MAX_WINDOW)),
)

s = section("6.10")


@s("Several CONTINUATION frames after HEADERS are accepted.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(
        f.headers(1, BLOCK[:7], end=True, end_headers=False),
        f.continuation(1, BLOCK[7:] + DUMMY[:10], end_headers=False),
        f.continuation(1, DUMMY[10:]),
    )
    p.alive()
    p.got(("headers", 1, [*RESPONSE, (b"x-dummy0", b"x" * 99)], "response", True), ("closed", 1))


s.add(
    "CONTINUATION without END_HEADERS, then another frame, is a connection error PROTOCOL_ERROR.",
    is_connection_error(
        f.PROTOCOL_ERROR,
        f.headers(1, BLOCK, end_headers=False),
        f.continuation(1, DUMMY, end_headers=False),
        f.data(1, b"test", end=True),
    ),
)
s.add(
    "CONTINUATION on stream 0 is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, f.headers(1, BLOCK, end_headers=False), f.continuation(0, DUMMY)),
)
s.add(
    "CONTINUATION after HEADERS with END_HEADERS is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, ok(1), f.continuation(1, DUMMY)),
)
s.add(
    "CONTINUATION after CONTINUATION with END_HEADERS is a connection error PROTOCOL_ERROR.",
    is_connection_error(
        f.PROTOCOL_ERROR, f.headers(1, BLOCK, end_headers=False), f.continuation(1, DUMMY), f.continuation(1, DUMMY)
    ),
)
s.add(
    "CONTINUATION after DATA is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, ok(1), f.data(1, b"test"), f.continuation(1, DUMMY)),
)

# --- RFC 9113, beyond h2spec ----------------------------------------------------------------------------------------------


def more(number: str) -> Section:
    return section(number, prefix="client/rfc9113")


s = more("3.4")


@s("The server's first frame has to be SETTINGS: PING is a connection error PROTOCOL_ERROR.")
def _(p: EnginePeer) -> None:
    p.send(f.ping())
    p.connection_error(f.PROTOCOL_ERROR)


@s("The server's first frame must not be the acknowledgement of SETTINGS.")
def _(p: EnginePeer) -> None:
    p.send(f.SETTINGS_ACK)
    p.connection_error(f.PROTOCOL_ERROR)


@s("A server that speaks HTTP/1.1 is a connection error.")
def _(p: EnginePeer) -> None:
    p.request()
    p.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    p.until_closed()


@s("An acknowledgement with a payload as the first frame is a connection error FRAME_SIZE_ERROR: section 6.5 names the code.")
def _(p: EnginePeer) -> None:
    p.send(f.frame(f.SETTINGS, f.ACK, 0, b"\x00"))
    p.connection_error(f.FRAME_SIZE_ERROR)


@s("SETTINGS on a stream as the first frame is a connection error PROTOCOL_ERROR.")
def _(p: EnginePeer) -> None:
    p.send(f.frame(f.SETTINGS, 0, 1, b"\x00\x03\x00\x00\x00\x64"))
    p.connection_error(f.PROTOCOL_ERROR)


s = more("5.1.1")


@s("Requests use odd stream numbers in rising order.")
def _(p: EnginePeer) -> None:
    p.greet()
    sids = [p.request() for _ in range(5)]
    p.alive()
    assert sids == [1, 3, 5, 7, 9]
    assert [frame.stream for frame in p.seen if frame.type == f.HEADERS] == sids


s.add(
    "A response on an even stream, without a promise, is a connection error PROTOCOL_ERROR.",
    is_connection_error(f.PROTOCOL_ERROR, ok(2, end=True)),
)

s = more("5.1.2")


@s("The client opens no more streams than MAX_CONCURRENT_STREAMS, and goes on when one has ended.")
def _(p: EnginePeer) -> None:
    p.greet((f.MAX_CONCURRENT_STREAMS, 2))
    p.request()
    p.request()
    assert p.conn.open_stream() is None
    p.send(ok(1, end=True))
    assert ("capacity",) in p.events
    assert p.request() == 5


@s("A limit of 0 lets no request through until it is raised.")
def _(p: EnginePeer) -> None:
    p.greet((f.MAX_CONCURRENT_STREAMS, 0))
    assert p.conn.open_stream() is None
    p.send(f.settings((f.MAX_CONCURRENT_STREAMS, 1)))
    assert ("capacity",) in p.events
    p.request()


@s("Before the server's SETTINGS the client opens 100 streams at most.")
def _(p: EnginePeer) -> None:
    for _ in range(100):
        p.request()
    assert p.conn.open_stream() is None


s = more("6.5.2")


@s("The client announces ENABLE_PUSH 0.")
def _(p: EnginePeer) -> None:
    p.greet()
    assert p.settings[f.ENABLE_PUSH] == 0


@s("ENABLE_PUSH 0 from a server is accepted.")
def _(p: EnginePeer) -> None:
    p.greet((f.ENABLE_PUSH, 0))
    p.alive()


@s("HEADER_TABLE_SIZE 0 is obeyed: the encoder signals the change and uses no dynamic table.")
def _(p: EnginePeer) -> None:
    p.greet()
    p.request(b"GET", (b"x-test", b"one"))
    p.alive()
    p.send(f.settings((f.HEADER_TABLE_SIZE, 0)))
    p.settings_ack()
    p.decoder.max_allowed_table_size = 0
    sids = [p.request(b"GET", (b"x-test", b"one")) for _ in range(2)]
    p.alive()
    assert [p.lists[sid][0][-1] for sid in sids] == [(b"x-test", b"one")] * 2
    assert p.decoder.header_table_size == 0


@s("Header blocks longer than MAX_FRAME_SIZE are cut into CONTINUATION frames.")
def _(p: EnginePeer) -> None:
    p.greet()
    sid = p.request(b"GET", *((b"x-%d" % number, b"v" * 5000) for number in range(8)))
    p.alive()
    assert max(len(frame.payload) for frame in p.seen) <= 16384, p.story()
    assert len(p.lists[sid][0]) == 12


s = more("6.6")
s.add(
    "PUSH_PROMISE is a connection error PROTOCOL_ERROR: push was disabled.",
    is_connection_error(f.PROTOCOL_ERROR, f.push_promise(1, 2, f.block([(b":method", b"GET")]))),
)

s = more("6.8")


@s("GOAWAY: streams above the last one were not processed; those below go on.")
def _(p: EnginePeer) -> None:
    p.greet()
    for _ in range(3):
        p.request()
    p.send(f.goaway(3, f.NO_ERROR, b"bye"))
    p.got(("reset", 5, f.REFUSED_STREAM, True), ("closed", 5), ("goaway", 3, f.NO_ERROR, b"bye"))
    assert p.conn.open_stream() is None
    p.send(ok(1, end=True), ok(3, end=True))
    assert ("closed", 1) in p.events and ("closed", 3) in p.events


@s("A graceful announcement with 2^31-1 ends no stream; the final GOAWAY then may.")
def _(p: EnginePeer) -> None:
    p.greet()
    p.request()
    p.request()
    p.send(f.goaway(f.MAX_WINDOW), f.goaway(1))
    p.got(
        ("goaway", f.MAX_WINDOW, f.NO_ERROR, b""),
        ("reset", 3, f.REFUSED_STREAM, True),
        ("closed", 3),
        ("goaway", 1, f.NO_ERROR, b""),
    )


@s("A GOAWAY with an unknown error code is accepted.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.goaway(1, 0xFF))
    p.got(("goaway", 1, 0xFF, b""))
    p.send(ok(1, end=True))
    assert ("closed", 1) in p.events


s = more("6.9")


@s("The client sends no more than the windows of stream and connection allow.")
def _(p: EnginePeer) -> None:
    p.greet((f.INITIAL_WINDOW_SIZE, 100000))
    sid = p.request(b"POST", end=False)
    p.conn.send_data(sid, b"x" * 200000, end=True)
    p.flush()
    p.alive()
    sent = sum(len(frame.payload) for frame in p.seen if frame.type == f.DATA)
    assert sent == 65535, f"{sent} bytes for a connection window of 65535"
    p.send(f.window_update(0, 100000))
    p.alive(b"-second-")
    sent = sum(len(frame.payload) for frame in p.seen if frame.type == f.DATA)
    assert sent == 100000, f"{sent} bytes for a stream window of 100000"
    p.send(f.window_update(sid, 100000), f.window_update(0, 100000))
    p.complete(sid)


s = more("8.1")


@s("Interim responses come before the response.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(f.headers(1, f.block([(b":status", b"100")])), f.headers(1, f.block([(b":status", b"103"), (b"link", b"</a>")])))
    p.send(ok(1, end=True))
    p.got(
        ("headers", 1, [(b":status", b"100")], "informational", False),
        ("headers", 1, [(b":status", b"103"), (b"link", b"</a>")], "informational", False),
        ("headers", 1, RESPONSE, "response", True),
        ("closed", 1),
    )


@s("A response may end with trailers.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    p.send(ok(1), f.data(1, b"test"), f.headers(1, f.block([(b"x-test", b"ok")]), end=True))
    p.alive()
    p.got(
        ("headers", 1, RESPONSE, "response", False),
        ("data", 1, b"test", False),
        ("headers", 1, [(b"x-test", b"ok")], "trailers", True),
        ("closed", 1),
    )


@s("A complete response before the request has ended, then RST_STREAM NO_ERROR, is a response.")
def _(p: EnginePeer) -> None:
    p.greet_and_request(b"POST", end=False)
    p.send(ok(1, end=True), f.rst_stream(1, f.NO_ERROR))
    p.alive()
    p.got(("headers", 1, RESPONSE, "response", True), ("reset", 1, f.NO_ERROR, True), ("closed", 1))


s.add(
    "DATA before the response's HEADERS is a stream error PROTOCOL_ERROR.", is_stream_error(f.PROTOCOL_ERROR, f.data(1, b"test"))
)
s.add(
    "A second HEADERS without END_STREAM is a stream error PROTOCOL_ERROR.",
    is_stream_error(f.PROTOCOL_ERROR, ok(1), f.data(1, b"test"), f.headers(1, f.block([(b"x-test", b"ok")]))),
)
s.add(
    "An interim response with END_STREAM is a stream error PROTOCOL_ERROR.",
    is_stream_error(f.PROTOCOL_ERROR, f.headers(1, f.block([(b":status", b"100")]), end=True)),
)
s.add(
    "A pseudo-header field in trailers is a stream error PROTOCOL_ERROR.",
    is_stream_error(f.PROTOCOL_ERROR, ok(1), f.headers(1, f.block([(b":status", b"200")]), end=True)),
)

s = more("8.1.1")
s.add(
    "content-length larger than the body is a stream error PROTOCOL_ERROR.",
    is_stream_error(f.PROTOCOL_ERROR, ok(1, (b"content-length", b"5")), f.data(1, b"test", end=True)),
)
s.add(
    "content-length smaller than the body is a stream error PROTOCOL_ERROR.",
    is_stream_error(f.PROTOCOL_ERROR, ok(1, (b"content-length", b"3")), f.data(1, b"test")),
)
s.add(
    "content-length without a body is a stream error PROTOCOL_ERROR.",
    is_stream_error(f.PROTOCOL_ERROR, ok(1, (b"content-length", b"5"), end=True)),
)


@s("content-length in the response to HEAD needs no body.")
def _(p: EnginePeer) -> None:
    p.greet_and_request(b"HEAD")
    p.send(ok(1, (b"content-length", b"5"), end=True))
    p.alive()
    p.got(("headers", 1, [*RESPONSE, (b"content-length", b"5")], "response", True), ("closed", 1))


@s("content-length in a 304 response needs no body.")
def _(p: EnginePeer) -> None:
    p.greet_and_request()
    fields = [(b":status", b"304"), (b"content-length", b"5")]
    p.send(f.headers(1, f.block(fields), end=True))
    p.alive()
    p.got(("headers", 1, fields, "response", True), ("closed", 1))


def _malformed_response(requirement: str, *fields: f.Field) -> None:
    s.add(requirement, is_stream_error(f.PROTOCOL_ERROR, f.headers(1, f.block(fields))))


STATUS = (b":status", b"200")

s = more("8.2.1")
_malformed_response("A field name in upper case is a stream error PROTOCOL_ERROR.", STATUS, (b"X-Test", b"a"))
_malformed_response("CR in a value is a stream error PROTOCOL_ERROR.", STATUS, (b"x-test", b"a\rb"))
_malformed_response("LF in a value is a stream error PROTOCOL_ERROR.", STATUS, (b"x-test", b"a\nb"))
_malformed_response("NUL in a value is a stream error PROTOCOL_ERROR.", STATUS, (b"x-test", b"a\x00b"))
_malformed_response("A space at the end of a value is a stream error PROTOCOL_ERROR.", STATUS, (b"x-test", b"a "))
_malformed_response("A space in a name is a stream error PROTOCOL_ERROR.", STATUS, (b"x test", b"a"))
_malformed_response("An empty name is a stream error PROTOCOL_ERROR.", STATUS, (b"", b"a"))

s = more("8.2.2")
_malformed_response("connection is a stream error PROTOCOL_ERROR.", STATUS, (b"connection", b"close"))
_malformed_response("transfer-encoding is a stream error PROTOCOL_ERROR.", STATUS, (b"transfer-encoding", b"chunked"))

s = more("8.3")
_malformed_response("An unknown pseudo-header field is a stream error PROTOCOL_ERROR.", STATUS, (b":unknown", b"a"))
_malformed_response("A pseudo-header field of requests is a stream error PROTOCOL_ERROR.", STATUS, (b":path", b"/"))
_malformed_response("A pseudo-header field behind a regular one is a stream error PROTOCOL_ERROR.", (b"x-test", b"a"), STATUS)

s = more("8.3.2")
_malformed_response("A response without :status is a stream error PROTOCOL_ERROR.", (b"x-test", b"a"))
_malformed_response("A second :status is a stream error PROTOCOL_ERROR.", STATUS, STATUS)
_malformed_response("An empty :status is a stream error PROTOCOL_ERROR.", (b":status", b""))
_malformed_response("A :status that is no number is a stream error PROTOCOL_ERROR.", (b":status", b"2x0"))
_malformed_response("A :status of two digits is a stream error PROTOCOL_ERROR.", (b":status", b"20"))
_malformed_response("A :status of four digits is a stream error PROTOCOL_ERROR.", (b":status", b"0200"))

s = more("8.6")
_malformed_response("Status 101 is a stream error PROTOCOL_ERROR: it does not exist in HTTP/2.", (b":status", b"101"))
