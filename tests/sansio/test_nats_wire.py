"""Requests, items and ends of the nats plane: two machines that hand each other messages."""

from __future__ import annotations

from typing import Any

import pytest

from dynwire import DynwireError, MessageTooLarge, Overloaded, Payload, PlaneMismatch
from dynwire._buffers import get_pool
from dynwire._natsqueue import EventWire
from dynwire._natswire import LIMITS, NatsPeer, NatsTarget, read_headers, write_headers
from dynwire.wire.faults import error_body, error_from_body

from .natspair import CLIENT, DOWN, NOBODY, PATH, QUEUE, UP, WORKER, Message, Pair, block, of

FIRST_CREDIT = LIMITS["first_credit"]
OVERHEAD = LIMITS["item_overhead"]


def shown(body: bytes) -> DynwireError:
    return error_from_body(body, peer="worker", request_id=None)


# The messages, byte by byte ---------------------------------------------------------------------------------------------------


def test_a_unary_call_is_one_message_each_way() -> None:
    pair = Pair()
    pair.client.request(pair.target, b"hello", reader=False, kind=1, timeout=1.5)
    assert pair.client.output() == [
        (
            WORKER + b".a.b.echo",
            CLIENT + b"000000" + b"00000001",
            b"NATS/1.0\r\nD: r 1 0 4096 1501 10000\r\n\r\n",
            b"hello",
        )
    ]
    pair.client.lost()
    number = (pair := Pair()).ask(b"hello", reader=False)
    assert pair.worker.send_item(number, b"there", kind=2, last=True)
    assert pair.worker.output() == [(CLIENT + b"00000000000001", None, b"NATS/1.0\r\nD: i 0 2 1\r\n\r\n", b"there")]


def test_messages_of_a_stream() -> None:
    pair = Pair()
    number = pair.ask()
    assert pair.carried == [
        (WORKER + b".a.b.echo", CLIENT + b"00000000000001", b"NATS/1.0\r\nD: r 0 0 16384 0 10000\r\n\r\n", b"x")
    ]
    pair.worker.send_accept(number)
    pair.worker.send_item(number, b"one")
    pair.worker.send_item(number, b"", kind=1)
    pair.worker.send_end(number)
    inbox = CLIENT + b"00000000000001"
    messages = pair.worker.output()
    assert messages == [
        (inbox, None, b"NATS/1.0\r\nD: a\r\n\r\n", b""),
        (inbox, None, b"NATS/1.0\r\nD: i 0 0 0\r\n\r\n", b"one"),
        (inbox, None, b"NATS/1.0\r\nD: i 1 1 0\r\n\r\n", b""),
        (inbox, None, b"NATS/1.0\r\nD: e 2\r\n\r\n", b""),
    ]
    events = [event for message in messages for event in pair.client.deliver(*message)]
    assert events == [("accept", 1), ("item", 1, b"one", 0, False), ("item", 1, b"", 1, False), ("end", 1)]
    assert pair.client.live == pair.worker.live == 0
    assert pair.client.granted == 0


def test_an_error_ends_a_stream() -> None:
    pair = Pair()
    number = pair.ask()
    body = error_body(Overloaded("full", sent="no"))
    pair.worker.send_error(number, body)
    assert pair.worker.output() == [(CLIENT + b"00000000000001", None, b"NATS/1.0\r\nD: x\r\n\r\n", body)]
    assert pair.client.deliver(CLIENT + b"00000000000001", None, block("D: x"), body) == [("error", 1, body)]
    assert pair.client.live == pair.worker.live == 0


def test_cancel_reaches_the_handler_before_the_first_item() -> None:
    pair = Pair()
    number = pair.ask()
    pair.client.cancel(number, 1)
    assert pair.client.output() == [(WORKER + b"._", None, b"NATS/1.0\r\nD: c 1\r\n\r\n", CLIENT + b"00000000000001")]
    assert pair.worker.deliver(WORKER + b"._", None, block("D: c 1"), CLIENT + b"00000000000001") == [("cancel", 1, 1)]
    pair.client.cancel(number, 2)
    assert pair.pass_on() == [("worker", "cancel", 1, 2)]
    assert pair.client.live == 0
    pair.worker.send_item(number, b"late", last=True)
    assert pair.pass_on() == []
    assert pair.client.stale == 1


