"""Discovery through a JetStream key-value bucket: for processes on many machines that share NATS anyway.

One key per instance, ``namespace.component.endpoint.id``, in the bucket ``<prefix>_instances``. Its owner writes it again every
third of its TTL; an instance that was not written for one TTL is gone. A clean farewell is a delete marker. People can look with
``nats kv watch dynwire_instances``.

Watching. A put into a bucket is an ordinary message to ``$KV.<bucket>.<key>``, so watching is an ordinary subscription to these
subjects, and not a consumer: it costs the server nothing per watcher, survives reconnects by itself, and goes on telling when
JetStream has lost the bucket. What is in the bucket is read once in the beginning, after every reconnect, and by `list`.

Time. How old a record in the bucket is, is measured by the server's clock alone: its time now and when it stored the record. In
between the reader's monotonic clock counts. So steps and differences of clocks do no harm. Nobody is taken for dead before the
bucket was read once more: the reader may have been suspended, or the server.

Faults. While NATS is away nothing expires, and the last known set is delivered to nobody new, but stays in use. When it is back,
everybody known has one TTL to be heard again, owners write at once, and delete markers say who left meanwhile. A record that is
missing then without a marker is no sign of anything: the bucket was wiped. Whoever needs the bucket makes it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import os
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import NatsConfig
from ..errors import ConfigError, ConnectError, DynwireError, ManagerClosed, PermissionDenied
from ..types import Instance
from .base import Instances, check_instance, check_process, select
from .record import MAX_RECORD_BYTES, BadRecord, Record, decode_record, encode_record, record_key
from .remote import RemoteDiscovery, log

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.js.client import JetStreamContext

    from ..nats.connection import NatsConnection

SETTING = "DYN_DISCOVERY_BACKEND"
REPLY_S = 2.0
"""How long JetStream may take for one answer"""
FAREWELL_S = 2.0
"""How long closing waits for the delete markers; without them the records expire"""
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
REPLICAS = 3
"""of the bucket, where the cluster has as many members: losing one loses nothing"""
AT_ONCE = 64
"""records that are written at the same time"""
EXPIRY_JITTER_S = 0.2
READER_INACTIVE_S = 5.0
"""how long the server keeps the consumer of a reader that has read, or crashed"""

_NO_STREAM = 10059
_OTHER_CONFIGURATION = 10058
_NO_PEERS = (10005, 10074)
_OPERATION = "KV-Operation"
_MARKER = "Nats-Marker-Reason"


def bucket_name(prefix: str) -> str:
    """The bucket of a prefix (``DYNWIRE_NATS_PREFIX``). Buckets may have no dots in their names; a hash keeps them apart."""
    if "." not in prefix:
        return f"{prefix}_instances"
    return f"{prefix.replace('.', '-')}-{hashlib.sha256(prefix.encode()).hexdigest()[:8]}_instances"


class _StreamInfo(msgspec.Struct):
    """The part of JetStream's answer that is needed; nats-py's form of it has no time."""

    class Config(msgspec.Struct):
        max_age: int = 0
        """nanoseconds"""

    class Error(msgspec.Struct):
        code: int = 0
        err_code: int = 0
        description: str = ""

    config: Config | None = None
    error: Error | None = None
    ts: datetime.datetime | None = None
    """the server's clock"""


class _Known:
    """What is known of one key."""

    __slots__ = ("heard_at", "raw", "record")

    def __init__(self, heard_at: float) -> None:
        self.heard_at = heard_at
        """loop time at which its owner was last heard"""
        self.raw = b""
        self.record: Record | None = None
        """None if what is stored is no record; it was warned about"""


