"""Stream numbers, cancelling in every state, goaway, timers, what may come when, and limits."""

from __future__ import annotations

import gc
import struct
import subprocess
import sys

import pytest

from dynwire._frames import LIMITS, EventConnection, describe_foreign
from dynwire.errors import DynwireError, PlaneMismatch, ProtocolError

from . import oracle as o
from . import pair

BIG = 600_000

# --- stream numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_are_dense_and_reused_last_in_first_out() -> None:
    p = pair.Pair(server={"max_streams": 4})
    assert [p.client.request("a", b"") for _ in range(5)] == [0, 1, 2, 3, None]
    p.to_server()
    p.server.send_end(2)
    p.server.send_end(0)
    p.to_client()
    assert [p.client.request("a", b"") for _ in range(3)] == [0, 2, None]
    assert [e[1] for e in p.to_server()] == [0, 2]


def test_a_number_is_free_for_the_client_only_after_the_last_frame_arrived() -> None:
    p = pair.Pair(server={"max_streams": 1})
    sid = p.client.request("a", b"")
    p.to_server()
    p.server.send_item(sid, b"x", last=True)
    assert p.server.stream(sid) is None
    assert p.client.request("a", b"") is None
    p.to_client()
    assert p.client.request("a", b"") == sid


def test_ten_thousand_requests_use_one_number() -> None:
    p = pair.Pair()
    for _ in range(10_000):
        sid = p.client.request("a", b"x")
        assert sid == 0
        p.to_server()
        p.server.send_item(0, b"y", last=True)
        p.to_client()
    assert p.client.live == p.server.live == 0


def test_a_request_on_a_stream_in_use() -> None:
    conn = pair.server()
    pair.feed(conn, o.request(0, name=b"a"))
    with pytest.raises(ProtocolError, match="in use"):
        pair.feed(conn, o.request(0))


def test_a_request_on_a_stream_whose_payload_is_arriving() -> None:
    conn = pair.server()
    pair.feed(conn, o.request(0, name=b"a", announce=BIG))
    with pytest.raises(ProtocolError, match="in use"):
        pair.feed(conn, o.request(0))


def test_the_client_keeps_to_the_servers_number_of_streams() -> None:
    conn = pair.client(hello=o.hello(max_streams=2))
    assert [conn.request("a", b"") for _ in range(3)] == [0, 1, None]


def test_no_request_before_hello() -> None:
    conn = EventConnection(True)
    assert conn.request("a", b"") is None


# --- cancelling ---------------------------------------------------------------------------------------------------------------


def test_kill_before_the_server_saw_anything() -> None:
    p = pair.Pair()
    sid = p.client.request("a", b"x")
    p.client.cancel(sid, o.KILL)
    assert p.to_server() == [("request", sid, "a", b"x", 0, None, 0), ("cancel", sid, o.KILL)]
    p.server.send_error(sid, 0, b"killed")
    assert p.to_client() == []
    assert p.client.stream(sid) is None


@pytest.mark.parametrize("written", [100, 300_000])
def test_kill_during_upload(written: int) -> None:
    """The server has no request to end yet: it answers for itself, and forgets the part that came."""
    p = pair.Pair()
    blocks = pair.in_use()
    sid = p.client.request("a", b"x" * BIG)
    data = p.client.output(limit=written)
    p.client.cancel(sid, o.KILL)
    data += p.client.output()
    assert p.server.receive(data) == []
    assert p.server.live == 0 and pair.in_use() == blocks
    assert p.client.stream(sid) is not None, "the number is not free before the server has confirmed"
    assert p.to_client() == []
    assert p.client.live == 0
    assert p.client.credit == 1 << 26 or p.client.credit > (1 << 25), "the request's credit is refunded by halves"
    assert p.client.request("a", b"") == sid
    assert [e[0] for e in p.to_server()] == ["request"]


