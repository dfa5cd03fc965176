"""Clients of one endpoint: `AsyncClient` for any number of event loops, `Client` for threads.

What decides is in `dynwire.runtime` (`Route`, `attempts`) and `dynwire.calls`; here are the two shells that wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from asyncio import _get_running_loop
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ._awaitable import BlockingCaller
from ._context import Context
from .calls import INHERIT, Deadline, call_context, connect_timeout, deadline_of
from .errors import ConfigError, DynwireError, ManagerClosed
from .migration import Resume
from .portal import check_may_block, where
from .replies import AsyncReplyStream, ReplyStream, StreamRequest
from .routing import Entry
from .runtime import Route, Step, attempts
from .types import Instance, Timeouts

if TYPE_CHECKING:
    from .manager import AsyncNetworkManager, NetworkManager
    from .planes.base import AsyncItemStream, ItemStream

T = TypeVar("T")

monotonic = time.monotonic


def _check_migration(limit: int, resume: Resume | None) -> None:
    if limit < 0:
        raise ConfigError(f"migration_limit is {limit}; allowed is >= 0", name="migration_limit", value=limit, allowed=">= 0")
    if resume is not None and limit == 0:
        raise ConfigError("resume= has no effect with migration_limit=0", name="migration_limit", value=0, allowed=">= 1")


class _NoRoute:
    """Stands for the route of the home loop when there is none: it never has a turn."""

    turn = None
    loop = None


_NO_ROUTE: Any = _NoRoute()


class AsyncClient:
    """Calls one endpoint, from any number of event loops; each has its own connections. Made by `AsyncEndpoint.client`."""

    def __init__(
        self,
        manager: AsyncNetworkManager,
        path: str,
        router: str,
        codec: str,
        migration_limit: int,
        resume: Resume | None,
        accepts: Callable[[Instance], bool] | None = None,
    ) -> None:
        _check_migration(migration_limit, resume)
        self._accepts = accepts
        self.endpoint = path
        """``namespace.component.endpoint``"""
        self.router = router
        self.codec = codec
        self.migration_limit = migration_limit
        self.resume = resume
        self._manager = manager
        self._default_timeout = manager.config.default_timeout
        self._routes: dict[asyncio.AbstractEventLoop, Route] = {}
        # The route of the loop that the client was made on, which is usually the only one.
        self._home: Route = _NO_ROUTE
        self._closed = False

    # Calling

    @overload
    async def call(
        self,
        payload: Any,
        *,
        timeout: Timeouts | float | None = None,
        reply_type: None = None,
        headers: Mapping[str, str] | None = None,
        context: Context | None = None,
        instance: int | None = None,
        deadline: Deadline = INHERIT,
    ) -> Any: ...

    @overload
    async def call(
        self,
        payload: Any,
        *,
        timeout: Timeouts | float | None = None,
        reply_type: type[T],
        headers: Mapping[str, str] | None = None,
        context: Context | None = None,
        instance: int | None = None,
        deadline: Deadline = INHERIT,
    ) -> T: ...

    @overload
    async def call(
        self,
        payload: Any,
        *,
        timeout: Timeouts | float | None = None,
        reply_type: Any,
        headers: Mapping[str, str] | None = None,
        context: Context | None = None,
        instance: int | None = None,
        deadline: Deadline = INHERIT,
    ) -> Any: ...

    async def call(
        self,
        payload: Any,
        *,
        timeout: Timeouts | float | None = None,
        reply_type: Any = None,
        headers: Mapping[str, str] | None = None,
        context: Context | None = None,
        instance: int | None = None,
        deadline: Deadline = INHERIT,
    ) -> Any:
        """Send a request and return its only reply item.

        ``timeout`` is the total in seconds, or `Timeouts`; without it the setting ``default_timeout`` applies. Inside a
        handler the call also ends with the handler's own request; ``deadline=None`` detaches it, a number is another moment in
        ``time.monotonic()`` seconds. ``reply_type`` is a type for msgspec, or bytes for a raw reply as bytes. ``instance``
        names one instance by its id. Cancelling the awaiting task kills the handler.

        Raises any `DynwireError`. What certainly was not sent is tried on other instances first.
        """
        if timeout is None:
            timeout = self._default_timeout
        started = 0.0 if timeout is None else monotonic()
        first: tuple[Entry, DynwireError | None] | None = None
        route = self._home
        turn = route.turn
        if (
            turn is not None
            and headers is None
            and context is None
            and instance is None
            and deadline is INHERIT
            and where() == route.here
        ):
            # The hot path; everything that is not a ready channel and a reply is in _call.
            channel = None
            try:
                channel = turn()
                if channel.ready:
                    return await channel.call(payload, timeout, reply_type)
                first = route.after_turn(channel, None)
            except DynwireError as error:
                first = route.after_turn(channel, error)
        return await self._call(payload, timeout, reply_type, headers, context, instance, deadline, started, first)

    async def _call(
        self,
        payload: Any,
        timeout: Timeouts | float | None,
        reply_type: Any,
        headers: Mapping[str, str] | None,
        context: Context | None,
        instance: int | None,
        deadline: Deadline,
        started: float,
        first: tuple[Entry, DynwireError | None] | None,
    ) -> Any:
        context, limit = call_context(context, headers, deadline)
        moment = deadline_of(timeout, started, limit)

        async def send(channel: Any, timeouts: Timeouts | float | None) -> Any:
            return await channel.call(payload, timeouts, reply_type, context)

        route = await self._route()
        return await _conduct(route, timeout, moment, instance, send, first)

    def stream(
        self,
        payload: Any,
        *,
        timeout: Timeouts | float | None = None,
        reply_type: Any = None,
        headers: Mapping[str, str] | None = None,
        context: Context | None = None,
        instance: int | None = None,
        deadline: Deadline = INHERIT,
    ) -> AsyncReplyStream:
        """The reply's items, to be iterated with ``async for``, inside ``async with`` or without; keywords as for `call`.

        The request is sent when the stream is entered or iterated. Leaving it early kills the handler.
        """
        if timeout is None:
            timeout = self._default_timeout
        return AsyncReplyStream(self, StreamRequest(payload, timeout, reply_type, headers, context, instance, deadline))

    def _open_now(self, request: StreamRequest) -> tuple[Any, AsyncItemStream] | None:
        """Send a stream's request if that takes no waiting; None if it does."""
        route = self._home
        turn = route.turn
        if turn is None or where() != route.here or request.instance is not None or request.lost or request.first is not None:
            return None
        channel = None
        try:
            channel = turn()
            if channel.ready:
                timeouts, context = request.remaining(), request.channel_context()
                items: AsyncItemStream = channel.stream(request.payload, timeouts, request.reply_type, context)
                return channel, items
            request.first = route.after_turn(channel, None)
        except DynwireError as error:
            request.first = route.after_turn(channel, error)
        return None  # _open goes on from here, with everything that belongs to it

    async def _open(self, request: StreamRequest, *arguments: Any) -> tuple[Any, AsyncItemStream]:
        context = request.channel_context()

        async def send(channel: Any, timeouts: Timeouts | float | None) -> Any:
            return channel.stream(request.payload, timeouts, request.reply_type, context)

        route = await self._route()
        opened: list[Entry] = []
        first, request.first = request.first, None
        items = await _conduct(
            route, request.timeout, request.moment, request.instance, send, first, request, opened.append
        )  # fmt: skip
        return opened[-1].channel, items

    async def _reopen(
        self, request: StreamRequest, channel: Any, error: DynwireError, context: Context, *arguments: Any
    ) -> tuple[Any, AsyncItemStream]:
        """Open a stream once more whose request failed before its first item. Raises ``error`` if that is the caller's."""
        request.after(error, context, channel, self._routes.get(asyncio.get_running_loop()))
        return await self._open(request, *arguments)

    def _report(self, channel: Any, error: DynwireError) -> None:
        route = self._home
        entry = None if route is _NO_ROUTE else route.entry_of(channel)
        if entry is not None:
            route.failed(entry, error)

    # Instances

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The instances known on the running loop, set aside or not; empty before the first call on a further loop."""
        self._check_open()
        loop = _get_running_loop()
        route = self._home if self._home.loop is loop or loop is None else self._routes.get(loop)
        return () if route is None or route is _NO_ROUTE else route.instances

    async def wait_for_instances(self, count: int = 1, timeout: float | None = None) -> tuple[Instance, ...]:
        """Wait until at least ``count`` instances are known and return them; ``timeout`` in seconds, None waits for ever.

        Raises `NoInstances` when the time is up, `PlaneMismatch` if the endpoint is served on another plane.
        """
        route = await self._route()
        changed = asyncio.Event()
        unlisten = route.listen(changed.set)
        try:
            async with asyncio.timeout(timeout):
                while len(route.table) < count:
                    changed.clear()
                    await changed.wait()
                    self._check_open()
        except TimeoutError:
            raise route.missing(count, timeout) from None
        finally:
            unlisten()
        return route.instances

    # Life

    async def close(self) -> None:
        """Stop following the endpoint's instances. Calls in flight go on; later ones raise `ManagerClosed`. Any loop."""
        self._closed = True
        self._manager._forget(self)
        self._detach()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _check_open(self) -> None:
        self._manager._check()
        if self._closed:
            raise ManagerClosed(f"the client of {self.endpoint} is closed")

    def _detach(self) -> None:
        """Let go of all routes, so that the next call finds out why."""
        self._home = _NO_ROUTE
        routes = tuple(self._routes.items())
        self._routes.clear()
        for loop, route in routes:
            watch = route.watch
            for listener in tuple(route._listeners):  # whoever waits for instances looks again, and finds us closed
                _in_loop(loop, listener)
            if watch is not None:
                _in_loop(loop, watch.cancel)

    def _forget_after_fork(self) -> None:
        self._home = _NO_ROUTE
        self._routes = {}

    async def _route(self) -> Route:
        """The route of the running loop, made at first use."""
        loop = asyncio.get_running_loop()
        found = self._routes.get(loop)
        if found is not None and not self._closed:
            return found
        self._check_open()
        runtime = await self._manager._runtime()
        make_channel, queue = runtime.client(self.codec).channel, runtime.plane.queue(runtime.config, self.endpoint)
        route = Route(self.endpoint, self.router, runtime.plane.name, make_channel, self._accepts, queue)
        route.loop = loop
        route.here = where()
        watch = await runtime.watch(self.endpoint, route.update)
        found = self._routes.get(loop)
        if found is not None:  # another task was faster
            watch.cancel()
            return found
        if self._closed:
            watch.cancel()
            self._check_open()
        route.watch = watch
        for other in tuple(self._routes):
            if other.is_closed():
                del self._routes[other]
        self._routes[loop] = route
        if self._home.loop not in self._routes:
            self._home = route
        return route


