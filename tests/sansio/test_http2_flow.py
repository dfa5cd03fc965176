"""Flow control: what was granted, what came and what is left have to agree at every step; windows below zero; settings."""

from __future__ import annotations

import random

import pytest

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

from . import h2pair as h


class Ledger:
    """What the peer of a connection knows of its windows, from frames only."""

    def __init__(self, conn: Http2Connection, window: int, full: int) -> None:
        self.conn = conn
        self.window = window
        self.full = full
        self.reader = f.FrameReader()
        self.initial = 65535
        self.connection = 65535
        self.streams: dict[int, int] = {}
        self.sent = 0

    def read(self) -> list[f.Frame]:
        out = list(self.reader.feed(self.conn.output()))
        for frame in out:
            if frame.type == f.WINDOW_UPDATE:
                if frame.stream == 0:
                    self.connection += frame.increment
                elif frame.stream in self.streams:
                    self.streams[frame.stream] += frame.increment
            elif frame.type == f.SETTINGS and not frame.ack:
                value = dict(frame.settings).get(f.INITIAL_WINDOW_SIZE, self.initial)
                for sid in self.streams:
                    self.streams[sid] += value - self.initial
                self.initial = value
        return out

    def send(self, sid: int, size: int, padding: int | None, end: bool) -> bytes:
        cost = size + (0 if padding is None else padding + 1)
        self.connection -= cost
        self.streams[sid] -= cost
        self.sent += cost
        return f.data(sid, bytes(size), pad=padding, end=end)

    def check(self) -> None:
        counters = self.conn.ledger()
        assert counters["granted"] == counters["received"] + counters["recv_window"]
        assert counters["received"] == self.sent
        assert counters["recv_window"] == self.connection >= 0
        for sid, stream in counters["streams"].items():
            assert stream["recv_window"] == self.streams[sid] >= 0
            assert 0 <= stream["unannounced"] < self.window
        assert counters["unannounced"] >= 0
        # nothing is lost: what is not in the window is unread or waits to be announced
        assert counters["recv_window"] + counters["unread"] + counters["unannounced"] == self.full


@pytest.mark.parametrize("seed", range(15))
def test_granted_is_received_plus_window_at_every_step(seed: int) -> None:
    rng = random.Random(seed)
    window, full = rng.choice([1000, 65535, 300000]), rng.choice([65535, 200000, 1 << 20])
    conn = Http2Connection("server", stream_window=window, connection_window=full)
    ledger = Ledger(conn, window, full)
    conn.start()
    conn.receive(f.PREFACE + f.settings())
    ledger.read()
    conn.receive(f.SETTINGS_ACK)
    next_id = 1
    unread: list[tuple[int, int]] = []
    for _ in range(400):
        action = rng.randrange(10)
        sids = list(ledger.streams)
        if action == 0 or not sids:
            conn.receive(f.headers(next_id, h.POST_BLOCK))
            ledger.streams[next_id] = ledger.initial
            next_id += 2
        elif action <= 5:
            sid = rng.choice(sids)
            padding = rng.choice([None, None, 0, 7, 255])
            room = min(ledger.connection, ledger.streams[sid], 16384) - (0 if padding is None else padding + 1)
            if room >= 0:
                end = rng.random() < 0.05
                data = ledger.send(sid, rng.randint(0, room), padding, end)
                cut = rng.randint(0, len(data))
                for event in conn.receive(data[:cut]) + conn.receive(data[cut:]):
                    assert event[0] == "data"
                    unread.append((event[1], len(event[2])))
                if end:  # ended streams are granted nothing, whatever is read later
                    del ledger.streams[sid]
                    conn.send_headers(sid, h.OK, True)
                    conn.events_now()
        elif action <= 8:
            if unread:
                sid, size = unread.pop(rng.randrange(len(unread)))
                taken = rng.randint(0, size)
                conn.consumed(sid, taken)
                if size > taken:
                    unread.append((sid, size - taken))
        else:
            sid = rng.choice(sids)
            del ledger.streams[sid]
            if rng.random() < 0.5:
                conn.reset(sid, f.CANCEL)
                assert conn.events_now() == [("closed", sid)]
                # on its way when the reset was sent; counts for the connection, and is given back at once
                size = min(ledger.connection, 500)
                ledger.connection -= size
                ledger.sent += size
                assert conn.receive(f.data(sid, bytes(size))) == []
            else:
                conn.receive(f.rst_stream(sid))
        ledger.read()
        ledger.check()
        assert not conn.dead


