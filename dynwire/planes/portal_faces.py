"""Blocking faces for planes whose own code is asyncio only: every call goes through the portal's event loop.

The way there and back is `dynwire._portal`. A plane's calls and streams are fast here if they are those of `dynwire._awaitable`;
any other awaitable costs a task, any other stream a hop to the loop for each item.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from .. import _awaitable
from .._context import Context, current_context
from .._portal import OPEN_STREAM, ThreadItems
from ..calls import effective_context, new_request_id
from ..errors import PlaneMismatch
from ..portal import Portal
from ..types import Handler, Instance, Timeouts
from .base import (
    AsyncChannel,
    AsyncItemStream,
    AsyncRequestPlaneClient,
    AsyncRequestPlaneServer,
    Channel,
    ItemStream,
    RequestPlaneClient,
    RequestPlaneServer,
)


class _Bridge:
    """Two contexts of one call: the caller's thread holds ``outer``, the loop works with ``inner``.

    A context may be stopped only where the call was made, which is the loop; this carries it there.
    """

    def __init__(self, portal: Portal, context: Context | None) -> None:
        self.outer = effective_context(context)
        self.inner = Context(id=self.outer.id or new_request_id(), headers=self.outer.headers, deadline=self.outer.deadline)
        self._portal = portal
        self.outer._bind(self._carry)

    def _carry(self, kind: int) -> None:
        if self._portal.running:
            self._portal.call_soon(self.inner.kill if kind == 2 else self.inner.stop)

    def end(self) -> None:
        self.outer._bind(None)


ItemStream.register(ThreadItems)


class PortalItemStream(ItemStream):
    """Blocking face of an `AsyncItemStream` of any kind."""

    def __init__(self, portal: Portal, items: AsyncItemStream, bridge: _Bridge) -> None:
        self._portal = portal
        self._items = items
        self._bridge = bridge
        self.context = bridge.outer
        self._closed = False

    def __iter__(self) -> PortalItemStream:
        return self

    def __next__(self) -> Any:
        found, item = self._portal.run(self._next)
        if not found:
            self._closed = True
            self._bridge.end()
            raise StopIteration
        return item

    async def _next(self) -> tuple[bool, Any]:
        try:
            return True, await self._items.__anext__()
        except StopAsyncIteration:
            return False, None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._bridge.end()
            if self._portal.running:
                self._portal.call_soon(self._items.close)

    def __del__(self) -> None:
        self.close()


class PortalChannel(Channel):
    """Blocking face of an `AsyncChannel`; connects by itself."""

    def __init__(self, client: PortalClient, instance: Instance) -> None:
        self.instance = instance
        self._client = client
        self._portal = client.portal
        self._channel: AsyncChannel | None = None

    @property
    def in_flight(self) -> int:
        return 0 if self._channel is None else self._channel.in_flight

    def call(
        self, payload: Any, timeouts: Timeouts | float | None = None, reply_type: Any = None, context: Context | None = None
    ) -> Any:
        if context is None:
            if current_context() is not None:
                context = effective_context(None)  # the loop does not see what this thread's calls inherit
            return self._portal.hub.call(self, payload, timeouts, reply_type, context)
        bridge = _Bridge(self._portal, context)
        try:
            return self._portal.hub.call(self, payload, timeouts, reply_type, bridge.inner)
        finally:
            bridge.end()

    def stream(
        self, payload: Any, timeouts: Timeouts | float | None = None, reply_type: Any = None, context: Context | None = None
    ) -> ItemStream:
        bridge = _Bridge(self._portal, context)
        hub = self._portal.hub
        try:
            items = hub.open_stream(self, payload, timeouts, reply_type, bridge.inner)
        except BaseException:
            bridge.end()
            raise
        if type(items) is _awaitable.ItemStream:
            found: ItemStream = ThreadItems(hub, items, bridge)  # type: ignore[assignment]  # registered above
            return found
        return PortalItemStream(self._portal, items, bridge)

    # Called by the hub, on the loop

    def _connect_first(
        self, kind: int, payload: Any, timeouts: Timeouts | float | None, reply_type: Any, context: Context | None
    ) -> Coroutine[Any, Any, Any]:
        """Connect, then call or open a stream."""
        if self._channel is None:
            self._channel = self._client.async_client().channel(self.instance)
        return self._connect_and(kind, self._channel, payload, timeouts, reply_type, context)

    async def _connect_and(
        self,
        kind: int,
        channel: AsyncChannel,
        payload: Any,
        timeouts: Timeouts | float | None,
        reply_type: Any,
        context: Context | None,
    ) -> Any:
        if not channel.ready:
            await channel.connect(timeouts.connect if isinstance(timeouts, Timeouts) else timeouts)
        if kind == OPEN_STREAM:
            return channel.stream(payload, timeouts, reply_type, context)
        return await channel.call(payload, timeouts, reply_type, context)


class PortalClient(RequestPlaneClient):
    """Blocking face of an `AsyncRequestPlaneClient`, which ``make`` creates on the portal's loop at first use."""

    def __init__(self, plane: str, portal: Portal, make: Callable[[], AsyncRequestPlaneClient]) -> None:
        self.plane = plane
        self.portal = portal
        self._make = make
        self._client: AsyncRequestPlaneClient | None = None

    def channel(self, instance: Instance) -> PortalChannel:
        # Must not go to the loop: routing tables ask for channels on the loop's own thread.
        if instance.plane != self.plane:
            raise PlaneMismatch(
                f"{instance.path} is served on the {instance.plane} plane, this side uses the {self.plane} plane "
                "(DYN_REQUEST_PLANE)",
                ours=self.plane,
                theirs=instance.plane,
                peer=instance.address,
            )
        return PortalChannel(self, instance)

    def async_client(self) -> AsyncRequestPlaneClient:
        """The client behind this one. Only on the portal's loop, so that it is made once."""
        if self._client is None:
            self._client = self._make()
        return self._client

    def close(self) -> None:
        if self.portal.running:
            self.portal.run(self._close)

    async def _close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def stats(self) -> dict[str, Any]:
        return self.portal.run(self._stats)

    async def _stats(self) -> dict[str, Any]:
        return self.async_client().stats()


class PortalServer(RequestPlaneServer):
    """Blocking face of an `AsyncRequestPlaneServer` that lives on the portal's loop."""

    def __init__(self, portal: Portal, server: AsyncRequestPlaneServer) -> None:
        self.plane = server.plane
        self._portal = portal
        self._server = server

    @property
    def address(self) -> str:
        return self._server.address

    def start(self) -> None:
        self._portal.run(self._server.start)

    def add_endpoint(self, endpoint: str, handler: Handler) -> None:
        self._portal.run(self._add, endpoint, handler)

    async def _add(self, endpoint: str, handler: Handler) -> None:
        self._server.add_endpoint(endpoint, handler)

    def remove_endpoint(self, endpoint: str, grace: float = 0.0) -> int:
        return self._portal.run(self._server.remove_endpoint, endpoint, grace)

    def in_flight(self, endpoint: str | None = None) -> int:
        return self._server.in_flight(endpoint)

    def close(self, grace: float = 0.0) -> None:
        self._portal.run(self._server.close, grace)

    def stats(self) -> list[dict[str, Any]]:
        return self._portal.run(self._stats)

    async def _stats(self) -> list[dict[str, Any]]:
        return self._server.stats()