def test_stop_during_upload_reaches_the_request() -> None:
    p = pair.Pair()
    sid = p.client.request("a", b"x" * BIG)
    data = p.client.output(limit=1000)
    p.client.cancel(sid, o.STOP)
    data += p.client.output()
    events = p.server.receive(data)
    pair.close(p.server)
    assert ("cancel", sid, o.STOP) in events


@pytest.mark.parametrize("arrived", [0, 20, 1000, 262144 + 36, 300_000, 524_288 + 52])
def test_kill_during_a_large_reply(arrived: int) -> None:
    p = pair.Pair()
    blocks = pair.in_use()
    sid = p.client.request("a", b"")
    p.to_server()
    assert p.server.send_item(sid, b"y" * BIG, last=True)
    data = p.server.output()
    assert p.client.receive(data[:arrived]) == []
    p.client.cancel(sid, o.KILL)
    assert p.to_server() == [("sent", sid), ("cancel", sid, o.KILL)]
    assert p.client.receive(data[arrived:]) == []
    assert p.client.live == 0 and pair.in_use() == blocks
    p.server.finish(sid)
    p.settle()
    assert p.server.credit == 1 << 26 or p.server.credit == (1 << 26) - BIG - 64


def test_kill_during_a_large_reply_frees_the_memory_at_the_next_fragment() -> None:
    conn = pair.client(streams=1)
    blocks = pair.in_use()
    one, two, three = o.fragments(0, b"y" * BIG)
    pair.feed(conn, o.item(0, announce=BIG), one)
    conn.cancel(0, o.KILL)
    assert pair.in_use() == blocks, "between fragments the memory goes at once"
    assert pair.feed(conn, two, three, o.Frame(o.END)) == []
    assert conn.live == 0


def test_server_gives_up_a_large_reply_when_it_is_killed() -> None:
    p = pair.Pair()
    sid = p.client.request("a", b"")
    p.to_server()
    payload = bytearray(BIG)
    p.server.send_item(sid, payload, last=True)
    data = p.server.output(limit=1000)
    p.client.cancel(sid, o.KILL)
    assert p.to_server() == [("cancel", sid, o.KILL)]
    p.server.send_error(sid, 0, b"killed")
    data += p.server.output()
    payload.clear()
    kinds = [f.type for f in o.parse(data)]
    assert kinds == [o.DATA, o.CONT, o.ERROR], "the fragment that had begun is finished: its length was announced"
    assert p.client.receive(data) == []
    assert p.client.live == 0


def test_stop_leaves_the_stream_open() -> None:
    p = pair.Pair()
    sid = p.client.request("a", b"")
    p.client.cancel(sid, o.STOP)
    assert [e[0] for e in p.to_server()] == ["request", "cancel"]
    p.server.send_item(sid, b"partial")
    p.server.send_end(sid)
    assert p.to_client() == [("item", sid, b"partial", 0, False), ("end", sid)]


def test_stop_then_kill() -> None:
    p = pair.Pair()
    sid = p.client.request("a", b"")
    p.client.cancel(sid, o.STOP)
    p.client.cancel(sid, o.KILL)
    p.client.cancel(sid, o.KILL)  # a second kill says nothing new
    assert [e[0] for e in p.to_server()] == ["request", "cancel", "cancel"]


def test_zombies_swallow_everything() -> None:
    conn = pair.client(streams=1, stream_window=1 << 20)
    conn.cancel(0, o.KILL)
    assert pair.feed(conn, o.Frame(o.ACCEPT), o.item(0, b"x"), o.item(0, announce=BIG), *o.fragments(0, b"y" * BIG)) == []
    assert conn.live == 1
    assert pair.feed(conn, o.item(0, b"z", last=True)) == []
    assert conn.live == 0


@pytest.mark.parametrize("late", [o.cancel(0, o.STOP), o.cancel(0, o.KILL), o.window(0, 1), o.Frame(o.CONT, body=b"x" * 100)])
def test_late_frames_for_an_ended_stream_are_ignored(late: o.Frame) -> None:
    """They were on their way when the server's last frame left."""
    conn = pair.server()
    pair.feed(conn, o.request(0, name=b"a"))
    conn.send_end(0)
    assert pair.feed(conn, late, late._replace(stream=50), o.request(0, b"again")) == [("request", 0, "a", b"again", 0, None, 0)]


