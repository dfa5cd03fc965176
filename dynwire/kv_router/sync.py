"""Replica sync (``--router-replica-sync``): the routers of a component share what they have sent to its workers.

Messages travel over the event plane's transport: on a subject of core NATS (also where the events themselves are in JetStream),
or from one PUB socket per router, which the others find in discovery. What they say is in `dynwire.kv_router.replicas`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any

import msgspec

from ..config import Config
from ..discovery import Discovery
from ..errors import ConfigError
from ..event_plane.base import EventReceiver, EventSender, open_load_receiver, open_load_sender
from ..manager import AsyncNetworkManager
from ..types import EndpointId, Instance
from .load import ActiveLoad
from .replicas import ANSWER_PAUSE_S, HEAD_S, LoadAnnouncer, LoadMessage, ReplicaLoads, ReplicaStats

logger = logging.getLogger("dynwire.kv_router")

LOAD_ENDPOINT = "router_load"
"""namespace.component.router_load: the records of routers that share their load. Nobody serves it, they are to be seen only."""
PLANE = "events"
"""what the records say instead of a request plane"""


def check_replica_sync(config: Config, use_events: bool) -> None:
    """Raises `ConfigError` if there is nothing that the load could travel over."""
    plane = config.events.plane
    if plane == "none":
        raise ConfigError(
            "DYN_ROUTER_REPLICA_SYNC is set and DYN_EVENT_PLANE is none: routers tell each other their load over the event "
            "plane; set DYN_EVENT_PLANE to nats or zmq, or leave replica sync off",
            name="DYN_ROUTER_REPLICA_SYNC", value=True, allowed="false, or an event plane",
        )  # fmt: skip
    if not use_events and plane != "zmq":
        raise ConfigError(
            f"DYN_ROUTER_REPLICA_SYNC is set together with --no-kv-events (DYN_ROUTER_USE_KV_EVENTS=false), which promises that "
            f"no NATS connection is made, and DYN_EVENT_PLANE is {plane}; set DYN_EVENT_PLANE=zmq, or drop one of the two",
            name="DYN_ROUTER_REPLICA_SYNC", value=True, allowed="false, or DYN_EVENT_PLANE=zmq",
        )  # fmt: skip


class ReplicaSync:
    """One router's part. Belongs to the event loop that started it.

    Never fails and never waits for the others: without the event plane a router goes by its own load, and says so in `connected`.
    """

    def __init__(self, manager: AsyncNetworkManager, namespace: str, component: str, load: ActiveLoad) -> None:
        self.id = secrets.randbits(64)
        """of this router among the others"""
        self.announcer = LoadAnnouncer(self.id, load)
        self.announcer.wake = self._changed
        self.others = ReplicaLoads(self.id, load)
        self.malformed = 0
        """messages that were none of routers"""
        self._manager = manager
        self._path = EndpointId(namespace, component, LOAD_ENDPOINT)
        self._transport = "zmq" if manager.config.events.plane == "zmq" else "nats"
        sender = open_load_sender(manager.config, namespace, component)
        receiver = open_load_receiver(manager.config, namespace, component)
        assert sender is not None and receiver is not None  # see check_replica_sync
        self._sender: EventSender = sender
        self._receiver: EventReceiver = receiver
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(LoadMessage).decode
        self._loop: asyncio.AbstractEventLoop | None = None
        self._discovery: Discovery | None = None
        self._instance: Instance | None = None
        self._watch: Any = None
        self._listed: set[int] = set()
        self._complained: set[int] = set()
        self._scheduled = False
        self._heads: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._answered_at = 0.0

    @property
    def stats(self) -> ReplicaStats:
        """What became of the others' messages."""
        return self.others.stats

    @property
    def dropped(self) -> int:
        """Messages that could not be sent."""
        return self._sender.dropped

    @property
    def connected(self) -> bool:
        """Can messages come, as far as this end can tell?"""
        return self._receiver.connected

    async def start(self) -> None:
        """Open the transport, register for the others, and ask for what they have booked. Raises what these raise."""
        self._loop = asyncio.get_running_loop()
        await self._receiver.start(self._on_message)
        try:
            await self._sender.start()
            self._discovery = await (await self._manager._runtime()).discovery()
            address = next(iter(self._sender.metadata.values()), f"subject {self._path.namespace}.{self._path.component}")
            self._instance = Instance(
                id=self.id,
                namespace=self._path.namespace,
                component=self._path.component,
                endpoint=self._path.name,
                plane=PLANE,
                address=str(address),
                metadata={"event_plane": self._transport, **self._sender.metadata},
                started_at=time.time(),
            )
            await self._discovery.register(self._instance)
            self._watch = await self._manager.watch_instances(self._on_instances, self._path)
        except BaseException:  # cancellation included
            await self.close()
            raise
        self._send_head()
        self._ask()

    async def close(self) -> None:
        """Say good-bye and close. May be called twice."""
        for timer in (self._heads, self._timer):
            if timer is not None:
                timer.cancel()
        self._heads = self._timer = None
        if self._loop is None:
            return
        self._loop = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._sender.send(self._encode(self.announcer.leaving()))
        if self._discovery is not None and self._instance is not None:
            await self._discovery.deregister(self._instance)
        await self._sender.close()
        await self._receiver.close()

    # what is said

    def _changed(self) -> None:
        # what happens in one turn of the loop is announced together
        if self._loop is not None and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._loop is not None:
            for message in self.announcer.changes():
                self._sender.send(self._encode(message))

    def _send_head(self) -> None:
        assert self._loop is not None
        for message in self.announcer.head():
            self._sender.send(self._encode(message))
        self._heads = self._loop.call_later(HEAD_S, self._send_head)

    # what is heard

    def _on_instances(self, instances: tuple[Instance, ...]) -> None:
        now = time.monotonic()
        found = {i.id: i for i in instances if i.id != self.id and i.plane == PLANE}
        for gone in self._listed - found.keys():
            self._listed.discard(gone)
            self._receiver.remove_sender(gone)
            self.others.left(gone)
        for replica, instance in found.items():
            if replica in self._listed or not self._add(instance):
                continue
            self._listed.add(replica)
            self.others.found(replica, now)
        self._ask()

    def _add(self, instance: Instance) -> bool:
        theirs = instance.metadata.get("event_plane")
        if theirs == self._transport:
            try:
                self._receiver.add_sender(instance.id, instance.metadata)
            except ConfigError:
                theirs = f"{theirs} without an address"
            else:
                return True
        if instance.id not in self._complained:
            self._complained.add(instance.id)
            logger.warning(
                "the router %x of %s tells its load over %s, this one over %s: they do not know of each other's requests; set "
                "DYN_EVENT_PLANE to the same value on both",
                instance.id, instance.path, theirs, self._transport,
            )  # fmt: skip
        return False

    def _on_message(self, data: bytes) -> None:
        try:
            message = self._decode(data)
        except msgspec.MsgspecError:
            self.malformed += 1
            return
        now = time.monotonic()
        if self.others.on_message(message, now) and now - self._answered_at >= ANSWER_PAUSE_S:
            self._answered_at = now
            for part in self.announcer.snapshot():
                self._sender.send(self._encode(part))
        if not self.others.synced:
            self._ask()

    def _ask(self) -> None:
        """Ask whom there is to ask, and wake up for the rest."""
        loop = self._loop
        if loop is None:
            return
        now = time.monotonic()
        wanted = self.others.questions(now)
        if wanted:
            self._sender.send(self._encode(self.announcer.ask(wanted)))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wakeup = self.others.next_wakeup()
        if wakeup is not None:
            self._timer = loop.call_later(max(0.0, wakeup - now), self._ask)
