"""The entry point: `NetworkManager` for threads, `AsyncNetworkManager` for asyncio. Nothing else names concrete planes."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from . import system
from .client import AsyncClient, Client
from .config import Config, load_config
from .discovery import Watch
from .endpoint import AsyncEndpoint, Endpoint
from .errors import ConfigError, DynwireError, ForkedManager, ManagerClosed
from .handlers import HandlerExecutor
from .planes.base import AsyncRequestPlaneClient, AsyncRequestPlaneServer, RequestPlaneClient, RequestPlaneServer
from .portal import Portal, check_may_block
from .runtime import LoopRuntime, Plane, Registration, Report, connections
from .service import AsyncService, Service
from .types import EndpointId, Handler, Instance

OTHER_LOOP_CLOSE_S = 5.0
"""How long closing a manager waits for its part on another event loop, which may be stuck in somebody's code."""


# Planes ------------------------------------------------------------------------------------------------------------------------


def _tcp() -> Plane:
    from .planes import tcp

    return Plane("tcp", tcp.AsyncTcpServer, tcp.AsyncTcpClient, lambda config, portal: tcp.TcpClient(config))


def _http() -> Plane:
    try:
        import h2  # noqa: F401  # brings hpack; h11 is imported when somebody speaks HTTP/1.1
    except ImportError as error:
        text = "the http plane needs h2, hpack and h11: pip install 'dynwire[http]'"
        raise ConfigError(text, name="DYN_REQUEST_PLANE", value="http", allowed="tcp, or http with its packages") from error
    from .planes import http

    return Plane("http", http.AsyncHttpServer, http.AsyncHttpClient, lambda config, portal: http.HttpClient(config))


def _nats() -> Plane:
    try:
        import nats.aio.client  # noqa: F401
    except ImportError as error:
        text = "the nats plane needs nats-py: pip install 'dynwire[nats]'"
        raise ConfigError(text, name="DYN_REQUEST_PLANE", value="nats", allowed="tcp, or nats with its packages") from error
    from .planes import nats as plane
    from .planes.portal_faces import PortalClient

    return Plane(
        "nats",
        plane.AsyncNatsServer,
        plane.AsyncNatsClient,
        lambda config, portal: PortalClient("nats", portal, lambda: plane.AsyncNatsClient(config)),
        plane.queue_instance,
    )


def _memory() -> Plane:
    from .planes import memory
    from .planes.portal_faces import PortalClient

    return Plane(
        "memory",
        memory.AsyncMemoryServer,
        memory.AsyncMemoryClient,
        lambda config, portal: PortalClient("memory", portal, lambda: memory.AsyncMemoryClient(config)),
    )


_PLANES: dict[str, Callable[[], Plane]] = {"tcp": _tcp, "http": _http, "nats": _nats, "memory": _memory}
"""Name to loader. A further plane is one entry here; what it depends on is imported when it is used."""


def load_plane(name: str) -> Plane:
    """The named plane. Raises `ConfigError` if it is not in this release."""
    loader = _PLANES.get(name)
    if loader is None:
        allowed = tuple(plane for plane in _PLANES if plane != "memory")
        raise ConfigError(
            f"DYN_REQUEST_PLANE is {name!r}: the {name} plane is not in this release; available: {', '.join(allowed)}",
            name="DYN_REQUEST_PLANE",
            value=name,
            allowed=allowed,
        )
    return loader()


# What both managers share ------------------------------------------------------------------------------------------------------


S = TypeVar("S", AsyncService, Service)
C = TypeVar("C", AsyncClient, Client)


