"""Random frame scripts into both engines: what one does and the other does not has to be an intended difference.

A script is what a peer sends: mostly valid frames from a small model of a connection, then, in every second script, mutated
(bits, lengths, types, flags, streams, order, repetition, loss). Frames are given to both engines one by one, and what came of
each is compared: events, answers, resets and connection errors with their codes. At the first difference the states of the
engines part, so the script goes on with the native engine alone; the difference has to be one of `INTENDED`.

``python -m tests.http2.differential ROLE SEED`` shows one script step by step.
"""

from __future__ import annotations

import random
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hpack import Encoder

from . import frames as f
from .malformed import MALFORMED
from .peer import EnginePeer, Event

LIMITS: dict[str, int] = {"max_concurrent_streams": 8, "stream_window": 70_000, "connection_window": 200_000}
"""small enough to be met; max_frame_size stays at 1 MiB"""

SETTLED = [(b":status", b"200"), (b"content-type", b"text/plain")]


# --- scripts --------------------------------------------------------------------------------------------------------------


class Script:
    """Frames that a peer of ``role`` (what is tested) may send, and some that it may not."""

    def __init__(self, role: str, seed: int) -> None:
        self.role = role
        self.rng = random.Random(f"{role} {seed}")
        self.encoder = Encoder()
        self.frames: list[bytes] = []
        self.next_id = 1
        self.open: list[int] = []
        """streams on which the peer has not said END_STREAM"""
        self.old: list[int] = []
        self.headed: set[int] = set()
        self.bodyless: set[int] = {5} if role == "client" else set()
        self.naughty = self.rng.choice((0.0, 0.0, 0.02, 0.1))
        """how often the peer does what it may not"""
        if role == "client":
            self.open = list(REQUESTS)
        for _ in range(self.rng.randrange(4, 30)):
            self.step()
        if self.rng.random() < 0.5:
            for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
                self.mutate()

    @property
    def data(self) -> bytes:
        return b"".join(self.frames)

    def add(self, *frames: bytes) -> None:
        self.frames += frames

    def end(self, stream: int) -> None:
        if stream in self.open:
            self.open.remove(stream)
            self.old.append(stream)

    def any_stream(self) -> int:
        """mostly an open one"""
        rng = self.rng
        if self.bad():
            pool = rng.choice((self.old, self.old, [0], [2], [self.next_id + rng.randrange(5)]))
            return rng.choice(pool or [0])
        return rng.choice(self.open) if self.open else 0

    def bad(self) -> bool:
        return self.rng.random() < self.naughty

    def step(self) -> None:
        rng = self.rng
        if self.bad():
            actions: list[tuple[int, Callable[[], None]]] = [
                (1, lambda: self.add(f.push_promise(self.any_stream(), 2, self.block([(b":method", b"GET")])))),
                (1, lambda: self.add(f.continuation(self.any_stream(), self.block([(b"x-test", b"1")])))),
                (2, self.odd_length),
            ]
        else:
            actions = [
                (30, self.headers),
                (25, self.body),
                (8, self.trailers),
                (6, self.window_update),
                (6, self.settings),
                (4, lambda: self.add(f.ping(rng.randbytes(8), ack=rng.random() < 0.3))),
                (5, self.reset),
                (3, lambda: self.add(f.priority(self.any_stream() or 1, rng.choice((0, 111, 113)), rng.randrange(1, 257)))),
                (
                    3,
                    lambda: self.add(
                        f.frame(rng.choice((11, 13, 16, 255)), rng.randrange(256), self.any_stream(), rng.randbytes(5))
                    ),
                ),
                (1, lambda: self.add(f.goaway(rng.choice((0, 1, 3, 0x7FFFFFFF)), rng.choice((0, 2, 77)), rng.randbytes(3)))),
                (1, lambda: self.add(f.SETTINGS_ACK)),
            ]
        rng.choices([action for _, action in actions], [weight for weight, _ in actions])[0]()

    def window_update(self) -> None:
        increment = self.rng.choice((1, 10, 1000, 65535, 1 << 20))
        if self.bad():
            increment = self.rng.choice((0, 0x7FFF0000, 0x7FFFFFFF, 0x80000001))
        # also on streams that have ended
        self.add(f.window_update(self.rng.choice((0, self.any_stream(), *self.old[-1:])), increment))

    # fields

    def block(self, fields: list[f.Field]) -> bytes:
        rng = self.rng
        if rng.random() < 0.6:
            return bytes(self.encoder.encode(fields, huffman=rng.random() < 0.5))
        if self.bad():  # does not decode, or does so only by chance
            return f.block(fields) + rng.choice(
                (b"\x80", b"\xff\xff\xff\xff\xff\x0f", b"\x40", b"\x3f\xff\x1f", b"\xc5", b"\x00\x01")
            )
        return f.block(fields)

    def extra(self) -> list[f.Field]:
        rng = self.rng
        return [
            rng.choice(((b"x-one", b"1"), (b"x-two", rng.randbytes(3).hex().encode()), (b"accept", b"*/*"), (b"cookie", b"a=b"),
                        (b"user-agent", b"tests"), (b"x-long", b"l" * rng.randrange(2000)), (b"te", b"trailers")))
            for _ in range(rng.randrange(4))
        ]  # fmt: skip

    def headers(self) -> None:
        if self.role == "server":
            self.request()
        else:
            self.response()

    def request(self) -> None:
        rng = self.rng
        if self.bad() and self.old:
            stream = rng.choice(self.old)
        else:
            stream = self.next_id + 2 * rng.choice((0, 0, 0, 0, 0, 1, 5))
            self.next_id = stream + 2
            self.open.append(stream)
        method = rng.choice((b"GET", b"POST", b"POST", b"HEAD", b"PUT"))
        fields = [(b":method", method), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"localhost"), *self.extra()]
        if self.bad():
            item = rng.choice(MALFORMED)
            fields = item.fields([(b":method", item.method), *fields[1:4]])
        if self.bad():
            fields.append((b"content-length", str(rng.choice((0, 4, 10, 1000))).encode()))
        self.send_block(stream, self.block(fields), end=rng.random() < 0.4)

    def response(self) -> None:
        rng = self.rng
        waiting = [stream for stream in self.open if stream not in self.headed]
        stream = self.any_stream() if self.bad() or not waiting else rng.choice(waiting)
        if stream in self.headed and not self.bad():
            return
        status = rng.choice((b"200", b"200", b"200", b"204", b"304", b"100", b"103", b"404"))
        fields = [(b":status", status), *self.extra()]
        end = rng.random() < 0.4 and (status[:1] != b"1" or self.bad())
        if self.bad():
            fields = rng.choice(
                (
                    [*fields, *fields], fields[1:], [(b":status", b"20")], [(b":status", b"101")], [(b":path", b"/"), *fields],
                    [*fields, (b"X-Upper", b"1")], [*fields, (b"x-bad", b"a\rb")], [*fields, (b"connection", b"close")],
                )
            )  # fmt: skip
        if self.bad():
            fields.append((b"content-length", str(rng.choice((0, 4, 10, 1000))).encode()))
        if status[:1] != b"1":
            self.headed.add(stream)
            if status in (b"204", b"304"):
                self.bodyless.add(stream)
        self.send_block(stream, self.block(fields), end)

    def send_block(self, stream: int, block: bytes, end: bool) -> None:
        rng = self.rng
        options: dict[str, Any] = {}
        if rng.random() < 0.1:
            options["pad"] = rng.randrange(256)
        if rng.random() < 0.1:
            options["priority"] = f.priority_fields(stream if self.bad() else rng.choice((0, 111)), rng.randrange(1, 257))
        if rng.random() < 0.15:
            cuts = sorted(rng.randrange(len(block) + 1) for _ in range(rng.randrange(1, 4)))
            parts = [block[a:b] for a, b in zip([0, *cuts], [*cuts, len(block)], strict=True)]
            self.add(f.headers(stream, parts[0], end=end, end_headers=False, **options))
            for number, part in enumerate(parts[1:], 2):
                self.add(f.continuation(stream, part, end_headers=number == len(parts)))
        else:
            self.add(f.headers(stream, block, end=end, **options))
        if end:
            self.end(stream)

    def body(self) -> None:
        rng = self.rng
        stream = self.any_stream()
        if not self.bad() and (stream == 0 or (self.role == "client" and stream not in self.headed)):
            return self.headers()
        size = rng.choice((0, 1, 4, 10, 100, 1000, 16384, 40_000))
        if stream in self.bodyless and not self.bad():
            size = 0
        end = rng.random() < 0.3
        self.add(f.data(stream, rng.randbytes(size), end=end, pad=rng.randrange(256) if rng.random() < 0.15 else None))
        if end:
            self.end(stream)
        return None

    def trailers(self) -> None:
        stream = self.any_stream()
        if not self.bad() and (stream == 0 or (self.role == "client" and stream not in self.headed)):
            return
        fields = self.extra() or [(b"x-trailer", b"1")]
        if self.bad():
            fields.append(self.rng.choice(((b":status", b"200"), (b"BAD", b"1"), (b"x", b"\n"), (b"connection", b"x"))))
        self.send_block(stream, self.block(fields), end=not self.bad())

    def settings(self) -> None:
        rng = self.rng
        choices = [
            (f.HEADER_TABLE_SIZE, rng.choice((0, 100, 4096, 65536))),
            (f.INITIAL_WINDOW_SIZE, rng.choice((0, 1, 100, 65535, 1 << 20, f.MAX_WINDOW))),
            (f.MAX_FRAME_SIZE, rng.choice((16384, 65536, (1 << 24) - 1))),
            (f.MAX_CONCURRENT_STREAMS, rng.choice((0, 1, 100))),
            (f.MAX_HEADER_LIST_SIZE, 10_000),
            (99, 1),
        ]
        if self.role == "server":
            choices.append((f.ENABLE_PUSH, rng.choice((0, 1))))
        if self.bad():
            choices = [
                (f.ENABLE_PUSH, 2),
                (f.INITIAL_WINDOW_SIZE, 1 << 31),
                (f.MAX_FRAME_SIZE, 16383),
                (f.MAX_FRAME_SIZE, 1 << 24),
            ]
        self.add(f.settings(*(rng.choice(choices) for _ in range(rng.randrange(4)))))

    def reset(self) -> None:
        stream = self.any_stream()
        if stream == 0 and not self.bad():
            return
        self.add(f.rst_stream(stream, self.rng.choice((0, 1, 8, 99))))
        self.end(stream)

    def odd_length(self) -> None:
        type_ = self.rng.choice((f.PRIORITY, f.RST_STREAM, f.SETTINGS, f.PING, f.GOAWAY, f.WINDOW_UPDATE))
        stream = self.any_stream() if type_ in (f.PRIORITY, f.RST_STREAM, f.WINDOW_UPDATE) else 0
        self.add(f.frame(type_, 0, stream, bytes(self.rng.randrange(10))))

    # mutations

    def mutate(self) -> None:
        rng = self.rng
        if not self.frames:
            return
        at = rng.randrange(len(self.frames))
        old = bytearray(self.frames[at])
        if len(old) < f.HEADER_BYTES:  # cut off before
            return
        match rng.randrange(11):
            case 0 | 1:  # a bit anywhere
                position = rng.randrange(len(old))
                old[position] ^= 1 << rng.randrange(8)
            case 2:  # a bit of the payload
                if len(old) > f.HEADER_BYTES:
                    old[rng.randrange(f.HEADER_BYTES, len(old))] ^= 1 << rng.randrange(8)
            case 3 if len(old) > f.HEADER_BYTES:  # shorter, and honest about it
                del old[f.HEADER_BYTES + rng.randrange(max(len(old) - f.HEADER_BYTES, 1)) :]
                old[:3] = (len(old) - f.HEADER_BYTES).to_bytes(3, "big")
            case 4:  # cut off
                del old[rng.randrange(len(old)) :]
            case 5:  # another length
                old[:3] = max(0, len(old) - f.HEADER_BYTES + rng.choice((-5, -1, 1, 5, 300))).to_bytes(3, "big")
            case 6:
                old[3] = rng.randrange(12)
            case 7:
                old[4] ^= rng.choice((0x1, 0x4, 0x8, 0x20, 0x10))
            case 8:
                old[5:9] = struct.pack(">I", rng.choice((0, 1, 2, 3, 4, 5, 7, 99, 0x7FFFFFFF, 0x80000001)))
            case 9:
                other = rng.randrange(len(self.frames))
                self.frames[at], self.frames[other] = self.frames[other], self.frames[at]
                return
            case 10:
                if rng.random() < 0.5:
                    self.frames.insert(rng.randrange(len(self.frames)), bytes(old))
                else:
                    del self.frames[at]
                return
        self.frames[at] = bytes(old)


