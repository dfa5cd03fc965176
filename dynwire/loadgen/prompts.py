"""Requests with prompts of a given length that share prefixes, always the same ones for a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import msgspec

WORDS = (
    *("the", "router", "looks", "at", "what", "every", "worker", "has", "in", "its", "cache", "and", "sends", "a", "request"),
    *("where", "most", "of", "it", "is", "known", "already", "so", "that", "nothing", "must", "be", "computed", "twice", "while"),
    *("rain", "came", "from", "west", "over", "two", "hills", "with", "one", "small", "mill", "garden", "lamp", "table", "sea"),
)


PHRASE, PHRASES = 8, 1024
"""Prompts are put together from so many phrases of so many words: drawing every word would cost more than sending them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests look like."""

    model: str
    chat: bool = True
    stream: bool = True
    prompt_words: int = 100
    """of its own, behind the prefix"""
    prefix_groups: int = 0
    """how many different prefixes there are; 0: none"""
    prefix_words: int = 0
    max_tokens: int = 128
    ignore_eos: bool = True
    extra: dict[str, Any] | None = None
    """more fields of the body"""


class Prompts:
    """Makes the bodies one after the other. Deterministic."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._random = random.Random(seed)
        groups = random.Random(seed + 1)
        self._phrases = [" ".join(groups.choices(WORDS, k=PHRASE)) for _ in range(PHRASES)]
        self._prefixes = [self._text(groups, shape.prefix_words) for _ in range(shape.prefix_groups)]
        body: dict[str, Any] = {"model": shape.model, "max_tokens": shape.max_tokens, "stream": shape.stream}
        if shape.stream:
            body["stream_options"] = {"include_usage": True}
        if shape.ignore_eos:
            body["ignore_eos"] = True
        self._common = {**body, **(shape.extra or {})}

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self._shape.chat else "/v1/completions"

    def _text(self, chance: random.Random, words: int) -> str:
        phrases = chance.choices(self._phrases, k=words // PHRASE)
        return " ".join((*phrases, *chance.choices(WORDS, k=words % PHRASE)))

    def next(self) -> bytes:
        """The body of the next request."""
        text = self._text(self._random, self._shape.prompt_words)
        prefix = self._random.choice(self._prefixes) if self._prefixes else ""
        if self._shape.chat:
            messages = [{"role": "user", "content": text}]
            if prefix:
                messages.insert(0, {"role": "system", "content": prefix})
            return msgspec.json.encode({**self._common, "messages": messages})
        return msgspec.json.encode({**self._common, "prompt": f"{prefix} {text}" if prefix else text})
