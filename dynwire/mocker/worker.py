"""The simulated worker's endpoint: requests of the frontend in, tokens out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import TINY_MODEL
from .engine import Engine, Rank
from .scheduler import Sequence as Answer
from .text import Storyteller

if TYPE_CHECKING:
    from .._context import Context

TEXT = TINY_MODEL.parent / "text.txt"

ENDS = ("open", "always", "never")
"""when an answer may come to its end by itself: if the request sets no max_tokens, always, never"""


def storyteller(encode: Callable[[str], Sequence[int]], seed: int = 0) -> Storyteller:
    """What the engine says, in the tokens of a model: ``encode`` is its tokenizer's, without special tokens."""
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    # the space is a token of its own, or part of the last one: an answer never begins with it
    return Storyteller([encode(line + " ") for line in lines], seed)


class Mocker:
    """Answers requests with an engine. ``generate`` is the handler to serve, on the engine's event loop."""

    def __init__(self, engine: Engine, eos_ids: Sequence[int] = (), ends: str = "open") -> None:
        """``eos_ids``: of the model, for requests that name none; ``ends``: one of `ENDS`."""
        if ends not in ENDS:
            raise ValueError(f"ends is {ends!r}; allowed is {', '.join(ENDS)}")
        self.engine = engine
        self._eos_ids = tuple(eos_ids)
        self._ends = ends

    def answer_to(self, request: Mapping[str, Any]) -> Answer:
        """The engine's view of a request. Raises `ValueError`."""
        stop = request.get("stop_conditions") or {}
        sampling = request.get("sampling_options") or {}
        eos_ids = request.get("eos_token_ids") or self._eos_ids
        max_tokens = stop.get("max_tokens")
        stop_ids = list(stop.get("stop_token_ids") or ())
        ignore_eos = bool(stop.get("ignore_eos"))
        if not ignore_eos:
            stop_ids += eos_ids
        return Answer(
            request["token_ids"],
            max_tokens=max_tokens,
            min_tokens=stop.get("min_tokens") or 0,
            stop_ids=stop_ids,
            eos_id=eos_ids[0] if eos_ids else None,
            seed=sampling.get("seed") or 0,
            may_end=not ignore_eos and (self._ends == "always" or (self._ends == "open" and max_tokens is None)),
        )

    @staticmethod
    def _stop(rank: Rank, answer: Answer) -> None:
        rank.cancel(answer)
        answer.wake()

    async def generate(self, request: Mapping[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """Items ``{"token_ids", "finish_reason"}``: the tokens of one step each, of several if the caller reads slowly.

        The finish reason is None until the last item. Whatever ends this generator early frees the request's blocks at once;
        ``context.stop()`` ends it with the tokens there are. Raises `ValueError` for a request that can never be answered.
        """
        answer = self.answer_to(request)
        rank = self.engine.rank((request.get("routing") or {}).get("dp_rank"))
        wake = rank.add(answer)
        tokens = answer.tokens

        context.on_stop(lambda: rank.call(self._stop, rank, answer))
        try:
            while True:
                begin, end = answer.delivered, answer.length
                if begin < end:
                    answer.delivered = end
                    yield {"token_ids": tokens[begin:end].tolist(), "finish_reason": answer.finish_reason}
                elif answer.finish_reason is None:
                    await wake
                else:
                    return
        finally:
            rank.cancel(answer)
