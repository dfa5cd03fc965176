"""Durable requests between two machines, with the queue between them played by the test: every rule of `dynwire._natsqueue`.

The clock is the test's, and so is what gets lost, comes twice, late, or cut at any byte.
"""

from __future__ import annotations

import functools
import math
import random
import re
from typing import Any

import pytest

from dynwire._natsqueue import EventStream, QueueTarget
from dynwire.config import NatsConfig
from dynwire.errors import DeadlineExceeded, DynwireError, PeerLost
from dynwire.nats.confirm import RETRY_S, Unconfirmed
from dynwire.nats.queue import ACK, NAK, TERM, Delivery, Queue, QueueNames, parse_pub_ack, refusal
from dynwire.types import EndpointId
from dynwire.wire.faults import error_body

from .natspair import CLIENT, DOWN, NOBODY, PATH, QUEUE, UP, WORKER, Event, Message, Pair, block, of

NAMES = QueueNames.of("dynwire", EndpointId.parse(PATH))
SUBJECT = NAMES.subject.encode()
FIRST = CLIENT + b"00000000000001"
OTHER = b"dynwire.i.ffeeddccbbaa9988"
FINAL = WORKER + b"._.fffffe"
FULL = b'{"error":{"code":400,"err_code":10077,"description":"maximum messages exceeded"}}'
NO_LEADER = b'{"error":{"code":503,"err_code":10008,"description":"unavailable"}}'


class Caller:
    """`dynwire.nats.caller.CallerQueue`, as far as the machine asks it."""

    def __init__(self, ttl: bool) -> None:
        self.names = NAMES
        self.queue = Queue(NAMES, 3600.0, 120.0, ttl, False, None, 0.0)
        self.taken_back: list[int] = []
        self.verified: list[int] = []
        self.late: list[bytes] = []
        self.looked = 0

    def answered(self, answer: bytes, size: int) -> int:
        ack = parse_pub_ack(answer)
        if ack.error is None:
            return ack.seq
        error = refusal(NAMES, ack.error, NatsConfig(), size)
        if error is None:
            return 0
        raise error

    def confirmed_late(self, answer: bytes) -> None:
        self.late.append(answer)

    def take_back(self, number: int) -> None:
        self.taken_back.append(number)

    def verify(self, number: int) -> None:
        self.verified.append(number)

    def look(self) -> None:
        self.looked += 1


class Consumer:
    """`dynwire.nats.pull.QueueConsumer`, as far as the machine asks it."""

    def __init__(self) -> None:
        self.redelivered = 0
        self.refuses: DynwireError | None = None
        self.verdicts: list[tuple[int, bytes]] = []
        self.returned: list[int] = []
        self.silent: list[tuple[int, Any]] = []

    def refusal(self, delivery: Delivery, timeout_ms: int) -> int | DynwireError:
        return self.refuses or timeout_ms or 5000

    def finished(self, delivery: Delivery, verdict: bytes) -> None:
        self.verdicts.append((delivery.seq, verdict))

    def give_back(self, delivery: Delivery) -> None:
        self.returned.append(delivery.seq)

    def unheard(self, delivery: Delivery, again: Any) -> None:
        self.silent.append((delivery.seq, again))


