"""What a manager keeps per event loop: discovery, the plane's server and clients, registrations. And routes to endpoints.

Knows the planes by their interfaces only; the manager says which one it is.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .calls import Attempts, remaining_timeout
from .config import Config
from .discovery import Discovery, Watch, open_discovery
from .errors import DynwireError, ManagerClosed, NoInstances, PlaneMismatch
from .planes.base import AsyncRequestPlaneClient, AsyncRequestPlaneServer, RequestPlaneClient
from .portal import Portal
from .routing import Entry, InstanceTable
from .types import EndpointId, Handler, Instance, Timeouts

CHOOSING_ROUTERS = ("direct", "kv")
"""routers whose requests are for the instance that they name, and for no other: they go past a queue"""

LINGER_S = 0.25
"""How long a draining service still accepts after it left discovery: until callers have heard of it."""


@dataclass(frozen=True)
class Plane:
    """One request plane: how to make its servers and clients. The async ones are called on their event loop."""

    name: str
    server: Callable[[Config], AsyncRequestPlaneServer]
    async_client: Callable[[Config], AsyncRequestPlaneClient]
    client: Callable[[Config, Portal], RequestPlaneClient]
    queue: Callable[[Config, str], Instance | None] = lambda config, path: None
    """what stands for all instances of an endpoint where requests are queued for whichever takes them; None otherwise"""


class Closing(Protocol):
    """What is closed with the manager. Its ``close`` may be called twice."""

    async def close(self) -> None: ...


class Registration:
    """One endpoint that this process serves: the common part of `Service` and `AsyncService`."""

    def __init__(self, path: str, instance: Instance) -> None:
        self.path = path
        self.instance = instance
        self.ready = True
        self.ended: asyncio.Future[int] | None = None


@dataclass(frozen=True)
class Served:
    """One endpoint, at one moment."""

    instance: Instance
    ready: bool
    in_flight: int


@dataclass(frozen=True)
class Report:
    """What one loop's part of a manager is doing, for monitoring."""

    plane: str
    served: tuple[Served, ...]
    starting: int
    """services that are being started"""
    has_served: bool
    server: list[dict[str, Any]]
    """counters, by connection"""
    clients: list[dict[str, Any]]


def connections(stats: dict[str, Any]) -> list[dict[str, Any]]:
    """Counters of each connection of a client: planes with sockets have a list per address, the others one link."""
    if all(isinstance(value, list) for value in stats.values()):
        return [connection for found in stats.values() for connection in found]
    return [stats]


