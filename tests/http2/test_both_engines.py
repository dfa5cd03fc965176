"""What h2 leaves to its user and the engine interface promises: deadlines, queues, replies to streams that are gone."""

from __future__ import annotations

import math

import pytest

from . import frames as f
from .peer import RESPONSE, EnginePeer, ok


@pytest.fixture(params=["native", "h2"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_no_preface_in_time(engine: str) -> None:
    p = EnginePeer("server", engine, handshake_s=5)
    assert p.conn.next_wakeup == 5.0
    assert p.conn.on_time(4.9) == []
    error = p.conn.on_time(5.0)[-1]
    assert error[0] == "error" and "within 5 s" in error[2]
    assert p.conn.dead and p.conn.next_wakeup == math.inf


def test_no_acknowledgement_in_time(engine: str) -> None:
    p = EnginePeer("server", engine)
    p.send(f.PREFACE, f.settings())
    assert p.conn.next_wakeup == 10.0
    error = p.conn.on_time(10.0)[-1]
    assert error[:2] == ("error", f.SETTINGS_TIMEOUT)
    p.flush()
    p.until("GOAWAY", lambda frame: frame.type == f.GOAWAY and frame.code == f.SETTINGS_TIMEOUT)


def test_a_peer_that_gives_no_window(engine: str) -> None:
    """30 s without progress of a queue: RST_STREAM CANCEL, on that stream only."""
    p = EnginePeer("server", engine)
    p.handshake_and_hold()
    p.send(p.get(1), p.get(3), f.window_update(3, 1000))
    p.complete(3)
    assert p.conn.next_wakeup == 30.0
    assert p.conn.on_time(29.9) == []
    assert p.conn.on_time(30.0) == [("reset", 1, f.CANCEL, False), ("closed", 1)]
    p.flush()
    p.stream_error(1, f.CANCEL)
    assert p.conn.live == 0 and p.conn.ledger()["queued"] == 0


def test_reply_to_a_stream_that_is_gone(engine: str) -> None:
    """Request and RST_STREAM in one read: by the time the application replies there is nobody to reply to."""
    p = EnginePeer("server", engine)
    p.handshake()
    p.send(p.get(1), f.rst_stream(1), p.post(3), f.data(3, b"test", end=True), f.rst_stream(3), p.get(5))
    p.response(5)
    p.complete(5)
    for call in (
        lambda: p.conn.send_headers(1, RESPONSE),
        lambda: p.conn.send_data(1, b"late", end=True),
        lambda: p.conn.reset(1, f.CANCEL),
        lambda: p.conn.consumed(1, 10),
        lambda: p.conn.release(1),
    ):
        call()
    assert not p.conn.room(1)
    p.flush()
    p.never("frame on stream 1", lambda frame: frame.stream == 1)
    assert p.conn.live == 0


def test_trailers_wait_for_the_body(engine: str) -> None:
    p = EnginePeer("client", engine)
    sid = p.greet_and_request(b"POST", end=False)
    p.conn.send_data(sid, b"x" * 100_000)
    p.conn.send_headers(sid, [(b"x-sum", b"100000")], end=True)
    p.conn.send_data(sid, b"nothing comes behind trailers", end=True)
    p.flush()
    p.alive()
    assert len(p.lists[sid]) == 1
    p.send(f.window_update(0, 100_000), f.window_update(sid, 100_000))
    p.complete(sid)
    sent = [frame for frame in p.seen if frame.stream == sid]
    assert [frame.type for frame in sent if frame.type != f.DATA] == [f.HEADERS, f.HEADERS]
    assert sent[-1].type == f.HEADERS and sent[-1].end_stream
    assert sum(len(frame.payload) for frame in sent if frame.type == f.DATA) == 100_000
    assert p.lists[sid][-1] == [(b"x-sum", b"100000")]


def test_room(engine: str) -> None:
    """Queued data are refused politely, and the owner hears when there is room again."""
    p = EnginePeer("client", engine)
    sid = p.greet_and_request(b"POST", end=False)
    assert p.conn.room(sid)
    p.conn.send_data(sid, b"x" * 600_000)
    p.flush()
    assert not p.conn.room(sid)
    p.send(f.window_update(0, 1 << 20), f.window_update(sid, 1 << 20))
    assert p.events[-1] == ("room", sid)
    assert p.conn.room(sid)
    assert p.conn.ledger()["queued"] == 0


def test_streams_take_turns(engine: str) -> None:
    """A large body does not hold up a small one."""
    p = EnginePeer("client", engine)
    p.greet()
    large, small = (p.request(b"POST", end=False) for _ in range(2))
    p.send(f.window_update(0, 1 << 20), f.window_update(large, 1 << 20))
    p.conn.send_data(large, b"l" * 900_000, end=True)
    p.conn.send_data(small, b"s" * 40_000, end=True)
    p.flush()
    p.complete(small)
    before = sum(len(frame.payload) for frame in p.seen[: p.at] if frame.stream == large and frame.type == f.DATA)
    assert before < 600_000, f"{before} bytes of the large body went first"
    p.complete(large)


def test_no_new_request_after_a_final_goaway(engine: str) -> None:
    p = EnginePeer("server", engine)
    p.handshake_and_hold()
    p.send(p.get(1))
    p.conn.goaway(f.NO_ERROR, b"", final=False)
    p.send(p.get(3))
    p.conn.goaway(f.NO_ERROR, b"done", final=True)
    p.send(p.post(5), f.data(5, b"x" * 1000, end=True))
    p.flush()
    assert [event[1] for event in p.events if event[0] == "headers"] == [1, 3]
    p.send(f.window_update(1, 1000), f.window_update(3, 1000))
    p.complete(1)
    p.complete(3)
    last = [frame.last_stream for frame in p.seen if frame.type == f.GOAWAY]
    assert last == [f.MAX_WINDOW, 3]


def test_windows_grow(engine: str) -> None:
    p = EnginePeer("client", engine, stream_window=65535, connection_window=65535)
    sid = p.greet_and_request()
    p.conn.set_windows(200_000, 300_000)
    p.flush()
    p.until("SETTINGS", lambda frame: frame.type == f.SETTINGS and frame.settings == [(f.INITIAL_WINDOW_SIZE, 200_000)])
    p.until("WINDOW_UPDATE", lambda frame: frame.type == f.WINDOW_UPDATE and (frame.stream, frame.increment) == (0, 234_465))
    p.send(f.SETTINGS_ACK, ok(sid), *(f.data(sid, b"x" * 16384) for _ in range(12)))
    p.alive()
    assert sum(len(event[2]) for event in p.events if event[0] == "data") == 12 * 16384
