"""The client's side: the limit of streams, GOAWAY, informational responses, bodies that may not be, ids."""

from __future__ import annotations

import pytest

from dynwire.wire.http2 import Http2Connection
from tests.http2 import frames as f

from . import h2pair as h


def test_what_a_connection_begins_with() -> None:
    client, server = Http2Connection("client"), Http2Connection("server")
    client.start()
    server.start()
    out = client.output()
    assert out.startswith(f.PREFACE)
    settings, update = f.FrameReader().feed(out[len(f.PREFACE) :])
    common = [(4, 1 << 20), (5, 1 << 20), (6, 65536), (9, 1)]
    assert settings.settings == [(f.ENABLE_PUSH, 0), *common]
    assert (update.stream, update.increment) == (0, (4 << 20) - 65535)
    settings, update = f.FrameReader().feed(server.output())
    assert settings.settings == [(f.MAX_CONCURRENT_STREAMS, 1000), *common]
    assert (update.stream, update.increment) == (0, (4 << 20) - 65535)


def test_100_streams_until_the_servers_settings() -> None:
    conn = Http2Connection("client")
    conn.start()
    assert [conn.open_stream() for _ in range(101)] == [*range(1, 200, 2), None]
    events = conn.receive(f.settings((f.MAX_CONCURRENT_STREAMS, 102)))
    assert events[-1] == ("capacity",)
    assert [conn.open_stream() for _ in range(3)] == [201, 203, None]


def test_no_limit_in_the_settings_is_no_limit() -> None:
    conn = h.client()
    assert None not in [conn.open_stream() for _ in range(1000)]


def test_capacity_comes_with_the_end_of_a_stream() -> None:
    conn = h.client((f.MAX_CONCURRENT_STREAMS, 1))
    first = h.opened(conn, h.GET, True)
    assert conn.open_stream() is None
    assert conn.receive(f.headers(first, h.OK_BLOCK, end=True))[-2:] == [("closed", first), ("capacity",)]
    second = h.opened(conn, h.GET, True)
    assert conn.receive(f.headers(second, h.OK_BLOCK, end=True))[-1] == ("closed", second)  # nobody has asked


def test_no_capacity_while_a_lower_limit_is_exceeded() -> None:
    conn = h.client((f.MAX_CONCURRENT_STREAMS, 3))
    sids = [h.opened(conn, h.GET, True) for _ in range(3)]
    conn.receive(f.settings((f.MAX_CONCURRENT_STREAMS, 1)))
    assert conn.open_stream() is None
    for sid, capacity in zip(sids, (False, False, True), strict=True):
        assert (conn.receive(f.rst_stream(sid))[-1] == ("capacity",)) is capacity


def test_goaway_refuses_what_was_not_processed() -> None:
    conn = h.client()
    for _ in range(3):
        h.opened(conn)
    assert conn.receive(f.goaway(1, f.NO_ERROR, b"bye")) == [
        ("reset", 3, f.REFUSED_STREAM, True), ("closed", 3), ("reset", 5, f.REFUSED_STREAM, True), ("closed", 5),
        ("goaway", 1, f.NO_ERROR, b"bye"),
    ]  # fmt: skip
    assert conn.draining and conn.open_stream() is None and conn.live == 1
    assert conn.receive(f.data(5, b"late") + f.headers(3, h.OK_BLOCK)) == []
    assert conn.receive(f.headers(1, h.OK_BLOCK, end=True))[0] == ("headers", 1, h.OK, "response", True)


def test_goaway_in_two_steps() -> None:
    conn = h.client()
    h.opened(conn)
    h.opened(conn)
    assert conn.receive(f.goaway(f.MAX_WINDOW)) == [("goaway", f.MAX_WINDOW, 0, b"")]
    assert conn.receive(f.goaway(1))[0] == ("reset", 3, f.REFUSED_STREAM, True)


def test_a_server_drains() -> None:
    conn = h.server()
    conn.receive(f.headers(1, h.GET_BLOCK, end=True))
    conn.goaway(0, b"", False)
    conn.receive(f.headers(3, h.GET_BLOCK, end=True))
    conn.goaway(0, b"stopping")
    assert [frame.last_stream for frame in h.frames(conn)] == [f.MAX_WINDOW, 3]
    fields = f.block([*h.POST, (b"x-new", b"1")], f.INDEXING)
    late = f.headers(5, fields) + f.data(5, bytes(1000)) + f.headers(5, f.block(h.TRAILERS), end=True) + f.rst_stream(5)
    assert conn.receive(late) == []
    assert h.frames(conn) == [] and not conn.dead
    assert conn.ledger()["unannounced"] == 1000
    conn.send_headers(3, h.OK, True)
    assert conn.events_now() == [("closed", 3)]


def test_the_last_stream_id() -> None:
    conn = h.server()
    assert conn.receive(f.headers(0x7FFFFFFF, h.GET_BLOCK, end=True))[0][0] == "headers"
    assert conn.draining and h.frames(conn)[0].last_stream == 0x7FFFFFFF


