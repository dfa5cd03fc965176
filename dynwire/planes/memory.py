"""The memory plane: servers and callers in one process, for users' own tests, with the semantics of the network planes.

Requests and replies go through the codec, so what works here works on tcp. Server and caller may live on different event
loops and threads; every message between the two sides is a callback on the receiver's loop, in order.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import itertools
import os
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from .._buffers import Payload
from .._context import Context
from ..calls import deadline_of, effective_context, new_request_id
from ..codec import KIND_RAW, NAMES, pack, unpack
from ..config import Config
from ..errors import (
    Cancelled,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    DecodeError,
    DynwireError,
    EndpointNotFound,
    ManagerClosed,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PlaneMismatch,
    ProtocolError,
    RemoteError,
)
from ..handlers import RefusedByPool
from ..types import Handler, Instance, Timeouts
from .base import AsyncChannel, AsyncItemStream, AsyncRequestPlaneClient, AsyncRequestPlaneServer

STOP, KILL = 1, 2

WINDOW_ITEMS = 64
"""Items that may be on their way to a reader; bytes are bounded by ``tcp.stream_window`` as on the native wire."""

KILLED_HANDLER_S = 0.5
"""How long the server waits for a killed handler to clean up before it counts as gone."""

_servers: dict[str, AsyncMemoryServer] = {}
_servers_lock = threading.Lock()
_numbers = itertools.count(1)


def _forget_servers() -> None:
    # In the child of a fork: the servers and their loops are the parent's.
    global _servers_lock
    _servers_lock = threading.Lock()
    _servers.clear()


os.register_at_fork(after_in_child=_forget_servers)


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: Any) -> bool:
    """Run a callback on a loop, from any thread; False if the loop is closed."""
    try:
        if asyncio._get_running_loop() is loop:
            loop.call_soon(callback, *args)
        else:
            loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return False
    return True


def _too_large(data: Payload | bytes, config: Config, what: str, **fields: Any) -> MessageTooLarge | None:
    limit = config.tcp.max_message_size
    if len(data) <= limit:
        return None
    return MessageTooLarge(
        f"{what} has {len(data)} bytes, the limit is {limit} (DYN_TCP_MAX_MESSAGE_SIZE)",
        size=len(data),
        limit=limit,
        setting="DYN_TCP_MAX_MESSAGE_SIZE",
        **fields,
    )


class _Reported(Exception):
    """What went wrong with a reply on its way out. Apart from the errors of the handler, which may raise the same classes."""

    def __init__(self, error: DynwireError) -> None:
        super().__init__(str(error))
        self.error = error


# The caller's side -------------------------------------------------------------------------------------------------------------


class _Inbox:
    """Everything of one call that lives on the caller's loop. The stream object that the caller holds is apart from it, so
    that dropping that object is noticed although the server and timers still refer to this one."""

    def __init__(self, channel: MemoryChannel, context: Context, timeouts: Timeouts, deadline: float | None) -> None:
        client = channel.client
        self.client = client
        self.channel = channel
        self.address = channel.instance.address
        self.context = context
        self.timeouts = timeouts
        self.loop = client.loop
        self.job: _Job | None = None
        self.accepted = False
        self.delivered = 0
        self.sent_at = self.last_arrival = time.monotonic()
        self.outcome: DynwireError | StopAsyncIteration | None = None
        self._items: collections.deque[tuple[int, Any]] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._consumed_items = self._consumed_bytes = 0
        if deadline is not None:
            self._timer = self.loop.call_later(max(0.0, deadline - self.sent_at), self._total_expired)
        channel.active += 1
        client.inboxes.add(self)

    # From the server, on the caller's loop

    def on_accept(self) -> None:
        self.accepted = True
        self._wake()

    def on_item(self, kind: int, data: Any) -> None:
        if self.outcome is None:
            self.accepted = True
            self.last_arrival = time.monotonic()
            self._items.append((kind, data))
            self._wake()

    def on_end(self, outcome: DynwireError | StopAsyncIteration) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._release()

    # From the caller

    def fail(self, error: DynwireError, keep_items: bool = False) -> None:
        """End on our side, and kill the handler. Items that arrived before a deadline are still the caller's."""
        if self.outcome is None:
            self.outcome = error
            if not keep_items:
                self._items.clear()
            if self.job is not None:
                self.job.post_cancel(KILL)
            self._release()

    def cancel(self, kind: int) -> None:
        """The context was stopped or killed by the caller."""
        if kind == KILL:
            self.fail(Cancelled("the request was killed by its caller", **self._fields()))
        elif self.outcome is None and self.job is not None:
            self.job.post_cancel(STOP)

    def _fields(self) -> dict[str, Any]:
        return {
            "peer": self.address,
            "sent": "yes" if self.accepted else "maybe",
            "request_id": self.context.id,
        }

    def _total_expired(self) -> None:
        self._timer = None
        self._expire("total", self.timeouts.total)

    def _expire(self, phase: str, seconds: float | None) -> None:
        within = f" within {seconds:g} s" if seconds is not None else ""
        what = {
            "accept": "the worker did not accept the request",
            "first_item": "no item came",
            "between_items": "the next item did not come",
            "total": "the request did not end before its deadline" if seconds is None else "the request did not end",
        }[phase]
        self.fail(DeadlineExceeded(what + within, phase=phase, timeout=seconds, **self._fields()), keep_items=True)

    def _release(self) -> None:
        self.client.inboxes.discard(self)
        self.channel.active -= 1
        self.context._bind(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _next_limit(self, waiting_since: float) -> tuple[float, str, float] | None:
        """``(moment, phase, its length)`` of the phase that runs out first while the caller waits."""
        limits = []
        accept = self.timeouts.accept
        if not self.accepted and accept is not None:
            limits.append((self.sent_at + accept, "accept", accept))
        if self.delivered == 0:
            if self.timeouts.first_item is not None:
                limits.append((self.sent_at + self.timeouts.first_item, "first_item", self.timeouts.first_item))
        elif self.timeouts.between_items is not None:
            # A reader that comes back late does not find its stream expired: only waiting counts.
            since = max(self.last_arrival, waiting_since)
            limits.append((since + self.timeouts.between_items, "between_items", self.timeouts.between_items))
        return min(limits, default=None)

    @property
    def ready(self) -> bool:
        return bool(self._items) or self.outcome is not None

    async def next(self) -> tuple[int, Any]:
        if not self._items and self.outcome is None:
            await self._wait()
        if self._items:
            kind, data = self._items.popleft()
            self.delivered += 1
            self._refund(len(data))
            return kind, data
        outcome = self.outcome
        assert outcome is not None
        if isinstance(outcome, PeerLost):
            outcome.delivered = self.delivered
        raise outcome

    async def _wait(self) -> None:
        waiting_since = time.monotonic()
        while not self._items and self.outcome is None:
            if self._waiter is not None:
                raise RuntimeError("another task waits for the next item of this stream already")
            self._waiter = self.loop.create_future()
            limit = self._next_limit(waiting_since)
            timer = None
            if limit is not None:
                moment, phase, seconds = limit
                timer = self.loop.call_later(max(0.0, moment - time.monotonic()), self._expire, phase, seconds)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()

    def _refund(self, size: int) -> None:
        # In halves of the window: one message for many items, and the writer never waits for a reader that has read all.
        self._consumed_items += 1
        self._consumed_bytes += size
        window = self.client.config.tcp.stream_window
        if self.job is not None and (self._consumed_items * 2 >= WINDOW_ITEMS or self._consumed_bytes * 2 >= window):
            self.job.post_credit(self._consumed_items, self._consumed_bytes)
            self._consumed_items = self._consumed_bytes = 0


class MemoryItemStream(AsyncItemStream):
    """Items of one reply on the memory plane."""

    def __init__(self, inbox: _Inbox, reply_type: Any) -> None:
        self._inbox = inbox
        self._reply_type = reply_type
        self.context = inbox.context

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        kind, data = await self._inbox.next()
        return unpack(kind, data, self._reply_type)

    @property
    def ready(self) -> bool:
        return self._inbox.ready

    def close(self) -> None:
        inbox = self._inbox
        if inbox.outcome is None:
            inbox.fail(Cancelled("the stream was closed by its reader", **inbox._fields()))

    def __del__(self) -> None:
        # A dropped stream kills its handler like a closed one. The collector may run in any thread.
        if self._inbox.outcome is None:
            _post(self._inbox.loop, self.close_inbox, self._inbox)

    @staticmethod
    def close_inbox(inbox: _Inbox) -> None:
        """Close without the stream object, which is gone."""
        inbox.fail(Cancelled("the stream was dropped by its reader", **inbox._fields()))


class MemoryChannel(AsyncChannel):
    """Calls to one instance on the memory plane."""

    def __init__(self, client: AsyncMemoryClient, instance: Instance) -> None:
        self.instance = instance
        self.client = client
        self.active = 0

    @property
    def ready(self) -> bool:
        return self.instance.address in _servers and not self.client.closed

    @property
    def in_flight(self) -> int:
        return self.active

    async def connect(self, timeout: float | None = None) -> None:
        self._server()

    def _server(self) -> AsyncMemoryServer:
        if self.client.closed:
            raise ManagerClosed("the client of the memory plane is closed")
        server = _servers.get(self.instance.address)
        if server is None:
            raise ConnectError(
                f"there is no server {self.instance.address!r} in this process: it was closed, or belongs to another process, "
                "which the memory plane cannot reach",
                peer=self.instance.address,
            )
        return server

    def call(
        self, payload: Any, timeouts: Timeouts | float | None = None, reply_type: Any = None, context: Context | None = None
    ) -> Coroutine[Any, Any, Any]:
        return _only_item(self._send(payload, timeouts, context), reply_type)

    def stream(
        self, payload: Any, timeouts: Timeouts | float | None = None, reply_type: Any = None, context: Context | None = None
    ) -> MemoryItemStream:
        return MemoryItemStream(self._send(payload, timeouts, context), reply_type)

    def _send(self, payload: Any, timeouts: Timeouts | float | None, context: Context | None) -> _Inbox:
        server = self._server()
        config = self.client.config
        kind, data = pack(payload, config.codec)
        too_large = _too_large(data, config, "the request", peer=self.instance.address)
        if too_large is not None:
            raise too_large
        context = effective_context(context)
        now = time.monotonic()
        deadline = deadline_of(timeouts, now, context.deadline)
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded("the deadline passed before the request was sent", peer=self.instance.address)
        if not isinstance(timeouts, Timeouts):
            timeouts = Timeouts(total=timeouts)
        if timeouts.accept is None:
            timeouts = Timeouts(
                timeouts.total, timeouts.connect, config.tcp.request_timeout, timeouts.first_item, timeouts.between_items
            )
        inbox = _Inbox(self, context, timeouts, deadline)
        job = inbox.job = _Job(server, inbox, self.instance.path, kind, data, deadline)
        if not server.accept(job):
            inbox.job = None
            inbox.fail(ConnectError("the server's event loop is closed", peer=self.instance.address))
            raise ConnectError("the server's event loop is closed", peer=self.instance.address)
        context._bind(inbox.cancel)
        return inbox


async def _only_item(inbox: _Inbox, reply_type: Any) -> Any:
    try:
        kind, data = await inbox.next()
        # Whether it was the only one shows at the end. A handler that goes on after its reply has something more to say.
        await inbox.next()
    except StopAsyncIteration:
        if inbox.delivered == 0:
            raise _not_one("no item", inbox) from None
        return unpack(kind, data, reply_type)
    finally:
        inbox.fail(Cancelled("the call was given up", **inbox._fields()))
    raise _not_one("several items", inbox)


def _not_one(what: str, inbox: _Inbox) -> ProtocolError:
    return ProtocolError(
        f"the handler replied with {what} to a call that expects exactly one; use stream() for it",
        phase="reply",
        peer=inbox.address,
        sent="yes",
        request_id=inbox.context.id,
    )


class AsyncMemoryClient(AsyncRequestPlaneClient):
    """Client of the memory plane, used from one event loop."""

    plane = "memory"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.inboxes: set[_Inbox] = set()
        # Weak: a channel lives as long as a routing table refers to it, and instances come and go.
        self._channels: weakref.WeakValueDictionary[int, MemoryChannel] = weakref.WeakValueDictionary()

    def channel(self, instance: Instance) -> MemoryChannel:
        if instance.plane != self.plane:
            raise PlaneMismatch(
                f"{instance.path} is served on the {instance.plane} plane, this side uses the memory plane (DYN_REQUEST_PLANE)",
                ours=self.plane,
                theirs=instance.plane,
                peer=instance.address,
            )
        found = self._channels.get(instance.id)
        if found is None or found.instance != instance:
            found = MemoryChannel(self, instance)
            self._channels[instance.id] = found
        return found

    async def close(self) -> None:
        self.closed = True
        for inbox in tuple(self.inboxes):
            inbox.fail(ManagerClosed("the manager was closed during the call", **inbox._fields()))
        self._channels.clear()


# The server's side -------------------------------------------------------------------------------------------------------------


class _Endpoint:
    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.jobs: set[_Job] = set()
        self.open = True


class _Job:
    """One request on the server's loop."""

    def __init__(self, server: AsyncMemoryServer, inbox: _Inbox, path: str, kind: int, data: Any, deadline: float | None) -> None:
        self._server = server
        self._inbox = inbox
        self.path = path
        self._kind = kind
        self._data = data
        context = inbox.context
        self.id = context.id if context.id is not None else new_request_id()
        self.context = Context(id=self.id, headers=context.headers, deadline=deadline)
        self._deadline = deadline
        self._endpoint: _Endpoint | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._finished = False
        self._cancelled = 0
        self._out_items = self._out_bytes = 0
        self._room: asyncio.Future[None] | None = None

    # From the caller's loop

    def post_cancel(self, kind: int) -> None:
        _post(self._server.loop, self.cancel, kind, None)

    def post_credit(self, items: int, size: int) -> None:
        _post(self._server.loop, self._credit, items, size)

    # On the server's loop

    def _fields(self, sent: str) -> dict[str, Any]:
        return {"peer": self._server.address, "sent": sent, "request_id": self.id}

    def start(self) -> None:
        if self._cancelled:
            self.finish(Cancelled("the request was killed before it started", **self._fields("no")))
            return
        endpoint = self._server.endpoints.get(self.path)
        if endpoint is None or not endpoint.open:
            # Draining is no reason to fail: another instance takes it.
            error: DynwireError = EndpointNotFound(
                f"{self._server.address} does not serve {self.path}",
                endpoint=self.path,
                retryable=endpoint is not None or self.path in self._server.removed,
                **self._fields("no"),
            )
            self.finish(error)
            return
        handler = endpoint.handler
        if len(endpoint.jobs) >= handler.max_in_flight:
            self.finish(
                Overloaded(
                    f"{len(endpoint.jobs)} requests of {self.path} are running, max_in_flight is {handler.max_in_flight}",
                    depth=len(endpoint.jobs),
                    limit=handler.max_in_flight,
                    **self._fields("no"),
                )
            )
            return
        try:
            request = unpack(self._kind, self._data, handler.request_type)
        except DecodeError as error:
            self.finish(DecodeError(str(error), **self._fields("no")))
            return
        self._data = None
        self._endpoint = endpoint
        endpoint.jobs.add(self)
        if self._deadline is not None:
            self._timer = self._server.loop.call_later(max(0.0, self._deadline - time.monotonic()), self._expired)
        _post(self._inbox.loop, self._inbox.on_accept)
        # The server's context variables, not the caller's: on a network plane they would not come along either.
        variables = self._server.variables.copy()
        self._task = self._server.loop.create_task(self._run(handler, request), context=variables)

    def _expired(self) -> None:
        self.cancel(KILL, DeadlineExceeded("the handler did not end before the deadline", **self._fields("yes")))

    def cancel(self, kind: int, error: DynwireError | None) -> None:
        """Stop or kill the handler; ``error`` is what the caller gets then, `Cancelled` without one."""
        if self._finished:
            return
        self._cancelled = max(self._cancelled, kind)
        self.context._cancelled_by_peer(kind)
        if kind == KILL:
            self.finish(error or Cancelled("the request was killed", **self._fields("yes")))
            if self._task is not None:
                self._task.cancel()

    def _credit(self, items: int, size: int) -> None:
        self._out_items -= items
        self._out_bytes -= size
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _send(self, item: Any, handler: Handler) -> None:
        codec = handler.codec if self._kind == KIND_RAW else NAMES[self._kind]
        try:
            kind, data = pack(item, codec)
        except DecodeError as error:
            raise _Reported(DecodeError(str(error), phase="encode", **self._fields("yes"))) from error
        too_large = _too_large(data, self._server.config, "the reply", **self._fields("yes"))
        if too_large is not None:
            raise _Reported(too_large)
        window = self._server.config.tcp.stream_window
        while self._out_items and (self._out_items >= WINDOW_ITEMS or self._out_bytes + len(data) > window):
            self._room = self._server.loop.create_future()
            try:
                await self._room
            finally:
                self._room = None
        self._out_items += 1
        self._out_bytes += len(data)
        if not self._finished and not _post(self._inbox.loop, self._inbox.on_item, kind, data):
            self.cancel(KILL, None)  # the caller's event loop is gone

    async def _run(self, handler: Handler, request: Any) -> None:
        token = self.context._enter()
        try:
            args = (request, self.context) if handler.takes_context else (request,)
            del request
            reply = handler.function(*args)
            del args
            if handler.streaming:
                async with contextlib.aclosing(reply):
                    async for item in reply:
                        await self._send(item, handler)
            else:
                await self._send(await reply, handler)
            self.finish(StopAsyncIteration())
        except asyncio.CancelledError:
            if self._finished:
                return  # we cancelled it ourselves, and the task has nobody else to tell
            self.finish(
                PeerLost("the worker's event loop ended during the request", **self._fields("yes"))
                if not self._cancelled
                else Cancelled("the handler ended because the request was stopped", **self._fields("yes"))
            )
            raise
        except RefusedByPool as error:
            fields = self._fields("no")
            self.finish(Overloaded(str(error), depth=error.depth, limit=error.limit, retry_after=error.retry_after, **fields))
        except _Reported as error:
            self.finish(error.error)
        except Exception as error:  # noqa: BLE001  # user code: whatever it raises is reported to the caller
            self.finish(self._remote_error(error))
        finally:
            self.context._exit(token)
            if not self._finished:  # SystemExit and KeyboardInterrupt go on to the loop
                self.finish(PeerLost("the worker is ending", **self._fields("yes")))
            self._done()

    def _remote_error(self, error: Exception) -> RemoteError:
        details: dict[str, Any] = {}
        if self._server.config.remote_tracebacks:
            details["traceback"] = "".join(traceback.format_exception(error))
        name = type(error).__name__
        return RemoteError(
            f"the handler raised {name}: {error}",
            type_name=name,
            remote_message=str(error),
            details=details,
            **self._fields("yes"),
        )

    def finish(self, outcome: DynwireError | StopAsyncIteration) -> None:
        if not self._finished:
            self._finished = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            _post(self._inbox.loop, self._inbox.on_end, outcome)

    def _done(self) -> None:
        if self._endpoint is not None:
            self._endpoint.jobs.discard(self)
            self._server.wake_drain()


class AsyncMemoryServer(AsyncRequestPlaneServer):
    """Server of the memory plane; its event loop is the one that `start` ran on."""

    plane = "memory"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.endpoints: dict[str, _Endpoint] = {}
        self.removed: set[str] = set()
        self.loop: asyncio.AbstractEventLoop
        self.variables: contextvars.Context
        self._address = ""
        self._started = self._closed = False
        self._drained: list[asyncio.Future[None]] = []

    @property
    def address(self) -> str:
        return self._address

    async def start(self) -> None:
        if self._closed:
            raise ManagerClosed("the server is closed")
        if self._started:
            return
        self._started = True
        self.loop = asyncio.get_running_loop()
        self.variables = contextvars.Context()
        self._address = f"memory-{os.getpid()}-{next(_numbers)}"
        with _servers_lock:
            _servers[self._address] = self

    def accept(self, job: _Job) -> bool:
        """Take a request, from any thread; False if the loop is closed."""
        if _post(self.loop, job.start):
            return True
        with _servers_lock:
            _servers.pop(self._address, None)
        return False

    def add_endpoint(self, endpoint: str, handler: Handler) -> None:
        existing = self.endpoints.get(endpoint)
        if existing is not None and existing.open:
            raise ConfigError(f"{endpoint} is already served by this server", name="endpoint", value=endpoint)
        self.endpoints[endpoint] = _Endpoint(handler)
        self.removed.discard(endpoint)

    async def remove_endpoint(self, endpoint: str, grace: float = 0.0) -> int:
        found = self.endpoints.get(endpoint)
        if found is None:
            return 0
        found.open = False
        self.removed.add(endpoint)
        await self._wait_idle(found, grace)
        jobs = tuple(found.jobs)
        for job in jobs:
            job.cancel(KILL, PeerLost("the worker was shut down during the request", **job._fields("yes")))
        await self._wait_idle(found, KILLED_HANDLER_S)
        if self.endpoints.get(endpoint) is found:
            del self.endpoints[endpoint]
        return len(jobs)

    async def _wait_idle(self, endpoint: _Endpoint, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while endpoint.jobs and (left := deadline - time.monotonic()) > 0:
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._drained.append(waiter)
            timer = self.loop.call_later(left, self.wake_drain)
            try:
                await waiter
            finally:
                timer.cancel()

    def wake_drain(self) -> None:
        """A request ended; whoever waits for that looks again."""
        waiters, self._drained = self._drained, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def in_flight(self, endpoint: str | None = None) -> int:
        if endpoint is not None:
            found = self.endpoints.get(endpoint)
            return len(found.jobs) if found is not None else 0
        return sum(len(e.jobs) for e in tuple(self.endpoints.values()))

    async def close(self, grace: float = 0.0) -> None:
        if not self._started:
            self._closed = True
            return
        with _servers_lock:
            _servers.pop(self._address, None)
        self._closed = True
        if self.endpoints:
            await asyncio.gather(*(self.remove_endpoint(path, grace) for path in tuple(self.endpoints)))
