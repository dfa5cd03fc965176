"""Calls from one event loop over the planes over sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ...config import Config
from ...errors import ManagerClosed
from ...types import Instance
from ..base import AsyncChannel, AsyncRequestPlaneClient
from .pool import AsyncDialler, ConnectionPool, check_plane


class AsyncSocketClient(AsyncRequestPlaneClient):
    """Connections open lazily and are shared by all endpoints of an address.

    ``channel_class`` is the compiled channel of the plane, which calls over the connections that ``dialler`` opens; ``options``
    are its compiled settings.
    """

    def __init__(self, config: Config, options: Any, dialler: AsyncDialler, channel_class: Callable[..., Any]) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._options = options
        self._dialler = dialler
        self._channel_class = channel_class
        self._pools: dict[str, ConnectionPool] = {}
        self._closed = False

    def channel(self, instance: Instance) -> AsyncChannel:
        if self._closed:
            raise ManagerClosed("the client is closed")
        check_plane(instance, self.plane)
        pool = self._pools.get(instance.address)
        if pool is None:
            pool = self._pools[instance.address] = ConnectionPool(instance.address, self._dialler, self._config, self._loop)
        channel: AsyncChannel = self._channel_class(instance, pool, self._options, self._loop)
        return channel

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Per address, the counters of every open connection."""
        return {address: pool.stats() for address, pool in self._pools.items()}

    async def close(self) -> None:
        self._closed = True
        for pool in self._pools.values():
            await pool.close()
        self._pools.clear()
