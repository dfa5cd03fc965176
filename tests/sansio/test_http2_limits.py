"""Attacks: each ends with the right code, soon, and within bounded memory. And what must not be taken for one."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

from . import h2pair as h

Attack = Callable[[], Iterator[bytes]]


def rapid_reset() -> Iterator[bytes]:
    """CVE-2023-44487"""
    for sid in range(1, 100000, 2):
        yield f.headers(sid, h.GET_BLOCK, end=True) + f.rst_stream(sid)


def made_to_reset(provoke: Callable[[int], bytes], end: bool = False) -> Attack:
    """CVE-2025-8671: the server resets each stream itself."""

    def attack() -> Iterator[bytes]:
        for sid in range(1, 100000, 2):
            yield f.headers(sid, h.POST_BLOCK, end=end) + provoke(sid)

    return attack


def malformed_requests() -> Iterator[bytes]:
    block = f.block(h.GET[1:])
    for sid in range(1, 100000, 2):
        yield f.headers(sid, block, end=True)


def large_requests() -> Iterator[bytes]:
    """Answered 414 each; ended, so that there is nothing to reset."""
    block = f.block([*h.GET[:3], (b":path", b"/" + b"a" * 8192)])
    for sid in range(1, 100000, 2):
        yield f.headers(sid, block, end=True)


def too_many_streams() -> Iterator[bytes]:
    for sid in range(1, 100000, 2):
        yield f.headers(sid, h.POST_BLOCK)


def continuations() -> Iterator[bytes]:
    """CVE-2024-27316"""
    yield f.headers(1, h.GET_BLOCK, end_headers=False)
    while True:
        yield f.continuation(1, b"", end_headers=False)


def long_continuations() -> Iterator[bytes]:
    yield f.headers(1, h.GET_BLOCK, end_headers=False)
    while True:
        yield f.continuation(1, bytes(100000), end_headers=False)


def hpack_bomb() -> Iterator[bytes]:
    """One entry of 4,000 bytes, then a byte for each time that it is used again: 400,000 bytes of fields."""
    yield f.headers(1, f.block(h.GET) + f.literal(b"x", b"v" * 4000, f.INDEXING) + f.indexed(62) * 100, end=True)


def repeated(*frames: bytes, first: bytes = b"") -> Attack:
    def attack() -> Iterator[bytes]:
        yield first
        while True:
            yield from frames

    return attack


OPEN = f.headers(1, h.POST_BLOCK)
ENDED = f.headers(1, h.POST_BLOCK) + f.rst_stream(1)

# attack, text of the GOAWAY, frames that are enough, limits
ATTACKS: dict[str, tuple[Attack, str, int, dict[str, int]]] = {
    "rapid-reset": (rapid_reset, "too_many_resets", 1001, {}),
    "zero-increment": (made_to_reset(lambda sid: f.window_update(sid, 0)), "too_many_internal_resets", 1001, {}),
    "window-overflow": (made_to_reset(lambda sid: f.window_update(sid, f.MAX_WINDOW)), "too_many_internal_resets", 1001, {}),
    "depends-on-itself": (made_to_reset(lambda sid: f.priority(sid, sid)), "too_many_internal_resets", 1001, {}),
    "bad-priority": (made_to_reset(lambda sid: f.frame(f.PRIORITY, 0, sid, b"1234")), "too_many_internal_resets", 1001, {}),
    "data-after-end": (made_to_reset(lambda sid: f.data(sid, b"x"), end=True), "too_many_internal_resets", 1001, {}),
    "headers-after-end": (made_to_reset(lambda sid: f.headers(sid, h.GET_BLOCK), end=True), "too_many_internal_resets", 1001, {}),
    "malformed-requests": (malformed_requests, "too_many_internal_resets", 1001, {}),
    "large-requests": (large_requests, "too_many_bad_requests", 10001, {}),
    "too-many-streams": (too_many_streams, "too_many_internal_resets", 2001, {}),
    "continuations": (continuations, "too_many_continuations", 10, {}),
    "long-continuations": (long_continuations, "header_list_way_too_large", 4, {}),
    "hpack-bomb": (hpack_bomb, "header_list_way_too_large", 1, {}),
    "settings": (repeated(f.settings()), "too_many_settings", 10020, {}),
    "settings-entries": (repeated(f.settings(*[(99, 0)] * 33)), "too_many_settings", 2, {}),
    "pings": (repeated(f.ping()), "too_many_pings", 10020, {}),
    "ping-acks": (repeated(f.ping(ack=True)), "too_many_pings", 10020, {}),
    "empty-data": (repeated(f.data(1), first=OPEN), "too_many_data_frames", 102, {}),
    "padding-only": (repeated(f.data(1, pad=20), first=OPEN), "too_many_data_frames", 102, {}),
    "priorities": (repeated(f.priority(5)), "too_many_priorities", 10020, {}),
    "window-updates": (repeated(f.window_update(0, 1)), "too_many_window_updates", 10020, {}),
    "window-updates-on-a-stream": (repeated(f.window_update(1, 1), first=OPEN), "too_many_window_updates", 10020, {}),
    "unknown-frames": (repeated(f.frame(99, 0, 0, b"x")), "too_many_unknown_frames", 10020, {}),
    "frames-on-a-closed-stream": (
        repeated(f.window_update(1, 1), first=ENDED), "too_many_frames_on_closed_streams", 10020, {},
    ),
    "goaways": (repeated(f.goaway()), "too_many_goaways", 10020, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end(name: str) -> None:
    attack, text, enough, limits = ATTACKS[name]
    conn = h.server(**limits)
    memory = 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for count, data in enumerate(attack(), 1):
            events = conn.receive(data)
            conn.output()
            if conn.dead:
                break
            assert count <= enough, f"still going on after {count} pieces"
        memory = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert events[-1] == ("error", f.ENHANCE_YOUR_CALM, text)
    assert count >= enough - 20
    assert memory < 2_000_000


@pytest.mark.parametrize(
    ("data", "limit"),
    [(f.ping(), 1001), (f.settings(), 1001), (f.window_update(1, 0), 1001)],
    ids=["pings", "settings", "resets"],
)
def test_a_peer_that_does_not_read_its_answers(data: bytes, limit: int) -> None:
    """400,000 unread answers were no problem for h2; memory was."""
    conn = h.server(glitches=1 << 30, resets=1 << 30)
    sid = 1
    for count in range(1, 2000):
        if data == f.window_update(1, 0):
            piece = f.headers(sid, h.POST_BLOCK) + f.window_update(sid, 0)
            sid += 2
        else:
            piece = data
        events = conn.receive(piece)
        if count == 500:
            conn.chunks()  # half of them are being written, and stay there
        if conn.dead:
            break
    assert events[-1] == ("error", f.ENHANCE_YOUR_CALM, "too_many_unread_answers")
    assert count == limit
    assert conn.ledger()["backlog"] < 30000


def test_answers_that_were_written_do_not_count() -> None:
    conn = h.server(glitches=1 << 30)
    for _ in range(5000):
        conn.receive(f.ping())
        conn.output()
    assert not conn.dead


def test_buckets_fill_again() -> None:
    conn = h.server()
    now, sid = 1000.0, 1
    for _ in range(1000):
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True) + f.rst_stream(sid), now)
        sid += 2
    for _ in range(20):
        now += 1.0
        for _ in range(33):
            conn.receive(f.headers(sid, h.GET_BLOCK, end=True) + f.rst_stream(sid), now)
            conn.output()
            sid += 2
    assert not conn.dead
    events = conn.receive(f.headers(sid, h.GET_BLOCK, end=True) + f.rst_stream(sid), now)
    assert events[-1] == ("error", f.ENHANCE_YOUR_CALM, "too_many_resets")


def reset_all(conn: Http2Connection, first: int, count: int, now: float = 0.0) -> int:
    """How many of these streams can be opened and reset at once before the connection ends."""
    for number in range(count):
        sid = first + 2 * number
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True) + f.rst_stream(sid), now)
        conn.output()
        if conn.dead:
            return number
    return count


def test_giving_up_what_has_been_answered_is_free() -> None:
    """A client that reads the beginning of its streams: more of them than any budget has."""
    conn = h.server()
    for sid in range(1, 10_001, 2):
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True))
        conn.send_headers(sid, h.OK)
        conn.send_data(sid, b"first item")
        conn.output()
        assert ("reset", sid, f.CANCEL, True) in conn.receive(f.rst_stream(sid))
    assert reset_all(conn, 10_001, 2000) == 1000, "the budget is untouched, and there still is one"


def test_a_reset_after_the_end_is_free() -> None:
    conn = h.server()
    for sid in range(1, 10_001, 2):
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True))
        conn.send_headers(sid, h.OK, True)
        conn.output()
        assert ("reset", sid, f.CANCEL, True) not in conn.receive(f.rst_stream(sid))
    assert reset_all(conn, 10_001, 2000) == 1000


def test_giving_up_after_a_second_is_free() -> None:
    """Deadlines of callers that a slow handler has not answered in time."""
    conn = h.server()
    now, sid = 0.0, 1
    for _ in range(20):
        sids = range(sid, sid + 1000, 2)
        conn.receive(b"".join(f.headers(sid, h.GET_BLOCK, end=True) for sid in sids), now)
        now += 1.0
        conn.receive(b"".join(f.rst_stream(sid) for sid in sids), now)
        sid += 1000
    assert not conn.dead and conn.live == 0
    assert reset_all(conn, sid, 2000, now) == 1000


def test_less_to_begin_with() -> None:
    """What a server does with peers from where it was abused; the budgets fill up at the usual rate."""
    assert reset_all(h.server(leniency=1 / 16), 1, 2000) == 62
    conn = Http2Connection("server", leniency=1 / 16)
    conn.start(1000.0)
    conn.receive(f.PREFACE + f.settings() + f.SETTINGS_ACK, 1000.0)
    assert reset_all(conn, 1, 2000, 1010.0) == 62 + 330


def test_a_handler_keeps_its_slot_until_it_has_stopped() -> None:
    conn = h.server(max_concurrent_streams=2, auto_release=False)
    for sid in (1, 3):
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True) + f.rst_stream(sid))
    assert conn.live == 2
    assert conn.receive(f.headers(5, h.GET_BLOCK, end=True)) == []
    assert h.resets(conn) == [(5, f.REFUSED_STREAM)]
    conn.release(1)
    conn.release(1)
    assert conn.live == 1
    assert conn.receive(f.headers(7, h.GET_BLOCK, end=True))[0][0] == "headers"


def test_a_stream_released_before_it_has_ended() -> None:
    conn = h.server(max_concurrent_streams=1, auto_release=False)
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.release(1)
    assert conn.live == 1
    conn.receive(f.rst_stream(1))
    assert conn.live == 0


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (b"431", [*h.GET, (b"x", b"v" * 65536)]),
        (b"431", [*h.GET, *[(b"x-%d" % i, b"v") for i in range(97)]]),
        (b"414", [*h.GET[:3], (b":path", b"/" + b"a" * 8192)]),
    ],
    ids=["bytes", "fields", "path"],
)
def test_requests_that_are_too_large_are_answered(status: bytes, fields: list[h.Field], end: bool) -> None:
    conn = h.server()
    assert conn.receive(f.headers(1, f.block(fields), end=end)) == []
    out = h.frames(conn)
    assert [(frame.type, frame.stream) for frame in out] == [(f.HEADERS, 1), (f.RST_STREAM, 1)][: 1 if end else 2]
    assert out[0].end_stream and status in out[0].payload
    assert end or out[1].code == f.NO_ERROR
    assert conn.live == 0
    # the rest of the request was on its way
    assert conn.receive(f.ping() if end else f.data(1, bytes(1000))) == []
    assert conn.receive(f.headers(3, h.GET_BLOCK, end=True))[0][0] == "headers"


def test_just_small_enough() -> None:
    conn = h.server()
    used = sum(len(name) + len(value) + 32 for name, value in h.GET)
    fields = [*h.GET, (b"x", b"v" * (65536 - used - 33))]
    assert conn.receive(f.headers(1, f.block(fields), end=True))[0][2] == fields
    fields = [*h.GET, *[(b"x-%d" % i, b"v") for i in range(96)]]
    assert conn.receive(f.headers(3, f.block(fields), end=True))[0][2] == fields
    fields = [*h.GET[:3], (b":path", b"/" + b"a" * 8191)]
    assert conn.receive(f.headers(5, f.block(fields), end=True))[0][2] == fields


def test_trailers_count_against_the_list_limit() -> None:
    large = f.block([(b"x", b"v" * 65536)])
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK) + f.headers(3, h.POST_BLOCK))
    conn.send_headers(3, h.OK)
    conn.output()
    conn.receive(f.headers(1, large, end=True))
    out = h.frames(conn)
    assert out[0].type == f.HEADERS and b"431" in out[0].payload
    conn.receive(f.headers(3, large, end=True))
    assert h.resets(conn) == [(3, f.ENHANCE_YOUR_CALM)]
    client = h.client()
    sid = h.opened(client)
    assert client.receive(f.headers(sid, f.block(h.OK) + large))[-2:] == [
        ("reset", sid, f.ENHANCE_YOUR_CALM, False), ("closed", sid),
    ]  # fmt: skip


def test_100000_tiny_frames_that_are_read_slowly() -> None:
    """Tokens: no peer may be closed for sending them while our application is busy."""
    conn = h.server()
    conn.receive(f.headers(1, h.POST_BLOCK))
    rng = random.Random(1)
    unread = sent = 0
    for _ in range(1000):
        batch = b"".join(f.data(1, b"x" * rng.randint(1, 60)) for _ in range(100))
        window = conn.ledger()["streams"][1]["recv_window"]
        if window < 6000:
            conn.consumed(1, unread)  # not before the peer's window is used up
            unread = 0
        events = conn.receive(batch)
        conn.output()
        unread += sum(len(event[2]) for event in events)
        sent += len(events)
        assert not conn.dead
    assert sent == 100000


def test_three_answers_in_tokens_of_which_nothing_is_read() -> None:
    """All of it fits the windows, so it may come; the engine keeps nothing of it."""
    conn = h.client()
    sids = [h.opened(conn, end=True) for _ in range(3)]
    for sid in sids:
        conn.receive(f.headers(sid, h.OK_BLOCK))
    batches = [f.data(sid, b"\0\0\0\0\1x") * 1000 for sid in sids]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(100):
            for batch in batches:
                assert conn.receive(batch)[-1][0] == "data"
                conn.output()
        memory = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert conn.ledger()["unread"] == 3 * 600_000
    assert memory < 100_000
    for sid in sids:
        conn.consumed(sid, 600_000)
        assert conn.receive(f.data(sid, b"x", end=True))[-1] == ("closed", sid)


def test_tiny_frames_beyond_the_window() -> None:
    """What bounds them: nothing is granted again before it is read."""
    conn = h.server(stream_window=65535)
    conn.receive(f.headers(1, h.POST_BLOCK))
    for _ in range(65):
        conn.receive(f.data(1, b"x") * 1000)
    conn.receive(f.data(1, b"x") * 535)
    assert h.frames(conn) == []
    conn.receive(f.data(1, b"x"))
    assert h.resets(conn) == [(1, f.FLOW_CONTROL_ERROR)]


def test_window_updates_that_answer_our_data_are_free() -> None:
    conn = h.server((f.INITIAL_WINDOW_SIZE, 1 << 20))
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.send_headers(1, h.OK)
    for _ in range(20000):
        conn.send_data(1, bytes(1000))
        conn.output()
        conn.receive(f.window_update(1, 1000) + f.window_update(0, 1000))
    assert not conn.dead


def test_nothing_is_kept_of_a_connection_that_has_failed() -> None:
    conn = h.server((f.INITIAL_WINDOW_SIZE, 0))
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.send_headers(1, h.OK)
    payload = bytearray(100000)
    conn.send_data(1, payload)
    h.error(conn, f.data(0))
    payload.append(0)  # nobody holds it
    conn.send_data(1, b"x", True)
    conn.ping(bytes(8))
    conn.goaway()
    assert conn.output() == b"" and conn.next_wakeup == float("inf") and conn.on_time(1e9) == []


def test_there_is_no_room_after_a_failure() -> None:
    """Or a handler that produces without end would go on for ever: nothing that it sends fills anything."""
    conn = h.server((f.INITIAL_WINDOW_SIZE, 1 << 20))
    for sid in (1, 3):
        conn.receive(f.headers(sid, h.GET_BLOCK, end=True))
        conn.send_headers(sid, h.OK)
    while conn.room(1):
        conn.send_data(1, bytes(60_000))
    assert conn.room(3)
    assert conn.receive(f.data(0))[-1][0] == "error"
    assert not conn.room(3)
    conn.output()
    assert not conn.room(1) and ("room", 1) not in conn.events_now()


def test_streams_leave_nothing_behind() -> None:
    """100,000 requests on one connection, every tenth reset: what is remembered of them is bounded."""
    conn = h.server(resets=1 << 30)

    def requests(first: int, count: int) -> None:
        for sid in range(first, first + 2 * count, 2):
            conn.receive(f.headers(sid, h.GET_BLOCK, end=True))
            if sid % 20 == 1:
                conn.reset(sid, f.CANCEL)
            else:
                conn.send_headers(sid, h.OK)
                conn.send_data(sid, b"x", True)
            conn.events_now()
            conn.output()

    requests(1, 3000)
    tracemalloc.start()
    try:
        requests(6001, 5000)
        before = tracemalloc.get_traced_memory()[0]
        requests(16001, 20000)
        assert tracemalloc.get_traced_memory()[0] - before < 20000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_frame_size", 16383), ("max_frame_size", 1 << 24), ("stream_window", 0), ("stream_window", 1 << 31),
     ("connection_window", 65534), ("connection_window", 1 << 31)],
)  # fmt: skip
def test_limits_outside_of_what_rfc_9113_allows(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        Http2Connection("server", **{name: value})