class _Manager:
    def __init__(self, config: Config | None, overrides: dict[str, object]) -> None:
        if config is not None and overrides:
            raise ConfigError("config= and single settings exclude each other", name="config", allowed="one of the two")
        self.config = load_config(overrides) if config is None else config
        """All settings, as they were when the manager was made"""
        self._plane = load_plane(self.config.request_plane)
        self._closed = False
        self._joined = self.config.system.system_port is None
        self._lock = threading.Lock()
        self._executor: HandlerExecutor | None = None
        self._clients: weakref.WeakSet[Any] = weakref.WeakSet()
        self._services: weakref.WeakSet[Any] = weakref.WeakSet()
        _managers.add(self)

    @property
    def plane(self) -> str:
        """Name of the request plane."""
        return self._plane.name

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def _check(self) -> None:
        if self._closed:
            raise ManagerClosed("the manager is closed")

    def _reporters(self) -> Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], Report]]]:
        """What to call on which loop to know what this manager is doing. Any thread."""
        raise NotImplementedError

    def _join_system(self) -> None:
        """Before serving and calling: open the system port if the process is to have one. Raises `BindError`, `ConfigError`."""
        self._check()
        if not self._joined:
            system.join(self, self.config)
            self._joined = True

    def _handler_executor(self) -> HandlerExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = HandlerExecutor(self.config.handler_threads)
            return self._executor

    def _remember_service(self, service: S) -> S:
        with self._lock:
            self._services.add(service)
        return service

    def _remember_client(self, client: C) -> C:
        with self._lock:
            self._clients.add(client)
        return client

    def _forget(self, client: AsyncClient | Client) -> None:
        with self._lock:
            self._clients.discard(client)

    def _detach_clients(self) -> None:
        with self._lock:
            clients = tuple(self._clients)
            self._clients.clear()
        for client in clients:
            client._detach()

    def _close_executor(self) -> None:
        with self._lock:
            executor = self._executor
        if executor is not None:
            executor.close()

    def _after_fork(self) -> None:
        """In the child, with no other thread: what was the parent's stays the parent's."""
        self._lock = threading.Lock()
        self._joined = self.config.system.system_port is None
        self._executor = None
        for service in self._services:
            service._forked = True
        self._services = weakref.WeakSet()
        for client in self._clients:
            client._forget_after_fork()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.plane}{' closed' if self._closed else ''}>"


_managers: weakref.WeakSet[_Manager] = weakref.WeakSet()

_inherited: list[object] = []
"""In a forked child: event loops, sockets and discovery objects of the parent. Their destructors must not run here, because
they would act on what the two processes share (epoll sets, connections, records in discovery)."""


class AsyncNetworkManager(_Manager):
    """Serves and calls endpoints from asyncio code, on any number of event loops, each with its own connections.

    Settings come from the environment now, not at import (`dynwire.config.load_config`); keywords override them, ``config``
    replaces them. Nothing is connected or started before it is used. Raises `ConfigError`. In the child of a fork every
    method raises `ForkedManager`.
    """

    def __init__(self, config: Config | None = None, **overrides: object) -> None:
        self._forked = False
        self._runtimes: dict[asyncio.AbstractEventLoop, LoopRuntime] = {}
        super().__init__(config, overrides)

    def endpoint(self, path: str | EndpointId) -> AsyncEndpoint:
        """The endpoint ``namespace.component.endpoint``, with ``dyn://`` or without. Raises `ConfigError`."""
        self._check()
        return AsyncEndpoint(self, path)

    def server(self) -> AsyncRequestPlaneServer:
        """The plane's server on the running loop, the one that `serve` uses; it is started there or by its ``start``."""
        self._join_system()
        return self._local_runtime().server()

    def create_client(self) -> AsyncRequestPlaneClient:
        """A new client of the plane for the running loop: connections by instance, below discovery and routing."""
        self._join_system()
        return self._local_runtime().create_client()

    async def list_instances(self, path: str | EndpointId | None = None) -> tuple[Instance, ...]:
        """What discovery knows: instances of one endpoint, or all."""
        runtime = await self._runtime()
        discovery = await runtime.discovery()
        return await discovery.list(None if path is None else str(_parsed(path)))

    async def watch_instances(
        self, callback: Callable[[tuple[Instance, ...]], object], path: str | EndpointId | None = None
    ) -> Watch:
        """Call ``callback`` with the instances of one endpoint, or with all, before this returns and whenever they change.

        On the running loop, until the returned watch is cancelled (``cancel()``) or the manager closes.
        """
        runtime = await self._runtime()
        return await runtime.watch(None if path is None else str(_parsed(path)), callback)

    async def close(self, grace: float = 0.0) -> None:
        """Drain all services for up to ``grace`` seconds, end the calls in flight with `ManagerClosed`, close everything.

        Any loop; parts on other running loops are closed there. May be called twice.
        """
        if self._forked or self._closed:
            self._closed = True
            return
        self._closed = True
        self._detach_clients()
        await self._bury_dead()
        with self._lock:
            runtimes = tuple(self._runtimes.values())
        here = asyncio.get_running_loop()
        elsewhere = [
            asyncio.wrap_future(asyncio.run_coroutine_threadsafe(runtime.close(grace), runtime.loop))
            for runtime in runtimes
            if runtime.loop is not here and runtime.loop.is_running()
        ]
        try:
            for runtime in runtimes:
                if runtime.loop is here:
                    await runtime.close(grace)
            if elsewhere:
                await asyncio.wait(elsewhere, timeout=OTHER_LOOP_CLOSE_S + grace)
        finally:
            self._runtimes.clear()  # not earlier: a drain is to be seen at the system port
            system.leave(self)
            self._close_executor()

    def _reporters(self) -> Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], Report]]]:
        with self._lock:
            return [(runtime.loop, runtime.report) for runtime in self._runtimes.values()]

    async def __aenter__(self) -> AsyncNetworkManager:
        self._check()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _check(self) -> None:
        if self._forked:
            raise ForkedManager(
                "this AsyncNetworkManager was made before fork(); its event loop and connections are the parent's. "
                "Make a new one in the child"
            )
        super()._check()

    def _local_runtime(self) -> LoopRuntime:
        """The running loop's part, made at first use."""
        self._check()
        loop = asyncio.get_running_loop()
        found = self._runtimes.get(loop)
        if found is None:
            with self._lock:
                found = self._runtimes[loop] = LoopRuntime(self.config, self._plane)
        return found

    async def _runtime(self) -> LoopRuntime:
        runtime = self._local_runtime()
        if len(self._runtimes) > 1:
            await self._bury_dead()
        return runtime

    async def _bury_dead(self) -> None:
        """Close what belongs to loops that were closed without closing the manager."""
        with self._lock:
            dead = [r for r in self._runtimes.values() if r.loop.is_closed()]
            for found in dead:
                del self._runtimes[found.loop]
        for found in dead:
            await found.abandon()

    def _after_fork(self) -> None:
        self._forked = True
        _inherited.append(self._runtimes)
        self._runtimes = {}
        super()._after_fork()


