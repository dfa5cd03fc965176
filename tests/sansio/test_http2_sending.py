"""Sending: windows, turns, payloads by reference, frames that grow, header blocks that need several frames, backpressure."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

from . import h2pair as h


def answering(*streams: int, window: int = 65535, frame: int = 16384, **limits: int) -> Http2Connection:
    """A server that has sent the response headers on each of the streams."""
    conn = h.server((f.INITIAL_WINDOW_SIZE, window), (f.MAX_FRAME_SIZE, frame), **limits)
    for sid in streams:
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True))
        conn.send_headers(sid, h.OK)
    conn.output()
    return conn


def address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def test_data_waits_for_the_stream_window() -> None:
    conn = answering(1, window=10)
    conn.send_data(1, b"0123456789abcdef")
    assert [frame.payload for frame in h.data_frames(conn)] == [b"0123456789"]
    conn.receive(f.window_update(1, 4))
    assert [frame.payload for frame in h.data_frames(conn)] == [b"abcd"]
    conn.send_data(1, b"gh", True)
    conn.receive(f.window_update(1, 100))
    assert [(frame.payload, frame.end_stream) for frame in h.data_frames(conn)] == [(b"efgh", True)]


def test_data_waits_for_the_connection_window() -> None:
    conn = answering(1, 3, window=1 << 20)
    conn.send_data(1, bytes(65535))
    conn.send_data(3, b"abc", True)
    assert sum(len(frame.payload) for frame in h.data_frames(conn)) == 65535
    conn.receive(f.window_update(3, 1000))
    assert h.data_frames(conn) == []
    conn.receive(f.window_update(0, 2))
    assert [frame.payload for frame in h.data_frames(conn)] == [b"ab"]
    conn.receive(f.window_update(0, 2))
    assert [(frame.payload, frame.end_stream) for frame in h.data_frames(conn)] == [(b"c", True)]


def test_end_without_bytes_needs_no_window() -> None:
    conn = answering(1, window=0)
    conn.send_data(1, b"", True)
    assert [(frame.payload, frame.end_stream) for frame in h.data_frames(conn)] == [(b"", True)]


def test_end_waits_for_the_bytes_before_it() -> None:
    conn = answering(1, window=2)
    conn.send_data(1, b"abc")
    conn.send_data(1, b"", True)
    conn.send_data(1, b"never")
    assert [(frame.payload, frame.end_stream) for frame in h.data_frames(conn)] == [(b"ab", False)]
    conn.receive(f.window_update(1, 2))
    assert [(frame.payload, frame.end_stream) for frame in h.data_frames(conn)] == [(b"c", True)]


def test_no_frame_is_larger_than_the_peer_allows() -> None:
    conn = answering(1, window=1 << 20, frame=20000)
    conn.send_data(1, bytes(50000))
    assert [len(frame.payload) for frame in h.data_frames(conn)] == [20000, 20000, 10000]


@pytest.mark.parametrize("reference", [False, True], ids=["copied", "by-reference"])
def test_streams_take_turns(reference: bool) -> None:
    conn = answering(1, 3, 5, window=1 << 20, frame=1 << 20)
    conn.receive(f.window_update(0, 1 << 24))
    size = 100000
    bodies = {sid: bytes([sid]) * size for sid in (1, 3, 5)}
    for sid, body in bodies.items():
        conn.send_data(sid, body if reference else memoryview(body)[:60000])
        if not reference:  # waits behind what fits into the first backlog
            conn.send_data(sid, memoryview(body)[60000:])
    order = [(frame.stream, len(frame.payload)) for frame in h.data_frames(conn)]
    if reference:
        turns = [sid for sid, _ in order]
        assert turns[:9] == [1, 3, 5] * 3
        assert all(n <= 16384 for _, n in order[:9])
    assert {sid: sum(n for s, n in order if s == sid) for sid in bodies} == dict.fromkeys(bodies, size)


def test_streams_that_wait_for_the_connection_take_turns() -> None:
    conn = answering(1, 3, window=1 << 20)
    conn.send_data(1, bytes(65535))
    conn.output()
    conn.send_data(1, bytes(60000))
    conn.send_data(3, bytes(60000))
    conn.receive(f.window_update(0, 64000))
    assert [(frame.stream, len(frame.payload)) for frame in h.data_frames(conn)] == [
        (1, 16384), (3, 16384), (1, 16384), (3, 14848),
    ]  # fmt: skip


def test_large_payloads_are_sent_from_their_own_memory() -> None:
    conn = answering(1, window=1 << 20, frame=1 << 20)
    conn.receive(f.window_update(0, 1 << 20))
    payload = bytes(range(256)) * 1024
    conn.send_data(1, payload, True)
    chunks = conn.chunks()
    assert [size for _, size in chunks] == [9, 65536] * 4
    start = address(payload)
    assert [at - start for at, size in chunks if size != 9] == [0, 65536, 131072, 196608]
    out = h.data_frames(conn)
    assert b"".join(frame.payload for frame in out) == payload and out[-1].end_stream


def test_a_payload_is_held_until_it_is_written() -> None:
    conn = answering(1, window=1 << 20, frame=1 << 20)
    conn.receive(f.window_update(0, 1 << 20))
    payload = bytearray(100000)
    conn.send_data(1, payload, True)
    with pytest.raises(BufferError):
        payload.append(0)
    conn.output(limit=9 + 65536 + 8)
    with pytest.raises(BufferError):
        payload.append(0)
    conn.output(limit=1)
    conn.output()
    payload.append(0)


def test_a_payload_of_a_stream_that_was_reset_is_let_go() -> None:
    conn = answering(1, window=10)
    payload = bytearray(100000)
    conn.send_data(1, payload, True)
    conn.receive(f.rst_stream(1))
    payload.append(0)
    assert conn.ledger()["queued"] == 0


def test_a_frame_that_was_begun_is_finished_after_a_reset() -> None:
    """Its head is on the way: the peer would take what follows for its payload."""
    conn = answering(1, 3, window=1 << 20)
    conn.receive(f.window_update(0, 1 << 20))
    conn.send_data(1, bytes(200000), True)
    head = conn.output(limit=20)
    conn.reset(1, f.CANCEL)
    conn.send_data(3, b"other", True)
    frames = list(f.FrameReader().feed(head + conn.output()))
    kinds = [(frame.type, frame.stream) for frame in frames]
    assert kinds[-2:] == [(f.RST_STREAM, 1), (f.DATA, 3)]
    assert all(kind == (f.DATA, 1) for kind in kinds[:-2])


@pytest.mark.parametrize("limit", [1, 7, 1000, 70000])
def test_output_in_small_writes(limit: int) -> None:
    conn = answering(1, 3, window=1 << 20, frame=1 << 20)
    conn.receive(f.window_update(0, 1 << 20))
    size = 3000 if limit < 100 else 0
    conn.send_data(1, b"a" * (70000 + size), True)
    conn.send_data(3, b"b" * (100 if limit == 1 else 80000))
    conn.send_data(3, b"c" * 10, True)
    out = b""
    while piece := conn.output(limit=limit):
        out += piece
        if len(out) < 1000:
            conn.ping(b"interlop")
    bodies = {1: b"", 3: b""}
    for frame in f.FrameReader().feed(out):
        if frame.type == f.DATA:
            bodies[frame.stream] += frame.payload
        else:
            assert frame.type == f.PING
    assert bodies == {1: b"a" * (70000 + size), 3: b"b" * (100 if limit == 1 else 80000) + b"c" * 10}


def test_neighbouring_pieces_share_a_frame() -> None:
    """Many small frames cost the reader, and some peers close for them (HTTP2.md section 4.3)."""
    conn = answering(1, 3, window=1 << 20)
    for _ in range(100):
        conn.send_data(1, b"token ")
    conn.send_data(1, b"", True)
    conn.send_data(3, b"x")
    conn.ping(bytes(8))
    conn.send_data(3, b"y", True)
    assert [(frame.stream, len(frame.payload), frame.end_stream) for frame in h.data_frames(conn)] == [
        (1, 600, True), (3, 1, False), (3, 1, True),
    ]  # fmt: skip


def test_pieces_that_wait_are_sent_together() -> None:
    conn = answering(1, window=0)
    for _ in range(100):
        conn.send_data(1, b"token ")
    conn.receive(f.window_update(1, 1000))
    assert [frame.payload for frame in h.data_frames(conn)] == [b"token " * 100]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_queue_that_never_empties_does_not_grow() -> None:
    conn = answering(1, window=0)
    total = 0
    conn.send_data(1, bytes(100))
    before = resident_bytes()
    for _ in range(8000):
        conn.send_data(1, bytes(10000))
        conn.receive(f.window_update(1, 10000) + f.window_update(0, 10000))
        total += sum(len(frame.payload) for frame in h.data_frames(conn))
    assert total == 80_000_000 and conn.ledger()["queued"] == 100
    assert resident_bytes() - before < 20_000_000


def test_trailers_wait_for_the_body() -> None:
    conn = answering(1, window=3)
    conn.send_data(1, b"12345")
    conn.send_headers(1, h.TRAILERS)
    conn.send_data(1, b"never")
    assert [frame.type for frame in h.frames(conn)] == [f.DATA]
    conn.receive(f.window_update(1, 10))
    out = h.frames(conn)
    assert [(frame.type, frame.end_stream) for frame in out] == [(f.DATA, False), (f.HEADERS, True)]
    assert conn.events_now() == [("closed", 1)]


def test_trailers_follow_a_payload_by_reference() -> None:
    conn = answering(1, 3, window=1 << 20, frame=1 << 20)
    conn.send_data(1, bytes(65536 - 1000))
    conn.receive(f.window_update(0, 1 << 20))
    conn.send_data(1, bytes(70000))
    conn.send_headers(1, h.TRAILERS)
    out = [frame for frame in h.frames(conn) if frame.stream == 1]
    assert [frame.type for frame in out][-1] == f.HEADERS and out[-1].end_stream
    assert sum(len(frame.payload) for frame in out[:-1]) == 65536 - 1000 + 70000


def test_copied_and_referenced_pieces_keep_their_order() -> None:
    conn = answering(1, window=0, frame=1 << 20)
    pieces = [b"a" * 10, b"b" * 70000, b"c" * 5, b"d" * 5, b"e" * 65536, b"f" * 66000, b"g"]
    for piece in pieces:
        conn.send_data(1, piece)
    conn.send_data(1, b"", True)
    conn.receive(f.window_update(1, 1 << 20) + f.window_update(0, 1 << 20))
    out = h.data_frames(conn)
    assert b"".join(frame.payload for frame in out) == b"".join(pieces)
    assert [frame.end_stream for frame in out] == [False] * (len(out) - 1) + [True]


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", b"200"), (b"GET", b"204"), (b"GET", b"304")])
def test_responses_without_a_body(method: bytes, status: bytes) -> None:
    conn = h.server()
    conn.receive(f.headers(1, f.block([(b":method", method), *h.GET[1:]]), end=True))
    conn.send_headers(1, [(b":status", status), (b"content-length", b"5")])
    conn.send_data(1, b"12345", True)
    assert [(frame.type, frame.end_stream) for frame in h.frames(conn)] == [(f.HEADERS, True)]
    assert conn.events_now() == [("closed", 1)]


def test_informational_responses_come_before_the_final_one() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK))
    conn.send_headers(1, [(b":status", b"100")])
    conn.send_headers(1, [(b":status", b"103"), (b"link", b"</a>")])
    conn.send_headers(1, h.OK)
    conn.send_headers(1, h.TRAILERS)
    assert [frame.end_stream for frame in h.frames(conn)] == [False, False, False, True]
    assert conn.state(1) == "half-closed (local)"


@pytest.mark.parametrize("size", [16384 - 40, 16384, 40000, 16384 * 3])
def test_large_header_blocks_need_several_frames(size: int) -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    value = bytes(range(33, 123)) * (size // 90 + 1)
    value = value[:size]
    conn.send_headers(1, [*h.OK, (b"x-large", value)], True)
    out = h.frames(conn)
    assert [frame.type for frame in out] == [f.HEADERS] + [f.CONTINUATION] * (len(out) - 1)
    assert all(len(frame.payload) == 16384 for frame in out[:-1]) and 0 < len(out[-1].payload) <= 16384
    assert [bool(frame.flags & f.END_HEADERS) for frame in out] == [False] * (len(out) - 1) + [True]
    client = h.client()
    sid = h.opened(client, h.GET, True)
    events = client.receive(b"".join(frame.encode() for frame in out))
    assert events == [("headers", sid, [*h.OK, (b"x-large", value)], "response", True), ("closed", sid)]


def test_headers_that_cannot_be_encoded_leave_nothing_behind() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    with pytest.raises(TypeError):
        conn.send_headers(1, [(b":status", b"200"), (b"x", 5)])
    assert h.frames(conn) == []
    conn.send_headers(1, h.OK, True)
    assert [frame.type for frame in h.frames(conn)] == [f.HEADERS]


def test_data_before_headers_is_a_mistake_of_the_caller() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    with pytest.raises(RuntimeError, match="before its headers"):
        conn.send_data(1, b"x")


def test_room_for_one_stream() -> None:
    conn = answering(1, 3, window=0)
    assert conn.room(1)
    conn.send_data(1, bytes(300000))
    assert not conn.room(1) and not conn.room(1)
    assert conn.room(3)
    conn.receive(f.window_update(1, 100000) + f.window_update(0, 1 << 20))
    conn.output()
    assert conn.events_now() == []
    conn.receive(f.window_update(1, 100000))
    conn.output()
    assert conn.events_now() == [("room", 1)]
    assert conn.room(1)
    conn.receive(f.window_update(1, 1 << 20))
    conn.output()
    assert conn.events_now() == []


def test_no_room_while_the_socket_takes_nothing() -> None:
    conn = answering(1)
    conn.receive(f.headers(3, h.GET_BLOCK, end=True))
    filler = [(b":status", b"103"), (b"x-filler", bytes(range(33, 123)) * 600)]
    for _ in range(30):
        conn.send_headers(3, filler)
        conn.chunks()  # the socket takes nothing
    assert conn.ledger()["backlog"] > 30 * 54000
    assert not conn.room(1)
    conn.output(limit=54000)
    assert conn.events_now() == []
    conn.output()
    assert conn.events_now() == [("room", 1)]


def test_a_queue_without_progress_is_given_up() -> None:
    conn = answering(1, 3, window=0)
    conn.on_time(1.0)
    conn.send_data(1, b"stuck", True)
    conn.on_time(11.0)
    conn.send_data(3, b"moves")
    assert conn.next_wakeup == 31.0
    conn.receive(f.window_update(3, 1), 20.0)
    conn.output()
    assert conn.on_time(30.9) == []
    assert conn.on_time(31.0) == [("reset", 1, f.CANCEL, False), ("closed", 1)]
    assert h.resets(conn) == [(1, f.CANCEL)]
    assert conn.next_wakeup == 50.0
    assert conn.on_time(50.0)[0] == ("reset", 3, f.CANCEL, False)
    assert conn.next_wakeup == float("inf") and conn.ledger()["queued"] == 0


def test_what_a_callback_sends_while_output_is_gathered() -> None:
    """A stream whose large payload follows its headers must not overtake them."""
    conn = answering(1, window=1 << 20, frame=1 << 20)
    conn.receive(f.window_update(0, 1 << 24))
    conn.receive(f.headers(3, h.GET_BLOCK, end=True))
    conn.send_data(1, bytes(70000), True)
    first = conn.output(limit=1)
    conn.send_headers(3, h.OK)
    conn.send_data(3, bytes(70000), True)
    kinds = [(frame.type, frame.stream) for frame in f.FrameReader().feed(first + conn.output())]
    assert kinds.index((f.HEADERS, 3)) < kinds.index((f.DATA, 3))