REQUESTS = {1: b"GET", 3: b"POST", 5: b"HEAD", 7: b"GET", 9: b"POST", 11: b"GET", 13: b"GET"}
"""what a client under test has sent; the POST requests are not complete"""


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    """Frames as their own lengths have it, and an incomplete rest."""
    frames = []
    while len(data) >= f.HEADER_BYTES:
        end = f.HEADER_BYTES + int.from_bytes(data[:3], "big")
        if len(data) < end:
            break
        frames.append(data[:end])
        data = data[end:]
    return frames, data


# --- observations ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of one frame."""

    events: list[Event] = field(default_factory=list)
    """but resets; sorted by stream, since the order between streams is the engine's own"""
    resets: set[tuple[int, int]] = field(default_factory=set)
    """RST_STREAM frames"""
    error: int | None = None
    """code of the connection error"""
    answers: list[tuple[Any, ...]] = field(default_factory=list)
    """frames sent but RST_STREAM and WINDOW_UPDATE; DATA as number of bytes"""
    text: str = ""

    def __str__(self) -> str:
        parts = [f"events {self.events}"] if self.events else []
        parts += [f"RST_STREAM({sid}, {f.error_name(code)})" for sid, code in sorted(self.resets)]
        parts += [f"connection error {f.error_name(self.error)} ({self.text})"] if self.error is not None else []
        parts += [f"answers {self.answers}"] if self.answers else []
        return ", ".join(parts) or "nothing"

    def same(self, other: Outcome) -> bool:
        return (self.events, self.resets, self.error, self.answers) == (other.events, other.resets, other.error, other.answers)

    def headers(self, stream: int) -> bool:
        return any(event[0] == "headers" and event[1] == stream for event in self.events)

    @property
    def quiet(self) -> bool:
        return not self.events and not self.resets and self.error is None