def test_a_slot_used_again_has_another_number() -> None:
    """A late message for an old request is not taken for one of the request that has its slot now."""
    pair = Pair()
    old = pair.ask()
    pair.client.cancel(old, 2)
    new = pair.client.request(pair.target)
    assert new.inbox[:-8] == CLIENT + b"000000" and new.number == old + 1
    assert [event[:3] for event in pair.pass_on()] == [("worker", "cancel", old), ("worker", "request", new.number)]
    pair.worker.send_item(old, b"old", last=True)
    pair.worker.send_item(new.number, b"new", last=True)
    assert pair.pass_on() == [("client", "item", new.number, b"new", 0, True)]


def test_large_payloads_stay_in_their_block() -> None:
    pair = Pair()
    number = pair.ask()
    before = get_pool().stats()["in_use_blocks"]
    memory = get_pool().acquire(100_000)
    (event,) = pair.client.deliver(CLIENT + b"00000000000001", None, block("D: i 0 0 1"), memory)
    assert event[:2] == ("item", number) and len(event[2]) == 100_000
    del memory
    assert get_pool().stats()["in_use_blocks"] == before


def test_requests_of_any_kind_of_memory() -> None:
    pair = Pair()
    data = bytearray(100_000)
    pair.client.request(pair.target, data)
    data.extend(b"x")  # the port of this test copies: nothing holds it any more
    pair.pass_on()
    pair.ask(memoryview(data))
    pair.ask(Payload(b"y" * 100_000))


# Headers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "request_id", "token", "lines"),
    [
        ({"traceparent": "00-1"}, None, None, b"traceparent: 00-1\r\n"),
        ({"a": "b", "x_y": "ü: 1"}, "mine", None, "Dynwire-Id: mine\r\na: b\r\nx_y: ü: 1\r\n".encode()),
        ({}, None, "secret", b"Dynwire-Token: secret\r\n"),
        ({}, None, None, None),
        (None, None, None, None),
        ({"empty": ""}, None, None, b"empty: \r\n"),
    ],
)
def test_headers_are_lines(headers: Any, request_id: str | None, token: str | None, lines: bytes | None) -> None:
    written = write_headers(headers, request_id, None if token is None else token.encode())
    assert written == lines
    assert read_headers(written or b"") == (headers or {}, request_id, token)


@pytest.mark.parametrize(
    "headers",
    [
        {"two lines": "x"},
        {"a": "x\r\nD: r 0 0 0 0"},
        {"a": " x "},
        {"d": "r 0 0 0 0"},
        {"dynwire-id": "not the id"},
        {"": "nameless"},
        {"a": "\0"},
        {"a:b": "c"},
        {"fits": "yes", "käse": "no"},
    ],
)
def test_headers_that_are_no_lines_travel_all_the_same(headers: dict[str, str]) -> None:
    written = write_headers(headers)
    assert written is not None and written.count(b"Dynwire-Meta: ") == 1
    assert written.count(b"\r\n") == len(written.split(b"\r\n")) - 1 and b"\r\nD:" not in b"\r\n" + written
    assert read_headers(written) == (headers, None, None)


def test_an_id_that_is_no_line() -> None:
    written = write_headers({"a": "b"}, "line\nbreak")
    assert read_headers(written or b"") == ({"a": "b", "x-request-id": "line\nbreak"}, None, None)


@pytest.mark.parametrize(
    ("lines", "headers"),
    [
        (b"no colon\r\na: b\r\n", {"a": "b"}),
        (b": nameless\r\nA:b\r\n", {"a": "b"}),
        (b"a: 1\r\nA: 2\r\n", {"a": "1, 2"}),
        (b"a: \xff\r\n", {"a": "\ufffd"}),
        (b"Dynwire-Meta: !!!\r\n", {}),
        (b"Dynwire-Meta: gaFh\r\n", {}),
        (b"Dynwire-Meta: " + b"gaFh" * 8000 + b"\r\n", {}),
    ],
)
def test_headers_of_strangers(lines: bytes, headers: dict[str, str]) -> None:
    assert read_headers(lines)[0] == headers


