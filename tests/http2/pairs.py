"""A client and a server that talk to each other, each on either engine, while their applications do random things.

What has to hold whatever they do: no connection error, whole bodies in order, every stream closed once and silent after that,
flow control that neither leaks nor grows, streams and memory gone at the end. ``python -m tests.http2.pairs CLIENT SERVER SEED``
repeats one case.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, field

from dynwire.wire.http2 import Http2Connection

from . import frames as f
from .peer import Event

STEPS = 250
SIZES = (0, 1, 10, 255, 1000, 5000, 16384, 16385, 65535, 65536, 70_000, 200_000)


@dataclass
class Message:
    """A request or response on its way through the test: what was handed to the sender and what the receiver got."""

    pieces: list[bytes]
    trailers: list[f.Field] | None
    sent: bytearray = field(default_factory=bytearray)
    ended: bool = False
    """the sender has said its last"""
    got: bytearray = field(default_factory=bytearray)
    got_trailers: list[f.Field] | None = None
    complete: bool = False
    """the receiver has seen the end"""


def message(rng: random.Random) -> Message:
    total = rng.choice(SIZES)
    body = rng.randbytes(total)
    pieces = []
    while body:
        size = rng.choice((1, 100, 1000, 10_000, 100_000))
        pieces.append(body[:size])
        body = body[size:]
        if len(pieces) > 20:
            pieces.append(body)
            break
    return Message(pieces, [(b"x-sum", b"%d" % total)] if rng.random() < 0.3 else None)


class Side:
    def __init__(self, role: str, engine: str, rng: random.Random) -> None:
        self.role = role
        self.rng = rng
        limits = {
            "max_frame_size": rng.choice((16384, 1 << 20)),
            "stream_window": rng.choice((1000, 65535, 70_000, 1 << 20)),
            "connection_window": rng.choice((65535, 100_000, 4 << 20)),
        }
        if role == "server":
            limits["max_concurrent_streams"] = rng.choice((1, 5, 1000))
        self.conn = Http2Connection(role, engine=engine, **limits)
        self.conn.start()
        self.out: dict[int, Message] = {}
        self.into: dict[int, Message] = {}
        self.unread: list[tuple[int, int]] = []
        self.closed: set[int] = set()
        self.reset: set[int] = set()
        self.full: set[int] = set()
        """streams for which room() has said no"""
        self.wire = bytearray()
        self.informational = True
        self.limited = False
        """open_stream() has returned None"""

    def take(self, events: list[Event], peer: Side) -> None:
        for event in events:
            sid = event[1] if len(event) > 1 and event[0] in ("headers", "data", "reset", "closed", "room") else 0
            assert sid not in self.closed, f"{self.role}: {event} after the stream was closed"
            match event:
                case ("error", code, text):
                    raise AssertionError(f"{self.role}: connection error {f.error_name(code)} {text}")
                case ("headers", _, fields, kind, end):
                    into = self.into.setdefault(sid, peer.out[sid])
                    assert not into.complete
                    if kind == "trailers":
                        into.got_trailers = list(fields)
                    into.complete = end
                    if self.role == "server" and kind == "request":
                        self.respond(sid)
                case ("data", _, payload, end):
                    into = self.into[sid]
                    assert not into.complete
                    into.got += payload
                    assert into.sent.startswith(into.got), f"{self.role}: stream {sid} carries other bytes than were sent"
                    into.complete = end
                    if payload:
                        self.unread.append((sid, len(payload)))
                case ("reset", *_):
                    self.reset.add(sid)
                case ("closed", *_):
                    self.closed.add(sid)
                    self.full.discard(sid)
                case ("room", *_):
                    assert sid in self.full, f"{self.role}: room for stream {sid}, which had not been asked for"
                    self.full.discard(sid)
                case ("capacity",):
                    self.limited = False

    def respond(self, sid: int) -> None:
        self.out[sid] = message(self.rng)
        status = self.rng.choice((b"200", b"404"))
        if self.informational and self.rng.random() < 0.2:
            self.conn.send_headers(sid, [(b":status", b"103"), (b"link", b"</style>")])
        self.conn.send_headers(sid, [(b":status", status), (b"x-id", b"%d" % sid)])

    def request(self) -> None:
        sid = self.conn.open_stream()
        if sid is None:
            self.limited = True
            return
        self.out[sid] = message(self.rng)
        self.conn.send_headers(
            sid,
            [
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", b"/%d" % sid),
                (b":authority", b"test"),
                (b"x-id", b"%d" % sid),
            ],
        )

    def send(self, sid: int) -> None:
        """The next piece of a message, or its end."""
        out = self.out[sid]
        if out.pieces:
            piece = out.pieces.pop(0)
            out.sent += piece
            end = not out.pieces and out.trailers is None and self.rng.random() < 0.5
            self.conn.send_data(sid, piece, end=end)
        elif out.trailers is not None:
            end = True
            self.conn.send_headers(sid, out.trailers, end=True)
        else:
            end = True
            self.conn.send_data(sid, b"", end=True)
        out.ended = end
        if not end and not self.conn.room(sid) and sid not in self.closed:
            self.full.add(sid)

    def sendable(self) -> list[int]:
        return [sid for sid, out in self.out.items() if not out.ended and sid not in self.closed and sid not in self.full]

    def read(self, everything: bool = False) -> None:
        if not self.unread:
            return
        if everything or self.rng.random() < 0.7:
            for sid, size in self.unread:
                self.conn.consumed(sid, size)
            self.unread.clear()
        else:
            sid, size = self.unread.pop(0)
            some = self.rng.randrange(size + 1)
            self.conn.consumed(sid, some)
            if some < size:
                self.unread.insert(0, (sid, size - some))

    def write(self, limit: int | None) -> None:
        self.wire += self.conn.output(limit)


class Pair:
    def __init__(self, client: str, server: str, seed: int) -> None:
        self.rng = random.Random(f"{client} {server} {seed}")
        self.client = Side("client", client, self.rng)
        self.server = Side("server", server, self.rng)
        # h2 4.4.1 ends the connection if one arrives on a stream that was reset in the meantime
        self.server.informational = client == "native"
        self.requests = self.rng.randrange(1, 15)
        self.counts: Counter[str] = Counter()

    def move(self, source: Side, target: Side, size: int) -> None:
        """Bytes over the connection; both sides then look at their events."""
        source.write(self.rng.choice((None, None, 1, 100, 5000)) if size < 1 << 30 else None)
        data = bytes(source.wire[:size])
        del source.wire[:size]
        if data:
            target.take(target.conn.receive(data), source)
        for side, other in ((self.client, self.server), (self.server, self.client)):
            side.take(side.conn.events_now(), other)

    def act(self, side: Side) -> None:
        rng = self.rng
        choice = rng.random()
        if choice < 0.25 and side.role == "client" and self.requests and not side.limited:
            self.requests -= 1
            side.request()
        elif choice < 0.7:
            if open_ := side.sendable():
                side.send(rng.choice(open_))
        elif choice < 0.9:
            side.read()
        elif choice < 0.93:
            candidates = [sid for sid in side.out if sid not in side.closed]
            if candidates and rng.random() < 0.3:
                sid = rng.choice(candidates)
                side.reset.add(sid)
                side.conn.reset(sid, f.CANCEL)
                self.counts["resets"] += 1
        elif choice < 0.95:
            side.conn.ping(rng.randbytes(8))
        elif choice < 0.96:
            side.conn.set_windows(rng.choice((65535, 1 << 20)), rng.choice((65535, 1 << 22)))

    def run(self) -> None:
        rng = self.rng
        if self.server.conn.engine_name == "h2":
            # more requests than it allows, begun before it could say so, end an h2 server's connection
            self.move(self.server, self.client, 1 << 30)
        for _ in range(STEPS):
            self.act(rng.choice((self.client, self.server)))
            if rng.random() < 0.6:
                source, target = rng.choice(((self.client, self.server), (self.server, self.client)))
                self.move(source, target, rng.choice((1, 9, 100, 5000, 100_000, 1 << 29)))
        for _ in range(2000):
            if self.settle():
                break
        else:
            raise AssertionError(f"does not come to an end: {self.client.conn.ledger()} {self.server.conn.ledger()}")
        self.check()

    def settle(self) -> bool:
        """Finish what is open; whether nothing is left."""
        busy = False
        for side, other in ((self.client, self.server), (self.server, self.client)):
            if side.role == "client" and self.requests and not side.limited:
                self.requests -= 1
                side.request()
                busy = True
            for sid in side.sendable():
                side.send(sid)
                busy = True
            if side.unread:
                side.read(everything=True)
                busy = True
            before = len(side.wire)
            side.write(None)
            if side.wire or before:
                self.move(side, other, 1 << 30)
                busy = True
        return not busy

    def check(self) -> None:
        for side, other in ((self.client, self.server), (self.server, self.client)):
            assert not side.full, f"{side.role}: never heard of room for {side.full}"
            assert side.conn.live == 0, f"{side.role}: {side.conn.live} streams left"
            assert side.closed == set(side.out) | set(side.into), f"{side.role}: closed {side.closed}, had {set(side.out)}"
            for sid, out in side.out.items():
                if sid in side.reset or sid in other.reset:
                    continue
                assert out.ended and out.complete, f"{side.role}: stream {sid} did not arrive whole"
                assert out.got == out.sent and out.got_trailers == out.trailers
                self.counts["messages"] += 1
                self.counts["bytes"] += len(out.got)
            ledger, theirs = side.conn.ledger(), other.conn.ledger()
            assert ledger["queued"] == ledger["backlog"] == 0
            assert ledger["granted"] == ledger["received"] + ledger["recv_window"], f"{side.role}: {ledger}"
            assert theirs["send_window"] == ledger["recv_window"], f"{side.role} grants {ledger}, the peer counts {theirs}"
        if self.requests:
            raise AssertionError(f"{self.requests} requests could not be begun")


def run(client: str, server: str, seed: int) -> Counter[str]:
    pair = Pair(client, server, seed)
    pair.run()
    return pair.counts


if __name__ == "__main__":
    print(run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
