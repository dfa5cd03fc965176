"""KV cache events: what a worker tells routers about its cache.."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class StoredBlock(msgspec.Struct):
    """A block that was stored."""

    block_hash: int
    """the engine's own id of the block, u64"""
    tokens_hash: int
    """`compute_block_hashes` of its tokens, u64"""


class Stored(msgspec.Struct):
    """Consecutive blocks were stored behind the block that the engine calls ``parent_hash`` (None: the beginning)."""

    parent_hash: int | None
    blocks: list[StoredBlock]


class Removed(msgspec.Struct):
    """Blocks were evicted."""

    block_hashes: list[int]


class EventData(msgspec.Struct, omit_defaults=True):
    """One of the two is set."""

    stored: Stored | None = None
    removed: Removed | None = None

    def __post_init__(self) -> None:
        if (self.stored is None) == (self.removed is None):
            raise ValueError("an event's data is one of stored, removed and cleared")


class KvCacheEvent(msgspec.Struct):
    """What happened to the cache of one rank of one worker."""

    event_id: int
    """counts from 1 per publisher, without gaps"""
    data: EventData | Literal["cleared"]
    dp_rank: int = 0


class RouterEvent(msgspec.Struct):
    """An event, and whose it is."""

    worker_id: int
    event: KvCacheEvent


def stored(event_id: int, parent_hash: int | None, blocks: list[tuple[int, int]], dp_rank: int = 0) -> KvCacheEvent:
    """Event of stored blocks, each ``(block_hash, tokens_hash)``."""
    return KvCacheEvent(event_id, EventData(stored=Stored(parent_hash, [StoredBlock(*pair) for pair in blocks])), dp_rank)


def removed(event_id: int, block_hashes: list[int], dp_rank: int = 0) -> KvCacheEvent:
    """Event of evicted blocks."""
    return KvCacheEvent(event_id, EventData(removed=Removed(list(block_hashes))), dp_rank)


def cleared(event_id: int, dp_rank: int = 0) -> KvCacheEvent:
    """Event of an emptied cache."""
    return KvCacheEvent(event_id, "cleared", dp_rank)


def _decode(value: Any, kind: type) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        decode = msgspec.json.decode if data[:1] == b"{" else msgspec.msgpack.decode
        return decode(data, type=kind)
    return msgspec.convert(value, kind)


def as_router_event(value: Any) -> RouterEvent:
    """A `RouterEvent` from a dict, or from JSON or msgpack. Raises `msgspec.ValidationError`, a `ValueError`."""
    return _decode(value, RouterEvent)  # type: ignore[no-any-return]


def as_cache_event(value: Any) -> KvCacheEvent:
    """A `KvCacheEvent` from a dict, or from JSON or msgpack. Raises `msgspec.ValidationError`, a `ValueError`."""
    return _decode(value, KvCacheEvent)  # type: ignore[no-any-return]
