"""Slow readers and full queues: whoever is slow waits for himself, whoever is too much is refused at once."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import pytest

import dynwire
from dynwire import Overloaded

from .conftest import DirectClient, Managers, StartWorker, fails


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_slow_reader_makes_only_its_own_writer_wait(managers: Managers, start_worker: StartWorker, loop: str) -> None:
    worker = start_worker(loop)
    async with managers(tcp_pool_size=1, http_stream_window=262_144, http_adaptive_window=False) as manager:
        endless = DirectClient(manager, "f.w.endless", worker.address)
        others = [DirectClient(manager, name, worker.address) for name in ("f.w.echo", "f.w.counted_stream")]
        for other in others:  # one plane client, hence the same connection
            await endless._channel()
            other._plane = endless._plane
            other._made = endless._plane.channel(other.instance)
        echo, counted = others
        async with endless.stream(5000, timeout=60.0) as slow:
            assert (await slow.next())[0] == 0
            for i in range(200):
                assert await echo.call(i, 5.0) == i
            async with counted.stream({"n": 1, "items": 200, "size": 5000}, timeout=10.0) as stream:
                assert [item[1] async for item in stream] == list(range(200))
            assert len(endless.stats()) == 1, "all of this was one connection"
            received = endless.stats()[0]["rx_bytes"]
            assert received < 200 * 5100 + 3 * 262_144, "the slow stream's writer did not wait"
            assert [(await slow.next())[0] for _ in range(300)] == list(range(1, 301))


async def test_a_peer_that_does_not_read(managers: Managers, start_worker: StartWorker) -> None:
    """At most DYN_TCP_CHANNEL_BUFFER requests wait for the writer; the next one is refused at once."""
    # on the http plane a request waits for the worker's windows first: they must not be what stops it
    worker = start_worker(http_stream_window=1 << 25, http_connection_window=1 << 26)
    async with managers(tcp_channel_buffer=10, tcp_pool_size=1, tcp_stream_window=65536) as manager:
        client = DirectClient(manager, "f.w.echo", worker.address)
        await client.call(0)
        await asyncio.sleep(0.1)  # large payloads wait for the peer's answers as long as small calls are recent
        worker.signal(signal.SIGSTOP)
        running = [asyncio.create_task(fails(client.call(b"x" * 8_000_000, 3.0), dynwire.DynwireError)) for _ in range(3)]
        await asyncio.sleep(0.2)
        running += [asyncio.create_task(fails(client.call(i, 3.0), dynwire.DynwireError)) for i in range(40)]
        ends = [await task for task in running]
        refused = [(error, seconds) for error, seconds in ends if isinstance(error, Overloaded)]
        assert len(refused) >= 20, [type(error).__name__ for error, _ in ends]
        for error, seconds in refused:
            assert seconds < 1, "refused, but not at once"
            assert (error.limit, error.sent, error.retryable) == (10, "no", True)
            assert error.depth is not None and error.depth >= 10
            assert "DYN_TCP_CHANNEL_BUFFER" in str(error)
        worker.signal(signal.SIGCONT)
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await client.call(1) == 1
                    break
                except Overloaded:  # it has not read yet what had been waiting
                    await asyncio.sleep(0.01)


async def test_max_in_flight(managers: Managers) -> None:
    release = asyncio.Event()
    started = 0

    async def handler(request: Any) -> Any:
        nonlocal started
        started += 1
        while not release.is_set():  # noqa: ASYNC110  # another loop than the test's
            await asyncio.sleep(0.005)
        return request

    async with managers() as manager:
        await manager.serve("f.here.few", handler, max_in_flight=3)
        client = await manager.client("f.here.few")
        calls = [asyncio.create_task(client.call(i)) for i in range(3)]
        deadline = time.monotonic() + 10
        while started < 3 and time.monotonic() < deadline:  # noqa: ASYNC110  # another loop's
            await asyncio.sleep(0.005)
        error, seconds = await fails(client.call(4), Overloaded)
        assert seconds < 1
        assert (error.depth, error.limit, error.sent, error.retryable) == (3, 3, "no", True)
        release.set()
        assert await asyncio.gather(*calls) == [0, 1, 2]
        assert await client.call(5) == 5
