"""Gaps in the events of a worker, and how they are closed. Does no I/O; time comes in as an argument.

A publisher numbers its events from 1 without gaps, per data-parallel rank, and keeps the last ones and a tree of its own
(`LocalIndexer`). A router follows every publisher with a `Follower`: it applies what is next in order, keeps what came too early,
and asks the publisher for what is missing. Whatever the event plane does, repeats, reorders, loses or brings back old events, the
router's index ends up equal to the publisher's tree.

A publisher that starts again begins at 1 with a higher ``epoch`` (its start time), so that its first event is not taken for a
repeat of an old one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from .._kvtree import STORED, UNKNOWN_PARENT, RadixTree
from ..wire.kv_events import KvCacheEvent, RouterEvent

RING_EVENTS = 1024
"""Events that a publisher keeps for range queries; a router that has missed more gets the whole tree."""
EARLY_EVENTS = 4096
"""Events that a follower keeps while it waits for missing ones; beyond it forgets the oldest, which are asked for again."""
FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 5.0
"""Between two questions to a publisher that does not answer; doubles from the first to this."""


# What travels ------------------------------------------------------------------------------------------------------------------


class Batch(msgspec.Struct, omit_defaults=True):
    """Message on the event plane: consecutive events of one publisher."""

    worker_id: int
    epoch: int
    events: list[KvCacheEvent] = []
    """all of one data-parallel rank, event ids rising by one"""
    heads: dict[int, int] = {}
    """newest event per rank: published from time to time, so that a lost last event is missed too"""


class RangeQuery(msgspec.Struct):
    """Question to a publisher: the events from ``start`` to ``end`` (None: to the newest) of a rank."""

    worker_id: int
    dp_rank: int
    epoch: int
    """of the events that the asker knows; 0: it knows none"""
    start: int
    end: int | None = None


class RangeAnswer(msgspec.Struct, omit_defaults=True):
    """Answer to a `RangeQuery`."""

    kind: str
    """``events``; ``dump``: what builds the whole tree from nothing, because ``start`` is older than the ring, or the asker
    knows nothing or another epoch; ``too_new``: ``start`` lies beyond the newest event; ``invalid``: no such rank, or
    ``end < start``"""
    worker_id: int
    dp_rank: int
    epoch: int
    last_id: int
    """newest event of the rank when this was written"""
    events: list[KvCacheEvent] = []
    more: bool = False
    """further parts of this answer follow"""


# The publisher's side ----------------------------------------------------------------------------------------------------------


class LocalIndexer:
    """Numbers a worker's events, keeps the last ones per rank and a tree of what its cache holds. One thread."""

    def __init__(self, worker_id: int, epoch: int, ring_events: int = RING_EVENTS) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.tree = RadixTree()
        self.orphans = 0
        """stored events whose parent the engine had not announced: they are in the ring, and in no tree"""
        self._ring_events = ring_events
        self._rings: dict[int, deque[KvCacheEvent]] = {}
        self._last: dict[int, int] = {}

    def record(self, event: KvCacheEvent) -> KvCacheEvent:
        """Number the event, remember it and return it."""
        rank = event.dp_rank
        event.event_id = self._last[rank] = self._last.get(rank, 0) + 1
        ring = self._rings.get(rank)
        if ring is None:
            ring = self._rings[rank] = deque(maxlen=self._ring_events)
        ring.append(event)
        if self.tree.apply_event(self.worker_id, event) == UNKNOWN_PARENT:
            self.orphans += 1
        return event

    def last_id(self, dp_rank: int = 0) -> int:
        """Newest event of a rank, 0 without any."""
        return self._last.get(dp_rank, 0)

    def heads(self) -> Batch:
        """What is published from time to time."""
        return Batch(self.worker_id, self.epoch, heads=dict(self._last))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that have published something."""
        return tuple(self._last)

    def answer(self, query: RangeQuery) -> RangeAnswer:
        """What a router that asks gets."""
        rank, last = query.dp_rank, self.last_id(query.dp_rank)

        def reply(kind: str, events: list[KvCacheEvent] | None = None) -> RangeAnswer:
            return RangeAnswer(kind, self.worker_id, rank, self.epoch, last, events or [])

        if query.worker_id != self.worker_id or (query.end is not None and query.end < query.start):
            return reply("invalid")
        ring = self._rings.get(rank)
        first = ring[0].event_id if ring else last + 1
        if query.epoch != self.epoch or query.start < first:
            return reply("dump", [e.event for e in self.tree.dump(self.worker_id) if e.event.dp_rank == rank])
        if query.start > last + 1:
            return reply("too_new")
        end = last if query.end is None else query.end
        return reply("events", [event for event in ring or () if query.start <= event.event_id <= end])


# The router's side -------------------------------------------------------------------------------------------------------------


@dataclass
class RecoveryStats:
    """What followers have seen, for metrics."""

    applied: int = 0
    repeated: int = 0
    """events that had been applied already, or belonged to an earlier epoch"""
    gaps: int = 0
    repairs: int = 0
    """gaps closed by events"""
    dumps: int = 0
    """trees taken over whole"""
    failed: int = 0
    """questions without an answer"""
    orphans: int = 0
    """stored events, in order, whose parent was unknown"""


@dataclass
class _Stream:
    """One rank of one worker, as a follower knows it."""

    epoch: int = 0
    last_id: int = 0
    early: OrderedDict[int, KvCacheEvent] = field(default_factory=OrderedDict)
    early_epoch: int = 0
    asked_at: float | None = None
    """when the question that is open was asked"""
    retry_at: float = 0.0
    pause: float = FIRST_PAUSE_S
    wanted: bool = False
    """something is missing"""
    behind_since: float | None = None


class Follower:
    """Keeps the part of a router's tree that follows publishers. One thread.

    `on_batch`, `on_answer` and `on_failure` take what has happened, `questions` says what to ask now, `next_wakeup` when to look
    again. At most one question per rank is open.
    """

    def __init__(self, tree: RadixTree, on_applied: Callable[[int, KvCacheEvent], object] | None = None) -> None:
        self.tree = tree
        self.stats = RecoveryStats()
        self._streams: dict[tuple[int, int], _Stream] = {}
        self._on_applied = on_applied

    def add_worker(self, worker_id: int, ranks: tuple[int, ...] = (0,)) -> None:
        """A publisher was found: its tree is wanted. May be called again."""
        for rank in ranks:
            key = (worker_id, rank)
            if key not in self._streams:
                self._streams[key] = _Stream(wanted=True)

    def remove_worker(self, worker_id: int) -> None:
        """A publisher is gone: its blocks too."""
        for key in [key for key in self._streams if key[0] == worker_id]:
            del self._streams[key]
        self.tree.remove_worker(worker_id)

    def position(self, worker_id: int, dp_rank: int = 0) -> tuple[int, int]:
        """(epoch, id) of the last event that was applied; zeros if none."""
        stream = self._streams.get((worker_id, dp_rank))
        return (stream.epoch, stream.last_id) if stream is not None else (0, 0)

    def set_position(self, worker_id: int, dp_rank: int, epoch: int, last_id: int, wanted: bool = True) -> None:
        """The tree, taken from a snapshot, has the events up to this one. ``wanted``: ask at once whether there are more."""
        self._streams[worker_id, dp_rank] = _Stream(epoch, last_id, wanted=wanted)

    def want_all(self) -> None:
        """Ask every publisher whether it has more than is known: what brings events has lost some, nobody knows which."""
        for stream in self._streams.values():
            if not stream.wanted:
                stream.wanted = True
                stream.retry_at = 0.0

    def positions(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(epoch, id) of the last applied event of every known rank."""
        return {key: (stream.epoch, stream.last_id) for key, stream in self._streams.items()}

    @property
    def behind(self) -> int:
        """Ranks of which events are known to be missing."""
        return sum(stream.wanted for stream in self._streams.values())

    def staleness(self, now: float) -> float:
        """Seconds since the oldest gap that is still open was seen; 0 without one."""
        since = [stream.behind_since for stream in self._streams.values() if stream.behind_since is not None]
        return now - min(since) if since else 0.0

    # what happened

    def on_batch(self, batch: Batch, now: float) -> None:
        """Events came over the event plane."""
        for event in batch.events:
            stream = self._streams.setdefault((batch.worker_id, event.dp_rank), _Stream())
            self._on_event(stream, batch.worker_id, batch.epoch, event, now)
        for rank, head in batch.heads.items():
            stream = self._streams.setdefault((batch.worker_id, rank), _Stream())
            known = max((stream.epoch, stream.last_id), (stream.early_epoch, max(stream.early, default=0)))
            if (batch.epoch, head) > known and head and not stream.wanted:
                self.stats.gaps += 1
                self._want(stream, now)

    def _on_event(self, stream: _Stream, worker_id: int, epoch: int, event: KvCacheEvent, now: float) -> None:
        if epoch < max(stream.epoch, stream.early_epoch) or (epoch == stream.epoch and event.event_id <= stream.last_id):
            self.stats.repeated += 1
            return
        if epoch == stream.epoch and event.event_id == stream.last_id + 1:
            self._apply(stream, worker_id, event)
            self._take_early(stream, worker_id)
            return
        if epoch > stream.epoch and event.event_id == 1:
            self._begin(stream, worker_id, event.dp_rank, epoch)
            self._apply(stream, worker_id, event)
            self._take_early(stream, worker_id)
            return
        # too early: something before it is missing
        if epoch > stream.early_epoch:
            stream.early.clear()
            stream.early_epoch = epoch
        stream.early[event.event_id] = event
        while len(stream.early) > EARLY_EVENTS:
            stream.early.popitem(last=False)
        if not stream.wanted:
            self.stats.gaps += 1
            self._want(stream, now)

    def on_answer(self, answer: RangeAnswer, now: float) -> None:
        """A publisher has answered."""
        stream = self._streams.get((answer.worker_id, answer.dp_rank))
        if stream is None:
            return
        stream.asked_at = None
        stream.pause = FIRST_PAUSE_S
        if answer.epoch < max(stream.epoch, stream.early_epoch):
            # of a publisher that has gone since: the one of now will be asked
            self._back_off(stream, now)
            return
        if answer.kind == "dump":
            if answer.epoch > stream.epoch or answer.last_id > stream.last_id:
                self._begin(stream, answer.worker_id, answer.dp_rank, answer.epoch)
                for event in answer.events:
                    self.tree.apply_event(answer.worker_id, event)
                stream.last_id = answer.last_id
                self.stats.dumps += 1
        elif answer.kind == "events":
            for event in answer.events:
                if answer.epoch == stream.epoch and event.event_id == stream.last_id + 1:
                    self._apply(stream, answer.worker_id, event)
            self.stats.repairs += 1
        else:
            # The publisher has less than we, within one epoch: what we have cannot be what it has. Begin anew.
            self._begin(stream, answer.worker_id, answer.dp_rank, 0)
        self._take_early(stream, answer.worker_id)
        if answer.kind not in ("dump", "events"):
            self._want(stream, now)
            self._back_off(stream, now)
        elif stream.wanted and (stream.epoch, stream.last_id) < (answer.epoch, answer.last_id):
            stream.retry_at = now  # the rest of a range that was cut

    def on_failure(self, worker_id: int, dp_rank: int, now: float) -> None:
        """A question got no answer."""
        stream = self._streams.get((worker_id, dp_rank))
        if stream is not None:
            stream.asked_at = None
            self.stats.failed += 1
            self._back_off(stream, now)

    def _back_off(self, stream: _Stream, now: float) -> None:
        stream.retry_at = now + stream.pause
        stream.pause = min(stream.pause * 2, MAX_PAUSE_S)

    def _want(self, stream: _Stream, now: float) -> None:
        if not stream.wanted:
            stream.wanted = True
            stream.behind_since = now

    def _begin(self, stream: _Stream, worker_id: int, dp_rank: int, epoch: int) -> None:
        """Forget what is known of a rank."""
        self.tree.apply_event(worker_id, KvCacheEvent(0, "cleared", dp_rank))
        stream.epoch = epoch
        stream.last_id = 0

    def _apply(self, stream: _Stream, worker_id: int, event: KvCacheEvent) -> None:
        result = self.tree.apply_event(worker_id, event)
        if result == UNKNOWN_PARENT:
            # In order, so nothing is missing: the engine itself has not announced the parent. Asking would bring the same.
            self.stats.orphans += 1
        stream.last_id = event.event_id
        self.stats.applied += 1
        if self._on_applied is not None and result == STORED:
            self._on_applied(worker_id, event)

    def _take_early(self, stream: _Stream, worker_id: int) -> None:
        """Apply what had come too early and is next now, and see whether anything is still missing."""
        if stream.early_epoch == stream.epoch:
            while (event := stream.early.pop(stream.last_id + 1, None)) is not None:
                self._apply(stream, worker_id, event)
            for event_id in [i for i in stream.early if i <= stream.last_id]:
                del stream.early[event_id]
        elif stream.early_epoch < stream.epoch:
            stream.early.clear()
        if not stream.early:
            stream.early_epoch = 0
            stream.wanted = False
            stream.behind_since = None
            stream.retry_at = 0.0

    # what to do

    def questions(self, now: float) -> list[RangeQuery]:
        """What to ask now. Each has to be followed by `on_answer` or `on_failure`."""
        out = []
        for (worker_id, rank), stream in self._streams.items():
            if not stream.wanted or stream.asked_at is not None or stream.retry_at > now:
                continue
            stream.asked_at = now
            if stream.early_epoch > stream.epoch or stream.epoch == 0:
                out.append(RangeQuery(worker_id, rank, stream.epoch, 0))
            else:
                end = min(stream.early) - 1 if stream.early else None
                out.append(RangeQuery(worker_id, rank, stream.epoch, stream.last_id + 1, end))
        return out

    def next_wakeup(self) -> float | None:
        """When `questions` will have something new without anything happening; None: never."""
        waiting = [stream.retry_at for stream in self._streams.values() if stream.wanted and stream.asked_at is None]
        return min(waiting, default=None)


def as_router_events(batch: Batch) -> list[RouterEvent]:
    """The events of a batch with their worker."""
    return [RouterEvent(batch.worker_id, event) for event in batch.events]
