"""HTTP/1.1 for tools on the port of the http plane: the server's side of one connection over h11, and what tells protocols apart.

Requests look like those of HTTP/2 (`dynwire.wire.http_api.parse_head` reads both), one at a time. h11 frames the messages; this
module refuses what makes proxies and servers disagree about where a message ends, and what h11 accepts: both lengths at once,
folded lines, bare CR or LF, control characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal

import h11

from .._frames import describe_foreign
from ..errors import PlaneMismatch

HEAD_LIMIT = 65536
"""Bytes of a request line with its fields, as for HTTP/2; more is answered with 431."""
TARGET_LIMIT = 8192
"""Bytes of a request's target; more is answered with 414."""
FIELD_LIMIT = 100
_METHOD_LIMIT = 32
_PIPELINE_LIMIT = 65536  # bytes kept of requests that wait for the reply to the one before

Sniffed = Literal["h2", "http1", "need-more", "other"]

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_REQUEST_LINE = re.compile(rb"(%b{1,%d}) ([!-~]+) HTTP/([0-9])\.([0-9])" % (_TOKEN, _METHOD_LIMIT))
# As much of a request line as there is: every prefix of one must match.
_METHOD_PREFIX = re.compile(rb"%b{1,%d}" % (_TOKEN, _METHOD_LIMIT))
_BROKEN = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FOLDED = re.compile(rb"\r\n[ \t]")
_ABSOLUTE = re.compile(rb"(?i)https?://([^/?#]+)(.*)", re.DOTALL)

_OF_THE_CONNECTION = frozenset(
    {
        b"connection",
        b"expect",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",  # also of `curl --http2`: RFC 9113 has no upgrade to h2c any more, so the request is answered here
    }
)


def sniff(head: bytes) -> Sniffed:
    """Which protocol the first bytes of a connection are. Everything but HTTP/2 and a real HTTP/1.x request line is ``other``.

    ``PRI `` alone decides for HTTP/2: no method of that name exists (RFC 9113 §3.4), and the rest is checked there.
    """
    if head[:2] == b"\r\n":
        head = head[2:]  # RFC 9112 §2.2: an empty line before a request is ignored
    if b"PRI ".startswith(head[:4]):
        return "h2" if len(head) >= 4 else "need-more"
    if head == b"\r":
        return "need-more"
    line, ended, _ = head.partition(b"\n")
    if ended:
        match = _REQUEST_LINE.fullmatch(line.removesuffix(b"\r"))
        return "http1" if match is not None and match[3] == b"1" else "other"
    method, space, rest = line.partition(b" ")
    if not _METHOD_PREFIX.fullmatch(method):
        return "other"
    if not space:
        return "need-more"
    target, space, version = rest.partition(b" ")
    if re.fullmatch(rb"[!-~]*", target) is None:
        return "other"
    if len(target) > TARGET_LIMIT:
        return "http1"  # which answers that the target is too long
    if not space:
        return "need-more"
    return "need-more" if re.fullmatch(rb"H(T(T(P(/(1(\.([0-9]\r?)?)?)?)?)?)?)?|", version) else "other"


def foreign(head: bytes, peer: str | None) -> PlaneMismatch:
    """The error for a connection that `sniff` calls ``other``, with the name of what it looks like."""
    theirs = "the dynwire tcp plane" if head.startswith(b"DYNW") else describe_foreign(head)
    return PlaneMismatch(
        f"{peer or 'the peer'} speaks {theirs}, but this is the dynwire http plane (HTTP/2 with prior knowledge and HTTP/1.1); "
        "both sides need the same DYN_REQUEST_PLANE",
        ours="http",
        theirs=theirs,
        peer=peer,
        details={"head": head[:64].decode("latin-1")},
    )


