"""Credit: a ledger kept beside the codec, and what happens to a peer that spends more than it was granted."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynwire.errors import ProtocolError

from . import oracle as o
from . import pair

COST = o.ITEM_OVERHEAD


class Ledger(RuleBasedStateMachine):
    """One client, one server. Frames in flight are kept as parsed frames, so that each side's view can lag behind.

    For the connection and for every stream, at every step: granted by the client = its window + all WINDOW frames it sent;
    the server's credit = what it has heard of that - what it has spent; what the client has taken and not granted again stays
    below half a window, so that credit always comes back.
    """

    @initialize(
        stream_window=st.sampled_from([1, 100, 1000, 1 << 18]),
        connection_window=st.sampled_from([1, 300, 5000, 1 << 26]),
        server_window=st.sampled_from([1, 1000, 1 << 26]),
    )
    def start(self, stream_window: int, connection_window: int, server_window: int) -> None:
        self.windows = {"stream": stream_window, "connection": connection_window, "server": server_window}
        self.pair = pair.Pair(
            client={"stream_window": stream_window, "connection_window": connection_window},
            server={"connection_window": server_window},
        )
        self.client, self.server = self.pair.client, self.pair.server
        self.to_server: list[o.Frame] = []
        self.to_client: list[o.Frame] = []
        self.heard = {o.CONNECTION: connection_window}  # credit that the server has heard of, per stream
        self.spent = {o.CONNECTION: 0}
        self.taken = {o.CONNECTION: 0}
        self.granted = {o.CONNECTION: connection_window}
        self.untaken: dict[int, list[int]] = {}  # arrived at the client, per stream
        self.zombies: set[int] = set()
        self.serving: dict[int, int] = {}  # at the server: stream to cost of its request
        self.request_granted = server_window
        self.request_heard = server_window
        self.request_spent = 0
        self.request_done = 0

    def drain(self) -> None:
        for f in pair.frames_of(self.client):
            if f.type == o.WINDOW:
                self.granted[f.stream] += f.arg
            self.to_server.append(f)
        for f in pair.frames_of(self.server):
            if f.type == o.WINDOW:
                assert f.stream == o.CONNECTION
                self.request_granted += f.arg
            self.to_client.append(f)

    @rule(size=st.sampled_from([0, 1, 500, 3000]))
    def request(self, size: int) -> None:
        credit = self.client.credit
        sid = self.client.request("a", b"r" * size)
        assert (sid is None) == (credit <= 0)
        if sid is not None:
            self.request_spent += size + COST
            for ledger, start in ((self.heard, 0), (self.spent, 0), (self.taken, 0), (self.granted, 0)):
                ledger[sid] = start
            self.heard[sid] = self.granted[sid] = self.windows["stream"]
            self.untaken[sid] = []
            self.zombies.discard(sid)
        self.drain()

    @precondition(lambda self: self.to_server)
    @rule()
    def deliver_to_server(self) -> None:
        f = self.to_server.pop(0)
        for event in pair.feed(self.server, f):
            if event[0] == "request":
                self.serving[event[1]] = len(event[3]) + COST
            elif event[0] == "cancel" and event[2] == o.KILL and event[1] in self.serving:
                self.end(event[1], error=True)
        if f.type == o.WINDOW and (f.stream == o.CONNECTION or f.stream in self.serving):
            self.heard[f.stream] += f.arg
        self.drain()

    @precondition(lambda self: self.to_client)
    @rule()
    def deliver_to_client(self) -> None:
        f = self.to_client.pop(0)
        for event in pair.feed(self.client, f):
            if event[0] == "item":
                self.untaken[event[1]].append(len(event[2]) + COST)
        if f.type == o.DATA and f.stream in self.zombies:
            self.taken[o.CONNECTION] += len(f.body) + COST  # swallowed: counts as taken at once
        if f.type == o.WINDOW:
            self.request_heard += f.arg
        if f.type in (o.END, o.ERROR):
            for cost in self.untaken.pop(f.stream, ()):  # the application takes what it has of an ended stream
                self.client.take(None, cost)
                self.taken[o.CONNECTION] += cost
            self.zombies.discard(f.stream)
        self.drain()

    @precondition(lambda self: self.serving)
    @rule(data=st.data(), size=st.sampled_from([0, 1, 90, 4000, 65535]))
    def send(self, data: st.DataObject, size: int) -> None:
        sid = data.draw(st.sampled_from(sorted(self.serving)))
        allowed = self.server.credit > 0 and self.server.stream(sid).credit > 0
        assert self.server.send_item(sid, b"i" * size) is allowed
        if allowed:
            self.spent[sid] += size + COST
            self.spent[o.CONNECTION] += size + COST
        self.drain()

    def end(self, sid: int, error: bool) -> None:
        if error:
            self.server.send_error(sid, 0, b"")
        else:
            self.server.send_end(sid)
        self.request_done += self.serving.pop(sid)

    @precondition(lambda self: self.serving)
    @rule(data=st.data(), error=st.booleans())
    def finish(self, data: st.DataObject, error: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.serving))), error)
        self.drain()

    @precondition(lambda self: any(self.untaken.values()))
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(s for s, costs in self.untaken.items() if costs)))
        cost = self.untaken[sid].pop(0)
        self.client.take(sid, cost)
        self.taken[sid] += cost
        self.taken[o.CONNECTION] += cost
        self.drain()

    @precondition(lambda self: self.untaken)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(self.untaken)))
        self.client.cancel(sid, o.KILL)
        self.zombies.add(sid)
        for cost in self.untaken.pop(sid):
            self.client.take(None, cost)
            self.taken[o.CONNECTION] += cost
        self.drain()

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pair"):
            return
        assert self.server.credit == self.heard[o.CONNECTION] - self.spent[o.CONNECTION]
        for sid in self.serving:
            assert self.server.stream(sid).credit == self.heard[sid] - self.spent[sid]
        for sid in (o.CONNECTION, *self.untaken):
            window = self.windows["connection" if sid == o.CONNECTION else "stream"]
            kept_back = self.taken[sid] - (self.granted[sid] - window)
            assert kept_back >= 0 and 2 * kept_back < window
        assert self.client.credit == self.request_heard - self.request_spent
        kept_back = self.request_done - (self.request_granted - self.windows["server"])
        assert kept_back >= 0 and 2 * kept_back < self.windows["server"]

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            pair.close(self.client)
            pair.close(self.server)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# --- spending more than was granted -------------------------------------------------------------------------------------------


def test_an_item_may_start_with_one_byte_of_credit() -> None:
    conn = pair.client(streams=1, stream_window=65, connection_window=1000)
    assert len(pair.feed(conn, o.item(0, b""), o.item(0, b"x" * 60_000))) == 2  # 65 - 64 = 1 byte of credit left for the second
    with pytest.raises(ProtocolError, match="beyond the granted credit"):
        pair.feed(conn, o.item(0))


def test_stream_credit_of_exactly_zero_is_none() -> None:
    conn = pair.client(streams=2, stream_window=64, connection_window=1000)
    assert len(pair.feed(conn, o.item(0), o.item(1))) == 2
    with pytest.raises(ProtocolError, match="beyond the granted credit"):
        pair.feed(conn, o.item(0))


def test_connection_credit_is_shared() -> None:
    conn = pair.client(streams=3, stream_window=1000, connection_window=128)
    assert len(pair.feed(conn, o.item(0), o.item(1))) == 2
    with pytest.raises(ProtocolError, match="beyond the granted credit"):
        pair.feed(conn, o.item(2))


def test_an_announcement_costs_the_whole_payload_at_once() -> None:
    conn = pair.client(streams=2, stream_window=1 << 20, connection_window=70_000)
    pair.feed(conn, o.item(0, announce=70_000))
    with pytest.raises(ProtocolError, match="beyond the granted credit"):
        pair.feed(conn, o.item(1))


def test_requests_beyond_credit() -> None:
    conn = pair.server(connection_window=100)
    assert len(pair.feed(conn, o.request(0, b"x" * 35, name=b"a"), o.request(1, b"y" * 5000))) == 2
    with pytest.raises(ProtocolError, match="beyond the granted credit"):
        pair.feed(conn, o.request(2))


def test_refunded_request_credit_may_be_spent_again() -> None:
    conn = pair.server(connection_window=100)
    pair.feed(conn, o.request(0, b"x" * 5000, name=b"a"))
    conn.send_end(0)
    assert [f for f in pair.frames_of(conn) if f.type == o.WINDOW] == [o.window(o.CONNECTION, 5064)]
    assert len(pair.feed(conn, o.request(0, b"x" * 5000))) == 1


@pytest.mark.parametrize("role", ["client", "server"])
def test_more_than_a_tebibyte_of_connection_credit(role: str) -> None:
    hello = o.hello(connection_window=1 << 40, stream_window=1 << 40)
    conn = pair.client(1, hello) if role == "client" else pair.server(hello)
    if role == "server":
        pair.feed(conn, o.request(0, name=b"a"))
        assert pair.feed(conn, o.window(o.CONNECTION, 0)) == []
    with pytest.raises(ProtocolError, match=r"credit than 2\^40"):
        pair.feed(conn, o.window(o.CONNECTION, 65))


def test_more_than_a_tebibyte_of_stream_credit() -> None:
    conn = pair.server(o.hello(stream_window=1 << 40))
    pair.feed(conn, o.request(0, name=b"a"))
    with pytest.raises(ProtocolError, match=r"stream credit than 2\^40"):
        pair.feed(conn, o.window(0, 1))


def test_a_window_frame_lets_a_stalled_item_go() -> None:
    p = pair.Pair(client={"stream_window": 100})
    sid = p.client.request("a", b"")
    p.to_server()
    assert p.server.send_item(sid, b"x" * 100)
    assert not p.server.send_item(sid, b"x")
    p.to_client()
    p.client.take(sid, 164)
    assert p.to_server() == [("credit", sid)]
    assert p.server.stream(sid).credit == 100
    assert p.server.send_item(sid, b"x")


# --- abandoned streams --------------------------------------------------------------------------------------------------------


def swallow(p: pair.Pair, rng: random.Random) -> int:
    """One request, items on their way, cancelled in some state; returns what the items cost."""
    cost = 0
    sid = p.client.request("a", b"r")
    assert sid is not None
    p.to_server()
    for _ in range(rng.randint(0, 3)):
        size = rng.choice((0, 10, 1000, 70_000))
        if not p.server.send_item(sid, b"i" * size):
            break
        cost += size + COST
        if size >= o.FRAGMENT_FROM:
            break
    data = p.server.output()
    cut = rng.randint(0, len(data))
    for event in p.client.receive(data[:cut]):
        if event[0] == "item":
            p.client.take(None, len(event[2]) + COST)
    p.client.cancel(sid, o.KILL)
    p.client.receive(data[cut:])
    for event in p.to_server():
        if event[0] == "cancel":
            p.server.send_error(sid, 0, b"")
    assert p.to_client() == [], "nobody waits for a cancelled stream"
    assert p.client.stream(sid) is None
    p.settle()
    return cost


def test_ten_thousand_cancelled_streams_leak_no_credit() -> None:
    rng = random.Random(7)
    p = pair.Pair(client={"connection_window": 500_000})
    total = sum(swallow(p, rng) for _ in range(10_000))
    assert total > 10 * 500_000
    assert 250_000 < p.server.credit <= 500_000, "the rest is below half a window and comes with the next grant"
    assert p.client.live == p.server.live == 0
    # what is kept back plus what the server has is the whole window again
    p.client.take(None, 250_000)
    p.to_server()
    assert p.server.credit > 500_000


def test_a_large_item_cut_short_by_an_error_is_refunded_in_full() -> None:
    p = pair.Pair(client={"connection_window": 200_000})
    for _ in range(10):
        sid = p.client.request("a", b"")
        p.to_server()
        assert p.server.send_item(sid, b"i" * 600_000)
        data = p.server.output(limit=300_000)
        p.server.send_error(sid, 0, b"broken")
        events = p.client.receive(data + p.server.output())
        assert events[-1] == ("error", sid, 0, b"broken")
        p.settle()
        assert p.server.credit == 200_000


def test_nothing_is_granted_for_items_that_nobody_takes() -> None:
    p = pair.Pair(client={"stream_window": 1000, "connection_window": 1000})
    sid = p.client.request("a", b"")
    p.to_server()
    while p.server.send_item(sid, b"i" * 36):
        p.to_client()
    p.settle()
    assert p.server.credit == 0