def test_headers_reach_the_handler() -> None:
    pair = Pair()
    stream = pair.client.request(pair.target, meta=write_headers({"traceparent": "00"}, "mine"))
    assert pair.pass_on() == [("worker", "request", stream.number, PATH, b"", 0, {"traceparent": "00"}, "mine", 0)]


def test_too_many_headers() -> None:
    with pytest.raises(MessageTooLarge) as caught:
        write_headers({"a": "b" * LIMITS["meta_limit"]})
    assert caught.value.limit == LIMITS["meta_limit"]
    pair = Pair()
    events = pair.worker.deliver(
        WORKER + b"." + PATH.encode(), CLIENT + b"0" * 14, block("D: r 0 0 1 0", "a: " + "b" * 40_000), b"x"
    )
    assert events == []
    (message,) = pair.worker.output()
    assert isinstance(shown(message[3]), MessageTooLarge)


def test_the_line_may_stand_behind_others() -> None:
    """Whatever is between the two may add headers."""
    pair = Pair()
    events = pair.worker.deliver(
        WORKER + b"." + PATH.encode(), CLIENT + b"00000000000007", block("Via: x", "D: r 1 0 5 9", "a: b"), b"x"
    )
    assert events == [("request", 7, PATH, b"x", 1, {"via": "x", "a": "b"}, None, 9)]


# Tools that know nothing of dynwire -------------------------------------------------------------------------------------------


def test_a_plain_request_gets_a_plain_reply() -> None:
    pair = Pair()
    ((_, number, *request),) = pair.worker.deliver(QUEUE + PATH.encode(), b"_INBOX.abc.1", None, b"hello")
    assert request == [PATH, b"hello", 0, None, None, 60_000]
    assert pair.worker.send_item(number, b"there", last=True)
    ((subject, reply, _, payload),) = pair.worker.output()
    assert (subject, reply, payload) == (b"_INBOX.abc.1", None, b"there")


def test_a_plain_request_gets_a_stream() -> None:
    pair = Pair()
    ((_, number, *_),) = pair.worker.deliver(QUEUE + PATH.encode(), b"_INBOX.abc.1", block("X-Y: z"), b"hello")
    for i in range(100):
        assert pair.worker.send_item(number, b"x" * 10_000), f"item {i} waits for credit that nobody will grant"
    pair.worker.send_end(number)
    messages = pair.worker.output()
    assert [m[0] for m in messages] == [b"_INBOX.abc.1"] * 101
    assert (messages[-1][2:]) == (b"NATS/1.0\r\nD: e 100\r\n\r\n", b"")


def test_the_handler_of_a_tool_that_has_gone_ends() -> None:
    pair = Pair()
    ((_, number, *_),) = pair.worker.deliver(QUEUE + PATH.encode(), b"_INBOX.abc.1", None, b"hello")
    pair.worker.send_item(number, b"x")
    ((_, reply, _, _),) = pair.worker.output()
    assert reply is not None and reply.startswith(WORKER + b"._.")
    (event,) = pair.worker.deliver(reply, None, NOBODY, b"")
    assert event[:3] == ("lost", number, "PeerLost")
    assert pair.worker.live == 0


def test_content_types_of_plain_requests() -> None:
    pair = Pair()
    for name, kind in {"application/json; charset=utf-8": 2, "application/msgpack": 1, "text/plain": 0}.items():
        (event,) = pair.worker.deliver(QUEUE + PATH.encode(), b"in", block(f"Content-Type: {name}"), b"{}")
        assert event[4] == kind


def test_errors_of_plain_requests_are_where_nats_services_have_them() -> None:
    pair = Pair()
    ((_, number, *_),) = pair.worker.deliver(QUEUE + PATH.encode(), b"in", None, b"hello")
    pair.worker.send_error(number, error_body(DynwireError("it\r\nbroke")))
    ((_, _, headers, body),) = pair.worker.output()
    assert headers == b"NATS/1.0\r\nD: x\r\nNats-Service-Error-Code: 500\r\nNats-Service-Error: error: it broke\r\n\r\n"
    assert str(shown(body))


