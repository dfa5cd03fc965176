"""The worker's endpoint: requests of the frontend in, vLLM's tokens out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ..workers.protocol import EngineItem, EngineRequest, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from .._context import Context

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
"""of `SamplingOptions`; vLLM has the same names"""

FINISH_REASONS = {"abort": "cancelled", "repetition": "stop"}
"""vLLM's words that the protocol does not have"""


class VllmWorker:
    """Answers requests with an ``AsyncLLM``. ``generate`` is the handler to serve, on the engine's event loop."""

    def __init__(self, llm: Any) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        self.llm = llm
        self.engine_dead = asyncio.Event()
        """set by the first request that finds the engine dead"""
        self._defaults: dict[str, Any] = llm.model_config.get_diff_sampling_param()
        self._params = SamplingParams
        self._delta = RequestOutputKind.DELTA
        self._tokens_input = tokens_input
        self._wrong_request = VLLMClientError
        self._dead = EngineDeadError
        self._numbers = itertools.count(1)

    def sampling(self, request: EngineRequest) -> Any:
        """vLLM's ``SamplingParams`` of a request. What it leaves out is as the model's generation_config.json says, then vLLM's.

        Raises what vLLM raises for values out of range.
        """
        stop, options = request.stop_conditions, request.sampling_options
        wanted = {name: value for name in SAMPLING_FIELDS if (value := getattr(options, name)) is not None}
        stop_ids = stop.stop_token_ids if stop.ignore_eos else [*stop.stop_token_ids, *request.eos_token_ids]
        fields: dict[str, Any] = {"max_tokens": None, **self._defaults, **wanted}
        if stop.max_tokens is not None:
            fields["max_tokens"] = stop.max_tokens
        return self._params(
            **fields,
            min_tokens=stop.min_tokens or 0,
            stop_token_ids=stop_ids,
            ignore_eos=stop.ignore_eos,
            logprobs=request.output_options.logprobs,
            output_kind=self._delta,
            detokenize=False,
        )

    async def generate(self, request: EngineRequest, context: Context) -> AsyncGenerator[EngineItem, None]:
        """The tokens of one step per item, of several if the caller reads slowly.

        Whatever ends this generator early aborts the request in vLLM; ``context.stop()`` ends it with the tokens there are and
        the finish reason ``cancelled``. Raises `ValueError` for a request that can never be answered. When the engine is dead, it
        waits for the end of the process: callers then see a lost worker, and may go on with another one.
        """
        routing = request.routing
        if routing is not None and routing.lora is not None:
            raise ValueError(f"this worker serves no LoRA adapters, so not {routing.lora!r}")
        request_id = f"{context.id or 'request'}-{next(self._numbers)}"
        loop = asyncio.get_running_loop()
        aborting: asyncio.Task[None] | None = None

        def abort() -> None:
            nonlocal aborting
            if aborting is None and not ended and not context.is_killed():  # after a kill, leaving vLLM's generator does it
                aborting = loop.create_task(self.llm.abort(request_id))

        context.on_stop(lambda: loop.call_soon_threadsafe(abort))
        logprobs = request.output_options.logprobs
        first, ended = True, False
        try:
            outputs = self.llm.generate(
                self._tokens_input(request.token_ids),
                self.sampling(request),
                request_id,
                data_parallel_rank=routing.dp_rank if routing is not None else None,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    (answer,) = output.outputs
                    reason = answer.finish_reason
                    item = EngineItem(list(answer.token_ids), FINISH_REASONS.get(reason, reason))
                    if reason == "error":
                        item.error = "vLLM gave up on this request; its log says why"
                    if logprobs is not None and answer.logprobs:
                        item.logprobs = _logprobs(item.token_ids, answer.logprobs, logprobs)
                    if first:
                        item.cached_tokens = output.num_cached_tokens
                        first = False
                    if reason is None and context.is_stopped():
                        # vLLM did not know the request yet when it was told to abort it
                        item.finish_reason = "cancelled"
                        yield item
                        return
                    yield item
        except self._dead:
            self.engine_dead.set()
            await loop.create_future()
        except self._wrong_request as error:
            raise ValueError(str(error)) from error
        finally:
            ended = True
            if aborting is not None:
                await aborting


def _logprobs(token_ids: list[int], positions: Any, count: int) -> list[TokenLogprob]:
    found = []
    for token_id, position in zip(token_ids, positions, strict=True):
        ranked = sorted(position.items(), key=lambda pair: pair[1].rank)
        top = [TopLogprob(other, value.logprob) for other, value in ranked[:count]]
        found.append(TokenLogprob(token_id, position[token_id].logprob, top))
    return found