KNOWN_SETTINGS = range(1, 7)
KEPT_DEBUG = 1024
"""bytes of GOAWAY's text that the native engine hands on"""


def observe(peer: EnginePeer, data: bytes) -> Outcome:
    """Give one frame to an engine. An exception of the engine is a failure of the test."""
    first_event = len(peer.events)
    peer.write(data)
    first_frame = len(peer.seen)
    while peer.read():
        pass
    out = Outcome()
    sizes: Counter[int] = Counter()
    for event in peer.events[first_event:]:
        match event:
            case ("error", code, text):
                out.error, out.text = code, text
            case ("settings", values):
                out.events.append(("settings", 0, {code: value for code, value in values.items() if code in KNOWN_SETTINGS}))
            case ("settings_ack",) | ("capacity",) | ("room", _):
                pass
            case ("data", sid, payload, end):
                if out.events and out.events[-1][:2] == ("data", sid) and not out.events[-1][3]:
                    payload = out.events.pop()[2] + payload
                if payload or end:
                    out.events.append(("data", sid, payload, end))
            case ("headers", sid, fields, kind, end):
                out.events.append(("headers", sid, list(fields), kind, end))
            case ("goaway", last, code, debug):
                out.events.append(("goaway", 0, last, code, debug[:KEPT_DEBUG]))
            case ("pong", payload):
                out.events.append(("pong", 0, payload))
            case _:
                out.events.append(event)
    out.events.sort(key=lambda event: event[1])
    for frame in peer.seen[first_frame:]:
        if frame.type == f.RST_STREAM:
            out.resets.add((frame.stream, frame.code))
        elif frame.type == f.DATA:
            sizes[frame.stream] += len(frame.payload)
            if frame.end_stream:
                out.answers.append(("end", frame.stream))
        elif frame.type == f.HEADERS:
            out.answers.append(("headers", frame.stream, frame.end_stream))
        elif frame.type == f.PING:
            out.answers.append(("ping", frame.payload, frame.ack))
        elif frame.type == f.SETTINGS:
            out.answers.append(("settings", frame.ack))
    out.answers += [("data", stream, size) for stream, size in sizes.items() if size]
    out.answers.sort(key=repr)
    return out


