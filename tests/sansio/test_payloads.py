"""Large payloads: fragments, overtaking, landing in their own memory, sending from the caller's."""

from __future__ import annotations

import random

import pytest

from . import oracle as o
from . import pair

SIZES = (0, 1, 104, 105, 65534, 65535, 65536, 65537, 131072, 262143, 262144, 262145, 524287, 524288, 524289, 3 << 18, 1_000_003)


@pytest.mark.parametrize("size", SIZES)
def test_round_trip(size: int) -> None:
    rng = random.Random(size)
    payload = rng.randbytes(size)
    p = pair.Pair(rng=rng)
    sid = p.client.request("a.b", payload, kind=1, meta=b"m", timeout_ms=5)
    assert p.to_server() == [("request", sid, "a.b", payload, 1, b"m", 5)]
    assert p.server.send_item(sid, payload, kind=2)
    p.client.receive(b"")
    assert p.to_client() == [("item", sid, payload, 2, False)]
    assert p.server.send_item(sid, payload[::-1], last=True) is (size < 262144 - 64)  # the stream's window
    sent = [f for f in o.parse(p.sent_to_server) if f.type == o.CONT]
    assert [len(f.body) for f in sent] == ([] if size < o.FRAGMENT_FROM else [len(payload[i : i + o.FRAGMENT_BYTES])
                                           for i in range(0, size, o.FRAGMENT_BYTES)])  # fmt: skip


@pytest.mark.parametrize("fragment", [1, 7, 65535, 65536, 65537, 262144, o.FRAME_LIMIT - 1, o.FRAME_LIMIT])
def test_any_fragment_size_up_to_the_limit_is_accepted(fragment: int) -> None:
    payload = random.Random(fragment).randbytes(70001 if fragment < 65535 else 2_100_001)
    conn = pair.server()
    events = pair.feed(conn, o.request(0, name=b"a", announce=len(payload)), *o.fragments(0, payload, fragment))
    assert events == [("request", 0, "a", payload, 0, None, 0)]


def test_fragments_of_several_streams_take_turns() -> None:
    p = pair.Pair()
    payloads = [bytes([i]) * 1_000_000 for i in range(3)]
    for payload in payloads:
        p.client.request("a.b", payload)
    events = p.to_server()
    order = [f.stream for f in o.parse(p.sent_to_server) if f.type == o.CONT]
    assert order == [0, 1, 2] * 4
    assert [(e[1], e[3]) for e in events if e[0] == "request"] == list(enumerate(payloads))


@pytest.mark.parametrize("written", [0, 1, 16, 17, 100_000, 262144, 262160, 262161, 500_000])
def test_a_small_call_overtakes_a_large_one_after_at_most_one_fragment(written: int) -> None:
    """``written`` bytes of the large one are out when the small one is made."""
    p = pair.Pair()
    p.client.request("a.b", b"L" * 2_000_000)
    data = b""
    while len(data) < written:
        data += p.client.output(limit=written - len(data))
    assert len(data) == written
    p.client.request("a.b", b"small")
    data += p.client.output()
    after = 0
    for f in o.parse(data):
        if f.type == o.REQUEST and f.stream == 1:
            break
        after += 16 + len(f.body)
    else:
        raise AssertionError("the small request is missing")
    assert after <= max(written, 64) + o.FRAGMENT_BYTES + 16
    events = p.server.receive(data) + p.settle()[0]  # the rest of the large one follows as the server reads
    assert [e[1] for e in events if e[0] == "request"] == [1, 0]


def test_a_small_item_overtakes_a_large_one() -> None:
    p = pair.Pair()
    big, small = (p.client.request("a.b", b"") for _ in range(2))
    p.to_server()
    p.server.send_item(big, b"L" * 2_000_000, last=True)
    first = p.server.output(limit=10)
    p.server.send_item(small, b"s", last=True)
    events = p.client.receive(first + p.server.output()) + p.settle()[1]
    assert [e[1] for e in events if e[0] == "item"] == [small, big]