def test_killed_by_one_side_ended_by_the_other() -> None:
    p = pair.Pair()
    sid = p.client.request("a", b"")
    p.to_server()
    p.server.send_end(sid)
    p.client.cancel(sid, o.KILL)
    assert p.to_server() == []
    assert p.to_client() == []
    assert p.client.live == p.server.live == 0
    assert p.client.request("a", b"") == sid


# --- goaway -------------------------------------------------------------------------------------------------------------------


def test_goaway_names_the_last_request_that_was_taken() -> None:
    p = pair.Pair()
    first = p.client.request("a", b"1")
    p.to_server()
    p.client.request("a", b"2")  # crosses the goaway
    p.server.send_goaway(0, "restarting")
    assert p.to_client() == [("goaway", 0, 1, "restarting")]
    assert p.client.draining and p.server.draining
    p.to_server()
    p.server.send_item(first, b"done", last=True)
    assert p.to_client() == [("item", first, b"done", 0, True)]


def test_goaway_text_is_cut() -> None:
    p = pair.Pair()
    p.server.send_goaway(3, "ü" * 5000)
    ((_, code, _, text),) = p.to_client()
    assert code == 3 and text == "ü" * 512


def test_goaway_instead_of_hello() -> None:
    """A server refuses a client in words, before it has said anything else."""
    conn = EventConnection(True)
    data = o.PREFACE + o.encode(o.Frame(o.GOAWAY, 0, 2, 0, 0, b"no token was shown"))
    assert conn.receive(data) == [("goaway", 2, 0, "no token was shown")]
    assert not conn.ready


# --- timers -------------------------------------------------------------------------------------------------------------------


def test_timers_fire_once_and_in_time() -> None:
    conn = pair.client(streams=3)
    assert conn.next_timer == float("inf")
    conn.set_timer(0, 5.0)
    conn.set_timer(1, 3.0)
    conn.set_timer(2, 4.0)
    assert conn.next_timer == 3.0
    assert conn.on_time(2.9) == []
    assert conn.next_timer == 3.0
    assert conn.on_time(4.0) == [("timer", 1, 4.0), ("timer", 2, 4.0)]
    assert conn.next_timer == 5.0
    assert conn.on_time(4.5) == []
    assert conn.on_time(5.0) == [("timer", 0, 5.0)]
    assert conn.next_timer == float("inf")


def test_timers_of_ended_streams_do_not_fire() -> None:
    conn = pair.client(streams=2)
    conn.set_timer(0, 1.0)
    conn.set_timer(1, 2.0)
    pair.feed(conn, o.Frame(o.END, stream=0))
    conn.cancel(1, o.KILL)
    assert conn.on_time(10.0) == []
    assert conn.next_timer == float("inf")


def test_a_timer_may_be_moved() -> None:
    conn = pair.client(streams=1)
    conn.set_timer(0, 1.0)
    conn.set_timer(0, 3.0)
    assert conn.on_time(2.0) == []
    assert conn.next_timer == 3.0
    conn.set_timer(0, 2.5)
    assert conn.next_timer == 2.5


# --- what may come when -------------------------------------------------------------------------------------------------------

ALL = {t: o.Frame(t, body=b"x" if t == o.CONT else b"") for t in (*range(128), 128, 200, 255)}
ALLOWED = {
    "client before HELLO": {o.HELLO, o.GOAWAY},
    "client, stream open": {o.DATA, o.END, o.ERROR, o.ACCEPT, o.PING, o.PONG, o.GOAWAY},
    "client, item arriving": {o.CONT, o.ERROR, o.ACCEPT, o.PING, o.PONG, o.GOAWAY},
    "client, no stream": {o.PING, o.PONG, o.GOAWAY},
    "server before HELLO": {o.HELLO},
    "server, stream open": {o.CANCEL, o.WINDOW, o.PING, o.PONG, o.GOAWAY},
    "server, request arriving": {o.CONT, o.CANCEL, o.WINDOW, o.PING, o.PONG, o.GOAWAY},
    "server, no stream": {o.REQUEST, o.CONT, o.CANCEL, o.WINDOW, o.PING, o.PONG, o.GOAWAY},
}  # fmt: skip


