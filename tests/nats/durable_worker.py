"""A worker process for the tests of durable requests: ``durable_worker.py FILE``, settings from the environment.

Prints ``ready``. Every execution of a handler is a line in FILE when it begins: number of the request, attempt, process id.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import dynwire

file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def began(number: int, context: dynwire.Context) -> None:
    os.write(file, f"{number} {context.delivery_count} {os.getpid()}\n".encode())


async def work(request: dict[str, Any], context: dynwire.Context) -> dict[str, Any]:
    began(request["n"], context)
    if request.get("seconds"):
        await asyncio.sleep(request["seconds"])
    return {"n": request["n"], "attempt": context.delivery_count, "pid": os.getpid()}


async def items(request: dict[str, Any], context: dynwire.Context) -> AsyncIterator[list[int]]:
    """``items`` at once, then the rest up to ``total`` after ``seconds``; each with its number and the attempt."""
    began(request["n"], context)
    for index in range(request["total"]):
        if index == request["items"] and context.delivery_count == 1:
            await asyncio.sleep(request["seconds"])
        yield [index, context.delivery_count]


async def deadly(request: dict[str, Any], context: dynwire.Context) -> None:
    began(request["n"], context)
    os.kill(os.getpid(), signal.SIGKILL)


async def block(request: dict[str, Any], context: dynwire.Context) -> int:
    """Holds up the event loop, which then reports nothing."""
    began(request["n"], context)
    time.sleep(request["seconds"])  # noqa: ASYNC251  # that is the fault
    return context.delivery_count


async def headers(request: Any, context: dynwire.Context) -> dict[str, Any]:
    began(0, context)
    return {"id": context.id, "headers": dict(context.headers), "left": context.time_remaining(), "request": request}


async def main() -> None:
    manager = dynwire.AsyncNetworkManager()
    for handler in (work, items, deadly, block, headers):
        await manager.endpoint(f"d.w.{handler.__name__}").serve(handler)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    os.write(1, b"ready\n")
    await ended.wait()
    await manager.close(grace=float(os.environ.get("GRACE", "10")))


if __name__ == "__main__":
    asyncio.run(main())
