"""Blocking calls of the planes over sockets: the calling threads do the I/O themselves."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from ...config import Config
from ...errors import DynwireError, ManagerClosed
from ...types import Instance
from ..base import Channel, RequestPlaneClient
from .address import RCVTIMEO, SOFTWARE, connect_error, connect_timeout, tune
from .pool import check_plane, handshake_error


class SocketClient(RequestPlaneClient):
    """Blocking calls from any thread. Connections open lazily, at most ``DYN_TCP_POOL_SIZE`` per address."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pools: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = False

    # What differs from plane to plane --------------------------------------------------------------------------------------

    def make_pool(self, address: str) -> Any:
        """The compiled pool for an address."""
        raise NotImplementedError

    def make_channel(self, instance: Instance, pool: Any) -> Channel:
        raise NotImplementedError

    def host_and_port(self, address: str) -> tuple[str, int]:
        raise NotImplementedError

    def make_connection(self, sock: socket.socket, address: str, pool: Any) -> Any:
        """The compiled connection around a connected socket, which it owns from now on."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------------

    def channel(self, instance: Instance) -> Channel:
        check_plane(instance, self.plane)
        with self._lock:
            if self._closed:
                raise ManagerClosed("the client is closed")
            pool = self._pools.get(instance.address)
            if pool is None:
                pool = self._pools[instance.address] = self.make_pool(instance.address)
        return self.make_channel(instance, pool)

    def open_connection(self, pool: Any, limit: float) -> Any:
        """Connect and shake hands, both within ``limit`` seconds; called by the pool."""
        address = pool.address
        limit = max(limit, 0.001)
        deadline = time.monotonic() + limit
        try:
            sock = socket.create_connection(self.host_and_port(address), timeout=limit)
        except TimeoutError as error:
            raise connect_timeout(address, limit) from error
        except OSError as error:
            raise connect_error(address, error) from error
        try:
            tune(sock, self._config.tcp.congestion)
            # Not through settimeout(), which makes the descriptor non-blocking: a blocking recv is one system call, not two.
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, RCVTIMEO)
            connection = self.make_connection(sock, address, pool)
            connection.handshake(
                software=SOFTWARE,
                connection_id=os.urandom(8),
                token=self._config.token,
                accept_timeout=self._config.tcp.request_timeout,
                timeout=max(deadline - time.monotonic(), 0.001),
            )
        except TimeoutError as error:
            sock.close()
            raise connect_timeout(address, limit) from error
        except DynwireError as error:
            sock.close()
            raise handshake_error(address, error) from error
        except BaseException:
            sock.close()
            raise
        return connection

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Per address, the counters of every open connection."""
        return {address: pool.stats() for address, pool in list(self._pools.items())}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
            self._pools.clear()
        for pool in pools:
            pool.close()

    def forget(self) -> None:
        """Drop every connection without telling the peers: for the child after a fork."""
        self._closed = True
        for pool in self._pools.values():
            pool.forget()
        self._pools = {}