@pytest.mark.parametrize("size", [65536, 1_000_000, 16 << 20])
def test_received_into_its_own_memory(size: int) -> None:
    """No copy in user space: the kernel writes where the payload's bytes lie in the end."""
    conn = pair.server()
    blocks, used = pair.in_use()
    payload = random.Random(size).randbytes(size)
    head = o.encode(o.request(0, name=b"a", announce=size))
    assert conn.receive(head) == []
    assert pair.in_use()[0] == blocks + 1 and pair.in_use()[1] - used >= size
    places = []
    done = 0
    for f in o.fragments(0, payload):
        address, room = conn.target()
        assert room == 16, "the next header and nothing behind it"
        conn.receive(o.encode(f)[:16])
        address, room = conn.target()
        assert room == len(f.body)
        places.append((address, done))
        events = conn.receive(f.body[:1000])
        assert conn.target() == (address + 1000, room - 1000)
        events += conn.receive(f.body[1000:])
        done += len(f.body)
    assert len(events) == 1 and events[0][3] == payload
    final = conn.last_payload.address
    assert [address - final for address, _ in places] == [offset for _, offset in places]
    assert bytes(conn.last_payload) == payload
    assert conn.landed_bytes == size
    assert pair.in_use()[0] == blocks + 1, "the payload's block and no other"
    pair.close(conn)


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("size", [65536, 200_000, 3_000_000])
def test_landed_bytes_are_all_but_what_came_with_the_header(role: str, size: int) -> None:
    payload = b"p" * size
    if role == "server":
        conn, head = pair.server(), o.request(0, name=b"a", announce=size)
    else:
        conn, head = pair.client(streams=1), o.item(0, announce=size)
    frames = o.fragments(0, payload)
    conn.receive(b"")
    first = 131072  # the staging buffer: what one read can bring before the codec knows that a large payload comes
    data = o.encode(head, *frames)
    with_header = min(first, len(data)) - len(o.encode(head)) - 16
    assert len(conn.receive(data)) == 1
    assert conn.landed_bytes == size - min(with_header, len(frames[0].body))


def test_a_small_frame_between_fragments_is_read_without_taking_fragment_bytes() -> None:
    """While a payload arrives, nothing behind the next frame is read into the staging buffer."""
    conn = pair.server()
    payload = b"p" * 600_000
    one, two, three = o.fragments(0, payload)
    small = o.request(1, b"small" * 50)
    data = o.encode(o.request(0, name=b"a", announce=len(payload)), small, one, small._replace(stream=2), two, three)
    head = 16 + 7
    conn.receive(data[:head])
    rest = data[head:]
    while rest:
        room = conn.target()[1]
        conn.receive(rest[:room])
        rest = rest[room:]
    assert conn.landed_bytes == len(payload)
    assert bytes(conn.last_payload) == payload
    pair.close(conn)


@pytest.mark.parametrize("role", ["client", "server"])
def test_sent_from_the_callers_memory(role: str) -> None:
    """By reference: the bytes that leave are those the object has when they leave, and it cannot shrink until then."""
    p = pair.Pair()
    payload = bytearray(b"a" * 600_000)
    if role == "client":
        source, sink = p.client, p.server
        sid = p.client.request("a.b", payload)
    else:
        source, sink = p.server, p.client
        sid = p.client.request("a.b", b"")
        p.to_server()
        assert p.server.send_item(sid, payload)
        assert p.server.stream(sid).sending
    with pytest.raises(BufferError):
        payload.append(0)
    payload[-1] = 0x7A
    data = source.output(limit=300_000)
    with pytest.raises(BufferError):
        payload.append(0)
    payload[-2] = 0x79
    while piece := source.output(limit=300_000):
        data += piece
    assert source.events[-1] == ("sent", sid)
    payload.append(0)  # released with the last byte
    if role == "server":
        assert not source.stream(sid).sending
    (event,) = sink.receive(data)
    received = event[3] if role == "client" else event[2]
    assert received == bytes(payload[:-1]) and received.endswith(b"ayz")


def test_one_write_names_frames_and_a_fragment_as_separate_pieces() -> None:
    """One byte more than the frames is one byte of the fragment: they leave in one write without being joined."""
    p = pair.Pair()
    payload = bytearray(300_000)
    p.client.request("a.b", payload)
    whole = 16 + 2 + 3 + 4 + 16 + o.FRAGMENT_BYTES
    assert len(p.client.output(limit=1 << 20)) == whole


def test_a_small_payload_is_copied_at_once() -> None:
    p = pair.Pair()
    payload = bytearray(b"a" * 65535)
    p.client.request("a.b", payload)
    payload.clear()
    ((*_, received, _, _, _),) = p.to_server()
    assert received == b"a" * 65535


