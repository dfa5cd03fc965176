"""The tcp plane: the native wire over sockets, without any server between caller and worker."""

from __future__ import annotations

from .async_client import AsyncTcpClient
from .client import TcpClient
from .server import AsyncTcpServer

__all__ = ["AsyncTcpClient", "AsyncTcpServer", "TcpClient"]
