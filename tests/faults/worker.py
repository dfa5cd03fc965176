"""The worker process of these tests: ``worker.py LOOP [setting=value …]``. Prints ``ready ADDRESS``, then what handlers say."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import dynwire

executed: dict[int, int] = {}
events: list[str] = []


def say(text: str) -> None:
    os.write(1, (text + "\n").encode())


async def echo(request: Any) -> Any:
    return request


async def pid(request: Any) -> int:
    return os.getpid()


async def counted(request: dict[str, Any]) -> dict[str, Any]:
    """Remembers that it ran, then returns what it got."""
    executed[request["n"]] = executed.get(request["n"], 0) + 1
    return request


async def counted_stream(request: dict[str, Any]) -> AsyncIterator[tuple[int, int, bytes]]:
    executed[request["n"]] = executed.get(request["n"], 0) + 1
    for index in range(request["items"]):
        yield request["n"], index, b"x" * request["size"]


async def report(request: Any) -> dict[str, Any]:
    """What has run so far."""
    return {"executed": list(executed.items()), "events": list(events), "tasks": len(asyncio.all_tasks())}


async def block(request: float) -> str:
    """Holds up the event loop."""
    say("blocked")
    time.sleep(request)  # noqa: ASYNC251  # that is the fault
    return "slept"


async def wait(request: Any) -> None:
    """Never answers."""
    say("waiting")
    await asyncio.get_running_loop().create_future()


async def some_then_wait(request: int) -> AsyncIterator[int]:
    for index in range(request):
        yield index
    await asyncio.get_running_loop().create_future()


async def endless(request: int) -> AsyncIterator[tuple[int, bytes]]:
    index = 0
    while True:
        yield index, b"x" * request
        index += 1


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Dull(BaseException):
    pass


def misdeed(kind: str) -> Any:
    match kind:
        case "exception":
            raise ValueError("that was wrong")
        case "cancelled":
            raise asyncio.CancelledError("by itself")
        case "system_exit":
            raise SystemExit(3)
        case "keyboard_interrupt":
            raise KeyboardInterrupt
        case "base_exception":
            raise Dull("dull")
        case "generator_exit":
            raise GeneratorExit
        case "stop_iteration":
            raise StopIteration(1)
        case "stop_async_iteration":
            raise StopAsyncIteration
        case "unprintable":
            raise Unprintable
        case "group":
            raise ExceptionGroup("two", [ValueError("a"), TypeError("b")])
        case "huge":
            raise ValueError("x" * 10_000_000)
        case "surrogates":
            raise ValueError("\udc80 not encodable")
        case "unencodable":
            return object()
        case "recursion":
            return misdeed("recursion") + 1
    raise AssertionError(kind)


async def wrong(kind: str) -> Any:
    return misdeed(kind)


async def wrong_later(kind: str) -> Any:
    await asyncio.sleep(0)
    return misdeed(kind)


def wrong_in_thread(kind: str) -> Any:
    return misdeed(kind)


async def wrong_midway(kind: str) -> AsyncIterator[Any]:
    yield 0
    yield 1
    yield misdeed(kind)
    yield 3


def wrong_midway_in_thread(kind: str) -> Iterator[Any]:
    yield 0
    yield 1
    yield misdeed(kind)
    yield 3


async def stubborn(request: float) -> str:
    """Ignores cancellation for so many seconds."""
    say("stubborn")
    deadline = time.monotonic() + request
    while time.monotonic() < deadline:
        try:
            await asyncio.sleep(deadline - time.monotonic())
        except asyncio.CancelledError:
            events.append("ignored")
    events.append("stubborn ended")
    return "done"


async def cleans_up(request: str) -> AsyncIterator[int]:
    """A generator with cleaning up that suspends."""
    try:
        if request != "first":
            yield 0
        say("cleanable")
        await asyncio.get_running_loop().create_future()
    except GeneratorExit:
        events.append("GeneratorExit")
        raise
    except asyncio.CancelledError:
        events.append("CancelledError")
        raise
    finally:
        await asyncio.sleep(0.01)
        events.append("cleaned")


async def stoppable(request: Any, context: dynwire.Context) -> AsyncIterator[int]:
    yield 0
    await context.stopped()
    yield 1
    yield 2


HANDLERS: list[Any] = [
    echo, pid, counted, counted_stream, report, block, wait, some_then_wait, endless, wrong, wrong_later, wrong_in_thread,
    wrong_midway, wrong_midway_in_thread, stubborn, cleans_up, stoppable,
]  # fmt: skip


async def main(settings: dict[str, Any]) -> None:
    manager = dynwire.AsyncNetworkManager(**{"tcp_host": "127.0.0.1", "discovery_ttl": 60.0, **settings})
    for handler in HANDLERS:
        service = await manager.endpoint(f"f.w.{handler.__name__}").serve(handler)
    say(f"ready {service.instance.address}")
    await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    factory: Any = asyncio.new_event_loop
    if sys.argv[1] == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(dict(argument.split("=", 1) for argument in sys.argv[2:])))