def test_a_request_that_nobody_could_answer_is_dropped() -> None:
    pair = Pair()
    assert pair.worker.deliver(QUEUE + PATH.encode(), None, None, b"hello") == []
    assert pair.worker.deliver(QUEUE + PATH.encode(), b"with\x01control", None, b"hello") == []
    assert pair.worker.malformed == 2 and pair.worker.output() == []


# Lost, repeated, reordered ----------------------------------------------------------------------------------------------------


def drop(*numbers: int) -> Any:
    """Lose the messages with these positions."""
    count = iter(range(1_000_000))
    return lambda message: [] if next(count) in numbers else [message]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_item_ends_the_stream(lost: int) -> None:
    pair = Pair()
    number = pair.ask()
    pair.tamper = drop(lost)
    for i in range(4):
        pair.worker.send_item(number, b"%d" % i)
    events = pair.pass_on()
    assert of(events, "item") == [("client", "item", number, b"%d" % i, 0, False) for i in range(lost)]
    (failure,) = of(events, "lost")
    assert failure[:4] == ("client", "lost", number, "PeerLost") and "lost on their way through the NATS server" in failure[5]
    assert events[-1] == ("worker", "cancel", number, 2), "the handler goes on although nobody listens"
    assert pair.client.live == 0 and pair.client.gaps == 1


@pytest.mark.parametrize("last", [True, False])
def test_a_lost_item_before_the_end(last: bool) -> None:
    pair = Pair()
    number = pair.ask()
    pair.tamper = drop(0)
    pair.worker.send_item(number, b"0")
    if last:
        pair.worker.send_item(number, b"1", last=True)
    else:
        pair.worker.send_end(number)
    assert [event[3] for event in pair.pass_on()] == ["PeerLost"]


def test_a_repeated_item_is_dropped() -> None:
    pair = Pair()
    number = pair.ask()
    pair.tamper = lambda message: [message, message]
    pair.worker.send_item(number, b"0")
    pair.worker.send_item(number, b"1")
    pair.worker.send_end(number)
    assert [event[1] for event in pair.pass_on()] == ["item", "item", "end"]
    assert pair.client.repeated == 2 and pair.client.stale == 1


def test_a_repeated_request_runs_once() -> None:
    pair = Pair()
    pair.tamper = lambda message: [message, message]
    pair.client.request(pair.target)
    assert [event[1] for event in pair.pass_on()] == ["request"]
    assert pair.worker.repeated == 1


def test_reordered_items_are_no_items() -> None:
    """NATS keeps order. What comes in another one is not put right: it ends the stream like a lost item."""
    pair = Pair()
    number = pair.ask()
    pair.worker.send_item(number, b"0")
    pair.worker.send_item(number, b"1")
    first, second = pair.worker.output()
    assert pair.client.deliver(*second)[0][:3] == ("lost", number, "PeerLost")
    assert pair.client.deliver(*first) == []


def test_an_end_before_its_items_is_not_believed() -> None:
    pair = Pair()
    number = pair.ask()
    pair.worker.send_item(number, b"0")
    pair.pass_on()
    assert pair.client.deliver(CLIENT + b"00000000000001", None, block("D: e 0"), b"")[0][:3] == ("lost", number, "ProtocolError")


@pytest.mark.parametrize("attempt", [1, 2])
def test_another_attempt_counts_while_nothing_has_come(attempt: int) -> None:
    pair = Pair()
    number = pair.ask()
    inbox = CLIENT + b"00000000000001"
    assert pair.client.deliver(inbox, None, block(f"D: i 0 0 0 {attempt}"), b"0") == [("item", number, b"0", 0, False)]
    assert pair.client.deliver(inbox, None, block("D: i 1 0 0 0"), b"1") == []
    events = pair.client.deliver(inbox, None, block("D: i 0 0 0 3"), b"0")
    assert events[0][:3] == ("lost", number, "PeerLost") and "another worker" in events[0][4]