# --- intended differences -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    frame: f.Frame
    native: Outcome
    h2: Outcome
    given_up: frozenset[int]
    """streams that the native engine has reset, or closed because GOAWAY said that they were not processed"""
    highest: int
    """stream that the frames so far can have opened"""
    short: frozenset[int]
    """streams whose body so far is not as long as content-length says"""
    bodyless: frozenset[int]
    """(client) streams whose response has no content: to HEAD, 204, 304"""
    ended_with_more: bool
    """a stream that was given more than the initial window has ended"""
    in_block: bool
    """a header block was begun and not ended before this frame"""

    @property
    def native_reset(self) -> int | None:
        """code with which the native engine has reset the frame's stream, nothing else having happened"""
        codes = {code for stream, code in self.native.resets if stream == self.frame.stream}
        return codes.pop() if len(codes) == 1 and len(self.native.resets) == 1 and self.native.error is None else None


INTENDED: dict[str, Callable[[Step], bool]] = {}


def intended(name: str) -> Callable[[Callable[[Step], bool]], Callable[[Step], bool]]:
    def register(rule: Callable[[Step], bool]) -> Callable[[Step], bool]:
        INTENDED[name] = rule
        return rule

    return register


MESSAGE = (f.HEADERS, f.CONTINUATION, f.DATA)
"""frames that may complete a malformed message"""

