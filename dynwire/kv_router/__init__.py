"""Which worker has which KV cache blocks, and which one a request should go to."""

from __future__ import annotations

from .._kvhash import compute_block_hashes, compute_sequence_hashes, sequence_hashes
from .._kvtree import OverlapScores, RadixTree
from ..wire.kv_events import EventData, KvCacheEvent, Removed, RouterEvent, Stored, StoredBlock

__all__ = [
    "EventData",
    "KvCacheEvent",
    "OverlapScores",
    "RadixTree",
    "Removed",
    "RouterEvent",
    "Stored",
    "StoredBlock",
    "compute_block_hashes",
    "compute_sequence_hashes",
    "sequence_hashes",
]
