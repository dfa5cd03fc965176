"""Calls from one event loop over the nats plane."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Any

from ..._natsio import NatsChannel, NatsClientLink, QueueChannel
from ..._natsqueue import QueueTarget
from ..._natswire import NatsPeer
from ...config import Config, mask_url
from ...errors import ConnectError, ManagerClosed, Overloaded, Unauthenticated
from ...nats.connection import NatsConnection
from ...types import Instance
from ..base import AsyncChannel, AsyncRequestPlaneClient
from ..sockets.pool import check_plane
from .options import request_options, wire_limits
from .queues import ClientQueues, is_queue

ASK_AGAIN_S = 1.0
ASK_SOON_S = 0.05
"""of a worker whose own connection may be on its way back"""

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
        self.link.peers = self._peers
        self._connection: NatsConnection | None = None
        self._subscription: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._queues = ClientQueues(config, self.link)
        self._waiting = 0
        self._closed = False

    def channel(self, instance: Instance) -> AsyncChannel:
        if self._closed:
            raise ManagerClosed("the client is closed")
        check_plane(instance, self.plane)
        if is_queue(self._config, instance):
            queue: AsyncChannel = QueueChannel(  # type: ignore[assignment]
                instance, self, self.link, NatsPeer(instance.address), self._options
            )
            return queue
        peer = self._peers.get(instance.address)
        if peer is None:
            peer = self._peers[instance.address] = NatsPeer(instance.address)
        channel: AsyncChannel = NatsChannel(instance, self, self.link, peer, self._options)  # type: ignore[assignment]
        return channel

    async def connect(self, timeout: float | None = None, peer: NatsPeer | None = None) -> None:
        """Connect to NATS, or wait until a lost connection is back; and find out whether the worker is there.

        Raises `ConnectError`, `Unauthenticated`, `ManagerClosed`, and `Overloaded` when too many wait for a lost connection.
        Callers share the attempt.
        """
        limit = self._config.nats.connect_timeout if timeout is None else timeout
        deadline = self._loop.time() + limit
        await self._connect(timeout)
        if peer is None:
            return
        while (left := deadline - self._loop.time()) > 0:
            if self._connection is not None and not self._connection.up:
                await self._connect(left)
            if peer.leaving:
                raise ConnectError(f"{peer.address} is shutting down", peer=peer.address)
            asked = self.link.ask_peer(peer)
            try:
                # asked again after a while: a message may be lost
                await asyncio.wait((asked,), timeout=min(left, ASK_AGAIN_S))
            finally:
                if not asked.done():
                    asked.cancel()  # a worker that says nothing keeps no list of those who have asked
            if self._closed:
                raise ManagerClosed("the client is closed")
            if not asked.cancelled():
                error = asked.result()
                if error is None:
                    return
                if not self.link.unsettled:
                    raise error
                await asyncio.sleep(min(left, ASK_SOON_S))
        raise ConnectError(
            f"{peer.address} did not answer within {limit:.3g} s (DYNWIRE_NATS_CONNECT_TIMEOUT)", peer=peer.address
        )

    async def _connect(self, timeout: float | None) -> None:
        try:
            await self._connect_to_nats(timeout)
        except (ConnectError, Overloaded, Unauthenticated) as error:
            error.details["alive"] = True  # for all that is known: this says nothing about the worker
            raise

    async def _connect_to_nats(self, timeout: float | None) -> None:
        if self._closed:
            raise ManagerClosed("the client is closed")
        if self._connection is not None and self.link.attached:
            await self._wait_up(self._connection, timeout)
            return
        if self._connecting is None or self._connecting.done():
            self._connecting = self._loop.create_task(self._open(), name="dynwire-nats-connect")
            self._connecting.add_done_callback(_retrieve)
        connecting = self._connecting
        done, _ = await asyncio.wait((connecting,), timeout=timeout)
        if not done:
            servers = ", ".join(map(mask_url, self._config.nats.servers))
            raise ConnectError(f"no connection to NATS at {servers} (NATS_SERVER) within {timeout:g} s", peer=servers)
        if connecting.cancelled():
            raise ManagerClosed("the client was closed while it connected")
        connecting.result()

    async def _wait_up(self, connection: NatsConnection, timeout: float | None) -> None:
        if connection.up:
            return
        limit = self._config.tcp.channel_buffer
        if self._waiting >= limit:
            raise Overloaded(
                f"{self._waiting} requests already wait for the connection to NATS at {connection.servers} (limit {limit}, set "
                "by DYN_TCP_CHANNEL_BUFFER)",
                depth=self._waiting,
                limit=limit,
                peer=connection.servers,
            )
        self._waiting += 1
        try:
            await connection.wait_up(timeout)
        finally:
            self._waiting -= 1

    async def _open(self) -> None:
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
