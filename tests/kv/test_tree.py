"""The compiled index against the plain Python one, over random histories."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dynwire.kv_router import RadixTree, RouterEvent, sequence_hashes
from dynwire.wire.kv_events import KvCacheEvent, cleared, removed, stored

from .model import ModelTree


def content(tree: RadixTree) -> dict[tuple[int, int], dict[int, int]]:
    """What a tree knows, in a form that can be compared: per holder and block id the sequence hash."""
    out: dict[tuple[int, int], dict[int, int]] = {}
    for event in tree.dump():
        mine = out.setdefault((event.worker_id, event.event.dp_rank), {})
        data = event.event.data
        assert data != "cleared"
        if data.stored is not None:
            parent = data.stored.parent_hash
            before = None if parent is None else mine[parent]
            for block in data.stored.blocks:
                mine[block.block_hash] = before = sequence_hashes([block.tokens_hash], before)[0]
        else:
            assert data.removed is not None
            for block_hash in data.removed.block_hashes:
                del mine[block_hash]
    return {holder: blocks for holder, blocks in out.items() if blocks}


# few values, so that histories meet
HOLDERS = st.tuples(st.sampled_from((1, 2, 2**64 - 1)), st.sampled_from((0, 1)))
IDS = st.integers(0, 12).map(lambda i: i * 0x9E3779B97F4A7C15 % 2**64)
TOKENS = st.integers(0, 3)
BLOCKS = st.lists(st.tuples(IDS, TOKENS), max_size=5)


class Histories(RuleBasedStateMachine):
    """Stores, removals and clearings in any order, ids reused, parents unknown, several ids for one block."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree()
        self.model = ModelTree()

    @rule(holder=HOLDERS, parent=st.none() | IDS, blocks=BLOCKS)
    def store(self, holder: tuple[int, int], parent: int | None, blocks: list[tuple[int, int]]) -> None:
        event = stored(1, parent, blocks, holder[1])
        assert self.tree.apply_event(RouterEvent(holder[0], event)) == self.model.store(holder, parent, blocks)

    @rule(holder=HOLDERS, ids=st.lists(IDS, max_size=4))
    def remove(self, holder: tuple[int, int], ids: list[int]) -> None:
        assert self.tree.remove(*holder, ids) == self.model.remove(holder, ids)

    @rule(holder=HOLDERS)
    def clear(self, holder: tuple[int, int]) -> None:
        self.tree.apply_event(holder[0], cleared(1, holder[1]))
        self.model.clear(holder)

    @rule(worker=st.sampled_from((1, 2, 2**64 - 1)))
    def worker_leaves(self, worker: int) -> None:
        self.tree.remove_worker(worker)
        self.model.remove_worker(worker)

    @rule(prompt=st.lists(TOKENS, max_size=7))
    def ask(self, prompt: list[int]) -> None:
        assert self.tree.find_matches(prompt).scores == self.model.matches(prompt)

    @rule()
    def through_a_snapshot(self) -> None:
        self.tree = RadixTree.restore(self.tree.snapshot())

    @rule()
    def through_a_dump(self) -> None:
        tree = RadixTree()
        for event in self.tree.dump():
            assert tree.apply_event(event) in ("stored", "removed")
        self.tree = tree

    @invariant()
    def agrees(self) -> None:
        assert self.tree.entries == sum(len(mine) for mine in self.model.blocks.values())
        assert self.tree.nodes == self.model.nodes()
        for holder, mine in self.model.blocks.items():
            assert self.tree.blocks_of(*holder) == len(mine)
            for block in mine:
                assert self.tree.has(*holder, block)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("holders", [3, 70, 200])
