"""Blocking calls over the http plane."""

from __future__ import annotations

import socket

from ..._httpio import BlockingConnection, BlockingItemStream, BlockingPool, BlockingSocketChannel
from ...config import Config
from ...types import Instance
from ..base import Channel, ItemStream
from ..sockets.blocking import SocketClient
from .address import http2_limits, parse_address, request_options

Channel.register(BlockingSocketChannel)
ItemStream.register(BlockingItemStream)


class HttpClient(SocketClient):
    """Calls over HTTP/2; the calling threads do the I/O themselves."""

    plane = "http"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._options = request_options(config)
        self._limits = http2_limits(config)

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
            scheme=parsed.scheme,
            authority=parsed.authority,
            root=parsed.root,
            token=self._config.token,
            **self._limits,
        )
