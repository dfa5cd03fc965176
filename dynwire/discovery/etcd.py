"""Discovery through etcd (v3.4 or later): for processes on many machines that share an etcd anyway.

One key per instance, ``/dynwire/instances/namespace.component.endpoint.id``, bound to one lease for each discovery object. Its
owner keeps the lease alive every third of its TTL; etcd deletes the keys of an owner that did not. A clean farewell deletes the
key, closing revokes the lease. People can look with ``etcdctl get --prefix /dynwire/instances/``.

etcd is spoken to over its JSON gateway, which is plain HTTP, because its gRPC interface would need grpcio and generated code.

Watching. The keys are read once, and then watched from the revision of that reading on, so nothing is missed or told twice. Where
etcd has compacted what came after, they are read again. A watch says nothing while nothing changes, so etcd is asked for a sign
of life every third of the TTL; that also notices a member without a majority, which would stay silent for ever.

Faults. While etcd is away the last known set stays in use and is delivered to nobody new. When it is back, who is missing is kept
for as long as its owner may need to write again (a third of its TTL and some seconds): etcd may have come back without its data,
and one that was suspended for longer than a TTL ends the leases of everybody when it wakes up.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
from collections.abc import Iterable, Sequence

from ..errors import ConfigError, ConnectError, DynwireError, ManagerClosed, PermissionDenied, Unauthenticated
from ..types import Instance
from .base import Instances, check_instance, check_process, select
from .etcd_gateway import (
    NO_GATEWAY,
    NOT_FOUND,
    PERMISSION_DENIED,
    REPLY_S,
    UNAUTHENTICATED,
    UNAVAILABLE,
    Away,
    Done,
    Event,
    Gateway,
    Kept,
    KeyValue,
    Lease,
    Range,
    Refused,
)
from .record import MAX_RECORD_BYTES, BadRecord, Record, decode_record, encode_record, record_key
from .remote import RemoteDiscovery, log

SETTING = "ETCD_ENDPOINTS"
PREFIX = "/dynwire/instances/"
FAREWELL_S = 2.0
"""How long closing waits for the end of the lease; without it the records expire"""
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0


class _Known:
    """A record of etcd's."""

    __slots__ = ("kept_until", "raw", "record")

    def __init__(self, raw: bytes, record: Record | None) -> None:
        self.raw = raw
        self.record = record
        """None if what is stored is no record; it was warned about"""
        self.kept_until: float | None = None
        """loop time; its key is gone, but its owner may only not have come back yet"""