class QueuePair(Pair):
    """A caller and a worker with a queue between them. What is stored is in ``stored``; `give` hands it to the worker."""

    def __init__(self, *, ttl: bool = False, **sides: Any) -> None:
        super().__init__(client={"connection_id": bytes.fromhex("0123456789abcdef"), **sides.pop("client", {})}, **sides)
        self.caller, self.consumer = Caller(ttl), Consumer()
        self.queue = QueueTarget(self.caller, Unconfirmed(120.0))
        self.client.add_queue(self.queue)
        self.stored: list[Message] = []
        self.ids: dict[bytes, int] = {}
        self.answer: bytes | None = b""
        """what the queue says to a publish; empty: that it has stored it, None: nothing"""

    def _deliver(self, message: Message, now: float) -> list[Event]:
        subject, reply, headers, _ = message
        if subject != SUBJECT:
            return super()._deliver(message, now)
        assert reply is not None
        answer = self.answer
        if answer == b"":
            (name,) = re.findall(rb"Nats-Msg-Id: (\S+)\r\n", headers)
            known = self.ids.setdefault(name, len(self.stored) + 1)
            if known > len(self.stored):
                self.stored.append(message)
            answer = b'{"stream":"s","seq":%d}' % known
        return [] if answer is None else super()._deliver((reply, None, b"", answer), now)

    def queued(self, payload: bytes = b"x", now: float = 0.0, **options: Any) -> EventStream:
        """A request that the queue has stored."""
        stream = self.client.request(self.queue, payload, now=now, **options)
        assert self.pass_on(now) == [("client", "accept", stream.number)]
        return stream

    def give(self, number: int = 0, attempt: int = 1, now: float = 0.0) -> list[Event]:
        """Deliver what was stored as ``number`` (the last one) to the worker."""
        seq = number or len(self.stored)
        _, _, headers, payload = self.stored[seq - 1]
        delivery = Delivery(b"$JS.ACK.%d.%d" % (seq, attempt), seq, attempt, 0.0, 0)
        return self.worker.deliver_queued(self.consumer, delivery, QUEUE + PATH.encode(), headers, payload, now)

    def says(
        self, kind: str, *numbers: int, who: bytes = WORKER, to: bytes = FIRST, payload: bytes = b"", now: float = 0.0
    ) -> list[Event]:
        """A message of some worker's to the caller."""
        head = block(f"D: {' '.join([kind, *map(str, numbers)])}")
        return self.client.deliver(to, who + b"._.00000000000001", head, payload, now)


def published(pair: QueuePair) -> tuple[bytes, bytes | None, bytes, bytes]:
    (message,) = [message for message in pair.client.output() if message[0] == SUBJECT]
    return message


# To the queue -----------------------------------------------------------------------------------------------------------------


def test_a_request_is_published_with_its_inbox() -> None:
    pair = QueuePair()
    pair.client.request(pair.queue, b"data", kind=1, meta=b"a: b\r\n", timeout=2.5)
    assert published(pair) == (
        SUBJECT,
        FIRST,
        b"NATS/1.0\r\nD: r 1 0 16384 2502 10000\r\nNats-Msg-Id: 0123456789abcdef-1-0\r\n"
        b"Dynwire-Inbox: " + FIRST + b"\r\na: b\r\n\r\n",
        b"data",
    )


def test_with_a_time_to_live_where_the_queue_knows_it() -> None:
    pair = QueuePair(ttl=True)
    pair.client.request(pair.queue, b"data", timeout=2.5)
    assert b"\r\nNats-TTL: 4s\r\n" in published(pair)[2]
    pair.client.request(pair.queue, b"data")
    assert b"TTL" not in published(pair)[2]


def test_it_is_accepted_when_the_queue_has_it() -> None:
    pair = QueuePair()
    stream = pair.queued()
    assert stream.request_.number == 1 and len(pair.queue.unconfirmed) == 0
    assert pair.client.waiting_in(pair.queue) == [1]


def test_what_is_not_confirmed_is_repeated_and_stored_once() -> None:
    pair = QueuePair()
    pair.answer = None
    stream = pair.client.request(pair.queue, b"x")
    pair.pass_on()
    assert pair.client.on_time(0.0) == []
    assert pair.client.next_timer == 0.25, "for signs of life; the queue has longer"
    pair.client.on_time(RETRY_S - 0.01)
    assert pair.client.output() == []
    pair.client.on_time(RETRY_S)
    first = published(pair)
    pair.client.on_time(RETRY_S + 2.0)
    assert published(pair) == first, "the same id: the queue stores it once"
    confirmed = b'{"stream":"s","seq":7}'
    assert pair.client.deliver(FIRST, None, None, confirmed) == [("accept", stream.number)]
    assert pair.client.deliver(FIRST, None, None, b'{"stream":"s","seq":7,"duplicate":true}') == []
    assert stream.request_.number == 7 and pair.client.on_time(100.0) == [] and pair.client.output() == []


def test_beyond_the_duplicate_window_it_is_given_up() -> None:
    pair = QueuePair()
    pair.answer = None
    stream = pair.client.request(pair.queue, b"x")
    (event,) = pair.client.on_time(120.0)
    assert event[:4] == ("lost", stream.number, "DynwireError", True)
    assert "DYNWIRE_NATS_QUEUE_DUPLICATE_WINDOW" in event[4] and pair.client.live == 0


