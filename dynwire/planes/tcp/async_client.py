"""Connections from one event loop to its peers on the tcp plane."""

from __future__ import annotations

import asyncio
import socket

from ..._tcpio import AsyncClientConnection, AsyncSocketChannel, RequestOptions
from ...config import Config
from ..base import AsyncChannel
from ..sockets.address import split_address
from ..sockets.async_client import AsyncSocketClient
from ..sockets.pool import AsyncDialler

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


class AsyncTcpClient(AsyncSocketClient):
    """Calls from one event loop over the tcp plane."""

    plane = "tcp"

    def __init__(self, config: Config) -> None:
        options = request_options(config)
        super().__init__(config, options, TcpDialler(config, options), AsyncSocketChannel)