# Nobody there -----------------------------------------------------------------------------------------------------------------


def test_a_request_to_nobody_was_not_sent() -> None:
    pair = Pair()
    pair.worker_there = False
    stream = pair.client.request(pair.target)
    (event,) = pair.pass_on()
    assert event[:5] == ("client", "lost", stream.number, "ConnectError", False)
    assert pair.client.live == 0 and pair.client.granted == 0


def test_nobody_there_after_an_item_is_no_answer_to_the_request() -> None:
    pair = Pair()
    number = pair.ask()
    pair.worker.send_item(number, b"0")
    pair.pass_on()
    assert pair.client.deliver(CLIENT + b"00000000000001", None, NOBODY, b"") == []
    assert pair.client.malformed == 1


# Limits -----------------------------------------------------------------------------------------------------------------------


def test_too_large_for_the_nats_server() -> None:
    pair = Pair()
    with pytest.raises(MessageTooLarge, match=r"max_payload of the NATS server.*tcp plane") as caught:
        pair.client.request(pair.target, bytes(1 << 20))
    assert caught.value.sent == "no" and caught.value.setting == "max_payload of the NATS server"
    pair.ask(bytes(caught.value.limit))
    with pytest.raises(MessageTooLarge):
        pair.client.request(pair.target, bytes(caught.value.limit + 1))


def test_too_large_for_the_plane() -> None:
    pair = Pair()
    pair.client.set_port(max_payload=64 << 20)
    with pytest.raises(MessageTooLarge, match="nats plane limit") as caught:
        pair.client.request(pair.target, bytes((16 << 20) + 1))
    assert caught.value.setting == "nats plane limit"


def test_too_large_for_this_side() -> None:
    pair = Pair(client={"max_message": 1000})
    with pytest.raises(MessageTooLarge) as caught:
        pair.client.request(pair.target, bytes(1001))
    assert caught.value.setting == "DYN_TCP_MAX_MESSAGE_SIZE"


def test_too_large_for_the_worker() -> None:
    pair = Pair(worker={"max_message": 1000})
    pair.client.request(pair.target, bytes(1001))
    (event,) = pair.pass_on()
    error = shown(event[3])
    assert isinstance(error, MessageTooLarge) and error.sent == "no" and error.limit == 1000


def test_an_item_that_became_too_large() -> None:
    """The connection is to another NATS server than when the item was made."""
    pair = Pair()
    number = pair.ask()
    pair.worker.set_port(max_payload=10_000)
    pair.worker.send_item(number, bytes(20_000), last=True)
    (event,) = pair.pass_on()
    assert isinstance(shown(event[3]), MessageTooLarge)


def test_an_item_too_large_for_the_client() -> None:
    pair = Pair(client={"max_message": 1000})
    number = pair.ask()
    pair.worker.send_item(number, bytes(1001))
    assert pair.pass_on()[0][:4] == ("client", "lost", number, "MessageTooLarge")


def test_an_error_whose_text_is_too_long_for_the_server() -> None:
    pair = Pair()
    number = pair.ask()
    pair.worker.set_port(max_payload=1000)
    pair.worker.send_error(number, error_body(DynwireError("x" * 5000)))
    assert len(pair.pass_on()[0][3]) < 1000


def test_streams_of_a_worker_are_limited() -> None:
    pair = Pair(worker={"max_streams": 2})
    for _ in range(2):
        pair.ask()
    pair.client.request(pair.target)
    (event,) = pair.pass_on()
    error = shown(event[3])
    assert isinstance(error, Overloaded) and error.sent == "no" and error.retryable and error.limit == 2
    pair.worker.send_end(1)
    pair.pass_on()
    pair.ask()


def test_requests_wait_for_the_connection_within_a_limit() -> None:
    pair = Pair(client={"buffer": 2})
    pair.client.set_port(state=DOWN)
    waiting = [pair.client.request(pair.target) for _ in range(2)]
    assert all(stream.waiting for stream in waiting)
    with pytest.raises(Overloaded, match="wait for the connection to the NATS server") as caught:
        pair.client.request(pair.target)
    assert caught.value.sent == "no"
    assert pair.pass_on() == []
    pair.client.set_port(state=UP)
    assert [event[1] for event in pair.pass_on()] == ["request", "request"]


