"""Block hashes: the known vector, and 10^5 random cases against the plain Python twin over the xxhash package."""

from __future__ import annotations

import array
import random

import pytest
import xxhash

from dynwire._kvhash import lora_seed, xxh3
from dynwire.kv_router import compute_block_hashes, compute_sequence_hashes, sequence_hashes

from . import model


def test_known_vector() -> None:
    assert compute_block_hashes([1, 2, 3, 4], 4) == [0xCB38E4D7FB2DCA5C]


def test_xxh3_of_every_length_and_random_seeds() -> None:
    rng = random.Random(7)
    for n in (*range(600), 1023, 1024, 1025, 2048, 2049, 4095, 10_000):
        data, seed = rng.randbytes(n), rng.getrandbits(64)
        assert xxh3(data, seed) == xxhash.xxh3_64_intdigest(data, seed), n


def test_random_cases_agree_with_the_twin() -> None:
    rng = random.Random(11)
    cases = 0
    while cases < 100_000:
        block_size = rng.choice((1, 2, 3, 4, 8, 16, 32, 64, 128, 300))
        tokens = [rng.getrandbits(rng.choice((8, 17, 32))) for _ in range(rng.randrange(block_size * 40))]
        lora = rng.choice((None, None, "adapter", "ünïcode", ""))
        blocks = len(tokens) // block_size
        mm = None
        if rng.random() < 0.3:
            mm = [rng.choice((None, [], [rng.getrandbits(64) for _ in range(rng.randrange(4))])) for _ in range(blocks)]
        expected = model.block_hashes(tokens, block_size, lora, mm)
        assert compute_block_hashes(tokens, block_size, lora, mm) == expected
        assert compute_sequence_hashes(tokens, block_size, lora, mm) == model.sequence_hashes(expected)
        assert sequence_hashes(expected) == model.sequence_hashes(expected)
        cases += max(blocks, 1)


def test_sequence_hashes_go_on_behind_a_parent() -> None:
    hashes = compute_block_hashes(range(40), 4)
    whole = sequence_hashes(hashes)
    assert sequence_hashes(hashes[3:], whole[2]) == whole[3:]
    assert whole[0] == hashes[0]


@pytest.mark.parametrize("code", ["i", "I", "l", "L", "q", "Q"])
def test_buffers_are_read_in_place(code: str) -> None:
    tokens = [5, 70_000, 2**31 - 1, 0, 9, 9, 9, 9]
    assert compute_block_hashes(array.array(code, tokens), 4) == compute_block_hashes(tokens, 4)
    assert compute_block_hashes(iter(tokens), 4) == compute_block_hashes(tokens, 4)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([2**32], OverflowError),
        ([-1], OverflowError),
        (["a"], TypeError),
        ([1.5], TypeError),
        (array.array("q", [-1]), OverflowError),
        (array.array("i", [-1]), OverflowError),
        (array.array("Q", [2**32]), OverflowError),
        (b"bytes are no tokens", ValueError),
        (array.array("d", [1.0]), ValueError),
    ],
)
def test_what_is_no_token_is_refused(tokens: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        compute_block_hashes(tokens, 1)


def test_partial_block_and_bad_sizes() -> None:
    assert compute_block_hashes([1, 2, 3], 4) == []
    assert compute_block_hashes([], 4) == []
    with pytest.raises(ValueError, match="block_size"):
        compute_block_hashes([1], 0)
    with pytest.raises(ValueError, match="mm_hashes has 1 entries for 2 full blocks"):
        compute_block_hashes([1, 2], 1, None, [None])


def test_lora_changes_the_seed() -> None:
    assert lora_seed(None) == 1337
    assert lora_seed("x") == (1337 + xxhash.xxh3_64_intdigest(b"x")) % 2**64
    assert compute_block_hashes([1, 2, 3, 4], 4, "x") != compute_block_hashes([1, 2, 3, 4], 4)