class EtcdDiscovery(RemoteDiscovery):
    """Discovery through the keys below ``prefix`` of one etcd, reachable at any of ``endpoints``.

    ``ttl`` holds for what this object registers. etcd counts whole seconds, and has a minimum (2 s with its default election
    timeout), so that a crashed owner may be seen for a little longer.
    """

    def __init__(self, endpoints: tuple[str, ...], *, ttl: float = 10.0, prefix: str = PREFIX) -> None:
        super().__init__(ttl)
        self._gateway = Gateway(endpoints, self._interrupt)  # a watch at the old endpoint may be as silent as it
        self._place = f"discovery in etcd at {self._gateway.shown}"
        self._prefix = prefix
        self._range = {"key": prefix.encode(), "range_end": prefix.encode()[:-1] + bytes([prefix.encode()[-1] + 1])}

        self._unwritten: set[str] = set()  # own keys that etcd has lost, or may have
        self._lease = 0
        self._granting = asyncio.Lock()
        self._rewriting = False
        self._beating: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

        self._known: dict[str, _Known] = {}
        self._revision = 0  # of etcd, up to which what is known is complete
        self._back_at = -math.inf  # loop time of the end of the last outage
        self._following: asyncio.Task[None] | None = None
        self._stream: asyncio.Timeout | None = None

    # -- the interface

    @property
    def healthy(self) -> bool:
        return self._gateway.opened and not self._failing and not self._closed

    async def start(self) -> None:
        """Find an endpoint that answers.

        Raises `ConnectError` where none does, `Unauthenticated` and `PermissionDenied` as etcd does, `ConfigError` where httpx is
        missing or an endpoint is no etcd, and `ForkedManager` in a child.
        """
        self._check()
        if self._gateway.opened:
            return
        async with self._starting:
            self._check()
            if self._gateway.opened:
                return
            self._gateway.open()
            self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
            try:
                await self._gateway.call("kv/range", {**self._range, "count_only": True}, Done)
                self._check()
            except BaseException as error:
                await self._gateway.close()
                if isinstance(error, (Away, Refused)):
                    raise self._cannot("reach", error, "connect") from error
                raise
            if self._watches:
                self._follow_soon()

    async def register(self, instance: Instance) -> None:
        check_instance(instance)
        await self.start()
        raw, stored = encode_record(Record(instance, self._ttl), "etcd")
        key = record_key(instance)
        try:
            await self._put(key, raw)
        except (Away, Refused) as error:
            raise self._cannot("register in", error, "register") from error
        self._check()
        self._own[key] = (stored, raw)
        self._withdrawn.discard(key)
        if self._rewriting:  # it may just have stored the record before this one, and after it
            self._unwritten.add(key)
        self._refresh()
        self._beat_soon()

    async def deregister(self, instance: Instance) -> None:
        check_process(self._pid)
        key = record_key(instance)
        if self._own.pop(key, None) is None:
            return
        self._known.pop(key, None)
        self._unwritten.discard(key)
        self._refresh()
        try:
            await self._delete(key)
        except (Away, Refused) as error:
            # It would expire with the lease, so this is no reason to fail a shutdown.
            log.debug("cannot delete %s: %s", key, error)
            self._withdrawn.add(key)

    async def list(self, path: str | None = None) -> Instances:
        await self.start()
        if self._following is None or "read" not in self._failing:  # otherwise the follower tries all the time
            try:
                await self._read()
            except (Away, Refused) as error:
                if isinstance(error, Refused) and error.code in (PERMISSION_DENIED, UNAUTHENTICATED):
                    raise self._cannot("read", error, "connect") from error
                self._lost("read", error)
            self._check()
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
        self._stop_looking()
        for task in (self._following, self._beating):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if not self._gateway.opened:
            return
        if self._lease:
            with contextlib.suppress(Away, Refused, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._gateway.call("lease/revoke", {"ID": str(self._lease)}, Done)
        self._own.clear()
        await self._gateway.close()

    # -- state

    def _lost(self, what: str, reason: object) -> None:
        if what == "read":
            self._synced = False
        super()._lost(what, reason)

    def _recovered(self, what: str) -> None:
        if what == "read" and what in self._failing:
            self._back_at = self._now()
        super()._recovered(what)

    def _cannot(self, what: str, error: BaseException, phase: str) -> DynwireError:
        place = self._gateway.shown
        text = f"cannot {what} etcd at {place} ({SETTING}): {error}"
        code = error.code if isinstance(error, Refused) else UNAVAILABLE
        if code == PERMISSION_DENIED:
            return PermissionDenied(f"{text}; its user needs to read and write keys below {self._prefix}", phase=phase)
        if code == UNAUTHENTICATED:
            return Unauthenticated(f"{text}; a user is part of the endpoint: http://user:password@host:2379", phase=phase)
        if code == NO_GATEWAY:
            allowed = "endpoints of etcd 3.4 or later, with --enable-grpc-gateway, which is its default"
            return ConfigError(f"{text}; allowed: {allowed}", name=SETTING, value=place, allowed=allowed, phase=phase)
        return ConnectError(text, phase=phase, peer=place)

    # -- writing

    async def _granted(self) -> int:
        """The lease, a new one if there is none."""
        async with self._granting:
            self._check()
            if not self._lease:
                self._lease = (await self._gateway.call("lease/grant", {"TTL": str(math.ceil(self._ttl))}, Lease)).ID
            return self._lease

    def _lease_lost(self, lease: int) -> None:
        if self._lease == lease:
            self._lease = 0
            self._unwritten.update(self._own)
            self._wake.set()

    async def _put(self, key: str, raw: bytes) -> None:
        for last in (False, True):
            lease = await self._granted()
            body = {"key": (self._prefix + key).encode(), "value": raw, "lease": str(lease)}
            try:
                await self._gateway.call("kv/put", body, Done)
                return
            except Refused as refused:
                if refused.code != NOT_FOUND or last:
                    raise
                self._lease_lost(lease)

    async def _delete(self, key: str) -> None:
        await self._gateway.call("kv/deleterange", {"key": (self._prefix + key).encode()}, Done)

    def _beat_soon(self) -> None:
        if self._beating is None and not self._closed:
            assert self._loop is not None
            self._beating = self._loop.create_task(self._beat(), name="dynwire discovery heartbeat")

    async def _beat(self) -> None:
        """Keep the lease, write what etcd has lost, and notice when it is away; for ever."""
        pause = FIRST_RETRY_S
        while True:
            self._wake.clear()
            try:
                await self._write_all()
            except (Away, Refused) as error:
                if self._own or self._withdrawn:
                    self._lost("write", error)
                self._interrupt()
                wait = pause * random.uniform(0.5, 1.0)
                pause = min(2 * pause, LAST_RETRY_S)
            else:
                self._recovered("write")
                wait, pause = self._ttl / 3, FIRST_RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def _write_all(self) -> None:
        self._rewriting = True
        try:
            if self._lease:
                lease = self._lease
                if (await self._gateway.call("lease/keepalive", {"ID": str(lease)}, Kept)).result.TTL <= 0:
                    self._lease_lost(lease)
            elif not self._own:
                await self._gateway.call("kv/range", {**self._range, "count_only": True}, Done)
            for key in tuple(self._withdrawn):
                await self._delete(key)
                self._withdrawn.discard(key)
            for key in tuple(self._unwritten):
                entry = self._own.get(key)
                if entry is not None:
                    await self._put(key, entry[1])
                    if key not in self._own:  # deregistered meanwhile, and perhaps deleted before it was put
                        await self._delete(key)
                self._unwritten.discard(key)
        finally:
            self._rewriting = False

    # -- reading

    def _interrupt(self) -> None:
        """End the watch, so that it is opened again where etcd answers."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.reschedule(self._now())

    def _follow_soon(self) -> None:
        if not self._closed and self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow(), name="dynwire discovery reader")

    async def _follow(self) -> None:
        """Read, then watch, then the same again when the watch has ended; for ever."""
        pause = FIRST_RETRY_S
        while True:
            try:
                await self.start()
                self._beat_soon()
                await self._read()
                pause = FIRST_RETRY_S
                await self._watch_keys()
                continue  # compacted
            except ManagerClosed:
                return
            except (Away, Refused, DynwireError) as error:
                self._lost("read", error)
            except TimeoutError:
                log.debug("the watch of etcd was ended")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_RETRY_S)

    async def _read(self) -> None:
        """Bring what is known up to date with etcd. Raises `Away` and `Refused`."""
        before = self._revision
        reply = await self._gateway.call("kv/range", self._range, Range)
        back = "read" in self._failing
        self._recovered("read")
        revision = reply.header.revision
        if before <= revision < self._revision:  # older than what the watch has told meanwhile
            return
        wiped = revision < before
        self._revision = revision
        found = {_key(self._prefix, kv): kv.value for kv in reply.kvs}
        for key in self._known.keys() - found.keys():
            self._gone(key, back or wiped)
        for key, raw in found.items():
            self._take(key, raw)
        if self._following is not None and not self._closed:
            first = not self._synced
            self._synced = True
            self._refresh(deliver=first)

    async def _watch_keys(self) -> None:
        """Follow the changes after the known revision. Returns when etcd has compacted them.

        Raises `Away`, `Refused`, and TimeoutError when interrupted.
        """
        request = {**self._range, "start_revision": str(self._revision + 1)}
        try:
            async with asyncio.timeout(REPLY_S) as timeout, contextlib.aclosing(self._gateway.watch(request)) as told:
                self._stream = timeout
                async for result in told:
                    if result.compact_revision:
                        return
                    if result.created and self._stream is timeout:
                        timeout.reschedule(None)
                    self._on_events(result.events)
            # etcd was shut down, perhaps; the next reading will tell
            raise TimeoutError
        finally:
            self._stream = None

    def _on_events(self, events: Sequence[Event]) -> None:
        known = self._revision
        for event in events:
            if event.kv.mod_revision <= known:  # was read
                continue
            self._revision = max(self._revision, event.kv.mod_revision)
            key = _key(self._prefix, event.kv)
            if event.type != "DELETE":
                self._take(key, event.kv.value)
                continue
            if key in self._own:
                self._unwritten.add(key)
                self._wake.set()
            known_of = self._known.get(key)
            self._gone(key, known_of is not None and self._now() < self._back_at + self._grace(known_of))
        if events:
            self._refresh()

    def _grace(self, known: _Known) -> float:
        """How long an owner may need to write again after an outage: to notice it, to try again, and to be answered."""
        ttl = self._ttl if known.record is None else known.record.effective_ttl
        return ttl / 3 + LAST_RETRY_S + REPLY_S

    def _gone(self, key: str, keep: bool) -> None:
        known = self._known.get(key)
        if known is None:
            return
        if keep and known.kept_until is None:
            known.kept_until = self._now() + self._grace(known)
        elif known.kept_until is None or known.kept_until <= self._now():
            del self._known[key]

    def _take(self, key: str, raw: bytes) -> None:
        known = self._known.get(key)
        if known is not None:
            known.kept_until = None
            if known.raw == raw:
                return
        record = None
        try:
            if len(raw) > MAX_RECORD_BYTES:
                raise BadRecord(f"{len(raw)} bytes, more than {MAX_RECORD_BYTES}")
            record = decode_record(key, raw)
        except BadRecord as bad:
            raw = raw[:MAX_RECORD_BYTES]
            if known is None or known.record is not None:
                log.warning("discovery: ignoring etcd's key %s%s: %s", self._prefix, key, bad)
        self._known[key] = _Known(raw, record)

    def _records(self) -> Iterable[tuple[str, Record | None]]:
        return ((key, known.record) for key, known in self._known.items())

    def _refresh(self, deliver: bool = False) -> None:
        if "read" not in self._failing and not self._closed:  # nobody is given up while etcd is away
            now = self._now()
            for key, known in tuple(self._known.items()):
                if known.kept_until is not None and known.kept_until <= now:
                    del self._known[key]
        super()._refresh(deliver)

    def _due(self) -> float | None:
        if "read" in self._failing:  # the reading after an outage sets it again
            return None
        return min((known.kept_until for known in self._known.values() if known.kept_until is not None), default=None)

    def _on_due(self) -> None:
        self._refresh()


def _key(prefix: str, kv: KeyValue) -> str:
    return kv.key.decode("utf-8", "backslashreplace").removeprefix(prefix)
