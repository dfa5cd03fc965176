"""The serving side of the planes over sockets: listening, connections, endpoints, draining."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
import socket
from typing import Any

from ..._awaitable import EndpointEntry
from ...config import Config
from ...errors import ConfigError, DynwireError, ManagerClosed, PlaneMismatch
from ..serving import KILLED_GRACE_S, EndpointServer
from .address import SOFTWARE, join_address, listen, tune

HELLO_TIMEOUT_S = 10.0
"""A connection that has not introduced itself by then is closed."""
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class AsyncSocketServer(EndpointServer):
    """Listens on one port and runs the handlers of all its endpoints on the event loop it was started on."""

    software = SOFTWARE
    setting = "DYN_TCP_RPC"
    """what the names of the settings of host and port begin with"""

    def make_connection(self, sock: socket.socket, peer: str) -> Any:
        """The compiled connection around an accepted socket, which it owns from now on."""
        raise NotImplementedError

    def admit(self, connection: Any, host: str) -> None:
        """Begin to serve an accepted connection; ``host`` is its peer's address."""
        connection.open()

    def advertise(self, host: str, port: int) -> str:
        """The address that callers are told."""
        return join_address(host, port)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self.token = config.token
        self._connections: set[Any] = set()
        self._sock: socket.socket | None = None
        self._address = ""
        self._base_context = contextvars.copy_context()
        self._retry_accept: asyncio.TimerHandle | None = None
        self._hello_check: asyncio.TimerHandle | None = None
        self._foreign: set[str] = set()
        self._log = logging.getLogger(f"dynwire.{self.plane}")

    @property
    def address(self) -> str:
        return self._address

    async def start(self) -> None:
        if self._closed:
            raise ManagerClosed("the server is closed")
        if self._sock is not None:
            return
        self._loop = asyncio.get_running_loop()
        host, advertised = self._config.listen_hosts(self.plane)
        self._sock = listen(host, self.port, self.setting)
        port = self._sock.getsockname()[1]
        self._address = self.advertise(advertised, port)
        self._loop.add_reader(self._sock.fileno(), self._accept)
        self._log.info("serving the %s plane on %s, advertised as %s", self.plane, join_address(host, port), self._address)

    @property
    def port(self) -> int:
        """The port to bind, 0 for any free one."""
        raise NotImplementedError

    # Connections -----------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._sock is not None
        for _ in range(64):  # then let others have the loop
            try:
                sock, sockaddr = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    continue  # that connection was gone before it was accepted
                # Without a pause the loop would spin on a listener that stays readable.
                self._log.error("cannot accept connections on %s: %s; trying again in 1 s", self._address, error)
                self._loop.remove_reader(self._sock.fileno())
                self._retry_accept = self._loop.call_later(1.0, self._accept_again)
                return
            if len(self._connections) >= self._config.tcp.max_connections:
                open_ones = len(self._connections)
                self._log.error("connection refused: %d are open, the limit (DYNWIRE_TCP_MAX_CONNECTIONS)", open_ones)
                sock.close()
                continue
            sock.setblocking(False)
            peer = join_address(str(sockaddr[0]), int(sockaddr[1]))
            try:
                tune(sock, self._config.tcp.congestion)
            except (OSError, ConfigError) as error:
                self._log.error("connection from %s dropped: %s", peer, error)
                sock.close()
                continue
            connection = self.make_connection(sock, peer)
            connection.on_closed = self._gone
            self._connections.add(connection)
            self.admit(connection, str(sockaddr[0]))
            if self._hello_check is None:
                self._hello_check = self._loop.call_later(HELLO_TIMEOUT_S, self._check_hellos, {connection})

    def _accept_again(self) -> None:
        self._retry_accept = None
        if self._sock is not None:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _check_hellos(self, suspects: set[Any]) -> None:
        """Close connections that have been silent since the last check; look again while some have not said HELLO."""
        self._hello_check = None
        for connection in suspects:
            if not connection.dead and not connection.ready:
                connection.close(DynwireError(f"{connection.peer} did not introduce itself within {HELLO_TIMEOUT_S:g} s"))
        silent = {c for c in self._connections if not c.ready}
        if silent and not self._closed:
            self._hello_check = self._loop.call_later(HELLO_TIMEOUT_S, self._check_hellos, silent)

    def _gone(self, connection: Any, error: DynwireError) -> None:
        self._connections.discard(connection)
        if isinstance(error, PlaneMismatch):
            # Health checkers knock every few seconds: one line per protocol is enough.
            if error.theirs not in self._foreign:
                self._foreign.add(error.theirs)
                self._log.warning("%s", error)
        elif connection.rx_bytes and not connection.ready and not isinstance(error, ManagerClosed):
            self._log.debug("connection from %s ended: %s", connection.peer, error)

    # Endpoints -------------------------------------------------------------------------------------------------------------

    def _kill(self, entry: EndpointEntry | None = None) -> int:
        return sum(connection.kill_tasks(entry) for connection in list(self._connections))

    async def _wait_written(self, limit: float) -> None:
        """Until the last replies have been handed to the system, or ``limit`` seconds have passed."""
        waiting = []
        for connection in self._connections:
            if connection.unsent:
                written = self._loop.create_future()
                connection.on_drained = lambda written=written: written.done() or written.set_result(None)
                waiting.append(written)
        if waiting and limit > 0:
            await asyncio.wait(waiting, timeout=limit)

    def stats(self) -> list[dict[str, Any]]:
        """Counters of every connection."""
        return [connection.stats() for connection in self._connections]

    async def close(self, grace: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        if self._sock is not None:
            if self._retry_accept is not None:
                self._retry_accept.cancel()
            else:
                self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
        if self._hello_check is not None:
            self._hello_check.cancel()
        entries = list(self.entries.values())
        for entry in entries:
            entry.draining = True
        for connection in list(self._connections):
            connection.go_away("the server is closing")
        deadline = self._loop.time() + grace
        await self._wait_idle(entries, grace)
        if self._kill():
            await self._wait_idle(entries, KILLED_GRACE_S)
        await self._wait_written(deadline - self._loop.time())
        for connection in list(self._connections):
            connection.close(ManagerClosed("the server was closed"))
        self.entries.clear()