def test_a_refusal_says_that_nothing_was_sent() -> None:
    pair = QueuePair()
    pair.answer = FULL
    stream = pair.client.request(pair.queue, b"x")
    ((_, *event),) = pair.pass_on()
    assert event[:4] == ["lost", stream.number, "Overloaded", False]
    assert pair.client.live == 0 and len(pair.queue.unconfirmed) == 0 and pair.client.granted == 0


def test_a_queue_without_a_leader_is_asked_again() -> None:
    pair = QueuePair()
    pair.answer = NO_LEADER
    stream = pair.client.request(pair.queue, b"x")
    assert pair.pass_on() == [] and stream.open
    pair.answer = b""
    pair.client.on_time(RETRY_S)
    assert pair.pass_on() == [("client", "accept", stream.number)]


def test_no_queue_takes_the_subject() -> None:
    """503: it was deleted, or lost with its storage. It is looked for; the request stays."""
    pair = QueuePair()
    stream = pair.client.request(pair.queue, b"x")
    pair.client.output()
    assert pair.client.deliver(FIRST, None, NOBODY, b"") == []
    assert pair.caller.looked == 1 and stream.open
    pair.client.queue_found(pair.queue, True, 1.0)
    assert b"-1-0\r\n" in published(pair)[2], "the same request: it was never stored"


def test_without_a_connection_it_waits_and_goes_out_again() -> None:
    pair = QueuePair()
    pair.answer = None
    stream = pair.client.request(pair.queue, b"x")
    first = published(pair)
    pair.client.set_port(state=DOWN)
    assert pair.client.on_time(RETRY_S) == [] and pair.client.output() == []
    pair.client.set_port(state=UP, now=3.0)
    pair.client.queue_found(pair.queue, False, 3.0)
    assert published(pair) == first and stream.open


# From the worker --------------------------------------------------------------------------------------------------------------


def test_a_call_is_answered_with_one_message() -> None:
    pair = QueuePair()
    stream = pair.queued(reader=False)
    ((_, number, path, payload, *_),) = pair.give()
    assert (number, path, payload) == (stream.number, PATH, b"x")
    pair.worker.send_item(number, b"reply", last=True)
    assert pair.pass_on() == [("client", "item", number, b"reply", 0, True)]
    assert pair.consumer.verdicts == [(1, ACK)] and pair.client.live == pair.worker.live == 0
    assert pair.client.granted == 0 and pair.client.waiting_in(pair.queue) == []


def test_a_stream_with_its_end() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give(attempt=3)
    pair.worker.send_accept(number)
    for n in range(3):
        assert pair.worker.send_item(number, b"%d" % n)
    pair.worker.send_end(number)
    headers = [message[2] for message in pair.worker.output()]
    assert headers == [block(f"D: {line}") for line in ("a 3", "i 0 0 0 3", "i 1 0 0 3", "i 2 0 0 3", "e 3 3")]


def test_the_reply_may_come_before_the_confirmation() -> None:
    pair = QueuePair()
    pair.answer = None
    stream = pair.client.request(pair.queue, b"x")
    pair.pass_on()
    assert pair.says("i", 0, 0, 1, 1, payload=b"fast") == [("item", stream.number, b"fast", 0, True)]
    assert pair.client.deliver(FIRST, None, None, b'{"stream":"s","seq":1}') == []
    assert pair.client.live == 0 and pair.client.on_time(10.0) == [] and pair.client.output() == []


def test_an_error_ends_it() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    body = error_body(DynwireError("no"))
    pair.worker.send_error(number, body)
    assert pair.pass_on() == [("client", "error", number, body)] and pair.consumer.verdicts == [(1, ACK)]


def test_credit_goes_to_the_worker_that_has_it() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.worker.send_accept(number)
    while pair.worker.send_item(number, bytes(2000)):
        pass
    events = pair.pass_on()
    items = of(events, "item")
    pair.client.take(number, len(items) * (2000 + 64))
    assert of(pair.pass_on(), "credit") == [("worker", "credit", number)]


