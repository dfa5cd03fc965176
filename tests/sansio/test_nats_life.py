"""Credit and signs of life of the nats plane, with a clock that the test moves."""

from __future__ import annotations

import itertools
import math

import pytest

from dynwire._natsqueue import EventWire
from dynwire._natswire import LIMITS

from .natspair import CLIENT, DOWN, NOBODY, PATH, UP, WORKER, Event, Message, Pair, block, of

FIRST_CREDIT = LIMITS["first_credit"]
OVERHEAD = LIMITS["item_overhead"]


# Credit -----------------------------------------------------------------------------------------------------------------------


def fill(pair: Pair, number: int, size: int) -> int:
    """Send items until there is no credit; returns how many."""
    count = 0
    while pair.worker.send_item(number, bytes(size)):
        count += 1
        assert count < 100_000
    return count


def test_a_worker_stops_without_credit() -> None:
    pair = Pair()
    number = pair.ask()
    count = fill(pair, number, 1000)
    assert count == -(-FIRST_CREDIT // (1000 + OVERHEAD))
    pair.pass_on()
    assert fill(pair, number, 1000) == 0, "items that arrived and were not taken give no credit"


def test_clients_of_one_connection_share_its_budget() -> None:
    """What comes for all of them waits in one buffer of the NATS server's."""
    pair = Pair(client={"budget": 4 * FIRST_CREDIT})
    other = EventWire(True, b"_INBOX.ffffffffffffffff.", budget=4 * FIRST_CREDIT)
    other.share_port(pair.client)
    port = pair.client.port_
    streams = [pair.client.request(pair.target) for _ in range(3)]
    last = other.request(pair.target)
    waiting = [other.request(pair.target), pair.client.request(pair.target)]
    assert (other.waiting_requests, pair.client.waiting_requests) == (1, 1)
    assert port.granted == pair.client.granted + other.granted == 4 * FIRST_CREDIT
    pair.client.cancel(streams[0].number, 2)  # its credit is everybody's
    assert [stream.waiting for stream in waiting] in ([True, False], [False, True])
    other.cancel(last.number, 2)
    assert [stream.waiting for stream in waiting] == [False, False]
    assert port.granted == pair.client.granted + other.granted == 4 * FIRST_CREDIT
    assert len(other.lost()) == 1
    assert port.granted == pair.client.granted == 3 * FIRST_CREDIT


def test_the_end_of_a_client_lets_others_go_on() -> None:
    pair = Pair(client={"budget": FIRST_CREDIT})
    other = EventWire(True, b"_INBOX.ffffffffffffffff.", budget=FIRST_CREDIT)
    other.share_port(pair.client)
    other.request(pair.target)
    stream = pair.client.request(pair.target)
    assert stream.waiting
    other.lost()
    assert not stream.waiting and pair.client.port_.granted == FIRST_CREDIT
    pair.client.cancel(stream.number, 2)
    assert pair.client.port_.granted == 0


def test_a_window_does_not_grow_at_the_cost_of_others() -> None:
    pair = Pair(client={"budget": 8 * FIRST_CREDIT})
    other = EventWire(True, b"_INBOX.ffffffffffffffff.", budget=8 * FIRST_CREDIT)
    other.share_port(pair.client)
    number = pair.ask()
    for _ in range(4):
        other.request(pair.target)
    count = fill(pair, number, 1000)
    pair.pass_on()
    pair.client.take(number, count * (1000 + OVERHEAD))
    assert pair.client.granted == FIRST_CREDIT, "more than half of the budget is granted"
    other.lost()
    pair.pass_on()
    count = fill(pair, number, 1000)
    pair.pass_on()
    pair.client.take(number, count * (1000 + OVERHEAD))
    assert pair.client.granted == 2 * FIRST_CREDIT


def test_an_item_may_start_while_there_is_credit() -> None:
    pair = Pair()
    number = pair.ask()
    assert pair.worker.send_item(number, bytes(500_000))
    assert not pair.worker.send_item(number, b"")


def test_taking_items_grants_as_much_again() -> None:
    pair = Pair(client={"stream_window": FIRST_CREDIT})
    number = pair.ask()
    sent = fill(pair, number, 1000)
    pair.pass_on()
    pair.client.take(number, 7 * (1000 + OVERHEAD))
    assert pair.client.output() == [], "in halves of the window"
    pair.client.take(number, 1000 + OVERHEAD)
    ((subject, reply, headers, payload),) = pair.client.output()
    assert (subject, reply, payload) == (WORKER + b"._", None, CLIENT + b"00000000000001")
    assert headers == block(f"D: w {FIRST_CREDIT + 8 * (1000 + OVERHEAD)}"), "the total since the request"
    assert pair.worker.deliver(subject, reply, headers, payload) == [("credit", number)]
    assert sent + fill(pair, number, 1000) == -(-(FIRST_CREDIT + 8 * (1000 + OVERHEAD)) // (1000 + OVERHEAD))


def test_credit_messages_may_be_repeated_reordered_and_lost() -> None:
    pair = Pair(client={"stream_window": FIRST_CREDIT})
    number = pair.ask()
    grants: list[Message] = []
    for _ in range(3):
        pair.client.take(number, FIRST_CREDIT // 2)
        grants += pair.client.output()
    assert len(grants) == 3
    stream = pair.worker.stream(number)
    assert stream is not None
    for message in (grants[1], grants[1], grants[0]):
        pair.worker.deliver(*message)
        assert stream.window == 2 * FIRST_CREDIT
    pair.worker.deliver(*grants[2])
    assert stream.window == FIRST_CREDIT * 5 // 2


def test_the_window_grows_while_it_is_used() -> None:
    pair = Pair()
    number = pair.ask()
    most = 0
    for _ in range(100):
        count = fill(pair, number, 1000)
        pair.pass_on()
        for _ in range(count):
            pair.client.take(number, 1000 + OVERHEAD)
            pair.pass_on()
        most = max(most, count * (1000 + OVERHEAD))
    assert 131_072 < most <= 262_144 + 1000 + OVERHEAD, "as much as was granted, less what half a window may wait to be granted"
    assert pair.client.granted == 262_144


def test_the_budget_bounds_what_all_streams_are_granted() -> None:
    pair = Pair(client={"budget": 4 * FIRST_CREDIT, "buffer": 3})
    numbers = [pair.ask() for _ in range(4)]
    assert pair.client.granted == 4 * FIRST_CREDIT
    waiting = [pair.client.request(pair.target) for _ in range(3)]
    assert pair.pass_on() == [] and all(stream.waiting for stream in waiting)
    for number in numbers:  # nobody gets more while others wait
        pair.worker.send_item(number, bytes(FIRST_CREDIT))
        pair.pass_on()
        pair.client.take(number, FIRST_CREDIT + OVERHEAD)
        assert pair.client.granted == 4 * FIRST_CREDIT
    pair.pass_on()
    pair.worker.send_end(numbers[0])
    assert [event[1:3] for event in pair.pass_on()] == [("end", numbers[0]), ("request", waiting[0].number)]
    pair.client.cancel(numbers[1], 2)
    assert ("worker", "request", waiting[1].number, PATH, b"", 0, None, None, 0) in pair.pass_on()


def test_a_large_window_shrinks_when_others_wait() -> None:
    pair = Pair(client={"budget": 32 * FIRST_CREDIT})
    number = pair.ask()
    for _ in range(40):
        pair.client.take(number, FIRST_CREDIT)
    grown = pair.client.granted
    assert grown == 16 * FIRST_CREDIT
    pair.pass_on()
    streams = [pair.client.request(pair.target) for _ in range(20)]
    assert sum(stream.waiting for stream in streams) == 4
    for _ in range(3):
        pair.client.take(number, 16 * FIRST_CREDIT)
    assert not any(stream.waiting for stream in streams)
    assert pair.client.granted <= 32 * FIRST_CREDIT
    stream = pair.client.stream(number)
    assert stream is not None and stream.window >= FIRST_CREDIT


def test_a_call_is_granted_little() -> None:
    pair = Pair()
    pair.ask(reader=False)
    assert pair.client.granted == LIMITS["call_credit"]


def test_a_congested_worker_waits() -> None:
    pair = Pair()
    number = pair.ask()
    pair.worker.set_port(congested=True)
    assert not pair.worker.send_item(number, b"x")
    assert pair.worker.set_port(congested=False) == [("credit", number)]
    assert pair.worker.send_item(number, b"x")


def test_a_congested_client_holds_requests_back() -> None:
    pair = Pair()
    pair.client.set_port(congested=True)
    stream = pair.client.request(pair.target)
    assert stream.waiting
    pair.client.set_port(congested=False)
    assert not stream.waiting


# A worker that dies -----------------------------------------------------------------------------------------------------------


def silence(pair: Pair) -> None:
    """As long as it takes until the client asks. A request that came after the last look is not asked about yet."""
    assert pair.client.on_time(0.25) == [] and pair.client.probes_sent == 0
    assert pair.client.on_time(0.5) == [] and pair.client.probes_sent > 0


def test_silence_is_asked_about() -> None:
    pair = Pair()
    number = pair.ask()
    assert pair.client.next_timer == 0.25
    silence(pair)
    ((subject, reply, headers, payload),) = pair.client.output()
    assert (subject, headers) == (WORKER + b"._", block("D: p"))
    assert reply == CLIENT + b"ffffff00000001"
    assert payload == b"00000000000001 16384\n"
    pair.worker.deliver(subject, reply, headers, payload)
    ((subject, reply, headers, payload),) = pair.worker.output()
    assert (subject, reply, headers, payload) == (CLIENT + b"ffffff00000001", None, block("D: o"), b"00000000000001 0\n")
    assert pair.client.deliver(subject, reply, headers, payload) == []
    assert pair.client.live == 1 and pair.worker.stream(number) is not None


def probes(pair: Pair, until: float) -> list[float]:
    """Let time pass; returns when the client asked."""
    times = []
    while (now := pair.client.next_timer) <= until:
        before = pair.client.probes_sent
        pair.client.on_time(now)
        pair.pass_on(now)
        if pair.client.probes_sent > before:
            times.append(now)
    return times


def test_a_worker_that_answers_is_asked_less_often() -> None:
    pair = Pair()
    pair.ask()
    times = probes(pair, 20.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] <= 1.0 and gaps[-1] == 2.0 and len(times) < 15


def test_nothing_is_asked_without_requests() -> None:
    pair = Pair()
    pair.worker.send_item(pair.ask(), b"", last=True)
    pair.pass_on()
    assert probes(pair, 100.0) == []
    assert pair.client.next_timer == math.inf


def test_a_stream_that_flows_is_seldom_asked_about() -> None:
    pair = Pair()
    number = pair.ask()
    for step in range(1, 401):
        now = step * 0.1
        pair.worker.send_item(number, b"x")
        pair.pass_on(now)
        pair.client.take(number, 1 + OVERHEAD)
        if pair.client.next_timer <= now:
            pair.client.on_time(now)
            pair.pass_on(now)
    assert 15 <= pair.client.probes_sent <= 21


def test_a_worker_that_is_gone_loses_all_its_streams() -> None:
    pair = Pair()
    numbers = [pair.ask() for _ in range(3)]
    pair.worker_there = False
    silence(pair)
    events = pair.pass_on(0.5)
    assert [event[:5] for event in events] == [("client", "lost", number, "PeerLost", True) for number in numbers]
    assert pair.client.live == 0


def test_a_worker_that_does_not_answer() -> None:
    pair = Pair(client={"keepalive": 3.0})
    number = pair.ask()
    pair.tamper = lambda message: []
    events: list[Event] = []
    while not events:
        now = pair.client.next_timer
        events = pair.client.on_time(now)
        pair.pass_on(now)
    assert 3.0 <= now <= 4.0
    assert events[0][:3] == ("lost", number, "PeerLost") and "DYNWIRE_NATS_KEEPALIVE_TIMEOUT" in events[0][4]


def test_a_client_that_stood_still_judges_nobody() -> None:
    """Its timer runs before the answer that has been waiting in the socket is read."""
    pair = Pair(client={"keepalive": 3.0})
    number = pair.ask()
    silence(pair)
    assert pair.client.on_time(20.0) == []
    pair.pass_on(20.0)
    assert pair.client.on_time(23.5) == [] and pair.client.stream(number) is not None


def test_an_answer_in_time_is_a_sign_of_life() -> None:
    pair = Pair(client={"keepalive": 3.0})
    pair.ask()
    lose = True

    def tamper(message: Message) -> list[Message]:
        return [] if lose else [message]

    pair.tamper = tamper
    for now in (0.25, 0.5, 1.5, 2.9):
        assert pair.client.on_time(now) == []
        lose = now < 2.9
        pair.pass_on(now)
    assert probes(pair, 30.0) and pair.client.live == 1


# Is it there? -----------------------------------------------------------------------------------------------------------------


def test_a_worker_is_asked_before_its_first_request() -> None:
    pair = Pair()
    assert not pair.client.is_fresh(pair.peer)
    pair.client.ping_peer(pair.peer)
    assert pair.pass_on() == []
    assert pair.client.heard_of == [(pair.peer.address, None)]
    assert pair.client.is_fresh(pair.peer, 1.9) and not pair.client.is_fresh(pair.peer, 2.1)
    assert pair.client.next_timer == math.inf, "nothing is in flight"


def test_anything_heard_is_a_sign_of_life() -> None:
    pair = Pair()
    number = pair.ask()
    pair.worker.send_item(number, b"x")
    pair.pass_on(5.0)
    assert pair.client.is_fresh(pair.peer, 6.0)


@pytest.mark.parametrize("by", ["ping", "request"])
def test_a_worker_that_is_gone_may_come_back(by: str) -> None:
    pair = Pair()
    pair.worker_there = False
    if by == "ping":
        pair.client.ping_peer(pair.peer)
    else:
        pair.client.request(pair.target)
    pair.pass_on()
    assert pair.client.heard_of == [(pair.peer.address, "ConnectError")]
    assert not pair.client.is_fresh(pair.peer)
    pair.worker_there = True
    pair.client.ping_peer(pair.peer)
    pair.pass_on()
    assert pair.client.is_fresh(pair.peer)


def test_a_worker_that_leaves_says_so() -> None:
    pair = Pair()
    pair.client.peers = {pair.peer.address: pair.peer}
    number = pair.ask()
    pair.worker.say_goodbye()
    ((subject, reply, headers, payload),) = pair.worker.output()
    assert (subject, reply, headers, payload) == (CLIENT + b"ffffff00000000", None, block("D: g"), WORKER)
    pair.client.deliver(subject, reply, headers, payload)
    assert pair.peer.leaving and not pair.client.is_fresh(pair.peer)
    pair.worker.send_item(number, b"still", last=True)
    assert [event[1] for event in pair.pass_on()] == ["item"]
    assert pair.peer.leaving


def test_a_goodbye_of_somebody_unknown() -> None:
    pair = Pair()
    for payload in (b"", b"\xff", WORKER):
        assert pair.client.deliver(CLIENT + b"ffffff00000000", None, block("D: g"), payload) == []
    assert not pair.peer.leaving


# What gets lost ---------------------------------------------------------------------------------------------------------------


def test_a_request_that_never_arrived() -> None:
    pair = Pair()
    stream = pair.client.request(pair.target)
    pair.client.output()
    silence(pair)
    events = pair.pass_on(0.5)
    assert [event[:4] for event in events] == [("client", "lost", stream.number, "PeerLost")]


@pytest.mark.parametrize("end", ["item", "end", "error"])
def test_the_end_of_a_reply_is_lost(end: str) -> None:
    pair = Pair()
    number = pair.ask()
    if end == "item":
        pair.worker.send_item(number, b"", last=True)
    elif end == "end":
        pair.worker.send_end(number)
    else:
        pair.worker.send_error(number, b"")
    pair.worker.output()
    silence(pair)
    assert [event[3] for event in pair.pass_on(0.5)] == ["PeerLost"]


def test_the_last_item_so_far_is_lost() -> None:
    """No later item shows the gap, because the handler is waiting for something."""
    pair = Pair()
    number = pair.ask()
    pair.worker.send_item(number, b"0")
    pair.pass_on()
    pair.worker.send_item(number, b"1")
    pair.worker.output()
    events = probes_and_events(pair, 3.0)
    assert events[0][:4] == ("client", "lost", number, "PeerLost") and "1 from number 1 on" in events[0][5]
    assert events[1] == ("worker", "cancel", number, 2)


def probes_and_events(pair: Pair, until: float) -> list[Event]:
    events: list[Event] = []
    while (now := min(pair.client.next_timer, pair.worker.next_timer)) <= until:
        if pair.client.next_timer <= now:
            events += [("client", *event) for event in pair.client.on_time(now)]
        if pair.worker.next_timer <= now:
            events += [("worker", *event) for event in pair.worker.on_time(now)]
        events += pair.pass_on(now)
    return events


def test_a_loss_is_found_while_others_of_the_worker_go_on() -> None:
    """A busy worker is heard all the time: that says nothing about one stream."""
    pair = Pair()
    busy, quiet = pair.ask(), pair.ask()
    pair.worker.send_item(quiet, b"0")
    pair.worker.output()
    lost = []
    for step in range(1, 60):
        now = step * 0.1
        pair.worker.send_item(busy, b"x")
        events = pair.pass_on(now)
        pair.client.take(busy, 1 + OVERHEAD)
        if pair.client.next_timer <= now:
            pair.client.on_time(now)
            events += pair.pass_on(now)
        lost += of(events, "lost")
        if lost:
            break
    assert [event[2] for event in lost] == [quiet] and now <= 3.0
    assert pair.client.stream(busy) is not None


def test_lost_credit_comes_with_a_probe() -> None:
    pair = Pair()
    number = pair.ask()
    fill(pair, number, 1000)
    pair.pass_on()
    pair.client.take(number, 17 * (1000 + OVERHEAD))
    pair.client.output()  # lost
    assert fill(pair, number, 1000) == 0
    assert ("worker", "credit", number) in probes_and_events(pair, 3.0)
    assert fill(pair, number, 1000) > 0


# A caller that dies -----------------------------------------------------------------------------------------------------------


def test_a_caller_that_is_gone_loses_its_handlers() -> None:
    pair = Pair()
    numbers = [pair.ask() for _ in range(2)]
    pair.client_there = False
    pair.tamper = lambda message: [] if message[0].startswith(WORKER) and message[2] == block("D: p") else [message]
    events = []
    for now in (2.0, 4.0):
        assert pair.worker.next_timer <= now
        pair.worker.on_time(now)
        events += pair.pass_on(now)
    assert [event[:4] for event in events] == [("worker", "lost", number, "PeerLost") for number in numbers]
    assert pair.worker.live == 0


def test_a_caller_that_gave_up_and_whose_cancel_was_lost() -> None:
    pair = Pair()
    kept, dropped = pair.ask(), pair.ask()
    pair.client.cancel(dropped, 2)
    pair.client.output()
    assert probes_and_events(pair, 5.0) == [("worker", "cancel", dropped, 2)]
    assert pair.worker.stream(kept) is not None


def test_short_requests_cost_no_probes() -> None:
    pair = Pair()
    for step in range(100):
        now = step * 0.1
        pair.worker.send_item(pair.ask(now=now), b"", last=True)
        pair.pass_on(now)
        for wire in (pair.client, pair.worker):
            if wire.next_timer <= now:
                wire.on_time(now)
        pair.pass_on(now)
    assert pair.client.probes_sent == pair.worker.probes_sent == 0


# The connection to the NATS server breaks -------------------------------------------------------------------------------------


def test_streams_go_on_after_the_connection_came_back() -> None:
    pair = Pair()
    number = pair.ask()
    for wire in (pair.client, pair.worker):
        wire.set_port(state=DOWN, now=1.0)
        assert wire.next_timer == math.inf
    assert not pair.worker.send_item(number, b"x"), "nothing is written into a connection that is not there"
    pair.worker.set_port(state=UP, now=2.0)
    pair.client.set_port(state=UP, now=2.1)
    assert pair.client.probes_sent == 1, "asked at once"
    pair.pass_on(2.1)
    assert pair.worker.send_item(number, b"x", last=True)
    assert [event[1] for event in pair.pass_on(2.2)] == ["item"]


def test_what_was_lost_with_the_connection_is_found_at_once() -> None:
    pair = Pair()
    lost, kept = pair.ask(), pair.ask()
    pair.worker.send_item(lost, b"0")
    pair.worker.output()
    for wire in (pair.client, pair.worker):
        wire.set_port(state=DOWN, now=1.0)
        wire.set_port(state=UP, now=1.1)
    events = pair.pass_on(1.1)
    assert [event[2] for event in of(events, "lost")] == [lost]
    assert pair.client.stream(kept) is not None


def test_ends_wait_for_the_connection() -> None:
    pair = Pair()
    ends, fails = pair.ask(), pair.ask()
    pair.worker.set_port(state=DOWN)
    pair.worker.send_end(ends)
    pair.worker.send_error(fails, b"body")
    assert pair.worker.output() == [] and pair.worker.kept == 2 and pair.worker.live == 0
    pair.worker.set_port(state=UP)
    assert pair.pass_on() == [("client", "end", ends), ("client", "error", fails, b"body")]
    assert pair.worker.kept == 0


def test_cancel_waits_for_the_connection() -> None:
    pair = Pair()
    number = pair.ask()
    pair.client.set_port(state=DOWN)
    pair.client.cancel(number, 2)
    pair.client.set_port(state=UP)
    assert pair.pass_on() == [("worker", "cancel", number, 2)]


def test_a_worker_that_reconnects_later_is_not_lost() -> None:
    """After a restart of the server: its subscriptions come when it is back."""
    pair = Pair()
    pair.ask()
    pair.worker_there = False
    pair.client.set_port(state=DOWN, now=1.0)
    assert pair.client.set_port(state=UP, now=1.1) == []
    assert pair.pass_on(1.1) == []
    assert pair.client.next_timer <= 1.21, "asked again soon"
    pair.worker_there = True
    probes(pair, 1.5)
    assert pair.client.live == 1
    pair.worker_there = False
    lost: list[object] = []
    while not lost and (now := pair.client.next_timer) < 10.0:
        pair.client.on_time(now)
        lost = list(pair.pass_on(now))
    assert lost and now <= 4.0


def test_nobody_listens_is_proof_without_an_outage_and_after_a_sign_of_life() -> None:
    pair = Pair()
    pair.client.set_port(state=UP, now=1.0)
    pair.ask()
    pair.worker_there = False
    assert [event[1:4:2] for event in probes_and_events(pair, 1.9)] == [("lost", "PeerLost")]
    pair.worker_there = True
    number = pair.ask()
    pair.client.set_port(state=DOWN, now=2.0)
    pair.client.set_port(state=UP, now=2.1)
    pair.worker.send_item(number)
    pair.pass_on(2.2)
    pair.worker_there = False
    assert [event[1:4:2] for event in probes_and_events(pair, 3.0)] == [("lost", "PeerLost")], (
        "its connection was back, and is gone again"
    )


def test_a_worker_is_asked_again_after_an_outage() -> None:
    """A request would fail if its connection takes longer to come back."""
    pair = Pair()
    pair.client.ping_peer(pair.peer)
    pair.pass_on(1.0)
    assert pair.client.is_fresh(pair.peer, 1.1)
    pair.client.set_port(state=DOWN, now=1.2)
    pair.client.set_port(state=UP, now=1.3)
    assert not pair.client.is_fresh(pair.peer, 1.3)
    pair.client.ping_peer(pair.peer, 1.4)
    pair.pass_on(1.4)
    assert pair.client.is_fresh(pair.peer, 1.5)


def test_a_caller_that_reconnects_later_is_not_lost() -> None:
    pair = Pair()
    number = pair.ask()
    pair.worker.set_port(state=DOWN, now=1.0)
    pair.client_there = False
    pair.worker.set_port(state=UP, now=1.1)
    assert pair.pass_on(1.1) == [] and pair.worker.stream(number) is not None
    pair.client_there = True
    assert pair.worker.next_timer <= 1.7
    pair.worker.on_time(1.7)
    assert pair.pass_on(1.7) == []


def test_old_answers_say_nothing() -> None:
    pair = Pair()
    pair.ask()
    silence(pair)
    pair.pass_on(0.5)
    for headers in (NOBODY, block("D: o")):
        assert pair.client.deliver(CLIENT + b"ffffff00000001", None, headers, b"00000000000001 -\n") == []
    assert pair.client.live == 1 and pair.client.stale == 2


def test_a_probe_is_cut_into_pieces() -> None:
    pair = Pair(client={"budget": 1 << 30}, worker={"max_streams": 3000})
    for _ in range(2500):
        pair.client.request(pair.target)
    pair.pass_on()
    silence(pair)
    sizes = [len(message[3].splitlines()) for message in pair.client.output()]
    assert sizes == [1024, 1024, 452]
