"""Events over ZeroMQ, from every worker straight to every router: PUB and SUB sockets, no server in between.

A worker binds a PUB socket on a free port and says so in its record in discovery; routers connect. ZeroMQ reconnects by itself,
and drops what a slow or absent router does not take; `dynwire.event_plane.recovery` finds such gaps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import BindError, ConfigError
from .base import QUEUE_BATCHES, EventReceiver, EventSender

if TYPE_CHECKING:
    import zmq

ADDRESS_KEY = "zmq_address"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A peer that sends more in one message loses its connection."""
RECONNECT_MS, RECONNECT_MAX_MS = 50, 1000


def _zmq() -> Any:
    try:
        import zmq
    except ImportError as error:
        raise ConfigError(
            "the zmq event plane needs pyzmq: pip install 'dynwire[zmq]'", name="DYN_EVENT_PLANE", value="zmq",
            allowed="zmq with its package, or another event plane",
        ) from error  # fmt: skip
    return zmq


class ZmqSender(EventSender):
    """A PUB socket on a port of its own."""

    def __init__(self, config: Config) -> None:
        self._zmq = _zmq()
        self._bind_host, self._advertised = config.listen_hosts("events")
        self._context: zmq.Context[Any] | None = None
        self._socket: Any = None
        self._address = ""

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {ADDRESS_KEY: self._address}

    async def start(self) -> None:
        zmq = self._zmq
        context = zmq.Context()
        socket = context.socket(zmq.PUB)
        socket.linger = 0
        socket.sndhwm = QUEUE_BATCHES
        try:
            port = socket.bind_to_random_port(f"tcp://{self._bind_host}")
        except zmq.ZMQError as error:
            socket.close(linger=0)
            context.term()
            raise BindError(
                f"the zmq event plane cannot bind a port of {self._bind_host}: {error}; set DYNWIRE_EVENTS_HOST to an address of "
                "this machine",
                address=self._bind_host,
            ) from error
        self._context, self._socket = context, socket
        self._address = f"tcp://{self._advertised}:{port}"

    def send(self, data: bytes, key: str = "") -> None:
        if self._socket is None:
            self.dropped += 1
            return
        try:
            self._socket.send(data, self._zmq.NOBLOCK)
        except self._zmq.Again:
            self.dropped += 1

    async def close(self) -> None:
        context, socket, self._context, self._socket = self._context, self._socket, None, None
        if context is not None:
            socket.close(linger=0)
            context.term()


class ZmqReceiver(EventReceiver):
    """A SUB socket connected to every worker."""

    def __init__(self) -> None:
        self._zmq = _zmq()
        self._context: Any = None
        self._socket: Any = None
        self._addresses: dict[int, str] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._socket is not None

    async def start(self, callback: Callable[[bytes], object]) -> None:
        import zmq.asyncio

        self._context = zmq.asyncio.Context()
        socket = self._context.socket(zmq.SUB)
        socket.linger = 0
        socket.rcvhwm = QUEUE_BATCHES
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.reconnect_ivl = RECONNECT_MS
        socket.reconnect_ivl_max = RECONNECT_MAX_MS
        socket.subscribe(b"")
        for address in self._addresses.values():
            socket.connect(address)
        self._socket = socket
        self._task = asyncio.create_task(self._receive(socket, callback), name="dynwire-zmq-events")

    async def _receive(self, socket: Any, callback: Callable[[bytes], object]) -> None:
        while True:
            parts = await socket.recv_multipart()
            callback(parts[-1])

    def add_sender(self, worker_id: int, metadata: Mapping[str, Any]) -> None:
        address = metadata.get(ADDRESS_KEY)
        if not isinstance(address, str) or not address.startswith("tcp://"):
            raise ConfigError(
                f"worker {worker_id:x} does not publish events over zmq; set DYN_EVENT_PLANE to the same value on both sides",
                name="DYN_EVENT_PLANE", value="zmq", allowed="the event plane of the worker",
            )  # fmt: skip
        if self._addresses.get(worker_id) == address:
            return
        self.remove_sender(worker_id)
        self._addresses[worker_id] = address
        if self._socket is not None:
            self._socket.connect(address)

    def remove_sender(self, worker_id: int) -> None:
        address = self._addresses.pop(worker_id, None)
        if address is not None and self._socket is not None:
            with contextlib.suppress(self._zmq.ZMQError):  # it was never connected
                self._socket.disconnect(address)

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        context, socket, self._context, self._socket = self._context, self._socket, None, None
        if context is not None:
            socket.close(linger=0)
            context.term()