class LoopRuntime:
    """Everything of a manager that lives on one event loop. All methods: that loop's thread."""

    def __init__(self, config: Config, plane: Plane) -> None:
        self.loop = asyncio.get_running_loop()
        self.config = config
        self.plane = plane
        self.registrations: set[Registration] = set()
        self.starting = 0
        self.has_served = False
        self.closed = False
        self._lock = asyncio.Lock()
        self._discovery: Discovery | None = None
        self._server: AsyncRequestPlaneServer | None = None
        self._clients: dict[str, AsyncRequestPlaneClient] = {}
        self._handed_out: list[AsyncRequestPlaneClient] = []
        self._further: list[Closing] = []

    def _check_open(self) -> None:
        if self.closed:
            raise ManagerClosed("the manager is closed")

    async def discovery(self) -> Discovery:
        """The discovery object, started."""
        self._check_open()
        if self._discovery is not None:
            return self._discovery
        async with self._lock:
            self._check_open()
            if self._discovery is None:
                settings = self.config.discovery
                discovery = open_discovery(
                    settings.backend,
                    file_dir=settings.file_dir,
                    ttl=settings.ttl,
                    nats=self.config.nats,
                    etcd=settings.etcd_endpoints,
                )
                await discovery.start()
                self._discovery = discovery
            return self._discovery

    def client(self, codec: str) -> AsyncRequestPlaneClient:
        """The plane's client for payloads in this codec, made at first use."""
        self._check_open()
        found = self._clients.get(codec)
        if found is None:
            config = self.config if codec == self.config.codec else replace(self.config, codec=codec)
            found = self._clients[codec] = self.plane.async_client(config)
        return found

    def create_client(self) -> AsyncRequestPlaneClient:
        """A further client of the plane, closed with the manager if its owner does not close it earlier."""
        self._check_open()
        client = self.plane.async_client(self.config)
        self._handed_out.append(client)
        return client

    def close_later(self, thing: Closing) -> None:
        """Close this too when the manager is closed, before everything else."""
        self._check_open()
        self._further.append(thing)

    def server(self) -> AsyncRequestPlaneServer:
        """The plane's server, made at first use and started by the first `serve`."""
        self._check_open()
        if self._server is None:
            self._server = self.plane.server(self.config)
        return self._server

    async def watch(self, path: str | None, callback: Callable[[tuple[Instance, ...]], object]) -> Watch:
        """Call ``callback`` with the instances of ``path``, before this returns and whenever they change."""
        discovery = await self.discovery()
        callback(await discovery.list(path))
        return discovery.watch(path, lambda instances: (callback(instances), None)[1])

    async def serve(self, endpoint: EndpointId, handler: Handler, metadata: dict[str, Any] | None) -> Registration:
        """Start the server if it is the first endpoint, add the endpoint, register the instance."""
        self.starting += 1
        try:
            return await self._serve(endpoint, handler, metadata)
        finally:
            self.starting -= 1

    async def _serve(self, endpoint: EndpointId, handler: Handler, metadata: dict[str, Any] | None) -> Registration:
        path = str(endpoint)
        discovery = await self.discovery()
        server = self.server()
        async with self._lock:
            await server.start()
        server.add_endpoint(path, handler)
        instance = Instance(
            id=secrets.randbits(64),
            namespace=endpoint.namespace,
            component=endpoint.component,
            endpoint=endpoint.name,
            plane=self.plane.name,
            address=server.address,
            metadata=dict(metadata or {}),
            started_at=time.time(),
        )
        registration = Registration(path, instance)
        try:
            await server.endpoint_added(path)
            await discovery.register(instance)
            self._check_open()
        except BaseException:  # cancellation included: an endpoint without a record would be served for ever
            await server.remove_endpoint(path)
            raise
        self.registrations.add(registration)
        self.has_served = True
        return registration

    def report(self) -> Report:
        """What is going on."""
        server = None if self.closed else self._server
        served = tuple(
            Served(r.instance, r.ready, 0 if server is None else server.in_flight(r.path)) for r in tuple(self.registrations)
        )
        clients = [found for client in (*self._clients.values(), *self._handed_out) for found in connections(client.stats())]
        stats = [] if server is None else server.stats()
        return Report(self.plane.name, served, self.starting, self.has_served, stats, clients)

    async def drain(self, registration: Registration, grace: float, linger: float = LINGER_S) -> int:
        """Not ready, deregister, keep accepting for a moment, wait for what is in flight, remove. Returns how many were killed.

        A second call waits for the first one; with a grace of 0 it ends the first one's patience.
        """
        if registration.ended is not None and (grace > 0 or registration.ended.done()):
            return await asyncio.shield(registration.ended)
        first = registration.ended is None
        if registration.ended is None:
            registration.ended = self.loop.create_future()
        ended = registration.ended
        killed = 0
        try:
            registration.ready = False
            deadline = self.loop.time() + grace
            if first and self._discovery is not None:
                await self._discovery.deregister(registration.instance)
            if first and grace > 0:
                await asyncio.sleep(min(linger, grace))
            if self._server is not None and registration in self.registrations:
                killed = await self._server.remove_endpoint(registration.path, max(0.0, deadline - self.loop.time()))
        finally:
            self.registrations.discard(registration)
            if not ended.done():
                ended.set_result(killed)
        return killed

    async def drain_all(self, grace: float) -> None:
        """Drain all services at once."""
        if self.registrations:
            await asyncio.gather(*(self.drain(r, grace) for r in tuple(self.registrations)))

    async def abandon(self) -> None:
        """The loop was closed without closing this; called on another one. Closes sockets and withdraws records.

        Nothing of it runs any more, and with the loop closed it could not wait for anything either.
        """
        self.closed = True
        for registration in self.registrations:
            registration.ready = False
        self.registrations.clear()
        await self._close_parts()

    async def _close_parts(self) -> None:
        for thing in self._further:
            await thing.close()
        self._further.clear()
        if self._server is not None:
            await self._server.close()
        for client in (*self._clients.values(), *self._handed_out):
            await client.close()
        self._clients.clear()
        self._handed_out.clear()
        if self._discovery is not None:
            await self._discovery.close()

    async def close(self, grace: float = 0.0) -> None:
        """Drain the services, then close server, clients and discovery. May be called twice."""
        if self.closed:
            return
        await self.drain_all(grace)
        self.closed = True
        await self._close_parts()