H2_MALFORMED = re.compile(
    "|".join(
        (
            "Received uppercase header name",
            "Illegal character",
            "Received header value surrounded by whitespace",
            "Received header name with zero length",
            "Invalid value for TE header",
            "Connection-specific header field present",
            "Header block missing mandatory",
            "Received duplicate pseudo-header field",
            "Received pseudo-header field out of sequence",
            "Received custom pseudo-header field",
            "Received pseudo-header in trailer",
            "Encountered (request|response|connect-request)-only headers",
            "Ordinary CONNECT MUST NOT include",
            "Request header block",
            "An empty :path header",
            "Invalid content-length header",
            "Conflicting content-length headers",
            "InvalidBodyLengthError",
            "Trailers must have END_STREAM set",
            "Cannot set END_STREAM on informational",
            "Informational response after final response",
            "cannot receive data before headers",
        )
    )
)
"""how h2 names malformed messages"""


@intended("a malformed message is a stream error here (RFC 9113 8.1.1), h2 ends the connection")
def _(step: Step) -> bool:
    return (
        step.native_reset == f.PROTOCOL_ERROR
        and step.frame.type in MESSAGE
        and step.h2.error == f.PROTOCOL_ERROR
        and bool(H2_MALFORMED.match(step.h2.text))
    )


TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
VALUE = re.compile(rb"[^\x00-\x1f\x7f]*(\t[^\x00-\x1f\x7f]*)*")
PATH = re.compile(rb"/[^\x00-\x20\x7f]*")
AUTHORITY = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=:%\[\]]+")
LENGTH = re.compile(rb"[0-9]{1,18}")


def malformed(fields: list[f.Field], kind: str, end: bool, short: bool) -> bool:
    """What is refused beyond h2's rules."""
    given = dict(fields)
    if any(not NAME.fullmatch(name.removeprefix(b":")) or not VALUE.fullmatch(value) for name, value in fields):
        return True
    if kind == "trailers":
        return short
    length = given.get(b"content-length")
    if length is not None and not LENGTH.fullmatch(length):
        return True
    if kind == "request":
        return (
            not TOKEN.fullmatch(given[b":method"])
            or given.get(b":scheme") not in (b"http", b"https")
            or not (PATH.fullmatch(given[b":path"]) or (given[b":path"], given[b":method"]) == (b"*", b"OPTIONS"))
            or any(not AUTHORITY.fullmatch(given[name]) for name in (b":authority", b"host") if name in given)
            or (end and int(length or 0) > 0)
        )
    status = given[b":status"]
    return not re.fullmatch(rb"[1-9][0-9][0-9]", status) or status == b"101" or (end and int(length or 0) > 0)


@intended("fields that h2 does not look at (grammar of pseudo-header fields, control characters, content-length and no body)")
def _(step: Step) -> bool:
    passed = [event for event in step.h2.events if event[0] == "headers" and event[1] == step.frame.stream]
    return (
        step.native_reset == f.PROTOCOL_ERROR
        and step.frame.type in (f.HEADERS, f.CONTINUATION)
        and len(passed) == 1
        and malformed(*passed[0][2:], step.frame.stream in step.short)
    )


@intended("h2 reports what HPACK cannot decode as PROTOCOL_ERROR")
def _(step: Step) -> bool:
    return (
        step.native.error == f.COMPRESSION_ERROR
        and step.h2.error == f.PROTOCOL_ERROR
        and step.h2.text.startswith("Error decoding header block")
    )


@intended("one stream too many is refused here (retry-safe), h2 ends the connection")
def _(step: Step) -> bool:
    return step.native_reset == f.REFUSED_STREAM and step.h2.text.startswith("Max inbound streams")


@intended("a window increment of 0 for a stream is a stream error here (RFC 9113 6.9), h2 ends the connection")
def _(step: Step) -> bool:
    return (
        step.native_reset == f.PROTOCOL_ERROR
        and step.frame.type == f.WINDOW_UPDATE
        and step.frame.increment == 0
        and step.h2.error == f.PROTOCOL_ERROR
    )


@intended("a stream that depends on itself is a stream error here (RFC 7540 5.3.1), h2 ends the connection")
def _(step: Step) -> bool:
    return (
        step.native_reset == f.PROTOCOL_ERROR
        and step.frame.type in (f.PRIORITY, f.HEADERS, f.CONTINUATION)
        and step.h2.text.endswith("may not depend on itself")
    )


@intended("PRIORITY of a wrong length is a stream error here (RFC 9113 6.3), h2 ends the connection")
def _(step: Step) -> bool:
    return step.native_reset == f.FRAME_SIZE_ERROR and step.frame.type == f.PRIORITY and step.h2.error == f.FRAME_SIZE_ERROR


