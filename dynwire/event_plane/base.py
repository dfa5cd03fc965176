"""What an event plane is: how batches of KV events get from a worker to routers. Lost messages are the business of `recovery`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from ..config import Config
from ..errors import ConfigError

QUEUE_BATCHES = 4096
"""Batches that may wait at a sender for a server that is away. What exceeds it is dropped: routers notice the gap and ask."""

EVENTS_CHANNEL, STREAM_CHANNEL, LOAD_CHANNEL = "kv", "kvs", "load"
"""parts of subjects: what workers tell routers, over core NATS and JetStream, and what routers tell each other"""


class EventSender(ABC):
    """The sending end, of one worker. Belongs to the event loop that started it."""

    dropped: int = 0
    """batches that could not be sent"""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What receivers must know to find this sender; goes into its record in discovery. Valid after `start`."""
        return {}

    @abstractmethod
    async def start(self) -> None:
        """Connect or bind. Raises `BindError`, `ConnectError`, `ConfigError`."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Send a batch. Never waits; drops it, and counts that, when it cannot be sent."""

    @abstractmethod
    async def close(self) -> None:
        """Send what waits, as far as that goes at once, and close. May be called twice."""


class EventReceiver(ABC):
    """The receiving end, of one router, for all workers of a component. Belongs to the event loop that started it."""

    @abstractmethod
    async def start(self, callback: Callable[[bytes], object]) -> None:
        """Call ``callback`` with every batch from now on. Raises `ConnectError`, `ConfigError`."""

    def add_sender(self, worker_id: int, metadata: Mapping[str, Any]) -> None:
        """A worker was found; ``metadata`` is its sender's."""
        return None

    def remove_sender(self, worker_id: int) -> None:
        """A worker is gone."""
        return None

    @property
    @abstractmethod
    def connected(self) -> bool:
        """False while nothing can come, as far as this end can tell."""

    @abstractmethod
    async def close(self) -> None:
        """No callback after this. May be called twice."""


def open_sender(config: Config, namespace: str, component: str) -> EventSender | None:
    """The sender of the configured event plane, not started; None if there is none. Raises `ConfigError`."""
    if config.events.plane == "none":
        return None
    if config.events.plane == "zmq":
        from .zmq import ZmqSender

        return ZmqSender(config)
    if config.events.plane == "nats":
        from .nats import NatsSender

        return NatsSender(config, namespace, component)
    raise _missing(config.events.plane)


def open_receiver(config: Config, namespace: str, component: str) -> EventReceiver | None:
    """The receiver of the configured event plane, not started; None if there is none. Raises `ConfigError`."""
    if config.events.plane == "none":
        return None
    if config.events.plane == "zmq":
        from .zmq import ZmqReceiver

        return ZmqReceiver()
    if config.events.plane == "nats":
        from .nats import NatsReceiver

        return NatsReceiver(config, namespace, component)
    raise _missing(config.events.plane)


def open_tap(config: Config, namespace: str, component: str) -> EventReceiver | None:
    """A receiver for people who look: hears what is published from now on, and leaves nothing behind. Raises `ConfigError`."""
    if config.events.plane == "jetstream":
        # what is stored in the stream is published like any other message
        from .nats import NatsReceiver

        return NatsReceiver(config, namespace, component, STREAM_CHANNEL)
    return open_receiver(config, namespace, component)


def open_load_sender(config: Config, namespace: str, component: str) -> EventSender | None:
    """What a router tells the others of its component about load with; None if there is no event plane. Raises `ConfigError`."""
    if config.events.plane == "none":
        return None
    if config.events.plane == "zmq":
        from .zmq import ZmqSender

        return ZmqSender(config)
    # load is worth nothing later, so nothing of it is stored: core NATS, whatever carries the events
    from .nats import NatsSender

    return NatsSender(config, namespace, component, LOAD_CHANNEL)


def open_load_receiver(config: Config, namespace: str, component: str) -> EventReceiver | None:
    """The other end of `open_load_sender`: hears all routers of a component."""
    if config.events.plane == "none":
        return None
    if config.events.plane == "zmq":
        from .zmq import ZmqReceiver

        return ZmqReceiver()
    from .nats import NatsReceiver

    return NatsReceiver(config, namespace, component, LOAD_CHANNEL)


def _missing(plane: str) -> ConfigError:
    return ConfigError(
        f"DYN_EVENT_PLANE is {plane!r}: this event plane is not in this release", name="DYN_EVENT_PLANE", value=plane,
        allowed="nats, zmq, none",
    )  # fmt: skip
