"""Every split offset and every truncation of every kind of frame, for both receivers."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwire._frames import EventConnection

from . import oracle as o
from . import pair

PAYLOAD = random.Random(1).randbytes(o.FRAGMENT_FROM)
Maker = Callable[[], EventConnection]


def fresh_client() -> EventConnection:
    return EventConnection(True)


def fresh_server() -> EventConnection:
    return EventConnection(False)


def open_client() -> EventConnection:
    return pair.client(streams=2)


def open_server() -> EventConnection:
    """Two requests are being handled; endpoint 0 has a name."""
    conn = pair.server()
    pair.feed(conn, o.request(0, name=b"a.b.c"), o.request(1))
    return conn


FRAMES: dict[str, tuple[Maker, bytes]] = {
    "client-HELLO": (fresh_client, o.PREFACE + o.encode(o.hello(software="s"))),
    "server-HELLO": (fresh_server, o.PREFACE + o.encode(o.hello(software="c", id=b"12345678", token="t"))),
    "client-GOAWAY-first": (fresh_client, o.PREFACE + o.encode(o.Frame(o.GOAWAY, 0, 2, 0, 0, b"go away"))),
    "client-DATA": (open_client, o.encode(o.item(0, b"payload"))),
    "client-DATA-empty": (open_client, o.encode(o.item(0))),
    "client-DATA-last": (open_client, o.encode(o.item(1, b"[1,2]", kind=2, last=True))),
    "client-DATA-inline-limit": (open_client, o.encode(o.item(1, PAYLOAD[:104]), o.item(1, PAYLOAD[:105]))),
    "client-END": (open_client, o.encode(o.Frame(o.END, stream=1))),
    "client-ERROR": (open_client, o.encode(o.Frame(o.ERROR, 0, 3, 1, 0, b"\x81\xa1c\xa1x"))),
    "client-ACCEPT": (open_client, o.encode(o.Frame(o.ACCEPT, stream=1))),
    "client-WINDOW": (open_client, o.encode(o.window(o.CONNECTION, 1000))),
    "client-PING": (open_client, o.encode(o.Frame(o.PING, 0, 0, 1, 2))),
    "client-PONG": (open_client, o.encode(o.Frame(o.PONG, 0, 0, 1, 2))),
    "client-GOAWAY": (open_client, o.encode(o.Frame(o.GOAWAY, 0, 0, 0, 2, b"bye"))),
    "client-optional": (open_client, o.encode(o.Frame(200, 255, 65535, 1, 2, b"later"), o.Frame(o.END, stream=0))),
    "server-REQUEST": (open_server, o.encode(o.request(2, b"payload"))),
    "server-REQUEST-empty": (open_server, o.encode(o.request(2))),
    "server-REQUEST-full": (
        open_server,
        o.encode(o.request(3, b"\xc3", endpoint=1, name=b"d.e", kind=1, meta=b"m", timeout_ms=9)),
    ),
    "server-CANCEL": (open_server, o.encode(o.cancel(0, o.STOP), o.cancel(1, o.KILL))),
    "server-WINDOW-stream": (open_server, o.encode(o.window(1, 1000))),
    "server-WINDOW-connection": (open_server, o.encode(o.window(o.CONNECTION, 1000))),
    "server-PING": (open_server, o.encode(o.Frame(o.PING, 0, 0, 1, 2))),
    "server-PONG": (open_server, o.encode(o.Frame(o.PONG, 0, 0, 1, 2))),
    "server-GOAWAY": (open_server, o.encode(o.Frame(o.GOAWAY, 0, 0, 0, 0, b"bye"))),
    "server-optional": (open_server, o.encode(o.Frame(128, body=b"x" * 40), o.cancel(1, o.STOP))),
    "server-late-CONT": (open_server, o.encode(o.Frame(o.CONT, stream=9, body=b"x" * 40), o.cancel(1, o.STOP))),
}
LARGE: dict[str, tuple[Maker, bytes]] = {
    "client-fragments": (
        open_client,
        o.encode(o.item(1, announce=len(PAYLOAD), last=True), *o.fragments(1, PAYLOAD, 65000), o.Frame(o.END, stream=0)),
    ),
    "server-fragments": (
        open_server,
        o.encode(o.request(2, announce=len(PAYLOAD), meta=b"m"), *o.fragments(2, PAYLOAD, 65000), o.cancel(0, o.STOP)),
    ),
}


def whole(make: Maker, data: bytes) -> tuple[list[pair.Event], bytes]:
    """Events, and what the receiver answers."""
    conn = make()
    found = conn.receive(data), conn.output()
    pair.close(conn)
    return found


@pytest.mark.parametrize("kind", [*FRAMES, *LARGE])
def test_every_cut_into_two_pieces(kind: str) -> None:
    make, data = (FRAMES | LARGE)[kind]
    want = whole(make, data)
    view = memoryview(data)
    for cut in range(1, len(data)):
        conn = make()
        assert (conn.receive(view[:cut]) + conn.receive(view[cut:]), conn.output()) == want, cut
        pair.close(conn)


@pytest.mark.parametrize("kind", [*FRAMES, *LARGE])
def test_one_byte_at_a_time(kind: str) -> None:
    make, data = (FRAMES | LARGE)[kind]
    conn = make()
    events = [event for i in range(len(data)) for event in conn.receive(data[i : i + 1])]
    assert (events, conn.output()) == whole(make, data)
    assert conn.buffered == 0


@pytest.mark.parametrize("kind", FRAMES)
def test_every_truncation(kind: str) -> None:
    """Without its last bytes a frame causes nothing, and no more than these bytes are kept."""
    make, data = FRAMES[kind]
    start = len(o.PREFACE) if data.startswith(o.PREFACE) else 0
    # the last frame is the one under test; those before it are complete
    last = start + sum(16 + len(f.body) for f in list(o.parse(data[start:]))[:-1])
    conn = make()
    before = conn.receive(data[:last])
    blocks = pair.in_use()
    for end in range(last, len(data)):
        conn = make()
        assert conn.receive(data[:end]) == before
        late = kind == "server-late-CONT"
        assert conn.buffered == (end - last if not late or end > last else 0)
        assert pair.in_use() == blocks


@pytest.mark.parametrize("kind", LARGE)
def test_every_truncation_of_a_fragmented_payload(kind: str) -> None:
    make, data = LARGE[kind]
    frames = list(o.parse(data))
    bounds = [0]
    for f in frames:
        bounds.append(bounds[-1] + 16 + len(f.body))
    conn = make()
    blocks = pair.in_use()[0]
    for end in range(1, bounds[-2]):  # cut anywhere before the last byte of the payload: byte by byte, then stop
        assert conn.receive(data[end - 1 : end]) == []
        assert conn.buffered < bounds[1]  # part of a header or of the announcement: the payload itself lands in its block
        assert pair.in_use()[0] - blocks == (end >= bounds[1])
    assert len(conn.receive(data[bounds[-2] - 1 : bounds[-2]])) == 1
    pair.close(conn)


def dialogue(rng: random.Random) -> tuple[list[o.Frame], list[o.Frame]]:
    """Random frames for a server and for a client: several streams, payloads of all sizes, fragments of streams mixed."""
    to_server: list[o.Frame] = []
    to_client: list[o.Frame] = []
    sizes = (0, 1, 103, 104, 105, 5000, 65535, 65536, 70000, 262143, 262144, 262145)
    queues: tuple[list[list[o.Frame]], list[list[o.Frame]]] = ([], [])
    for sid in range(rng.randint(1, 4)):
        payload = rng.randbytes(rng.choice(sizes))
        meta = rng.choice((None, b"", b"meta"))
        name = f"e{sid}".encode()
        kw = {"endpoint": sid, "name": name, "meta": meta, "kind": rng.randint(0, 2), "timeout_ms": rng.getrandbits(32)}
        if len(payload) < o.FRAGMENT_FROM:
            to_server.append(o.request(sid, payload, **kw))  # type: ignore[arg-type]
        else:
            to_server.append(o.request(sid, announce=len(payload), **kw))  # type: ignore[arg-type]
            queues[0].append(o.fragments(sid, payload, rng.choice((1000, 65536, 262144))))
        replies: list[o.Frame] = [o.Frame(o.ACCEPT, stream=sid)] if rng.random() < 0.3 else []
        for _ in range(rng.randint(0, 3)):
            payload = rng.randbytes(rng.choice(sizes))
            if len(payload) < o.FRAGMENT_FROM:
                replies.append(o.item(sid, payload, kind=rng.randint(0, 2)))
            else:
                replies.append(o.item(sid, announce=len(payload)))
                replies += o.fragments(sid, payload, rng.choice((1000, 65536, 262144, 1 << 20)))
        end = (o.Frame(o.END, stream=sid), o.Frame(o.ERROR, 0, 1, sid, 0, b"e"), o.item(sid, b"x", last=True))
        replies.append(rng.choice(end))
        queues[1].append(replies)
    for out, lists in zip((to_server, to_client), queues, strict=True):
        while any(lists):
            out.append(rng.choice([q for q in lists if q]).pop(0))
            if rng.random() < 0.1:
                out.append(o.Frame(o.PONG, 0, 0, rng.getrandbits(31), rng.getrandbits(32)))
            if rng.random() < 0.05:
                out.append(o.Frame(rng.randint(128, 255), 1, 2, 3, 4, b"new"))
    return to_server, to_client


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_random_dialogues_in_random_pieces(seed: int) -> None:
    """What the compiled codec makes of random frames, against the plain one."""
    rng = random.Random(seed)
    wide = o.hello(stream_window=1 << 30, connection_window=1 << 30)
    for role, frames in zip(("server", "client"), dialogue(rng), strict=True):
        server = role == "server"
        conn = pair.server(hello=wide) if server else pair.client(streams=4, hello=wide, stream_window=1 << 30)
        data = o.encode(*frames)
        events: list[pair.Event] = []
        at = 0
        while at < len(data):
            size = rng.choice((1, 2, 15, 16, 17, 100, 10000, 131072, 500000))
            events += conn.receive(data[at : at + size])
            at += size
        assert events == o.Assembler().feed(o.parse(data))
        assert conn.rx_bytes == len(data) + len(o.PREFACE) + len(o.encode(wide))
        pair.close(conn)