@intended("frames on a stream that was reset here are ignored (RFC 9113 5.1), h2 answers them")
def _(step: Step) -> bool:
    return step.frame.stream in step.given_up and step.native.quiet and step.frame.type in (*MESSAGE, f.WINDOW_UPDATE)


@intended("h2 goes on to add SETTINGS_INITIAL_WINDOW_SIZE to the windows of streams that have ended")
def _(step: Step) -> bool:
    return (
        step.frame.type == f.SETTINGS
        and step.native.error is None
        and step.h2.text.startswith("May not increment flow control window")
        and step.ended_with_more
    )


@intended("DATA on a stream closed by END_STREAM is a connection error here, h2 sends RST_STREAM")
def _(step: Step) -> bool:
    return (
        step.native.error == f.STREAM_CLOSED
        and step.frame.type == f.DATA
        and step.h2.resets == {(step.frame.stream, f.STREAM_CLOSED)}
        and step.h2.error is None
    )


@intended("RST_STREAM on an idle stream is a connection error here (RFC 9113 6.4), h2 ignores it")
def _(step: Step) -> bool:
    idle = step.frame.stream > step.highest or step.frame.stream % 2 == 0
    return step.native.error == f.PROTOCOL_ERROR and step.frame.type == f.RST_STREAM and idle and step.h2.quiet


@intended("DATA beyond a stream's window is a stream error here (RFC 9113 6.9.1 allows both), h2 ends the connection")
def _(step: Step) -> bool:
    return step.native_reset == f.FLOW_CONTROL_ERROR and step.frame.type == f.DATA and step.h2.error == f.FLOW_CONTROL_ERROR


@intended("the reserved bit of a window increment is ignored here (RFC 9113 6.9), h2 takes it for a part of the number")
def _(step: Step) -> bool:
    return (
        step.frame.type == f.WINDOW_UPDATE
        and len(step.frame.payload) == 4
        and step.frame.payload[0] >= 0x80
        and step.h2.error == f.PROTOCOL_ERROR
        and step.native.error != f.PROTOCOL_ERROR
    )


@intended("a window increment of 0 on a closed stream is ignored here, h2 ends the connection")
def _(step: Step) -> bool:
    return (
        step.frame.type == f.WINDOW_UPDATE
        and step.frame.payload == bytes(4)
        and step.native.quiet
        and step.frame.stream <= step.highest
        and step.h2.error == f.PROTOCOL_ERROR
    )


@intended("HEADERS on an impossible stream, and PUSH_PROMISE, are refused at the first fragment here, by h2 at the last")
def _(step: Step) -> bool:
    return (
        step.native.error == f.PROTOCOL_ERROR
        and (step.frame.type == f.PUSH_PROMISE or (step.frame.type == f.HEADERS and step.frame.stream % 2 == 0))
        and not step.frame.flags & f.END_HEADERS
        and step.h2.quiet
    )


@intended("padding that fills HEADERS to the last byte is allowed (RFC 9113 6.2), h2 refuses it")
def _(step: Step) -> bool:
    frame = step.frame
    if frame.type != f.HEADERS or not frame.flags & f.PADDED or not frame.payload:
        return False
    room = len(frame.payload) - 1 - (5 if frame.flags & f.PRIORITY_FLAG else 0)
    return frame.payload[0] == room and step.h2.text.startswith("Received frame with invalid padding")


@intended("h2 parses ALTSVC, which is an unknown frame here")
def _(step: Step) -> bool:
    return step.frame.type == 10 and step.h2.error == f.FRAME_SIZE_ERROR and (step.native.quiet or step.in_block)


@intended("more than 32 parameters in one SETTINGS frame are refused here")
def _(step: Step) -> bool:
    return step.native.error == f.ENHANCE_YOUR_CALM and step.frame.type == f.SETTINGS and len(step.frame.payload) > 32 * 6


@intended("SETTINGS_ENABLE_CONNECT_PROTOCOL (RFC 8441) is unknown here, h2 checks its value")
def _(step: Step) -> bool:
    return step.frame.type == f.SETTINGS and step.native.error is None and step.h2.text.startswith("Setting 8 has invalid value")


@intended("content in a response that has none (HEAD, 204, 304) is malformed here (RFC 9110 6.4.1), h2 delivers it")
def _(step: Step) -> bool:
    return (
        step.native_reset == f.PROTOCOL_ERROR
        and step.frame.type == f.DATA
        and step.frame.stream in step.bodyless
        and any(event[0] == "data" for event in step.h2.events)
    )


