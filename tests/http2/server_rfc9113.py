"""Requirements of RFC 9113 for servers that h2spec does not look at: field rules, flow control, states, frame sizes.

The malformed fields of tests/http2/malformed.py are added at the end: every kind is a case of section 8.
"""

from __future__ import annotations

from collections.abc import Callable

from . import frames as f
from .malformed import MALFORMED, Malformed
from .peer import Case, EnginePeer, Peer, Section
from .server_http2 import is_connection_error

CASES: list[Case] = []


def section(number: str) -> Section:
    return Section(CASES, f"rfc9113/{number}", f"RFC 9113 {number}")


# --- 3.4 preface ----------------------------------------------------------------------------------------------------------

s = section("3.4")


@s("The first frame behind the preface has to be SETTINGS: PING is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.send(f.PREFACE, f.ping())
    p.connection_error(f.PROTOCOL_ERROR)


@s("The first frame behind the preface has to be SETTINGS: HEADERS is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.send(f.PREFACE, p.get())
    p.connection_error(f.PROTOCOL_ERROR)


@s("The first frame behind the preface must not be the acknowledgement of SETTINGS.")
def _(p: Peer) -> None:
    p.send(f.PREFACE, f.SETTINGS_ACK)
    p.connection_error(f.PROTOCOL_ERROR)


@s("A preface that ends wrongly ends the connection.")
def _(p: Peer) -> None:
    p.send(f.PREFACE[:-4] + b"XX\r\n", f.settings())
    p.until_closed()


@s("The preface may arrive in pieces.")
def _(p: Peer) -> None:
    for byte in f.PREFACE + f.settings():
        p.send(bytes([byte]))
    p.settings_ack()
    p.alive()


@s("A client may send requests before it has seen the server's SETTINGS.")
def _(p: Peer) -> None:
    p.send(f.PREFACE, f.settings(), p.get())
    p.response()
    p.complete()


# --- 4 frames -------------------------------------------------------------------------------------------------------------

s = section("4.1")


@s("Unknown frames on streams of any state are ignored, with any flags.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(0xFE, 0xFF, 1, b"idle"), p.post(), f.frame(0xFE, 0xFF, 1, b"open"), f.data(1, b"test", end=True))
    p.complete()
    p.send(f.frame(0xFE, 0xFF, 1, b"closed"), f.frame(0xFE, 0, 2, b""))
    p.alive()


@s("The reserved bit is ignored in HEADERS, DATA and WINDOW_UPDATE.")
def _(p: Peer) -> None:
    p.handshake()
    block = f.block(p.fields(b"POST"))
    p.send(
        f.frame(f.HEADERS, f.END_HEADERS, 0x80000001, block),
        f.frame(f.WINDOW_UPDATE, 0, 0x80000000, b"\x80\x00\x00\x01"),
        f.frame(f.DATA, f.END_STREAM, 0x80000001, b"test"),
    )
    p.response()
    p.alive()


s = section("4.2")


@s("A frame of the announced MAX_FRAME_SIZE is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    size = min(p.settings.get(f.MAX_FRAME_SIZE, 16384), p.settings.get(f.INITIAL_WINDOW_SIZE, 65535), 65535)
    p.send(p.post(), f.data(1, b"x" * size, end=True))
    p.response()


@s("An unknown frame longer than MAX_FRAME_SIZE is an error FRAME_SIZE_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(0xFE, 0, 0, b"x" * (p.settings.get(f.MAX_FRAME_SIZE, 16384) + 1)))
    p.connection_error(f.FRAME_SIZE_ERROR)


@s("HEADERS too short for its padding length is a connection error FRAME_SIZE_ERROR or PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(f.HEADERS, f.END_HEADERS | f.END_STREAM | f.PADDED, 1, b""))
    p.connection_error(f.FRAME_SIZE_ERROR, f.PROTOCOL_ERROR)


@s("HEADERS too short for its priority fields is a connection error FRAME_SIZE_ERROR or PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(f.HEADERS, f.END_HEADERS | f.END_STREAM | f.PRIORITY_FLAG, 1, bytes(4)))
    p.connection_error(f.FRAME_SIZE_ERROR, f.PROTOCOL_ERROR)


@s("DATA too short for its padding length is an error FRAME_SIZE_ERROR or PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.frame(f.DATA, f.PADDED, 1, b""))
    p.either_error(1, f.FRAME_SIZE_ERROR, f.PROTOCOL_ERROR)


s.add(
    "GOAWAY shorter than 8 bytes is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.GOAWAY, 0, 0, bytes(7))),
)
s.add(
    "RST_STREAM longer than 4 bytes is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.RST_STREAM, 0, 1, bytes(5))),
)
s.add(
    "WINDOW_UPDATE longer than 4 bytes is a connection error FRAME_SIZE_ERROR.",
    is_connection_error(f.FRAME_SIZE_ERROR, f.frame(f.WINDOW_UPDATE, 0, 0, bytes(5))),
)
s.add(
    "PING longer than 8 bytes is a connection error FRAME_SIZE_ERROR.", is_connection_error(f.FRAME_SIZE_ERROR, f.ping(bytes(9)))
)

s = section("4.3")


@s("Fields that were refused still count for the dynamic table of later requests.", socket=False)
def _(p: EnginePeer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()) + f.literal(b"x-kept", b"yes", f.INDEXING) + f.literal(b"BAD", b""), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)
    p.send(f.headers(3, f.block(p.fields()) + f.indexed(62), end=True))
    p.response(3)
    assert p.events[-1][0] != "error"
    assert [event[2][-1] for event in p.events if event[0] == "headers"] == [(b"x-kept", b"yes")]


@s("HEADERS on a stream that the endpoint has reset still count for the dynamic table.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b""), f.headers(1, f.block([(b"x-bad trailer", b"")]), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)
    p.send(f.headers(1, f.literal(b"x-kept", b"yes", f.INDEXING), end=True))
    p.send(f.headers(3, f.block(p.fields()) + f.indexed(62), end=True))
    p.response(3)


@s("A header block may be cut anywhere, also inside of a string.")
def _(p: Peer) -> None:
    p.handshake()
    block = f.block(p.fields())
    p.send(
        f.headers(1, block[:5], end=True, end_headers=False),
        f.continuation(1, block[5:6], end_headers=False),
        f.continuation(1, block[6:]),
    )
    p.response()


@s("Empty HEADERS and CONTINUATION fragments are accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        f.headers(1, b"", end=True, end_headers=False),
        f.continuation(1, f.block(p.fields()), end_headers=False),
        f.continuation(1, b""),
    )
    p.response()


def _inside_block(piece: Callable[[Peer], bytes], requirement: str) -> None:
    def run(p: Peer) -> None:
        p.handshake_and_hold()
        p.send(p.post(1), f.headers(3, f.block(p.fields()), end=True, end_headers=False), piece(p))
        p.connection_error(f.PROTOCOL_ERROR)

    s.add(requirement, run)


for _name, _frame in (
    ("DATA of another stream", f.data(1, b"test")),
    ("RST_STREAM", f.rst_stream(3)),
    ("SETTINGS", f.settings()),
    ("PING", f.ping()),
    ("GOAWAY", f.goaway()),
    ("WINDOW_UPDATE", f.window_update(0, 1)),
    ("CONTINUATION of another stream", f.continuation(1, b"")),
):
    _inside_block(
        lambda p, frame=_frame: frame,  # type: ignore[misc]
        f"{_name} inside of a header block is a connection error PROTOCOL_ERROR.",
    )

# --- 5 streams ------------------------------------------------------------------------------------------------------------

s = section("5.1")


@s("closed: WINDOW_UPDATE and RST_STREAM that cross the end of a stream are accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.complete()
    p.send(f.window_update(1, 100), f.rst_stream(1))
    p.alive()


@s("closed by the endpoint's RST_STREAM: frames in flight do not end the connection.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"1")), f.data(1, b"too much"))
    p.stream_error(1, f.PROTOCOL_ERROR)
    p.send(f.data(1, b"in flight"), f.window_update(1, 5), f.headers(1, f.block([(b"x-late", b"1")]), end=True), f.rst_stream(1))
    p.alive()
    p.send(p.get(3))
    p.response(3)


@s("A stream that was never opened is closed by one with a higher number: DATA on it is an error.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(5))
    p.response(5)
    p.send(f.data(3, b"test"))
    p.either_error(3, f.STREAM_CLOSED, f.PROTOCOL_ERROR)


@s("RST_STREAM on an even stream, which a client cannot open, is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(5), f.rst_stream(2))
    p.connection_error(f.PROTOCOL_ERROR)


@s("WINDOW_UPDATE on an idle stream above the highest is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(1), f.window_update(7, 1))
    p.connection_error(f.PROTOCOL_ERROR)


s = section("5.1.1")


@s("Stream numbers may be skipped.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(13), p.get(2001))
    p.response(13)
    p.response(2001)


@s("The highest stream number is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(0x7FFFFFFF))
    p.response(0x7FFFFFFF)


s = section("5.1.2")


@s("A stream that has ended makes room for another one.", max_concurrent_streams=2, socket=False)
def _(p: EnginePeer) -> None:
    p.handshake_and_hold()
    p.send(p.get(1), p.get(3), p.get(5))
    p.stream_error(5, f.REFUSED_STREAM, f.PROTOCOL_ERROR)
    p.send(f.window_update(1, 1000))
    p.complete(1)
    p.send(p.get(7))
    p.response(7)


s = section("5.4.1")


@s("GOAWAY of a connection error names the last stream, and later frames are not answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get(1))
    p.complete(1)
    p.send(f.frame(f.PING, 0, 1, bytes(8)), p.get(3), f.ping(b"too late"))
    frame = p.until("GOAWAY", lambda frame: frame.type == f.GOAWAY)
    assert (frame.code, frame.last_stream) == (f.PROTOCOL_ERROR, 1), p.story()
    p.until_closed()
    assert not any(frame.type == f.PING and frame.payload == b"too late" for frame in p.seen), p.story()


s = section("5.4.2")


@s("RST_STREAM is not answered with RST_STREAM.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(1), f.rst_stream(1), f.rst_stream(1))
    p.never("RST_STREAM", lambda frame: frame.type == f.RST_STREAM)


@s("After RST_STREAM from the client nothing more is sent on the stream.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(1), f.rst_stream(1), f.settings((f.INITIAL_WINDOW_SIZE, 1000)), f.window_update(1, 10))
    p.never("DATA", lambda frame: frame.type == f.DATA and len(frame.payload) > 0)


# --- 6 frame definitions --------------------------------------------------------------------------------------------------

s = section("6.1")


@s("Padding of any content and of every length up to the payload's is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        p.post(), f.frame(f.DATA, f.PADDED, 1, b"\x03abc\x01\x02\x03"), f.data(1, b"", pad=255), f.data(1, b"d", end=True, pad=0)
    )
    p.response()
    if isinstance(p, EnginePeer):
        assert b"".join(event[2] for event in p.events if event[0] == "data") == b"abcd"


@s("Padding as long as the whole payload is a connection error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.frame(f.DATA, f.PADDED, 1, b"\x05test!"[:5]))
    p.connection_error(f.PROTOCOL_ERROR)


@s("An empty DATA frame with END_STREAM ends a body.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test"), f.data(1, b"", end=True))
    p.response()


s = section("6.2")


@s("HEADERS with padding and priority fields is accepted, padding up to the end of the frame included.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        f.headers(1, f.block(p.fields()), end=True, pad=255, priority=f.priority_fields(0)),
        f.headers(3, f.block(p.fields()), end=True, pad=0),
    )
    p.response(1)
    p.response(3)


s = section("6.3")


@s("PRIORITY with another length than 5 is a stream error FRAME_SIZE_ERROR, and the stream is gone.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.frame(f.PRIORITY, 0, 1, bytes(6)))
    p.stream_error(1, f.FRAME_SIZE_ERROR)


s = section("6.4")


@s("RST_STREAM frees the number for nothing: the stream does not open again.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.rst_stream(1), f.headers(1, f.block(p.fields()), end=True))
    p.stream_error(1, f.STREAM_CLOSED)
    p.never("response", lambda frame: frame.type == f.HEADERS and frame.stream == 1 and frame.end_stream)


s = section("6.5")


@s("An empty SETTINGS frame is acknowledged.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.settings())
    p.settings_ack()


@s("Every SETTINGS frame is acknowledged once.")
def _(p: Peer) -> None:
    p.handshake()
    before = sum(frame.ack for frame in p.seen if frame.type == f.SETTINGS)
    p.send(f.settings(), f.settings((3, 5)), f.settings((1, 0), (1, 4096)))
    p.alive()
    assert sum(frame.ack for frame in p.seen if frame.type == f.SETTINGS) == before + 3, p.story()


@s("SETTINGS with undefined flags is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.frame(f.SETTINGS, 0xFE, 0, b""))
    p.settings_ack()


s = section("6.5.2")


@s("The largest values of INITIAL_WINDOW_SIZE and MAX_FRAME_SIZE are accepted.")
def _(p: Peer) -> None:
    p.handshake((f.INITIAL_WINDOW_SIZE, f.MAX_WINDOW), (f.MAX_FRAME_SIZE, (1 << 24) - 1))
    p.send(p.get())
    p.complete()


@s("HEADER_TABLE_SIZE 0 is obeyed: the encoder signals the change and uses no dynamic table.")
def _(p: Peer) -> None:
    p.handshake((f.HEADER_TABLE_SIZE, 0))
    # the decoder of the tests refuses a block without the update that is due (RFC 7541 section 4.2)
    p.decoder.max_allowed_table_size = 0
    for stream in (1, 3, 5):
        p.send(p.get(stream))
        p.complete(stream)
    assert p.decoder.header_table_size == 0, "no size update was signalled"


@s("HEADER_TABLE_SIZE of 2^32-1 is accepted.")
def _(p: Peer) -> None:
    p.handshake((f.HEADER_TABLE_SIZE, 0xFFFFFFFF))
    p.decoder.max_allowed_table_size = 0xFFFFFFFF
    for stream in (1, 3):
        p.send(p.get(stream))
        p.complete(stream)


@s("No frame is longer than the MAX_FRAME_SIZE of the client.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.complete()
    assert max(len(frame.payload) for frame in p.seen) <= 16384, p.story()


s = section("6.5.3")


@s("SETTINGS between WINDOW_UPDATE frames are applied in order.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.window_update(1, 2), f.settings((f.INITIAL_WINDOW_SIZE, 1)), f.window_update(1, 1))
    p.alive()
    sent = sum(len(frame.payload) for frame in p.seen if frame.type == f.DATA)
    assert sent == 4, f"{sent} bytes for a window of 4: {p.story()}"


s = section("6.7")


@s("PING frames are answered in their order, undefined flags ignored.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.ping(b"00000001"), f.frame(f.PING, 0xFE, 0, b"00000002"), f.ping(b"00000003"))
    p.alive()
    answers = [frame.payload for frame in p.seen if frame.type == f.PING]
    assert answers == [b"00000001", b"00000002", b"00000003", b"-alive?-"], p.story()


s = section("6.8")


@s("After GOAWAY of the client open requests are still answered.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(1), f.goaway(0, f.NO_ERROR, b"bye"), f.window_update(1, 1000))
    p.response(1)
    p.complete(1)


s = section("6.9")


@s("The reserved bit of the increment is ignored.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.window_update(1, 0x80000001))
    p.data_of_length(1, 1)


@s("DATA beyond the window of the stream is an error FLOW_CONTROL_ERROR.", socket=False, stream_window=1000)
def _(p: EnginePeer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"x" * 600), f.data(1, b"x" * 401, end=True))
    p.either_error(1, f.FLOW_CONTROL_ERROR)


@s("Padding counts: DATA whose padding is beyond the window is an error FLOW_CONTROL_ERROR.", socket=False, stream_window=1000)
def _(p: EnginePeer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"x" * 800), f.data(1, b"x" * 100, pad=100))
    p.either_error(1, f.FLOW_CONTROL_ERROR)


@s("DATA that fills the window exactly is accepted.", socket=False, stream_window=1000)
def _(p: EnginePeer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"x" * 799), f.data(1, b"x" * 100, pad=100, end=True))
    p.response()


@s(
    "DATA beyond the connection's window is a connection error FLOW_CONTROL_ERROR.",
    socket=False,
    connection_window=65535,
    stream_window=50000,
)
def _(p: EnginePeer) -> None:
    p.handshake()
    p.send(p.post(1), p.post(3), *(f.data(stream, b"x" * 16384) for stream in (1, 3, 1, 3)))
    p.connection_error(f.FLOW_CONTROL_ERROR)


@s("DATA on a closed stream counts for the connection's window and is given back.", socket=False, connection_window=65535)
def _(p: EnginePeer) -> None:
    p.handshake()
    p.send(p.post(), f.rst_stream(1))
    for _ in range(20):
        p.send(f.data(1, b"x" * 16384))
    p.alive()
    given = sum(frame.increment for frame in p.seen if frame.type == f.WINDOW_UPDATE and frame.stream == 0)
    assert given >= 20 * 16384 - 65535, f"{given} bytes given back: {p.story()}"


s = section("6.9.1")


@s("Empty DATA with END_STREAM needs no window.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.headers(1, f.block(p.fields(b"HEAD")), end=True))
    p.response()


@s("The connection's window limits all streams together.")
def _(p: Peer) -> None:
    p.handshake((f.INITIAL_WINDOW_SIZE, f.MAX_WINDOW))
    p.send(f.window_update(0, f.MAX_WINDOW - 65535))
    p.send(p.get())
    p.complete()


@s("A WINDOW_UPDATE that fills the connection's window to exactly 2^31-1 is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.window_update(0, f.MAX_WINDOW - 65535))
    p.alive()


@s("A WINDOW_UPDATE that fills a stream's window to exactly 2^31-1 is accepted.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.window_update(1, f.MAX_WINDOW))
    p.alive()


s = section("6.9.2")


@s("SETTINGS that lift a stream's window above 2^31-1 is a connection error FLOW_CONTROL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.window_update(1, f.MAX_WINDOW), f.settings((f.INITIAL_WINDOW_SIZE, 1)))
    p.connection_error(f.FLOW_CONTROL_ERROR)


@s("INITIAL_WINDOW_SIZE does not change the connection's window.")
def _(p: Peer) -> None:
    p.handshake((f.INITIAL_WINDOW_SIZE, 0))
    p.send(f.window_update(0, f.MAX_WINDOW - 65535), f.settings((f.INITIAL_WINDOW_SIZE, f.MAX_WINDOW)))
    p.alive()


# --- 8 messages -----------------------------------------------------------------------------------------------------------

s = section("8.1")


@s("DATA behind trailers is a stream error STREAM_CLOSED.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.post(), f.data(1, b"test"), f.headers(1, f.block([(b"x-test", b"ok")]), end=True), f.data(1, b"more", end=True))
    p.stream_error(1, f.STREAM_CLOSED)


@s("Trailers without a body are accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.headers(1, f.block([(b"x-test", b"ok")]), end=True))
    p.response()


@s("A request body with an empty DATA frame in the middle is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"te"), f.data(1, b""), f.data(1, b"st", end=True))
    p.response()


def _accepted(requirement: str, *extra: f.Field, method: bytes = b"GET", rfc: str = "", **change: bytes) -> None:
    def run(p: Peer) -> None:
        p.handshake()
        fields = [(name, change.get(name[1:].decode(), value)) for name, value in p.fields(method)]
        fields = [field for field in fields if field[1] != b"<none>"]
        more = [(name, p.host if name == b"host" else value) for name, value in extra]
        p.send(f.headers(1, f.block([*fields, *more]), end=True))
        p.response()

    s.add(requirement, run, rfc=rfc)


s = section("8.1.1")
_accepted("content-length 0 without a body is accepted.", (b"content-length", b"0"), method=b"POST")


@s("content-length larger than the body is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"5")), f.data(1, b"test", end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)


@s("content-length without any body is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(1, (b"content-length", b"5")))
    p.stream_error(1, f.PROTOCOL_ERROR)


@s("content-length is checked against body bytes, not padding.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"4")), f.data(1, b"test", end=True, pad=20))
    p.response()


@s("content-length is checked when trailers end the body.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"content-length", b"5")), f.data(1, b"test"), f.headers(1, f.block([(b"x-test", b"ok")]), end=True))
    p.stream_error(1, f.PROTOCOL_ERROR)


@s("A malformed request does not disturb others on the connection.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1), f.headers(3, f.block([*p.fields(), (b"BAD", b"")]), end=True), f.data(1, b"test", end=True), p.get(5))
    p.stream_error(3, f.PROTOCOL_ERROR)
    assert {1, 5} <= p.lists.keys(), p.story()


s = section("8.2.1")
_accepted("Field names may have every token character but upper case letters.", (b"!#$%&'*+-.^_`|~0123456789abcxyz", b"1"))
_accepted("Field values may have bytes from 0x80 on and inner white space.", (b"x-test", b"a b\tc\x80\xff"))
_accepted("Field values may be empty.", (b"x-test", b""))

s = section("8.2.2")
_accepted("te: trailers is accepted.", (b"te", b"trailers"))

s = section("8.2.3")
_accepted("Several cookie fields are accepted.", (b"cookie", b"a=b"), (b"cookie", b"c=d"))

s = section("8.3.1")
_accepted("host that equals :authority is accepted.", (b"host", b"localhost"))
_accepted("host instead of :authority is accepted.", (b"host", b"localhost"), authority=b"<none>")
_accepted("OPTIONS with :path * is accepted.", method=b"OPTIONS", path=b"*")
_accepted("An unknown method that is a token is accepted.", method=b"X-TEST")
_accepted(":scheme https is accepted: a proxy may have ended TLS.", scheme=b"https")


def _pseudo_order(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(reversed(p.fields())), end=True))
    p.response()


s.add("Pseudo-header fields may come in any order.", _pseudo_order)

s = section("8.5")


@s("CONNECT with :path is a stream error PROTOCOL_ERROR.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.headers(1, f.block(p.fields(b"CONNECT"))))
    p.stream_error(1, f.PROTOCOL_ERROR)


# --- 8 malformed fields, one case each ------------------------------------------------------------------------------------


def _malformed(item: Malformed) -> Callable[[Peer], None]:
    def run(p: Peer) -> None:
        p.handshake_and_hold()
        p.send(*item.frames(1, p.fields(item.method)))
        p.stream_error(1, f.PROTOCOL_ERROR)

    return run


_sections: dict[str, Section] = {}
for _item in MALFORMED:
    if _item.section not in _sections:
        _sections[_item.section] = Section(CASES, f"rfc9113/{_item.section}/malformed", f"RFC 9113 {_item.section}")
    _sections[_item.section].add(f"Malformed, a stream error PROTOCOL_ERROR: {_item.name}.", _malformed(_item))
