"""Which worker a prompt goes to: what the caches hold, and what the workers are busy with, put together.

Belongs to the event loop that started it; `choose` and the rest are plain functions of that loop.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .._kvhash import compute_block_hashes, sequence_hashes
from .._kvtree import OverlapScores, RadixTree
from ..config import Config
from ..manager import AsyncNetworkManager
from ..types import EndpointId
from .approximate import ApproximateIndex
from .cost import Choice, CostSettings, choose, costs
from .indexer import KvIndexer
from .load import ActiveLoad, Worker
from .sync import ReplicaSync, check_replica_sync

logger = logging.getLogger("dynwire.kv_router")

DEFAULT_BLOCK_SIZE = 64


@dataclass(frozen=True)
class KvRouterSettings:
    """How to route; the frontend's flags have the same names."""

    overlap_score_weight: float = 1.0
    temperature: float = 0.0
    use_events: bool = True
    """False: the index is fed by this router's own decisions, and no event plane is opened"""
    block_size: int | None = None
    """tokens per block; None: what the first worker says"""
    replica_sync: bool = False
    """share the load with the other routers of the component; needs an event plane"""
    seed: int | None = None
    """of ties and of the temperature's choices"""
    router_id: str | None = None
    """name of this router where events are kept for it (jetstream); None: as configured, or a new one"""
    reset_states: bool | None = None
    """True: what is stored for routers is deleted at the start (jetstream); None: as configured"""

    @classmethod
    def from_config(cls, config: Config, block_size: int | None = None) -> KvRouterSettings:
        """As the settings of a frontend or a router service say; ``block_size`` if they do not name one."""
        router = config.router
        return cls(
            overlap_score_weight=router.kv_overlap_score_weight,
            temperature=router.temperature,
            use_events=router.kv_events,
            block_size=router.kv_cache_block_size or block_size,
            replica_sync=router.replica_sync,
            router_id=router.id,
            reset_states=router.reset_states,
        )

    @property
    def cost(self) -> CostSettings:
        """The weights of the decision."""
        return CostSettings(self.overlap_score_weight, self.temperature)


@dataclass
class RouterStats:
    """What a router has decided, and what became of it; for metrics."""

    routed: int = 0
    prompt_blocks: int = 0
    predicted_blocks: int = 0
    """blocks that the index expected in the chosen workers' caches"""
    reported: int = 0
    """requests whose worker reported what it found in its cache"""
    reported_blocks: int = 0
    agreed: int = 0
    """of those, with as many blocks as predicted"""
    by_load_only: int = 0
    """decisions without an index: no events, or the event plane was away"""
    decision_seconds: float = 0.0


@dataclass
class Decision:
    """Where a request goes."""

    worker_id: int
    dp_rank: int
    overlap_blocks: int
    prompt_blocks: int
    choice: Choice
    alternatives: list[Choice] = field(default_factory=list)


