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
import logging
import math
import os
import random
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from ..config import mask_url
from ..errors import ConfigError, ConnectError, DynwireError, ForkedManager, ManagerClosed, PermissionDenied, Unauthenticated
from ..types import Instance
from .base import Discovery, Instances, Watch, WatchCallback, check_instance, ordered, select
from .record import MAX_RECORD_BYTES, BadRecord, Record, check_ttl, decode_record, encode_record, record_key

if TYPE_CHECKING:
    import httpx

SETTING = "ETCD_ENDPOINTS"
PREFIX = "/dynwire/instances/"
REPLY_S = 2.0
"""How long an endpoint may take for one answer, before the next one is asked"""
FAREWELL_S = 2.0
"""How long closing waits for the end of the lease; without it the records expire"""
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
AT_ONCE = 32
"""connections to etcd at the same time: registering many instances waits for one another instead of opening hundreds"""

_NOT_FOUND, _PERMISSION_DENIED, _UNAVAILABLE, _UNAUTHENTICATED = 5, 7, 14, 16  # gRPC status codes
_NO_GATEWAY = 12  # gRPC's "unimplemented"

log = logging.getLogger("dynwire.discovery")

_T = TypeVar("_T")


class _Header(msgspec.Struct):
    # The gateway writes 64-bit numbers as strings, and leaves out what is 0 or empty.
    revision: int = 0


class _KeyValue(msgspec.Struct):
    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0


class _Range(msgspec.Struct):
    header: _Header
    kvs: list[_KeyValue] = []


class _Done(msgspec.Struct):
    header: _Header


class _Lease(msgspec.Struct):
    ID: int = 0
    TTL: int = 0
    """0: there is no such lease"""


class _Kept(msgspec.Struct):
    result: _Lease


class _Event(msgspec.Struct):
    kv: _KeyValue
    type: str = "PUT"


class _Watched(msgspec.Struct):
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[_Event] = []


class _Problem(msgspec.Struct):
    message: str = ""
    code: int = 0
    grpc_code: int = 0


class _WatchLine(msgspec.Struct):
    result: _Watched | None = None
    error: _Problem | None = None


class _Token(msgspec.Struct):
    token: str = ""


class _Refused(Exception):
    """etcd has answered, with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Away(Exception):
    """No endpoint has answered, or none with a majority behind it; the text says which and why."""


class _Endpoint:
    __slots__ = ("password", "shown", "token", "url", "user")

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.shown = mask_url(url)
        self.user, self.password = unquote(parts.username or ""), unquote(parts.password or "")
        # without user and password: they belong into no header but the token's, and httpx logs URLs
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self.token = ""


class _Known:
    """A record of etcd's."""

    __slots__ = ("kept_until", "raw", "record")

    def __init__(self, raw: bytes, record: Record | None) -> None:
        self.raw = raw
        self.record = record
        """None if what is stored is no record; it was warned about"""
        self.kept_until: float | None = None
        """loop time; its key is gone, but its owner may only not have come back yet"""