class NetworkManager(_Manager):
    """Blocking twin of `AsyncNetworkManager`: serves and calls endpoints from any number of threads.

    Serving and discovery run on one background event loop, started at first use; calls on the tcp plane do their own I/O.
    Methods raise `RuntimeError` in a thread that runs an event loop. In the child of a fork it works afresh for calls, with
    its own connections, and the parent's services stay the parent's.
    """

    def __init__(self, config: Config | None = None, **overrides: object) -> None:
        self._portal = Portal()
        self._loop_runtime: LoopRuntime | None = None
        self._plane_clients: dict[str, RequestPlaneClient] = {}
        self._handed_out: list[RequestPlaneClient] = []
        self._server_face: RequestPlaneServer | None = None
        super().__init__(config, overrides)

    def endpoint(self, path: str | EndpointId) -> Endpoint:
        """The endpoint ``namespace.component.endpoint``, with ``dyn://`` or without. Raises `ConfigError`."""
        self._check()
        return Endpoint(self, path)

    def server(self) -> RequestPlaneServer:
        """The plane's server, the one that `serve` uses, by its blocking interface."""
        from .planes.portal_faces import PortalServer

        self._join_system()
        runtime = self._runtime()
        with self._lock:
            if self._server_face is None:
                self._server_face = PortalServer(self._portal, runtime.server())
            return self._server_face

    def create_client(self) -> RequestPlaneClient:
        """A new client of the plane: connections by instance, below discovery and routing."""
        self._join_system()
        client = self._plane.client(self.config, self._portal)
        with self._lock:
            self._handed_out.append(client)
        return client

    def list_instances(self, path: str | EndpointId | None = None) -> tuple[Instance, ...]:
        """What discovery knows: instances of one endpoint, or all."""
        wanted = None if path is None else str(_parsed(path))
        runtime = self._runtime()

        async def listed() -> tuple[Instance, ...]:
            discovery = await runtime.discovery()
            return await discovery.list(wanted)

        return self._portal.run(listed)

    def close(self, grace: float = 0.0) -> None:
        """Drain all services for up to ``grace`` seconds, end the calls in flight with `ManagerClosed`, close everything.

        Any thread, except the background event loop's own. May be called twice.
        """
        check_may_block()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clients = (*self._plane_clients.values(), *self._handed_out)
            self._plane_clients = {}
            self._handed_out = []
        self._detach_clients()
        try:
            if self._loop_runtime is not None and self._loop_runtime.registrations:
                self._portal.run(self._loop_runtime.drain_all, grace)
            for client in clients:
                client.close()
            if self._loop_runtime is not None:
                self._portal.run(self._loop_runtime.close)
        finally:
            system.leave(self)
            self._portal.close()
            self._close_executor()
            _open.discard(self)

    def _reporters(self) -> Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], Report]]]:
        runtime = self._loop_runtime
        return () if runtime is None else ((runtime.loop, self._report),)

    def _report(self) -> Report:
        """On the background loop: its part, and the clients of the threads."""
        from .planes.portal_faces import PortalClient

        assert self._loop_runtime is not None
        report = self._loop_runtime.report()
        with self._lock:
            clients = (*self._plane_clients.values(), *self._handed_out)
        for client in clients:
            # a blocking face would wait for the loop that this is
            stats = client.async_client().stats() if isinstance(client, PortalClient) else client.stats()
            report.clients.extend(connections(stats))
        return report

    def __enter__(self) -> NetworkManager:
        self._check()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _runtime(self) -> LoopRuntime:
        """The background loop's part; starts the loop."""
        self._check()
        runtime = self._loop_runtime
        if runtime is None:
            made = self._portal.run(self._make_runtime)
            with self._lock:
                runtime = self._loop_runtime = self._loop_runtime or made
            # Open managers stay until they are closed or the interpreter exits, like the thread they have started.
            _open.add(self)
        return runtime

    async def _make_runtime(self) -> LoopRuntime:
        return LoopRuntime(self.config, self._plane)

    def _plane_client(self, codec: str) -> RequestPlaneClient:
        self._check()
        with self._lock:
            found = self._plane_clients.get(codec)
            if found is None:
                config = self.config if codec == self.config.codec else _with_codec(self.config, codec)
                found = self._plane_clients[codec] = self._plane.client(config, self._portal)
            return found

    def _watch(self, path: str, callback: Callable[[tuple[Instance, ...]], object]) -> Watch:
        return self._portal.run(self._runtime().watch, path, callback)

    def _serve(self, endpoint: EndpointId, handler: Handler, metadata: dict[str, Any]) -> tuple[LoopRuntime, Registration]:
        runtime = self._runtime()
        return runtime, self._portal.run(runtime.serve, endpoint, handler, metadata)

    def _after_fork(self) -> None:
        _inherited.extend((self._portal, self._loop_runtime, self._plane_clients, self._handed_out, self._server_face))
        self._portal = Portal()
        self._loop_runtime = None
        self._plane_clients = {}
        self._handed_out = []
        self._server_face = None
        super()._after_fork()