@pytest.mark.parametrize("cuts", range(12))
def test_partial_writes(cuts: int) -> None:
    """Whatever a write accepts, the bytes are the same."""
    rng = random.Random(cuts)
    payloads = [rng.randbytes(rng.choice((10, 65535, 65536, 300_000, 600_000))) for _ in range(5)]
    p = pair.Pair(rng=rng)
    for payload in payloads:
        p.client.request("a.b", payload)
    events = [e for e in p.settle()[0] if e[0] == "request"]
    assert {e[1]: e[3] for e in events} == dict(enumerate(payloads))


def test_dropped_uploads_release_the_memory() -> None:
    p = pair.Pair()
    blocks = pair.in_use()
    payload = bytearray(600_000)
    sid = p.client.request("a.b", payload)
    data = p.client.output(limit=1000)
    p.client.cancel(sid, o.KILL)
    data += p.client.output()
    payload.append(0)
    frames = list(o.parse(data))
    assert [(f.type, len(f.body)) for f in frames] == [(o.REQUEST, 9), (o.CONT, o.FRAGMENT_BYTES), (o.CANCEL, 0)]
    assert [f.body[5:] for f in frames[:1]] == [len(payload[:-1]).to_bytes(4, "little")]
    assert p.server.receive(data) == []
    assert pair.in_use() == blocks


def test_payloads_outlive_their_connection() -> None:
    conn = pair.server()
    blocks = pair.in_use()
    payload = b"p" * 70_000
    pair.feed(conn, o.request(0, name=b"a", announce=len(payload)), *o.fragments(0, payload))
    kept = memoryview(conn.last_payload)
    conn.send_end(0)
    del conn
    assert bytes(kept) == payload
    kept.release()
    assert pair.in_use() == blocks


# --- beside small messages: what is in the socket's buffers cannot be overtaken ----------------------------------------------

MARK = 0x80000000
POLITE_FRAGMENT = 131072
POLITE_IN_FLIGHT = 524288


def beside_small_items(size: int) -> tuple[pair.Pair, int, int]:
    """The server has just sent a small item on one stream and starts a large one on another."""
    p = pair.Pair(client={"stream_window": 1 << 30})
    large, small = (p.client.request("a.b", b"") for _ in range(2))
    assert large is not None and small is not None
    p.to_server()
    p.server.send_item(small, b"s")
    p.server.send_item(large, b"L" * size)
    return p, large, small


def test_large_payloads_are_polite_while_small_items_leave() -> None:
    """Smaller fragments, and a limit on what the peer has not read yet, which it confirms by answering PINGs."""
    p, large, _ = beside_small_items(2_000_000)
    sent = confirmed = 0
    done: list[pair.Event] = []
    while not done:
        data = p.server.output()
        assert data, "nothing left to send, and the item has not arrived"
        for f in o.parse(data):
            assert f.type != o.CONT or len(f.body) <= POLITE_FRAGMENT
            sent += len(f.body) if f.type == o.CONT else 0
            assert sent - confirmed <= POLITE_IN_FLIGHT
        done = [e for e in p.client.receive(data) if e[:2] == ("item", large)]
        pongs = p.client.output()
        confirmed = max(f.arg for f in o.parse(pongs) if f.type == o.PONG and f.stream == MARK)
        assert p.server.receive(pongs) in ([], [("sent", large)])
    assert done[0][2] == b"L" * 2_000_000


def test_large_payloads_run_freely_a_moment_later() -> None:
    p, _, _ = beside_small_items(2_000_000)
    p.server.on_time(1.0)
    frames = list(o.parse(p.server.output()))
    assert [len(f.body) for f in frames if f.type == o.CONT] == [o.FRAGMENT_BYTES] * 7 + [2_000_000 - 7 * o.FRAGMENT_BYTES]
    assert not [f for f in frames if f.type == o.PING]


def test_a_late_pong_does_not_stop_large_payloads() -> None:
    """PINGs of a polite phase are answered after a free one; then small items go on, and the large payload never does."""
    p, large, small = beside_small_items(8_000_000)
    data = p.server.output(limit=150_000)  # polite: a fragment and, queued, the PING behind it
    p.server.on_time(1.0)
    while len(data) < 5_000_000:  # free: nothing to confirm
        data += p.server.output(limit=1_000_000)
    events = p.client.receive(data, 1.0)
    p.server.receive(p.client.output(), 1.0)  # the late PONG
    for i in range(200):  # a small item every 10 ms
        clock = 1.0 + i / 100
        p.server.on_time(clock)
        p.server.send_item(small, b"s")
        events += p.client.receive(p.server.output(), clock)
        p.server.receive(p.client.output(), clock)
    arrived = ("item", large, b"L" * 8_000_000, 0, False) in events
    pair.close(p.server)
    assert arrived
