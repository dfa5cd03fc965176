"""How long one step of the simulated engine takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """A step's time as a polynomial of what is in its batch, in seconds::

        step = base + per_token * tokens + attention * pairs + cache_read * context

    ``tokens``: new tokens of the step, one for each sequence that decodes, ``n`` for a chunk of a prompt. ``pairs``: for every
    chunk ``n * (cached + n / 2)``, the pairs of a new token and one that it attends to, which makes prefill quadratic in
    the prompt's length. ``context``: tokens in the cache of the sequences that decode.

    The shape is that of a decoder-only transformer, where every term is one cost that adds up: reading the weights (base), the
    matrix products per token, attention scores, and reading the cache. The numbers are worked out, not measured, for 8 billion
    parameters in bf16 (32 layers, width 4096, 8 KV heads of 128) on an accelerator with 3.35 TB/s and 400 TFLOP/s that
    are reached in practice: base 16 GB / 3.35 TB/s + 1 ms of launches; per token 2 x 8e9 FLOP; per pair 4 x 32 x 4096 FLOP; per
    token of context 128 KiB. So a lone sequence gets 170 tokens/s, and a prompt of 8,192 tokens is read in 0.4 s.
    """

    base: float = 5.8e-3
    per_token: float = 40e-6
    attention: float = 1.3e-9
    cache_read: float = 39e-9

    def step(self, tokens: int, pairs: float, context: int) -> float:
        return self.base + self.per_token * tokens + self.attention * pairs + self.cache_read * context
