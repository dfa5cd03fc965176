"""Blocking calls over the http plane."""

from __future__ import annotations

import functools
import socket
import threading

from ..._httpio import BlockingConnection, BlockingItemStream, BlockingPool, BlockingSocketChannel
from ...config import Config
from ...types import Instance
from ..base import Channel, ItemStream
from ..sockets.blocking import SocketClient
from .address import client_keywords, parse_address, request_options
from .tls import client_context

Channel.register(BlockingSocketChannel)
ItemStream.register(BlockingItemStream)


class HttpClient(SocketClient):
    """Calls over HTTP/2; the calling threads do the I/O themselves."""

    plane = "http"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._options = request_options(config)
        self._context = functools.cache(functools.partial(client_context, config))

    def make_pool(self, address: str) -> BlockingPool:
        http = self._config.http
        return BlockingPool(
            address,
            self._config.tcp.pool_size,
            self.open_connection,
            idle_timeout=http.pool_idle_timeout,
            max_idle=http.pool_max_idle_per_host,
        )

    def make_channel(self, instance: Instance, pool: BlockingPool) -> Channel:
        channel: Channel = BlockingSocketChannel(instance, pool, self._options)  # type: ignore[assignment]
        return channel

    def host_and_port(self, address: str) -> tuple[str, int]:
        parsed = parse_address(address, self._config.http.root_path)
        return parsed.host, parsed.port

    def make_connection(self, sock: socket.socket, address: str, pool: BlockingPool) -> BlockingConnection:
        parsed = parse_address(address, self._config.http.root_path)
        return BlockingConnection(
            sock,
            address,
            self._options,
            pool,
            lock=None if self._config.http.engine == "native" else threading.RLock(),
            **client_keywords(parsed, self._config, self._context),
        )
