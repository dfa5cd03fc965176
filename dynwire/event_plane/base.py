"""What an event plane is: how batches of KV events get from a worker to routers. Lost messages are the business of `recovery`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from ..config import Config

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
    def send(self, data: bytes, key: str = "") -> None:
        """Send a batch. Never waits; drops it, and counts that, when it cannot be sent.

        ``key`` names the batch: whoever stores batches stores one with the same name once. Empty: it has none.
        """

    def send_heads(self, data: bytes) -> None:
        """Send a batch without events that repeats the newest numbers; called from time to time."""
        self.send(data)

    @abstractmethod
    async def close(self) -> None:
        """Send what waits, as far as that goes at once, and close. May be called twice."""


class EventIndex(ABC):
    """What a receiver that keeps state for its router needs of the router's index. Loop thread only."""

    @abstractmethod
    async def restore(self, data: bytes) -> bool:
        """Take over a snapshot; False, and nothing changed, if it is none or the index has begun without it."""

    @abstractmethod
    async def snapshot(self) -> bytes:
        """The index as it is now. The receiver must not call its callback until this returns."""

    @abstractmethod
    def resynchronise(self) -> None:
        """Events may be missing that nothing else tells of: ask every worker whether there are more than are known."""


class EventReceiver(ABC):
    """The receiving end, of one router, for all workers of a component. Belongs to the event loop that started it."""

    @abstractmethod
    async def start(self, callback: Callable[[bytes], object]) -> None:
        """Call ``callback`` with every batch from now on. Raises `ConnectError`, `ConfigError`."""

    def bind(self, index: EventIndex) -> None:
        """Before `start`: where snapshots come from and go to, in planes that keep them."""
        return None

    def add_sender(self, worker_id: int, metadata: Mapping[str, Any]) -> None:
        """A worker was found; ``metadata`` is its sender's. Raises `ConfigError` if it publishes on another plane."""
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
    from .jetstream import JetStreamSender

    return JetStreamSender(config, namespace, component)


def open_receiver(
    config: Config, namespace: str, component: str, router_id: str | None = None, reset: bool = False
) -> EventReceiver | None:
    """The receiver of the configured event plane, not started; None if there is none. Raises `ConfigError`.

    ``router_id`` and ``reset`` are for planes that keep something for routers: under which name, and whether it is deleted first.
    """
    if config.events.plane == "none":
        return None
    if config.events.plane == "zmq":
        from .zmq import ZmqReceiver

        return ZmqReceiver()
    if config.events.plane == "nats":
        from .nats import NatsReceiver

        return NatsReceiver(config, namespace, component)
    from .jetstream import JetStreamReceiver

    return JetStreamReceiver(config, namespace, component, router_id, reset)


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
