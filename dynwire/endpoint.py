"""A name to serve or to call: `AsyncEndpoint` and `Endpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .client import AsyncClient, Client
from .codec import check_codec
from .handlers import prepare
from .migration import Resume
from .service import AsyncService, Service
from .types import EndpointId, Handler, Instance

if TYPE_CHECKING:
    from .kv_router.router import KvRouterSettings
    from .manager import AsyncNetworkManager, NetworkManager

MAX_IN_FLIGHT = 65536


class _Endpoint:
    _manager: AsyncNetworkManager | NetworkManager

    def __init__(self, manager: Any, path: str | EndpointId) -> None:
        self._manager = manager
        self.id = path if isinstance(path, EndpointId) else EndpointId.parse(path)
        """namespace, component and name"""

    @property
    def path(self) -> str:
        """``namespace.component.endpoint``"""
        return str(self.id)

    def _handler(self, function: Callable[..., Any], request_type: Any, codec: str | None, max_in_flight: int | None) -> Handler:
        manager = self._manager
        return prepare(
            function,
            manager._handler_executor,
            request_type=request_type,
            codec=codec or manager.config.codec,
            max_in_flight=MAX_IN_FLIGHT if max_in_flight is None else max_in_flight,
        )

    def _codec(self, codec: str | None) -> str:
        return self._manager.config.codec if codec is None else check_codec(codec)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}>"


class AsyncEndpoint(_Endpoint):
    """``namespace.component.endpoint`` of an `AsyncNetworkManager`."""

    _manager: AsyncNetworkManager

    async def serve(
        self,
        handler: Callable[..., Any],
        *,
        request_type: Any = None,
        codec: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        max_in_flight: int | None = None,
    ) -> AsyncService:
        """Serve the endpoint on the running loop and register it; the first one starts the server.

        ``handler(request)`` or ``handler(request, context)`` is a coroutine function, async generator function, plain function
        or generator function; the last two run in a bounded pool of threads. ``request_type`` is a type for msgspec to decode
        requests into, ``codec`` what raw requests are answered in if the reply is not bytes-like, ``metadata`` goes into the
        instance's record. More than ``max_in_flight`` requests at once are refused with `Overloaded`.

        Raises `ConfigError` (wrong handler, endpoint served already), `BindError`, `ConnectError` from discovery.
        """
        manager = self._manager
        manager._join_system()
        prepared = self._handler(handler, request_type, codec, max_in_flight)
        runtime = await manager._runtime()
        registration = await runtime.serve(self.id, prepared, dict(metadata or {}))
        return manager._remember_service(AsyncService(runtime, registration))

    async def client(
        self,
        router: str = "round_robin",
        codec: str | None = None,
        migration_limit: int = 0,
        resume: Resume | None = None,
        kv_settings: KvRouterSettings | None = None,
        accepts: Callable[[Instance], bool] | None = None,
    ) -> AsyncClient:
        """A client of the endpoint that follows its instances from now on.

        ``router`` is round_robin, random, p2c, least_loaded, direct (each call names its ``instance``) or kv (by what the
        workers have cached of a request's ``token_ids``; ``kv_settings`` are for it). ``codec`` is for
        payloads that are not bytes-like. With ``migration_limit`` > 0 a stream that loses its worker continues on another one,
        that many times at most: ``resume(payload, delivered)`` makes the request for the rest; the default knows requests
        with ``token_ids`` (`dynwire.migration.resume_tokens`). ``accepts`` says which instances the client sees at all, for
        endpoints whose instances are not alike; it is asked at every change of discovery. Raises `ConfigError`.
        """
        manager = self._manager
        manager._join_system()
        if router == "kv":
            from .kv_router.client import KvAsyncClient

            kv = KvAsyncClient(manager, self.path, self._codec(codec), migration_limit, resume, kv_settings, accepts)
            await kv.start()
            manager._remember_client(kv)
            return kv
        client = AsyncClient(manager, self.path, router, self._codec(codec), migration_limit, resume, accepts)
        await client._route()
        manager._remember_client(client)
        return client


class Endpoint(_Endpoint):
    """Blocking twin of `AsyncEndpoint`; any thread may use it."""

    _manager: NetworkManager

    def serve(
        self,
        handler: Callable[..., Any],
        *,
        request_type: Any = None,
        codec: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        max_in_flight: int | None = None,
    ) -> Service:
        """Serve the endpoint in the background and register it; see `AsyncEndpoint.serve`. Returns at once.

        Async handlers run on the manager's background event loop, plain ones in its threads.
        """
        manager = self._manager
        manager._join_system()
        prepared = self._handler(handler, request_type, codec, max_in_flight)
        runtime, registration = manager._serve(self.id, prepared, dict(metadata or {}))
        return manager._remember_service(Service(manager, runtime, registration))

    def client(
        self,
        router: str = "round_robin",
        codec: str | None = None,
        migration_limit: int = 0,
        resume: Resume | None = None,
        kv_settings: KvRouterSettings | None = None,
    ) -> Client:
        """A client of the endpoint that follows its instances from now on; see `AsyncEndpoint.client`."""
        manager = self._manager
        manager._join_system()
        if router == "kv":
            from .kv_router.client import KvClient

            kv = KvClient(manager, self.path, self._codec(codec), migration_limit, resume, kv_settings)
            kv.start()
            manager._remember_client(kv)
            return kv
        client = Client(manager, self.path, router, self._codec(codec), migration_limit, resume)
        client._route()
        manager._remember_client(client)
        return client
