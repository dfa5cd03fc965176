"""However the bytes are cut, the events and the answers are the same."""

from __future__ import annotations

import random

import pytest

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

from . import h2pair as h

LONG = f.block([*h.POST, (b"x-long", b"v" * 1000)])


def server_script(rng: random.Random) -> bytes:
    """What a client may send, errors included; about one in three scripts ends in a connection error."""
    out = [f.PREFACE, f.settings((f.INITIAL_WINDOW_SIZE, 70000)), f.SETTINGS_ACK]
    open_: list[int] = []
    sid = 1
    for _ in range(rng.randint(5, 40)):
        kind = rng.randrange(12)
        if kind <= 3 or not open_:
            end = rng.random() < 0.3
            pad = rng.choice([None, None, 0, 200])
            priority = rng.choice([b"", b"", f.priority_fields(0), f.priority_fields(sid)])
            block = rng.choice([h.POST_BLOCK, h.POST_BLOCK, LONG, f.block(h.POST[:2])])
            if rng.random() < 0.3:
                cuts = sorted(rng.sample(range(len(block)), 2))
                out.append(f.headers(sid, block[: cuts[0]], end=end, end_headers=False, pad=pad, priority=priority))
                out.append(f.continuation(sid, block[cuts[0] : cuts[1]], end_headers=False))
                out.append(f.continuation(sid, block[cuts[1] :]))
            else:
                out.append(f.headers(sid, block, end=end, pad=pad, priority=priority))
            if not end:
                open_.append(sid)
            sid += 2
        elif kind <= 7:
            end = rng.random() < 0.2
            target = rng.choice(open_)
            out.append(f.data(target, rng.randbytes(rng.choice([0, 1, 50, 3000])), end=end, pad=rng.choice([None, 0, 100])))
            if end:
                open_.remove(target)
        elif kind == 8:
            out.append(f.headers(open_.pop(), f.block(h.TRAILERS), end=True))
        elif kind == 9:
            out.append(rng.choice([f.ping(b"12345678"), f.settings((f.MAX_FRAME_SIZE, 20000)), f.frame(99, 1, 5, b"unknown")]))
        elif kind == 10:
            out.append(f.rst_stream(open_.pop(), f.CANCEL))
        else:
            out.append(rng.choice([f.window_update(0, 100), f.window_update(open_[0], 100), f.priority(sid), f.goaway(0)]))
    if rng.random() < 0.3:
        out.append(rng.choice([f.data(0), f.ping(bytes(7)), f.settings((f.ENABLE_PUSH, 2)), f.rst_stream(sid + 100)]))
        out.append(f.ping())
    return b"".join(out)


def client_script(rng: random.Random) -> bytes:
    """What a server may answer to three POST requests."""
    out = [f.settings((f.MAX_CONCURRENT_STREAMS, 10)), f.SETTINGS_ACK]
    for sid in (1, 3, 5):
        for _ in range(rng.randrange(3)):
            out.append(f.headers(sid, f.block([(b":status", b"103")])))
        out.append(f.headers(sid, f.block([*h.OK, (b"content-type", b"text/plain")])))
        for _ in range(rng.randrange(4)):
            out.append(f.data(sid, rng.randbytes(rng.randrange(200)), pad=rng.choice([None, 9])))
        out.append(rng.choice([f.data(sid, b"", end=True), f.headers(sid, f.block(h.TRAILERS), end=True), f.rst_stream(sid)]))
    out.append(f.goaway(3, f.NO_ERROR, b"bye" * rng.choice([0, 1, 1000])))
    out.append(rng.choice([b"", f.headers(2, h.OK_BLOCK), f.data(7), f.headers(5, b"\xff\xff\xff\xff\xff\xff")]))
    return b"".join(out)


def run(role: str, pieces: list[bytes]) -> tuple[list[h.Event], bytes]:
    conn = Http2Connection(role)
    conn.start()
    if role == "client":
        for _ in range(3):
            h.opened(conn)
    conn.output()
    events: list[h.Event] = []
    for piece in pieces:
        for event in conn.receive(piece):
            events.append(event)
            if event[0] == "data":
                conn.consumed(event[1], len(event[2]))
    return h.joined(events), conn.output()


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    places = sorted(rng.sample(range(len(data) + 1), min(len(data), rng.choice([1, 3, 30]))))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("seed", range(10))
def test_events_do_not_depend_on_cuts(role: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        data = server_script(rng) if role == "server" else client_script(rng)
        whole = run(role, [data])
        assert len(whole[0]) >= 2
        assert run(role, [data[i : i + 1] for i in range(len(data))]) == whole
        for _ in range(5):
            assert run(role, cut(data, rng)) == whole


def test_every_cut_of_every_kind_of_frame() -> None:
    data = b"".join(
        [
            f.PREFACE, f.settings((f.MAX_FRAME_SIZE, 20000)), f.SETTINGS_ACK, f.headers(1, h.POST_BLOCK, pad=3),
            f.headers(3, h.POST_BLOCK[:9], end_headers=False, priority=f.priority_fields(0)), f.continuation(3, h.POST_BLOCK[9:]),
            f.data(1, b"abc", pad=2), f.data(1, b"", pad=0), f.ping(), f.window_update(0, 5), f.priority(9),
            f.frame(77, 0, 0, b"unknown"), f.rst_stream(3), f.headers(1, f.block(h.TRAILERS), end=True), f.goaway(0, 0, b"bye"),
        ]
    )  # fmt: skip
    whole = run("server", [data])
    assert [event[0] for event in whole[0]] == [
        "settings", "settings_ack", "headers", "headers", "data", "reset", "closed", "headers", "goaway",
    ]  # fmt: skip
    for i in range(1, len(data)):
        assert run("server", [data[:i], data[i:]]) == whole


def test_a_large_frame_arrives_in_pieces_and_is_not_stored() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK))
    data = f.data(1, bytes(1 << 20))
    sizes = []
    for at in range(0, len(data), 10000):
        for event in conn.receive(data[at : at + 10000]):
            sizes.append(len(event[2]))
            conn.consumed(1, len(event[2]))
    assert sum(sizes) == 1 << 20 and max(sizes) <= 10000