# Several runs -----------------------------------------------------------------------------------------------------------------


def test_a_later_attempt_takes_the_place_of_an_earlier_one() -> None:
    pair = QueuePair()
    number = pair.queued().number
    assert pair.says("i", 0, 0, 0, 1, payload=b"old") == [("item", number, b"old", 0, False)]
    assert pair.says("i", 0, 0, 0, 2, who=OTHER, payload=b"new") == [("restart", number), ("item", number, b"new", 0, False)]
    assert pair.says("i", 1, 0, 0, 1, payload=b"old") == [], "of the first run, late"
    assert pair.says("e", 1, 2, who=OTHER) == [("end", number)]
    assert pair.client.restarted == 1 and pair.client.stale == 1


def test_once_items_were_taken_no_other_run_may_answer() -> None:
    pair = QueuePair()
    stream = pair.queued()
    pair.says("i", 0, 0, 0, 1, payload=b"old")
    stream.untouched = False
    (event,) = pair.says("i", 0, 0, 0, 2, who=OTHER, payload=b"new")
    assert event[:3] == ("lost", stream.number, "PeerLost") and pair.client.live == 0
    assert pair.caller.taken_back == [1], "nobody waits for it any more"


def test_a_whole_reply_is_welcome_from_any_run() -> None:
    pair = QueuePair()
    number = pair.queued().number
    assert pair.says("a", 2, payload=b"$JS.ACK.x") == [("accept", number)]
    assert pair.says("i", 0, 0, 1, 1, who=OTHER, payload=b"first") == [("item", number, b"first", 0, True)]


def test_two_workers_with_the_same_attempt_are_told_apart() -> None:
    """A server that was killed counts from 1 again."""
    pair = QueuePair()
    number = pair.queued().number
    assert pair.says("i", 0, 0, 0, 1, payload=b"a") == [("item", number, b"a", 0, False)]
    assert pair.says("i", 1, 0, 0, 1, who=OTHER, payload=b"b") == []
    assert pair.says("i", 1, 0, 0, 1, payload=b"c") == [("item", number, b"c", 0, False)]


def test_what_a_worker_gave_back_comes_from_another_one() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.worker.send_accept(number)
    pair.pass_on()
    pair.worker.evicting = True
    pair.worker.send_error(number, error_body(PeerLost("shutting down")))
    assert pair.pass_on() == [("client", "restart", number)]
    assert pair.consumer.verdicts == [(1, NAK)]
    assert pair.says("i", 0, 0, 1, 2, who=OTHER, payload=b"new") == [("item", number, b"new", 0, True)]


def test_a_worker_that_is_gone_loses_its_request_to_another() -> None:
    """The caller finds out, tells the queue in its place, and has the queue asked whether it still has the request."""
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.worker.send_accept(number)
    pair.pass_on()
    (known,) = pair.client.requests()
    assert (known["worker"], known["attempt"]) == ("nats:" + WORKER.decode(), 1)
    pair.worker_there = False
    for n in range(8):
        events = [*(("client", *event) for event in pair.client.on_time(n * 0.5)), *pair.pass_on(n * 0.5)]
        if events:
            break
    assert events == [("client", "restart", number)]
    assert (b"$JS.ACK.1.1", None, b"", b"-NAK") in pair.to_others and pair.caller.verified == [1]
    assert pair.says("i", 0, 0, 1, 1, payload=b"late", now=5.0)[0][0] == "item", "what it sent as its last is still welcome"


def test_the_queue_is_lost_with_the_request() -> None:
    pair = QueuePair()
    stream = pair.queued()
    pair.client.queue_found(pair.queue, True, 1.0)
    assert pair.client.take_events() == [("restart", stream.number)]
    message = published(pair)
    assert b"D: r 0 0 16384 0 10000 1 0\r\nNats-Msg-Id: 0123456789abcdef-1-1\r\n" in message[2], (
        "run 1, and nobody is known to have had it"
    )
    assert stream.request_.run == 1 and pair.client.requeued == 1
    assert pair.says("i", 0, 0, 0, 1, payload=b"of run 0") == [] and pair.client.stale == 1
    assert pair.says("i", 0, 0, 1, 1025, payload=b"of run 1") == [("item", stream.number, b"of run 1", 0, True)]