def test_a_stop_before_the_request_was_sent_follows_it() -> None:
    pair = Pair()
    pair.client.set_port(state=DOWN)
    stream = pair.client.request(pair.target)
    stream.stop_early()
    pair.client.set_port(state=UP)
    assert [event[1:4:2] for event in pair.pass_on()] == [("request", PATH), ("cancel", 1)]


def test_a_request_that_became_too_large_fails_alone() -> None:
    pair = Pair()
    pair.client.set_port(state=DOWN)
    large, small = pair.client.request(pair.target, bytes(2 << 20)), pair.client.request(pair.target, b"x")
    events = pair.client.set_port(state=UP)
    assert [event[:4] for event in events] == [("lost", large.number, "MessageTooLarge", False)]
    assert [event[1:3] for event in pair.pass_on()] == [("request", small.number)]
    assert pair.client.live == 1


def test_the_token_is_checked() -> None:
    pair = Pair(worker={"token": "secret"})
    for shown_token, served in ((None, False), ("wrong", False), ("secret", True)):
        meta = write_headers(None, None, None if shown_token is None else shown_token.encode())
        pair.client.request(pair.target, meta=meta)
        (event,) = pair.pass_on()
        assert (event[1] == "request") == served
        assert served or "DYNWIRE_TOKEN" in str(shown(event[3]))


@pytest.mark.parametrize("address", ["127.0.0.1:80", "nats://nowhere", "x", "nats:", "nats:a b", "nats:a.>"])
def test_addresses_of_other_planes(address: str) -> None:
    with pytest.raises(PlaneMismatch, match="DYN_REQUEST_PLANE"):
        NatsPeer(address)


# Hostile messages -------------------------------------------------------------------------------------------------------------

HEADERS: list[bytes | None] = [
    None,
    b"",
    b"NATS/1.0",
    b"NATS/1.0\r\n",
    b"NATS/1.0\r\nD: r",
    b"NATS/1.0\r\nD: r 0 0 1 0\r\n",
    b"NATS/1.0\r\n\r\nD: r 0 0 1 0\r\n\r\n",
    b"NATS/1.1\r\nD: r 0 0 1 0\r\n\r\n",
    b"NATS/1.0 \r\n\r\n",
    b"NATS/1.0 50\r\n\r\n",
    b"NATS/1.0 408 Timeout\r\n\r\n",
    NOBODY,
    b"\0" * 40,
    block("D:"),
    block("D: "),
    block("D: R 0 0 1 0"),
    block("D: z 1 2 3"),
    block("D: r"),
    block("D: r 0 0 1"),
    block("D: r 3 0 1 0"),
    block("D: r 0 3 1 0"),
    block("D: r 0 0 1 4294967296"),
    block("D: r 0 0 9999999999999999 0"),
    block("D: r -1 0 1 0"),
    block("D: r 0 0 1 0x10"),
    block("D: r0 0 1 0"),
    block("D: i"),
    block("D: i 0"),
    block("D: i 0 3 0"),
    block("D: i 0 0 2"),
    block("D: i 0 0 9"),
    block("D: i 999999999999999 0 0"),
    block("D: i 1\t0 0"),
    block("D: i 0 0 0 4294967297"),
    block("D: e"),
    block("D: e x"),
    block("D: x"),
    block("D: a 1 2 3 4 5 6 7 8 9"),
    block("D: c"),
    block("D: c 3"),
    block("D: w"),
    block("D: w 999999999999999"),
    block("D: p"),
    block("D: o"),
]
PAYLOADS = [
    b"",
    b"x",
    b"\n" * 100,
    b"-" * 100,
    b"00000000000001",
    b"00000000000001\n",
    b"00000000000001 -\n",
    b"00000000000001 999999999999999\n",
    b"00000000000001 9999999999999999\n",
    b"ffffffffffffff 1\n" * 3000,
    b"0000000000000g 1\n",
    CLIENT + b"00000000000001",
    b"\xff" * 600,
]


