"""``router="kv"``: clients that send a prompt where its prefix is cached, `KvAsyncClient` and its blocking twin `KvClient`.

Requests are dicts or `dynwire.workers.protocol.EngineRequest` with ``token_ids``; replies are items of the engine protocol. Other
requests, and those for which no worker is in the index, go to the least loaded instance.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..client import AsyncClient, Client
from ..errors import DynwireError, NoInstances, ProtocolError
from ..migration import Resume
from ..replies import AsyncReplyStream, ReplyStream, StreamRequest
from ..types import Instance
from .load import Worker
from .router import Decision, KvRouter, KvRouterSettings

if TYPE_CHECKING:
    from ..manager import AsyncNetworkManager, NetworkManager
    from ..planes.base import AsyncItemStream, ItemStream
    from ..runtime import LoopRuntime, Route


def _tokens(payload: Any) -> Any:
    """Token ids of a request, or None if it is no such request."""
    found = payload.get("token_ids") if isinstance(payload, dict) else getattr(payload, "token_ids", None)
    return found if isinstance(found, (list, tuple)) else None


def _routed(payload: Any, dp_rank: int, blocks: int) -> dict[str, Any]:
    """The request with the router's decision in it."""
    plain = payload if isinstance(payload, dict) else msgspec.to_builtins(payload)
    return {**plain, "routing": {**(plain.get("routing") or {}), "dp_rank": dp_rank, "expected_blocks": blocks}}


def _cached(item: Any) -> int | None:
    """What the first item says of the worker's cache."""
    found = item.get("cached_tokens") if isinstance(item, dict) else getattr(item, "cached_tokens", None)
    return found if isinstance(found, int) else None


def _candidates(route: Route, exclude: set[int]) -> list[Worker]:
    """Workers and ranks that could take a request now."""
    out = []
    for entry in route.table.entries:
        instance = entry.instance
        if entry.retry_at or instance.id in exclude:
            continue
        ranks = instance.metadata.get("dp_size")
        out += [(instance.id, rank) for rank in range(ranks if isinstance(ranks, int) and 0 < ranks <= 1024 else 1)]
    return out


def _best_worker(
    kv: KvRouter, route: Route, token_ids: Sequence[int], request_id: str | None, lora: str | None, exclude: set[int]
) -> Decision:
    candidates = _candidates(route, exclude)
    if not candidates:
        known = len(route.table)
        text = f"no instance of {route.path} can take a request: {known} known, all of them excluded or set aside"
        raise route.explain(NoInstances(text, endpoint=route.path, details={"known": known}))
    return kv.choose(token_ids, candidates, request_id or "", lora=lora, book=request_id is not None, explain=True)


def _only(items: list[Any], endpoint: str) -> Any:
    if len(items) != 1:
        raise ProtocolError(
            f"{endpoint} answered with {len(items)} items; use stream() instead of call()", phase="reply", sent="yes"
        )
    return items[0]


def _not_again(request: StreamRequest) -> set[int]:
    """Instances that have lost the stream, or did not take it when it was opened before."""
    return request.lost | (request.course.tried if request.course is not None else set())


class KvAsyncReplyStream(AsyncReplyStream):
    """A reply stream that tells the router about its first item and its end."""

    _client: KvAsyncClient

    def __init__(self, client: KvAsyncClient, request: StreamRequest, request_id: str) -> None:
        super().__init__(client, request)
        self.request_id = request_id
        self._arguments = (request_id,)
        self._first = True

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            item = await super().__anext__()
        except BaseException:  # its end, however it came; passed on as it is
            self._client.kv.finish(self.request_id)
            raise
        if self._first:
            self._first = False
            self._client.kv.first_token(self.request_id, _cached(item))
        return item

    def close(self) -> None:
        self._client.kv.finish(self.request_id)
        super().close()

    async def _open(self) -> AsyncItemStream:
        self._first = True  # a stream that has migrated has its prompt computed again
        return await super()._open()


