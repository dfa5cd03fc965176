"""What workers are busy with, as far as routers have sent it there. Does no I/O; one thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

Worker = tuple[int, int]
"""(worker_id, dp_rank)"""

RequestKey = str | tuple[int, int]
"""Own requests have a name, those of another router (its id, its number of the request)."""


@dataclass
class Booking:
    """A request that runs at a worker."""

    worker: Worker
    prefill_tokens: int
    blocks: Sequence[int]
    further_blocks: int
    """of the prompt's partial last block, which has no hash"""


class LoadListener(Protocol):
    """Hears of own requests, not of those of other routers."""

    def booked(self, request_id: str, booking: Booking) -> None: ...

    def computed(self, request_id: str) -> None: ...

    def finished(self, request_id: str) -> None: ...


@dataclass
class WorkerLoad:
    """Sums over the running requests of one worker."""

    prefill_tokens: int = 0
    """tokens of prompts that are not known to be computed yet"""
    requests: int = 0
    further_blocks: int = 0
    blocks: dict[int, int] = field(default_factory=dict)
    """sequence hash to number of running requests that use the block"""

    @property
    def decode_blocks(self) -> int:
        """Blocks in use; one that several requests share counts once."""
        return len(self.blocks) + self.further_blocks


class ActiveLoad:
    """Load of all workers: booked when a request is routed, the prefill part released at its first token, the rest at its end.

    What other routers have sent to the same workers (`dynwire.kv_router.replicas`) counts like the own.
    """

    def __init__(self) -> None:
        self._own: dict[str, Booking] = {}
        self._replicas: dict[int, dict[int, Booking]] = {}
        self._workers: dict[Worker, WorkerLoad] = {}
        self.listener: LoadListener | None = None

    def of(self, worker: Worker) -> WorkerLoad:
        """Load of a worker; an empty one if it has none."""
        return self._workers.get(worker) or WorkerLoad()

    @property
    def requests(self) -> int:
        """Own requests that are booked."""
        return len(self._own)

    @property
    def own(self) -> dict[str, Booking]:
        """Own requests, by name; not to be changed."""
        return self._own

    def requests_of(self, replica: int) -> int:
        """Requests that another router has booked."""
        return len(self._replicas.get(replica, ()))

    def decode_blocks_with(self, worker: Worker, sequence_hashes: Sequence[int], further_blocks: int = 0) -> int:
        """Blocks in use at a worker if it got this prompt too."""
        load = self._workers.get(worker)
        if load is None:
            return len(sequence_hashes) + further_blocks
        blocks = load.blocks
        if not blocks:
            return load.decode_blocks + len(sequence_hashes) + further_blocks
        # A prefix that is in use is in use from its beginning: look for where the sharing ends.
        low, high = 0, len(sequence_hashes)
        while low < high:
            middle = (low + high) // 2
            if sequence_hashes[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return load.decode_blocks + len(sequence_hashes) - low + further_blocks

    def book(
        self, key: RequestKey, worker: Worker, prefill_tokens: int, sequence_hashes: Sequence[int], further_blocks: int = 0
    ) -> None:
        """A request was routed. One that was booked before is moved (it was retried elsewhere)."""
        self.finish(key)
        booking = Booking(worker, prefill_tokens, sequence_hashes, further_blocks)
        if isinstance(key, str):
            self._own[key] = booking
        else:
            self._replicas.setdefault(key[0], {})[key[1]] = booking
        load = self._workers.setdefault(worker, WorkerLoad())
        load.requests += 1
        load.prefill_tokens += prefill_tokens
        load.further_blocks += further_blocks
        for value in sequence_hashes:
            load.blocks[value] = load.blocks.get(value, 0) + 1
        if self.listener is not None and isinstance(key, str):
            self.listener.booked(key, booking)

    def first_token(self, key: RequestKey) -> None:
        """The prompt has been computed."""
        booking = self._own.get(key) if isinstance(key, str) else self._replicas.get(key[0], {}).get(key[1])
        if booking is not None and booking.prefill_tokens:
            self._workers[booking.worker].prefill_tokens -= booking.prefill_tokens
            booking.prefill_tokens = 0
            if self.listener is not None and isinstance(key, str):
                self.listener.computed(key)

    def finish(self, key: RequestKey) -> None:
        """The request is over, however it ended. Unknown ones are ignored."""
        booking = self._own.pop(key, None) if isinstance(key, str) else self._replicas.get(key[0], {}).pop(key[1], None)
        if booking is None:
            return
        self._release(booking)
        if self.listener is not None and isinstance(key, str):
            self.listener.finished(key)

    def _release(self, booking: Booking) -> None:
        load = self._workers[booking.worker]
        load.requests -= 1
        load.prefill_tokens -= booking.prefill_tokens
        load.further_blocks -= booking.further_blocks
        for value in booking.blocks:
            left = load.blocks[value] - 1
            if left:
                load.blocks[value] = left
            else:
                del load.blocks[value]
        if not load.requests:
            del self._workers[booking.worker]

    def remove_worker(self, worker_id: int) -> None:
        """A worker is gone, and its requests with it. Those of other routers stay until these say so themselves."""
        for request_id in [r for r, booking in self._own.items() if booking.worker[0] == worker_id]:
            self.finish(request_id)

    def remove_replica(self, replica: int) -> None:
        """Another router is gone, or says anew what it has booked."""
        for booking in self._replicas.pop(replica, {}).values():
            self._release(booking)

    def totals(self) -> dict[Worker, tuple[int, int, int]]:
        """(requests, prefill tokens, decode blocks) of every worker that has requests."""
        return {w: (load.requests, load.prefill_tokens, load.decode_blocks) for w, load in self._workers.items()}
