"""The NATS protocol without I/O, against nats-py's own parser and command builders."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from typing import Any

import pytest

nats = pytest.importorskip("nats")

from nats.protocol import command  # noqa: E402
from nats.protocol.parser import Parser  # noqa: E402

from dynwire._buffers import Block, get_pool  # noqa: E402
from dynwire._natsproto import ERR, INFO, MSG, PING, PONG, CallbackSink, NatsParser, NatsWriter  # noqa: E402
from dynwire.errors import ConfigError, MessageTooLarge, ProtocolError  # noqa: E402

Operation = tuple[Any, ...]
BROKEN_INFO = ("info", "not JSON")
"""the parser leaves it to whoever reads it; nats-py's raises"""
HEADERS = b"NATS/1.0\r\nD: i 7\r\nX: y\r\n\r\n"


# --- nats-py, for comparison


class Recorder:
    """Stands where nats-py's client does."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.operations.append(("msg", sid, bytes(subject), bytes(reply), data, headers))

    async def _process_ping(self) -> None:
        self.operations.append(("ping",))

    async def _process_pong(self) -> None:
        self.operations.append(("pong",))

    async def _process_err(self, text: str) -> None:
        self.operations.append(("err", text))

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.operations.append(("info", info))


def theirs(data: bytes) -> tuple[list[Operation], bool]:
    """What nats-py's parser makes of it, and whether it raised."""
    recorder = Recorder()
    coroutine = Parser(recorder).parse(data)
    try:
        coroutine.send(None)
    except StopIteration:
        return recorder.operations, False
    except Exception:  # noqa: BLE001  # it raises what it likes for garbage
        return recorder.operations, True
    raise AssertionError


def named(operation: Operation) -> Operation:
    kind, *rest = operation
    if kind == MSG:
        return ("msg", *rest)
    if kind == INFO:
        try:
            return ("info", json.loads(rest[0]))
        except ValueError:
            return BROKEN_INFO
    if kind == ERR:
        return ("err", rest[0].decode(errors="replace").lower())
    return ({PING: "ping", PONG: "pong"}[kind],)


def ours(pieces: Iterable[bytes], parser: NatsParser | None = None) -> tuple[list[Operation], bool]:
    parser = parser or NatsParser()
    try:
        for piece in pieces:
            parser.feed(piece)
    except ProtocolError:
        return [named(operation) for operation in parser.take_others()], True
    return [named(operation) for operation in parser.take_others()], False


# --- streams


def message(subject: bytes, sid: int, payload: bytes, reply: bytes = b"", headers: bytes | None = None) -> bytes:
    words = [b"MSG" if headers is None else b"HMSG", subject, b"%d" % sid]
    if reply:
        words.append(reply)
    if headers is not None:
        words.append(b"%d" % len(headers))
    return b"%s %d\r\n%s%s\r\n" % (b" ".join(words), len(headers or b"") + len(payload), headers or b"", payload)


STREAM = b"".join(
    (
        b'INFO {"server_id":"N","max_payload":1048576,"connect_urls":["a:1"]} \r\n',
        message(b"a.b", 1, b"hello"),
        b"PING\r\n",
        message(b"a", 23, b"", b"_INBOX.1"),
        message(b"a.b.c", 1, b"MSG x 1 1\r\nx\r\n", b"r", HEADERS),
        b"+OK\r\n",
        message(b"n", 2, b"", headers=b"NATS/1.0 503\r\n\r\n"),
        b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n",
        b"PONG\r\n",
        b"MSG\ta  7\t \t3 \r\nabc\r\n".replace(b"3 \r", b"3\r"),
    )
)


def test_the_stream_is_one() -> None:
    operations, raised = theirs(STREAM)
    assert not raised
    assert [operation[0] for operation in operations] == ["info", "msg", "ping", "msg", "msg", "msg", "err", "pong", "msg"]


def test_every_split() -> None:
    expected, _ = theirs(STREAM)
    assert ours([STREAM]) == (expected, False)
    for at in range(1, len(STREAM)):
        assert ours([STREAM[:at], STREAM[at:]]) == (expected, False), at
    assert ours(STREAM[i : i + 1] for i in range(len(STREAM))) == (expected, False)