def test_a_request_is_queued_anew_sixteen_times() -> None:
    pair = QueuePair()
    stream = pair.queued()
    for run in range(1, 17):
        pair.client.queue_found(pair.queue, True, float(run))
        assert pair.pass_on(float(run)) == [("client", "restart", stream.number)] and stream.request_.run == run
    pair.client.queue_found(pair.queue, True, 17.0)
    (event,) = pair.client.take_events()
    assert event[:4] == ("lost", stream.number, "PeerLost", True)


def test_nothing_is_queued_anew_after_the_deadline() -> None:
    pair = QueuePair()
    stream = pair.queued(timeout=5.0)
    pair.client.queue_found(pair.queue, True, 5.1)
    (event,) = pair.client.take_events()
    assert event[:3] == ("lost", stream.number, "PeerLost") and pair.client.requeued == 0


def test_a_reply_that_was_lost_is_asked_for_anew() -> None:
    """The request has left the queue, and no reply has come: a worker has had it, whoever that was."""
    pair = QueuePair()
    stream = pair.queued()
    pair.client.missing_in(pair.queue, {2}, 1.0)
    assert pair.client.take_events() == []
    pair.client.missing_in(pair.queue, {1}, 1.0)
    assert pair.client.take_events() == [("restart", stream.number)]
    assert b" 10000 1 1\r\n" in published(pair)[2] and stream.request_.given == 1


# How often it was given to a worker -------------------------------------------------------------------------------------------


def deliveries(pair: QueuePair, **how: int) -> int:
    ((_, number, *_),) = pair.give(**how)
    found: int = pair.worker.stream(number).delivery_count  # type: ignore[union-attr]
    return found


def test_deliveries_are_counted_by_the_queue() -> None:
    pair = QueuePair()
    pair.queued()
    assert deliveries(pair) == 1 and pair.consumer.redelivered == 0
    pair.queued()
    assert deliveries(pair, attempt=4) == 4


def test_a_first_run_is_never_called_a_repetition() -> None:
    """Its queue was lost twice, and no worker had it: what it runs as first is its first run."""
    pair = QueuePair()
    stream = pair.queued()
    for run in (1, 2):
        pair.client.queue_found(pair.queue, True, float(run))
        pair.pass_on(float(run))
    assert stream.request_.run == 2
    assert deliveries(pair) == 1 and pair.consumer.redelivered == 0


def test_what_the_caller_knows_of_earlier_runs_counts() -> None:
    pair = QueuePair()
    stream = pair.queued()
    pair.says("a", 2, who=OTHER, payload=b"$JS.ACK.x")  # a worker has it, the second one
    pair.says("b", 2, who=OTHER)  # and has given it back
    pair.client.take_events()
    pair.client.queue_found(pair.queue, True, 1.0)
    pair.pass_on(1.0)
    assert (stream.request_.run, stream.request_.given) == (1, 2)
    assert deliveries(pair) == 3 and pair.consumer.redelivered == 1


def test_a_worker_knows_what_it_has_begun() -> None:
    """The server was killed, and counts from 1 again."""
    pair = QueuePair()
    pair.queued()
    assert deliveries(pair, attempt=2) == 2
    assert [event[0] for event in pair.give()] == ["cancel", "request"], "the run before is given up"
    assert pair.worker.stream(1).delivery_count == 3  # type: ignore[union-attr]
    assert pair.consumer.redelivered == 1


def test_a_worker_remembers_a_bounded_number() -> None:
    pair = QueuePair()
    pair.queued()
    _, _, headers, _ = pair.stored[0]
    for n in range(2, 4099):
        pair.stored = [(SUBJECT, None, headers.replace(FIRST, CLIENT + b"%06x%08x" % (0, n)), b"")]
        ((_, number, *_),) = pair.give()
        pair.worker.send_item(number, last=True)
        pair.worker.output()
    pair.stored = [(SUBJECT, None, headers.replace(FIRST, CLIENT + b"%06x%08x" % (0, 2)), b"")]
    assert deliveries(pair) == 1, "the oldest was forgotten"
    pair.stored = [(SUBJECT, None, headers.replace(FIRST, CLIENT + b"%06x%08x" % (0, 4098)), b"")]
    assert deliveries(pair) == 2