class NatsDiscovery(RemoteDiscovery):
    """Discovery through the bucket of ``config.prefix`` on ``config.servers``; ``ttl`` holds for what this object registers."""

    def __init__(self, config: NatsConfig, *, ttl: float = 10.0) -> None:
        super().__init__(ttl)
        self._config = config
        self._bucket = bucket_name(config.prefix)
        self._place = f"discovery bucket {self._bucket}"
        self._subject = f"$KV.{self._bucket}."
        self._connection: NatsConnection | None = None
        self._jetstream: JetStreamContext | None = None
        self._unlisten: Callable[[], None] | None = None
        self._subscription: Any = None

        self._heartbeat_handle: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None

        self._known: dict[str, _Known] = {}
        self._heard: set[str] = set()  # keys of which a message came since the last reading began
        self._reading = asyncio.Lock()
        self._syncing: asyncio.Task[None] | None = None

    # -- the interface

    @property
    def healthy(self) -> bool:
        return self._connection is not None and self._connection.up and not self._failing and not self._closed

    async def start(self) -> None:
        """Connect and make the bucket if it is missing.

        Raises `ConnectError` or `Unauthenticated` as the connection does, `ConfigError` where JetStream is off,
        `PermissionDenied`, and `ForkedManager` in a child.
        """
        self._check()
        if self._connection is not None:
            return
        async with self._starting:
            self._check()
            if self._connection is not None:
                return
            from ..nats.connection import NatsConnection

            loop = asyncio.get_running_loop()
            connection = await NatsConnection.acquire(self._config, purpose="discovery")
            try:
                self._check()
                self._jetstream = connection.client.jetstream(timeout=REPLY_S)
                deadline = loop.time() + self._config.connect_timeout
                await self._first_bucket(connection, deadline)
                self._check()
            except BaseException:
                await connection.release()
                raise
            self._loop, self._pid = loop, os.getpid()
            self._unlisten = connection.on_state(self._on_state)
            self._connection = connection
            if self._watches:
                self._follow_soon()

    async def register(self, instance: Instance) -> None:
        check_instance(instance)
        await self.start()
        connection = self._usable()
        limit = min(MAX_RECORD_BYTES, connection.max_payload)
        raw, stored = encode_record(Record(instance, self._ttl), "nats", limit)
        key = record_key(instance)
        if not connection.up:
            try:
                await connection.wait_up()
            except DynwireError as error:
                error.phase = "register"
                raise
        try:
            await self._put(key, raw, lambda: not self._closed)
        except _failures() as error:
            raise self._cannot("register in", error, "register") from error
        self._check()
        self._own[key] = (stored, raw)
        self._withdrawn.discard(key)
        self._refresh()
        if self._heartbeat_handle is None:
            self._heartbeat_later()

    async def deregister(self, instance: Instance) -> None:
        check_process(self._pid)
        key = record_key(instance)
        if self._own.pop(key, None) is None:
            return
        self._known.pop(key, None)
        if not self._own:
            self._stop_heartbeat()
        self._refresh()
        await self._withdraw(key)

    async def list(self, path: str | None = None) -> Instances:
        await self.start()
        if self._usable().up:
            try:
                await self._read()
            except (PermissionDenied, ManagerClosed):
                raise
            except _failures() as error:
                self._lost("read", _text(error))
        self._refresh()
        return select(self._snapshot, path)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pid not in (0, os.getpid()):  # in the child of a fork: everything is the parent's
            return
        for watch in tuple(self._watches):
            watch.cancel()
        loop = self._loop
        if loop is not None and loop.is_closed():  # nothing of it can run any more; the records expire
            return
        self._stop_heartbeat()
        self._stop_looking()
        for task in (self._syncing, self._writing):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._unlisten is not None:
            self._unlisten()
        keys = [*self._own, *self._withdrawn]
        self._own.clear()
        if keys and connection.up:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._each(keys, self._mark_deleted)
        if self._subscription is not None and not connection.client.is_closed:
            with contextlib.suppress(*_nats_errors()):
                await self._subscription.unsubscribe()
        await connection.release()

    # -- state

    def _usable(self) -> NatsConnection:
        self._check()
        assert self._connection is not None
        return self._connection

    def _on_state(self, state: int, error: BaseException | None) -> None:
        if self._closed:
            return
        if self._connection is not None and self._connection.up:
            now = self._now()
            for known in self._known.values():  # nobody could be heard meanwhile
                known.heard_at = max(known.heard_at, now)
            self._write_soon()
            self._follow_soon()
        else:
            if self._synced:
                self._synced = False
                count = len(self._snapshot)
                log.warning("discovery: NATS is away (%s); keeping %d known instances", error or "connection lost", count)
            self._refresh()

    def _cannot(self, what: str, error: BaseException, phase: str) -> DynwireError:
        if isinstance(error, DynwireError):
            return error
        place = self._connection.servers if self._connection is not None else ""
        return ConnectError(f"cannot {what} the NATS bucket {self._bucket} at {place}: {_text(error)}", phase=phase, peer=place)

    # -- the bucket

    async def _first_bucket(self, connection: NatsConnection, deadline: float) -> None:
        """Find or make the bucket. A cluster that has just started has no leader for a moment."""
        from nats.js.errors import NoStreamResponseError, ServiceUnavailableError

        loop = asyncio.get_running_loop()
        pause = FIRST_RETRY_S
        while True:
            try:
                await self._ensure_bucket(connection)
                return
            except _failures() as error:
                absent = isinstance(error, (NoStreamResponseError, ServiceUnavailableError))
                if absent and not connection.server_info.get("jetstream"):
                    raise ConfigError(
                        f"{SETTING} is nats, which needs JetStream, and it is off in the NATS server {connection.url}; "
                        "start that with -js (dynwire nats up has it on)",
                        name=SETTING,
                        value="nats",
                        allowed="a NATS server with JetStream, or another backend",
                    ) from error
                if loop.time() + pause > deadline or isinstance(error, PermissionDenied):
                    raise self._failure_of(connection, error) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_S)

    def _failure_of(self, connection: NatsConnection, error: BaseException) -> DynwireError:
        if isinstance(error, DynwireError):
            return error
        return ConnectError(
            f"cannot use the NATS bucket {self._bucket} at {connection.servers}: {_text(error)}",
            phase="connect",
            peer=connection.servers,
        )

    async def _ensure_bucket(self, connection: NatsConnection) -> datetime.datetime | None:
        """Make the bucket if it is missing, and lengthen its maximum age for a longer TTL. Returns the server's time."""
        assert self._jetstream is not None
        wanted_ns = int(self._ttl * 1e9)
        info = await self._stream_info(connection)
        if info.error is not None:
            if info.error.err_code != _NO_STREAM:
                _raise_api(info.error)
            await self._make_bucket(connection)
            info = await self._stream_info(connection)
            if info.error is not None:
                _raise_api(info.error)
        assert info.config is not None
        if 0 < info.config.max_age < wanted_ns:
            stream = (await self._jetstream.stream_info(f"KV_{self._bucket}")).config
            stream.max_age = self._ttl
            await self._jetstream.update_stream(stream)
        return info.ts

    async def _stream_info(self, connection: NatsConnection) -> _StreamInfo:
        from nats.errors import NoRespondersError
        from nats.js.errors import NoStreamResponseError

        subject = f"$JS.API.STREAM.INFO.KV_{self._bucket}"
        try:
            reply = await connection.client.request(subject, b"", timeout=REPLY_S)
        except NoRespondersError as error:
            raise NoStreamResponseError from error
        except TimeoutError as error:
            raise connection.denied("publish", subject) or error from error
        return msgspec.json.decode(reply.data, type=_StreamInfo)

    async def _make_bucket(self, connection: NatsConnection) -> None:
        from nats.js.errors import APIError

        assert self._jetstream is not None
        info = connection.server_info
        replicas = REPLICAS if info.get("cluster") and len(info.get("connect_urls") or ()) >= REPLICAS else 1
        while True:
            try:
                await self._jetstream.create_key_value(
                    bucket=self._bucket,
                    description="instances that dynwire serves",
                    ttl=self._ttl,
                    history=1,
                    max_value_size=MAX_RECORD_BYTES,
                    replicas=replicas,
                )
            except APIError as error:
                if error.err_code == _OTHER_CONFIGURATION:  # somebody else was faster, with another TTL
                    return
                if error.err_code not in _NO_PEERS or replicas == 1:
                    raise
                log.warning("discovery: bucket %s gets one replica instead of %d: %s", self._bucket, replicas, _text(error))
                replicas = 1
            else:
                return

    # -- writing

    async def _put(self, key: str, raw: bytes, wanted: Callable[[], bool], patience: float = REPLY_S) -> None:
        """Store a record. Makes the bucket again if it is gone, and then tries again if that is still ``wanted``.

        Raises what `_failures` names.
        """
        assert self._jetstream is not None
        try:
            await self._jetstream.publish(self._subject + key, raw, timeout=patience)
        except _nats_errors():
            # Nobody answers to a put into a bucket that is gone, except with silence: watchers listen to the same subject.
            connection = self._usable()
            denied = connection.denied("publish", self._subject + key)
            if denied is not None:
                raise denied from None
            await self._ensure_bucket(connection)
            if wanted():
                await self._jetstream.publish(self._subject + key, raw, timeout=REPLY_S)

    async def _mark_deleted(self, key: str) -> None:
        assert self._jetstream is not None
        try:
            await self._jetstream.publish(self._subject + key, b"", timeout=REPLY_S, headers={_OPERATION: "DEL"})
        except _nats_errors() as error:
            # Watchers have it, unless they were away as well. It would expire, so this is no reason to fail a shutdown.
            log.debug("cannot store the delete marker of %s: %s", key, _text(error))

    async def _withdraw(self, *keys: str) -> None:
        connection = self._connection
        if connection is None or not connection.up:
            self._withdrawn.update(keys)
            return
        await self._each(keys, self._mark_deleted)

    async def _each(self, keys: Iterable[str], function: Callable[[str], Awaitable[None]]) -> None:
        """Call a function for all keys, some at once; raises the first error after all have ended."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(key: str) -> None:
            async with slots:
                await function(key)

        results = await asyncio.gather(*(one(key) for key in keys), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _heartbeat_later(self) -> None:
        assert self._loop is not None
        self._heartbeat_handle = self._loop.call_later(self._ttl / 3, self._heartbeat)

    def _heartbeat(self) -> None:
        if self._pid != os.getpid():
            return
        self._heartbeat_later()
        self._write_soon()

    def _stop_heartbeat(self) -> None:
        if self._heartbeat_handle is not None:
            self._heartbeat_handle.cancel()
            self._heartbeat_handle = None

    def _write_soon(self) -> None:
        """Write all own records again, and what could not be withdrawn, unless that is happening already."""
        if self._closed or not (self._own or self._withdrawn) or (self._writing is not None and not self._writing.done()):
            return
        if self._connection is None or not self._connection.up:
            return
        assert self._loop is not None
        self._writing = self._loop.create_task(self._write_all(), name="dynwire discovery heartbeat")

    async def _write_all(self) -> None:
        gone, self._withdrawn = self._withdrawn, set()
        # The next heartbeat must not come too late for the others because this one waits for an answer.
        patience = min(REPLY_S, max(self._ttl / 3, FIRST_RETRY_S))

        async def write(key: str) -> None:
            entry = self._own.get(key)
            if entry is not None:
                await self._put(key, entry[1], lambda: key in self._own, patience)

        try:
            await self._each(gone, self._mark_deleted)
            await self._each(tuple(self._own), write)
        except _failures() as error:
            self._lost("write", _text(error))
        else:
            self._recovered("write")

    # -- reading

    def _follow_soon(self) -> None:
        if self._closed or (self._syncing is not None and not self._syncing.done()):
            return
        self._syncing = asyncio.get_running_loop().create_task(self._sync(), name="dynwire discovery reader")

    async def _sync(self) -> None:
        """Read until it has worked once; ends when NATS goes away, because its return starts another one."""
        pause = FIRST_RETRY_S
        while True:
            try:
                await self.start()
                if not self._usable().up:
                    return
                await self._read()
                return
            except ManagerClosed:
                return
            except _failures() as error:
                self._lost("read", _text(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_S)

    async def _read(self) -> None:
        """Bring what is known up to date with the bucket. Raises what `_failures` names."""
        async with self._reading:
            connection = self._usable()
            if self._subscription is None:
                subject = f"{self._subject}>"
                subscription = await connection.client.subscribe(subject, cb=self._on_message)
                await connection.client.flush(timeout=REPLY_S)  # type: ignore[arg-type]  # seconds, also fractions
                denied = connection.denied("subscribe", subject)
                if denied is not None:
                    await subscription.unsubscribe()
                    raise denied
                self._subscription = subscription
            self._heard.clear()
            server_time = await self._ensure_bucket(connection)
            asked_at = self._now()
            assert self._jetstream is not None
            bucket = await self._jetstream.key_value(self._bucket)
            watcher = await bucket.watchall(inactive_threshold=READER_INACTIVE_S)
            try:
                while (entry := await watcher.updates(timeout=REPLY_S)) is not None:  # type: ignore[no-untyped-call]
                    key = entry.key
                    if key in self._heard:  # what came by itself is newer
                        continue
                    if entry.operation is not None:
                        self._known.pop(key, None)
                        continue
                    age = 0.0
                    if server_time is not None and entry.created is not None:
                        age = max(0.0, (server_time - entry.created).total_seconds())
                    self._take(key, entry.value or b"", asked_at - age)
            finally:
                with contextlib.suppress(*_nats_errors()):
                    await watcher.stop()  # type: ignore[no-untyped-call]
            self._recovered("read")
            self._forget_expired(asked_at)
            if connection.up:
                first = not self._synced
                self._synced = True
                self._refresh(deliver=first)

    async def _on_message(self, message: Msg) -> None:
        key = message.subject.removeprefix(self._subject)
        self._heard.add(key)
        headers = message.headers or {}
        if _OPERATION in headers or _MARKER in headers:
            self._known.pop(key, None)
        else:
            self._take(key, message.data, self._now())
        self._refresh()

    def _take(self, key: str, raw: bytes, heard_at: float) -> None:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(heard_at)
        known.heard_at = max(known.heard_at, heard_at)
        if known.raw == raw:
            return
        usable = known.record is not None or not known.raw
        known.raw = raw
        try:
            if len(raw) > MAX_RECORD_BYTES:
                raise BadRecord(f"{len(raw)} bytes, more than {MAX_RECORD_BYTES}")
            known.record = decode_record(key, raw)
        except BadRecord as bad:
            known.record = None
            known.raw = raw[:1] or b"?"  # enough to know that it was warned about
            if usable:
                log.warning("discovery: ignoring %s in bucket %s: %s", key, self._bucket, bad)

    def _records(self) -> Iterable[tuple[str, Record | None]]:
        return ((key, known.record) for key, known in self._known.items())

    def _expires_at(self, known: _Known) -> float:
        return known.heard_at + (self._ttl if known.record is None else known.record.effective_ttl)

    def _forget_expired(self, now: float) -> None:
        for key, known in tuple(self._known.items()):
            if self._expires_at(known) <= now:
                del self._known[key]

    def _due(self) -> float | None:
        """When somebody was not heard for too long."""
        others = [self._expires_at(known) for key, known in self._known.items() if key not in self._own]
        if not others or not self._synced:
            return None
        return min(others) + random.uniform(0.01, EXPIRY_JITTER_S)  # not all watchers in the same moment

    def _on_due(self) -> None:
        self._follow_soon()


def _nats_errors() -> tuple[type[BaseException], ...]:
    """What nats-py raises when the server does not do what it should."""
    from nats.errors import Error

    return (Error, OSError, TimeoutError)


def _failures() -> tuple[type[BaseException], ...]:
    return (*_nats_errors(), msgspec.DecodeError, DynwireError)


def _raise_api(error: _StreamInfo.Error) -> None:
    from nats.js.errors import APIError

    APIError.from_error({"code": error.code, "err_code": error.err_code, "description": error.description})


def _text(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = getattr(error, "description", None) or str(error)
    return text.removeprefix("nats: ") or type(error).__name__
