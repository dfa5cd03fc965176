"""Many calls and streams at once on the http plane, cancelled, stopped, slow and failing at random: nothing may be left over."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trustme

import dynwire
from dynwire import DynwireError
from dynwire._buffers import get_pool
from dynwire.config import load_config
from dynwire.handlers import prepare
from dynwire.planes.http import AsyncHttpClient, AsyncHttpServer, HttpClient

from .faces import PATIENCE_S, eventually

pytestmark = pytest.mark.parametrize("loop_kind", ["asyncio"])
SIZES = [0, 1, 10, 100, 1000, 10_000, 65_535, 65_536, 100_000, 300_000, 1_000_000, 3 << 20]
WEIGHTS = [4, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1]
BODY_S = 2.0
"""How long new calls are begun"""


def size(rng: random.Random) -> int:
    return rng.choices(SIZES, WEIGHTS)[0]


def pattern(n: int, seed: int) -> bytes:
    return (bytes((seed + i) % 251 for i in range(251)) * (n // 251 + 1))[:n]


async def echo(request: dynwire.Payload) -> Any:
    if len(request) % 3 == 1:
        await asyncio.sleep(0)
    return bytes(request)


async def fail(request: Any) -> Any:
    await asyncio.sleep(0)
    raise ValueError("as asked")


async def hang(request: Any, context: dynwire.Context) -> Any:
    """Until it is killed or asked to stop."""
    await context.stopped()
    return "stopped"


async def items(request: Any, context: dynwire.Context) -> AsyncIterator[bytes]:
    """``[seed, number, fails]``"""
    seed, count, fails = request
    rng = random.Random(seed)
    for i in range(count):
        if context.is_stopped():
            return
        yield pattern(size(rng), i)
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    if fails:
        raise ValueError("as asked")


def _no_threads() -> Any:
    raise AssertionError("every handler here is a coroutine")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings for TLS on loopback."""
    folder: Path = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    cert = ca.issue_cert("127.0.0.1")
    cert.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    return {"http_tls_cert": str(folder / "server.pem"), "http_tls_ca": str(folder / "ca.pem")}


async def stream_once(channel: Any, rng: random.Random) -> None:
    seed, count, fails = rng.randrange(1000), rng.randrange(8), rng.random() < 0.2
    limit = rng.choice([0, 1, 2, 100, 100, 100])
    context = dynwire.Context()
    expected = random.Random(seed)
    got = 0
    stream = channel.stream([seed, count, fails], PATIENCE_S, None, context)
    try:
        async for part in stream:
            assert part == pattern(size(expected), got)
            expected.random()
            got += 1
            if got > limit:
                rng.choice([context.stop, context.kill, lambda: None])()
                if rng.random() < 0.5:
                    break
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice([0, 0, 0.002]))
        else:
            assert fails is False or context.is_stopped()
            assert got == count or context.is_stopped()
    except DynwireError as error:
        assert fails or context.is_killed(), error
    finally:
        stream.close()


async def call_once(channels: dict[str, Any], rng: random.Random) -> None:
    what = rng.random()
    if what < 0.5:
        data = pattern(size(rng), rng.randrange(251))

        async def call() -> Any:
            return await channels["echo"].call(data, PATIENCE_S)

        task = asyncio.create_task(call())
        if rng.random() < 0.2:
            await asyncio.sleep(rng.choice([0, 0.001, 0.01]))
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                assert task.result() == data
        else:
            assert await task == data
    elif what < 0.6:
        with pytest.raises(DynwireError, match="as asked"):
            await channels["fail"].call(b"", PATIENCE_S)
    elif what < 0.7:
        context = dynwire.Context()
        stopped = channels["hang"].call(b"x" * size(rng), PATIENCE_S, None, context)
        await asyncio.sleep(rng.choice([0, 0, 0.005]))
        if rng.random() < 0.5:
            context.stop()
            assert await stopped == "stopped"
        else:
            context.kill()
            with pytest.raises(dynwire.Cancelled):
                await stopped
    elif what < 0.75:
        with pytest.raises(dynwire.DeadlineExceeded):
            await channels["hang"].call(b"", 0.01)
    else:
        await stream_once(channels["items"], rng)


