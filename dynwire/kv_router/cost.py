"""Which worker a prompt costs least. Does no I/O.

The cost of a worker is ``overlap_score_weight × prefill blocks + decode blocks``: what it would have to compute before the first
token, its own backlog included, and what its cache would hold. Prefill blocks are (prompt tokens being computed there + tokens of
this prompt that are not cached there) / block size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .load import ActiveLoad, Worker


@dataclass(frozen=True)
class CostSettings:
    """Weights of the decision."""

    overlap_score_weight: float = 1.0
    """0 ignores the caches, more than 1 prefers short times to the first token to even load"""
    temperature: float = 0.0
    """0 takes the cheapest; more spreads requests by a softmax over the costs"""


@dataclass(frozen=True)
class Choice:
    """A worker, and what speaks for it."""

    worker: Worker
    cost: float
    overlap_blocks: int
    """blocks of the prompt that its cache holds, as far as the index knows"""
    prefill_tokens: int
    """tokens that it will have to compute"""


def costs(
    workers: Sequence[Worker],
    prompt_tokens: int,
    block_size: int,
    overlaps: Mapping[Worker, int],
    sequence_hashes: Sequence[int],
    load: ActiveLoad,
    settings: CostSettings,
) -> list[Choice]:
    """The cost of every worker, in the order of ``workers``."""
    out = []
    further = 1 if prompt_tokens % block_size else 0
    for worker in workers:
        overlap = overlaps.get(worker, 0)
        prefill = max(0, prompt_tokens - overlap * block_size)
        busy = load.of(worker).prefill_tokens
        decode = load.decode_blocks_with(worker, sequence_hashes, further)
        out.append(Choice(worker, settings.overlap_score_weight * (busy + prefill) / block_size + decode, overlap, prefill))
    return out


def choose(choices: Sequence[Choice], settings: CostSettings, tree_sizes: Mapping[Worker, int], rng: random.Random) -> Choice:
    """One of them. At temperature 0 the cheapest; of several, one with the smallest tree, at random. ``choices`` is not empty."""
    if settings.temperature > 0 and len(choices) > 1:
        lowest = min(choice.cost for choice in choices)
        spread = max(choice.cost for choice in choices) - lowest
        if spread == 0:
            return rng.choice(choices)
        weights = [math.exp(-(choice.cost - lowest) / spread / settings.temperature) for choice in choices]
        return rng.choices(choices, weights)[0]
    lowest = min(choice.cost for choice in choices)
    cheapest = [choice for choice in choices if choice.cost == lowest]
    if len(cheapest) == 1:
        return cheapest[0]
    smallest = min(tree_sizes.get(choice.worker, 0) for choice in cheapest)
    return rng.choice([choice for choice in cheapest if tree_sizes.get(choice.worker, 0) == smallest])