def test_informational_responses() -> None:
    conn = h.client()
    sid = h.opened(conn)
    early = [(b":status", b"103"), (b"link", b"</a>")]
    events = conn.receive(
        f.headers(sid, f.block([(b":status", b"100")])) + f.headers(sid, f.block(early)) + f.headers(sid, h.OK_BLOCK)
    )
    assert [(event[3], event[2]) for event in events] == [
        ("informational", [(b":status", b"100")]), ("informational", early), ("response", h.OK),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        f.headers(1, f.block([(b":status", b"100")]), end=True),
        f.headers(1, f.block([(b":status", b"101")])),
        f.headers(1, f.block([(b":status", b"20")])),
        f.headers(1, f.block([(b"server", b"x")])),
        f.headers(1, f.block([*h.OK, *h.OK])),
        f.headers(1, f.block([*h.OK, (b":path", b"/")])),
        f.headers(1, f.block([(b"server", b"x"), *h.OK])),
        f.headers(1, f.block([*h.OK, (b"connection", b"close")])),
        f.headers(1, f.block([*h.OK, (b"content-length", b"5")]), end=True),
        f.headers(1, h.OK_BLOCK) + f.headers(1, f.block(h.TRAILERS)),
        f.headers(1, h.OK_BLOCK) + f.headers(1, h.OK_BLOCK, end=True),
        f.data(1, b"before headers"),
    ],
    ids=range(12),
)
def test_malformed_responses(answer: bytes) -> None:
    conn = h.client()
    h.opened(conn)
    events = conn.receive(answer)
    assert events[-2:] == [("reset", 1, f.PROTOCOL_ERROR, False), ("closed", 1)]
    assert h.resets(conn) == [(1, f.PROTOCOL_ERROR)] and not conn.dead


@pytest.mark.parametrize(("request_", "status"), [(h.HEAD, b"200"), (h.GET, b"204"), (h.GET, b"304")])
def test_no_body_where_there_can_be_none(request_: list[h.Field], status: bytes) -> None:
    conn = h.client()
    head = f.block([(b":status", status), (b"content-length", b"5")])
    one, two, three = [h.opened(conn, request_, True) for _ in range(3)]
    assert conn.receive(f.headers(one, head, end=True))[0][0] == "headers"
    assert conn.receive(f.headers(two, head) + f.data(two, b"", end=True))[-1] == ("closed", two)
    assert conn.receive(f.headers(three, head) + f.data(three, b"12345", end=True))[-2] == (
        "reset", three, f.PROTOCOL_ERROR, False,
    )  # fmt: skip


def test_trailers() -> None:
    conn = h.client()
    sid = h.opened(conn, h.GET, True)
    events = conn.receive(f.headers(sid, h.OK_BLOCK) + f.data(sid, b"x") + f.headers(sid, f.block(h.TRAILERS), end=True))
    assert events[-2:] == [("headers", sid, h.TRAILERS, "trailers", True), ("closed", sid)]


def test_a_response_may_end_before_the_request() -> None:
    conn = h.client()
    sid = h.opened(conn)
    assert conn.receive(f.headers(sid, h.OK_BLOCK, end=True) + f.rst_stream(sid, f.NO_ERROR))[-2:] == [
        ("reset", sid, f.NO_ERROR, True), ("closed", sid),
    ]  # fmt: skip


def test_streams_begin_in_order() -> None:
    conn = h.client()
    first, second = conn.open_stream(), conn.open_stream()
    assert first is not None and second is not None
    conn.send_headers(second, h.GET, True)
    with pytest.raises(RuntimeError, match=r"5\.1\.1"):
        conn.send_headers(first, h.GET, True)


def test_a_stream_that_was_never_begun_is_closed_without_a_frame() -> None:
    conn = h.client()
    sid = conn.open_stream()
    assert sid is not None
    conn.reset(sid, f.CANCEL)
    assert h.frames(conn) == [] and conn.events_now() == [("closed", sid)] and conn.live == 0


def test_no_push() -> None:
    conn = h.client()
    h.opened(conn)
    assert h.error(conn, f.push_promise(1, 2, h.GET_BLOCK))[0] == f.PROTOCOL_ERROR


def test_a_server_that_speaks_http1() -> None:
    conn = Http2Connection("client")
    conn.start()
    events = conn.receive(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    assert events == [("error", f.PROTOCOL_ERROR, "the peer spoke HTTP/1.1, expected HTTP/2")]


def test_pings_are_answered_and_reported() -> None:
    conn = h.client()
    conn.ping(b"ourping!")
    assert conn.receive(f.ping(b"yourping")) == []
    assert [(frame.ack, frame.payload) for frame in h.frames(conn)] == [(False, b"ourping!"), (True, b"yourping")]
    assert conn.receive(f.ping(b"ourping!", ack=True)) == [("pong", b"ourping!")]


def test_deadlines() -> None:
    server = Http2Connection("server")
    server.start(100.0)
    assert server.next_wakeup == 110.0
    server.receive(f.PREFACE[:20], 109.0)
    assert server.on_time(109.9) == []
    assert server.on_time(110.0) == [("error", f.PROTOCOL_ERROR, "no preface within 10 s")]
    client = Http2Connection("client")
    client.start(100.0)
    assert client.on_time(110.0) == [("error", f.SETTINGS_TIMEOUT, "no SETTINGS within 10 s")]
    client = Http2Connection("client")
    client.start(100.0)
    client.output()
    client.receive(f.settings(), 105.0)
    assert client.next_wakeup == 110.0
    assert client.on_time(110.0)[0][:2] == ("error", f.SETTINGS_TIMEOUT)
    assert h.frames(client)[-1].code == f.SETTINGS_TIMEOUT
    client = h.client()
    assert client.next_wakeup == float("inf")
