"""What a frontend asks of an engine, and what it gets: tokens in, tokens out.

Every engine speaks this, on every plane. Fields an engine does not know are ignored, so both sides may grow.
"""

from __future__ import annotations

from typing import Any

import msgspec


class StopConditions(msgspec.Struct, omit_defaults=True):
    """When an answer ends. Stop strings are the frontend's business: an engine sees tokens only."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False


class SamplingOptions(msgspec.Struct, omit_defaults=True):
    """How tokens are chosen; None is the engine's default. Names and meaning are those of the OpenAI API and vLLM."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None


class OutputOptions(msgspec.Struct, omit_defaults=True):
    """What an item carries besides tokens."""

    logprobs: int | None = None
    """alternatives per token; 0: the chosen token's own logprob only; None: none"""


class Routing(msgspec.Struct, omit_defaults=True):
    """What the router has decided or was told."""

    dp_rank: int | None = None
    worker_id: int | None = None
    lora: str | None = None
    expected_blocks: int | None = None
    """blocks of the prompt that the router expects in the worker's cache"""


class EngineRequest(msgspec.Struct, omit_defaults=True):
    """One prompt to complete."""

    model: str
    token_ids: list[int]
    stop_conditions: StopConditions = msgspec.field(default_factory=StopConditions)
    sampling_options: SamplingOptions = msgspec.field(default_factory=SamplingOptions)
    output_options: OutputOptions = msgspec.field(default_factory=OutputOptions)
    eos_token_ids: list[int] = []
    annotations: list[str] = []
    """names of further facts that the caller wants with the items"""
    routing: Routing | None = None


class TopLogprob(msgspec.Struct):
    """A token that could have been chosen."""

    token_id: int
    logprob: float


class TokenLogprob(msgspec.Struct, omit_defaults=True):
    """Logprob of a token of the answer, with its alternatives."""

    token_id: int
    logprob: float
    top: list[TopLogprob] = []


class EngineItem(msgspec.Struct, omit_defaults=True):
    """A part of the answer: one token or several. The last item has a ``finish_reason``."""

    token_ids: list[int]
    finish_reason: str | None = None
    """None, ``stop`` (eos or a stop token), ``length`` (max_tokens or the context is full), ``cancelled``, ``error``"""
    logprobs: list[TokenLogprob] | None = None
    """one per token, if they were asked for"""
    cached_tokens: int | None = None
    """(first item) tokens of the prompt that were in the cache"""
    error: str | None = None
    """what went wrong, with ``finish_reason`` ``error``"""
    annotations: dict[str, Any] | None = None
