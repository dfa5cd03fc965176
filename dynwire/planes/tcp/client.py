"""Blocking calls over the tcp plane."""

from __future__ import annotations

import socket

from ..._tcpio import BlockingConnection, BlockingItemStream, BlockingPool, BlockingSocketChannel
from ...config import Config
from ...types import Instance
from ..base import Channel, ItemStream
from ..sockets.address import split_address
from ..sockets.blocking import SocketClient
from .async_client import request_options, wire_limits

Channel.register(BlockingSocketChannel)
ItemStream.register(BlockingItemStream)


class TcpClient(SocketClient):
    """Calls over the native wire."""

    plane = "tcp"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._options = request_options(config)
        self._limits = wire_limits(config)

    def make_pool(self, address: str) -> BlockingPool:
        return BlockingPool(address, self._config.tcp.pool_size, self.open_connection)

    def make_channel(self, instance: Instance, pool: BlockingPool) -> Channel:
        channel: Channel = BlockingSocketChannel(instance, pool, self._options)  # type: ignore[assignment]
        return channel

    def host_and_port(self, address: str) -> tuple[str, int]:
        return split_address(address)

    def make_connection(self, sock: socket.socket, address: str, pool: BlockingPool) -> BlockingConnection:
        return BlockingConnection(sock, address, self._options, pool, **self._limits)
