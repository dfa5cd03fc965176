"""Handlers that ``dynwire demo`` and ``dynwire bench`` serve in processes of their own; nothing here needs click.

``python -m dynwire serve dynwire.cli.demo_worker:generate --endpoint demo.worker.generate`` runs one by hand.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

ANSWER = ("every", "call", "ends", "with", "a", "reply", "or", "an", "error", "that", "says", "how", "far", "it", "got")


async def echo(request: Any) -> Any:
    """The request itself: what `bench` measures."""
    return request


async def whoami(request: Any) -> dict[str, Any]:
    """The request together with the process that answered."""
    return {"pid": os.getpid(), "request": request}


async def generate(request: Any) -> AsyncIterator[dict[str, Any]]:
    """A stream like a language model's: ``items`` words, one every ``delay`` seconds."""
    wanted = request if isinstance(request, dict) else {}
    items, delay = int(wanted.get("items", len(ANSWER))), float(wanted.get("delay", 0.0))
    for index in range(items):
        if delay:
            await asyncio.sleep(delay)
        yield {"pid": os.getpid(), "index": index, "token": ANSWER[index % len(ANSWER)]}


async def repeat(request: Any) -> AsyncIterator[Any]:
    """``payload`` again and again, ``items`` times, as fast as the caller reads: what `bench` measures for streams."""
    for _ in range(int(request["items"])):
        yield request["payload"]