def in_state(state: str) -> EventConnection:
    role, _, what = state.partition(" ")
    is_client = role.startswith("client")
    if what == "before HELLO":
        conn = EventConnection(is_client)
        conn.receive(o.PREFACE)
        return conn
    if is_client:
        conn = pair.client(streams=0 if what == "no stream" else 1)
        if what == "item arriving":
            pair.feed(conn, o.item(0, announce=70_000))
        return conn
    conn = pair.server()
    if what == "no stream":
        pair.feed(conn, o.request(0, name=b"a"))
        conn.send_end(0)
    else:
        pair.feed(conn, o.request(0, name=b"a", announce=70_000 if what == "request arriving" else None))
    return conn


@pytest.mark.parametrize("state", ALLOWED)
def test_frames_by_state(state: str) -> None:
    """Every other type is a protocol error; types from 128 on are skipped after HELLO."""
    wrong = []
    for t, frame in ALL.items():
        if t == o.HELLO:
            frame = o.hello()
        elif t == o.CANCEL:
            frame = o.cancel(0, o.STOP)
        ok = t in ALLOWED[state] or (t >= 128 and "HELLO" not in state)
        if (state, t) in (("client, item arriving", o.END), ("server before HELLO", o.CONT)):
            continue  # test_end_within_an_item, test_fragments_before_hello
        conn = in_state(state)
        try:
            pair.feed(conn, frame)
        except ProtocolError:
            if ok:
                wrong.append((t, "was refused"))
        else:
            if not ok:
                wrong.append((t, "was accepted"))
    assert wrong == []


def test_end_within_an_item() -> None:
    """Only an ERROR may cut an item short. An END would be a normal end of a stream that lacks an item."""
    conn = in_state("client, item arriving")
    with pytest.raises(ProtocolError):
        pair.feed(conn, o.Frame(o.END))


def test_fragments_before_hello() -> None:
    """Otherwise a peer without a token keeps the connection busy."""
    with pytest.raises(ProtocolError, match="before HELLO"):
        pair.feed(in_state("server before HELLO"), o.Frame(o.CONT, body=b"x"))


