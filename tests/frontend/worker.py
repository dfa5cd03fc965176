"""A worker whose engine does what the prompt says: ``worker.py NAME [ENDPOINT [DIRECTORY [FIELD=JSON …]]]``, fields of the card
or ``max_in_flight``.

Prints ``ready``, then what happens to requests, each line with the time of the system's monotonic clock. Words of the last user
message (or of the prompt):

``say TEXT``       the tokens of TEXT, one per item
``together TEXT``  the same in one item
``count N [GAP]``  N tokens that are all different, with so many seconds between them; goes on where another worker was lost
``hang``           nothing, ever
``fail N [GAP]``   N tokens, then the handler raises
``item N [GAP]``   N tokens, then an item that says the engine failed
``odd WHAT``       an item that is none
``short N [GAP]``  N tokens and no finish reason
``refuse``         the handler raises ValueError
``about``          what the request was, as JSON
``eos TEXT``       the tokens of TEXT and the end-of-sequence token
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from tokenizers import Tokenizer

import dynwire
from dynwire.mocker import TINY_MODEL
from dynwire.workers.card import EngineLimits, ModelCard
from dynwire.workers.serve import serve_model

ASSISTANT = "<|im_start|>assistant\n"


def say(text: str) -> None:
    os.write(1, f"{text} {time.monotonic():.6f}\n".encode())


def words(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens that are plain text by themselves, all different."""
    return [i for i in range(3, tokenizer.get_vocab_size()) if (text := tokenizer.decode([i])).isascii() and text.isprintable()]


class Engine:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.words = words(tokenizer)

    def what(self, token_ids: list[int]) -> tuple[str, str, int]:
        """``(verb, rest, tokens of the answer that were made before)``"""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        made = 0
        if ASSISTANT in text:
            text = text.rpartition(ASSISTANT)[0]
            made = len(token_ids) - len(self.tokenizer.encode(text + ASSISTANT, add_special_tokens=False).ids)
            text = text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        verb, _, rest = text.strip().partition(" ")
        return verb, rest, made

    async def generate(self, request: dict[str, Any], context: dynwire.Context) -> AsyncIterator[dict[str, Any]]:
        verb, rest, made = self.what(request["token_ids"])
        finished = False
        say(f"begin {verb}")
        try:
            async for item in self.answer(verb, rest, made, request, context):
                yield item
            finished = True
        finally:
            say(f"{'end' if finished else 'cut'} {verb}")

    async def answer(
        self, verb: str, rest: str, made: int, request: dict[str, Any], context: dynwire.Context
    ) -> AsyncIterator[dict[str, Any]]:
        limit = (request.get("stop_conditions") or {}).get("max_tokens")
        if verb in ("say", "together", "eos", "about"):
            if verb == "about":
                rest = json.dumps({"request": request, "headers": context.headers, "id": context.id})
            ids = self.tokenizer.encode(rest, add_special_tokens=False).ids
            if verb == "eos":
                ids.append(request["eos_token_ids"][0])
            reason = "stop" if limit is None or len(ids) <= limit else "length"
            ids = ids[:limit]
            if verb == "together":
                yield self.item(ids, reason, request)
                return
            for number, token_id in enumerate(ids, 1):
                yield self.item([token_id], reason if number == len(ids) else None, request)
        elif verb == "count":
            number, _, gap = rest.partition(" ")
            total = made + limit if limit is not None else int(number)
            for index in range(made, total):
                if gap:
                    await asyncio.sleep(float(gap))
                yield self.item([self.words[index]], "length" if index + 1 == total else None, request)
        elif verb == "hang":
            await asyncio.get_running_loop().create_future()
        elif verb in ("fail", "item", "short"):
            number, _, gap = rest.partition(" ")
            for index in range(int(number)):
                yield self.item([self.words[index]], None, request)
                if gap:
                    await asyncio.sleep(float(gap))
            if verb == "fail":
                raise RuntimeError("out of memory")
            if verb == "item":
                yield {"token_ids": [], "finish_reason": "error", "error": "the cache is on fire"}
        elif verb == "odd":
            yield {"nothing": {}, "text": {"token_ids": ["x"]}, "number": {"token_ids": 5}}[rest]
        elif verb == "refuse":
            raise ValueError("such a prompt can never be answered")
        else:
            raise RuntimeError(f"what is {verb!r}?")

    def item(self, ids: list[int], reason: str | None, request: dict[str, Any]) -> dict[str, Any]:
        item: dict[str, Any] = {"token_ids": ids}
        if reason is not None:
            item["finish_reason"] = reason
        wanted = (request.get("output_options") or {}).get("logprobs")
        if wanted is not None:
            top = [{"token_id": self.words[n], "logprob": -1.0 - n} for n in range(wanted)]
            item["logprobs"] = [{"token_id": i, "logprob": -0.5, "top": top} for i in ids]
        return item


async def main(name: str, endpoint: str = "test.backend.generate", directory: str = str(TINY_MODEL), *fields: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    given = {key: json.loads(value) for key, _, value in (field.partition("=") for field in fields)}
    max_in_flight = given.pop("max_in_flight", None)
    if "limits" in given:
        given["limits"] = msgspec.convert(given["limits"], EngineLimits)
    card = ModelCard.from_directory(directory, name, **given)
    engine = Engine(Tokenizer.from_file(os.path.join(directory, "tokenizer.json")))
    async with dynwire.AsyncNetworkManager() as manager:
        service = await serve_model(manager, endpoint, card, engine.generate, max_in_flight=max_in_flight)
        say(f"ready {service.worker_id:016x}")
        await stop.wait()
        await service.drain(0.5)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
