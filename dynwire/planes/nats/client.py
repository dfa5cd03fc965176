"""Calls from one event loop over the nats plane."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Any

from ..._natsio import NatsChannel, NatsClientLink
from ..._natsqueue import QueueTarget
from ..._natswire import NatsPeer
from ...config import Config
from ...errors import ConnectError, ManagerClosed
from ...nats.connection import NatsConnection
from ...types import Instance
from ..base import AsyncChannel, AsyncRequestPlaneClient
from ..sockets.pool import check_plane
from .options import request_options, wire_limits
from .queues import ClientQueues, is_queue

AsyncChannel.register(NatsChannel)


class AsyncNatsClient(AsyncRequestPlaneClient):
    """One inbox for the replies of all workers. The connection to NATS is made with the first request, and shared."""

    plane = "nats"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._options = request_options(config)
        connection_id = os.urandom(8)
        inbox = f"{config.nats.inbox_prefix}.{connection_id.hex()}."
        self.link = NatsClientLink(inbox.encode(), self._loop, self._options, connection_id=connection_id, **wire_limits(config))
        self._peers: weakref.WeakValueDictionary[str, NatsPeer] = weakref.WeakValueDictionary()
        self._connection: NatsConnection | None = None
        self._subscription: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._queues = ClientQueues(config, self.link)
        self._closed = False

    def channel(self, instance: Instance) -> AsyncChannel:
        if self._closed:
            raise ManagerClosed("the client is closed")
        check_plane(instance, self.plane)
        peer = self._peers.get(instance.address)
        if peer is None:
            peer = self._peers[instance.address] = NatsPeer(instance.address)
        queued = is_queue(self._config, instance)
        channel: AsyncChannel = NatsChannel(instance, self, self.link, peer, self._options, queued)  # type: ignore[assignment]
        return channel

    async def connect(self, timeout: float | None = None) -> None:
        """Connect and subscribe to the inbox, or wait until a lost connection is back. Callers share the attempt."""
        if self._closed:
            raise ManagerClosed("the client is closed")
        if self._connection is not None and self.link.attached:
            await self._connection.wait_up(timeout)
            return
        if self._connecting is None or self._connecting.done():
            self._connecting = self._loop.create_task(self._connect(), name="dynwire-nats-connect")
            self._connecting.add_done_callback(_retrieve)
        connecting = self._connecting
        done, _ = await asyncio.wait((connecting,), timeout=timeout)
        if not done:
            servers = ", ".join(self._config.nats.servers)
            raise ConnectError(f"no connection to NATS at {servers} (NATS_SERVER) within {timeout:g} s", peer=servers)
        if connecting.cancelled():
            raise ManagerClosed("the client was closed while it connected")
        connecting.result()

    async def _connect(self) -> None:
        connection = await NatsConnection.acquire(self._config.nats)
        try:
            subscription = await connection.subscribe(self.link.subject.decode() + "*", self.link.sink)
        except BaseException:
            await connection.release()
            raise
        self._connection, self._subscription = connection, subscription
        self.link.peer = f"NATS at {connection.servers}"
        self.link.attach(connection.port)

    async def queue(self, endpoint: str, timeout: float | None) -> QueueTarget:
        """The queue of an endpoint, for its channel; there is a connection."""
        assert self._connection is not None
        return await self._queues.open(self._connection, endpoint, timeout)

    def stats(self) -> dict[str, Any]:
        """Counters of all requests of this client."""
        return self.link.stats()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._loop.is_closed():
            self.link.forget(ManagerClosed("the client was closed"))
            return
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        self.link.close(ManagerClosed("the client was closed"))
        if self._connection is not None:
            await self._queues.close()
            self._subscription.unsubscribe()
            await self._connection.release()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waited has seen the error; perhaps nobody did."""
    if not task.cancelled():
        task.exception()