@pytest.mark.parametrize(
    ("state", "frame", "text"),
    [
        ("client, stream open", o.item(0, kind=3), "kind 3"),
        ("client, stream open", o.item(1), "not open"),
        ("client, stream open", o.item(0xFFFFFFFF), "not open"),
        ("client, item arriving", o.item(0), "not open"),
        ("client, stream open", o.item(0, announce=0), "empty"),
        ("client, stream open", o.Frame(o.DATA, o.FRAGMENTED, body=b"123"), "not 4 bytes"),
        ("client, stream open", o.Frame(o.DATA, o.FRAGMENTED, body=b"12345"), "not 4 bytes"),
        ("client, stream open", o.Frame(o.CONT, body=b"x"), "without an announced"),
        ("client, no stream", o.Frame(o.CONT, body=b"x"), "without an announced"),
        ("client, item arriving", o.Frame(o.CONT), "allowed: 1 to"),
        ("client, item arriving", o.Frame(o.CONT, body=b"x" * 70_001), "exceed the announced"),
        ("client, item arriving", o.Frame(o.CONT, stream=1, body=b"x"), "without an announced"),
        ("client, stream open", o.window(0, 1), "from a server"),
        ("client, stream open", o.Frame(o.ERROR, stream=1), "not open"),
        ("client, stream open", o.Frame(o.ACCEPT, stream=1), "not open"),
        ("server, stream open", o.Frame(o.CONT, body=b"x"), "without an announced"),
        ("server, request arriving", o.Frame(o.CONT), "allowed: 1 to"),
        ("server, request arriving", o.Frame(o.CONT, body=b"x" * 70_001), "exceed the announced"),
        ("server, stream open", o.cancel(0, 0), "CANCEL frame of kind 0"),
        ("server, stream open", o.cancel(0, 3), "CANCEL frame of kind 3"),
        ("server, stream open", o.request(1, kind=3), "kind 3"),
        ("server, stream open", o.request(1, announce=0), "empty"),
        ("server, stream open", o.request(1, b"x", announce=100), "not 4 bytes"),
        ("server, stream open", o.request(1, endpoint=1), "never named"),
        ("server, stream open", o.request(1, endpoint=0, name=b"b"), "out of turn"),
        ("server, stream open", o.request(1, endpoint=2, name=b"b"), "out of turn"),
        ("server, stream open", o.request(1, endpoint=1, name=b""), "malformed endpoint name"),
        ("server, stream open", o.request(1, endpoint=1, name=b"x" * 257), "malformed endpoint name"),
        ("server, stream open", o.request(1, endpoint=1, name=b"\xff"), "not UTF-8"),
        ("server, stream open", o.Frame(o.REQUEST, o.NAMED, 1, 1, 0, b""), "malformed endpoint name"),
        ("server, stream open", o.Frame(o.REQUEST, o.NAMED, 1, 1, 0, b"\x01"), "malformed endpoint name"),
        ("server, stream open", o.Frame(o.REQUEST, o.NAMED, 1, 1, 0, b"\x02\x00a"), "malformed endpoint name"),
        ("server, stream open", o.Frame(o.REQUEST, o.META, 0, 1, 0, b"\x01\x00\x00"), "malformed metadata"),
        ("server, stream open", o.Frame(o.REQUEST, o.META, 0, 1, 0, b"\x01\x00\x00\x00"), "malformed metadata"),
        ("server, stream open", o.Frame(o.REQUEST, o.META, 0, 1, 0, b"\xff\xff\xff\xff"), "malformed metadata"),
        ("server, stream open", o.request(1, meta=b"m" * 32769), "malformed metadata"),
    ],
)
def test_malformed_frames(state: str, frame: o.Frame, text: str) -> None:
    conn = in_state(state)
    blocks = pair.in_use()
    with pytest.raises(ProtocolError, match=text) as caught:
        pair.feed(conn, frame)
    assert caught.value.sent == "maybe" and 0 < caught.value.offset <= conn.rx_bytes
    assert pair.in_use() == blocks


def test_reserved_bits_are_ignored() -> None:
    """So that a later minor version may give them a meaning that an old peer can do without."""
    conn = pair.server()
    frame = o.request(0, b"x", name=b"a")
    assert pair.feed(conn, frame._replace(flags=frame.flags | 0xE0))[0][3] == b"x"
    assert pair.feed(conn, o.cancel(0, 1)._replace(flags=255, arg=77)) == [("cancel", 0, 1)]
    conn = pair.client(streams=1)
    item = o.item(0, b"x")
    assert pair.feed(conn, item._replace(flags=item.flags | 0xCC, aux=9, arg=9)) == [("item", 0, b"x", 0, False)]
    assert conn.receive(b"") == []


def test_preface_minor_version_and_reserved_bytes_are_ignored() -> None:
    assert EventConnection(False).receive(b"DYNW\x01\x07\xff\xff" + o.encode(o.hello()))[0][0] == "hello"


def test_optional_frames_of_every_size() -> None:
    conn = pair.server()
    pair.feed(conn, o.request(0, name=b"a"))
    for size in (0, 1, 1000, o.SMALL_LIMIT):
        assert pair.feed(conn, o.Frame(130, 1, 2, 3, 4, b"n" * size), o.cancel(0, 1)) == [("cancel", 0, 1)]
    with pytest.raises(ProtocolError, match="allowed: 98900"):
        pair.feed(conn, o.Frame(130, body=b"n" * (o.SMALL_LIMIT + 1)))