def test_long_random_history(holders: int) -> None:
    rng = random.Random(holders)
    tree, model = RadixTree(), ModelTree()
    prompts = [[rng.randrange(3) for _ in range(12)] for _ in range(20)]
    for step in range(4000):
        holder = (rng.randrange(holders), 0)
        mine = list(model.blocks.get(holder, {}))
        action = rng.random()
        if action < 0.6:
            parent = rng.choice(mine) if mine and rng.random() < 0.7 else None
            blocks = [(rng.getrandbits(64), rng.randrange(3)) for _ in range(rng.randrange(1, 8))]
            assert tree.store(*holder, parent, [b for b, _ in blocks], [t for _, t in blocks]) == model.store(
                holder, parent, blocks
            )
        elif action < 0.9:
            ids = rng.sample(mine, min(len(mine), rng.randrange(1, 6)))
            assert tree.remove(*holder, ids) == model.remove(holder, ids)
        elif action < 0.95:
            tree.remove_worker(holder[0])
            model.remove_worker(holder[0])
        else:
            tree.clear_all_blocks(holder[0])
            model.clear(holder)
        if step % 20 == 0:
            prompt = rng.choice(prompts)
            assert tree.find_matches(prompt).scores == model.matches(prompt)
            assert tree.nodes == model.nodes()
    assert RadixTree.restore(tree.snapshot()).find_matches(prompts[0]).scores == model.matches(prompts[0])


def chain(rng: random.Random, n: int) -> list[tuple[int, int]]:
    return [(rng.getrandbits(64), rng.getrandbits(64)) for _ in range(n)]


def test_everything_that_came_goes_again() -> None:
    rng = random.Random(3)
    tree = RadixTree()
    empty = tree.nbytes
    for round_ in range(3):
        chains = [(worker, chain(rng, 500)) for worker in range(40)]
        for worker, blocks in chains:
            tree.apply_event(worker, stored(1, None, blocks))
        if round_ == 0:
            full = tree.nbytes
        assert tree.nbytes == full, "the memory of what was forgotten is used again"
        for worker, blocks in chains:
            tree.apply_event(worker, removed(2, [b for b, _ in rng.sample(blocks, len(blocks))]))
        assert (tree.nodes, tree.entries) == (0, 0)
    assert tree.nbytes > empty


def test_budget_bounds_the_memory_and_keeps_what_is_used() -> None:
    rng = random.Random(5)
    budget = 3_000_000
    tree = RadixTree(budget_bytes=budget)
    kept = chain(rng, 50)
    tree.apply_event(7, stored(1, None, kept))
    for number in range(2000):
        assert tree.apply_event(7, stored(number + 2, None, chain(rng, 60))) == "stored"
        if number % 5 == 0:
            assert tree.find_matches([t for _, t in kept]).scores == {(7, 0): 50}
    assert tree.nbytes <= budget + 400_000
    assert tree.evicted > 50_000
    assert tree.entries == tree.nodes


def test_a_parent_that_the_budget_has_cost_is_no_gap() -> None:
    rng = random.Random(6)
    tree = RadixTree(budget_bytes=2_000_000)
    first = chain(rng, 30)
    tree.apply_event(1, stored(1, None, first))
    for number in range(1500):
        tree.apply_event(1, stored(number + 2, None, chain(rng, 60)))
    assert tree.find_matches([t for _, t in first]).scores == {}
    assert tree.apply_event(1, stored(2000, first[-1][0], chain(rng, 2))) == "parent_evicted"
    assert RadixTree().apply_event(1, stored(2001, 12345, chain(rng, 2))) == "unknown_parent"


def test_several_ids_for_one_block() -> None:
    tree = RadixTree()
    tree.store(1, 0, None, [1], [10])
    tree.store(1, 0, None, [2], [20])
    tree.store(1, 0, None, [1], [20])  # the id 1 means the other block from now on
    assert tree.find_matches([10]).scores == {}
    tree.remove(1, 0, [1])
    assert tree.find_matches([20]).scores == {(1, 0): 1}
    tree.remove(1, 0, [2])
    assert (tree.nodes, tree.entries) == (0, 0)


