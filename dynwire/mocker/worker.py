"""The simulated worker's endpoint: requests of the frontend in, tokens out."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from ..workers.protocol import EngineItem, EngineRequest
from . import TINY_MODEL
from .engine import Engine, Metrics, Rank
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
        """``eos_ids``: of the model, for requests that name none; ``ends``: one of `ENDS`. Raises `ValueError`."""
        if ends not in ENDS:
            raise ValueError(f"ends is {ends!r}; allowed is {', '.join(ENDS)}")
        self.engine = engine
        self._eos_ids = list(eos_ids)
        self._ends = ends

    def answer_to(self, request: EngineRequest) -> Answer:
        """The engine's view of a request. Raises `ValueError` for something that is no token id."""
        stop = request.stop_conditions
        eos_ids = request.eos_token_ids or self._eos_ids
        natural = self._ends == "always" or (self._ends == "open" and stop.max_tokens is None)
        try:
            tokens = array("I", request.token_ids)
        except OverflowError as error:
            raise ValueError(f"the prompt has something that is no token id: {error}") from error
        return Answer(
            tokens,
            max_tokens=stop.max_tokens,
            min_tokens=stop.min_tokens or 0,
            stop_ids=stop.stop_token_ids if stop.ignore_eos else [*stop.stop_token_ids, *eos_ids],
            eos_id=eos_ids[0] if eos_ids else None,
            seed=request.sampling_options.seed or 0,
            may_end=natural and not stop.ignore_eos,
        )

    async def generate(self, request: EngineRequest, context: Context) -> AsyncGenerator[EngineItem, None]:
        """The tokens of one step per item, of several if the caller reads slowly.

        Whatever ends this generator early frees the request's blocks at once; ``context.stop()`` ends it with the tokens there
        are and the finish reason ``cancelled``. Raises `ValueError` for a request that can never be answered.
        """
        answer = self.answer_to(request)
        rank = self.engine.rank(request.routing.dp_rank if request.routing is not None else None)
        wake = rank.add(answer)
        tokens = answer.tokens
        cached: int | None = -1
        context.on_stop(lambda: rank.call(self._stop, rank, answer))
        try:
            while True:
                begin, end = answer.delivered, answer.length
                if begin < end:
                    if cached is not None:
                        cached = answer.cached_tokens
                    answer.delivered = end
                    yield EngineItem(tokens[begin:end].tolist(), answer.finish_reason, None, cached)
                    cached = None
                elif answer.finish_reason is None:
                    await wake
                else:
                    if answer.finish_reason == "cancelled":
                        yield EngineItem([], "cancelled")
                    return
        finally:
            rank.cancel(answer)

    @staticmethod
    def _stop(rank: Rank, answer: Answer) -> None:
        rank.cancel(answer)
        answer.wake()

    async def metrics(self, request: object) -> list[Metrics]:
        """Handler that tells what every rank is doing."""
        return self.engine.metrics()