def test_windows_are_granted_again_at_half() -> None:
    conn = h.server(stream_window=1000, connection_window=65535)
    conn.receive(f.headers(1, h.POST_BLOCK) + f.data(1, bytes(1000)))
    conn.consumed(1, 499)
    assert h.frames(conn) == []
    conn.consumed(1, 1)
    assert [(frame.stream, frame.increment) for frame in h.frames(conn)] == [(1, 500)]


def test_the_connection_is_granted_again_at_half() -> None:
    conn = h.server(connection_window=70000)
    conn.receive(f.headers(1, h.POST_BLOCK) + f.data(1, bytes(70000)))
    conn.consumed(1, 34999)
    assert h.frames(conn) == []
    conn.consumed(1, 1)
    assert [(frame.stream, frame.increment) for frame in h.frames(conn)] == [(0, 35000)]


@pytest.mark.parametrize("pad", [None, 100])
def test_a_stream_that_ends_in_the_middle_of_a_frame(pad: int | None) -> None:
    """The rest of the frame is passed over, and counts for the connection."""
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK))
    data = f.data(1, bytes(1000), pad=pad)
    assert conn.receive(data[:500])[0][0] == "data"
    have = conn.ledger()["unread"]
    conn.reset(1, f.CANCEL)
    assert conn.events_now() == [("closed", 1)]
    assert conn.receive(data[500:] + f.ping(b"alright?")) == []
    assert h.frames(conn)[-1].payload == b"alright?"
    counters = conn.ledger()
    assert counters["unannounced"] == len(data) - 9 - have and counters["unread"] == have
    conn.consumed(1, have)
    assert conn.ledger()["unannounced"] == len(data) - 9


def test_nothing_is_granted_to_a_stream_that_has_ended() -> None:
    conn = h.server(stream_window=1000)
    conn.receive(f.headers(1, h.POST_BLOCK) + f.data(1, bytes(1000), end=True))
    conn.consumed(1, 1000)
    assert h.frames(conn) == []


def test_padding_is_given_back_at_once() -> None:
    conn = h.server(stream_window=1000, connection_window=65535)
    conn.receive(f.headers(1, h.POST_BLOCK) + f.data(1, bytes(400), pad=255) + f.data(1, b"", pad=243))
    assert [(frame.stream, frame.increment) for frame in h.frames(conn)] == [(1, 500)]


def test_data_beyond_a_stream_window_resets_the_stream() -> None:
    conn = h.server(stream_window=10)
    conn.receive(f.headers(1, h.POST_BLOCK) + f.headers(3, h.POST_BLOCK))
    events = conn.receive(f.data(1, bytes(11)) + f.data(3, bytes(10)))
    assert events == [("reset", 1, f.FLOW_CONTROL_ERROR, False), ("closed", 1), ("data", 3, bytes(10), False)]
    assert h.resets(conn) == [(1, f.FLOW_CONTROL_ERROR)]


def test_padding_counts_towards_the_window() -> None:
    conn = h.server(stream_window=10)
    conn.receive(f.headers(1, h.POST_BLOCK))
    assert conn.receive(f.data(1, bytes(5), pad=5))[0] == ("reset", 1, f.FLOW_CONTROL_ERROR, False)


def test_data_beyond_the_connection_window_is_the_end() -> None:
    conn = h.server(connection_window=65535)
    conn.receive(f.headers(1, h.POST_BLOCK) + f.data(1, bytes(65535)))
    assert h.error(conn, f.data(1, b"x"))[0] == f.FLOW_CONTROL_ERROR


def test_a_small_window_counts_from_the_acknowledgement_on() -> None:
    """RFC 9113 6.9.2: before it has read our SETTINGS, the peer may send 65,535 bytes on each stream."""
    conn = Http2Connection("server", stream_window=10)
    conn.start()
    conn.receive(f.PREFACE + f.settings() + f.headers(1, h.POST_BLOCK) + f.data(1, bytes(1000)))
    assert conn.ledger()["streams"][1]["recv_window"] == 64535
    conn.receive(f.SETTINGS_ACK)
    assert conn.ledger()["streams"][1]["recv_window"] == 10 - 1000
    # below zero: END_STREAM without bytes is still allowed
    assert conn.receive(f.data(1, b"", end=True)) == [("data", 1, b"", True)]


