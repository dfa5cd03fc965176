"""Events over core NATS: a subject per component, which workers publish on and routers subscribe to.

Nothing is stored by the server: what a router misses, while it or the server is away, it asks the worker for
(`dynwire.event_plane.recovery`). Neither side waits for the server: a worker whose server is absent serves without publishing, a
router without events routes by what it knows, and both go on trying to connect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError, DynwireError
from .base import EVENTS_CHANNEL, EventReceiver, EventSender

if TYPE_CHECKING:
    from ..nats.connection import NatsConnection

logger = logging.getLogger("dynwire.event_plane")

ATTEMPT_S = 5.0
START_S = 0.5
"""How long starting waits for the connection: a server that is there takes a tenth of it, an absent one delays nobody longer."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 5.0
"""between two attempts to reach the server for the first time; doubles from the first to the second"""
PENDING_BYTES = 256 * 1024 * 1024
PENDING_BATCHES = 262_144
"""What may wait in nats-py for a router that is busy; beyond it batches are dropped, and asked for."""


def subject_of(config: Config, namespace: str, component: str, channel: str = EVENTS_CHANNEL) -> str:
    """Where the events of a component, or the load of its routers, are published."""
    return f"{config.nats.prefix}.{channel}.{namespace}.{component}"


class _Connected:
    """A connection that is made in the background, for as long as it takes."""

    def __init__(self, config: Config, purpose: str) -> None:
        self._config = config
        self._purpose = purpose
        self._task: asyncio.Task[None] | None = None
        self.connection: NatsConnection | None = None

    async def start(self, then: Callable[[NatsConnection], Any]) -> None:
        """Begin; ``then`` is awaited with the connection. Returns when that is done or takes too long. Raises `ConfigError`."""
        from ..nats.connection import NatsConnection

        tried = asyncio.Event()
        refused: list[ConfigError] = []

        async def connect() -> None:
            pause = FIRST_PAUSE_S
            while True:
                try:
                    connection = await NatsConnection.acquire(self._config.nats, ATTEMPT_S, purpose=self._purpose)
                except ConfigError as error:
                    refused.append(error)
                    return
                except DynwireError as error:
                    level = logging.DEBUG if tried.is_set() else logging.WARNING
                    logger.log(level, "KV events wait for NATS, and everything else goes on without them: %s", error)
                    tried.set()
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, MAX_PAUSE_S)
                    continue
                self.connection = connection
                await then(connection)
                tried.set()
                return

        self._task = asyncio.create_task(connect(), name=f"dynwire-{self._purpose}")
        waiter = asyncio.ensure_future(tried.wait())
        await asyncio.wait([self._task, waiter], timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if refused:
            raise refused[0]

    @property
    def up(self) -> bool:
        return self.connection is not None and self.connection.up

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.release()


class NatsSender(EventSender):
    """Publishes on the component's subject."""

    def __init__(self, config: Config, namespace: str, component: str, channel: str = EVENTS_CHANNEL) -> None:
        self._subject = subject_of(config, namespace, component, channel).encode()
        self._connected = _Connected(config, "kv-events")
        self._port: Any = None

    async def start(self) -> None:
        await self._connected.start(self._ready)

    async def _ready(self, connection: NatsConnection) -> None:
        self._port = connection.port

    def send(self, data: bytes, key: str = "") -> None:
        if self._port is None or not self._connected.up:
            self.dropped += 1
            return
        try:
            self._port.send(self._subject, data)
        except DynwireError:  # larger than the server takes, or it has just gone
            self.dropped += 1

    async def close(self) -> None:
        self._port = None
        await self._connected.close()


class NatsReceiver(EventReceiver):
    """Subscribes to the component's subject."""

    def __init__(self, config: Config, namespace: str, component: str, channel: str = EVENTS_CHANNEL) -> None:
        self._subject = subject_of(config, namespace, component, channel)
        self._connected = _Connected(config, "kv-events")
        self._callback: Callable[[bytes], object] | None = None
        self._subscription: Any = None

    @property
    def connected(self) -> bool:
        return self._subscription is not None and self._connected.up

    async def start(self, callback: Callable[[bytes], object]) -> None:
        self._callback = callback
        await self._connected.start(self._ready)

    async def _ready(self, connection: NatsConnection) -> None:
        async def received(message: Any) -> None:
            if self._callback is not None:
                self._callback(message.data)

        self._subscription = await connection.client.subscribe(
            self._subject, cb=received, pending_msgs_limit=PENDING_BATCHES, pending_bytes_limit=PENDING_BYTES
        )

    async def close(self) -> None:
        self._callback = None
        subscription, self._subscription = self._subscription, None
        if subscription is not None and self._connected.up:
            await subscription.unsubscribe()
        await self._connected.close()
