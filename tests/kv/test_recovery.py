"""Whatever the event plane does to events, a follower ends up with what the publisher has."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from dynwire.event_plane.recovery import Batch, Follower, LocalIndexer, RangeQuery
from dynwire.kv_router import RadixTree
from dynwire.wire.kv_events import KvCacheEvent, cleared, removed, stored

from .test_tree import content

WORKER = 2**63 + 5


class Engine:
    """Makes plausible events of one worker, of several ranks."""

    def __init__(self, rng: random.Random, epoch: int, ranks: int = 1) -> None:
        self.rng = rng
        self.index = LocalIndexer(WORKER, epoch, ring_events=16)
        self.have: dict[int, list[int]] = {rank: [] for rank in range(ranks)}

    def event(self) -> Batch:
        rng, rank = self.rng, self.rng.randrange(len(self.have))
        mine = self.have[rank]
        action = rng.random()
        if action < 0.7 or not mine:
            blocks = [(rng.getrandbits(64), rng.randrange(4)) for _ in range(rng.randrange(1, 4))]
            parent = rng.choice(mine) if mine and rng.random() < 0.7 else None
            if rng.random() < 0.05:
                parent = rng.getrandbits(64)  # an engine that forgot to announce it
            else:
                mine.extend(block for block, _ in blocks)
            event = stored(0, parent, blocks, rank)
        elif action < 0.97:
            gone = rng.sample(mine, min(len(mine), 2))
            self.have[rank] = [block for block in mine if block not in gone]
            event = removed(0, gone, rank)
        else:
            self.have[rank] = []
            event = cleared(0, rank)
        return Batch(WORKER, self.index.epoch, [self.index.record(event)])


def settle(follower: Follower, index: LocalIndexer, now: float, limit: int = 50) -> float:
    """Answer questions until there are none; a loop would exceed the limit."""
    for _ in range(limit):
        for query in follower.questions(now):
            follower.on_answer(index.answer(query), now)
        wakeup = follower.next_wakeup()
        if wakeup is None:
            return now
        now = max(now, wakeup)
    pytest.fail("the follower asks for ever")


def deliveries(rng: random.Random, batches: list[Batch]) -> Iterator[Batch]:
    """Lost, repeated, swapped and replayed."""
    held: list[Batch] = []
    for batch in batches:
        fate = rng.random()
        if fate < 0.15:
            continue
        if fate < 0.3:
            held.append(batch)
            continue
        yield batch
        if fate < 0.45:
            yield batch
        while held and rng.random() < 0.5:
            yield held.pop(rng.randrange(len(held)))
    yield from held
    yield from rng.sample(batches, len(batches) // 3)


@pytest.mark.parametrize("seed", range(60))
def test_any_delivery_ends_in_the_publishers_tree(seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(rng, epoch=10, ranks=rng.choice((1, 2)))
    follower = Follower(RadixTree())
    follower.add_worker(WORKER, tuple(engine.have))
    now = 0.0
    for round_ in range(8):
        if round_ == 4 and seed % 2:
            engine = Engine(rng, epoch=11, ranks=len(engine.have))  # the worker starts again, from event 1
        batches = [engine.event() for _ in range(rng.randrange(40))]
        for batch in deliveries(rng, batches):
            follower.on_batch(batch, now)
            now += 0.01
            if rng.random() < 0.1:
                for query in follower.questions(now):
                    if rng.random() < 0.3:
                        follower.on_failure(query.worker_id, query.dp_rank, now)
                    else:
                        follower.on_answer(engine.index.answer(query), now)
    # the newest event may be the lost one: the next one shows it
    for _ in range(20):
        follower.on_batch(engine.event(), now)
    for rank in engine.have:
        batch = Batch(WORKER, engine.index.epoch, [engine.index.record(stored(0, None, [(rank, 1)], rank))])
        follower.on_batch(batch, now)
    settle(follower, engine.index, now)
    assert content(follower.tree) == content(engine.index.tree)
    assert follower.behind == 0
    assert all(follower.position(WORKER, rank) == (engine.index.epoch, engine.index.last_id(rank)) for rank in engine.have)


def test_a_new_router_takes_the_whole_tree_and_then_events() -> None:
    engine = Engine(random.Random(1), epoch=3)
    for _ in range(100):
        engine.event()
    follower = Follower(RadixTree())
    follower.add_worker(WORKER)
    early = engine.event()
    follower.on_batch(early, 0.0)
    (query,) = follower.questions(0.0)
    assert follower.questions(0.0) == [], "one question at a time"
    later = [engine.event() for _ in range(5)]
    answer = engine.index.answer(query)
    assert answer.kind == "dump"
    for batch in later[2:]:
        follower.on_batch(batch, 0.1)
    follower.on_answer(answer, 0.2)
    for batch in later[:2]:
        follower.on_batch(batch, 0.3)
    settle(follower, engine.index, 0.3)
    assert content(follower.tree) == content(engine.index.tree)


def test_a_gap_within_the_ring_is_closed_by_its_events_only() -> None:
    engine = Engine(random.Random(2), epoch=1)
    follower = Follower(RadixTree())
    batches = [engine.event() for _ in range(6)]
    for i in (0, 1, 4, 5):
        follower.on_batch(batches[i], float(i))
    assert follower.staleness(7.0) == 3.0
    (query,) = follower.questions(6.0)
    assert (query.start, query.end) == (3, 4)
    answer = engine.index.answer(query)
    assert [event.event_id for event in answer.events] == [3, 4]
    follower.on_answer(answer, 6.0)
    assert follower.position(WORKER) == (1, 6)
    assert (follower.stats.gaps, follower.stats.repairs, follower.stats.dumps) == (1, 1, 0)
    assert follower.staleness(9.0) == 0.0


def test_kinds_of_answers() -> None:
    engine = Engine(random.Random(4), epoch=9)
    for _ in range(40):
        engine.event()
    ask = engine.index.answer
    assert ask(RangeQuery(WORKER, 0, 9, 41)).kind == "events"
    assert ask(RangeQuery(WORKER, 0, 9, 42)).kind == "too_new"
    assert ask(RangeQuery(WORKER, 0, 9, 25)).kind == "events"
    assert ask(RangeQuery(WORKER, 0, 9, 24)).kind == "dump", "older than the ring"
    assert ask(RangeQuery(WORKER, 0, 8, 41)).kind == "dump", "another epoch"
    assert ask(RangeQuery(WORKER, 0, 9, 30, 29)).kind == "invalid"
    assert ask(RangeQuery(1, 0, 9, 30)).kind == "invalid"
    nothing = ask(RangeQuery(WORKER, 5, 9, 1))
    assert (nothing.kind, nothing.last_id, nothing.events) == ("events", 0, [])


def test_a_publisher_that_does_not_answer_is_asked_ever_more_rarely() -> None:
    follower = Follower(RadixTree())
    follower.add_worker(WORKER)
    now, times = 0.0, []
    for _ in range(12):
        assert len(follower.questions(now)) == 1
        times.append(now)
        follower.on_failure(WORKER, 0, now)
        assert follower.questions(now) == []
        wakeup = follower.next_wakeup()
        assert wakeup is not None
        now = wakeup
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert pauses[0] == pytest.approx(0.05)
    assert all(b > a - 1e-9 for a, b in itertools.pairwise(pauses))
    assert pauses[-1] == pytest.approx(5.0)
    follower.remove_worker(WORKER)
    assert follower.next_wakeup() is None


def test_events_of_an_earlier_epoch_change_nothing() -> None:
    follower = Follower(RadixTree())
    follower.on_batch(Batch(WORKER, 5, [stored(1, None, [(1, 1)])]), 0.0)
    follower.on_batch(Batch(WORKER, 4, [stored(1, None, [(2, 2)]), stored(9, None, [(3, 3)])]), 0.0)
    assert follower.tree.find_matches([1]).scores == {(WORKER, 0): 1}
    assert follower.tree.find_matches([2]).scores == {}
    assert follower.behind == 0
    assert follower.stats.repeated == 2


def test_a_snapshot_goes_on_where_it_was_taken() -> None:
    engine = Engine(random.Random(6), epoch=2)
    first = Follower(RadixTree())
    for _ in range(10):
        first.on_batch(engine.event(), 0.0)
    saved, positions = first.tree.snapshot(), first.positions()
    for _ in range(5):
        engine.event()
    second = Follower(RadixTree.restore(saved))
    for (worker, rank), (epoch, last_id) in positions.items():
        second.set_position(worker, rank, epoch, last_id)
    settle(second, engine.index, 0.0)
    assert content(second.tree) == content(engine.index.tree)
    assert second.stats.dumps == 0


def test_an_orphan_is_counted_and_not_asked_for() -> None:
    index = LocalIndexer(WORKER, 1)
    follower = Follower(RadixTree())
    for event in (stored(0, 999, [(1, 1)]), stored(0, None, [(2, 2)])):
        follower.on_batch(Batch(WORKER, 1, [index.record(event)]), 0.0)
    assert (index.orphans, follower.stats.orphans, follower.behind) == (1, 1, 0)
    assert content(follower.tree) == content(index.tree)


def test_a_lost_last_event_is_missed_at_the_next_heads() -> None:
    engine = Engine(random.Random(8), epoch=2)
    follower = Follower(RadixTree())
    for _ in range(5):
        follower.on_batch(engine.event(), 0.0)
    follower.on_batch(engine.index.heads(), 1.0)
    assert follower.behind == 0
    engine.event()
    follower.on_batch(engine.index.heads(), 2.0)
    follower.on_batch(engine.index.heads(), 3.0)
    assert (follower.behind, follower.stats.gaps) == (1, 1)
    settle(follower, engine.index, 3.0)
    assert content(follower.tree) == content(engine.index.tree)


def test_ids_are_given_per_rank() -> None:
    index = LocalIndexer(WORKER, 1)
    events: list[KvCacheEvent] = [index.record(stored(0, None, [(i, i)], i % 2)) for i in range(4)]
    assert [(event.dp_rank, event.event_id) for event in events] == [(0, 1), (1, 1), (0, 2), (1, 2)]
