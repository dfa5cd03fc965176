"""What the workers of a component have cached, asked of themselves; for people and tools, not for routing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from .._kvtree import RadixTree
from ..client import AsyncClient
from ..errors import DynwireError
from ..event_plane.recovery import RangeAnswer, RangeQuery
from ..manager import AsyncNetworkManager
from ..types import EndpointId, Instance
from ..wire.kv_events import KvCacheEvent
from .load import Worker
from .publisher import EVENTS_ENDPOINT, joined

ASKED_AT_ONCE = 8
"""workers; a full tree of 10^6 blocks is 40 MB on its way"""


@dataclass
class WorkerTree:
    """The tree of one rank of a worker."""

    worker: Worker
    epoch: int = 0
    last_id: int = 0
    """its newest event"""
    block_size: int | None = None
    events: list[KvCacheEvent] = field(default_factory=list)
    """that build the tree from nothing"""
    error: str = ""
    """why there is nothing else"""

    @property
    def nbytes(self) -> int:
        """What it takes in a router's index, alone."""
        tree = RadixTree()
        for event in self.events:
            tree.apply_event(self.worker[0], event)
        return tree.nbytes


def events_endpoint(endpoint: EndpointId) -> EndpointId:
    """Where the workers of an endpoint answer about their events."""
    return EndpointId(endpoint.namespace, endpoint.component, EVENTS_ENDPOINT)


def ranks_of(instance: Instance) -> tuple[int, ...]:
    """The ranks of the worker whose record this is."""
    found = instance.metadata.get("dp_size")
    return tuple(range(found)) if isinstance(found, int) and 0 < found <= 1024 else (0,)


async def worker_trees(manager: AsyncNetworkManager, endpoint: EndpointId, timeout: float) -> list[WorkerTree]:
    """The trees of all workers, by worker and rank; one that does not answer within ``timeout`` seconds says why.

    Raises what discovery raises.
    """
    path = events_endpoint(endpoint)
    client = await manager.endpoint(path).client(router="direct")
    try:
        limit = asyncio.Semaphore(ASKED_AT_ONCE)
        asked = [
            _ask(client, instance, worker_id, rank, timeout, limit)
            for instance in await manager.list_instances(path)
            if isinstance(worker_id := instance.metadata.get("worker_id"), int)
            for rank in ranks_of(instance)
        ]
        found = await asyncio.gather(*asked)
    finally:
        await client.close()
    return sorted(found, key=lambda tree: tree.worker)


async def _ask(
    client: AsyncClient, instance: Instance, worker_id: int, rank: int, timeout: float, limit: asyncio.Semaphore
) -> WorkerTree:
    size = instance.metadata.get("block_size")
    tree = WorkerTree((worker_id, rank), block_size=size if isinstance(size, int) else None)
    parts: list[RangeAnswer] = []
    async with limit:
        try:
            query = RangeQuery(worker_id, rank, 0, 0)
            async with client.stream(query, instance=instance.id, timeout=timeout, reply_type=RangeAnswer) as stream:
                async for part in stream:
                    parts.append(part)
        except DynwireError as error:
            tree.error = f"{type(error).__name__}: {error}"
            return tree
    if not parts or parts[-1].kind != "dump":
        tree.error = f"answered with {parts[-1].kind if parts else 'nothing'} instead of a dump"
        return tree
    answer = joined(parts)
    tree.epoch, tree.last_id, tree.events = answer.epoch, answer.last_id, answer.events
    return tree


class Overlaps:
    """Which blocks are where. Two workers share a block if they have the same tokens behind the same prefix, by whatever name."""

    def __init__(self, trees: Iterable[WorkerTree]) -> None:
        self.blocks: list[set[int]] = []
        """of each tree: numbers of its blocks"""
        numbers: dict[tuple[int, int], int] = {}
        for tree in trees:
            mine: dict[int | None, int] = {None: 0}
            for event in tree.events:
                if event.data == "cleared" or event.data.stored is None:
                    continue
                parent = mine.get(event.data.stored.parent_hash)
                if parent is None:
                    continue  # a dump has parents first; this is none
                for block in event.data.stored.blocks:
                    parent = numbers.setdefault((parent, block.tokens_hash), len(numbers) + 1)
                    mine[block.block_hash] = parent
            del mine[None]
            self.blocks.append(set(mine.values()))
        self.different = len(numbers)
        """blocks, each counted once"""

    def shared(self, number: int) -> int:
        """Blocks of a tree that some other one has too."""
        others: set[int] = set()
        for other, blocks in enumerate(self.blocks):
            if other != number:
                others |= self.blocks[number] & blocks
        return len(others)

    def common(self, one: int, other: int) -> int:
        """Blocks that two trees have."""
        return len(self.blocks[one] & self.blocks[other])