class KvRouter:
    """Chooses workers of ``namespace.component`` by cached prefix and load."""

    def __init__(
        self, manager: AsyncNetworkManager, namespace: str, component: str, settings: KvRouterSettings | None = None
    ) -> None:
        """Raises `ConfigError`: replica sync without a way for it, an event plane whose package is missing."""
        self.settings = settings or KvRouterSettings()
        self.load = ActiveLoad()
        self.stats = RouterStats()
        self.indexer: KvIndexer | None = None
        """the index fed by events; None in approximate mode"""
        self.approximate: ApproximateIndex | None = None
        """the index fed by decisions; None when events are used"""
        self._rng = random.Random(self.settings.seed)
        self._predicted: dict[str, int] = {}
        self._id = EndpointId(namespace, component, "generate")
        if self.settings.use_events and manager.config.events.plane != "none":
            config, mine = manager.config.router, self.settings
            self.indexer = KvIndexer(
                manager,
                namespace,
                component,
                mine.block_size,
                router_id=mine.router_id or config.id,
                reset=config.reset_states if mine.reset_states is None else mine.reset_states,
            )
        else:
            self.approximate = ApproximateIndex()
        self._block_size = self.settings.block_size
        self.replicas: ReplicaSync | None = None
        """what the other routers of the component have sent to the workers; None without replica sync"""
        if self.settings.replica_sync:
            check_replica_sync(manager.config, self.settings.use_events)
            self.replicas = ReplicaSync(manager, namespace, component, self.load)

    async def start(self) -> None:
        """Follow the workers' events, and the other routers. In approximate mode nothing is opened but replica sync."""
        if self.indexer is not None:
            await self.indexer.start()
        if self.replicas is not None:
            try:
                await self.replicas.start()
            except BaseException:  # cancellation included
                await self.close()
                raise

    async def close(self) -> None:
        """May be called twice."""
        if self.replicas is not None:
            await self.replicas.close()
        if self.indexer is not None:
            await self.indexer.close()

    @property
    def block_size(self) -> int:
        """Tokens per block: as configured, or as the first worker said."""
        if self._block_size is not None:
            return self._block_size
        if self.indexer is not None and self.indexer.block_size is not None:
            return self.indexer.block_size
        return DEFAULT_BLOCK_SIZE

    @block_size.setter
    def block_size(self, value: int) -> None:
        self._block_size = value

    @property
    def tree(self) -> RadixTree:
        """The index, whatever feeds it."""
        if self.indexer is not None:
            return self.indexer.tree
        assert self.approximate is not None
        return self.approximate.tree

    def choose(
        self,
        token_ids: Sequence[int],
        workers: Sequence[Worker],
        request_id: str,
        *,
        lora: str | None = None,
        mm_hashes: Sequence[Collection[int] | None] | None = None,
        book: bool = True,
        explain: bool = False,
    ) -> Decision:
        """The worker for a prompt; ``workers`` are the candidates, at least one. Books the load unless ``book`` is False.

        A booked request has to be followed by `finish`, and by `first_token` when that comes.
        """
        started = time.perf_counter()
        block_size = self.block_size
        blocks = compute_block_hashes(token_ids, block_size, lora, mm_hashes)
        sequence = sequence_hashes(blocks)
        matches = self._matches(blocks)
        cost = self.settings.cost
        choices = costs(workers, len(token_ids), block_size, matches.scores, sequence, self.load, cost)
        choice = choose(choices, cost, matches.tree_sizes, self._rng)
        if book:
            further = 1 if len(token_ids) % block_size else 0
            self.load.book(request_id, choice.worker, choice.prefill_tokens, sequence, further)
            if self.approximate is not None:
                self.approximate.routed(choice.worker, blocks, sequence, time.monotonic())
            self._predicted[request_id] = choice.overlap_blocks
            self.stats.routed += 1
            self.stats.prompt_blocks += len(blocks)
            self.stats.predicted_blocks += choice.overlap_blocks
        self.stats.decision_seconds += time.perf_counter() - started
        return Decision(*choice.worker, choice.overlap_blocks, len(blocks), choice, choices if explain else [])

    def _matches(self, blocks: list[int]) -> OverlapScores:
        if self.approximate is not None:
            self.approximate.expire(time.monotonic())
            return self.approximate.tree.find_matches(blocks)
        assert self.indexer is not None
        if not self.indexer.connected:
            self.stats.by_load_only += 1
        return self.indexer.find_matches(blocks)

    def first_token(self, request_id: str, cached_tokens: int | None = None) -> None:
        """The first token came, so the prompt has been computed; ``cached_tokens`` as the worker reported it."""
        self.load.first_token(request_id)
        predicted = self._predicted.pop(request_id, None)
        if cached_tokens is not None and predicted is not None:
            blocks = cached_tokens // self.block_size
            self.stats.reported += 1
            self.stats.reported_blocks += blocks
            self.stats.agreed += blocks == predicted

    def finish(self, request_id: str) -> None:
        """The request is over, however it ended."""
        self.load.finish(request_id)
        self._predicted.pop(request_id, None)

    def remove_worker(self, worker_id: int) -> None:
        """A worker is gone."""
        self.load.remove_worker(worker_id)
        if self.approximate is not None:
            self.approximate.remove_worker(worker_id)