def _in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    if loop is _get_running_loop():
        callback()
        return
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        if not loop.is_closed():
            raise


def _course(
    route: Route,
    timeout: Timeouts | float | None,
    deadline: float | None,
    instance: int | None,
    first: tuple[Entry, DynwireError | None] | None,
    stream: StreamRequest | None,
) -> Generator[Step, Any, Any]:
    if stream is None:
        return attempts(route, timeout, deadline, instance, monotonic, first)
    return attempts(route, timeout, deadline, instance, monotonic, first, frozenset(stream.lost), stream.course)


async def _conduct(
    route: Route,
    timeout: Timeouts | float | None,
    deadline: float | None,
    instance: int | None,
    send: Callable[[Any, Timeouts | float | None], Coroutine[Any, Any, Any]],
    first: tuple[Entry, DynwireError | None] | None,
    stream: StreamRequest | None = None,
    opened: Callable[[Entry], object] | None = None,
) -> Any:
    course = _course(route, timeout, deadline, instance, first, stream)
    try:
        step = next(course)
        while True:
            if isinstance(step, float):
                await asyncio.sleep(step)
                step = course.send(None)
                continue
            entry, timeouts = step
            try:
                channel = entry.channel
                if not channel.ready:
                    await channel.connect(connect_timeout(timeouts, deadline, monotonic()))
                result = await send(channel, timeouts)
            except DynwireError as error:
                step = course.throw(error)
            else:
                if opened is not None:
                    opened(entry)
                step = course.send(result)
    except StopIteration as finished:
        return finished.value


