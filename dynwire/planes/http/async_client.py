"""Connections from one event loop to its peers on the http plane."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Any

from ..._httpio import AsyncClientConnection, AsyncSocketChannel, RequestOptions
from ...config import Config
from ...errors import ManagerClosed
from ...types import Instance
from ..base import AsyncChannel, AsyncRequestPlaneClient
from ..sockets.pool import AsyncDialler, ConnectionPool, check_plane
from .address import client_keywords, parse_address, request_options
from .tls import client_context

AsyncChannel.register(AsyncSocketChannel)


class HttpDialler(AsyncDialler):
    """Opens HTTP/2 connections: with prior knowledge, or over TLS with ALPN where the address says https."""

    def __init__(self, config: Config, options: RequestOptions) -> None:
        self._config = config
        self._options = options
        self.idle_timeout = config.http.pool_idle_timeout
        self.max_idle = config.http.pool_max_idle_per_host
        self._context = functools.cache(functools.partial(client_context, config))

    def host_and_port(self, address: str) -> tuple[str, int]:
        parsed = parse_address(address, self._config.http.root_path)
        return parsed.host, parsed.port

    def connection(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, address: str) -> AsyncClientConnection:
        parsed = parse_address(address, self._config.http.root_path)
        return AsyncClientConnection(
            loop,
            sock,
            address,
            self._options,
            **client_keywords(parsed, self._config, self._context),
        )


class AsyncHttpClient(AsyncRequestPlaneClient):
    """Calls from one event loop over the http plane. Connections open lazily and are shared by all endpoints of an address."""

    plane = "http"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._options = request_options(config)
        self._dialler = HttpDialler(config, self._options)
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