class Http1Session:
    """The server's side of one HTTP/1.x connection: bytes and replies in, events and bytes out. No I/O.

    Events: ``("request", headers)`` with ``:method``, ``:scheme``, ``:authority`` (if there is one) and ``:path`` first;
    ``("data", bytes)``; ``("end",)`` after the last byte of the request; ``("error", status, text)``, after which nothing more
    comes: answer it, unless the reply has begun (then `abort`), and close.

    A request that arrives before the reply to the one before is complete waits: after `end` call ``receive(b"")`` for it.
    Sending to a connection that is gone does nothing.
    """

    def __init__(self, scheme: str = "http") -> None:
        self._scheme = scheme.encode()
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._eof = False
        self.must_close = False
        """Close when `output` is sent. If the client may still be sending, stop writing first and read on for a moment: closing
        with unread bytes resets the connection, and the client may lose the reply."""
        self._begin()

    def _begin(self) -> None:
        # h11 enforces its limit on incomplete events only, here those are chunk heads and trailers
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        self._scanned = 0
        self._skipped_line = False
        self._reading: Literal["head", "body", "nothing"] = "head"
        self._complete = False  # the request
        self._failed = False
        self._method = b""

    @property
    def wants_data(self) -> bool:
        """False while reading more would only fill memory."""
        return not self.must_close and not (self._reading == "nothing" and len(self._buffer) >= _PIPELINE_LIMIT)

    @property
    def idle(self) -> bool:
        """No request has begun, not even in part."""
        return self._reading == "head" and not self._buffer

    @property
    def complete(self) -> bool:
        """The whole request has come, and the reply to it is not complete."""
        return self._complete

    @property
    def expects_continue(self) -> bool:
        """The client waits for `send_continue` before it sends the request's body."""
        return self._h11.client_is_waiting_for_100_continue

    # Receiving

    def receive(self, data: bytes) -> list[tuple[Any, ...]]:
        """Take bytes from the client (also none) and return what they mean. A failed or finished connection ignores them."""
        events: list[tuple[Any, ...]] = []
        if self.must_close or self._failed:
            return events
        self._buffer += data
        if self._reading == "head":
            self._read_head(events)
        if self._reading == "body" and self._buffer:
            self._read_body(events)
        return events

    def receive_eof(self) -> list[tuple[Any, ...]]:
        """The client sends no more; it may still wait for replies."""
        events: list[tuple[Any, ...]] = []
        if self.must_close or self._failed:
            return events
        self._eof = True
        if self._reading != "nothing":
            self._ended_early(events)
        return events

    def _ended_early(self, events: list[tuple[Any, ...]]) -> None:
        if self.idle:
            self.must_close = True
        else:
            self._fail(events, 400, "the connection ended in the middle of a request")

    def _fail(self, events: list[tuple[Any, ...]], status: int, text: str) -> None:
        self._failed = True
        self._reading = "nothing"
        self._buffer.clear()
        events.append(("error", status, text))

    def _read_head(self, events: list[tuple[Any, ...]]) -> None:
        buffer = self._buffer
        if not self._skipped_line and buffer[:2] == b"\r\n":
            del buffer[:2]  # RFC 9112 §2.2: one empty line before a request is ignored
            self._skipped_line = True
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        limit = len(buffer) if end < 0 else end + 4
        broken = _BROKEN.search(buffer, max(0, self._scanned - 1), limit)
        self._scanned = limit
        if broken is not None:
            byte = buffer[broken.start()]
            what = {10: "a bare LF", 13: "a bare CR"}.get(byte, f"the control character 0x{byte:02x}")
            self._fail(events, 400, f"{what} at byte {broken.start()} of the request's head")
        elif buffer.find(b"\n", 0, TARGET_LIMIT + _METHOD_LIMIT + 16) < 0 and len(buffer) > TARGET_LIMIT + _METHOD_LIMIT + 16:
            self._fail(events, 414, _TOO_LONG)
        elif limit > HEAD_LIMIT:
            self._fail(events, 431, f"the request's head is longer than {HEAD_LIMIT} bytes")
        elif end >= 0:
            head = bytes(buffer[:limit])
            del buffer[:limit]
            self._parse_head(head, events)
        elif self._eof:
            self._ended_early(events)

    def _parse_head(self, head: bytes, events: list[tuple[Any, ...]]) -> None:
        line = head.partition(b"\r\n")[0]
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            self._fail(events, 400, f"not an HTTP request line: {line[:64].decode('latin-1')!r}")
            return
        method, target, major, minor = match.groups()
        if major != b"1":
            self._fail(events, 505, f"HTTP/{major.decode()}.{minor.decode()} is not spoken here, HTTP/1.1 and HTTP/2 are")
        elif len(target) > TARGET_LIMIT:
            self._fail(events, 414, _TOO_LONG)
        elif _FOLDED.search(head):
            self._fail(events, 400, "a folded header line (RFC 9112 §5.2)")
        elif head.count(b"\r\n") - 2 > FIELD_LIMIT:
            self._fail(events, 431, f"the request has more than {FIELD_LIMIT} header fields")
        else:
            self._method = method
            try:
                self._h11.receive_data(head)
                request = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                self._fail(events, error.error_status_hint, str(error))
                return
            assert isinstance(request, h11.Request)
            self._accept(request, target, minor, events)

    def _accept(self, request: h11.Request, target: bytes, minor: bytes, events: list[tuple[Any, ...]]) -> None:
        names = {name for name, _ in request.headers}
        if b"transfer-encoding" in names:
            # RFC 9112 §6.1: allowed in part, but the usual way to smuggle a request past a proxy
            if b"content-length" in names:
                self._fail(events, 400, "both Content-Length and Transfer-Encoding")
                return
            if minor == b"0":
                self._fail(events, 400, "Transfer-Encoding in HTTP/1.0")
                return
        authority = next((value for name, value in request.headers if name == b"host"), b"")
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:  # RFC 9112 §3.2.2: proxies send it, and then it counts instead of Host
            authority, target = absolute.groups()
            if not target.startswith(b"/"):
                target = b"/" + target
        headers = [(b":method", self._method), (b":scheme", self._scheme)]
        if authority:
            headers.append((b":authority", authority))
        headers.append((b":path", target))
        headers += [(name, value) for name, value in request.headers if name not in _OF_THE_CONNECTION]
        events.append(("request", headers))
        self._reading = "body"
        self._read_body(events)

    def _read_body(self, events: list[tuple[Any, ...]]) -> None:
        if self._buffer:
            self._h11.receive_data(bytes(self._buffer))
            self._buffer.clear()
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                self._fail(events, error.error_status_hint, str(error))
                return
            if isinstance(event, h11.Data):
                events.append(("data", bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                events.append(("end",))
                self._complete = True
                self._reading = "nothing"
                self._buffer += self._h11.trailing_data[0]
                return
            else:
                return  # NEED_DATA

    # Sending

    def send_continue(self) -> None:
        """Ask for the request's body, if the client waits for that."""
        if self.expects_continue and not self.must_close:
            self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))

    def send_head(self, status: int, headers: Iterable[tuple[bytes, bytes]], end: bool = False) -> None:
        """The reply's status and headers, those of HTTP/2 without ``:status``. ``end``: it has no body.

        Without ``content-length`` the body is chunked, or ends with the connection for HTTP/1.0.
        """
        if self.must_close:
            return
        fields = list(headers)
        if end and self._method != b"HEAD" and status not in (204, 304) and not any(n == b"content-length" for n, _ in fields):
            fields.append((b"content-length", b"0"))
        if self._failed or (self._eof and not self._buffer) or (not self._complete and status >= 400):
            fields.append((b"connection", b"close"))
        try:
            reason = HTTPStatus(status).phrase.encode()
        except ValueError:
            reason = b"Client Closed Request" if status == 499 else b""
        self._send(h11.Response(status_code=status, headers=fields, reason=reason))
        if end:
            self.end()

    def send_data(self, data: bytes) -> None:
        """Bytes of the reply's body; ignored for HEAD."""
        if data and not self.must_close and self._method != b"HEAD":
            self._send(h11.Data(data=data))

    def end(self) -> None:
        """The reply is complete. The next request may follow, or `must_close` is true."""
        if self.must_close:
            return
        self._send(h11.EndOfMessage())
        # A reply before the end of its request: what still comes is not worth reading, and must not be taken for a request.
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._begin()
            if self._eof and not self._buffer:
                self.must_close = True
        else:
            self.must_close = True
            self._buffer.clear()

    def abort(self) -> None:
        """Give the reply up: the client sees that its end is missing, unless the connection ends it anyway (HTTP/1.0)."""
        self.must_close = True
        self._buffer.clear()

    def _send(self, event: h11.Event) -> None:
        data = self._h11.send(event)
        if data:
            self._out.append(data)

    def output(self) -> bytes:
        """What is to be written; the session forgets it."""
        data = b"".join(self._out)
        self._out.clear()
        return data


_TOO_LONG = f"the request's target is longer than {TARGET_LIMIT} bytes"