# Routes ------------------------------------------------------------------------------------------------------------------------


class Route:
    """The instances of one endpoint as one client sees them. Any thread, apart from ``watch``, which is its loop's."""

    __slots__ = (
        "_accepts",
        "_aside",
        "_foreign",
        "_listeners",
        "_lock",
        "_ring",
        "here",
        "loop",
        "path",
        "plane",
        "queue",
        "table",
        "turn",
        "watch",
    )

    def __init__(
        self,
        path: str,
        router: str,
        plane: str,
        make_channel: Callable[[Instance], Any],
        accepts: Callable[[Instance], bool] | None = None,
        queue: Instance | None = None,
    ) -> None:
        self._accepts = accepts
        self.path = path
        self.plane = plane
        self.table = InstanceTable(path, router, make_channel)
        self.turn: Callable[[], Any] | None = None
        """Next channel, for the hot path; None if there is no healthy instance or one that failed is to be tried again"""
        self.watch: Watch | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.here: object = None
        """what `portal.where` returns on its loop"""
        self._lock = threading.Lock()
        self._ring: tuple[Entry, ...] = ()
        self._aside = False
        self._foreign: tuple[Instance, ...] = ()
        self.queue: Entry | None = None
        """what requests go to that name no instance, whether there are instances or not; never set aside"""
        if queue is not None and router not in CHOOSING_ROUTERS:
            queues = InstanceTable(path, "round_robin", make_channel)
            queues.update([queue])
            self.queue = queues.entries[0]
        self._listeners: set[Callable[[], object]] = set()

    def update(self, instances: tuple[Instance, ...]) -> None:
        """Take over what discovery says. Instances on another plane are only remembered, for the error that names them."""
        if self._accepts is not None:
            instances = tuple(filter(self._accepts, instances))
        self.table.update([i for i in instances if i.plane == self.plane])
        self._foreign = tuple(i for i in instances if i.plane != self.plane)
        self._settle()
        for listener in tuple(self._listeners):
            listener()

    def _settle(self) -> None:
        """Find the cheapest way to choose that is right now."""
        # Locked: an update and a failure may come from two threads, and the older view must not be stored last.
        with self._lock:
            if self.queue is not None:
                self.turn = None if self._mismatched() else self._queue_channel
                return
            entries = self.table.entries
            aside = [entry.retry_at for entry in entries if entry.retry_at]
            if self.turn is not None and not aside and not self._aside and entries == self._ring:
                return  # discovery said the same again: the round goes on
            self._ring, self._aside = entries, bool(aside)
            healthy = [entry for entry in entries if not entry.retry_at]
            if not healthy:
                self.turn = None
                return
            choose: Callable[[], Any] = self._pick_channel
            if self.table.router == "round_robin":
                # What the router would do, in one C call. A random start, as there: many short-lived clients spread.
                start = secrets.randbelow(len(healthy))
                choose = itertools.cycle([e.channel for e in (*healthy[start:], *healthy[:start])]).__next__
            self.turn = functools.partial(self._turn_until, min(aside), choose) if aside else choose

    def _mismatched(self) -> bool:
        return bool(self._foreign) and not len(self.table)

    def _queue_channel(self) -> Any:
        assert self.queue is not None
        return self.queue.channel

    def pick(self, exclude: Collection[int], instance: int | None) -> Entry:
        """The next choice; raises `NoInstances`, or `PlaneMismatch` if nobody would ever take a queued request."""
        if self.queue is None or instance is not None:
            return self.table.pick(exclude, instance)
        if self.queue.instance.id in exclude or self._mismatched():
            raise self.explain(NoInstances(f"the queue of {self.path} was tried just now", endpoint=self.path))
        return self.queue

    def _pick_channel(self) -> Any:
        return self.table.pick().channel

    def _turn_until(self, due: float, choose: Callable[[], Any]) -> Any:
        """Choose among the healthy ones; from ``due`` on the slow path has to try out one that was set aside."""
        if time.monotonic() >= due:
            self.turn = None
        return choose()

    def entry_of(self, channel: Any) -> Entry | None:
        """The entry of a channel that `turn` returned; None if it left in the meantime."""
        if self.queue is not None and channel is self.queue.channel:
            return self.queue
        return next((e for e in self.table.entries if e.has_channel and e.channel is channel), None)

    def succeeded(self, entry: Entry) -> None:
        """A request got its reply."""
        if entry is self.queue:
            return
        self.table.report_success(entry)
        if self.turn is None:
            self._settle()

    def failed(self, entry: Entry, error: DynwireError) -> None:
        """A request failed."""
        if entry is self.queue:
            return  # one worker's failure is not the queue's
        self.table.report_failure(entry, error)
        if entry.retry_at:
            self._settle()

    def after_turn(self, channel: Any, error: DynwireError | None) -> tuple[Entry, DynwireError | None] | None:
        """The channel of a turn was not ready (no error), or the attempt failed: what `attempts` has to know about it.

        Raises ``error`` if it is the caller's.
        """
        entry = None if channel is None else self.entry_of(channel)
        if entry is not None and error is not None:
            self.failed(entry, error)
        if error is not None and (error.sent != "no" or not error.retryable):
            raise error
        return None if entry is None else (entry, error)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The instances that can be called, set aside or not."""
        return tuple(entry.instance for entry in self.table.entries)

    def listen(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call ``listener`` after every update; returns what ends that."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def explain(self, error: NoInstances) -> DynwireError:
        """``error``, or a better one if the endpoint is served, but on another plane."""
        if self._foreign and not len(self.table):
            other = self._foreign[0]
            return PlaneMismatch(
                f"{self.path} is served on the {other.plane} plane, this side uses the {self.plane} plane; "
                f"set DYN_REQUEST_PLANE to the same value on both sides",
                ours=self.plane,
                theirs=other.plane,
                peer=other.address,
                phase="route",
            )
        return error

    def missing(self, count: int, timeout: float | None) -> DynwireError:
        """The error of `wait_for_instances` that ran out of time."""
        found = len(self.table)
        return self.explain(
            NoInstances(
                f"{found} of the {count} wanted instances of {self.path} appeared within {timeout:g} s"
                if timeout is not None
                else f"{found} of the {count} wanted instances of {self.path} are there",
                endpoint=self.path,
                details={"known": found, "wanted": count},
            )
        )


Step = tuple[Entry, Timeouts | float | None] | float


def attempts(
    route: Route,
    timeout: Timeouts | float | None,
    deadline: float | None,
    instance: int | None,
    clock: Callable[[], float],
    first: tuple[Entry, DynwireError | None] | None = None,
    exclude: frozenset[int] = frozenset(),
    course: Attempts | None = None,
) -> Generator[Step, Any, Any]:
    """The course of a call: which instance to try, how long to pause, when to give up. Both faces drive this generator.

    Yields ``(entry, timeouts)`` to be tried, whose result is sent in or whose `DynwireError` is thrown in, or seconds to sleep.
    Returns the first result. ``first`` is a choice that was made before, with the error of its attempt or None if it was not
    tried: a router's choice counts only once. ``exclude`` names instances that are left out as long as there are others.
    ``course`` is what came before, of a stream that is opened anew.
    """
    if course is None:
        course = Attempts(deadline)
    chosen: Entry | None = None
    if first is not None:
        chosen, error = first
        if error is not None:
            if not course.again(error, chosen.instance.id, len(route.table), clock()):
                raise error
            chosen = None
    course.tried |= exclude
    while True:
        try:
            entry = route.pick(course.tried, instance) if chosen is None else chosen
        except NoInstances as none:
            if exclude:  # the others are gone: rather the ones we know less good about than none
                course.tried -= exclude
                exclude = frozenset()
                continue
            pause = course.pause(clock())
            if pause is None:
                if course.last_error is not None:
                    raise course.last_error  # noqa: B904  # its own cause, a foreign exception, says more than "no instances"
                raise route.explain(none) from None
            yield pause
            continue
        chosen = None
        try:
            result = yield entry, remaining_timeout(timeout, deadline, clock())
        except DynwireError as error:
            route.failed(entry, error)
            if not course.again(error, entry.instance.id, len(route.table), clock()):
                raise
        else:
            route.succeeded(entry)
            return result