# --- limits, before anything is allocated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [*range(13), 77, 128, 255])
@pytest.mark.parametrize("role", ["client", "server"])
def test_frame_limit_is_seen_in_the_header(t: int, role: str) -> None:
    conn = pair.client(1) if role == "client" else pair.server()
    blocks = pair.in_use()
    limit = LIMITS["frame_limit"] if t == o.CONT else LIMITS["small_limit"]
    header = struct.pack("<IBBHII", limit + 1, t, 0, 0, 0, 0)
    with pytest.raises(ProtocolError, match=f"{limit}"):
        conn.receive(header)
    assert pair.in_use() == blocks


@pytest.mark.parametrize("size", [1_000_001, 1 << 31, 0xFFFFFFFF])
def test_message_limit_is_seen_in_the_announcement(size: int) -> None:
    for conn, frame in (
        (pair.server(max_message=1_000_000), o.request(0, name=b"a", announce=size)),
        (pair.client(1, max_message=1_000_000), o.item(0, announce=size)),
    ):
        blocks = pair.in_use()
        with pytest.raises(ProtocolError, match=f"{size} bytes; this side announced a limit of 1000000"):
            pair.feed(conn, frame)
        assert pair.in_use() == blocks


def test_message_of_exactly_the_limit() -> None:
    payload = b"x" * 1_000_000
    conn = pair.server(max_message=1_000_000)
    frames = o.request(0, name=b"a", announce=len(payload)), *o.fragments(0, payload)
    assert pair.feed(conn, *frames)[0][3] == payload
    conn = pair.client(1, max_message=100)
    assert len(pair.feed(conn, o.item(0, b"x" * 100))) == 1
    with pytest.raises(ProtocolError, match="limit of 100"):
        pair.feed(conn, o.item(0, b"x" * 101))
    conn = pair.server(max_message=100)
    assert len(pair.feed(conn, o.request(0, b"x" * 100, name=b"a"))) == 1
    with pytest.raises(ProtocolError, match="limit of 100"):
        pair.feed(conn, o.request(1, b"x" * 101))


def test_the_largest_small_request_fits() -> None:
    p = pair.Pair()
    name, meta, payload = "n" * 256, b"m" * LIMITS["meta_limit"], b"p" * 65535
    p.client.request(name, payload, meta=meta)
    assert [e[2:] for e in p.to_server()] == [(name, payload, 0, meta, 0)]


def test_endpoints_limit() -> None:
    conn = pair.server()
    for i in range(LIMITS["endpoints_limit"]):
        pair.feed(conn, o.request(0, endpoint=i, name=b"e%d" % i))
        conn.send_end(0)
    assert pair.feed(conn, o.request(0, endpoint=4095))[0][2] == "e4095"
    conn.send_end(0)
    with pytest.raises(ProtocolError, match="limit: 4096"):
        pair.feed(conn, o.request(0, endpoint=4096, name=b"more"))


def test_streams_limit() -> None:
    conn = pair.server(max_streams=2)
    pair.feed(conn, o.request(1, name=b"a"))
    for sid in (2, 1 << 20, 0xFFFFFFFE, 0xFFFFFFFF):
        conn = pair.server(max_streams=2)
        with pytest.raises(ProtocolError, match="at most 2 streams"):
            pair.feed(conn, o.request(sid, name=b"a"))


def test_hello_limit() -> None:
    conn = EventConnection(False)
    frame = o.hello(token="t" * 20_000)
    with pytest.raises(ProtocolError, match="allowed: 16384"):
        conn.receive(o.PREFACE + o.encode(frame))


