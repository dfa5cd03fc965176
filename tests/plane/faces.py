"""One way to write a test for both APIs: the bodies are coroutines, and the blocking API is called in threads for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import dynwire

PATIENCE_S = 20.0
"""How long a test waits for something that is going to happen."""


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Signal:
    """An event that any thread may set and any loop or thread may wait for."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def set(self) -> None:
        with self._lock:
            self._event.set()
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, future)

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait_blocking(self) -> None:
        assert self._event.wait(PATIENCE_S), "what the test waits for did not happen"

    async def wait(self) -> None:
        with self._lock:
            if self._event.is_set():
                return
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waiters.append((loop, future))
        async with asyncio.timeout(PATIENCE_S):
            await future


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for a condition that nothing announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # nobody sets an event for it
            await asyncio.sleep(0.005)


class Stream:
    """A stream of either API."""

    def __init__(self, stream: Any) -> None:
        self.real = stream

    @property
    def context(self) -> dynwire.Context:
        return self.real.context  # type: ignore[no-any-return]

    async def __aenter__(self) -> Stream:
        if isinstance(self.real, dynwire.ReplyStream):
            await asyncio.to_thread(self.real.__enter__)
        else:
            await self.real.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        if isinstance(self.real, dynwire.ReplyStream):
            await asyncio.to_thread(self.real.__exit__, *exc)
        else:
            await self.real.__aexit__(*exc)

    async def __aiter__(self) -> AsyncIterator[Any]:
        if not isinstance(self.real, dynwire.ReplyStream):
            async for item in self.real:
                yield item
            return
        iterator = await asyncio.to_thread(iter, self.real)
        nothing = object()
        while (item := await asyncio.to_thread(next, iterator, nothing)) is not nothing:
            yield item

    async def next(self) -> Any:
        if isinstance(self.real, dynwire.ReplyStream):
            item = await asyncio.to_thread(next, self.real, Stream)
        else:
            item = await anext(self.real, Stream)
        assert item is not Stream, "the stream ended"
        return item

    def close(self) -> None:
        self.real.close()


class Client:
    """A client of either API."""

    def __init__(self, client: Any) -> None:
        self.real = client

    async def call(self, payload: Any, **options: Any) -> Any:
        options.setdefault("timeout", PATIENCE_S)
        if isinstance(self.real, dynwire.Client):
            return await asyncio.to_thread(self.real.call, payload, **options)
        return await self.real.call(payload, **options)

    def stream(self, payload: Any, **options: Any) -> Stream:
        options.setdefault("timeout", PATIENCE_S)
        return Stream(self.real.stream(payload, **options))

    async def items(self, payload: Any, **options: Any) -> list[Any]:
        async with self.stream(payload, **options) as stream:
            return [item async for item in stream]

    async def wait_for_instances(self, count: int = 1, timeout: float | None = PATIENCE_S) -> tuple[dynwire.Instance, ...]:
        if isinstance(self.real, dynwire.Client):
            return await asyncio.to_thread(self.real.wait_for_instances, count, timeout)
        found: tuple[dynwire.Instance, ...] = await self.real.wait_for_instances(count, timeout)
        return found

    async def close(self) -> None:
        await _run(self.real.close)


class Service:
    """A service of either API."""

    def __init__(self, service: Any) -> None:
        self.real = service

    @property
    def instance(self) -> dynwire.Instance:
        return self.real.instance  # type: ignore[no-any-return]

    async def drain(self, grace: float = PATIENCE_S) -> int:
        return await _run(self.real.drain, grace)  # type: ignore[no-any-return]

    async def close(self) -> None:
        await _run(self.real.close)


class Manager:
    """A manager of either API."""

    def __init__(self, real: dynwire.AsyncNetworkManager | dynwire.NetworkManager) -> None:
        self.real = real

    async def serve(self, path: str, handler: Callable[..., Any], **options: Any) -> Service:
        return Service(await _run(self.real.endpoint(path).serve, handler, **options))

    async def client(self, path: str, *, wait: int = 1, **options: Any) -> Client:
        client = Client(await _run(self.real.endpoint(path).client, **options))
        if wait:
            await client.wait_for_instances(wait)
        return client

    async def list_instances(self, path: str | None = None) -> tuple[dynwire.Instance, ...]:
        return await _run(self.real.list_instances, path)  # type: ignore[no-any-return]

    async def close(self, grace: float = 0.0) -> None:
        await _run(self.real.close, grace)


async def _run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Await a coroutine function; run a blocking one in a thread."""
    if asyncio.iscoroutinefunction(function):
        return await function(*args, **options)
    return await asyncio.to_thread(function, *args, **options)
