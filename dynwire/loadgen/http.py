"""A raw HTTP/1.1 client for one kind of exchange: send a prepared request, watch the reply arrive.

It does what a load generator needs and nothing else, so that it takes as little of the machine as possible: the request is one
buffer, the reply goes from the socket through httptools into counters, and only the first and last events of a stream are
looked into. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

clock = time.perf_counter

MAX_ERROR_BYTES = 65536
"""of an error's body; more is not kept"""

MAX_BODY_BYTES = 64 << 20
"""of a reply that does not stream; more than any answer, and a bound for what a confused server can make us hold"""


class LoadError(Exception):
    """Why an exchange failed; ``kind`` is short, and what failures are counted by."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text or kind)
        self.kind = kind


@dataclass(slots=True)
class Exchange:
    """What was seen of one request. Times in seconds of `clock`."""

    intended: float
    """when it should have been sent: latencies count from here"""
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """seconds between reads that brought events after the first one"""
    sent: float = 0.0
    first: float = 0.0
    """when the first event with content came"""
    last: float = 0.0
    finished: float = 0.0
    status: int = 0
    events: int = 0
    """events with content"""
    together: int = 0
    """of those, the ones that came in the same read as the one before"""
    completion_tokens: int | None = None
    """what the server says"""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    body: bytes = b""
    """of a reply that is not a stream"""

    @property
    def tokens(self) -> int:
        """As the server counts them, otherwise one per event."""
        return self.events if self.completion_tokens is None else self.completion_tokens


class Target:
    """Where requests go: scheme, host, port, path and headers of an URL."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """Raises `ValueError` if it is no http or https URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.root = parts.path.rstrip("/")
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = f"{shown}:{self.port}"
        self._common = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        if any(c in value for pair in (headers or {}).items() for value in pair for c in "\r\n"):
            raise ValueError("a header has a line break in it")

    def get(self, path: str) -> bytes:
        return f"GET {self.root}{path} HTTP/1.1\r\nhost: {self.authority}\r\n{self._common}\r\n".encode("latin-1")

    def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {self.root}{path} HTTP/1.1\r\nhost: {self.authority}\r\ncontent-type: application/json\r\n"
            f"{self._common}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body