def test_early_exit_stops_when_one_worker_is_left() -> None:
    tree = RadixTree()
    tree.apply_event(1, stored(1, None, [(10 + i, i) for i in range(8)]))
    tree.apply_event(2, stored(1, None, [(10 + i, i) for i in range(3)]))
    assert tree.find_matches(range(8)).scores == {(1, 0): 8, (2, 0): 3}
    assert tree.find_matches(range(8), early_exit=True).scores == {(1, 0): 4, (2, 0): 3}
    assert tree.find_matches(range(8)).tree_sizes == {(1, 0): 8, (2, 0): 3}


EVENT = {"event_id": 1, "dp_rank": 3, "data": {"stored": {"parent_hash": None, "blocks": [{"block_hash": 9, "tokens_hash": 4}]}}}


@pytest.mark.parametrize("form", ["dict", "json", "msgpack", "router dict", "router json", "objects"])
def test_forms_of_an_event(form: str) -> None:
    import msgspec

    tree = RadixTree()
    whole: dict[str, Any] = {"worker_id": 5, "event": EVENT}
    arguments: dict[str, tuple[Any, ...]] = {
        "dict": (5, EVENT),
        "json": (5, msgspec.json.encode(EVENT)),
        "msgpack": (5, msgspec.msgpack.encode(EVENT)),
        "router dict": (whole,),
        "router json": (msgspec.json.encode(whole),),
        "objects": (5, msgspec.convert(EVENT, KvCacheEvent)),
    }
    assert tree.apply_event(*arguments[form]) == "stored"
    assert tree.find_matches([4]).scores == {(5, 3): 1}


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event_id": 1, "data": {}},
        {"event_id": 1, "data": "emptied"},
        {"event_id": 1, "data": {"stored": {"parent_hash": None, "blocks": [{"block_hash": "x", "tokens_hash": 1}]}}},
        b"\xff\xff",
        b"{",
    ],
)
def test_what_is_no_event_is_refused(event: Any) -> None:
    with pytest.raises(ValueError):  # msgspec's own text says what is wrong
        RadixTree().apply_event(1, event)


def test_hashes_beyond_64_bits_are_refused() -> None:
    tree = RadixTree()
    with pytest.raises(OverflowError):
        tree.store(1, 0, None, [2**64], [1])
    with pytest.raises(OverflowError):
        tree.find_matches([-1])
    with pytest.raises(ValueError, match="2 block hashes and 1 tokens hashes"):
        tree.store(1, 0, None, [1, 2], [1])
    assert tree.nodes == 0


def snapshot() -> bytes:
    tree = RadixTree()
    tree.apply_event(1, stored(1, None, [(1, 1), (2, 2)]))
    tree.apply_event(2, stored(1, None, [(7, 1), (8, 3)]))
    return tree.snapshot()


def test_a_snapshot_cut_anywhere_is_refused() -> None:
    whole = snapshot()
    for n in range(len(whole)):
        with pytest.raises(ValueError):
            RadixTree.restore(whole[:n])
    with pytest.raises(ValueError, match="follow the end"):
        RadixTree.restore(whole + b"x")


def test_a_damaged_snapshot_is_refused_or_a_tree() -> None:
    whole = snapshot()
    refused = 0
    for i in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[i] ^= 1 << bit
            try:
                tree = RadixTree.restore(bytes(damaged))
            except (ValueError, MemoryError):
                refused += 1
            else:
                tree.find_matches([1, 2])
                tree.dump()
    assert refused > 100


def _encodings(event: dict[str, Any]) -> list[bytes]:
    import json

    import msgspec

    return [
        json.dumps(event).encode(),
        json.dumps(event, separators=(",", ":")).encode(),
        json.dumps(event, indent=1).encode(),
        json.dumps(dict(reversed(event.items()))).encode(),
        msgspec.msgpack.encode(event),
        msgspec.msgpack.encode(dict(reversed(event.items()))),
    ]