class Client(BlockingCaller):
    """Blocking twin of `AsyncClient`: calls one endpoint, from any number of threads. Made by `Endpoint.client`."""

    def __init__(
        self, manager: NetworkManager, path: str, router: str, codec: str, migration_limit: int, resume: Resume | None
    ) -> None:
        _check_migration(migration_limit, resume)
        self.endpoint = path
        """``namespace.component.endpoint``"""
        self.router = router
        self.codec = codec
        self.migration_limit = migration_limit
        self.resume = resume
        self._manager = manager
        self._default_timeout = manager.config.default_timeout
        self._lock = threading.Lock()
        self._home: Route | None = None
        self._closed = False

    if TYPE_CHECKING:

        @overload
        def call(
            self,
            payload: Any,
            *,
            timeout: Timeouts | float | None = None,
            reply_type: None = None,
            headers: Mapping[str, str] | None = None,
            context: Context | None = None,
            instance: int | None = None,
            deadline: Deadline = INHERIT,
        ) -> Any: ...

        @overload
        def call(
            self,
            payload: Any,
            *,
            timeout: Timeouts | float | None = None,
            reply_type: type[T],
            headers: Mapping[str, str] | None = None,
            context: Context | None = None,
            instance: int | None = None,
            deadline: Deadline = INHERIT,
        ) -> T: ...

        @overload
        def call(
            self,
            payload: Any,
            *,
            timeout: Timeouts | float | None = None,
            reply_type: Any,
            headers: Mapping[str, str] | None = None,
            context: Context | None = None,
            instance: int | None = None,
            deadline: Deadline = INHERIT,
        ) -> Any: ...

        def call(self, payload: Any, **keywords: Any) -> Any: ...

    def _call(
        self,
        payload: Any,
        timeout: Timeouts | float | None,
        reply_type: Any,
        headers: Mapping[str, str] | None,
        context: Context | None,
        instance: int | None,
        deadline: Deadline,
        started: float,
        first: tuple[Entry, DynwireError | None] | None,
    ) -> Any:
        """What `call` leaves; the arguments as resolved there, ``first`` is the attempt that it made."""
        check_may_block()
        context, limit = call_context(context, headers, deadline)
        moment = deadline_of(timeout, started, limit)

        def send(channel: Any, timeouts: Timeouts | float | None) -> Any:
            return channel.call(payload, timeouts, reply_type, context)

        return _conduct_blocking(self._route(), timeout, moment, instance, send, first)

    def stream(
        self,
        payload: Any,
        *,
        timeout: Timeouts | float | None = None,
        reply_type: Any = None,
        headers: Mapping[str, str] | None = None,
        context: Context | None = None,
        instance: int | None = None,
        deadline: Deadline = INHERIT,
    ) -> ReplyStream:
        """The reply's items, to be iterated with ``for``, inside ``with`` or without; keywords as for `AsyncClient.call`.

        The request is sent when the stream is entered or iterated. Leaving it early kills the handler. One thread at a time
        may iterate, any thread may close.
        """
        if timeout is None:
            timeout = self._default_timeout
        return ReplyStream(self, StreamRequest(payload, timeout, reply_type, headers, context, instance, deadline))

    def _open(self, request: StreamRequest, *arguments: Any) -> tuple[Any, ItemStream]:
        check_may_block()
        context = request.channel_context()

        def send(channel: Any, timeouts: Timeouts | float | None) -> Any:
            return channel.stream(request.payload, timeouts, request.reply_type, context)

        opened: list[Entry] = []
        items = _conduct_blocking(
            self._route(), request.timeout, request.moment, request.instance, send, None, request, opened.append
        )  # fmt: skip
        return opened[-1].channel, items

    def _reopen(
        self, request: StreamRequest, channel: Any, error: DynwireError, context: Context, *arguments: Any
    ) -> tuple[Any, ItemStream]:
        request.after(error, context, channel, self._home)
        return self._open(request, *arguments)

    def _report(self, channel: Any, error: DynwireError) -> None:
        route = self._home
        entry = None if route is None else route.entry_of(channel)
        if route is not None and entry is not None:
            route.failed(entry, error)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The instances that are known, set aside or not."""
        return self._route().instances

    def wait_for_instances(self, count: int = 1, timeout: float | None = None) -> tuple[Instance, ...]:
        """Wait until at least ``count`` instances are known and return them; ``timeout`` in seconds, None waits for ever.

        Raises `NoInstances` when the time is up, `PlaneMismatch` if the endpoint is served on another plane.
        """
        check_may_block()
        route = self._route()
        deadline = None if timeout is None else monotonic() + timeout
        changed = threading.Event()
        unlisten = route.listen(changed.set)
        try:
            while len(route.table) < count:
                changed.clear()
                if len(route.table) >= count:
                    break
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise route.missing(count, timeout)
                changed.wait(left)
                self._check_open()
        finally:
            unlisten()
        return route.instances

    def close(self) -> None:
        """Stop following the endpoint's instances. Calls in flight go on; later ones raise `ManagerClosed`."""
        self._closed = True
        self._manager._forget(self)
        self._detach()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        self._manager._check()
        if self._closed:
            raise ManagerClosed(f"the client of {self.endpoint} is closed")

    def _detach(self) -> None:
        with self._lock:
            route, self._home = self._home, None
        if route is None:
            return
        for listener in tuple(route._listeners):
            listener()
        if route.watch is not None:
            with contextlib.suppress(ManagerClosed):  # then the portal's end has ended the watch
                self._manager._portal.call_soon(route.watch.cancel)

    def _forget_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._home = None

    def _route(self) -> Route:
        """The route, made at first use and again in the child of a fork."""
        route = self._home
        if route is not None:
            return route
        self._check_open()
        with self._lock:
            if self._home is None:
                channels = self._manager._plane_client(self.codec)
                queue = self._manager._plane.queue(self._manager.config, self.endpoint)
                route = Route(self.endpoint, self.router, self._manager.plane, channels.channel, queue=queue)
                route.watch = self._manager._watch(self.endpoint, route.update)
                self._home = route
            return self._home


def _conduct_blocking(
    route: Route,
    timeout: Timeouts | float | None,
    deadline: float | None,
    instance: int | None,
    send: Callable[[Any, Timeouts | float | None], Any],
    first: tuple[Entry, DynwireError | None] | None,
    stream: StreamRequest | None = None,
    opened: Callable[[Entry], object] | None = None,
) -> Any:
    course = _course(route, timeout, deadline, instance, first, stream)
    try:
        step = next(course)
        while True:
            if isinstance(step, float):
                time.sleep(step)
                step = course.send(None)
                continue
            entry, timeouts = step
            try:
                result = send(entry.channel, timeouts)
            except DynwireError as error:
                step = course.throw(error)
            else:
                if opened is not None:
                    opened(entry)
                step = course.send(result)
    except StopIteration as finished:
        return finished.value