class EtcdDiscovery(Discovery):
    """Discovery through the keys below ``prefix`` of one etcd, reachable at any of ``endpoints``.

    ``ttl`` holds for what this object registers. etcd counts whole seconds, and has a minimum (2 s with its default election
    timeout), so that a crashed owner may be seen for a little longer.
    """

    def __init__(self, endpoints: tuple[str, ...], *, ttl: float = 10.0, prefix: str = PREFIX) -> None:
        check_ttl(ttl)
        self._endpoints = tuple(_Endpoint(url) for url in endpoints)
        self._shown = ",".join(endpoint.shown for endpoint in self._endpoints)
        self._ttl = ttl
        self._prefix = prefix
        self._range = {"key": prefix.encode(), "range_end": prefix.encode()[:-1] + bytes([prefix.encode()[-1] + 1])}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        self._starting = asyncio.Lock()
        self._http: httpx.AsyncClient | None = None
        self._current = 0  # the endpoint that answered last
        self._failing: set[str] = set()  # "read", "write": each is logged once, when it begins and when it ends

        self._own: dict[str, tuple[Instance, bytes]] = {}
        self._unwritten: set[str] = set()  # own keys that etcd has lost, or may have
        self._withdrawn: set[str] = set()  # keys that could not be deleted yet
        self._lease = 0
        self._granting = asyncio.Lock()
        self._rewriting = False
        self._beating: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

        self._watches: set[Watch] = set()
        self._known: dict[str, _Known] = {}
        self._revision = 0  # of etcd, up to which what is known is complete
        self._back_at = -math.inf  # loop time of the end of the last outage
        self._following: asyncio.Task[None] | None = None
        self._stream: asyncio.Timeout | None = None
        self._synced = False
        self._expiry_handle: asyncio.TimerHandle | None = None
        self._snapshot: Instances = ()

    # -- the interface

    @property
    def healthy(self) -> bool:
        return self._http is not None and not self._failing and not self._closed

    async def start(self) -> None:
        """Find an endpoint that answers.

        Raises `ConnectError` where none does, `Unauthenticated` and `PermissionDenied` as etcd does, `ConfigError` where httpx is
        missing or an endpoint is no etcd, and `ForkedManager` in a child.
        """
        self._check()
        if self._http is not None:
            return
        async with self._starting:
            self._check()
            if self._http is not None:
                return
            http = _client(self._endpoints)
            self._loop, self._pid, self._http = asyncio.get_running_loop(), os.getpid(), http
            try:
                await self._call("kv/range", {**self._range, "count_only": True}, _Done)
                self._check()
            except BaseException as error:
                self._http = None
                await http.aclose()
                if isinstance(error, (_Away, _Refused)):
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
        except (_Away, _Refused) as error:
            raise self._cannot("register in", error, "register") from error
        self._check()
        self._own[key] = (stored, raw)
        self._withdrawn.discard(key)
        if self._rewriting:  # it may just have stored the record before this one, and after it
            self._unwritten.add(key)
        self._refresh()
        self._beat_soon()

    async def deregister(self, instance: Instance) -> None:
        self._check_process()
        key = record_key(instance)
        if self._own.pop(key, None) is None:
            return
        self._known.pop(key, None)
        self._unwritten.discard(key)
        self._refresh()
        try:
            await self._delete(key)
        except (_Away, _Refused) as error:
            # It would expire with the lease, so this is no reason to fail a shutdown.
            log.debug("cannot delete %s: %s", key, error)
            self._withdrawn.add(key)

    def watch(self, path: str | None, callback: WatchCallback) -> Watch:
        self._check()
        loop = asyncio.get_running_loop()
        watch = Watch(path, callback, loop, self._watches.discard)
        self._watches.add(watch)
        if self._synced:
            loop.call_soon(self._deliver, watch)
        else:
            self._follow_soon()
        return watch

    async def list(self, path: str | None = None) -> Instances:
        await self.start()
        if self._following is None or "read" not in self._failing:  # otherwise the follower tries all the time
            try:
                await self._read()
            except (_Away, _Refused) as error:
                if isinstance(error, _Refused) and error.code in (_PERMISSION_DENIED, _UNAUTHENTICATED):
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
        if self._expiry_handle is not None:
            self._expiry_handle.cancel()
        for task in (self._following, self._beating):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        http = self._http
        if http is None:
            return
        if self._lease:
            with contextlib.suppress(_Away, _Refused, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._call("lease/revoke", {"ID": str(self._lease)}, _Done)
        self._own.clear()
        await http.aclose()

    # -- state

    def _check(self) -> None:
        if self._closed:
            raise ManagerClosed("this discovery object is closed")
        self._check_process()

    def _check_process(self) -> None:
        if self._pid not in (0, os.getpid()):
            raise ForkedManager(
                "this discovery object belongs to the parent process; open a new one in the child",
                details={"parent": self._pid, "child": os.getpid()},
            )

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def _lost(self, what: str, error: BaseException) -> None:
        """Note that etcd cannot be read or written; the last known set stays."""
        if what == "read":
            self._synced = False
        if what not in self._failing:
            self._failing.add(what)
            known = len(self._snapshot)
            log.warning("cannot %s discovery in etcd at %s (%s); keeping %d known instances", what, self._shown, error, known)

    def _recovered(self, what: str) -> None:
        if what in self._failing:
            self._failing.discard(what)
            if what == "read":
                self._back_at = self._now()
            log.warning("can %s discovery in etcd at %s again", what, self._shown)

    def _cannot(self, what: str, error: BaseException, phase: str) -> DynwireError:
        text = f"cannot {what} etcd at {self._shown} ({SETTING}): {error}"
        code = error.code if isinstance(error, _Refused) else _UNAVAILABLE
        if code == _PERMISSION_DENIED:
            return PermissionDenied(f"{text}; its user needs to read and write keys below {self._prefix}", phase=phase)
        if code == _UNAUTHENTICATED:
            return Unauthenticated(f"{text}; a user is part of the endpoint: http://user:password@host:2379", phase=phase)
        if code == _NO_GATEWAY:
            allowed = "endpoints of etcd 3.4 or later, with --enable-grpc-gateway, which is its default"
            return ConfigError(f"{text}; allowed: {allowed}", name=SETTING, value=self._shown, allowed=allowed, phase=phase)
        return ConnectError(text, phase=phase, peer=self._shown)

    # -- asking etcd

    async def _call(self, method: str, body: dict[str, Any], kind: type[_T]) -> _T:
        """The answer of the first endpoint that gives one, beginning with the one that did last time.

        Everything that is asked may be asked twice: a lease that was granted without our hearing of it expires.
        Raises `_Away` and `_Refused`.
        """
        import httpx

        assert self._http is not None
        first, reasons = self._current, []
        for number in range(first, first + len(self._endpoints)):
            endpoint = self._endpoints[number % len(self._endpoints)]
            try:
                raw = await self._ask(endpoint, method, body)
                answer = msgspec.json.decode(raw, type=kind, strict=False)
            except httpx.TransportError as error:
                reasons.append(f"{endpoint.shown}: {_text(error)}")
            except msgspec.MsgspecError as error:
                raise _Refused(_NO_GATEWAY, f"{endpoint.shown} answers like no etcd ({error})") from error
            except _Refused as refused:
                if refused.code != _UNAVAILABLE:
                    raise
                reasons.append(f"{endpoint.shown}: {refused}")
            else:
                if self._current != number % len(self._endpoints):
                    self._current = number % len(self._endpoints)
                    self._interrupt()  # a watch there may be as silent as the one who did not answer
                return answer
        raise _Away("; ".join(reasons))

    async def _ask(self, endpoint: _Endpoint, method: str, body: dict[str, Any]) -> bytes:
        headers = await self._headers(endpoint)
        try:
            return await self._post(endpoint, method, body, headers)
        except _Refused as refused:
            if refused.code != _UNAUTHENTICATED or not endpoint.user:
                raise
        endpoint.token = ""  # it was valid for some minutes, or until etcd was started again
        return await self._post(endpoint, method, body, await self._headers(endpoint))

    async def _headers(self, endpoint: _Endpoint) -> dict[str, str]:
        if not endpoint.user:
            return {}
        if not endpoint.token:
            try:
                raw = await self._post(endpoint, "auth/authenticate", {"name": endpoint.user, "password": endpoint.password}, {})
            except _Refused as refused:
                if refused.code == _UNAVAILABLE:
                    raise
                raise _Refused(_UNAUTHENTICATED, str(refused)) from refused
            endpoint.token = msgspec.json.decode(raw, type=_Token).token
        return {"Authorization": endpoint.token}

    async def _post(self, endpoint: _Endpoint, method: str, body: dict[str, Any], headers: dict[str, str]) -> bytes:
        assert self._http is not None
        url = f"{endpoint.url}/v3/{method}"
        reply = await self._http.post(url, content=msgspec.json.encode(body), headers=headers)
        if reply.status_code != 200:
            raise _refusal(reply.status_code, reply.content)
        return reply.content

    # -- writing

    async def _granted(self) -> int:
        """The lease, a new one if there is none."""
        async with self._granting:
            self._check()
            if not self._lease:
                self._lease = (await self._call("lease/grant", {"TTL": str(math.ceil(self._ttl))}, _Lease)).ID
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
                await self._call("kv/put", body, _Done)
                return
            except _Refused as refused:
                if refused.code != _NOT_FOUND or last:
                    raise
                self._lease_lost(lease)

    async def _delete(self, key: str) -> None:
        await self._call("kv/deleterange", {"key": (self._prefix + key).encode()}, _Done)

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
            except (_Away, _Refused) as error:
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
                if (await self._call("lease/keepalive", {"ID": str(lease)}, _Kept)).result.TTL <= 0:
                    self._lease_lost(lease)
            elif not self._own:
                await self._call("kv/range", {**self._range, "count_only": True}, _Done)
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
            except (_Away, _Refused, DynwireError) as error:
                self._lost("read", error)
            except TimeoutError:
                log.debug("the watch of etcd was ended")
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_RETRY_S)

    async def _read(self) -> None:
        """Bring what is known up to date with etcd. Raises `_Away` and `_Refused`."""
        before = self._revision
        reply = await self._call("kv/range", self._range, _Range)
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

        Raises `_Away`, `_Refused`, and TimeoutError when interrupted.
        """
        import httpx

        assert self._http is not None
        endpoint = self._endpoints[self._current]
        request = {**self._range, "start_revision": str(self._revision + 1)}
        body = msgspec.json.encode({"create_request": request})
        try:
            async with asyncio.timeout(REPLY_S) as timeout:
                self._stream = timeout
                headers = await self._headers(endpoint)
                url = f"{endpoint.url}/v3/watch"
                # no limit for reading: it is silent while nothing changes
                patience = httpx.Timeout(REPLY_S, read=None, pool=None)
                async with self._http.stream("POST", url, content=body, headers=headers, timeout=patience) as reply:
                    if reply.status_code != 200:
                        raise _refusal(reply.status_code, await reply.aread())
                    async for line in reply.aiter_lines():
                        told = msgspec.json.decode(line, type=_WatchLine, strict=False)
                        if told.error is not None:
                            raise _Refused(told.error.grpc_code, told.error.message)
                        result = told.result or _Watched()
                        if result.compact_revision:
                            return
                        if result.canceled:
                            denied = "permission" in result.cancel_reason.lower()
                            raise _Refused(_PERMISSION_DENIED if denied else 0, f"it ends the watch: {result.cancel_reason}")
                        if result.created and self._stream is timeout:
                            timeout.reschedule(None)
                        self._on_events(result.events)
            # etcd was shut down, perhaps; the next reading will tell
            raise TimeoutError
        except httpx.TransportError as error:
            raise TimeoutError from error
        except msgspec.MsgspecError as error:
            raise _Refused(_NO_GATEWAY, f"{endpoint.shown} answers like no etcd ({error})") from error
        finally:
            self._stream = None

    def _on_events(self, events: Sequence[_Event]) -> None:
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

    def _refresh(self, deliver: bool = False) -> None:
        """Make the set anew from what is known, and tell the watches if it has changed."""
        if self._closed:
            return
        now = self._now()
        for key, known in tuple(self._known.items()):
            # nobody is given up while etcd is away
            if known.kept_until is not None and known.kept_until <= now and "read" not in self._failing:
                del self._known[key]
        others = (known.record.instance for key, known in self._known.items() if known.record and key not in self._own)
        fresh = ordered([*(instance for instance, _ in self._own.values()), *others])
        if fresh != self._snapshot or deliver:
            self._snapshot = fresh
            for watch in tuple(self._watches):
                # One callback each, so that an exception in one watcher's code does not keep the others from hearing.
                watch.loop.call_soon(self._deliver, watch)
        self._expire_later()

    def _expire_later(self) -> None:
        if self._expiry_handle is not None:
            self._expiry_handle.cancel()
            self._expiry_handle = None
        due = [known.kept_until for known in self._known.values() if known.kept_until is not None]
        if due and "read" not in self._failing:  # the reading after an outage sets it again
            assert self._loop is not None
            self._expiry_handle = self._loop.call_at(min(due), self._refresh)

    def _deliver(self, watch: Watch) -> None:
        if self._synced:
            watch.deliver(self._snapshot)


def _client(endpoints: tuple[_Endpoint, ...]) -> httpx.AsyncClient:
    import httpx

    # The system's certificate authorities, as for the other planes; httpx alone would bring its own list.
    verify: ssl.SSLContext | Literal[False] = False
    if any(endpoint.url.startswith("https:") for endpoint in endpoints):
        verify = ssl.create_default_context()
    return httpx.AsyncClient(
        verify=verify,
        trust_env=False,  # a proxy of the environment is for the world outside
        timeout=httpx.Timeout(REPLY_S, pool=None),
        limits=httpx.Limits(max_connections=AT_ONCE),
    )


def _refusal(status: int, content: bytes) -> _Refused:
    try:
        problem = msgspec.json.decode(content, type=_Problem)
    except msgspec.MsgspecError:
        text = f"status {status} without an error of etcd's"
        return _Refused(_UNAVAILABLE if status >= 500 else _NO_GATEWAY, text)
    # 4: no answer in time, which is what a member without a majority says
    code = _UNAVAILABLE if problem.code in (4, _UNAVAILABLE) else problem.code
    if "user name is empty" in problem.message:
        code = _UNAUTHENTICATED
    return _Refused(code, problem.message.removeprefix("etcdserver: "))


def _key(prefix: str, kv: _KeyValue) -> str:
    return kv.key.decode("utf-8", "backslashreplace").removeprefix(prefix)


def _text(error: BaseException) -> str:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return f"no answer in {REPLY_S:g} s"
    return str(error) or type(error).__name__
