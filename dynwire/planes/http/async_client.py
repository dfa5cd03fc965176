"""Connections from one event loop to its peers on the http plane."""

from __future__ import annotations

import asyncio
import functools
import socket

from ..._httpio import AsyncClientConnection, AsyncSocketChannel, RequestOptions
from ...config import Config
from ..base import AsyncChannel
from ..sockets.async_client import AsyncSocketClient
from ..sockets.pool import AsyncDialler
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


class AsyncHttpClient(AsyncSocketClient):
    """Calls from one event loop over the http plane."""

    plane = "http"

    def __init__(self, config: Config) -> None:
        options = request_options(config)
        super().__init__(config, options, HttpDialler(config, options), AsyncSocketChannel)
