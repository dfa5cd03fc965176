"""The serving side of the nats plane."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from typing import Any

from ..._awaitable import EndpointEntry
from ..._natsio import NatsServerLink
from ...config import Config
from ...errors import DynwireError, ManagerClosed
from ...nats.connection import NatsConnection
from ...types import Handler
from ..serving import KILLED_GRACE_S, EndpointServer
from .options import wire_limits
from .queues import ServerQueues

QUEUE_GROUP = "dynwire"

logger = logging.getLogger("dynwire.nats")


class AsyncNatsServer(EndpointServer):
    """Takes requests from a subject of its own and, for tools, from one queue group per endpoint."""

    plane = "nats"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        prefix = config.nats.prefix
        self._subject = f"{prefix}.i.{secrets.token_hex(8)}"
        self._queue_subject = f"{prefix}.q."
        self._link: NatsServerLink
        self._connection: NatsConnection | None = None
        self._subscription: Any = None
        self._queues: dict[str, asyncio.Task[Any]] = {}
        self._durable: ServerQueues | None = None
        self._base_context = contextvars.copy_context()

    @property
    def address(self) -> str:
        return f"nats:{self._subject}"

    async def start(self) -> None:
        if self._closed:
            raise ManagerClosed("the server is closed")
        if self._connection is not None:
            return
        self._loop = asyncio.get_running_loop()
        connection = await NatsConnection.acquire(self._config.nats)
        self._link = NatsServerLink(
            self._subject.encode(),
            self._loop,
            self.entries,
            self._base_context,
            tracebacks=self._config.remote_tracebacks,
            queue_subject=self._queue_subject.encode(),
            **wire_limits(self._config),
        )
        self._link.attach(connection.port)
        try:
            self._subscription = await connection.subscribe(self._subject + ".>", self._link.sink)
        except BaseException:
            self._link.close()
            await connection.release()
            raise
        self._connection = connection
        if self._config.nats.request_mode == "jetstream":
            self._durable = ServerQueues(connection, self._config, self._link)
        for endpoint in self.entries:
            self._join(endpoint)
        logger.info("serving the nats plane at %s as %s", connection.url, self.address)

    # Endpoints -------------------------------------------------------------------------------------------------------------

    def add_endpoint(self, endpoint: str, handler: Handler) -> None:
        super().add_endpoint(endpoint, handler)
        if self._connection is not None:
            self._link.endpoints_changed()
            self._join(endpoint)

    async def endpoint_added(self, endpoint: str) -> None:
        task = self._queues.get(endpoint)
        if task is not None:
            await asyncio.wait((task,))
        if self._durable is not None:
            await self._durable.ready(endpoint)

    async def remove_endpoint(self, endpoint: str, grace: float = 0.0) -> int:
        await self._leave(endpoint)
        if self._durable is not None:
            await self._durable.stop(endpoint)
        killed = await super().remove_endpoint(endpoint, grace)
        if self._durable is not None:
            await self._durable.close(endpoint)
        if self._connection is not None:
            self._link.endpoints_changed()
        return killed

    def _join(self, endpoint: str) -> None:
        """Take requests to any instance of the endpoint too. Who goes through discovery does not need that."""
        self._queues[endpoint] = self._loop.create_task(self._subscribe(endpoint), name=f"dynwire-nats-{endpoint}")
        if self._durable is not None:
            self._durable.open(endpoint, self.entries[endpoint].max_in_flight)

    async def _subscribe(self, endpoint: str) -> Any:
        assert self._connection is not None
        try:
            return await self._connection.subscribe(self._queue_subject + endpoint, self._link.sink, QUEUE_GROUP)
        except DynwireError as error:
            logger.warning("%s is not served to the queue group %r: %s", endpoint, QUEUE_GROUP, error)
            return None

    async def _leave(self, endpoint: str) -> None:
        task = self._queues.pop(endpoint, None)
        if task is None or self._connection is None:
            return
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        elif task.result() is not None:
            await self._connection.finish(task.result())

    def _kill(self, entry: EndpointEntry | None = None) -> int:
        return 0 if self._connection is None else self._link.kill_tasks(entry)

    def stats(self) -> list[dict[str, Any]]:
        """Counters of all requests of this server."""
        if self._connection is None:
            return []
        return [self._link.stats() | ({} if self._durable is None else {"queues": self._durable.stats()})]

    async def close(self, grace: float = 0.0) -> None:
        if self._closed:
            return
        self._closed = True
        connection = self._connection
        if connection is None:
            self.entries.clear()
            return
        if self._loop.is_closed():
            self._link.forget(ManagerClosed("the server was closed"))
            return
        entries = list(self.entries.values())
        if self._durable is not None:
            await self._durable.stop()
        for entry in entries:
            entry.draining = True
        self._link.go_away()
        for endpoint in list(self._queues):
            await self._leave(endpoint)
        await self._wait_idle(entries, grace)
        if self._kill():
            await self._wait_idle(entries, KILLED_GRACE_S)
        if self._durable is not None:
            await self._durable.close()
        # What had been sent before the NATS server heard of it is refused, not lost.
        await connection.finish(self._subscription)
        self._link.close(ManagerClosed("the server was closed"))
        await connection.release()
        self.entries.clear()