class KvAsyncClient(AsyncClient):
    """An `AsyncClient` whose router knows the workers' caches. Belongs to the loop that made it."""

    def __init__(
        self,
        manager: AsyncNetworkManager,
        path: str,
        codec: str,
        migration_limit: int,
        resume: Resume | None,
        settings: KvRouterSettings | None = None,
        accepts: Callable[[Instance], bool] | None = None,
    ) -> None:
        super().__init__(manager, path, "kv", codec, migration_limit, resume, accepts)
        namespace, component, _ = path.split(".")
        self.kv = KvRouter(manager, namespace, component, settings)
        """the router: its index, load and statistics"""
        self._numbers = itertools.count(1)
        self._known: dict[int, Instance] = {}
        self._unlisten: Any = None
        self._mine: Route | None = None

    async def start(self) -> None:
        """Find the instances, and follow their events."""
        self._mine = route = await self._route()
        (await self._manager._runtime()).close_later(self.kv)
        await self.kv.start()
        self._unlisten = route.listen(self._on_change)
        self._on_change()

    async def close(self) -> None:
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        await self.kv.close()
        await super().close()

    def _on_change(self) -> None:
        assert self._mine is not None
        known = {instance.id: instance for instance in self._mine.instances}
        for gone in self._known.keys() - known.keys():
            self.kv.remove_worker(gone)
        self._known = known

    # Calling

    async def call(self, payload: Any, **options: Any) -> Any:
        """As `AsyncClient.call`; the prompt's ``token_ids`` decide where it goes."""
        async with self.stream(payload, **options) as stream:
            return _only([item async for item in stream], self.endpoint)

    def stream(self, payload: Any, **options: Any) -> KvAsyncReplyStream:
        """As `AsyncClient.stream`; the prompt's ``token_ids`` decide where it goes."""
        plain = super().stream(payload, **options)
        return KvAsyncReplyStream(self, plain._request, f"{id(self):x}-{next(self._numbers)}")

    def best_worker(
        self,
        token_ids: Sequence[int],
        request_id: str | None = None,
        *,
        lora: str | None = None,
        exclude: Collection[int] = (),
    ) -> Decision:
        """Where a prompt would go now, without sending it; the alternatives are in the decision.

        With ``request_id`` its load is booked: it has to be followed by `finish`, and by `first_token` when that comes.
        ``exclude`` names instances. Raises `NoInstances`, `PlaneMismatch`.
        """
        self._check_open()
        assert self._mine is not None
        return _best_worker(self.kv, self._mine, token_ids, request_id, lora, set(exclude))

    def first_token(self, request_id: str, cached_tokens: int | None = None) -> None:
        """The first token of a request that `best_worker` has booked came."""
        self.kv.first_token(request_id, cached_tokens)

    def finish(self, request_id: str) -> None:
        """A request that `best_worker` has booked is over."""
        self.kv.finish(request_id)

    def _open_now(self, request: StreamRequest) -> None:
        return None  # the way of one call after another is not this router's

    async def _reopen(self, request: StreamRequest, *rest: Any) -> tuple[Any, AsyncItemStream]:
        self.kv.finish(rest[-1])  # it is booked anew, for another worker
        return await super()._reopen(request, *rest)

    async def _open(self, request: StreamRequest, request_id: str = "", *arguments: Any) -> tuple[Any, AsyncItemStream]:
        tokens = _tokens(request.payload)
        if tokens is None or request.instance is not None:
            return await super()._open(request)
        tried = _not_again(request)
        payload = request.payload
        while True:
            assert self._mine is not None
            candidates = _candidates(self._mine, tried)
            if not candidates:
                request.payload = payload
                return await super()._open(request)  # waits for one, or says why there is none
            decision = self.kv.choose(tokens, candidates, request_id)
            request.payload = _routed(payload, decision.dp_rank, decision.overlap_blocks)
            request.instance = decision.worker_id
            try:
                return await super()._open(request)
            except DynwireError as error:
                self.kv.finish(request_id)
                if error.sent != "no" or not error.retryable:
                    raise
                tried.add(decision.worker_id)
            finally:
                request.instance = None


# Blocking ----------------------------------------------------------------------------------------------------------------------


class KvReplyStream(ReplyStream):
    """Blocking twin of `KvAsyncReplyStream`."""

    _client: KvClient

    def __init__(self, client: KvClient, request: StreamRequest, request_id: str) -> None:
        super().__init__(client, request)
        self.request_id = request_id
        self._arguments = (request_id,)
        self._first = True

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            item = super().__next__()
        except BaseException:  # its end, however it came; passed on as it is
            self._client._tell(self._client.kv.finish, self.request_id)
            raise
        if self._first:
            self._first = False
            self._client._tell(self._client.kv.first_token, self.request_id, _cached(item))
        return item

    def close(self) -> None:
        self._client._tell(self._client.kv.finish, self.request_id)
        super().close()

    def _open(self) -> ItemStream:
        self._first = True
        return super()._open()