def test_a_callers_number_without_sense_is_bounded() -> None:
    pair = QueuePair()
    pair.queued()
    subject, reply, headers, payload = pair.stored[0]
    pair.stored[0] = (subject, reply, headers.replace(b" 10000\r\n", b" 10000 1 999999999999999\r\n"), payload)
    assert deliveries(pair) == (1 << 20) + 1


# Giving up --------------------------------------------------------------------------------------------------------------------


def test_a_request_that_is_given_up_leaves_the_queue() -> None:
    pair = QueuePair()
    stream = pair.queued()
    pair.client.cancel(stream.number, 2)
    assert pair.caller.taken_back == [1] and pair.client.live == 0


def test_a_confirmation_after_that() -> None:
    pair = QueuePair()
    pair.answer = None
    stream = pair.client.request(pair.queue, b"x")
    pair.client.cancel(stream.number, 2)
    assert pair.caller.taken_back == []
    answer = b'{"stream":"s","seq":1}'
    assert pair.client.deliver(FIRST, None, None, answer) == []
    assert pair.caller.late == [answer]
    pair.client.deliver(FIRST, None, None, answer)
    assert pair.caller.late == [answer], "once"


def test_stop_reaches_a_worker_that_was_not_known_yet() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.client.cancel(number, 1)
    assert pair.pass_on() == []
    pair.give()
    pair.worker.send_accept(number)
    assert of(pair.pass_on(), "cancel") == [("worker", "cancel", number, 1)]


def test_kill_reaches_the_worker() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.worker.send_accept(number)
    pair.pass_on()
    pair.client.cancel(number, 2)
    assert pair.pass_on() == [("worker", "cancel", number, 2)]


# The worker -------------------------------------------------------------------------------------------------------------------


def test_a_worker_without_room_gives_back() -> None:
    pair = QueuePair()
    pair.queued()
    pair.worker.full = True
    assert pair.give() == [] and pair.consumer.returned == [1] and pair.worker.output() == []


@pytest.mark.parametrize(
    ("error", "counter"),
    [(DeadlineExceeded("late", phase="total"), "expired"), (PeerLost("deadly", sent="yes", retryable=False), "poisonous")],
)
def test_what_is_not_run_is_refused(error: DynwireError, counter: str) -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.consumer.refuses = error
    assert pair.give() == [] and pair.consumer.verdicts == [(1, TERM)]
    assert pair.worker.stats()[counter] == 1
    assert pair.pass_on() == [("client", "error", number, error_body(error))]


def test_nobody_listens_for_the_reply() -> None:
    """The caller may be reconnecting: it is published again, until somebody listens or it is given up."""
    pair = QueuePair()
    number = pair.queued(reader=False).number
    pair.give()
    pair.client_there = False
    pair.worker.send_item(number, b"reply", last=True)
    assert pair.pass_on() == []
    ((seq, again),) = pair.consumer.silent
    assert seq == 1 and isinstance(again, functools.partial)
    pair.client_there = True
    again()
    assert pair.pass_on() == [("client", "item", number, b"reply", 0, True)]
    assert pair.consumer.verdicts == [(1, ACK), (1, ACK)]
    assert pair.worker.deliver(FINAL + b"00000001", None, NOBODY, b"") == [] and len(pair.consumer.silent) == 1, "late"


def test_a_stream_whose_end_nobody_heard_is_run_anew() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.client_there = False
    pair.worker.send_end(number)
    pair.pass_on()
    assert pair.consumer.silent == [(1, None)]


def test_an_item_that_nobody_heard_ends_the_run() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.client_there = False
    pair.worker.send_item(number, b"1")
    (event,) = pair.pass_on()
    assert event[:4] == ("worker", "lost", number, "PeerLost")
    assert pair.consumer.silent == [(1, None)] and pair.consumer.verdicts == [] and pair.worker.live == 0


def test_news_that_nobody_heard_are_told_again() -> None:
    pair = QueuePair()
    number = pair.queued().number
    pair.give()
    pair.client_there = False
    pair.worker.send_accept(number)
    assert pair.pass_on() == [] and pair.worker.next_timer <= 0.25
    assert pair.worker.on_time(0.25) == [("timer", number, 0.25)]
    pair.client_there = True
    pair.worker.send_accept(number)
    pair.pass_on()
    assert pair.client.requests()[0]["worker"] is not None


