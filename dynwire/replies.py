"""Streamed replies as callers hold them: opened on first use, closed at the end of ``with``, migrated if that was asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._context import Context
from .calls import Attempts, Deadline, call_context, deadline_of, effective_context, remaining_timeout
from .errors import DynwireError, ManagerClosed
from .migration import Migration
from .types import Timeouts

if TYPE_CHECKING:
    from .client import AsyncClient, Client
    from .planes.base import AsyncItemStream, ItemStream
    from .routing import Entry
    from .runtime import Route


class StreamRequest:
    """What `stream` was called with. The clock starts and the context is looked at when the stream is made, not when it opens."""

    __slots__ = ("_context", "course", "first", "instance", "lost", "moment", "payload", "reply_type", "timeout")

    def __init__(
        self,
        payload: Any,
        timeout: Timeouts | float | None,
        reply_type: Any,
        headers: Mapping[str, str] | None,
        context: Context | None,
        instance: int | None,
        deadline: Deadline,
    ) -> None:
        self.payload = payload
        self.timeout = timeout
        self.reply_type = reply_type
        self.instance = instance
        self._context, limit = call_context(context, headers, deadline)
        self.moment = deadline_of(timeout, time.monotonic(), limit)
        self.lost: set[int] = set()
        """instances that lost this stream before"""
        self.first: tuple[Entry, DynwireError | None] | None = None
        """an instance that was chosen and not tried, or tried in vain"""
        self.course: Attempts | None = None
        """the attempts so far, of a stream that was opened more than once"""

    def remaining(self) -> Timeouts | float | None:
        """The timeouts from now on. Raises `DeadlineExceeded`."""
        return remaining_timeout(self.timeout, self.moment, time.monotonic())

    def channel_context(self) -> Context | None:
        """The context for the channel; None lets it make one."""
        return self._context

    def context(self) -> Context:
        """The context of a stream that is not open yet; from now on the one it will have."""
        if self._context is None:
            self._context = effective_context(None)
        return self._context

    def after(self, error: DynwireError, context: Context, channel: Any, route: Route | None) -> None:
        """The request failed at ``channel`` before its first item: raises ``error`` if it is not to be tried once more.

        The rules are those of calls. The next attempt has the same ``context``, which the caller may hold.
        """
        if error.sent != "no" or not error.retryable or route is None:
            raise error
        entry = route.entry_of(channel)
        if entry is not None:
            route.failed(entry, error)
        if self.course is None:
            self.course = Attempts(self.moment)
        if context.is_stopped() or not self.course.again(error, channel.instance.id, len(route.table), time.monotonic()):
            raise error
        self._context = context


class _Opened:
    """Where a stream's request went, and how it goes elsewhere when it was not taken there.

    Its items refer to this. It refers to neither them nor the reply: whoever drops those ends the request.
    """

    __slots__ = ("_arguments", "_client", "_failure", "_request", "channel")

    def __init__(self, client: Any, request: StreamRequest, arguments: tuple[Any, ...], channel: Any) -> None:
        self._client = client
        self._request = request
        self._arguments = arguments
        self._failure: DynwireError | None = None
        self.channel = channel

    async def first(self, items: Any) -> Any:
        """The first item of ``items``, for `dynwire._awaitable.ItemStream.again`."""
        while True:
            if self._failure is None:
                try:
                    return await items.reader
                except DynwireError as error:
                    self._failure = error
            # A task that is cancelled meanwhile may come again.
            try:
                reopened = await self._client._reopen(
                    self._request, self.channel, self._failure, items.context, *self._arguments
                )  # fmt: skip
            except DynwireError:
                items.again = self._failure = None
                raise
            self.channel, others = reopened
            self._failure = None
            items.take_over(others)

    def again(self, error: DynwireError, context: Context) -> Any:
        """Items to go on with after ``error``, for the ``again`` of blocking streams."""
        self.channel, items = self._client._reopen(self._request, self.channel, error, context, *self._arguments)
        return items


class _AsyncItems:
    """Gives an `AsyncItemStream` of any kind what `dynwire._awaitable.ItemStream` has: it can take over another attempt's."""

    def __init__(self, items: AsyncItemStream) -> None:
        self._items = items
        self._closed = False
        self.again: Callable[[Any], Awaitable[Any]] | None = None

    @property
    def context(self) -> Context:
        return self._items.context

    @property
    def ready(self) -> bool:
        return self._items.ready

    @property
    def reader(self) -> Awaitable[Any]:
        return self._items.__anext__()

    def __aiter__(self) -> _AsyncItems:
        return self

    async def __anext__(self) -> Any:
        if self.again is None:
            return await self._items.__anext__()
        item = await self.again(self)
        self.again = None
        return item

    def take_over(self, items: AsyncItemStream) -> None:
        self._items = items
        if self._closed:
            items.close()

    def close(self) -> None:
        self._closed = True
        self._items.close()


class _Items:
    """Blocking twin of `_AsyncItems`."""

    def __init__(self, items: ItemStream) -> None:
        self._items = items
        self._begun = self._closed = False
        self.again: Callable[[DynwireError, Context], Any] | None = None

    @property
    def context(self) -> Context:
        return self._items.context

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                item = next(self._items)
            except DynwireError as error:
                if self._begun or self._closed or self.again is None:
                    raise
                self._items = self.again(error, self._items.context)
                if self._closed:  # by another thread, meanwhile
                    self._items.close()
                continue
            self._begun = True
            return item

    def close(self) -> None:
        self._closed = True
        self._items.close()


