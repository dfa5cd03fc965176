"""How long do calls and streams to another process take, blocking and async? For comparisons with peers use compare.py."""

import asyncio

import pytest

SIZES = pytest.mark.parametrize("size", [64, 1024, 1 << 16, 1 << 20], ids=["64B", "1KiB", "64KiB", "1MiB"])
ITEMS = 1000


@SIZES
def test_unary_blocking(benchmark, blocking, size):
    payload = b"x" * size
    assert len(benchmark(blocking["echo"].call, payload)) == size


def test_stream_blocking(benchmark, blocking):
    """1,000 items of 64 bytes."""

    def read():
        with blocking["bulk"].stream(b"%d 64" % ITEMS) as stream:
            return sum(1 for _ in stream)

    assert benchmark(read) == ITEMS


@SIZES
def test_unary_async(benchmark, loop_and_clients, size):
    """One call, with the start of a loop run around it; see the pipelined one for what a call costs."""
    loop, clients = loop_and_clients
    payload, call = b"x" * size, clients["echo"].call

    async def one():
        return await call(payload)

    assert len(benchmark(lambda: loop.run_until_complete(one()))) == size


@pytest.mark.parametrize("handler", ["echo", "suspend"])
@pytest.mark.parametrize("payload", [b"x" * 64, {"id": 1, "tokens": [1, 2, 3]}], ids=["raw", "object"])
def test_unary_async_256(benchmark, loop_and_clients, handler, payload):
    """256 workers with 8 calls each."""
    loop, clients = loop_and_clients
    call = clients[handler].call

    async def worker():
        for _ in range(8):
            await call(payload)

    async def all_of_them():
        await asyncio.gather(*[worker() for _ in range(256)])

    benchmark(lambda: loop.run_until_complete(all_of_them()))


@pytest.mark.parametrize("at_once", [1, 8])
def test_stream_async(benchmark, loop_and_clients, at_once):
    """1,000 items of 64 bytes in each stream."""
    loop, clients = loop_and_clients

    async def read():
        count = 0
        async with clients["bulk"].stream(b"%d 64" % ITEMS) as stream:
            async for _ in stream:
                count += 1
        return count

    async def all_of_them():
        return sum(await asyncio.gather(*[read() for _ in range(at_once)]))

    assert benchmark(lambda: loop.run_until_complete(all_of_them())) == at_once * ITEMS
