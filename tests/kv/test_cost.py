"""Load booking, cost and choice, and the index without events."""

from __future__ import annotations

import collections
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynwire.kv_router import compute_block_hashes, sequence_hashes
from dynwire.kv_router.approximate import ApproximateIndex
from dynwire.kv_router.cost import CostSettings, choose, costs
from dynwire.kv_router.load import ActiveLoad, Worker

A, B = (1, 0), (2, 0)


def prompt(*blocks: int) -> list[int]:
    return sequence_hashes(list(blocks))


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("book", "first", "finish", "remove")),
        st.integers(0, 5),
        st.sampled_from((A, B, (2, 1))),
        st.lists(st.integers(0, 2), max_size=4),
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_load_is_the_sum_of_what_runs(operations: list[tuple[str, int, Worker, list[int]]]) -> None:
    load = ActiveLoad()
    running: dict[str, tuple[Worker, int, list[int]]] = {}
    for action, number, worker, blocks in operations:
        request = str(number)
        hashes = prompt(*blocks)
        if action == "book":
            load.book(request, worker, 10 * number, hashes, 1)
            running[request] = (worker, 10 * number, hashes)
        elif action == "first":
            load.first_token(request)
            if request in running:
                running[request] = (running[request][0], 0, running[request][2])
        elif action == "finish":
            load.finish(request)
            running.pop(request, None)
        else:
            load.remove_worker(worker[0])
            running = {r: entry for r, entry in running.items() if entry[0][0] != worker[0]}
        assert load.requests == len(running)
        for each in (A, B, (2, 1)):
            mine = [entry for entry in running.values() if entry[0] == each]
            shared = {value for _, _, values in mine for value in values}
            found = load.of(each)
            assert found.requests == len(mine)
            assert found.prefill_tokens == sum(tokens for _, tokens, _ in mine)
            assert found.decode_blocks == len(shared) + len(mine)
            assert load.decode_blocks_with(each, hashes, 1) == len(shared | set(hashes)) + len(mine) + 1


def test_cost_counts_what_is_not_cached_and_what_is_busy() -> None:
    load = ActiveLoad()
    load.book("r", A, 32, prompt(9, 9), 0)
    hashes = prompt(1, 2, 3, 4)
    found = costs([A, B], 16 * 4 + 3, 16, {A: 3}, hashes, load, CostSettings(overlap_score_weight=2.0))
    assert [choice.prefill_tokens for choice in found] == [19, 67]
    assert [choice.overlap_blocks for choice in found] == [3, 0]
    assert found[0].cost == pytest.approx(2.0 * (32 + 19) / 16 + 2 + 4 + 1)
    assert found[1].cost == pytest.approx(2.0 * 67 / 16 + 4 + 1)


def test_the_cheapest_wins_and_ties_go_to_the_smaller_tree() -> None:
    load = ActiveLoad()
    rng = random.Random(1)
    settings = CostSettings()
    hashes = prompt(1, 2)
    choices = costs([A, B], 32, 16, {B: 2}, hashes, load, settings)
    assert choose(choices, settings, {}, rng).worker == B
    tied = costs([A, B], 32, 16, {}, hashes, load, settings)
    assert {choose(tied, settings, {A: 5, B: 4}, rng).worker for _ in range(20)} == {B}
    assert {choose(tied, settings, {}, rng).worker for _ in range(50)} == {A, B}


def test_temperature_spreads_and_prefers_the_cheaper() -> None:
    load = ActiveLoad()
    rng = random.Random(2)
    settings = CostSettings(temperature=0.5)
    choices = costs([A, B, (3, 0)], 64, 16, {A: 4, B: 2}, prompt(1, 2, 3, 4), load, settings)
    counts = collections.Counter(choose(choices, settings, {}, rng).worker for _ in range(3000))
    assert counts[A] > counts[B] > counts[3, 0] > 50


def test_approximate_entries_expire_unless_routed_again() -> None:
    index = ApproximateIndex(ttl=10.0)
    blocks = compute_block_hashes(range(32), 4)
    hashes = sequence_hashes(blocks)
    index.routed(A, blocks, hashes, 0.0)
    index.routed(A, blocks[:3], hashes[:3], 8.0)
    index.expire(9.9)
    assert index.tree.find_matches(blocks).scores == {A: 8}
    index.expire(10.0)
    assert index.tree.find_matches(blocks).scores == {A: 3}
    index.expire(18.0)
    assert (len(index), index.tree.nodes) == (0, 0)


def test_approximate_index_is_pruned_from_its_oldest() -> None:
    index = ApproximateIndex(max_blocks=100)
    prompts = [compute_block_hashes([i] * 40, 4) for i in range(11)]
    for i, blocks in enumerate(prompts):
        index.routed((i % 3, 0), blocks, sequence_hashes(blocks), float(i))
    assert len(index) == 80 == index.tree.entries
    assert index.tree.find_matches(prompts[10]).scores == {(10 % 3, 0): 10}
    assert index.tree.find_matches(prompts[0]).scores == {}
    index.remove_worker(1)
    assert len(index) == index.tree.entries