def test_what_was_published_before_a_mark_has_been_dealt_with() -> None:
    pair = QueuePair()
    called: list[int] = []
    pair.worker.mark(lambda: called.append(1))
    pair.worker.mark(lambda: called.append(2))
    assert called == []
    pair.pass_on()
    assert called == [1, 2]
    pair.worker.mark(lambda: called.append(3))
    pair.worker.output()
    pair.worker.set_port(state=DOWN)
    pair.worker.mark(lambda: called.append(4))
    pair.worker.set_port(state=UP)
    pair.pass_on()
    assert called == [1, 2], "nothing is known of what a lost connection carried"


def test_a_request_that_was_queued_anew_ends_the_run_before() -> None:
    pair = QueuePair()
    stream = pair.queued()
    pair.give()
    pair.client.queue_found(pair.queue, True, 1.0)
    pair.client.take_events()
    pair.pass_on(1.0)
    events = pair.give(now=1.0)
    assert [event[:3] for event in events] == [("cancel", stream.number, 2), ("request", stream.number, PATH)]


def test_a_refused_probe_of_a_reply_that_waits() -> None:
    """A caller that asks for a request whose reply nobody heard is not told that it is unknown."""
    pair = QueuePair()
    number = pair.queued(reader=False).number
    pair.give()
    pair.worker.send_item(number, b"reply", last=True)
    pair.worker.output()
    pair.worker.deliver(WORKER + b"._", CLIENT + b"ffffff00000001", block("D: p"), b"00000000000001 4096\n00000100000002 1\n")
    ((_, _, _, body),) = pair.worker.output()
    assert body == b"00000000000001 0\n00000100000002 -\n"
    pair.worker.forget_final(1)
    pair.worker.deliver(WORKER + b"._", CLIENT + b"ffffff00000001", block("D: p"), b"00000000000001 4096\n")
    assert pair.worker.output()[0][3] == b"00000000000001 -\n"


def test_the_end_of_everything() -> None:
    pair = QueuePair()
    stream = pair.queued()
    pair.give()
    assert pair.client.lost() == [stream.number] and pair.worker.lost() == [stream.number]
    assert pair.client.next_timer == pair.worker.next_timer == math.inf
    assert pair.consumer.verdicts == [], "whoever closes the connection gives them back"


# Cut at every byte, and changed at random ---------------------------------------------------------------------------------------


def test_a_request_cut_anywhere() -> None:
    whole = QueuePair()
    whole.client.request(whole.queue, b"x", meta=b"traceparent: 00\r\n", timeout=9.0)
    subject, reply, headers, payload = published(whole)
    for at in range(len(headers)):
        pair = QueuePair()
        pair.stored = [(subject, reply, headers[:at], payload)]
        assert pair.give() == [], at
        # a block without its end is malformed; it is answered if it says where to
        assert pair.consumer.verdicts == [(1, TERM)] and pair.worker.live == 0, at
        assert len(pair.worker.output()) <= 1, at
    pair = QueuePair()
    pair.stored = [(subject, reply, headers, payload)]
    assert len(pair.give()) == 1


MESSAGES = [
    ("a 1", b"$JS.ACK.1.1"),
    ("i 0 0 0 1", b"item"),
    ("i 0 0 1 1", b"whole"),
    ("e 0 1", b""),
    ("x 1", error_body(DynwireError("no"))),
    ("b 1", b""),
]


@pytest.mark.parametrize(("line", "payload"), MESSAGES)
def test_a_message_of_a_worker_cut_anywhere(line: str, payload: bytes) -> None:
    """A header block without its end counts as malformed, and the request goes on."""
    head = block(f"D: {line}")
    for at in range(1, len(head)):
        pair = QueuePair()
        stream = pair.queued()
        assert pair.client.deliver(FIRST, WORKER + b"._.00000000000001", head[:at], payload) == [], at
        assert pair.client.malformed == 1 and stream.open, at
        assert pair.says("i", 0, 0, 1, 1, payload=b"good") == [("item", stream.number, b"good", 0, True)], at