def test_memory_of_announcements_stays_within_the_window() -> None:
    """10,000 announcements of one byte cost 650,000 bytes of credit and take 655 MB of blocks."""
    window = 1 << 20
    conn = pair.server(connection_window=window, max_streams=10_000)
    _, used = pair.in_use()
    try:
        pair.feed(conn, o.request(0, name=b"a", announce=1), *[o.request(i, announce=1) for i in range(1, 10_000)])
    except ProtocolError:
        return  # also fine: who announces less than 64 KiB had no reason to
    taken = pair.in_use()[1] - used
    for sid in range(10_000):
        if conn.stream(sid) is not None:
            conn.send_error(sid, 0, b"")
    assert taken <= 2 * (window + conn.max_message)


# --- HELLO --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"max_message": 0}, {"max_message": -1}, {"max_message": 1 << 32}, {"max_message": "x"}, {"max_message": ...},
        {"max_message": 1.5}, {"max_message": None}, {"max_message": (1 << 64) - 1},
        {"max_streams": 0}, {"max_streams": (1 << 24) + 1}, {"max_streams": ...},
        {"stream_window": 0}, {"stream_window": (1 << 40) + 1}, {"stream_window": ...},
        {"connection_window": 0}, {"connection_window": (1 << 40) + 1}, {"connection_window": ...},
        {"accept_timeout_ms": -1}, {"accept_timeout_ms": 1 << 32}, {"id": b"1234567"}, {"id": b"123456789"}, {"id": 5},
        {"token": 5}, {"software": None}, {"codecs": [1]}, {"codecs": "raw"},
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("role", ["client", "server"])
def test_hello_out_of_range(role: str, fields: dict[str, object]) -> None:
    conn = EventConnection(role == "client")
    values = {k: v for k, v in fields.items()}
    frame = o.hello(**values)
    if None in values.values():  # `hello` leaves `...` out and sends None
        assert b"\xc0" in frame.body
    with pytest.raises(ProtocolError, match="HELLO"):
        conn.receive(o.PREFACE + o.encode(frame))
    assert not conn.ready


@pytest.mark.parametrize(
    "fields",
    [
        {"max_message": 1}, {"max_message": (1 << 32) - 1}, {"max_streams": 1}, {"max_streams": 1 << 24}, {"stream_window": 1},
        {"stream_window": 1 << 40}, {"connection_window": 1}, {"connection_window": 1 << 40}, {"accept_timeout_ms": 0},
        {"accept_timeout_ms": (1 << 32) - 1}, {"id": b""}, {"id": b"12345678"}, {"token": None}, {"token": "t" * 1000},
        {"codecs": []}, {"codecs": ["new"]}, {"later": {"field": [1, 2]}},
    ],
    ids=repr,
)  # fmt: skip
def test_hello_in_range(fields: dict[str, object]) -> None:
    ((name, values),) = EventConnection(False).receive(o.PREFACE + o.encode(o.hello(**fields)))
    assert name == "hello"
    assert {k: v for k, v in fields.items() if k != "later"}.items() <= values.items()


HELLO_BODY = o.hello(software="x").body


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"\x90", b"\xc0", HELLO_BODY[:-1], HELLO_BODY + b"\xc0"], ids=repr)
def test_hello_that_is_not_a_hello(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="HELLO that does not decode"):
        EventConnection(False).receive(o.PREFACE + o.encode(o.Frame(o.HELLO, body=body)))


@pytest.mark.parametrize(
    "body",
    [
        HELLO_BODY.replace(b"\xa1x", b"\xa1\xff"),
        bytes([HELLO_BODY[0] + 1]) + HELLO_BODY[1:] + b"\xa5later" + b"\x91" * 15_000 + b"\xc0",
    ],
    ids=["not UTF-8", "nested too deeply"],
)
def test_hello_with_strings_or_nesting_that_msgspec_dislikes(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="HELLO that does not decode"):
        EventConnection(False).receive(o.PREFACE + o.encode(o.Frame(o.HELLO, body=body)))


# --- other protocols ----------------------------------------------------------------------------------------------------------