def _with_codec(config: Config, codec: str) -> Config:
    from dataclasses import replace

    return replace(config, codec=codec)


def _parsed(path: str | EndpointId) -> EndpointId:
    return path if isinstance(path, EndpointId) else EndpointId.parse(path)


# Process-wide ------------------------------------------------------------------------------------------------------------------

_open: set[NetworkManager] = set()
_global_lock = threading.Lock()
_global: NetworkManager | None = None
_global_async: AsyncNetworkManager | None = None


def get_manager() -> NetworkManager:
    """The process-wide `NetworkManager`, made from the environment at first use and again after it was closed. Any thread."""
    global _global
    with _global_lock:
        if _global is None or _global.closed:
            _global = NetworkManager()
        return _global


def get_async_manager() -> AsyncNetworkManager:
    """The process-wide `AsyncNetworkManager`, made from the environment at first use and again after it was closed or forked."""
    global _global_async
    with _global_lock:
        if _global_async is None or _global_async.closed:
            _global_async = AsyncNetworkManager()
        return _global_async


def _after_fork_in_child() -> None:
    global _global_lock, _global_async
    system.after_fork_in_child()
    _global_lock = threading.Lock()
    _inherited.append(_global_async)
    _global_async = None
    _open.clear()
    for manager in tuple(_managers):
        manager._after_fork()


def _at_exit() -> None:
    """Leave discovery and say goodbye to the peers. The threads are daemons, so nothing here is needed for exiting."""
    for manager in tuple(_open):
        with contextlib.suppress(DynwireError, RuntimeError):  # nobody is left to tell
            manager.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