def call_blocking(channels: dict[str, Any], rng: random.Random) -> None:
    what = rng.random()
    if what < 0.5:
        data = pattern(size(rng), rng.randrange(251))
        assert channels["echo"].call(data, PATIENCE_S) == data
    elif what < 0.6:
        with pytest.raises(DynwireError, match="as asked"):
            channels["fail"].call(b"", PATIENCE_S)
    elif what < 0.7:
        with pytest.raises(dynwire.DeadlineExceeded):
            channels["hang"].call(b"x" * size(rng), 0.05)
    else:
        seed, count, fails = rng.randrange(1000), rng.randrange(8), rng.random() < 0.2
        limit = rng.choice([0, 1, 100, 100, 100])
        expected = random.Random(seed)
        got = 0
        stream = channels["items"].stream([seed, count, fails], PATIENCE_S)
        try:
            for part in stream:
                assert part == pattern(size(expected), got)
                expected.random()
                got += 1
                if got > limit:
                    break
            else:
                assert not fails
                assert got == count
        except DynwireError:
            assert fails
        finally:
            stream.close()


def whole(stats: dict[str, Any], connection_window: int) -> None:
    assert (stats["streams"], stats["body_bytes"]) == (0, 0), stats
    windows = stats["windows"]
    assert windows["streams"] == {} and windows["queued"] == 0, windows
    if "unread" in windows:
        assert windows["unread"] == 0 and windows["recv_window"] + windows["unannounced"] == connection_window, windows
    else:  # h2 keeps some accounts of its own
        assert 0 < windows["recv_window"] <= connection_window, windows


@pytest.mark.parametrize("security", ["plain", "tls"])
@pytest.mark.parametrize("face", ["async", "blocking"])
@pytest.mark.parametrize("engine", ["native", "h2"])
async def test_nothing_is_left_over(engine: str, face: str, security: str, authority: dict[str, str]) -> None:
    rng = random.Random(f"{engine} {face} {security}")
    in_use = get_pool().in_use_bytes
    settings = {
        "http_engine": engine, "http_host": "127.0.0.1", "http_port": 0, "tcp_pool_size": 2, "tcp_request_timeout": PATIENCE_S,
        "http_stream_window": 262_144,
        "http_connection_window": 524_288, "http_adaptive_window": False, **(authority if security == "tls" else {}),
    }  # fmt: skip
    config = load_config(settings)
    server = AsyncHttpServer(config)
    await server.start()
    for handler in (echo, fail, hang, items):
        server.add_endpoint(f"a.b.{handler.__name__}", prepare(handler, _no_threads))
    client: Any = AsyncHttpClient(config) if face == "async" else HttpClient(config)
    channels = {
        name: client.channel(dynwire.Instance(1, "a", "b", name, "http", server.address))
        for name in ("echo", "fail", "hang", "items")
    }
    end = time.monotonic() + BODY_S
    if face == "async":
        for channel in channels.values():
            await channel.connect()

        async def caller(mine: random.Random) -> None:
            while time.monotonic() < end:
                await call_once(channels, mine)

        async with asyncio.TaskGroup() as group:
            for _ in range(60):
                group.create_task(caller(random.Random(rng.random())))
    else:

        def thread(mine: random.Random) -> None:
            while time.monotonic() < end:
                call_blocking(channels, mine)

        with ThreadPoolExecutor(16) as threads:
            loop = asyncio.get_running_loop()
            # the first connections are opened without a deadline of milliseconds
            await asyncio.gather(*(loop.run_in_executor(threads, channels["echo"].call, b"", PATIENCE_S) for _ in range(2)))
            await asyncio.gather(*(loop.run_in_executor(threads, thread, random.Random(rng.random())) for _ in range(16)))
    await eventually(lambda: server.in_flight() == 0)
    await eventually(lambda: all(s["streams"] == 0 and s["backlog"] == 0 for s in server.stats()))
    sides = client.stats()[server.address]
    assert sides and server.stats()
    for stats in (*sides, *server.stats()):
        whole(stats, 524_288)
    assert all(channel.in_flight == 0 for channel in channels.values())
    if face == "async":
        await client.close()
    else:
        await asyncio.to_thread(client.close)
    await server.close()
    gc.collect()
    assert get_pool().in_use_bytes == in_use
