"""Events over JetStream: a stream per component that the NATS server keeps, a durable consumer per router, and a snapshot.

Workers publish without waiting: a batch is kept until the server has confirmed it, sent again after an outage (the server
stores a batch once), and dropped when too many wait. Routers apply what the stream has in its order and acknowledge it then.
When enough has come together, one router stores its index and the stream is purged up to what the index covers and every router
has acknowledged; a router that starts loads the index and goes on behind it. None of this is relied on: what is missing, for
whatever reason, is asked for at the worker (`dynwire.event_plane.recovery`). Neither side waits for the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from .._natsproto import UP, CallbackSink
from ..config import Config
from ..errors import ConfigError, DynwireError, MessageTooLarge
from ..nats.pull import PullWindow, pull_request
from ..nats.queue import ACK, API_TIMEOUT_S, JS_TEMPORARY, MAX_PAUSE_S, PAUSE_S, Delivery, parse_pub_ack
from .base import QUEUE_BATCHES, EventIndex, EventReceiver, EventSender
from .nats import _Connected
from .stream import OWNER, EventStream, SnapshotStore, StreamNames, ended, failures

if TYPE_CHECKING:
    from .._natsport import PortSubscription
    from ..nats.connection import NatsConnection

logger = logging.getLogger("dynwire.event_plane")

QUEUE_BYTES = 32 * 1024 * 1024
"""Batches of so many bytes, and `QUEUE_BATCHES`, may wait for the server's confirmation; what exceeds it is dropped"""
CONFIRM_S = 5.0
"""A batch that was not confirmed for so long is sent again: its confirmation, or the batch, was lost"""
WINDOW = 2048
"""batches that a router asks for at once"""
PULL_EXPIRES_S = 10.0
"""A question to the stream is asked anew after so long; until then the server takes a dead router's for a sign of life"""
ACK_WAIT_S = 30.0
"""Without an acknowledgement for so long the server sends again; repeats change nothing. Never longer than a dead router counts:
the server (2.15) keeps a consumer with unacknowledged messages for 2.5 times this"""
OPEN_S = 10.0
"""How long the start of a router waits for its snapshot and its place in the stream, if there is a server"""
TEND_S = 10.0
"""Between two looks at whether the stream can be purged, and a snapshot is due"""
TEND_PAUSE_S = 1.0
"""between two such looks in any case"""
PURGE_PART = 10
"""Between snapshots the stream is purged when this fraction of the threshold can go"""
FAREWELL_S = 1.0
FIRST_PATIENCE_S = 0.4
"""A server that has just started loses questions to JetStream: the first is soon asked again, further ones after twice as long"""

_STATUS = re.compile(rb"NATS/1\.0 (\d{3})")
_PENDING = re.compile(rb"\r\nNats-Pending-Messages: *(\d{1,9})\r\n")
NO_RESPONDERS = 503


def _status(headers: bytes | None) -> int:
    found = None if headers is None else _STATUS.match(headers)
    return 0 if found is None else int(found[1])


