"""The other side of a connection under test, as conformance cases see it: frames out, frames in, verdicts.

A `Peer` speaks to one endpoint, a server or a client. `EnginePeer` drives an `Http2Connection` in this process, without
sockets; `tests.http2.over_socket.SocketPeer` does the same over TCP. A verdict is an assertion: what the endpoint did is part
of the message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpack import Decoder, HPACKError

from dynwire.wire.http2 import Http2Connection

from . import frames as f
from .frames import Frame

BODY = b"conformance response"
"""what the server under test answers; some cases need five bytes of it"""

Event = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    id: str
    rfc: str
    requirement: str
    run: Callable[[Any], None]
    socket: bool = True
    """can be seen from outside, over a connection to any server; otherwise the case needs to know when the application reads"""
    limits: tuple[tuple[str, int], ...] = ()
    """limits of the engine under test, if not the defaults"""

    def __str__(self) -> str:
        return self.id


class Section:
    """Numbers the cases of one section in the order they are written: ``http2/5.1/9``."""

    def __init__(self, cases: list[Case], prefix: str, rfc: str) -> None:
        self.cases = cases
        self.prefix = prefix
        self.rfc = rfc
        self.number = 0

    def add(self, requirement: str, run: Callable[[Any], None], *, rfc: str = "", socket: bool = True, **limits: int) -> None:
        self.number += 1
        item = Case(f"{self.prefix}/{self.number}", rfc or self.rfc, requirement, run, socket, tuple(limits.items()))
        self.cases.append(item)

    def __call__(
        self, requirement: str, *, rfc: str = "", socket: bool = True, **limits: int
    ) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
            self.add(requirement, run, rfc=rfc, socket=socket, **limits)
            return run

        return register


class Peer(ABC):
    host = b"localhost"
    path = b"/"

    def __init__(self) -> None:
        self.reader = f.FrameReader()
        self.seen: list[Frame] = []
        """everything the endpoint has sent"""
        self.at = 0
        """how much of it the case has looked at"""
        self.decoder = Decoder()
        self.block: bytes | None = None
        self.lists: dict[int, list[list[f.Field]]] = {}
        """field sections received, by stream"""
        self.settings: dict[int, int] = {}
        """what the endpoint announced"""

    # --- the connection ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def write(self, data: bytes) -> None: ...

    @abstractmethod
    def read(self) -> bool:
        """Take in more frames with `take`. False when the endpoint is silent or gone."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """The endpoint has given the connection up."""

    def take(self, data: bytes) -> bool:
        got = False
        for frame in self.reader.feed(data):
            got = True
            self.seen.append(frame)
            if frame.type == f.SETTINGS and not frame.ack:
                self.settings.update(frame.settings)
            if frame.type in (f.HEADERS, f.CONTINUATION):
                self.block = (self.block or b"") + frame.body
                if frame.flags & f.END_HEADERS:
                    try:
                        fields = [(bytes(name), bytes(value)) for name, value in self.decoder.decode(self.block, raw=True)]
                    except HPACKError as error:
                        raise AssertionError(f"header block of the endpoint does not decode; it sent {self.story()}") from error
                    self.lists.setdefault(frame.stream, []).append(fields)
                    self.block = None
        return got

    def send(self, *pieces: bytes) -> None:
        self.write(b"".join(pieces))

    def next(self) -> Frame | None:
        while self.at == len(self.seen):
            if not self.read():
                return None
        self.at += 1
        return self.seen[self.at - 1]

    def story(self) -> str:
        end = "then the connection was closed" if self.closed else "then silence"
        return f"{', '.join(map(str, self.seen)) or 'nothing'}, {end}"

    def until(self, wanted: str, match: Callable[[Frame], bool]) -> Frame:
        while (frame := self.next()) is not None:
            if match(frame):
                return frame
        raise AssertionError(f"expected {wanted}; the endpoint sent {self.story()}")

    # --- what a client sends ----------------------------------------------------------------------------------------------

    def handshake(self, *pairs: tuple[int, int]) -> None:
        """Preface and SETTINGS both ways, acknowledged both ways."""
        self.send(f.PREFACE, f.settings(*pairs))
        self.until("SETTINGS", lambda frame: frame.type == f.SETTINGS and not frame.ack)
        self.until("acknowledgement of SETTINGS", lambda frame: frame.type == f.SETTINGS and frame.ack)
        self.send(f.SETTINGS_ACK)

    def handshake_and_hold(self) -> None:
        """With a zero window no response ends, so the streams stay open for as long as the case needs."""
        self.handshake((f.INITIAL_WINDOW_SIZE, 0))

    def fields(self, method: bytes = b"GET", *extra: f.Field) -> list[f.Field]:
        return [(b":method", method), (b":scheme", b"http"), (b":path", self.path), (b":authority", self.host), *extra]

    def get(self, stream: int = 1, *extra: f.Field) -> bytes:
        return f.headers(stream, f.block(self.fields(b"GET", *extra)), end=True)

    def post(self, stream: int = 1, *extra: f.Field) -> bytes:
        """opens the stream, the body is still to come"""
        return f.headers(stream, f.block(self.fields(b"POST", *extra)))

    # --- verdicts ---------------------------------------------------------------------------------------------------------

    def connection_error(self, *codes: int) -> None:
        """GOAWAY with one of the codes, then nothing more on this connection."""
        names = " or ".join(map(f.error_name, codes))
        frame = self.until(f"GOAWAY({names})", lambda frame: frame.type == f.GOAWAY)
        assert frame.code in codes, f"expected GOAWAY({names}); the endpoint sent {self.story()}"
        self.until_closed()

    def until_closed(self) -> None:
        while self.next() is not None:
            pass
        assert self.closed, f"expected the connection to be closed; the endpoint sent {self.story()}"

    def stream_error(self, stream: int, *codes: int) -> None:
        """RST_STREAM with one of the codes; the connection goes on."""
        names = " or ".join(map(f.error_name, codes))
        wanted = f"RST_STREAM({stream}, {names})"
        frame = self.until(
            wanted, lambda frame: frame.type == f.GOAWAY or (frame.type == f.RST_STREAM and frame.stream == stream)
        )
        assert frame.type == f.RST_STREAM and frame.code in codes, f"expected {wanted}; the endpoint sent {self.story()}"
        self.alive()

    def either_error(self, stream: int, *codes: int) -> None:
        """Stream error or connection error, where the RFC leaves the choice."""
        names = " or ".join(map(f.error_name, codes))
        wanted = f"RST_STREAM({stream}) or GOAWAY with {names}"
        frame = self.until(
            wanted, lambda frame: frame.type == f.GOAWAY or (frame.type == f.RST_STREAM and frame.stream == stream)
        )
        assert frame.code in codes, f"expected {wanted}; the endpoint sent {self.story()}"
        self.until_closed() if frame.type == f.GOAWAY else self.alive()

    def alive(self, payload: bytes = b"-alive?-") -> None:
        """A PING is answered, and no error is reported before that."""
        self.send(f.ping(payload))
        frame = self.until(
            "PING(ACK)",
            lambda frame: frame.type == f.GOAWAY or (frame.type == f.PING and frame.ack and frame.payload == payload),
        )
        assert frame.type == f.PING, f"expected PING(ACK); the endpoint sent {self.story()}"

    def alive_or_closed(self) -> None:
        """For GOAWAY of ours: the endpoint may go on for open streams or close at once, but must not call it an error."""
        self.send(f.ping())
        while (frame := self.next()) is not None:
            if frame.type == f.PING and frame.ack:
                return
            assert frame.type != f.GOAWAY or frame.code == f.NO_ERROR, f"no error was due; the endpoint sent {self.story()}"
        assert self.closed, f"expected PING(ACK) or a closed connection; the endpoint sent {self.story()}"

    def response(self, stream: int = 1) -> list[f.Field]:
        """A header section with a status on the stream."""
        self.until(
            f"HEADERS on stream {stream}",
            lambda frame: (
                frame.type in (f.HEADERS, f.CONTINUATION) and frame.stream == stream and bool(frame.flags & f.END_HEADERS)
            ),
        )
        fields = self.lists[stream][-1]
        assert fields[0][0] == b":status", f"expected :status first, got {fields}"
        return fields

    def complete(self, stream: int = 1) -> None:
        """END_STREAM on the stream."""
        self.until(f"END_STREAM on stream {stream}", lambda frame: frame.stream == stream and frame.end_stream)

    def data_of_length(self, stream: int, length: int) -> None:
        frame = self.until(f"DATA on stream {stream}", lambda frame: frame.type == f.DATA and frame.stream == stream)
        assert len(frame.payload) == length, f"expected {length} bytes of DATA; the endpoint sent {self.story()}"

    def settings_ack(self) -> None:
        self.until("SETTINGS(ACK)", lambda frame: frame.type == f.SETTINGS and frame.ack)

    def never(self, wanted: str, match: Callable[[Frame], bool]) -> None:
        """None of all frames until the answer to a PING matches."""
        self.alive(b"-silent-")
        assert not any(map(match, self.seen)), f"expected no {wanted}; the endpoint sent {self.story()}"


class EnginePeer(Peer):
    """The endpoint is an `Http2Connection`. As a server it answers every complete request with `BODY`."""

    def __init__(self, role: str, engine: str, **limits: int) -> None:
        super().__init__()
        self.role = role
        self.conn = Http2Connection(role, engine=engine, **limits)
        self.events: list[Event] = []
        self.error: Event | None = None
        self.conn.start(0.0)
        self.fresh = self.conn.output()
        if role == "client":
            assert self.fresh.startswith(f.PREFACE), f"a client starts with the preface, not with {self.fresh[:24]!r}"
            self.fresh = self.fresh[len(f.PREFACE) :]

    @property
    def closed(self) -> bool:
        return self.error is not None

    def write(self, data: bytes) -> None:
        if self.error is not None:
            return
        events = self.conn.receive(data, 0.0)
        self.events += events
        for event in events:
            self.react(event)
        self.flush()

    def read(self) -> bool:
        fresh, self.fresh = self.fresh, b""
        return self.take(fresh)

    def react(self, event: Event) -> None:
        """What the application does. The stream may be gone already, which must not matter."""
        match event:
            case ("error", *_):
                self.error = event
            case ("data", sid, payload, end):
                self.conn.consumed(sid, len(payload))
                if end and self.role == "server":
                    self.respond(sid)
            case ("headers", sid, _, kind, True) if self.role == "server" and kind in ("request", "trailers"):
                self.respond(sid)

    def respond(self, sid: int) -> None:
        self.conn.send_headers(sid, [(b":status", b"200"), (b"content-type", b"text/plain")])
        self.conn.send_data(sid, BODY, end=True)

    # --- for cases about clients ------------------------------------------------------------------------------------------

    def greet(self, *pairs: tuple[int, int]) -> None:
        """What a server says first; the client's SETTINGS are acknowledged."""
        self.until("SETTINGS", lambda frame: frame.type == f.SETTINGS and not frame.ack)
        self.send(f.settings(*pairs), f.SETTINGS_ACK)
        self.settings_ack()

    def request(self, method: bytes = b"GET", *extra: f.Field, end: bool = True) -> int:
        """The client under test sends a request."""
        sid = self.conn.open_stream()
        assert sid is not None, "open_stream refused"
        self.conn.send_headers(sid, self.fields(method, *extra), end=end)
        self.flush()
        return sid

    def flush(self) -> None:
        self.fresh += self.conn.output()
        self.events += self.conn.events_now()

    def greet_and_request(self, method: bytes = b"GET", *extra: f.Field, end: bool = True) -> int:
        self.greet()
        return self.request(method, *extra, end=end)

    def connection_error(self, *codes: int) -> None:
        super().connection_error(*codes)
        assert self.error is not None and self.error[1] in codes, f"the owner was told {self.error}"

    def got(self, *events: Event) -> None:
        """The events that the owner of the connection saw, those of the handshake left out."""
        mine = [event for event in self.events if event[0] not in ("settings", "settings_ack", "capacity", "room")]
        assert mine == list(events), f"expected {list(events)}, got {mine}"


RESPONSE = [(b":status", b"200"), (b"content-type", b"text/plain")]


def ok(stream: int, *extra: f.Field, end: bool = False) -> bytes:
    """HEADERS of a plain response"""
    return f.headers(stream, f.block([*RESPONSE, *extra]), end=end)
