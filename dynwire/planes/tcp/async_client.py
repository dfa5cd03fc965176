"""Connections from one event loop to its peers on the tcp plane."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from ..._tcpio import AsyncClientConnection, AsyncSocketChannel, RequestOptions
from ...config import Config
from ...errors import ManagerClosed
from ...types import Instance
from ..base import AsyncChannel, AsyncRequestPlaneClient
from ..sockets.address import split_address
from ..sockets.pool import AsyncDialler, ConnectionPool, check_plane

AsyncChannel.register(AsyncSocketChannel)


def request_options(config: Config) -> RequestOptions:
    tcp = config.tcp
    return RequestOptions(
        accept_timeout=tcp.request_timeout,
        connect_timeout=tcp.connect_timeout,
        total_timeout=config.default_timeout,
        codec=config.codec,
        channel_buffer=tcp.channel_buffer,
        keepalive_interval=tcp.keepalive_interval,
        keepalive_timeout=tcp.keepalive_timeout,
        spin_us=tcp.spin_us,
    )


def wire_limits(config: Config) -> dict[str, int]:
    tcp = config.tcp
    return {
        "max_message": tcp.max_message_size,
        "max_streams": tcp.max_streams,
        "stream_window": tcp.stream_window,
        "connection_window": tcp.connection_window,
    }


class TcpDialler(AsyncDialler):
    """Opens connections of the native wire."""

    def __init__(self, config: Config, options: RequestOptions) -> None:
        self._config = config
        self._options = options

    def host_and_port(self, address: str) -> tuple[str, int]:
        return split_address(address)

    def connection(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, address: str) -> AsyncClientConnection:
        return AsyncClientConnection(loop, sock, address, self._options, **wire_limits(self._config))


class AsyncTcpClient(AsyncRequestPlaneClient):
    """Calls from one event loop over the tcp plane. Connections open lazily and are shared by all endpoints of an address."""

    plane = "tcp"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._options = request_options(config)
        self._dialler = TcpDialler(config, self._options)
        self._pools: dict[str, ConnectionPool] = {}
        self._closed = False

    def channel(self, instance: Instance) -> AsyncChannel:
        if self._closed:
            raise ManagerClosed("the client is closed")
        check_plane(instance, self.plane)
        pool = self._pools.get(instance.address)
        if pool is None:
            pool = self._pools[instance.address] = ConnectionPool(instance.address, self._dialler, self._config, self._loop)
        channel: AsyncChannel = AsyncSocketChannel(instance, pool, self._options, self._loop)  # type: ignore[assignment]
        return channel

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Per address, the counters of every open connection."""
        return {address: pool.stats() for address, pool in self._pools.items()}

    async def close(self) -> None:
        self._closed = True
        for pool in self._pools.values():
            await pool.close()
        self._pools.clear()