@pytest.mark.parametrize(
    "subject", [b"", b".", b"._", b"._.", b"._.0000000000000a", b"._.00000001", b"._.000000ffffffff", b".a.b.echo", b".a.b.none"]
)
def test_a_worker_survives_any_message(subject: bytes) -> None:
    """Each is answered with a typed error, or dropped and counted; none does anything to a request that is running."""
    pair = None
    for reply in (
        None,
        b"in",
        WORKER + b".a.b.echo",
        CLIENT + b"0" * 13 + b"x",
        CLIENT + b"ffffff00000009",
        b"r" * 3000,
        b"\x7f",
    ):
        for headers in HEADERS:
            for payload in PAYLOADS:
                if pair is None:
                    pair = Pair()
                    pair.ask()
                done = pair.worker.deliver(WORKER + subject, reply, headers, payload)
                for message in pair.worker.output():
                    done.append(message)
                    assert message[2].startswith(b"NATS/1.0\r\nD: "), "an answer has headers that say what it is"
                assert pair.worker.live in (1, 2)
                pair = None if done else pair


@pytest.mark.parametrize(
    "token", [b"", b"00000000000001", b"ffffff00000001", b"0000000000000g", b"00000100000001", b"000000000000011"]
)
def test_a_client_survives_any_message(token: bytes) -> None:
    pair = None
    for reply in (None, b"in", WORKER + b"._", b"\x7f"):
        for headers in HEADERS:
            for payload in PAYLOADS:
                if pair is None:
                    pair = Pair()
                    pair.ask()
                events = pair.client.deliver(CLIENT + token, reply, headers, payload)
                assert len(events) <= 1
                assert token == b"00000000000001" or not events
                ends = bool(events) and (events[0][0] in ("lost", "error", "end") or (events[0][0] == "item" and events[0][4]))
                assert pair.client.live == (0 if ends else 1)
                assert pair.client.granted == (0 if ends else FIRST_CREDIT)
                pair = None if events else pair


def test_what_answers_a_hostile_request_is_answered_by_nobody() -> None:
    """A reply subject that is a worker's own: its answer must not be taken for a request."""
    pair = Pair()
    pair.worker.deliver(WORKER + b".a.b.echo", WORKER + b".a.b.echo", block("D: r bad"), b"")
    assert pair.pass_on() == []
    assert len(pair.carried) == 1


def test_names_that_nobody_serves_are_not_remembered() -> None:
    pair = Pair()
    for i in range(100):
        (event,) = pair.worker.deliver(WORKER + b".x.y.%d" % i, CLIENT + b"000000%08x" % i, block("D: r 0 0 1 0"), b"")
        assert event[2] == f"x.y.{i}"
        pair.worker.send_end(i)


def replay(wire: EventWire, messages: list[Message]) -> list[Any]:
    return [event for message in messages for event in wire.deliver(*message)]


def test_messages_after_the_machine_is_dead() -> None:
    pair = Pair()
    pair.ask()
    assert pair.client.lost() == [1]
    assert pair.client.deliver(CLIENT + b"00000000000001", None, block("D: i 0 0 1"), b"x") == []
    assert pair.client.granted == 0 and pair.client.live == 0


def test_many_endpoints_and_callers() -> None:
    """What the worker remembers of the last message is not taken for the next one's."""
    worker = EventWire(False, WORKER, served=["a.b.c", "a.b.d", "a.b.cc"])
    for i, name in enumerate(["a.b.c", "a.b.c", "a.b.d", "a.b.cc", "a.b.c"]):
        ((_, number, path, *_),) = worker.deliver(
            WORKER + b"." + name.encode(), b"_INBOX.%016x.000000%08x" % (i % 2, i), block("D: r 0 0 1 0"), b""
        )
        assert (number, path) == (i, name)
        assert worker.connection_id == (i % 2).to_bytes(8, "big") and worker.peer == f"nats:_INBOX.{i % 2:016x}"
    target = NatsTarget(NatsPeer("nats:p.i.x"), "a.b.c")
    assert target.subject == b"p.i.x.a.b.c"