def test_windows_of_the_peer_go_below_zero_and_come_back() -> None:
    conn = h.server((f.INITIAL_WINDOW_SIZE, 100))
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.send_headers(1, h.OK)
    conn.send_data(1, bytes(200))
    assert [len(frame.payload) for frame in h.data_frames(conn)] == [100]
    conn.receive(f.settings((f.INITIAL_WINDOW_SIZE, 10)))
    assert conn.ledger()["streams"][1]["send_window"] == -90
    conn.receive(f.window_update(1, 90))
    assert h.data_frames(conn) == []
    conn.receive(f.window_update(1, 1))
    assert [len(frame.payload) for frame in h.data_frames(conn)] == [1]
    conn.receive(f.settings((f.INITIAL_WINDOW_SIZE, 1000)))
    assert [len(frame.payload) for frame in h.data_frames(conn)] == [99]


def test_a_window_that_was_taken_back_stops_a_stream_that_was_ready() -> None:
    conn = h.server((f.INITIAL_WINDOW_SIZE, 100))
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.send_headers(1, h.OK)
    conn.send_data(1, bytes(150))  # more than fits: queued
    conn.receive(f.settings((f.INITIAL_WINDOW_SIZE, 0)))
    assert h.data_frames(conn) == []
    assert conn.output() == b""


@pytest.mark.parametrize("sid", [0, 1])
def test_a_window_beyond_its_limit(sid: int) -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK))
    events = conn.receive(f.window_update(sid, f.MAX_WINDOW))
    if sid == 0:
        assert events[-1][:2] == ("error", f.FLOW_CONTROL_ERROR)
    else:
        assert events == [("reset", 1, f.FLOW_CONTROL_ERROR, False), ("closed", 1)]


def test_settings_may_not_take_a_window_beyond_its_limit() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK) + f.window_update(1, f.MAX_WINDOW - 65535))
    assert h.error(conn, f.settings((f.INITIAL_WINDOW_SIZE, 65536)))[0] == f.FLOW_CONTROL_ERROR


def test_our_windows_grow() -> None:
    conn = h.server(stream_window=1000, connection_window=65535)
    conn.receive(f.headers(1, h.POST_BLOCK))
    conn.set_windows(5000, 100000)
    sent = h.frames(conn)
    assert sent[0].settings == [(f.INITIAL_WINDOW_SIZE, 5000)]
    assert (sent[1].stream, sent[1].increment) == (0, 100000 - 65535)
    assert conn.receive(f.data(1, bytes(5000)))[-1] == ("data", 1, bytes(5000), False)
    assert conn.receive(f.SETTINGS_ACK) == [("settings_ack",)]
    conn.set_windows(10, 10)
    assert h.frames(conn) == []


def test_bodies_arrive_whole_through_small_windows() -> None:
    """Two engines, random sizes and a reader that lags: everything arrives, in order, and no window is exceeded."""
    rng = random.Random(5)
    client = Http2Connection("client", stream_window=3000, connection_window=65535)
    server = Http2Connection("server", stream_window=5000, connection_window=70000)
    client.start()
    server.start()
    h.exchange(client, server)
    bodies: dict[int, bytes] = {}
    for _ in range(20):
        sid = client.open_stream()
        assert sid is not None
        bodies[sid] = rng.randbytes(rng.choice([0, 1, 100, 4999, 5000, 20000, 100000]))
        client.send_headers(sid, h.POST)
        client.send_data(sid, bodies[sid], True)
    got: dict[int, bytes] = dict.fromkeys(bodies, b"")
    ended = set()
    unread: list[tuple[int, int]] = []
    while len(ended) < len(bodies):
        seen = h.exchange(client, server)[1]
        for event in seen:
            if event[0] == "data":
                got[event[1]] += event[2]
                unread.append((event[1], len(event[2])))
                if event[3]:
                    ended.add(event[1])
        assert seen or unread, "nothing moves any more"
        rng.shuffle(unread)
        for _ in range(1 + len(unread) // 2):
            if unread:
                server.consumed(*unread.pop())
    assert got == bodies