class _Kept:
    """Keeps something open at the server: opens it, and again whenever it is void. Base of both ends."""

    def __init__(self, config: Config, what: str) -> None:
        self._config = config
        self._what = what
        self._connected = _Connected(config, "kv-events")
        self._void = asyncio.Event()
        self._opened = asyncio.Event()
        self._refused: ConfigError | None = None
        self._task: asyncio.Task[None] | None = None
        self._unlisten: Callable[[], None] | None = None
        self._subscription: PortSubscription | None = None
        self.open = False
        self.patience = FIRST_PATIENCE_S
        """for an answer of JetStream while it is being opened"""

    async def start(self, ready: Callable[[NatsConnection], Coroutine[Any, Any, None]], wait: float) -> None:
        """Begin; ``ready`` opens it. Returns when that has been done once, or takes too long. Raises `ConfigError`."""

        async def connected(connection: NatsConnection) -> None:
            self._unlisten = connection.on_state(self._on_state)
            self._task = asyncio.create_task(self._keep(connection, ready), name="dynwire-jetstream-events")

        try:
            await self._connected.start(connected)
            if self._task is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._opened.wait()
            if self._refused is not None:
                raise self._refused
        except BaseException:  # cancellation included
            await self.close()
            raise

    def _on_state(self, state: int, error: BaseException | None) -> None:
        self.open = False
        if state == UP:
            self._void.set()

    async def _keep(self, connection: NatsConnection, ready: Callable[[NatsConnection], Coroutine[Any, Any, None]]) -> None:
        pause, said = PAUSE_S, False
        while True:
            self._void.clear()
            try:
                if not connection.up:
                    await connection.wait_up()
                await ready(connection)
                self.open = not self._void.is_set()
                if said:
                    logger.info("%s: events flow again", self._what)
                pause, said, self.patience = PAUSE_S, False, FIRST_PATIENCE_S
                self._opened.set()
                await self._void.wait()
                self.open = False
            except failures() as error:
                if isinstance(error, ConfigError) and not self._opened.is_set():
                    self._refused = error
                    self._opened.set()
                text = str(error) or type(error).__name__
                level = logging.DEBUG if said else logging.ERROR if isinstance(error, ConfigError) else logging.WARNING
                logger.log(level, "%s waits for JetStream, and everything else goes on without it: %s", self._what, text)
                said = True
                await asyncio.sleep(pause)
                pause, self.patience = min(2 * pause, MAX_PAUSE_S), min(2 * self.patience, API_TIMEOUT_S)
            await self.unsubscribe(connection)

    def void(self) -> None:
        """What was opened is not there any more."""
        self.open = False
        self._void.set()

    async def subscribe(self, connection: NatsConnection, subject: str, sink: CallbackSink) -> None:
        self._subscription = await connection.subscribe(subject, sink)

    async def unsubscribe(self, connection: NatsConnection) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await connection.finish(subscription)

    @property
    def connection(self) -> NatsConnection | None:
        return self._connected.connection

    async def close(self, farewell: Callable[[NatsConnection], Coroutine[Any, Any, None]] | None = None) -> None:
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        task, self._task = self._task, None
        if task is not None:
            await ended(task)
        connection = self.connection
        if connection is not None:
            if farewell is not None and connection.up:
                with contextlib.suppress(*failures()):
                    async with asyncio.timeout(FAREWELL_S):
                        await farewell(connection)
            await self.unsubscribe(connection)
        self.open = False
        await self._connected.close()


# The worker's end --------------------------------------------------------------------------------------------------------------


class _Waiting:
    """A batch that the server has not confirmed."""

    __slots__ = ("data", "headers", "heads", "sent_at")

    def __init__(self, data: bytes, headers: bytes | None, heads: bool) -> None:
        self.data = data
        self.headers = headers
        self.heads = heads
        self.sent_at = 0.0


