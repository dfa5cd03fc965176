"""One HTTP exchange over ASGI: the body within its limit, the reply, and noticing that the client has left."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .problems import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = (b"content-type", b"application/json")
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]

WATCH_INTERVAL_S = 0.01
"""Clients are watched from the second tick on, so within 20 ms: an answer that takes less is not worth a task."""

_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")

CLIENT_LEFT = 499
"""nginx's status for it; only seen in metrics"""


class Exchange:
    """A request and its reply. Belongs to the task that the server runs for it."""

    __slots__ = (
        "_on_gone",
        "_task",
        "_watchers",
        "done",
        "gone",
        "headers",
        "receive",
        "request_id",
        "send",
        "started",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, watchers: Watchers) -> None:
        self.receive = receive
        self.send = send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = False
        """the status has left"""
        self.status = 0
        self.gone = False
        """the client has left"""
        self.done = False
        self._on_gone: Callable[[], object] | None = None
        self._task: asyncio.Task[None] | None = None
        self._watchers = watchers
        given = self.headers.get(b"x-request-id")
        self.request_id = given if given is not None and _SANE_ID.fullmatch(given) else os.urandom(16).hex().encode()

    async def body(self, limit: int) -> bytes:
        """The body. Raises `ApiError` 413 as soon as it is known to be larger than ``limit`` bytes, 499 if the client leaves."""
        given = self.headers.get(b"content-length")
        length = int(given) if given is not None and given.isdigit() else None
        if length is not None and length > limit:
            raise _too_large(limit)
        message = await self.receive()
        if message["type"] == "http.request":
            body: bytes = message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
            # granian says "more" before it knows that nothing follows; asking again costs a trip between two threads
            if len(body) == length or not message.get("more_body"):
                return body
            parts, size = [body], len(body)
            while True:
                message = await self.receive()
                if message["type"] != "http.request":
                    break
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                if part:
                    parts.append(part)
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
        self.gone = True
        raise ApiError(CLIENT_LEFT, "the client left while it sent its request")

    # The client's leaving

    def watch(self, on_gone: Callable[[], object]) -> None:
        """Call ``on_gone`` if the client leaves before `end`. After the body has been read."""
        self._on_gone = on_gone
        if self._task is None:
            self._watchers.add(self)

    def start_watching(self) -> None:
        """Called by `Watchers`."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                break
        if not self.done:
            self.gone = True
            if self._on_gone is not None:
                self._on_gone()

    def end(self) -> None:
        """The exchange is over."""
        self.done = True
        self._on_gone = None
        if self._task is not None:
            self._task.cancel()
            self._task = None

    # The reply

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head."""
        self.started = True
        self.status = status
        headers = [*headers, (b"x-request-id", self.request_id)]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def reply(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Send head and body."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.send({"type": "http.response.body", "body": body})

    async def problem(self, error: ApiError) -> None:
        """Send an error. If the head has left already this is not the way to say it."""
        headers = error.headers()
        if error.status == 413:
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await self.reply(error.status, error.body(), [JSON, *headers])


def _too_large(limit: int) -> ApiError:
    text = f"the request is larger than {limit} bytes (DYN_HTTP_BODY_LIMIT_MB, --body-limit-mb)"
    return ApiError(413, text, code="request_too_large")


class Watchers:
    """Starts to watch the clients of exchanges that take longer. One timer for all, and only while there are any."""

    def __init__(self) -> None:
        self._fresh: list[Exchange] = []
        self._aged: list[Exchange] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, exchange: Exchange) -> None:
        self._fresh.append(exchange)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WATCH_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        for exchange in self._aged:
            if not exchange.done:
                exchange.start_watching()
        self._aged, self._fresh = self._fresh, []
        self._timer = asyncio.get_running_loop().call_later(WATCH_INTERVAL_S, self._tick) if self._aged else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