@intended("content-length of a response without content (HEAD, 204, 304) is not compared with it here")
def _(step: Step) -> bool:
    return (
        step.frame.stream in step.bodyless
        and step.native.error is None
        and not step.native.resets
        and step.h2.text.startswith("InvalidBodyLengthError")
    )


@intended("a CONTINUATION without a header block is PROTOCOL_ERROR here (RFC 9113 6.10), by the state of its stream in h2")
def _(step: Step) -> bool:
    return (
        step.frame.type == f.CONTINUATION
        and not step.in_block
        and step.native.error == f.PROTOCOL_ERROR
        and (step.h2.error in (f.PROTOCOL_ERROR, f.STREAM_CLOSED) or step.h2.resets == {(step.frame.stream, f.STREAM_CLOSED)})
    )


@intended("an informational response on a stream that has ended is STREAM_CLOSED here, PROTOCOL_ERROR in h2")
def _(step: Step) -> bool:
    return f.STREAM_CLOSED in (step.native.error, step.native_reset) and step.h2.text.startswith(
        "Invalid input StreamInputs.RECV_INFORMATIONAL_HEADERS"
    )


@intended("padding of HEADERS is compared with what the priority fields leave here, with the whole payload in h2")
def _(step: Step) -> bool:
    frame = step.frame
    if frame.type != f.HEADERS or not (frame.flags & f.PADDED and frame.flags & f.PRIORITY_FLAG) or len(frame.payload) < 6:
        return False
    return step.native.error == f.PROTOCOL_ERROR and len(frame.payload) - 6 < frame.payload[0] < len(frame.payload)


def faults(frame: f.Frame, in_block: bool) -> set[int]:
    """Codes of the connection errors that a frame deserves by itself; which of several is reported is not laid down."""
    out = set()
    size = len(frame.payload)
    wrong = {
        f.RST_STREAM: size != 4, f.SETTINGS: bool(size % 6 or (frame.ack and size)), f.PING: size != 8, f.GOAWAY: size < 8,
        f.WINDOW_UPDATE: size != 4, f.PRIORITY: size != 5, f.PUSH_PROMISE: size < 4,
        f.DATA: bool(frame.flags & f.PADDED and not size),
        f.HEADERS: size < (1 if frame.flags & f.PADDED else 0) + (5 if frame.flags & f.PRIORITY_FLAG else 0),
    }  # fmt: skip
    if wrong.get(frame.type):
        out.add(f.FRAME_SIZE_ERROR)
        if frame.type in (f.HEADERS, f.DATA, f.SETTINGS):
            out.add(f.PROTOCOL_ERROR)  # h2 takes a missing pad length, and a payload with ACK, for that
    on_stream = frame.type in (f.DATA, f.HEADERS, f.PRIORITY, f.RST_STREAM, f.CONTINUATION, f.PUSH_PROMISE)
    on_connection = frame.type in (f.SETTINGS, f.PING, f.GOAWAY)
    if (on_stream and frame.stream == 0) or (on_connection and frame.stream) or frame.type == f.PUSH_PROMISE:
        out.add(f.PROTOCOL_ERROR)
    if frame.type in (f.DATA, f.HEADERS) and frame.flags & f.PADDED and size and frame.payload[0] >= size:
        out.add(f.PROTOCOL_ERROR)
    if in_block is not (frame.type == f.CONTINUATION):
        out.add(f.PROTOCOL_ERROR)
    return out


@intended("a frame with several faults: each engine ends the connection for one of them")
def _(step: Step) -> bool:
    possible = faults(step.frame, step.in_block)
    return len(possible) > 1 and step.native.error in possible and step.h2.error in possible


def explain(step: Step) -> str | None:
    return next((name for name, rule in INTENDED.items() if rule(step)), None)


# --- running --------------------------------------------------------------------------------------------------------------


def connect(role: str, engine: str) -> EnginePeer:
    peer = EnginePeer(role, engine, **LIMITS)
    peer.decoder.max_allowed_table_size = 0xFFFFFFFF  # h2's encoder follows every SETTINGS_HEADER_TABLE_SIZE
    if role == "server":
        peer.handshake()
    else:
        peer.greet()
        for method in REQUESTS.values():
            peer.request(method, end=method != b"POST")
        while peer.read():
            pass
    peer.at = len(peer.seen)
    return peer


