"""Connections from one event loop to one address: when to open, share and close them. For every plane over sockets."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from abc import ABC, abstractmethod
from typing import Any

from ...config import Config
from ...errors import ConnectError, DynwireError, ManagerClosed, PeerLost, PlaneMismatch
from ...types import Instance
from .address import SOFTWARE, connect_error, connect_timeout, tune


class AsyncDialler(ABC):
    """What differs from plane to plane when a connection is opened."""

    idle_timeout: float = math.inf
    """seconds after which a connection that nobody uses is closed"""
    max_idle: float = math.inf
    """connections without requests that are kept"""

    @abstractmethod
    def host_and_port(self, address: str) -> tuple[str, int]: ...

    @abstractmethod
    def connection(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, address: str) -> Any:
        """The compiled connection around a connected socket, which it owns from now on."""


def check_plane(instance: Instance, plane: str) -> None:
    """Raises `PlaneMismatch` if the instance is served on another plane."""
    if instance.plane != plane:
        raise PlaneMismatch(
            f"{instance.path} is served on the {instance.plane} plane, this process uses {plane}; "
            "set DYN_REQUEST_PLANE to the same plane on both sides",
            ours=plane,
            theirs=instance.plane,
            peer=instance.address,
        )


def handshake_error(address: str, error: DynwireError) -> DynwireError:
    """What a caller sees when the connection ended before the server's HELLO."""
    if isinstance(error, PeerLost):
        tls = ""
        if address.startswith("https://"):
            tls = ", it may speak no TLS (DYNWIRE_HTTP_TLS_CERT on its side)"
        elif address.startswith("http://"):
            tls = ", it may speak TLS only (then its address begins with https)"
        made = ConnectError(
            f"{address} closed the connection during the handshake: it may not be a dynwire worker on this plane "
            f"(check DYN_REQUEST_PLANE on both sides){tls}, or it is shutting down",
            peer=address,
        )
        made.__cause__ = error
        return made
    error.sent = "no"
    error.phase = "connect"
    return error


class ConnectionPool:
    """Connections to one address; opened one at a time, at most ``pool_size``, more only when those there are busy."""

    def __init__(self, address: str, dialler: AsyncDialler, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._dialler = dialler
        self._config = config
        self._loop = loop
        self._idle_check: asyncio.TimerHandle | None = None
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
        host, port = self._dialler.host_and_port(self.address)
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
        try:
            connection = self._dialler.connection(self._loop, sock, self.address)
        except BaseException:  # DYNWIRE_HTTP_TLS_CA, say
            sock.close()
            raise
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
        if self._dialler.idle_timeout != math.inf and self._idle_check is None:
            self._idle_check = self._loop.call_later(self._idle_interval(), self._check_idle)

    def _idle_interval(self) -> float:
        return min(max(self._dialler.idle_timeout / 8, 0.02), 5.0)

    def _check_idle(self) -> None:
        """Close connections that nobody has used for long, and idle ones beyond the number to keep: the longest idle first."""
        self._idle_check = None
        now = time.monotonic()
        idle = sorted((c for c in self._connections if c.live == 0 and not c.busy), key=lambda c: c.last_rx)
        for number, connection in enumerate(idle):
            kept = len(idle) - number
            if now - connection.last_rx >= self._dialler.idle_timeout or kept > self._dialler.max_idle:
                connection.close()
        if self._connections and not self._closed:
            self._idle_check = self._loop.call_later(self._idle_interval(), self._check_idle)

    def _gone(self, connection: Any, error: DynwireError) -> None:
        if connection in self._connections:
            self._connections.remove(connection)

    def stats(self) -> list[dict[str, Any]]:
        return [c.stats() for c in self._connections]

    async def close(self) -> None:
        self._closed = True
        if self._idle_check is not None:
            self._idle_check.cancel()
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
