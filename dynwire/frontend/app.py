"""The frontend as an ASGI application: routes, admission, life."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import orjson

from .._version import __version__
from ..config import Config
from ..errors import ConfigError
from ..kv_router.metrics import values, worker_states
from ..manager import AsyncNetworkManager
from .completions import Completions
from .exchange import JSON, Exchange, Receive, Scope, Send
from .keys import Keys
from .metrics import Exposition, Metrics
from .models import Model, Registry
from .openapi import document
from .problems import ApiError, model_not_found

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger("dynwire.frontend")

PUBLIC = frozenset({"/", "/health", "/live", "/metrics", "/openapi.json"})
"""paths that need no key: for browsers, balancers and monitoring; none of them shows a prompt or an answer"""


class Frontend:
    """The application. Made for one event loop: `startup` and `shutdown` run there, by ASGI's lifespan or by hand.

    The two routes that make answers are called before Starlette's routing and middleware, whose wrappers around ``send`` would
    cost as much per token as everything else; the rest is Starlette.
    """

    def __init__(self, config: Config) -> None:
        """Raises `ConfigError` if a package is missing or settings do not go together."""
        self.config = config
        self.metrics = Metrics()
        settings = config.frontend
        self.keys = Keys.from_config(settings)
        self.manager = AsyncNetworkManager(config=config)
        self.registry = Registry(self.manager, self.metrics)
        self.draining = False
        self.completions = Completions(
            self.registry,
            self.metrics,
            self._admit,
            body_limit=int(settings.body_limit_mb * 1024 * 1024),
            timeout=settings.request_timeout,
            busy_threshold=settings.busy_threshold,
            retry_after=settings.retry_after,
        )
        self._exposition = Exposition(self.metrics, lambda: self.registry.models)
        self._hot = {"/v1/chat/completions": self.completions.chat, "/v1/completions": self.completions.completions}
        self._starlette = self._make_starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            hot = self._hot.get(scope["path"])
            if hot is not None:
                await hot(scope, receive, send)
                return
        await self._starlette(scope, receive, send)

    # Life

    async def startup(self) -> None:
        """Follow discovery. Raises what discovery raises."""
        await self.registry.start()

    async def drain(self, grace: float) -> bool:
        """Refuse new requests and wait up to ``grace`` seconds for those in flight; whether all have ended."""
        self.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        while self.metrics.in_flight and loop.time() < end:  # noqa: ASYNC110  # the hot path has nothing to tell anybody
            await asyncio.sleep(min(0.02, max(0.0, end - loop.time())))
        return not self.metrics.in_flight

    async def shutdown(self) -> None:
        """Let go of everything; answers in flight end with an error event. May be called twice."""
        self.draining = True
        self.completions.watchers.close()
        await self.registry.close()
        await self.manager.close()

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        await self.startup()
        try:
            yield
        finally:
            await self.shutdown()

    # Admission

    def _admit(self, exchange: Exchange) -> None:
        self.keys.check(exchange.headers)
        settings = self.config.frontend
        if self.draining:
            raise ApiError(503, "the frontend is shutting down", code="shutting_down", retry_after=settings.retry_after)
        if self.metrics.in_flight >= settings.max_in_flight:
            raise ApiError(
                429,
                f"{self.metrics.in_flight} requests are in flight, the limit is {settings.max_in_flight} "
                "(DYNWIRE_FRONTEND_MAX_IN_FLIGHT)",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=settings.retry_after,
            )

    # The other routes

    def _make_starlette(self) -> Any:
        try:
            from starlette.applications import Starlette
            from starlette.exceptions import HTTPException
            from starlette.responses import Response
            from starlette.routing import Route
        except ImportError as error:
            raise ConfigError("the frontend needs starlette: pip install 'dynwire[frontend]'", name="starlette") from error

        def json(content: Any, status: int = 200) -> Response:
            return Response(orjson.dumps(content), status, media_type="application/json")

        def problem(error: ApiError) -> Response:
            made = Response(error.body(), error.status, media_type="application/json")
            made.raw_headers += error.headers()
            return made

        async def on_http_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            what = {404: f"there is no {request.url.path}", 405: f"{request.method} {request.url.path} is not allowed"}
            made = problem(ApiError(error.status_code, what.get(error.status_code, error.detail), code="unknown_url"))
            for name, value in (error.headers or {}).items():
                made.headers[name] = value
            return made

        async def on_api_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, ApiError)
            return problem(error)

        def guarded(request: Request) -> None:
            self.keys.check(dict(request.scope["headers"]))

        async def models(request: Request) -> Response:
            guarded(request)
            return json({"object": "list", "data": [_describe(model) for model in self.registry.models]})

        async def model(request: Request) -> Response:
            guarded(request)
            name = request.path_params["name"]
            for found in self.registry.models:
                if found.name == name:
                    return json(_describe(found))
            raise model_not_found(name, [found.name for found in self.registry.models])

        async def health(request: Request) -> Response:
            names = [found.name for found in self.registry.models]
            status = "draining" if self.draining else "healthy" if names else "no_models"
            shown = {"status": status, "models": names, "version": __version__}
            return json(shown, 200 if status == "healthy" else 503)

        async def live(request: Request) -> Response:
            return json({"status": "live"})

        async def metrics(request: Request) -> Response:
            text, content_type = self._exposition.render(request.headers.get("accept", ""))
            return Response(text, headers={"content-type": content_type})

        async def openapi(request: Request) -> Response:
            return json(document(self.keys.needed))

        async def state(request: Request) -> Response:
            guarded(request)
            return json(self.state())

        page_html = (files("dynwire.frontend") / "page.html").read_bytes()

        async def page(request: Request) -> Response:
            return Response(page_html, media_type="text/html", headers=PAGE_HEADERS)

        def post(app: Any) -> Any:
            # Reached for other methods only, and answered with 405 by Route.
            async def endpoint(request: Request) -> Response:
                raise HTTPException(405)

            return endpoint

        routes = [
            *(Route(path, post(app), methods=["POST"]) for path, app in self._hot.items()),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/live", live),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route("/state.json", state),
            Route("/", page),
        ]
        handlers: dict[Any, Any] = {HTTPException: on_http_error, ApiError: on_api_error}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    def state(self) -> dict[str, Any]:
        """What the live page shows."""
        return {
            "version": __version__,
            "plane": self.manager.plane,
            "draining": self.draining,
            "in_flight": self.metrics.in_flight,
            "refused": self.metrics.refused,
            "models": [
                {
                    **_describe(model),
                    "kinds": model.card.kinds,
                    "in_flight": model.metrics.in_flight,
                    "sequences": model.sequences,
                    "requests": sum(model.metrics.requests.values()),
                    "failed": sum(n for (_, _, status), n in model.metrics.requests.items() if status >= 500),
                    "disconnects": model.metrics.disconnects,
                    "migrations": model.metrics.migrations,
                    "input_tokens": model.metrics.input_tokens,
                    "cached_tokens": model.metrics.cached_tokens,
                    "output_tokens": model.metrics.output_tokens,
                    "first_token": model.metrics.first_token.to_dict(),
                    "gap": model.metrics.gap.to_dict(),
                    "instances": [
                        # ids do not fit into JavaScript's numbers
                        {
                            "id": f"{i.id:016x}",
                            "endpoint": i.path,
                            "plane": i.plane,
                            "address": i.address,
                            "started_at": i.started_at,
                        }
                        for i in model.instances
                    ],
                    "router": _describe_router(model),
                }
                for model in self.registry.models
            ],
        }


PAGE_HEADERS = {
    "cache-control": "no-cache",
    # the page is one file and talks to this frontend only
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


def _describe_router(model: Model) -> dict[str, Any] | None:
    """Caches and load as the kv routers of a model see them; None in the other modes."""
    if not model.routers:
        return None
    totals: dict[str, float] = {}
    workers = []
    for path, router in model.routers.items():
        for name, value in values(router).items():
            totals[name] = totals.get(name, 0) + value
        for state in worker_states(router, tuple(i.id for i in model.instances if i.path == path)):
            workers.append(
                {
                    "id": f"{state.worker[0]:016x}",
                    "dp_rank": state.worker[1],
                    "cached_blocks": state.cached_blocks,
                    "requests": state.requests,
                    "prefill_tokens": state.prefill_tokens,
                    "decode_blocks": state.decode_blocks,
                    "total_blocks": model.total_blocks.get(state.worker[0]),
                }
            )
    return {"workers": workers, "totals": totals}


def _describe(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dynwire",
        "context_length": model.card.context_length,
    }


__all__ = ["JSON", "Frontend"]
