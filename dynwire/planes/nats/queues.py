"""Durable mode: the queues that a client sends to and a server takes from (docs/nats.md)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from ..._natsio import NatsClientLink, NatsServerLink, QueueSink
from ..._natsqueue import QueueTarget
from ...config import Config
from ...errors import DynwireError
from ...nats.caller import CallerQueue
from ...nats.confirm import Unconfirmed
from ...nats.connection import NatsConnection
from ...nats.pull import QueueConsumer
from ...nats.queue import QueueNames
from ...types import EndpointId, Instance

OPEN_TIMEOUT_S = 30.0
"""to find or make a queue, where nobody named a shorter time. A cluster that has just lost a member elects leaders first: of
JetStream, of the queue and of its new consumer, in 4 to 9 s each (nats-server 2.15)"""

QUEUE_ID = 0
"""id of the instance that stands for a queue; real ones are random"""


def queue_instance(config: Config, path: str) -> Instance | None:
    """What stands for all workers of the endpoint in durable mode; None in core mode."""
    if config.nats.request_mode != "jetstream":
        return None
    endpoint = EndpointId.parse(path)
    return Instance(
        id=QUEUE_ID,
        namespace=endpoint.namespace,
        component=endpoint.component,
        endpoint=endpoint.name,
        plane="nats",
        address=f"nats:{QueueNames.of(config.nats.prefix, endpoint).subject}",
    )


def is_queue(config: Config, instance: Instance) -> bool:
    """Whether the instance is one of `queue_instance`."""
    return instance.id == QUEUE_ID and instance == queue_instance(config, instance.path)


class _Requests:
    """The link's requests to one queue, for its `CallerQueue`."""

    def __init__(self, link: NatsClientLink) -> None:
        self._link = link
        self.target: QueueTarget | None = None

    def found(self, anew: bool) -> None:
        if self.target is not None:
            self._link.queue_found(self.target, anew, time.monotonic())

    def waiting(self) -> list[int]:
        return [] if self.target is None else self._link.waiting_in(self.target)

    def missing(self, numbers: set[int]) -> None:
        if self.target is not None:
            self._link.missing_in(self.target, numbers, time.monotonic())


class ClientQueues:
    """The queues that one client has sent to."""

    def __init__(self, config: Config, link: NatsClientLink) -> None:
        self._config = config
        self._link = link
        self._targets: dict[str, QueueTarget] = {}

    async def open(self, connection: NatsConnection, endpoint: str, timeout: float | None) -> QueueTarget:
        """The target for requests to an endpoint; makes the queue if it is missing. Raises what `QueueAdmin.ensure` raises."""
        target = self._targets.get(endpoint)
        if target is not None:
            return target
        names = QueueNames.of(self._config.nats.prefix, EndpointId.parse(endpoint))

        requests = _Requests(self._link)
        queue = CallerQueue(connection, names, self._config.nats, requests)
        try:
            found = await queue.open(OPEN_TIMEOUT_S if timeout is None else min(timeout, OPEN_TIMEOUT_S))
        except BaseException:
            await queue.close()
            raise
        other = self._targets.get(endpoint)
        if other is not None:  # another channel was faster
            await queue.close()
            return other
        target = QueueTarget(queue, Unconfirmed(found.duplicate_window))
        requests.target = self._targets[endpoint] = target
        self._link.add_queue(target)
        return target

    async def close(self) -> None:
        """After the link was closed."""
        for target in self._targets.values():
            await target.queue.close()


class ServerQueues:
    """The queues that one server takes requests from."""

    def __init__(self, connection: NatsConnection, config: Config, link: NatsServerLink) -> None:
        self._connection = connection
        self._config = config
        self._link = link
        self._consumers: dict[str, QueueConsumer] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}

    def open(self, endpoint: str, max_in_flight: int) -> None:
        """Begin to take requests of an endpoint, once its queue was found or made; `ready` tells."""
        names = QueueNames.of(self._config.nats.prefix, EndpointId.parse(endpoint))
        sink = QueueSink(self._link, endpoint)
        consumer = QueueConsumer(self._connection, names, self._config.nats, sink, max_in_flight)
        sink.consumer = consumer
        consumer.forget_final = self._link.forget_final
        consumer.mark = self._link.mark
        self._consumers[endpoint] = consumer
        self._opening[endpoint] = asyncio.get_running_loop().create_task(
            consumer.start(OPEN_TIMEOUT_S), name=f"dynwire-queue-{endpoint}"
        )

    async def ready(self, endpoint: str) -> None:
        """Wait until requests are taken. Raises what `QueueConsumer.start` raises."""
        task = self._opening.get(endpoint)
        if task is not None:
            await asyncio.shield(task)

    async def stop(self, endpoint: str | None = None) -> None:
        """Take no more requests, of one endpoint or of all; those that run go on."""
        for name in (endpoint,) if endpoint is not None else tuple(self._consumers):
            task = self._opening.pop(name, None)
            if task is not None:
                task.cancel()
                with contextlib.suppress(DynwireError, asyncio.CancelledError):
                    await task
            if name in self._consumers:
                await self._consumers[name].stop()

    async def close(self, endpoint: str | None = None) -> None:
        """After `stop`, when no request runs any more: what still runs nevertheless is given back."""
        for name in (endpoint,) if endpoint is not None else tuple(self._consumers):
            consumer = self._consumers.pop(name, None)
            if consumer is not None:
                await consumer.close()

    def stats(self) -> dict[str, Any]:
        """Counters by endpoint."""
        return {endpoint: consumer.stats() for endpoint, consumer in self._consumers.items()}