class JetStreamSender(EventSender):
    """Publishes into the component's stream."""

    def __init__(self, config: Config, namespace: str, component: str) -> None:
        self._config = config
        self._names = StreamNames.of(config.nats.prefix, namespace, component)
        self._subject = self._names.subject.encode()
        self._kept = _Kept(config, f"publishing KV events of {self._names.component}")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox = b""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._bytes = 0
        self._heads = b""
        """the newest numbers as the stream has them"""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def unconfirmed(self) -> int:
        """Batches that wait for the server."""
        return len(self._waiting)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._kept.start(self._ready, 0.5)

    async def _ready(self, connection: NatsConnection) -> None:
        await EventStream(connection.client, self._config, self._names, self._kept.patience).ensure(worker=True)
        inbox = connection.client.new_inbox()
        await self._kept.subscribe(connection, f"{inbox}.*", CallbackSink(self._on_confirmed))
        self._inbox = f"{inbox}.".encode()
        # Whoever has lost the stream learns the newest numbers again; of what was repeated the server stores nothing twice.
        self._heads = b""
        self._kept.open = True
        for number, waiting in tuple(self._waiting.items()):
            self._publish(number, waiting)
        self._check_later()

    def send(self, data: bytes, key: str = "") -> None:
        headers = f"NATS/1.0\r\nNats-Msg-Id: {key}\r\n\r\n".encode() if key else None
        self._send(_Waiting(data, headers, False))

    def send_heads(self, data: bytes) -> None:
        # Only behind new events: an idle worker fills no stream.
        if data != self._heads and not any(each.heads and each.data == data for each in self._waiting.values()):
            self._send(_Waiting(data, None, True))

    def _send(self, waiting: _Waiting) -> None:
        if len(self._waiting) >= QUEUE_BATCHES or self._bytes + len(waiting.data) > QUEUE_BYTES:
            self.dropped += 1
            return
        number = next(self._numbers)
        self._waiting[number] = waiting
        self._bytes += len(waiting.data)
        if self._kept.open:
            self._publish(number, waiting)

    def _publish(self, number: int, waiting: _Waiting) -> None:
        connection = self._kept.connection
        assert connection is not None
        assert self._loop is not None
        waiting.sent_at = self._loop.time()
        try:
            connection.port.send(self._subject, waiting.data, self._inbox + b"%d" % number, waiting.headers)
        except MessageTooLarge:
            self._forget(number)
            self.dropped += 1
        except DynwireError:
            self._kept.open = False  # it has just gone; everything is sent again when it is back

    def _forget(self, number: int) -> _Waiting | None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._bytes -= len(waiting.data)
        return waiting

    def _on_confirmed(self, subject: bytes, reply: bytes, headers: bytes | None, payload: Any) -> None:
        if _status(headers) == NO_RESPONDERS:  # there is no stream
            if self._kept.open:
                self._kept.void()
            return
        number = int(subject.rpartition(b".")[2])
        try:
            error = parse_pub_ack(bytes(payload)).error
        except DynwireError as malformed:
            logger.warning("%s: %s", self._names.stream, malformed)
            return
        if error is not None and (error.err_code in JS_TEMPORARY or error.code == 503):
            return  # sent again, later
        waiting = self._forget(number)
        if waiting is None:
            return
        if error is not None:
            logger.log(
                logging.DEBUG if self.dropped else logging.WARNING,
                "the stream %s does not take KV events: %s", self._names.stream, error.description,
            )  # fmt: skip
            self.dropped += 1
        elif waiting.heads:
            self._heads = waiting.data

    def _check_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        assert self._loop is not None
        self._timer = self._loop.call_later(CONFIRM_S, self._check)

    def _check(self) -> None:
        """Send again what was not confirmed in time."""
        assert self._loop is not None
        late = self._loop.time() - CONFIRM_S
        for number, waiting in tuple(self._waiting.items()):
            if self._kept.open and waiting.sent_at <= late:
                self._publish(number, waiting)
        self._check_later()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._kept.close()
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._bytes = 0


# The router's end --------------------------------------------------------------------------------------------------------------


_used: set[tuple[str, str]] = set()
"""(stream, consumer) of this process's routers with a configured name: two of one name would take each other's events"""
_reset: set[str] = set()
"""streams that this process has reset: once, however many routers it starts"""


def _after_fork() -> None:
    _used.clear()


os.register_at_fork(after_in_child=_after_fork)


