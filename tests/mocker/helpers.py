"""What the tests of the simulated engine share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynwire._kvhash import compute_block_hashes, sequence_hashes
from dynwire.mocker.scheduler import Scheduler, Sequence
from dynwire.mocker.text import Storyteller

EOS = 99
SENTENCES = [[10, 11, 12, 90], [10, 11, 13, 14, 15, 90], [20, 21, 22, 23, 24, 25, 26, 90], [30, 90], [10, 20, 30, 10, 11, 90]]
"""small, with common beginnings that also come in the middle, so that continuing is not trivial"""


def story(seed: int = 0) -> Storyteller:
    return Storyteller(SENTENCES, seed)


def sequence_hash(parent: int | None, block: int) -> int:
    return sequence_hashes([block], parent)[0]


class Mirror:
    """A router's view: builds the set of known blocks from the events alone, and checks that they make sense."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.known: dict[int, int | None] = {}
        """sequence hash -> that of the block before"""
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        inner = event["event"]
        assert inner["event_id"] == len(self.events)
        data = inner["data"]
        if data == "cleared":
            self.known.clear()
        elif "stored" in data:
            parent = data["stored"]["parent_hash"]
            assert data["stored"]["blocks"]
            for block in data["stored"]["blocks"]:
                assert parent is None or parent in self.known
                assert block["block_hash"] not in self.known
                assert block["block_hash"] == sequence_hash(parent, block["tokens_hash"])
                self.known[block["block_hash"]] = parent
                parent = block["block_hash"]
        else:
            for block in data["removed"]["block_hashes"]:
                del self.known[block]
                assert block not in self.known.values(), "a block went before one that follows it"

    def matched(self, sequence: Sequence, count: int) -> int:
        """Tokens at the front of the first ``count`` tokens that the known blocks cover."""
        parent, at = None, 0
        while at + self.block_size <= count:
            parent = sequence_hash(parent, compute_block_hashes(sequence.tokens[at : at + self.block_size], self.block_size)[0])
            if parent not in self.known:
                break
            at += self.block_size
        return at


def check_books(scheduler: Scheduler, sequences: Iterable[Sequence]) -> None:
    """Blocks are neither lost nor counted twice: what the pool says is what the running sequences hold."""
    pool, block_size = scheduler.pool, scheduler.config.block_size
    running = [sequence for sequence in sequences if sequence.running]
    assert pool.private == sum(sequence._private for sequence in running)
    assert not any(sequence.computed or sequence.blocks for sequence in scheduler.waiting)
    held: dict[int, int] = {}
    for sequence in running:
        assert sequence in scheduler._decoding or sequence in scheduler._prefilling
        if sequence in scheduler._decoding:
            sequence.computed = sequence.length - 1  # the scheduler does this only when it matters
        assert sequence.blocks * block_size >= sequence.computed
        for block in sequence._hashes[: sequence._published]:
            held[block] = held.get(block, 0) + 1
    assert pool._holders == held
    assert not held.keys() & pool._idle.keys()
    assert pool.used + pool.idle <= pool.capacity
    assert scheduler.active == len(running)
    assert scheduler._context == sum(s.length - 1 for s in scheduler._decoding)
