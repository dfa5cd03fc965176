"""Answers which worker a prompt should go to, keeps the books of callers who go there themselves, and takes requests there.

For callers that are no dynwire clients, or that should share one index: a frontend with ``--router-mode kv`` has a router of its
own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from .._context import Context
from ..errors import ConfigError, Overloaded
from ..kv_router.client import KvAsyncClient
from ..kv_router.cost import Choice
from ..kv_router.metrics import values, worker_states
from ..kv_router.router import KvRouterSettings
from ..manager import AsyncNetworkManager
from ..service import AsyncService
from ..types import EndpointId, Instance
from ..workers.card import ModelCard

logger = logging.getLogger("dynwire.router")

SUFFIX = "-router"
"""of the component that the router of a component is served as"""
MAX_BOOKINGS = 262_144
"""Load that callers have booked and not freed. One more is refused: somebody books and never frees."""


class BestWorkerRequest(msgspec.Struct):
    """What `best_worker` is asked."""

    token_ids: list[int]
    request_id: str | None = None
    """given: the load is booked under this name, until `free`; otherwise nothing is remembered"""
    lora: str | None = None
    exclude: list[int] = []
    """ids of workers that it must not be"""


class Candidate(msgspec.Struct):
    """A worker, and what speaks for it."""

    worker_id: int
    instance: str
    """the same in hexadecimal, as ``dynwire ls`` shows it"""
    dp_rank: int
    cost: float
    """the lowest is chosen"""
    overlap_blocks: int
    """blocks of the prompt that are cached there"""
    prefill_tokens: int
    """tokens that would have to be computed there"""


class BestWorker(msgspec.Struct, omit_defaults=True):
    """What `best_worker` answers: the chosen one, and all candidates."""

    worker_id: int
    instance: str
    dp_rank: int
    cost: float
    overlap_blocks: int
    prefill_tokens: int
    prompt_blocks: int
    block_size: int
    candidates: list[Candidate]
    booked: bool = False
    first_token_instance: int | None = None
    free_instance: int | None = None
    """(booked) ids of this router's own endpoints: where several routers run, only this one knows the booking"""


class BookingRequest(msgspec.Struct):
    """What `first_token` and `free` are told."""

    request_id: str
    cached_tokens: int | None = None
    """(first_token) tokens of the prompt that the worker found in its cache, if it says so"""


class BookingAnswer(msgspec.Struct):
    """What they answer."""

    known: bool
    """False: never booked here, freed already, or too old"""


def _candidate(choice: Choice) -> Candidate:
    worker, rank = choice.worker
    return Candidate(worker, f"{worker:016x}", rank, choice.cost, choice.overlap_blocks, choice.prefill_tokens)