class KvClient(Client):
    """A `Client` whose router knows the workers' caches. Any thread calls; the router lives on the manager's background loop."""

    kv: KvRouter

    def __init__(
        self,
        manager: NetworkManager,
        path: str,
        codec: str,
        migration_limit: int,
        resume: Resume | None,
        settings: KvRouterSettings | None = None,
    ) -> None:
        super().__init__(manager, path, "kv", codec, migration_limit, resume)
        self._settings = settings
        self._numbers = itertools.count(1)
        self._known: set[int] = set()

    def start(self) -> None:
        """Find the instances, and follow their events."""
        route = self._route()
        runtime = self._manager._runtime()
        self._manager._portal.run(self._start, runtime)
        route.listen(lambda: self._tell(self._on_change, {instance.id for instance in route.instances}))
        self._tell(self._on_change, {instance.id for instance in route.instances})

    async def _start(self, runtime: LoopRuntime) -> None:
        from ..manager import AsyncNetworkManager

        namespace, component, _ = self.endpoint.split(".")
        inner = AsyncNetworkManager(self._manager.config)
        self.kv = KvRouter(inner, namespace, component, self._settings)
        runtime.close_later(self.kv)
        runtime.close_later(inner)
        await self.kv.start()

    def close(self) -> None:
        if self._manager._portal.running:
            self._manager._portal.run(self.kv.close)
        super().close()

    def _tell(self, function: Callable[..., object], *args: Any) -> None:
        if self._manager._portal.running:
            self._manager._portal.call_soon(function, *args)

    def _on_change(self, known: set[int]) -> None:
        for gone in self._known - known:
            self.kv.remove_worker(gone)
        self._known = known

    def best_worker(
        self,
        token_ids: Sequence[int],
        request_id: str | None = None,
        *,
        lora: str | None = None,
        exclude: Collection[int] = (),
    ) -> Decision:
        """As `KvAsyncClient.best_worker`; `finish` and `first_token` release what was booked."""
        route = self._route()

        async def decide() -> Decision:
            return _best_worker(self.kv, route, token_ids, request_id, lora, set(exclude))

        return self._manager._portal.run(decide)

    def first_token(self, request_id: str, cached_tokens: int | None = None) -> None:
        """The first token of a request that `best_worker` has booked came."""
        self._tell(self.kv.first_token, request_id, cached_tokens)

    def finish(self, request_id: str) -> None:
        """A request that `best_worker` has booked is over."""
        self._tell(self.kv.finish, request_id)

    async def _choose(self, tokens: list[int], candidates: list[Worker], request_id: str) -> Decision:
        return self.kv.choose(tokens, candidates, request_id)

    def call(self, payload: Any, **options: Any) -> Any:
        """As `Client.call`; the prompt's ``token_ids`` decide where it goes."""
        with self.stream(payload, **options) as stream:
            return _only(list(stream), self.endpoint)

    def stream(self, payload: Any, **options: Any) -> KvReplyStream:
        """As `Client.stream`; the prompt's ``token_ids`` decide where it goes."""
        plain = super().stream(payload, **options)
        return KvReplyStream(self, plain._request, f"{id(self):x}-{next(self._numbers)}")

    def _reopen(self, request: StreamRequest, *rest: Any) -> tuple[Any, ItemStream]:
        self._tell(self.kv.finish, rest[-1])
        return super()._reopen(request, *rest)

    def _open(self, request: StreamRequest, request_id: str = "", *arguments: Any) -> tuple[Any, ItemStream]:
        tokens = _tokens(request.payload)
        if tokens is None or request.instance is not None:
            return super()._open(request)
        tried = _not_again(request)
        payload = request.payload
        while True:
            candidates = _candidates(self._route(), tried)
            if not candidates:
                request.payload = payload
                return super()._open(request)
            decision = self._manager._portal.run(self._choose, tokens, candidates, request_id)
            request.payload = _routed(payload, decision.dp_rank, decision.overlap_blocks)
            request.instance = decision.worker_id
            try:
                return super()._open(request)
            except DynwireError as error:
                self._tell(self.kv.finish, request_id)
                if error.sent != "no" or not error.retryable:
                    raise
                tried.add(decision.worker_id)
            finally:
                request.instance = None
