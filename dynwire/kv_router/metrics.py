"""What there is to know about a router, for monitoring: one table that every way of showing it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .indexer import KvIndexer
    from .load import Worker
    from .router import KvRouter
    from .sync import ReplicaSync


@dataclass(frozen=True)
class Metric:
    """A number. Counters only rise; without events, or without replica sync, some have no value."""

    name: str
    doc: str
    read: Callable[[KvRouter], float | None]
    counter: bool = True


def _of_index(read: Callable[[KvIndexer], float]) -> Callable[[KvRouter], float | None]:
    return lambda router: None if router.indexer is None else read(router.indexer)


def _of_replicas(read: Callable[[ReplicaSync], float]) -> Callable[[KvRouter], float | None]:
    return lambda router: None if router.replicas is None else read(router.replicas)


METRICS = (
    Metric("decisions", "Requests that were sent to a worker", lambda r: r.stats.routed),
    Metric("decision_seconds", "Time that decisions took", lambda r: r.stats.decision_seconds),
    Metric(
        "by_load_only", "Decisions while no events could come: by load, and by what was known", lambda r: r.stats.by_load_only
    ),
    Metric("prompt_blocks", "Full blocks of the prompts", lambda r: r.stats.prompt_blocks),
    Metric("predicted_hit_blocks", "Of those, expected in the chosen worker's cache", lambda r: r.stats.predicted_blocks),
    Metric("reported_requests", "Requests whose worker said what it found in its cache", lambda r: r.stats.reported),
    Metric("reported_hit_blocks", "Blocks that workers found in their caches", lambda r: r.stats.reported_blocks),
    Metric("exact_predictions", "Requests whose worker found what was expected", lambda r: r.stats.agreed),
    Metric("events_applied", "KV events in the index", _of_index(lambda i: i.follower.stats.applied)),
    Metric("events_repeated", "KV events that were known already", _of_index(lambda i: i.follower.stats.repeated)),
    Metric("event_gaps", "Times that KV events were missing", _of_index(lambda i: i.follower.stats.gaps)),
    Metric("event_repairs", "Missing KV events that a worker has sent again", _of_index(lambda i: i.follower.stats.repairs)),
    Metric("event_dumps", "Whole trees that workers have sent", _of_index(lambda i: i.follower.stats.dumps)),
    Metric("event_failed_queries", "Questions that got no answer", _of_index(lambda i: i.follower.stats.failed)),
    Metric("event_orphans", "KV events whose parent was never announced", _of_index(lambda i: i.follower.stats.orphans)),
    Metric("event_malformed_messages", "Messages on the event plane that were none", _of_index(lambda i: i.malformed)),
    Metric("event_plane_connected", "1 if KV events can come", _of_index(lambda i: i.connected), False),
    Metric("index_staleness_seconds", "Age of the oldest gap that is open", _of_index(lambda i: i.staleness()), False),
    Metric("index_ranks_behind", "Ranks with a gap that is open", _of_index(lambda i: i.follower.behind), False),
    Metric("index_mismatched_workers", "Workers with another block size", _of_index(lambda i: len(i.mismatched)), False),
    Metric("index_bytes", "Memory of the index", lambda r: r.tree.nbytes, False),
    Metric("index_blocks", "Blocks in the index, once per worker", lambda r: r.tree.entries, False),
    Metric("index_evicted_blocks", "Blocks dropped from the index to keep its budget", lambda r: r.tree.evicted),
    Metric("active_requests", "Requests that this router has booked", lambda r: r.load.requests, False),
    Metric("replicas", "Other routers whose load is counted", _of_replicas(lambda s: len(s.others.replicas)), False),
    Metric("replica_messages", "Messages of other routers", _of_replicas(lambda s: s.stats.messages)),
    Metric("replica_gaps", "Times that messages of other routers were missing", _of_replicas(lambda s: s.stats.gaps)),
    Metric("replica_snapshots", "Whole loads that other routers have sent", _of_replicas(lambda s: s.stats.snapshots)),
    Metric("replica_silent", "Times that a router's load was dropped for its silence", _of_replicas(lambda s: s.stats.silent)),
)


def values(router: KvRouter) -> dict[str, float]:
    """All that have a value, by name."""
    read = ((metric.name, metric.read(router)) for metric in METRICS)
    return {name: value for name, value in read if value is not None}


@dataclass(frozen=True)
class WorkerState:
    """What a router knows of one rank of a worker."""

    worker: Worker
    cached_blocks: int
    requests: int
    prefill_tokens: int
    """of prompts that are being computed"""
    decode_blocks: int
    """in use"""


def worker_states(router: KvRouter, worker_ids: tuple[int, ...]) -> Iterator[WorkerState]:
    """Of every rank that has something cached or to do; of rank 0 if a worker has neither."""
    load, cached = router.load.totals(), set(router.tree.workers)
    ranks: dict[int, set[int]] = {}
    for worker_id, rank in (*load, *cached):
        ranks.setdefault(worker_id, set()).add(rank)
    for worker_id in worker_ids:
        for rank in sorted(ranks.get(worker_id, {0})):
            worker = (worker_id, rank)
            yield WorkerState(worker, router.tree.blocks_of(*worker) if worker in cached else 0, *load.get(worker, (0, 0, 0)))