@pytest.mark.parametrize("answer", [b'{"stream":"s","seq":1}', FULL, NO_LEADER])
def test_an_answer_of_the_queue_cut_anywhere(answer: bytes) -> None:
    """What is no answer ends the request: whether it was stored is not known."""
    for at in range(len(answer)):
        pair = QueuePair()
        pair.answer = None
        stream = pair.client.request(pair.queue, b"x")
        pair.pass_on()
        (event,) = pair.client.deliver(FIRST, None, None, answer[:at])
        assert event[:3] == ("lost", stream.number, "ProtocolError"), at
        assert pair.client.live == 0 and len(pair.queue.unconfirmed) == 0


def test_numbers_beyond_their_bounds() -> None:
    pair = QueuePair()
    stream = pair.queued()
    for line in ("a 4294967296", "i 0 0 1 4294967296", "q 1", "i", "r 0 0 0 0"):
        assert all(event[0] != "item" for event in pair.says(*line.split()[:1], *map(int, line.split()[1:])))
    assert pair.client.live <= 1 and pair.client.malformed >= 3
    del stream


class Storm:
    """One stream through a queue, while anything happens. `over` is how it ended, `got` what the caller has of it."""

    ITEMS = 5

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.pair = QueuePair()
        self.stream = self.pair.queued(timeout=300.0)
        self.number = self.stream.number
        self.got: list[int] = []
        self.over: list[Event] = []
        self._now = 0.0
        self._attempt = 0
        self.pair.tamper = self._fate

    def _fate(self, message: Message) -> list[Message]:
        chance = self._rng.random()
        return [] if chance < 0.1 else [message, message] if chance < 0.2 else [message]

    def _look(self, events: list[Event]) -> None:
        for name, _, *rest in events:
            assert not self.over, f"{name} after {self.over}"
            if name == "restart":
                assert self.stream.untouched, "what the application has taken is not taken back"
                self.got.clear()
            elif name == "item":
                self.got.append(int(rest[0]))
            elif name in ("end", "error", "lost"):
                self.over.append((name, *rest))
        assert self.got == list(range(len(self.got)))

    def step(self) -> None:
        pair, rng, now = self.pair, self._rng, self._now + self._rng.choice((0.0, 0.3, 1.1))
        self._now = now
        choice = rng.random()
        running = pair.worker.stream(self.number)
        if choice < 0.2:
            self._attempt += 1
            killed = of([("worker", *event) for event in pair.give(attempt=rng.choice((1, self._attempt)), now=now)], "cancel")
            if killed:
                pair.worker.send_error(self.number, error_body(PeerLost("killed")), killed=True)
        elif choice < 0.75 and running is not None and not running.killed:
            if running.sent == self.ITEMS:
                pair.worker.send_end(self.number)
            else:
                pair.worker.send_item(self.number, b"%d" % running.sent)
        elif choice < 0.8:
            pair.client.queue_found(pair.queue, rng.random() < 0.5, now)
        elif choice < 0.84:
            self._look(pair.client.set_port(state=DOWN))
            self._look(pair.client.set_port(state=UP, now=now))
        elif choice < 0.9 and self.got:
            self.stream.untouched = False
        self._look(pair.client.take_events())
        self._look(pair.client.on_time(now))
        pair.worker.on_time(now)
        self._look([event[1:] for event in pair.pass_on(now) if event[0] == "client"])


def test_whatever_is_lost_or_repeated_a_caller_gets_each_item_once_and_in_order() -> None:
    """Messages get lost and come twice, requests are delivered again, forgotten by their queue, and connections break."""
    ends = set()
    for seed in range(100):
        storm = Storm(seed)
        for _ in range(200):
            storm.step()
            if storm.over:
                break
        else:
            storm.pair.client.cancel(storm.number, 2)
            storm.over.append(("given up",))
        ends.add(storm.over[0][0])
        if storm.over[0][0] == "end":
            assert storm.got == list(range(storm.ITEMS)), seed
        client = storm.pair.client
        assert client.live == 0 and client.granted == 0 and len(storm.pair.queue.unconfirmed) == 0, seed
    assert ends >= {"end", "lost"}
