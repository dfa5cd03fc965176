"""The serving side of the tcp plane."""

from __future__ import annotations

import socket

from ..._tcpio import AsyncServerConnection
from ..sockets.server import AsyncSocketServer
from .async_client import wire_limits


class AsyncTcpServer(AsyncSocketServer):
    """Serves endpoints over the native wire."""

    plane = "tcp"

    @property
    def port(self) -> int:
        return self._config.tcp.port

    def make_connection(self, sock: socket.socket, peer: str) -> AsyncServerConnection:
        return AsyncServerConnection(
            self._loop,
            sock,
            peer,
            self,
            self._base_context,
            tracebacks=self._config.remote_tracebacks,
            spin_us=self._config.tcp.spin_us,
            **wire_limits(self._config),
        )
