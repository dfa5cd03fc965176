"""Blocking calls over the tcp plane: the calling threads do the I/O themselves."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from ..._tcpio import BlockingConnection, BlockingItemStream, BlockingPool, BlockingTcpChannel
from ...config import Config
from ...errors import DynwireError, ManagerClosed, PlaneMismatch
from ...types import Instance
from ..base import Channel, ItemStream, RequestPlaneClient
from .address import SOFTWARE, connect_error, connect_timeout, split_address, tune
from .async_client import handshake_error, request_options, wire_limits

Channel.register(BlockingTcpChannel)
ItemStream.register(BlockingItemStream)

_SLICE = (0, 100_000)  # (s, µs): a blocked thread looks at its deadlines this often
_RCVTIMEO = _SLICE[0].to_bytes(8, "little") + _SLICE[1].to_bytes(8, "little")  # struct timeval


class TcpClient(RequestPlaneClient):
    """Blocking calls over the tcp plane, from any thread. Connections open lazily, at most ``DYN_TCP_POOL_SIZE`` per address."""

    plane = "tcp"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._options = request_options(config)
        self._limits = wire_limits(config)
        self._pools: dict[str, BlockingPool] = {}
        self._lock = threading.Lock()
        self._closed = False

    def channel(self, instance: Instance) -> Channel:
        if instance.plane != self.plane:
            raise PlaneMismatch(
                f"{instance.path} is served on the {instance.plane} plane, this process uses tcp; "
                "set DYN_REQUEST_PLANE to the same plane on both sides",
                ours=self.plane,
                theirs=instance.plane,
                peer=instance.address,
            )
        with self._lock:
            if self._closed:
                raise ManagerClosed("the client is closed")
            pool = self._pools.get(instance.address)
            if pool is None:
                pool = BlockingPool(instance.address, self._config.tcp.pool_size, self._open)
                self._pools[instance.address] = pool
        channel: Channel = BlockingTcpChannel(instance, pool, self._options)  # type: ignore[assignment]
        return channel

    def _open(self, pool: BlockingPool, limit: float) -> BlockingConnection:
        """Connect and exchange HELLO, both within ``limit`` seconds."""
        address = pool.address
        limit = max(limit, 0.001)
        deadline = time.monotonic() + limit
        try:
            sock = socket.create_connection(split_address(address), timeout=limit)
        except TimeoutError as error:
            raise connect_timeout(address, limit) from error
        except OSError as error:
            raise connect_error(address, error) from error
        try:
            tune(sock, self._config.tcp.congestion)
            # Not through settimeout(), which makes the descriptor non-blocking: a blocking recv is one system call, not two.
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _RCVTIMEO)
            connection = BlockingConnection(sock, address, self._options, pool, **self._limits)
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
