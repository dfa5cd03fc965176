"""An index without events: what a router has sent to a worker is taken to be in its cache, for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .._kvtree import RadixTree
from .load import Worker

TTL_S = 120.0
MAX_BLOCKS = 2**20
PRUNED_TO = 0.8


class ApproximateIndex:
    """Fed by routing decisions. Entries expire, and the oldest go when there are too many. One thread; time is an argument."""

    def __init__(self, ttl: float = TTL_S, max_blocks: int = MAX_BLOCKS) -> None:
        self.tree = RadixTree()
        """block ids in it are sequence hashes"""
        self._ttl = ttl
        self._max_blocks = max_blocks
        self._expires: dict[tuple[Worker, int], float] = {}
        self._queue: deque[tuple[float, Worker, int]] = deque()

    def __len__(self) -> int:
        return len(self._expires)

    def routed(self, worker: Worker, block_hashes: Sequence[int], sequence_hashes: Sequence[int], now: float) -> None:
        """A prompt with these blocks went to a worker."""
        self.expire(now)
        self.tree.store(*worker, None, sequence_hashes, block_hashes)
        until = now + self._ttl
        for value in reversed(sequence_hashes):  # the end of a prefix expires before its beginning
            self._expires[worker, value] = until
            self._queue.append((until, worker, value))
        if len(self._expires) > self._max_blocks:
            self._prune(int(self._max_blocks * PRUNED_TO))

    def expire(self, now: float) -> None:
        """Forget what is too old."""
        queue = self._queue
        while queue and queue[0][0] <= now:
            self._drop_oldest()

    def _prune(self, wanted: int) -> None:
        while len(self._expires) > wanted:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        until, worker, value = self._queue.popleft()
        if self._expires.get((worker, value)) == until:  # otherwise it was routed again since, or its worker is gone
            del self._expires[worker, value]
            self.tree.remove(*worker, [value])

    def remove_worker(self, worker_id: int) -> None:
        """A worker is gone."""
        for key in [key for key in self._expires if key[0][0] == worker_id]:
            del self._expires[key]
        self.tree.remove_worker(worker_id)