def test_the_scanner_reads_what_msgspec_reads() -> None:
    """Every number length, both orders of the fields, spaces: the same tree as from objects."""
    rng = random.Random(9)
    numbers = sorted(
        {0, 1, 9, 2**64 - 1, 2**64 - 2, 10**19, 10**19 - 1, *(10**i - 1 for i in range(20)), *(10**i for i in range(20))}
    )
    numbers += [rng.getrandbits(bits) for bits in range(1, 65)]
    for number in numbers:
        block = {"block_hash": number, "tokens_hash": numbers[-1] ^ number}
        if rng.random() < 0.5:
            block = dict(reversed(block.items()))
        for data in ({"stored": {"parent_hash": None, "blocks": [block]}}, {"removed": {"block_hashes": [number]}}, "cleared"):
            event = {"event_id": number, "data": data, "dp_rank": rng.randrange(3)}
            for encoded in _encodings(event):
                tree, twin = RadixTree(), RadixTree()
                for each in (tree, twin):
                    each.apply_event(4, stored(1, None, [(number, 1)], event["dp_rank"]))
                assert tree.apply_event(4, encoded) == twin.apply_event(4, event)
                assert content(tree) == content(twin)


def test_encoded_events_cut_or_changed_anywhere() -> None:
    """What the scanner takes, msgspec takes too, and with the same meaning; a wrong byte changes nothing in the tree."""
    import msgspec

    from dynwire.wire.kv_events import as_cache_event

    event = {
        "event_id": 1,
        "data": {"stored": {"parent_hash": 77, "blocks": [{"block_hash": 2**64 - 1, "tokens_hash": 5}]}},
        "dp_rank": 0,
    }
    for encoded in _encodings(event)[:5:2] + _encodings(event)[4:5]:
        variants = [encoded[:n] for n in range(len(encoded))]
        variants += [
            encoded[:i] + bytes([b]) + encoded[i + 1 :]
            for i in range(len(encoded))
            for b in (0, 32, 34, 44, 48, 57, 92, 125, 255)
        ]
        for variant in variants:
            tree, twin = RadixTree(), RadixTree()
            for each in (tree, twin):
                each.apply_event(4, stored(1, None, [(77, 1)]))
            before = content(tree)
            try:
                expected: KvCacheEvent | None = as_cache_event(variant)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                expected = None
            try:
                tree.apply_event(4, variant)
            except (ValueError, OverflowError):
                assert content(tree) == before
            else:
                assert expected is not None, variant
                twin.apply_event(4, expected)
                assert content(tree) == content(twin), variant


def test_a_tree_is_not_changed_while_its_snapshot_is_taken() -> None:
    rng = random.Random(12)
    tree = RadixTree()
    for _ in range(200):
        blocks = [rng.getrandbits(64) for _ in range(200)]
        tree.store(1, 0, None, blocks, blocks)
    before, stop = tree.snapshot(), threading.Event()
    taken: list[bytes] = []

    def take() -> None:
        while not stop.is_set():
            taken[:] = [tree.snapshot()]

    thread = threading.Thread(target=take)
    thread.start()
    try:
        refused = 0
        while refused < 5:
            try:
                tree.store(2, 0, None, [7], [7])
                tree.remove_worker(2)
            except RuntimeError as error:
                assert "a snapshot of this tree is being taken" in str(error)
                refused += 1
            assert tree.find_matches(blocks).scores == {(1, 0): 200}
    finally:
        stop.set()
        thread.join()
    tree.remove_worker(2)
    assert RadixTree.restore(taken[0]).entries in (40_000, 40_001)
    assert len(tree.snapshot()) == len(before)


def test_other_threads_run_while_a_tree_is_restored() -> None:
    tree = RadixTree()
    for start in range(0, 1_000_000, 1000):
        blocks = list(range(start, start + 1000))
        tree.store(1, 0, None, blocks, blocks)
    data, restored = tree.snapshot(), threading.Event()

    def restore() -> None:
        assert RadixTree.restore(data).entries == 1_000_000
        restored.set()

    thread = threading.Thread(target=restore)
    turns = 0
    thread.start()
    while not restored.is_set():
        turns += 1
        time.sleep(0)
    thread.join()
    assert turns > 3