class Connection(asyncio.Protocol):
    """One connection: one exchange at a time."""

    def __init__(self) -> None:
        self.usable = True
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._now = 0.0
        self._streaming = False
        self._framed = False
        self._answering = False
        self._done = False
        self._rest = b""
        self._separator = b"\n\n"

    async def run(self, request: bytes, exchange: Exchange) -> None:
        """Send a request and wait for the end of the reply. Raises `LoadError`."""
        assert self._exchange is None and self._transport is not None
        self._exchange = exchange
        self._answering = self._streaming = self._framed = self._done = False
        self._rest = b""
        self._waiter = asyncio.get_running_loop().create_future()
        exchange.sent = clock()
        try:
            if not self.usable:
                raise LoadError("closed while idle")
            self._transport.write(request)
            await self._waiter
        except BaseException:
            self.close()
            raise
        finally:
            self._exchange = self._waiter = None
        exchange.finished = self._now

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = clock()
        if self._exchange is None:
            self.close()  # nothing was asked
            return
        try:
            self._parser.feed_data(data)
        except LoadError as error:
            self._fail(error)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._fail(cause if isinstance(cause, LoadError) else LoadError("bad HTTP", str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._now = clock()
        if self._exchange is None:
            return
        if error is None and self._answering and not self._framed and not self._streaming:
            self.on_message_complete()  # the end of the connection is the end of the body
        elif not self._answering:
            self._fail(LoadError("connection reset" if error else "closed without a reply", str(error or "")))
        else:
            self._fail(LoadError("reply cut off", str(error or "")))

    def _fail(self, error: LoadError) -> None:
        self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    @property
    def fresh_reply(self) -> bool:
        """Whether nothing of the reply to the last request has come."""
        return not self._answering

    # httptools

    def on_message_begin(self) -> None:
        self._answering = True

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"content-type":
            self._streaming = value.startswith(b"text/event-stream")
        elif lower in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        assert self._exchange is not None
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        if not self._streaming:
            if len(exchange.body) + len(data) > (MAX_BODY_BYTES if exchange.status == 200 else MAX_ERROR_BYTES):
                raise LoadError("reply too large")
            exchange.body += data
            return
        separator = self._separator
        if (
            # the hot path: whole events in the middle of a stream; in a text quotes are escaped, so it cannot look like these
            exchange.events
            and not self._rest
            and data.endswith(separator)
            and b'"finish_reason":"' not in data
            and b'"finish_reason": "' not in data
            and b'"prompt_tokens"' not in data
            and b'{"error"' not in data
            and b"[DONE]" not in data
        ):
            self._count(exchange, data.count(separator))
            return
        data = self._rest + data
        if not exchange.events and b"\r\n\r\n" in data:
            separator = self._separator = b"\r\n\r\n"
        *events, self._rest = data.split(separator)
        for event in events:
            self._event(exchange, event)

    def _count(self, exchange: Exchange, events: int) -> None:
        if not exchange.events:
            exchange.first = self._now  # events is 1: until there was one, they are looked into one by one
        elif exchange.last == self._now:
            exchange.together += events
        else:
            exchange.gaps.append(self._now - exchange.last)
            exchange.together += events - 1
        exchange.events += events
        exchange.last = self._now

    def _event(self, exchange: Exchange, event: bytes) -> None:
        lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
        data = b"\n".join(lines)
        if not lines:
            return  # a comment, which keeps the connection alive
        if data == b"[DONE]":
            self._done = True
            return
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise LoadError("bad event", str(error)) from error
        if "error" in chunk:
            raise _error_of(data, exchange.status)
        self._look(exchange, chunk)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or choice
            if delta.get("content") or delta.get("text") or delta.get("reasoning_content"):
                self._count(exchange, 1)
                break

    def _look(self, exchange: Exchange, reply: dict[str, Any]) -> None:
        for choice in reply.get("choices") or ():
            exchange.finish_reason = choice.get("finish_reason") or exchange.finish_reason
        usage = reply.get("usage")
        if usage:
            exchange.completion_tokens = usage.get("completion_tokens")
            exchange.prompt_tokens = usage.get("prompt_tokens")
            exchange.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if not self._framed or not self._parser.should_keep_alive():
            self.close()
        try:
            self._check(exchange)
        except LoadError as error:
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_exception(error)
            return
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self, exchange: Exchange) -> None:
        """The reply is here: look at what came. Raises `LoadError`."""
        if exchange.status != 200:
            raise _error_of(exchange.body, exchange.status)
        if self._streaming:
            if not self._done:
                raise LoadError("stream without an end", "the reply ended before data: [DONE]")
            return
        exchange.first = exchange.last = self._now
        try:
            reply = msgspec.json.decode(exchange.body)
        except msgspec.DecodeError as error:
            raise LoadError("bad reply", str(error)) from error
        if isinstance(reply, dict):
            self._look(exchange, reply)


def _error_of(data: bytes, status: int) -> LoadError:
    """From an error of the server: OpenAI's envelope if it is one."""
    start = data.find(b"{")
    try:
        envelope: Any = msgspec.json.Decoder(_Envelope).decode(data[start:].split(b"\n")[0]) if start >= 0 else None
    except msgspec.DecodeError:
        envelope = None
    where = "in stream" if status == 200 else f"HTTP {status}"
    if envelope is None:
        return LoadError(where, data[:200].decode("utf-8", "replace"))
    detail = envelope.error if isinstance(envelope.error, dict) else {"message": str(envelope.error)}
    kind = detail.get("code") or detail.get("type")
    return LoadError(f"{where} {kind}" if kind and str(kind) != str(status) else where, str(detail.get("message", "")))


class _Envelope(msgspec.Struct):
    error: Any


class Pool:
    """Connections to one target, used last in, first out, and opened when none is free."""

    def __init__(self, target: Target, connect_timeout: float = 10.0) -> None:
        self.target = target
        self.opened = 0
        """connections, over all time"""
        self._connect_timeout = connect_timeout
        self._free: list[Connection] = []

    async def _connect(self) -> Connection:
        target = self.target
        loop = asyncio.get_running_loop()
        self.opened += 1
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(Connection, target.host, target.port, ssl=target.tls)
        except ConnectionRefusedError as error:
            raise LoadError("connection refused", str(error)) from error
        except TimeoutError as error:
            raise LoadError("connect timeout", f"no connection within {self._connect_timeout:g} s") from error
        except OSError as error:
            raise LoadError("cannot connect", str(error)) from error
        return connection

    async def run(self, request: bytes, exchange: Exchange) -> None:
        """One exchange on any connection. Raises `LoadError`.

        A kept connection that the server closed before a byte of the reply came is replaced once: it was closed for having
        been idle, and every HTTP client does the same.
        """
        while self._free:
            connection = self._free.pop()
            if not connection.usable:
                continue
            try:
                await connection.run(request, exchange)
            except LoadError:
                if not connection.fresh_reply:
                    raise
                break
            self._keep(connection)
            return
        connection = await self._connect()
        await connection.run(request, exchange)
        self._keep(connection)

    def _keep(self, connection: Connection) -> None:
        if connection.usable:
            self._free.append(connection)

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()