class Tracker:
    """What the rules have to know about the frames before."""

    def __init__(self, role: str) -> None:
        self.given_up: set[int] = set()
        self.highest = max(REQUESTS) if role == "client" else 0
        self.in_block = False
        self.lengths: dict[int, int] = {}
        self.bodyless = {sid for sid, method in REQUESTS.items() if method == b"HEAD"} if role == "client" else set()
        self.bodies: Counter[int] = Counter()
        self.updated: set[int] = set()
        self.closed: set[int] = set()

    def after(self, frame: f.Frame, outcome: Outcome) -> None:
        self.given_up |= {stream for stream, _ in outcome.resets}
        if frame.type in (f.HEADERS, f.CONTINUATION):
            self.in_block = not frame.flags & f.END_HEADERS
            if frame.type == f.HEADERS:
                self.highest = max(self.highest, frame.stream)
        if frame.type == f.WINDOW_UPDATE:
            self.updated.add(frame.stream)
        self.closed |= {event[1] for event in outcome.events if event[0] == "closed"}
        for event in outcome.events:
            if event[0] == "reset" and event[2:] == (f.REFUSED_STREAM, True):
                self.given_up.add(event[1])
            if event[0] == "headers":
                if event[3] == "response" and event[2][0][1] in (b"204", b"304"):
                    self.bodyless.add(event[1])
                self.lengths.update((event[1], int(value)) for name, value in event[2] if name == b"content-length")
            elif event[0] == "data":
                self.bodies[event[1]] += len(event[2])

    def short(self) -> frozenset[int]:
        return frozenset(stream for stream, length in self.lengths.items() if self.bodies[stream] != length)


@dataclass
class Result:
    frames: int = 0
    """compared"""
    difference: str | None = None
    """name of the intended difference that ended the comparison"""
    error: int | None = None
    """connection error on both sides, the same"""


class UnintendedDifference(AssertionError):
    pass


def run(role: str, seed: int, report: Callable[[str], None] = lambda line: None) -> Result:
    script = Script(role, seed)
    pieces, rest = cut(script.data)
    native, h2 = connect(role, "native"), connect(role, "h2")
    result = Result()
    state = Tracker(role)
    for number, piece in enumerate(pieces):
        frame = next(f.FrameReader().feed(piece))
        ours = observe(native, piece)
        report(f"{number} {frame}\n    native: {ours}")
        if result.difference is None:
            theirs = observe(h2, piece)
            report(f"    h2:     {theirs}")
            result.frames += 1
            if not ours.same(theirs):
                step = Step(
                    frame,
                    ours,
                    theirs,
                    frozenset(state.given_up),
                    state.highest,
                    state.short(),
                    frozenset(state.bodyless),
                    bool(state.updated & state.closed),
                    state.in_block,
                )
                result.difference = explain(step)
                if result.difference is None:
                    raise UnintendedDifference(
                        f"python -m tests.http2.differential {role} {seed}: frame {number} {frame}\n"
                        f"  native: {ours}\n  h2:     {theirs}"
                    )
                report(f"    intended: {result.difference}")
        state.after(frame, ours)
        if ours.error is not None:
            if result.difference is None:
                result.error = ours.error
            break
    else:
        observe(native, rest)
    return result


class SilentPeer(EnginePeer):
    """An application that reads and sends nothing, so that it does not matter when it would."""

    def react(self, event: Event) -> None:
        if event[0] == "error":
            self.error = event


def merged(events: list[Event]) -> list[Event]:
    """Pieces of DATA joined."""
    out: list[Event] = []
    for event in events:
        if event[0] == "data" and out and out[-1][:2] == event[:2] and not out[-1][3]:
            event = ("data", event[1], out.pop()[2] + event[2], event[3])
        if event[0] != "data" or event[2] or event[3]:
            out.append(event)
    return out


def split(role: str, engine: str, seed: int, *, single: bool = False) -> None:
    """The same bytes at once, and in random pieces or (``single``) one by one: the same events, the same bytes sent."""
    rng = random.Random(f"split {seed}")
    data = Script(role, seed).data
    whole, parts = (SilentPeer(role, engine, **LIMITS) for _ in range(2))
    for peer in (whole, parts):
        if role == "server":
            peer.write(f.PREFACE + f.settings())
        else:
            peer.write(f.settings())
            for method in REQUESTS.values():
                peer.request(method, end=method != b"POST")
    whole.write(data)
    at = 0
    while at < len(data):
        size = 1 if single else rng.choice((1, 2, 5, 9, 10, 20, 100, 1000, 20_000))
        parts.write(data[at : at + size])
        at += size
    assert merged(parts.events) == merged(whole.events), f"{role} {seed}: other events in pieces"
    assert parts.fresh == whole.fresh, f"{role} {seed}: other answers in pieces"


if __name__ == "__main__":
    print(run(sys.argv[1], int(sys.argv[2]), print))
