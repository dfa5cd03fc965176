"""The paged KV cache: blocks that sequences hold, share and leave behind for others. Sans-IO."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .events import KvEvents


class BlockPool:
    """Counts blocks and remembers what the full ones hold.

    A block is *private* (being filled by one sequence), *shared* (full, known by its sequence hash, held by one or more
    sequences), or *idle* (as shared, but nobody holds it: it may be reused, and is evicted when a block is needed, the least
    recently used first). What is known is always closed towards the front: a block is evicted before the one that it follows,
    because a sequence gives back its last block first.
    """

    def __init__(self, capacity: int, block_size: int, events: KvEvents) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.events = events
        self.private = 0
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.private + len(self._holders)

    @property
    def available(self) -> int:
        """Blocks that can be had, idle ones included."""
        return self.capacity - self.private - len(self._holders)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def match(self, hashes: Sequence[int]) -> int:
        """How many of these consecutive blocks, from the first on, are known."""
        holders, idle = self._holders, self._idle
        for count, block in enumerate(hashes):
            if block not in holders and block not in idle:
                return count
        return len(hashes)

    def acquire(self, hashes: Sequence[int], private: int) -> bool:
        """Hold known blocks once more and take ``private`` new ones; False, and nothing changed, if there is no room."""
        holders, idle = self._holders, self._idle
        revived = sum(1 for block in hashes if block in idle)
        if self.available < revived + private:
            return False
        for block in hashes:
            if block in holders:
                holders[block] += 1
            else:
                del idle[block]
                holders[block] = 1
        return self.allocate(private)

    def allocate(self, count: int) -> bool:
        """Take ``count`` private blocks, evicting idle ones if need be; False, and nothing changed, if there is no room."""
        held = self.private + len(self._holders)
        if held + count > self.capacity:
            return False
        excess = held + len(self._idle) + count - self.capacity
        if excess > 0:
            self.events.removed([self._idle.popitem(last=False)[0] for _ in range(excess)])
        self.private += count
        return True

    def publish(self, parent: int | None, blocks: Sequence[tuple[int, int]]) -> None:
        """Private blocks of one sequence are full: (sequence hash, tokens hash) of consecutive blocks behind ``parent``.

        One that is known already is shared, and the private copy given back.
        """
        holders, idle = self._holders, self._idle
        self.private -= len(blocks)
        new: list[tuple[int, int]] = []
        for pair in blocks:
            block = pair[0]
            if block in holders:
                holders[block] += 1
                parent = block
            elif block in idle:
                del idle[block]
                holders[block] = 1
                parent = block
            else:  # nor is any that follows: what is known is closed towards the front
                holders[block] = 1
                new.append(pair)
        if new:
            self.events.stored(parent, new)

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Give back what a sequence holds. Its blocks become idle from the last one to the first, as their eviction will go."""
        holders, idle = self._holders, self._idle
        self.private -= private
        for block in reversed(hashes):
            left = holders[block] - 1
            if left:
                holders[block] = left
            else:
                del holders[block]
                idle[block] = None

    def clear(self) -> None:
        """Forget all idle blocks, for example after a change of weights. Raises `RuntimeError` while sequences hold blocks."""
        if self.used:
            raise RuntimeError(f"{self.used} blocks are in use; the cache can be cleared only when no sequence runs")
        self._idle.clear()
        self.events.cleared()