class _Reply:
    """What the two streams share: the request, and where it went."""

    def __init__(self, client: Any, request: StreamRequest) -> None:
        self._client = client
        self._request = request
        self._arguments: tuple[Any, ...] = ()  # of the client's _open, beyond the request
        self._opening: _Opened | None = None
        self._items: Any = None
        self._closed = False
        self._complete = False
        limit = client.migration_limit
        self._migration = Migration(request.payload, limit, client.resume) if limit else None

    @property
    def context(self) -> Context:
        """Identity and headers of the request; ``stop()`` and ``kill()`` reach the handler. On the iterating loop or thread."""
        items = self._items
        if items is None or self._migration is not None:
            # A stream that migrates keeps one context through all its workers.
            return self._request.context()
        found: Context = items.context
        return found

    @property
    def _channel(self) -> Any:
        return None if self._opening is None else self._opening.channel

    @property
    def instance_id(self) -> int | None:
        """Id of the instance that sends the items now; None before the stream is open."""
        return None if self._channel is None else self._channel.instance.id

    def close(self) -> None:
        """Give up: kills the handler if it still runs. Never waits; may be called twice."""
        self._closed = True
        if self._items is not None:
            self._items.close()

    def _opened(self, channel: Any, items: Any) -> _Opened:
        self._opening = _Opened(self._client, self._request, self._arguments, channel)
        self._items = items
        if self._closed:  # closed by somebody else while it was being opened
            items.close()
            raise self._closed_error()
        return self._opening

    def _before_open(self) -> None:
        if self._closed:
            raise self._closed_error()
        if self._migration is not None:
            self._request.payload = self._migration.payload
            self._request.lost = self._migration.lost
            self._request.context()

    def _closed_error(self) -> ManagerClosed:
        return ManagerClosed("the stream was closed before it was opened")

    def _broke(self, error: DynwireError) -> bool:
        """A stream that may migrate has failed: True if it continues, False if it is complete; raises if it cannot."""
        migration = self._migration
        assert migration is not None
        self._client._report(self._channel, error)
        if self._closed or self._request.context().is_stopped():
            raise error
        going_on = migration.after(error, self.instance_id)
        self._items = self._opening = None
        return going_on


class AsyncReplyStream(_Reply):
    """Items of one reply. ``async with`` closes it early or late, ``async for`` iterates; belongs to one event loop.

    Without migration, iterating runs on the plane's own iterator: no Python code of dynwire runs per item.
    """

    _client: AsyncClient
    _items: AsyncItemStream | None

    async def __aenter__(self) -> AsyncReplyStream:
        if self._items is None:
            await self._open()
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, DynwireError):
            self._client._report(self._channel, error)
        self.close()

    @property
    def ready(self) -> bool:
        """True if the next item (or the end) is here already: whoever has something to do with several at once may take it."""
        items = self._items
        return self._complete or (items is not None and items.ready)

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._migration is not None:
            return self
        items = self._items
        if items is None:
            self._before_open()
            opened = self._client._open_now(self._request)
            if opened is None:
                return self  # opened by the first __anext__, which may wait for a connection
            items = self._follow(opened)
        return items.__aiter__()

    async def __anext__(self) -> Any:
        if self._complete:
            raise StopAsyncIteration
        items = self._items
        if items is None:
            items = await self._open()
        if self._migration is None:
            return await items.__anext__()
        while True:
            try:
                item = await items.__anext__()
            except DynwireError as error:
                if not self._broke(error):
                    self._complete = True
                    raise StopAsyncIteration from None
                try:
                    items = await self._open()
                except DynwireError as reason:
                    raise error from reason  # the caller's stream was cut; why it could not go on is the cause
                continue
            self._migration.delivered.append(item)
            return item

    async def _open(self) -> AsyncItemStream:
        self._before_open()
        return self._follow(self._client._open_now(self._request) or await self._client._open(self._request, *self._arguments))

    def _follow(self, opened: tuple[Any, AsyncItemStream]) -> AsyncItemStream:
        channel, items = opened
        found: Any = items if hasattr(items, "again") else _AsyncItems(items)
        found.again = self._opened(channel, found).first
        return found  # type: ignore[no-any-return]


class ReplyStream(_Reply):
    """Blocking twin of `AsyncReplyStream`: ``with`` closes it, ``for`` iterates. One thread at a time, any thread may close."""

    _client: Client
    _items: ItemStream | None

    def __enter__(self) -> ReplyStream:
        if self._items is None:
            self._open()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, DynwireError):
            self._client._report(self._channel, error)
        self.close()

    def __iter__(self) -> Iterator[Any]:
        if self._migration is not None:
            return self
        items = self._items
        return (self._open() if items is None else items).__iter__()

    def __next__(self) -> Any:
        if self._complete:
            raise StopIteration
        items = self._items
        if items is None:
            items = self._open()
        if self._migration is None:
            return items.__next__()
        while True:
            try:
                item = items.__next__()
            except DynwireError as error:
                if not self._broke(error):
                    self._complete = True
                    raise StopIteration from None
                try:
                    items = self._open()
                except DynwireError as reason:
                    raise error from reason
                continue
            self._migration.delivered.append(item)
            return item

    def _open(self) -> ItemStream:
        self._before_open()
        channel, items = self._client._open(self._request, *self._arguments)
        found: Any = items if hasattr(items, "again") else _Items(items)
        found.again = self._opened(channel, found).again
        return found  # type: ignore[no-any-return]