class JetStreamReceiver(EventReceiver):
    """Consumes the component's stream under the name of a router."""

    def __init__(self, config: Config, namespace: str, component: str, router_id: str | None = None, reset: bool = False) -> None:
        self._config = config
        self._names = StreamNames.of(config.nats.prefix, namespace, component)
        self._kept = _Kept(config, f"following KV events of {self._names.component}")
        self._lasting = router_id is not None
        self._instance = secrets.token_hex(8)
        self._name = router_id or self._generated()
        self._taken: tuple[str, str] | None = None
        """what of `_used` is ours"""
        self._reset = reset
        self._index: EventIndex | None = None
        self._callback: Callable[[bytes], object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._window = PullWindow(WINDOW)
        self._inbox = b""
        self._pull = b""
        self._store: SnapshotStore | None = None
        self._begun = False
        """the snapshot was loaded, or there is none"""
        self._applied = 0
        """number in the stream of the newest batch that the index has"""
        self._covered = 0
        """what snapshot or purge leave of the stream lies above this number"""
        self._unsaid: bytes | None = None
        """where to acknowledge what was applied last"""
        self._caught_up = False
        self._writing = False
        self._due = asyncio.Event()
        self._tender: asyncio.Task[None] | None = None
        self.snapshots = 0
        """snapshots that this router has stored"""
        self.purged = 0
        """number in the stream up to which this router has purged it"""

    @staticmethod
    def _generated() -> str:
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:32]
        return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def name(self) -> str:
        """Name of this router's consumer."""
        return self._name

    @property
    def connected(self) -> bool:
        return self._kept.open

    def bind(self, index: EventIndex) -> None:
        self._index = index

    def add_sender(self, worker_id: int, metadata: Mapping[str, Any]) -> None:
        plane = metadata.get("event_plane")
        if plane != "jetstream":
            raise ConfigError(
                f"worker {worker_id:x} publishes its events over {plane}, this router follows jetstream; set DYN_EVENT_PLANE to "
                "the same value on both sides",
                name="DYN_EVENT_PLANE", value="jetstream", allowed="the event plane of the worker",
            )  # fmt: skip

    async def start(self, callback: Callable[[bytes], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        if self._lasting:
            self._take_name()
        try:
            await self._kept.start(self._ready, OPEN_S)
        except BaseException:  # cancellation included
            await self.close()
            raise
        self._tender = asyncio.create_task(self._tend(), name="dynwire-jetstream-snapshots")

    def _take_name(self) -> None:
        base = self._name
        for number in itertools.count(2):
            if (self._names.stream, self._name) not in _used:
                break
            self._name = f"{base}-{number}"
        self._taken = (self._names.stream, self._name)
        _used.add(self._taken)

    # opening

    async def _ready(self, connection: NatsConnection) -> None:
        stream = EventStream(connection.client, self._config, self._names, self._kept.patience)
        info = await stream.ensure(worker=False)
        first = not self._begun
        if first:
            await self._begin(stream, connection)
        pending = await self._place(stream, first)
        if first and self._covered and info.state.first_seq > self._covered + 1:
            # Another router has purged between our look at the snapshot and our place in the stream: its snapshot has that.
            await self._begin(stream, connection)
        self._begun = True
        self._covered = max(self._covered, info.state.first_seq - 1)
        inbox = connection.client.new_inbox()
        self._window.reset()
        await self._kept.subscribe(connection, inbox, CallbackSink(self._on_message, self._on_batch))
        self._inbox = inbox.encode()
        self._pull = f"$JS.API.CONSUMER.MSG.NEXT.{self._names.stream}.{self._name}".encode()
        self._caught_up = False
        self._kept.open = True
        if not pending:
            self._is_caught_up()
        self._ask()

    async def _begin(self, stream: EventStream, connection: NatsConnection) -> None:
        """Start from the snapshot, or from nothing."""
        store = self._store = SnapshotStore(connection.client, self._config, self._names)
        if self._reset and self._names.stream not in _reset:
            await store.delete()
            await stream.purge_all()
            _reset.add(self._names.stream)
        found = await store.load()
        if found is not None and self._index is not None and await self._index.restore(found[1]):
            self._covered = self._applied = found[0]

    async def _place(self, stream: EventStream, first: bool) -> int:
        """Find our consumer or make it; how many messages wait for it."""
        from nats.js import api
        from nats.js.errors import NotFoundError

        name = self._names.stream
        with contextlib.suppress(NotFoundError):
            if first:
                # Of a router of this name that has ended. Its index has ended too, so its place is not ours.
                await stream.js.delete_consumer(name, self._name)
            else:
                found = await stream.js.consumer_info(name, self._name)
                if (found.config.metadata or {}).get(OWNER) == self._instance:
                    return found.num_pending or 0
        while True:
            pending = await stream.make_consumer(
                api.ConsumerConfig(
                    name=self._name,
                    durable_name=self._name,
                    description=f"router on {socket.gethostname()}, process {os.getpid()}",
                    ack_policy=api.AckPolicy.ALL,
                    ack_wait=min(ACK_WAIT_S, self._config.events.router_ttl),
                    max_deliver=-1,
                    max_ack_pending=8 * WINDOW,
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE if self._applied else api.DeliverPolicy.ALL,
                    opt_start_seq=self._applied + 1 if self._applied else None,
                    replay_policy=api.ReplayPolicy.INSTANT,
                    inactive_threshold=self._config.events.router_ttl,
                    metadata={OWNER: self._instance},
                )
            )
            if pending is not None:
                return pending
            old, self._name = self._name, self._generated()
            self._lasting = False
            logger.error(
                "two routers of %s are called %s (DYNWIRE_ROUTER_ID); this one is %s now", self._names.component, old, self._name
            )

    # events

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes | None, payload: Any) -> None:
        assert self._loop is not None
        now = self._loop.time()
        code = _status(headers)
        if code and not reply.startswith(b"$JS.ACK"):
            found = _PENDING.search(headers or b"")
            if not self._window.status(code, None if found is None else int(found[1]), now) and self._kept.open:
                logger.info("the stream %s answered %d: opening it anew", self._names.stream, code)
                self._kept.void()
            return
        try:
            delivery = Delivery.parse(reply)
        except DynwireError as error:
            logger.warning("%s: %s", self._names.stream, error)
            return
        self._window.delivered(now)
        if self._callback is not None:
            self._callback(bytes(payload))
        self._applied = max(self._applied, delivery.seq)
        self._unsaid = reply
        if not delivery.pending and not self._caught_up:
            self._is_caught_up()
        if self._applied - self._covered > self._config.router.snapshot_threshold:
            self._due.set()

    def _on_batch(self, begin: bool) -> None:
        if not begin:
            self._acknowledge()
            self._ask()

    def _is_caught_up(self) -> None:
        self._caught_up = True
        if self._index is not None:
            self._index.resynchronise()

    def _acknowledge(self) -> None:
        connection = self._kept.connection
        # While a snapshot is taken the index only holds what comes.
        if self._unsaid is not None and not self._writing and connection is not None and connection.up:
            unsaid, self._unsaid = self._unsaid, None
            with contextlib.suppress(DynwireError):  # it has just gone; the next one says it too
                connection.port.send(unsaid, ACK)

    def _ask(self) -> None:
        connection, loop = self._kept.connection, self._loop
        assert loop is not None
        if connection is None or not self._kept.open or self._writing:
            return
        count = self._window.wanted(0, loop.time())
        if count:
            self._window.sent(count, loop.time())
            with contextlib.suppress(DynwireError):  # it has just gone; asked anew when it is back
                connection.port.send(self._pull, pull_request(count, PULL_EXPIRES_S), self._inbox)

    # snapshots

    async def _tend(self) -> None:
        assert self._loop is not None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TEND_S):
                    await self._due.wait()
            self._due.clear()
            connection = self._kept.connection
            if connection is not None and self._kept.open:
                if self._window.silent(self._loop.time()):
                    self._kept.void()
                try:
                    await self._look(connection)
                except failures() as error:
                    logger.warning("the events of %s were not purged, that is tried again: %r", self._names.component, error)
            await asyncio.sleep(TEND_PAUSE_S)

    async def _look(self, connection: NatsConnection) -> None:
        """Store a snapshot if one is due, purge what is not needed."""
        stream = EventStream(connection.client, self._config, self._names)
        store = self._store
        assert store is not None
        state = (await stream.js.stream_info(self._names.stream)).state
        covered = (await store.pointer())[0].seq
        self._covered = max(covered, state.first_seq - 1)
        threshold = self._config.router.snapshot_threshold
        behind = self._applied - self._covered
        # A stream that reaches its limit in bytes first would lose events before there is a snapshot of them.
        half_full = state.bytes * 2 > self._config.events.stream_max_bytes and behind * 2 > state.messages
        least = max(threshold // PURGE_PART, 1)
        due = self._caught_up and self._index is not None and (behind > threshold or half_full)
        if due and await self._store_snapshot(store):
            covered, least = self._covered, 1
        if covered:
            purged = await stream.purge(covered, state.first_seq, least)
            self.purged = max(self.purged, purged)

    async def _store_snapshot(self, store: SnapshotStore) -> bool:
        assert self._index is not None
        writer = await store.begin(f"{self._name}:{'' if self._lasting else self._instance}")
        if writer is None:
            return False
        seq = self._applied
        try:
            self._writing = True
            try:
                data = await self._index.snapshot()
            finally:
                self._writing = False
                self._acknowledge()
                self._ask()
            stored = await writer.write(seq, data)
        except BaseException:  # cancellation included
            with contextlib.suppress(*failures()):
                await writer.give_up()
            raise
        if not stored:
            logger.warning("another router has taken over the snapshot of %s", self._names.component)
            return False
        self._covered = seq
        self.snapshots += 1
        logger.info("stored the index of %s: %d bytes, up to message %d", self._names.component, len(data), seq)
        return True

    async def close(self) -> None:
        self._callback = None
        tender, self._tender = self._tender, None
        if tender is not None:
            await ended(tender)
        await self._kept.close(self._leave if not self._lasting else None)
        if self._taken is not None:
            _used.discard(self._taken)

    async def _leave(self, connection: NatsConnection) -> None:
        """Nobody comes back under a generated name."""
        self._acknowledge()
        await EventStream(connection.client, self._config, self._names).js.delete_consumer(self._names.stream, self._name)
