"""States of streams: every frame in every state of RFC 9113 section 5.1, and callers that name streams which have gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

from . import h2pair as h

FRAMES: dict[str, Callable[[int], bytes]] = {
    "HEADERS": lambda sid: f.headers(sid, f.block(h.TRAILERS), end=True),
    "DATA": lambda sid: f.data(sid, b"x"),
    "RST_STREAM": lambda sid: f.rst_stream(sid),
    "WINDOW_UPDATE": lambda sid: f.window_update(sid, 1),
    "PRIORITY": lambda sid: f.priority(sid),
}


def idle(conn: Http2Connection) -> None:
    pass


def open_(conn: Http2Connection) -> None:
    conn.receive(f.headers(1, h.POST_BLOCK))


def half_local(conn: Http2Connection) -> None:
    open_(conn)
    conn.send_headers(1, h.OK, True)


def half_remote(conn: Http2Connection) -> None:
    conn.receive(f.headers(1, h.POST_BLOCK, end=True))


def ended(conn: Http2Connection) -> None:
    half_remote(conn)
    conn.send_headers(1, h.OK, True)


def reset_by_us(conn: Http2Connection) -> None:
    open_(conn)
    conn.reset(1, f.CANCEL)


def reset_by_peer(conn: Http2Connection) -> None:
    open_(conn)
    conn.receive(f.rst_stream(1))


def passed_over(conn: Http2Connection) -> None:
    conn.receive(f.headers(3, h.POST_BLOCK))


FINE, IGNORED = "fine", "ignored"
STREAM, CONNECTION = "stream", "connection"
P, S = f.PROTOCOL_ERROR, f.STREAM_CLOSED

# what a server does with each frame on stream 1, and the state after it; the streams are those of the functions above
TABLE = [
    (idle, "HEADERS", (STREAM, P), "closed"),  # no request: malformed
    (idle, "DATA", (CONNECTION, P), None),
    (idle, "RST_STREAM", (CONNECTION, P), None),
    (idle, "WINDOW_UPDATE", (CONNECTION, P), None),
    (idle, "PRIORITY", FINE, None),
    (open_, "HEADERS", FINE, "half-closed (remote)"),
    (open_, "DATA", FINE, "open"),
    (open_, "RST_STREAM", FINE, "closed"),
    (open_, "WINDOW_UPDATE", FINE, "open"),
    (open_, "PRIORITY", FINE, "open"),
    (half_local, "HEADERS", FINE, "closed"),
    (half_local, "DATA", FINE, "half-closed (local)"),
    (half_local, "RST_STREAM", FINE, "closed"),
    (half_local, "WINDOW_UPDATE", FINE, "half-closed (local)"),
    (half_local, "PRIORITY", FINE, "half-closed (local)"),
    (half_remote, "HEADERS", (STREAM, S), "closed"),
    (half_remote, "DATA", (STREAM, S), "closed"),
    (half_remote, "RST_STREAM", FINE, "closed"),
    (half_remote, "WINDOW_UPDATE", FINE, "half-closed (remote)"),
    (half_remote, "PRIORITY", FINE, "half-closed (remote)"),
    (ended, "HEADERS", (CONNECTION, S), None),
    (ended, "DATA", (CONNECTION, S), None),
    (ended, "RST_STREAM", IGNORED, "closed"),
    (ended, "WINDOW_UPDATE", IGNORED, "closed"),
    (ended, "PRIORITY", IGNORED, "closed"),
    (reset_by_us, "HEADERS", IGNORED, "closed"),
    (reset_by_us, "DATA", IGNORED, "closed"),
    (reset_by_us, "RST_STREAM", IGNORED, "closed"),
    (reset_by_us, "WINDOW_UPDATE", IGNORED, "closed"),
    (reset_by_us, "PRIORITY", IGNORED, "closed"),
    (reset_by_peer, "HEADERS", (STREAM, S), "closed"),
    (reset_by_peer, "DATA", (STREAM, S), "closed"),
    (reset_by_peer, "RST_STREAM", IGNORED, "closed"),
    (reset_by_peer, "WINDOW_UPDATE", IGNORED, "closed"),
    (reset_by_peer, "PRIORITY", IGNORED, "closed"),
    (passed_over, "HEADERS", (CONNECTION, P), None),
    (passed_over, "DATA", (CONNECTION, S), None),
    (passed_over, "RST_STREAM", IGNORED, "closed"),
    (passed_over, "WINDOW_UPDATE", IGNORED, "closed"),
    (passed_over, "PRIORITY", IGNORED, "closed"),
]


@pytest.mark.parametrize(("situation", "name", "result", "after"), TABLE, ids=[f"{row[0].__name__}-{row[1]}" for row in TABLE])
def test_every_frame_in_every_state(
    situation: Callable[[Http2Connection], None], name: str, result: str | tuple[str, int], after: str | None
) -> None:
    conn = h.server()
    situation(conn)
    conn.output()
    conn.events_now()
    events = conn.receive(FRAMES[name](1))
    sent = h.frames(conn)
    if result in (FINE, IGNORED):
        assert not sent
        assert not conn.dead
    elif result[0] == STREAM:
        assert [(frame.type, frame.stream, frame.code) for frame in sent] == [(f.RST_STREAM, 1, result[1])]
        assert not conn.dead
    else:
        assert [(frame.type, frame.code) for frame in sent] == [(f.GOAWAY, result[1])]
        assert events[-1][:2] == ("error", result[1])
    if result == IGNORED:
        assert events == []
    if after is not None:
        assert conn.state(1) == after


CLIENT_TABLE = [
    ("open", "HEADERS", FINE),  # the response
    ("half-local", "HEADERS", FINE),
    ("reset", "HEADERS", IGNORED),
    ("reset", "DATA", IGNORED),
    ("reset-long-ago", "HEADERS", IGNORED),
    ("reset-long-ago", "DATA", IGNORED),
    ("not-begun", "HEADERS", (CONNECTION, P)),
    ("not-begun", "RST_STREAM", (CONNECTION, P)),
    ("idle", "HEADERS", (CONNECTION, P)),
    ("idle", "DATA", (CONNECTION, P)),
]


@pytest.mark.parametrize(("situation", "name", "result"), CLIENT_TABLE, ids=[f"{row[0]}-{row[1]}" for row in CLIENT_TABLE])
def test_client_states(situation: str, name: str, result: str | tuple[str, int]) -> None:
    conn = h.client()
    if situation == "not-begun":
        conn.open_stream()
    elif situation != "idle":
        h.opened(conn, end=situation == "half-local")
    if situation.startswith("reset"):
        conn.reset(1, f.CANCEL)
    if situation == "reset-long-ago":  # more than the engine remembers; the peer may still be answering
        for _ in range(2000):
            conn.reset(h.opened(conn), f.CANCEL)
    conn.output()
    conn.events_now()
    frame = f.headers(1, h.OK_BLOCK) if name == "HEADERS" else FRAMES[name](1)
    events = conn.receive(frame)
    if isinstance(result, tuple):
        assert events[-1][:2] == ("error", result[1])
    else:
        assert not conn.dead and h.frames(conn) == []
        assert (events == []) is (result == IGNORED)


def test_a_stream_that_has_gone_may_be_named() -> None:
    """One read may carry a request and its reset: the owner answers what it saw first. (h2 raises StreamClosedError.)"""
    conn = h.server()
    events = conn.receive(f.headers(1, h.POST_BLOCK) + f.data(1, b"abc") + f.rst_stream(1))
    assert [event[0] for event in events] == ["headers", "data", "reset", "closed"]
    conn.send_headers(1, h.OK)
    conn.send_data(1, b"late", True)
    conn.reset(1, f.CANCEL)
    conn.consumed(1, 3)
    assert not conn.room(1)
    assert h.frames(conn) == []


def test_closed_is_told_once_and_last() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.send_headers(1, h.OK)
    assert conn.events_now() == []
    conn.send_data(1, b"x", True)
    assert conn.events_now() == [("closed", 1)]
    conn.send_data(1, b"x", True)
    conn.reset(1, f.CANCEL)
    assert conn.events_now() == []


def test_closed_waits_until_everything_is_framed() -> None:
    conn = h.server((f.INITIAL_WINDOW_SIZE, 3))
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.send_headers(1, h.OK)
    conn.send_data(1, b"12345", True)
    assert [frame.payload for frame in h.data_frames(conn)] == [b"123"]
    assert conn.events_now() == [] and conn.live == 1
    assert conn.receive(f.window_update(1, 10)) == []
    assert [(frame.payload, frame.end_stream) for frame in h.data_frames(conn)] == [(b"45", True)]
    assert conn.events_now() == [("closed", 1)] and conn.live == 0


def test_malformed_requests_never_reach_the_owner() -> None:
    conn = h.server()
    assert conn.receive(f.headers(1, f.block(h.POST[1:]))) == []
    assert h.resets(conn) == [(1, f.PROTOCOL_ERROR)] and conn.live == 0


def test_a_header_block_that_is_refused_still_changes_the_table() -> None:
    """RFC 9113 section 4.3: or the next block would be read with a wrong table."""
    conn = h.server(max_concurrent_streams=1)
    conn.receive(f.headers(1, h.POST_BLOCK))
    assert conn.receive(f.headers(3, f.block([*h.POST, (b"x-one", b"1")], f.INDEXING))) == []
    assert h.resets(conn) == [(3, f.REFUSED_STREAM)]
    conn.receive(f.rst_stream(1))
    # the newest entry of the table, which is number 62, is the last field of the refused block
    events = conn.receive(f.headers(5, f.block(h.POST) + f.indexed(62)))
    assert events[0][2][-1] == (b"x-one", b"1")


def test_a_body_may_not_differ_from_its_content_length() -> None:
    for length, body, end, told in (
        (3, b"1234", False, False),
        (3, b"12", True, False),
        (0, b"1", False, False),
        (3, b"123", True, True),
    ):
        conn = h.server()
        conn.receive(f.headers(1, f.block([*h.POST, (b"content-length", b"%d" % length)])))
        events = conn.receive(f.data(1, body, end=end))
        if told:
            assert events == [("data", 1, body, True)]
        else:
            assert events == [("reset", 1, f.PROTOCOL_ERROR, False), ("closed", 1)]
            assert h.resets(conn) == [(1, f.PROTOCOL_ERROR)]


def test_the_same_block_again_is_not_checked_again_and_still_counts() -> None:
    """HPACK returns the same list for the same block; what follows from its fields has to follow every time."""
    conn = h.server()
    block = f.block([*h.POST, (b"content-length", b"3")])
    events = [conn.receive(f.headers(sid, block)) for sid in (1, 3, 5)]
    assert events[0][0][2] is events[1][0][2]
    assert conn.receive(f.data(1, b"1234"))[0] == ("reset", 1, f.PROTOCOL_ERROR, False)
    assert conn.receive(f.data(3, b"12", end=True))[0] == ("reset", 3, f.PROTOCOL_ERROR, False)
    assert conn.receive(f.data(5, b"123", end=True)) == [("data", 5, b"123", True)]
    bad = f.block([*h.POST, (b"Bad", b"3")])
    for sid in (7, 9):
        assert conn.receive(f.headers(sid, bad)) == []
    assert h.resets(conn)[2:] == [(7, f.PROTOCOL_ERROR), (9, f.PROTOCOL_ERROR)]


def test_connect_is_not_implemented() -> None:
    conn = h.server()
    assert conn.receive(f.headers(1, f.block([(b":method", b"CONNECT"), (b":authority", b"localhost:1")]))) == []
    sent = h.frames(conn)
    assert [(frame.type, frame.stream) for frame in sent] == [(f.HEADERS, 1), (f.RST_STREAM, 1)]
    assert sent[0].end_stream and b"501" in sent[0].payload and sent[1].code == f.NO_ERROR