FOREIGN = [
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1"),
    (b"POST /v1/chat/completions HTTP/1.1\r\n", "HTTP/1.1"),
    (b"CONNECT example.org:443 HTTP/1.1\r\n", "HTTP/1.1"),
    (b"HTTP/1.1 400 Bad Request\r\n", "HTTP/1.1"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
    (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "HTTP/2"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "TLS"),
    (b'INFO {"server_id":"x"}\r\n', "NATS"),
    (b'CONNECT {"verbose":false}\r\nPING\r\n', "NATS"),
    (b"PING\r\n", "NATS"),
    (b"-ERR 'x'\r\n", "NATS"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
    (b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", "ZeroMQ"),
    (b"\x00\x00\x00\x2a{}", "an unknown protocol"),
    (b"*1\r\n$4\r\nPING\r\n", "an unknown protocol"),
]


@pytest.mark.parametrize(("head", "name"), FOREIGN, ids=[repr(head[:12]) for head, _ in FOREIGN])
@pytest.mark.parametrize("role", ["client", "server"])
def test_foreign_protocols_are_named(role: str, head: bytes, name: str) -> None:
    conn = EventConnection(role == "client")
    conn.peer = "10.0.0.9:1234"
    with pytest.raises(PlaneMismatch) as caught:
        conn.receive(head)
    error = caught.value
    assert (error.theirs, error.ours, error.peer) == (name, "tcp (dynwire/1)", "10.0.0.9:1234")
    assert f"10.0.0.9:1234 speaks {name}" in str(error) and "DYN_REQUEST_PLANE" in str(error)
    assert error.details["head"].encode("latin-1") == head[:64]
    assert describe_foreign(head) == name


@pytest.mark.parametrize("major", [0, 2, 255])
def test_other_major_versions(major: int) -> None:
    for data in (b"DYNW" + bytes([major]), b"DYNW" + bytes([major, 0, 0, 0])):
        with pytest.raises(PlaneMismatch, match=f"version {major} of the dynwire wire, this side version 1") as caught:
            EventConnection(False).receive(data)
        assert (caught.value.ours, caught.value.theirs) == ("dynwire/1", f"dynwire/{major}")


def test_a_wrong_byte_is_noticed_at_once() -> None:
    """A peer that waits for an answer to a short greeting must not wait for ever."""
    for i in range(4):
        with pytest.raises(PlaneMismatch):
            EventConnection(False).receive(o.PREFACE[:i] + b"!")
    assert EventConnection(False).receive(o.PREFACE) == []


def test_foreign_bytes_in_any_cut_are_a_typed_error() -> None:
    for head, _ in FOREIGN:
        for cut in range(1, len(head)):
            conn = EventConnection(False)
            with pytest.raises(PlaneMismatch):
                conn.receive(head[:cut])
                conn.receive(head[cut:])


# --- ends ---------------------------------------------------------------------------------------------------------------------


def test_a_connection_with_open_streams_is_collected() -> None:
    blocks = pair.in_use()
    conn = pair.server()
    pair.feed(conn, o.request(0, name=b"a", announce=BIG))
    del conn
    gc.collect()
    left = pair.in_use()
    assert left == blocks


def test_errors_are_typed_and_leave_the_events_before_them() -> None:
    conn = pair.client(streams=1)
    with pytest.raises(DynwireError):
        pair.feed(conn, o.item(0, b"good"), o.Frame(99))
    assert conn.events == [("item", 0, b"good", 0, False)]


UNKNOWN_STREAM = [
    "send_item(9, b'x')",
    "send_end(9)",
    "send_error(9, 0, b'')",
    "finish(9)",
    "cancel(9, 1)",
    "cancel(9, 2)",
    "set_timer(9, 1.0)",
]


def test_unknown_streams_are_an_error_not_a_crash() -> None:
    code = "from dynwire._frames import EventConnection\nconn = EventConnection(False)\nconn.{}"
    ends = {}
    for call in UNKNOWN_STREAM:
        done = subprocess.run([sys.executable, "-c", code.format(call)], capture_output=True, text=True, check=False)
        ends[call] = (done.returncode, "Error: " in done.stderr)
    assert ends == dict.fromkeys(UNKNOWN_STREAM, (1, True))
