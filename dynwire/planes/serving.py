"""Endpoints of a server, for planes whose handlers are compiled tasks (`dynwire._awaitable.EndpointEntry`)."""

from __future__ import annotations

import asyncio

from .._awaitable import EndpointEntry
from ..errors import ConfigError, ManagerClosed
from ..types import Handler
from .base import AsyncRequestPlaneServer

KILLED_GRACE_S = 0.5
"""How long closing waits for killed handlers to clean up."""


class EndpointServer(AsyncRequestPlaneServer):
    """Adding, draining and removing endpoints; how requests come in is the subclass's affair."""

    _loop: asyncio.AbstractEventLoop
    """set by ``start``"""

    def __init__(self) -> None:
        self.entries: dict[str, EndpointEntry] = {}
        self._closed = False
        self._idle: dict[EndpointEntry, asyncio.Future[None]] = {}

    def _kill(self, entry: EndpointEntry | None = None) -> int:
        """Cancel the handlers of one endpoint, or of all; returns how many."""
        raise NotImplementedError

    def add_endpoint(self, endpoint: str, handler: Handler) -> None:
        if self._closed:
            raise ManagerClosed("the server is closed")
        if endpoint in self.entries:
            raise ConfigError(f"{endpoint} is already served by this process", name="endpoint", value=endpoint)
        self.entries[endpoint] = EndpointEntry(endpoint, handler)

    async def remove_endpoint(self, endpoint: str, grace: float = 0.0) -> int:
        entry = self.entries.get(endpoint)
        if entry is None:
            return 0
        entry.draining = True
        await self._wait_idle([entry], grace)
        killed = self._kill(entry)
        if killed:
            await self._wait_idle([entry], KILLED_GRACE_S)
        entry.removed = True
        if self.entries.get(endpoint) is entry:
            del self.entries[endpoint]
        return killed

    def in_flight(self, endpoint: str | None = None) -> int:
        if endpoint is not None:
            entry = self.entries.get(endpoint)
            return 0 if entry is None else entry.in_flight
        return sum(entry.in_flight for entry in self.entries.values())

    async def _wait_idle(self, entries: list[EndpointEntry], limit: float) -> None:
        """Until no request of these endpoints is running, or ``limit`` seconds have passed."""
        deadline = self._loop.time() + limit
        for entry in entries:
            while entry.in_flight and (left := deadline - self._loop.time()) > 0:
                # Shared: a drain of the endpoint and the closing of the server may wait at the same time.
                idle = self._idle.get(entry)
                if idle is None or idle.done():
                    idle = self._idle[entry] = self._loop.create_future()
                    entry.on_idle = lambda idle=idle: idle.done() or idle.set_result(None)
                await asyncio.wait((idle,), timeout=left)
        for entry in entries:
            self._idle.pop(entry, None)
