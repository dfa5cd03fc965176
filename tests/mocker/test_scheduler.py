"""Batching, paging, prefix reuse and preemption, without a clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynwire._kvhash import compute_block_hashes
from dynwire.mocker.scheduler import EngineConfig, Scheduler, Sequence
from dynwire.mocker.simulation import simulate
from dynwire.mocker.timing import Timing

from .helpers import EOS, Mirror, check_books, story

SMALL = EngineConfig(num_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=40)


def prompt(length: int, first: int = 1) -> list[int]:
    return [first, *range(100, 99 + length)]


def run(sequence: Sequence, config: EngineConfig = SMALL, scheduler: Scheduler | None = None) -> list[int]:
    return simulate(scheduler or Scheduler(config, story()), [(0.0, sequence)])[0].answer


# One request --------------------------------------------------------------------------------------------------------------


def test_max_tokens() -> None:
    sequence = Sequence(prompt(5), max_tokens=7)
    assert len(run(sequence)) == 7 and sequence.finish_reason == "length"


def test_the_model_length_ends_an_answer() -> None:
    sequence = Sequence(prompt(5))
    assert len(run(sequence)) == 35 and sequence.finish_reason == "length"


def test_the_cache_ends_an_answer_that_would_never_fit() -> None:
    sequence = Sequence(prompt(5))
    config = EngineConfig(num_blocks=3, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    assert len(run(sequence, config)) == 7 and sequence.finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [0, 3, 9])
def test_a_stop_token_ends_the_answer_once_there_are_min_tokens(min_tokens: int) -> None:
    whole = run(Sequence(prompt(5), max_tokens=30))
    ends = [count for count, token in enumerate(whole, 1) if token == 90]
    expected = next(end for end in ends if end >= min_tokens)
    sequence = Sequence(prompt(5), max_tokens=30, min_tokens=min_tokens, stop_ids=[90])
    assert run(sequence) == whole[:expected] and sequence.finish_reason == "stop"


def test_an_open_answer_ends_by_itself() -> None:
    config = EngineConfig(max_model_len=5000)
    lengths = []
    for first in range(20):
        sequence = Sequence(prompt(5, first), eos_id=EOS, stop_ids=[EOS], may_end=True)
        answer = run(sequence, config)
        assert sequence.finish_reason == "stop" and answer[-1] == EOS and answer.count(EOS) == 1 and len(answer) > 1
        lengths.append(len(answer))
    assert len(set(lengths)) > 5


@pytest.mark.parametrize("length", [0, 40, 41])
def test_a_prompt_that_can_never_be_answered_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="empty" if length == 0 else "max_model_len is 40"):
        Scheduler(SMALL, story()).add(Sequence(prompt(length) if length else []), 0.0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"max_num_batched_tokens": 100}, "less than max_num_seqs"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}, "chunked prefill"),
    ],
)
def test_wrong_sizes(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EngineConfig(**settings)


# Continuing an answer -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    tokens=st.lists(st.sampled_from([1, 10, 11, 12, 90, 20, 30]), min_size=1, max_size=80),
    cut=st.integers(0, 60),
    seed=st.integers(0, 3),
    open_end=st.booleans(),
)
def test_a_request_that_contains_a_part_of_the_answer_gets_the_rest(
    tokens: list[int], cut: int, seed: int, open_end: bool
) -> None:
    """What migration relies on: prompt + delivered tokens, with as many tokens less to come."""
    config = EngineConfig(num_blocks=100, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=300)

    def answer(prompt: list[int], less: int) -> list[int]:
        more: dict[str, Any] = {"may_end": True, "stop_ids": [EOS], "eos_id": EOS} if open_end else {"max_tokens": 61 - less}
        return run(Sequence(prompt, seed=seed, **more), config)

    whole = answer(tokens, 0)
    cut = min(cut, len(whole) - 1)
    assert whole[:cut] + answer(tokens + whole[:cut], cut) == whole


def test_the_answer_depends_on_prompt_and_seed() -> None:
    config = EngineConfig(max_model_len=5000)
    answers = [run(Sequence(prompt(5, first), seed=seed, max_tokens=60), config) for first in range(3) for seed in range(3)]
    assert len(set(map(tuple, answers))) == 9


# Time ---------------------------------------------------------------------------------------------------------------------


def test_time_of_a_step() -> None:
    timing = Timing(base=1.0, per_token=0.1, attention=0.01, cache_read=0.001)
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=16, timing=timing)
    (outcome,) = simulate(Scheduler(config, story()), [(0.0, Sequence(prompt(20), max_tokens=3))])
    first = 1.0 + 16 * 0.1 + 16 * 8 * 0.01
    second = 1.0 + 4 * 0.1 + 4 * (16 + 2) * 0.01
    third, fourth = (1.0 + 0.1 + context * 0.001 for context in (20, 21))
    assert outcome.token_times == pytest.approx([first + second, first + second + third, first + second + third + fourth])


def test_a_long_prompt_does_not_stop_those_that_decode() -> None:
    """Chunked prefill: while the long prompt is read, the other sequence gets a token in every step."""
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = Scheduler(config, story())
    short, long = Sequence(prompt(4), max_tokens=30), Sequence(prompt(100, 2), max_tokens=1)
    scheduler.add(short, 0.0)
    steps = 0
    while not long.generated:
        step = scheduler.schedule(0.0)
        assert step is not None and step.decodes + sum(count for _, count in step.prefills) <= 16
        scheduler.complete(step, 0.0)
        if short.generated == 1 and not steps:
            scheduler.add(long, 0.0)
        steps += 1
    assert short.generated == steps and steps == 1 + -(-100 // 15)


def test_without_chunked_prefill_a_prompt_is_read_at_once() -> None:
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, enable_chunked_prefill=False)
    scheduler = Scheduler(config, story())
    for first in (1, 2):
        scheduler.add(Sequence(prompt(40, first), max_tokens=2), 0.0)
    counts = []
    while (step := scheduler.schedule(0.0)) is not None:
        counts.append([count for _, count in step.prefills])
        scheduler.complete(step, 0.0)
    assert counts == [[40], [40], []]


# The cache ----------------------------------------------------------------------------------------------------------------


def test_a_prefix_is_computed_once() -> None:
    scheduler = Scheduler(SMALL, story())
    first, second, other = (
        Sequence(prompt(11), max_tokens=2),
        Sequence(prompt(11), max_tokens=2),
        Sequence(prompt(11, 2), max_tokens=2),
    )
    for sequence in (first, second, other):
        run(sequence, scheduler=scheduler)
    assert (first.cached_tokens, second.cached_tokens, other.cached_tokens) == (0, 8, 0)
    assert (scheduler.prompt_tokens, scheduler.hit_tokens) == (33, 8)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = Scheduler(SMALL, story())
    first, second = Sequence(prompt(8), max_tokens=2), Sequence(prompt(8), max_tokens=2)
    run(first, scheduler=scheduler), run(second, scheduler=scheduler)
    assert second.cached_tokens == 4


def test_an_answer_is_reused_by_the_next_turn() -> None:
    scheduler = Scheduler(SMALL, story())
    answer = run(Sequence(prompt(6), max_tokens=10), scheduler=scheduler)
    following = Sequence([*prompt(6), *answer, 7], max_tokens=1)
    run(following, scheduler=scheduler)
    # 15 of the 16 tokens have keys and values: nothing was computed from the last one
    assert following.cached_tokens == 12


def test_equal_prompts_at_the_same_time_end_up_sharing() -> None:
    scheduler = Scheduler(SMALL, story())
    sequences = [Sequence(prompt(8), max_tokens=4) for _ in range(2)]
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    scheduler.complete(scheduler.schedule(0.0), 0.0)  # type: ignore[arg-type]
    assert scheduler.pool.used == 2 and all(sequence.blocks == 2 for sequence in sequences)


def test_the_least_recently_used_block_goes_first() -> None:
    config = EngineConfig(num_blocks=4, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = Scheduler(config, story())
    for first in (1, 2, 1, 3):  # each fills one block and begins another; 1 is used again
        run(Sequence(prompt(4, first), max_tokens=2), scheduler=scheduler)
    run(Sequence(prompt(9, 4), max_tokens=1), scheduler=scheduler)  # needs three of the four
    assert [scheduler.pool.match(compute_block_hashes(prompt(4, first), 4)) for first in (1, 2, 3)] == [0, 0, 1]


def test_preemption_takes_the_newest_and_costs_it_no_token() -> None:
    config = EngineConfig(num_blocks=6, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = Scheduler(config, story())
    old, new, later = sequences = [Sequence(prompt(8, first), max_tokens=12) for first in (1, 2, 3)]
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    while not scheduler.preemptions:
        step = scheduler.schedule(0.0)
        assert step is not None
        scheduler.complete(step, 0.0)
    assert list(scheduler.waiting) == [new, later] and old.running and not new.running
    while (step := scheduler.schedule(0.0)) is not None:
        scheduler.complete(step, 0.0)
    assert old.preemptions == 0
    alone = [run(Sequence(prompt(8, first), max_tokens=12), config) for first in (1, 2, 3)]
    assert [sequence.tokens[8:].tolist() for sequence in sequences] == alone


def test_clearing() -> None:
    mirror = Mirror(4)
    scheduler = Scheduler(SMALL, story(), mirror, worker_id=0)
    sequence = Sequence(prompt(8), max_tokens=3)
    scheduler.add(sequence, 0.0)
    scheduler.complete(scheduler.schedule(0.0), 0.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="3 blocks are in use"):
        scheduler.schedule(0.0)
        scheduler.pool.clear()
    scheduler.cancel(sequence)
    scheduler.pool.clear()
    assert mirror.known == {} and mirror.events[-1]["event"]["data"] == "cleared" and scheduler.pool.idle == 0


def test_events() -> None:
    events: list[dict[str, Any]] = []
    scheduler = Scheduler(SMALL, story(), events.append, worker_id=7, dp_rank=1)
    run(Sequence([1, 2, 3, 4, 5], max_tokens=1), scheduler=scheduler)
    block = 0xCB38E4D7FB2DCA5C
    assert events == [
        {
            "worker_id": 7,
            "event": {
                "event_id": 1,
                "dp_rank": 1,
                "data": {"stored": {"parent_hash": None, "blocks": [{"block_hash": block, "tokens_hash": block}]}},
            },
        }
    ]


# Anything at all ----------------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Requests come and are cancelled at any moment, in a cache that is too small for them."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror(SMALL.block_size)
        self.scheduler = Scheduler(SMALL, story(), self.mirror, worker_id=0)
        self.sequences: list[Sequence] = []
        self.step: Any = None

    @rule(
        group=st.integers(0, 2),
        length=st.integers(1, 30),
        max_tokens=st.none() | st.integers(1, 30),
        stop=st.booleans(),
    )
    def add(self, group: int, length: int, max_tokens: int | None, stop: bool) -> None:
        sequence = Sequence(prompt(length, group), max_tokens=max_tokens, stop_ids=[90] if stop else [])
        self.scheduler.add(sequence, 0.0)
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        before = sequence.finish_reason
        self.scheduler.cancel(sequence)
        assert sequence.finish_reason == (before or "cancelled") and not sequence.blocks

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        running = {s for s in self.sequences if s.running}
        fresh = {s for s in self.sequences if not s.running and s.finish_reason is None}
        self.step = self.scheduler.schedule(0.0)
        assert (self.step is None) == self.scheduler.idle
        if self.step is None:
            return
        assert self.step.duration > 0
        assert self.step.decodes + sum(count for _, count in self.step.prefills) <= SMALL.max_num_batched_tokens
        assert self.scheduler.active <= SMALL.max_num_seqs
        if self.step.preempted:  # nobody is let in, least of all those who were put aside
            assert all(sequence in running for sequence, _ in self.step.prefills)
            assert sum(sequence.running for sequence in running) == len(running) - self.step.preempted
        for sequence, count in self.step.prefills:
            assert count > 0 and sequence.computed + count <= sequence.length
            if sequence in fresh:  # the naive model: the longest known prefix, less the last token
                assert sequence.computed == self.mirror.matched(sequence, sequence.length - 1)

    @precondition(lambda self: self.step is not None)
    @rule()
    def complete(self) -> None:
        before = {s: s.length for s in self.sequences}
        got = self.scheduler.complete(self.step, 0.0)
        self.step = None
        assert len(got) == len(set(got))
        for sequence in self.sequences:
            assert sequence.length - before[sequence] == (sequence in got)

    @invariant()
    def books(self) -> None:
        check_books(self.scheduler, self.sequences)
        pool = self.scheduler.pool
        assert self.mirror.known.keys() == pool._holders.keys() | pool._idle.keys()

    def teardown(self) -> None:
        while True:
            if self.step is not None:
                self.scheduler.complete(self.step, 0.0)
            self.step = self.scheduler.schedule(0.0)
            if self.step is None:
                break
        assert self.scheduler.pool.used == 0 and self.scheduler.idle
        for sequence in self.sequences:
            if sequence.finish_reason != "cancelled":
                alone = Sequence(
                    sequence.tokens[: sequence.prompt_length], max_tokens=sequence.max_tokens, stop_ids=[*sequence.stop_ids]
                )
                assert run(alone) == sequence.tokens[sequence.prompt_length : sequence.length].tolist()


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


@settings(deadline=None, max_examples=30)
@given(
    arrivals=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2), st.integers(1, 30), st.integers(1, 9)), max_size=20),
    caching=st.booleans(),
)
def test_the_same_run_twice(arrivals: list[tuple[float, int, int, int]], caching: bool) -> None:
    config = EngineConfig(
        num_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=40, enable_prefix_caching=caching
    )

    def play() -> Any:
        mirror = Mirror(4)
        scheduler = Scheduler(config, story(), mirror, worker_id=0)
        requests = [(at, Sequence(prompt(length, group), max_tokens=n)) for at, group, length, n in sorted(arrivals)]
        outcomes = simulate(scheduler, requests)
        assert scheduler.pool.used == 0 and (caching or not mirror.events)
        return [(o.answer, o.token_times, o.sequence.cached_tokens) for o in outcomes], mirror.events

    assert play() == play()