class RouterService:
    """The router of one endpoint. Belongs to the event loop that started it."""

    def __init__(
        self,
        manager: AsyncNetworkManager,
        endpoint: EndpointId,
        settings: KvRouterSettings | None = None,
        component: str | None = None,
        booking_ttl: float = 600.0,
    ) -> None:
        """``component``: what to serve as, by default the endpoint's with ``-router``. Raises `ConfigError`."""
        self.endpoint = endpoint
        self.component = component or endpoint.component + SUFFIX
        EndpointId.parse(f"{endpoint.namespace}.{self.component}.generate")
        if self.component == endpoint.component:
            raise ConfigError(
                f"the router of {endpoint} cannot be served as {self.component!r}: that are the workers themselves",
                name="--component", value=self.component, allowed="another name",
            )  # fmt: skip
        self.settings = settings or KvRouterSettings.from_config(manager.config)
        self.services: dict[str, AsyncService] = {}
        """by name of the endpoint"""
        self._client: KvAsyncClient | None = None
        self._manager = manager
        self._booking_ttl = booking_ttl
        self._bookings: OrderedDict[str, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._watch: Any = None

    @property
    def client(self) -> KvAsyncClient:
        """The client whose router this is; there after `start`."""
        assert self._client is not None
        return self._client

    async def start(self) -> None:
        """Follow the workers, then serve. Raises what clients and servers raise."""
        client = await self._manager.endpoint(self.endpoint).client(router="kv", kv_settings=self.settings)
        assert isinstance(client, KvAsyncClient)
        self._client = client
        try:
            self._watch = await self._manager.watch_instances(self._on_instances, self.endpoint)
            for name, handler, kind in (
                ("best_worker", self.best_worker, BestWorkerRequest),
                ("first_token", self.first_token, BookingRequest),
                ("free", self.free, BookingRequest),
                ("state", self.state, None),
                ("generate", self.generate, None),
            ):
                path = EndpointId(self.endpoint.namespace, self.component, name)
                service = await self._manager.endpoint(path).serve(
                    handler, request_type=kind, metadata={"routes": str(self.endpoint)}
                )
                self.services[name] = service
        except BaseException:  # cancellation included
            await self.close()
            raise

    async def close(self) -> None:
        """Follow nothing any more; the services are the manager's to close. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._client is not None:
            await self._client.close()

    def _on_instances(self, instances: tuple[Instance, ...]) -> None:
        """Without events nobody but a model's card says how many tokens a block has."""
        indexer = self.client.kv.indexer
        if self.settings.block_size is not None or (indexer is not None and indexer.block_size is not None):
            return
        for instance in instances:
            try:
                card = ModelCard.from_metadata(instance.metadata)
            except ConfigError as error:
                logger.warning("%s", error)
                continue
            if card is not None and card.block_size:
                self.client.kv.block_size = card.block_size
                return

    # handlers

    async def best_worker(self, request: BestWorkerRequest) -> BestWorker:
        """Which worker a prompt should go to. Raises `NoInstances`, `PlaneMismatch`, `Overloaded`."""
        booking = None if request.request_id is None else _booking(request.request_id)
        if booking is not None and booking not in self._bookings and len(self._bookings) >= MAX_BOOKINGS:
            raise Overloaded(
                f"{MAX_BOOKINGS} requests are booked and not freed; call free at the end of each, or wait "
                f"{self._booking_ttl:g} s (DYNWIRE_ROUTER_BOOKING_TTL)",
                depth=len(self._bookings), limit=MAX_BOOKINGS,
            )  # fmt: skip
        decision = self.client.best_worker(request.token_ids, booking, lora=request.lora, exclude=request.exclude)
        chosen = _candidate(decision.choice)
        answer = BestWorker(
            **msgspec.structs.asdict(chosen),
            prompt_blocks=decision.prompt_blocks,
            block_size=self.client.kv.block_size,
            candidates=[_candidate(choice) for choice in decision.alternatives],
        )
        if booking is not None:
            self._remember(booking)
            answer.booked = True
            answer.first_token_instance = self.services["first_token"].instance.id
            answer.free_instance = self.services["free"].instance.id
        return answer

    async def first_token(self, request: BookingRequest) -> BookingAnswer:
        """The prompt of a booked request has been computed."""
        booking = _booking(request.request_id)
        if booking not in self._bookings:
            return BookingAnswer(False)
        self.client.first_token(booking, request.cached_tokens)
        self._remember(booking)
        return BookingAnswer(True)

    async def free(self, request: BookingRequest) -> BookingAnswer:
        """A booked request is over."""
        booking = _booking(request.request_id)
        if self._bookings.pop(booking, None) is None:
            return BookingAnswer(False)
        self.client.finish(booking)
        return BookingAnswer(True)

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The worker's answer, item by item. Requests without ``token_ids`` go to the least loaded worker."""
        async with self.client.stream(request, context=context) as stream:
            async for item in stream:
                yield item

    async def state(self, request: Any) -> Mapping[str, Any]:
        """What the router knows; for people and monitoring."""
        kv = self.client.kv
        workers = [
            {
                "worker_id": state.worker[0],
                "instance": f"{state.worker[0]:016x}",
                "dp_rank": state.worker[1],
                "cached_blocks": state.cached_blocks,
                "requests": state.requests,
                "prefill_tokens": state.prefill_tokens,
                "decode_blocks": state.decode_blocks,
            }
            for state in worker_states(kv, tuple(sorted(instance.id for instance in self.client.instances)))
        ]
        return {
            "routes": str(self.endpoint),
            "block_size": kv.block_size,
            "bookings": len(self._bookings),
            "replicas": None if kv.replicas is None else len(kv.replicas.others.replicas),
            "workers": workers,
            "metrics": values(kv),
        }

    # bookings

    def _remember(self, booking: str) -> None:
        loop = asyncio.get_running_loop()
        self._bookings[booking] = loop.time() + self._booking_ttl
        self._bookings.move_to_end(booking)
        if self._timer is None:
            self._timer = loop.call_later(self._booking_ttl, self._expire)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        expired = 0
        while self._bookings:
            booking, until = next(iter(self._bookings.items()))
            if until > now:
                self._timer = loop.call_later(until - now, self._expire)
                break
            del self._bookings[booking]
            self.client.kv.finish(booking)
            expired += 1
        if expired:
            logger.warning(
                "%d booked requests were not freed within %g s (DYNWIRE_ROUTER_BOOKING_TTL) and count no longer",
                expired, self._booking_ttl,
            )  # fmt: skip


def _booking(request_id: str) -> str:
    """Its name in the load: no request that goes through `generate` is called so."""
    return f"booked:{request_id}"