def test_every_truncation_waits() -> None:
    for end in range(len(STREAM)):
        assert ours([STREAM[:end]]) == (theirs(STREAM[:end])[0], False), end


class Kept:
    """Messages of one or several subscriptions with sinks."""

    def __init__(self) -> None:
        self.messages: list[Operation] = []
        self.batches: list[bool] = []
        self.blocks = 0
        self.sink = CallbackSink(self.take, self.batches.append)

    def take(self, subject: bytes, reply: bytes, headers: bytes | None, payload: Any) -> None:
        self.blocks += type(payload) is Block
        self.messages.append((subject, reply, bytes(payload), headers))


def random_stream(rng: random.Random, count: int, large: bool) -> bytes:
    parts = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            parts.append(rng.choice([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b"INFO {}\r\n"]))
            continue
        size = rng.choice([0, 1, 7, 300, 4000]) if not large or kind < 0.6 else rng.randrange(60000, 300000)
        headers = rng.choice(
            [None, HEADERS, b"NATS/1.0\r\nBig: " + b"h" * rng.choice([10, 70000 if large else 100]) + b"\r\n\r\n"]
        )
        reply = rng.choice([b"", b"_INBOX.%d" % rng.randrange(10**6)])
        parts.append(message(b"s.%d" % rng.randrange(9), rng.randrange(1, 5), rng.randbytes(size), reply, headers))
    return b"".join(parts)


