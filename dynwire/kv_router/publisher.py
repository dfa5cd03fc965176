"""The worker's side of KV events: numbers them, publishes them, and answers routers that have missed some."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence

import msgspec

from ..event_plane.base import EventSender, open_sender
from ..event_plane.recovery import Batch, LocalIndexer, RangeAnswer, RangeQuery
from ..manager import AsyncNetworkManager
from ..service import AsyncService
from ..types import EndpointId
from ..wire.kv_events import EventData, KvCacheEvent, Removed, Stored, StoredBlock

EVENTS_ENDPOINT = "kv_events"
"""namespace.component.kv_events answers range queries; its record says how events travel"""
HEADS_S = 0.5
"""Between two messages that repeat the newest event numbers: a lost last event is missed after this, and repaired within 1 s."""
PART_BLOCKS = 4096
"""Blocks per item of an answer: 150 KB, below the 1 MiB that a NATS server takes by default."""


class KvEventPublisher:
    """Publishes what happens in a worker's cache. Made and started on the event loop that it belongs to.

    ``publish_stored``, ``publish_removed`` and ``publish_cleared`` may be called from any thread; events of one thread keep
    their order. What is published in one turn of the loop travels together. Nothing here ever waits for a router: what cannot be
    sent is dropped, and routers ask for it.
    """

    def __init__(
        self, manager: AsyncNetworkManager, namespace: str, component: str, worker_id: int, block_size: int, dp_size: int = 1
    ) -> None:
        self._manager = manager
        self._path = EndpointId(namespace, component, EVENTS_ENDPOINT)
        self._block_size = block_size
        self._dp_size = dp_size
        self.index = LocalIndexer(worker_id, time.time_ns())
        """the worker's own tree and its last events"""
        self._sender: EventSender | None = open_sender(manager.config, namespace, component)
        self._service: AsyncService | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[KvCacheEvent] = []
        self._scheduled = False
        self._heads: asyncio.TimerHandle | None = None
        self._encode = msgspec.msgpack.Encoder().encode

    @property
    def worker_id(self) -> int:
        """The worker whose events these are."""
        return self.index.worker_id

    @property
    def dropped(self) -> int:
        """Batches that could not be sent."""
        return 0 if self._sender is None else self._sender.dropped

    async def start(self) -> None:
        """Open the event plane, and register for routers. With DYN_EVENT_PLANE ``none`` nothing is opened or published."""
        self._loop = asyncio.get_running_loop()
        if self._sender is None:
            return
        await self._sender.start()
        try:
            self._service = await self._manager.endpoint(self._path).serve(
                self._answer,
                request_type=RangeQuery,
                metadata={
                    "worker_id": self.worker_id,
                    "event_plane": self._manager.config.events.plane,
                    "block_size": self._block_size,
                    "dp_size": self._dp_size,
                    **self._sender.metadata,
                },
            )
        except BaseException:  # cancellation included
            await self._sender.close()
            raise
        self._heads = self._loop.call_later(HEADS_S, self._send_heads)

    async def close(self) -> None:
        """Leave discovery and close. May be called twice."""
        if self._heads is not None:
            self._heads.cancel()
            self._heads = None
        self._flush()
        if self._service is not None:
            await self._service.drain(0.0)
            self._service = None
        if self._sender is not None:
            await self._sender.close()

    # events

    def publish_stored(
        self, parent_hash: int | None, block_hashes: Sequence[int], tokens_hashes: Sequence[int], dp_rank: int = 0
    ) -> None:
        """Consecutive blocks were stored behind the block that the engine calls ``parent_hash`` (None: the prompt's beginning).

        ``block_hashes``: the engine's own ids; ``tokens_hashes``: `compute_block_hashes` of their tokens, as many. Raises
        `ValueError`.
        """
        blocks = [StoredBlock(block, tokens) for block, tokens in zip(block_hashes, tokens_hashes, strict=True)]
        self._publish(KvCacheEvent(0, EventData(stored=Stored(parent_hash, blocks)), dp_rank))

    def publish_removed(self, block_hashes: Iterable[int], dp_rank: int = 0) -> None:
        """Blocks were evicted; ``block_hashes``: the engine's own ids."""
        self._publish(KvCacheEvent(0, EventData(removed=Removed(list(block_hashes))), dp_rank))

    def publish_cleared(self, dp_rank: int = 0) -> None:
        """The cache was emptied."""
        self._publish(KvCacheEvent(0, "cleared", dp_rank))

    def publish(self, event: KvCacheEvent) -> None:
        """An event as a whole; its number is given here."""
        self._publish(event)

    def _publish(self, event: KvCacheEvent) -> None:
        loop = self._loop
        if loop is None:
            raise RuntimeError("the publisher has not been started")
        if asyncio._get_running_loop() is loop:
            self._take(event)
        elif not loop.is_closed():
            loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: KvCacheEvent) -> None:
        if self._sender is None:
            return
        assert self._loop is not None
        self._waiting.append(self.index.record(event))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        waiting, self._waiting = self._waiting, []
        if self._sender is None:
            return
        ranks: dict[int, list[KvCacheEvent]] = {}
        for event in waiting:
            ranks.setdefault(event.dp_rank, []).append(event)
        for events in ranks.values():
            part: list[KvCacheEvent] = []
            blocks = 0
            for event in events:
                part.append(event)
                blocks += _blocks_of(event)
                if blocks >= PART_BLOCKS:
                    self._send(part)
                    part, blocks = [], 0
            if part:
                self._send(part)

    def _send(self, part: list[KvCacheEvent]) -> None:
        assert self._sender is not None
        worker_id, epoch = self.worker_id, self.index.epoch
        key = f"{worker_id:x}:{epoch:x}:{part[0].dp_rank}:{part[0].event_id}"
        self._sender.send(self._encode(Batch(worker_id, epoch, part)), key)

    def _send_heads(self) -> None:
        assert self._loop is not None
        assert self._sender is not None
        self._sender.send_heads(self._encode(self.index.heads()))
        self._heads = self._loop.call_later(HEADS_S, self._send_heads)

    # questions

    async def _answer(self, query: RangeQuery) -> AsyncIterator[RangeAnswer]:
        """The answer in parts of a bounded size; all but the last have ``more``."""
        answer = self.index.answer(query)
        part: list[KvCacheEvent] = []
        blocks = 0
        for event in answer.events:
            for piece in _pieces(event):
                size = _blocks_of(piece)
                if part and blocks + size > PART_BLOCKS:
                    yield msgspec.structs.replace(answer, events=part, more=True)
                    part, blocks = [], 0
                part.append(piece)
                blocks += size
        yield msgspec.structs.replace(answer, events=part)


