"""Connections from one event loop to its peers on the tcp plane."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from ..._tcpio import AsyncClientConnection, AsyncTcpChannel, RequestOptions
from ...config import Config
from ...errors import ConnectError, DynwireError, ManagerClosed, PeerLost, PlaneMismatch
from ...types import Instance
from ..base import AsyncChannel, AsyncItemStream, AsyncRequestPlaneClient
from .address import SOFTWARE, connect_error, connect_timeout, split_address, tune

AsyncChannel.register(AsyncTcpChannel)


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


def handshake_error(address: str, error: DynwireError) -> DynwireError:
    """What a caller sees when the connection ended before the server's HELLO."""
    if isinstance(error, PeerLost):
        made = ConnectError(
            f"{address} closed the connection during the handshake: it may not be a dynwire worker on the tcp plane "
            "(check DYN_REQUEST_PLANE on both sides), or it is shutting down",
            peer=address,
        )
        made.__cause__ = error
        return made
    error.sent = "no"
    error.phase = "connect"
    return error


class ConnectionPool:
    """Connections to one address; opened one at a time, at most ``pool_size``, more only when those there are busy."""

    def __init__(self, address: str, config: Config, options: RequestOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._config = config
        self._options = options
        self._loop = loop
        self._connections: list[Any] = []
        self._opening: asyncio.Task[None] | None = None
        self._closed = False

    def best(self) -> Any:
        """The first connection that is free to send, else the least busy one, else None."""
        usable = [c for c in self._connections if c.ready and not c.draining]
        if not usable:
            return None
        return min(usable, key=_busyness)

    async def connect(self, timeout: float | None = None) -> None:
        """Wait until there is a usable connection. Callers share the attempt; raises its error."""
        if self.best() is not None:
            return
        if self._closed:
            raise ManagerClosed("the client is closed")
        opening = self._start_opening()
        limit = self._config.tcp.connect_timeout if timeout is None else timeout
        done, _ = await asyncio.wait((opening,), timeout=limit)
        if not done:
            raise connect_timeout(self.address, limit)
        if opening.cancelled():
            raise ManagerClosed("the client was closed while it connected")
        error = opening.exception()
        if error is not None:
            raise error

    def _start_opening(self) -> asyncio.Task[None]:
        if self._opening is None or self._opening.done():
            self._opening = self._loop.create_task(self._open(), name=f"dynwire-connect-{self.address}")
            self._opening.add_done_callback(_retrieve)
        return self._opening

    def _saturated(self, connection: Any) -> None:
        """A request had to wait, or the peer asked to use this connection no more: open another one."""
        usable = sum(1 for c in self._connections if not c.dead and not c.draining)
        if not connection.draining and usable < self._config.tcp.pool_size and not self._closed:
            self._start_opening()

    async def _open(self) -> None:
        limit = self._config.tcp.connect_timeout
        try:
            async with asyncio.timeout(limit):
                await self._open_connection()
        except TimeoutError as error:
            raise connect_timeout(self.address, limit) from error
        except OSError as error:
            raise connect_error(self.address, error) from error

    async def _open_connection(self) -> None:
        host, port = split_address(self.address)
        infos = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        problem: OSError | None = None
        for family, kind, proto, _, sockaddr in infos:
            sock = socket.socket(family, kind, proto)
            sock.setblocking(False)
            try:
                await self._loop.sock_connect(sock, sockaddr)
                tune(sock, self._config.tcp.congestion)
            except OSError as error:
                sock.close()
                problem = error
                continue
            except BaseException:
                sock.close()
                raise
            await self._handshake(sock)
            return
        raise problem or OSError(f"no address for {host}")

    async def _handshake(self, sock: socket.socket) -> None:
        connection = AsyncClientConnection(self._loop, sock, self.address, self._options, **wire_limits(self._config))
        waiter: asyncio.Future[Any] = self._loop.create_future()
        connection.on_closed = self._gone
        connection.on_saturated = self._saturated
        connection.handshake(waiter, software=SOFTWARE, connection_id=os.urandom(8), token=self._config.token)
        try:
            await waiter
        except DynwireError as error:
            raise handshake_error(self.address, error) from error
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.dead:  # HELLO and a farewell came together
            raise handshake_error(self.address, connection.close_error or PeerLost("closed", peer=self.address))
        self._connections.append(connection)

    def _gone(self, connection: Any, error: DynwireError) -> None:
        if connection in self._connections:
            self._connections.remove(connection)

    def stats(self) -> list[dict[str, Any]]:
        return [c.stats() for c in self._connections]

    async def close(self) -> None:
        self._closed = True
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait((self._opening,))
        for connection in list(self._connections):
            connection.close()


def _busyness(connection: Any) -> tuple[bool, int]:
    return (connection.busy, connection.live)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Everybody who waited has seen the error; a connect in the background has nobody."""
    if not task.cancelled():
        task.exception()


class AsyncTcpClient(AsyncRequestPlaneClient):
    """Calls from one event loop over the tcp plane. Connections open lazily and are shared by all endpoints of an address."""

    plane = "tcp"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._options = request_options(config)
        self._pools: dict[str, ConnectionPool] = {}
        self._closed = False

    def channel(self, instance: Instance) -> AsyncChannel:
        if self._closed:
            raise ManagerClosed("the client is closed")
        if instance.plane != self.plane:
            raise PlaneMismatch(
                f"{instance.path} is served on the {instance.plane} plane, this process uses tcp; "
                "set DYN_REQUEST_PLANE to the same plane on both sides",
                ours=self.plane,
                theirs=instance.plane,
                peer=instance.address,
            )
        pool = self._pools.get(instance.address)
        if pool is None:
            pool = self._pools[instance.address] = ConnectionPool(instance.address, self._config, self._options, self._loop)
        channel: AsyncChannel = AsyncTcpChannel(instance, pool, self._options, self._loop)  # type: ignore[assignment]
        return channel

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Per address, the counters of every open connection."""
        return {address: pool.stats() for address, pool in self._pools.items()}

    async def close(self) -> None:
        self._closed = True
        for pool in self._pools.values():
            await pool.close()
        self._pools.clear()


__all__ = ["AsyncItemStream", "AsyncTcpClient", "ConnectionPool", "request_options", "wire_limits"]