def cuts(rng: random.Random, data: bytes) -> list[bytes]:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(12)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_random_streams_with_and_without_sinks(large: bool) -> None:
    rng = random.Random(1)
    blocks = 0
    for _ in range(40 if large else 300):
        data = random_stream(rng, rng.randrange(1, 8), large)
        expected, raised = theirs(data)
        assert not raised
        assert ours(cuts(rng, data)) == (expected, False)
        # the same with sinks for some: the order within a subscription and of the rest stays
        kept = {sid: Kept() for sid in (1, 3)}
        parser = NatsParser()
        for sid, one in kept.items():
            parser.add_sink(sid, one.sink)
        assert ours(cuts(rng, data), parser) == ([op for op in expected if op[0] != "msg" or op[1] not in kept], False)
        for sid, one in kept.items():
            assert one.messages == [op[2:] for op in expected if op[0] == "msg" and op[1] == sid]
            assert one.batches == [True, False] * (len(one.batches) // 2)
            blocks += one.blocks
    assert (blocks > 10) is large


def test_large_payloads_land_in_blocks_and_give_them_back() -> None:
    pool = get_pool()
    before = pool.in_use_blocks
    kept = Kept()
    parser = NatsParser()
    parser.add_sink(1, kept.sink)
    data = message(b"a", 1, b"x" * 200000, headers=HEADERS)
    for i in range(0, len(data), 30000):
        parser.feed(data[i : i + 30000])
    assert kept.blocks == 1 and kept.messages == [(b"a", b"", b"x" * 200000, HEADERS)]
    assert pool.in_use_blocks == before
    parser.feed(data[:1000])
    assert pool.in_use_blocks == before + 1
    del parser
    assert pool.in_use_blocks == before


def test_one_batch_per_read_and_sink() -> None:
    first, second = Kept(), Kept()
    parser = NatsParser()
    parser.add_sink(1, first.sink)
    parser.add_sink(2, first.sink)
    parser.add_sink(3, second.sink)
    parser.feed(b"".join(message(b"a", sid, b"") for sid in (1, 3, 2, 1, 4)) + b"PING\r\n")
    assert (first.batches, second.batches) == ([True, False], [True, False])
    assert (len(first.messages), len(second.messages), len(parser.others)) == (3, 1, 2)
    parser.feed(b"PING\r\n")
    assert first.batches == [True, False]


def test_a_sink_that_unsubscribes_gets_nothing_more() -> None:
    parser = NatsParser()
    seen = []

    def take(*message: object) -> None:
        seen.append(message)
        parser.remove_sink(1)

    parser.add_sink(1, CallbackSink(take))
    parser.feed(message(b"a", 1, b"1") + message(b"a", 1, b"2"))
    assert len(seen) == 1 and [named(op)[4] for op in parser.take_others()] == [b"2"]


# --- hostile and broken bytes

BROKEN = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n",
    "another protocol, no line end": b"SSH-2.0-OpenSSH",
    "tls": b"\x16\x03\x01\x02\x00",
    "lower case": b"ping\r\n",
    "words behind PING": b"PING x\r\n",
    "line feed only": b"PING\n",
    "empty line": b"\r\n",
    "no size": b"MSG a 1\r\n",
    "too many words": b"MSG a 1 r 5 5\r\n",
    "size is no number": b"MSG a 1 x\r\n",
    "negative size": b"MSG a 1 -1\r\n",
    "sid is no number": b"MSG a x 1\r\n",
    "huge sid": b"MSG a 9999999999999999999999 1\r\n",
    "huge size": b"MSG a 1 999999999999\r\n",
    "size of 64 bits": b"MSG a 1 18446744073709551615\r\n",
    "headers larger than the message": b"HMSG a 1 20 10\r\n",
    "headers without a size": b"HMSG a 1 10\r\n",
    "negative headers": b"HMSG a 1 -1 10\r\n",
    "payload longer than it says": b"MSG a 1 1\r\nxx\r\n",
    "payload ends with another byte": b"MSG a 1 1\r\nx\rn",
    "CR within": b"MSG a\r 1 1\r\n",
    "line too long": b"MSG " + b"a" * 6000 + b" 1 0\r\n\r\n",
    "line without end": b"MSG " + b"a" * 6000,
    "INFO without end": b"INFO {" + b"a" * 70000,
    "ERR glued": b"-ERRx\r\n",
    "OK glued": b"+OKAY\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_bytes_are_a_typed_error(data: bytes) -> None:
    pool = get_pool()
    before = pool.in_use_bytes
    for pieces in ([b"PING\r\n" + data], [b"PING\r\n", *(data[i : i + 1] for i in range(len(data)))]):
        parser = NatsParser()
        with pytest.raises(ProtocolError) as caught:
            for piece in pieces:
                parser.feed(piece)
        assert "NATS" in str(caught.value) and len(str(caught.value)) < 300
        assert caught.value.offset >= 6
        assert [named(op) for op in parser.take_others()] == [("ping",)]
        parser.feed(b"PING\r\n")  # nothing is parsed after it
        assert parser.take_others() == []
        assert pool.in_use_bytes == before


def test_sizes_are_checked_against_what_the_server_announced() -> None:
    parser = NatsParser(1000)
    parser.feed(message(b"a", 1, b"x" * 66000))  # headers that the server adds have room
    with pytest.raises(ProtocolError, match="67000 bytes, but the server announced max_payload 1000"):
        parser.feed(b"MSG a 1 67000\r\n")
    parser = NatsParser(1000)
    parser.set_max_payload(2000)
    parser.feed(b"MSG a 1 67000\r\n")


def test_long_info_is_read() -> None:
    urls = ["10.0.0.1:4222"] * 3000
    assert ours([b"INFO %s\r\n" % json.dumps({"connect_urls": urls}).encode()])[0] == [("info", {"connect_urls": urls})]


def test_mutated_streams() -> None:
    """Bytes changed, removed, doubled: nothing is made up, nothing crashes; what is taken is what nats-py takes.

    Stricter than nats-py in what it refuses: a message without CR LF at its end, line ends within a line, numbers such as +1.
    """
    rng = random.Random(7)
    refused = taken = 0
    for _ in range(6000):
        data = bytearray(random_stream(rng, rng.randrange(1, 4), False)[:600] if rng.random() < 0.5 else STREAM)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    # form feeds separate words for nats-py only; for the server and here they are part of a subject
                    data[at] = rng.choice([i for i in range(256) if i not in b"\v\f"])
                case 1:
                    del data[at : at + rng.randrange(1, 4)]
                case 2:
                    data[at:at] = data[at : at + rng.randrange(1, 9)]
                case 3:
                    data[at] = rng.choice(b" \r\n\t0123456789MSGH")
            if not data:
                data = bytearray(b"P")
        if re.search(rb"MSG[^\r\n]*\r\n\s*\d+\r\n", data):
            continue  # nats-py takes a number at the beginning of a payload or header block for the end of the line before it
        expected, they_raised = theirs(bytes(data))
        whole, raised = ours([bytes(data)])
        assert ours(cuts(rng, bytes(data))) == (whole, raised)
        if they_raised:
            # nats-py refuses before this parser, which leaves texts to whoever reads them: of errors without quotes or not
            # in UTF-8, and JSON that is none
            assert raised or BROKEN_INFO in whole or b"-ERR" in data
            common = min(len(whole), len(expected))
            assert whole[:common] == expected[:common]
        else:
            assert whole == expected[: len(whole)]
        if raised:
            refused += 1
        else:
            taken += 1
            assert they_raised or whole == expected
    assert refused > 1000 and taken > 1000


def test_random_bytes_do_no_harm() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        data = rng.choice([b"", b"MSG ", b"HMSG ", b"INFO ", b"-ERR "]) + rng.randbytes(rng.randrange(1, 200))
        ours(cuts(rng, data))


# --- publishing


def normal(data: bytes) -> bytes:
    """nats-py writes two blanks where there is no reply subject."""
    line, end, rest = data.partition(b"\r\n")
    return b" ".join(line.split()) + end + rest


@pytest.mark.parametrize("size", [0, 1, 9, 10, 64, 1000, 65535, 65536, 300000])
@pytest.mark.parametrize("reply", [None, b"", b"_INBOX.abc.1"])
@pytest.mark.parametrize("headers", [None, HEADERS])
def test_what_nats_py_writes(size: int, reply: bytes | None, headers: bytes | None) -> None:
    payload = random.Random(size).randbytes(size)
    writer = NatsWriter()
    writer.add(b"a.b", payload, reply, headers)
    writer.add(b"c", b"next")
    if headers is None:
        expected = command.pub_cmd("a.b", (reply or b"").decode(), payload)
    else:
        expected = command.hpub_cmd("a.b", (reply or b"").decode(), headers, payload)
    assert writer.pieces() == (1 if size < 65536 else 3)
    assert writer.take() == normal(expected) + b"PUB c 4\r\nnext\r\n"
    assert writer.take() == b"" and writer.messages == 2


def test_written_in_pieces() -> None:
    """A socket takes what it has room for, at any byte, while more is added."""
    rng = random.Random(5)
    for _ in range(200):
        writer, whole = NatsWriter(), NatsWriter()
        got = b""
        for _ in range(rng.randrange(1, 30)):
            payload = rng.randbytes(rng.choice([0, 10, 500, 70000]))
            headers = rng.choice([None, HEADERS])
            for one in (writer, whole):
                one.add(b"s", payload, headers=headers)
                if len(payload) == 10:
                    one.add_raw(b"PING\r\n")
            while rng.random() < 0.5:
                got += writer.take_some(rng.choice([1, 20, 100, 66000, 200000]))
        assert got + writer.take() == whole.take()


def test_a_payload_stays_while_it_is_referred_to() -> None:
    payload = bytearray(b"x" * 100000)
    view = memoryview(payload)
    writer = NatsWriter()
    writer.add(b"a", view)
    del view
    with pytest.raises(BufferError):
        payload.clear()
    assert writer.take() == b"PUB a 100000\r\n" + b"x" * 100000 + b"\r\n"
    payload.clear()


@pytest.mark.parametrize("subject", [b"", b"a b", b"a\r\nPUB x 0", b"a\tb", b"a\x00", b"a\x7f"])
def test_no_line_can_be_smuggled_in(subject: bytes) -> None:
    writer = NatsWriter()
    with pytest.raises(ConfigError, match="subject"):
        writer.add(subject, b"")
    if subject:
        with pytest.raises(ConfigError, match="subject"):
            writer.add(b"a", b"", subject)
    assert writer.take() == b""


def test_subjects_that_no_server_reads() -> None:
    with pytest.raises(MessageTooLarge, match="5000 bytes; a NATS server reads lines of up to 4096") as caught:
        NatsWriter().add(b"a" * 3000, b"", b"b" * 2000)
    assert "max_control_line" in caught.value.setting