def _blocks_of(event: KvCacheEvent) -> int:
    if event.data == "cleared":
        return 1
    if event.data.stored is not None:
        return len(event.data.stored.blocks) + 1
    assert event.data.removed is not None
    return len(event.data.removed.block_hashes) + 1


def _pieces(event: KvCacheEvent) -> Iterable[KvCacheEvent]:
    """The event, or several with the same number that do the same, if it is too large for a part."""
    if _blocks_of(event) <= PART_BLOCKS or event.data == "cleared":
        yield event
        return
    step = PART_BLOCKS - 1
    if event.data.stored is not None:
        blocks, parent = event.data.stored.blocks, event.data.stored.parent_hash
        for start in range(0, len(blocks), step):
            piece = blocks[start : start + step]
            yield KvCacheEvent(event.event_id, EventData(stored=Stored(parent, piece)), event.dp_rank)
            parent = piece[-1].block_hash
        return
    assert event.data.removed is not None
    hashes = event.data.removed.block_hashes
    for start in range(0, len(hashes), step):
        yield KvCacheEvent(event.event_id, EventData(removed=Removed(hashes[start : start + step])), event.dp_rank)


def joined(parts: Sequence[RangeAnswer]) -> RangeAnswer:
    """The answer whose parts these are; events that were cut are whole again."""
    events: list[KvCacheEvent] = []
    for part in parts:
        for event in part.events:
            before = events[-1] if events else None
            if before is not None and before.event_id == event.event_id and before.dp_rank == event.dp_rank:
                _append(before, event)
            else:
                events.append(event)
    return msgspec.structs.replace(parts[-1], events=events)


def _append(whole: KvCacheEvent, piece: KvCacheEvent) -> None:
    if whole.data == "cleared" or piece.data == "cleared":
        return
    if whole.data.stored is not None and piece.data.stored is not None:
        whole.data.stored.blocks += piece.data.stored.blocks
    elif whole.data.removed is not None and piece.data.removed is not None:
        whole.data.removed.block_hashes += piece.data.removed.block_hashes
