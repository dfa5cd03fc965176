"""Workers that are killed or stopped: every call ends in time, and says truthfully how far it got."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire import DeadlineExceeded, PeerLost
from tests.plane.faces import Client, eventually

from .conftest import GRACE_S, SLACK_S, Managers, StartWorker, Worker, fails, in_time, recovers


@pytest.mark.every_face
async def test_killed_before_accept(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers(tcp_pool_size=1) as manager:
        block, echo = await manager.client("f.w.block"), await manager.client("f.w.echo")
        await echo.call(0)
        running = asyncio.create_task(fails(block.call(60.0), PeerLost))
        await worker.says("blocked")
        # The loop is held up: this one is written, and nobody reads it.
        waiting = asyncio.create_task(fails(echo.call(1), PeerLost))
        streaming = asyncio.create_task(fails(echo.items(2), PeerLost))
        await asyncio.sleep(0.05)
        worker.kill()
        for task in (running, waiting, streaming):
            error, _ = await task
            assert error.sent == "maybe", error
            assert error.retryable
            assert error.delivered == 0
            assert error.peer == worker.address


async def test_killed_in_mid_call(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers(tcp_request_timeout=0.4) as manager:
        client = await manager.client("f.w.wait")
        started = time.monotonic()
        call = asyncio.create_task(fails(client.call(0), PeerLost))
        await worker.says("waiting")
        # When the accept timeout has passed and the call still waits, the worker has accepted it.
        await eventually(lambda: time.monotonic() > started + 0.8)
        assert not call.done()
        worker.kill()
        error, _ = await call
        assert error.sent == "yes"
        assert error.request_id is None or isinstance(error.request_id, str)


@pytest.mark.every_face
@pytest.mark.parametrize("items", [1, 5])
async def test_killed_in_mid_stream(managers: Managers, start_worker: StartWorker, items: int) -> None:
    worker = start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.some_then_wait")
        got: list[Any] = []
        with pytest.raises(PeerLost) as caught:
            async with client.stream(items) as stream:
                async for item in stream:
                    got.append(item)
                    if len(got) == items:
                        worker.kill()
        assert got == list(range(items))
        assert (caught.value.delivered, caught.value.sent) == (items, "yes")


@pytest.mark.parametrize("size", [10, 20_000])
async def test_what_had_come_before_the_loss_is_delivered(managers: Managers, start_worker: StartWorker, size: int) -> None:
    worker = start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.endless")
        got: list[int] = []
        with pytest.raises(PeerLost) as caught:
            async with client.stream(size) as stream:
                async for index, data in stream:
                    assert len(data) == size
                    got.append(index)
                    if len(got) == 20:
                        worker.kill()
        assert got == list(range(len(got))), "a hole, or an item twice"
        assert len(got) >= 20
        assert (caught.value.delivered, caught.value.sent) == (len(got), "yes")


async def test_the_next_call_goes_to_another_worker(managers: Managers, start_worker: StartWorker) -> None:
    first, second = start_worker(), start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.pid", wait=2)
        assert {await client.call(0) for _ in range(4)} == {first.pid, second.pid}
        first.kill()
        lost = 0
        for _ in range(10):
            try:
                assert await client.call(0) == second.pid
            except PeerLost as error:  # the first to notice
                assert error.sent == "maybe"
                lost += 1
        assert lost <= 1


# Stopped -----------------------------------------------------------------------------------------------------------------------


async def continues(worker: Worker, client: Client) -> None:
    worker.signal(signal.SIGCONT)
    await recovers(client)


async def test_stopped_until_the_deadline(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers(tcp_pool_size=1) as manager:
        client = await manager.client("f.w.echo")
        await client.call(0)
        worker.signal(signal.SIGSTOP)
        for payload in (1, b"x" * 200_000, 2):
            error, seconds = await fails(client.call(payload, timeout=0.7), DeadlineExceeded)
            in_time(seconds, 0.7)
            assert (error.phase, error.sent) == ("total", "maybe")
        error, seconds = await fails(client.items(2, timeout=0.7), DeadlineExceeded)
        in_time(seconds, 0.7)
        await continues(worker, client)


@pytest.mark.parametrize("second", ["call", "large_call", "stream"])
async def test_a_stopped_worker_and_a_full_socket(managers: Managers, start_worker: StartWorker, face: str, second: str) -> None:
    """Half a payload is in the socket and the rest waits: what is called after it keeps its deadline too."""
    worker = start_worker()
    async with managers(tcp_pool_size=1, tcp_keepalive_interval=4.0, tcp_keepalive_timeout=4.0) as manager:
        client = await manager.client("f.w.echo")
        await client.call(0)
        worker.signal(signal.SIGSTOP)
        _, seconds = await fails(client.call(b"x" * 16_000_000, timeout=0.7), DeadlineExceeded)
        in_time(seconds, 0.7)
        made: dict[str, Callable[[], Any]] = {
            "call": lambda: client.call(1, timeout=0.7),
            "large_call": lambda: client.call(b"x" * 16_000_000, timeout=0.7),
            "stream": lambda: client.items(1, timeout=0.7),
        }
        _, seconds = await fails(made[second](), DeadlineExceeded)
        in_time(seconds, 0.7)
        await continues(worker, client)


async def test_closing_a_stream_of_a_stopped_worker(managers: Managers, start_worker: StartWorker, face: str) -> None:
    """Giving up never waits for the peer."""
    worker = start_worker()
    async with managers(tcp_pool_size=1, tcp_keepalive_interval=4.0, tcp_keepalive_timeout=4.0) as manager:
        echo, streams = await manager.client("f.w.echo"), await manager.client("f.w.some_then_wait")
        async with streams.stream(1) as stream:
            assert await stream.next() == 0
            worker.signal(signal.SIGSTOP)
            await fails(echo.call(b"x" * 16_000_000, timeout=0.3), DeadlineExceeded)
            started = time.monotonic()
        in_time(time.monotonic() - started, 0.0)
        await continues(worker, echo)


async def test_connecting_to_a_stopped_worker(managers: Managers, start_worker: StartWorker, face: str) -> None:
    """The kernel accepts the connection, nobody answers: the deadline of the call holds for connecting as well."""
    worker = start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.echo")
        worker.signal(signal.SIGSTOP)
        error, seconds = await fails(client.call(1, timeout=0.7), (DeadlineExceeded, dynwire.ConnectError))
        in_time(seconds, 0.7)
        assert error.sent == "no"
        await continues(worker, client)


@pytest.mark.parametrize("kind", ["call", "stream", "large"])
async def test_stopped_until_the_accept_timeout(managers: Managers, start_worker: StartWorker, kind: str) -> None:
    worker = start_worker()
    async with managers(tcp_request_timeout=0.5, tcp_pool_size=1) as manager:
        client = await manager.client("f.w.echo")
        await client.call(0)
        worker.signal(signal.SIGSTOP)
        made: dict[str, Callable[[], Any]] = {
            "call": lambda: client.call(1),
            "stream": lambda: client.items(1),
            "large": lambda: client.call(b"x" * 16_000_000),
        }
        error, seconds = await fails(made[kind](), DeadlineExceeded)
        in_time(seconds, 0.5)
        assert (error.phase, error.sent, error.timeout) == ("accept", "maybe", 0.5)
        await continues(worker, client)


async def test_stopped_until_the_keepalive_notices(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers(tcp_keepalive_interval=0.3, tcp_keepalive_timeout=0.4, tcp_pool_size=1) as manager:
        client = await manager.client("f.w.echo")
        streams = await manager.client("f.w.some_then_wait")
        await client.call(0)
        async with streams.stream(1) as stream:
            assert await stream.next() == 0
            worker.signal(signal.SIGSTOP)
            started = time.monotonic()
            call = asyncio.create_task(fails(client.call(1, timeout=30.0), PeerLost))
            error, _ = await fails(stream.next(), PeerLost)
            assert time.monotonic() - started < 0.7 + GRACE_S + SLACK_S
            assert (error.sent, error.delivered) == ("yes", 1)
            error, seconds = await call
            assert seconds < 0.7 + GRACE_S + SLACK_S
            assert error.sent == "maybe"
        await continues(worker, client)


async def test_stopped_between_items(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers() as manager:
        client, echo = await manager.client("f.w.some_then_wait"), await manager.client("f.w.echo")
        limits = dynwire.Timeouts(total=30.0, between_items=0.6)
        async with client.stream(1, timeout=limits) as stream:
            assert await stream.next() == 0
            worker.signal(signal.SIGSTOP)
            started = time.monotonic()
            error, _ = await fails(stream.next(), DeadlineExceeded)
            in_time(time.monotonic() - started, 0.6, 0.0)
            assert (error.phase, error.sent) == ("between_items", "yes")
        await continues(worker, echo)


async def test_a_burst_of_first_calls(managers: Managers, start_worker: StartWorker, face: str) -> None:
    """More callers than the pool has connections, before any of them is open."""
    start_worker()
    async with managers(tcp_pool_size=2) as manager:
        client = await manager.client("f.w.echo")
        assert await asyncio.gather(*(client.call(i) for i in range(32))) == list(range(32))


async def test_many_calls_to_a_stopped_worker(managers: Managers, start_worker: StartWorker) -> None:
    """Threads share connections and one reads for the others: each still keeps its own deadline."""
    worker = start_worker()
    async with managers(tcp_pool_size=1) as manager:
        client = await manager.client("f.w.echo")
        await client.call(0)
        worker.signal(signal.SIGSTOP)
        ends = await asyncio.gather(*(fails(client.call(i, timeout=0.3 + i * 0.05), DeadlineExceeded) for i in range(16)))
        for i, (error, seconds) in enumerate(ends):
            in_time(seconds, 0.3 + i * 0.05)
            assert error.sent == "maybe"
        await continues(worker, client)


async def test_a_worker_of_the_command_line(managers: Managers, discovery_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynwire", "serve", "dynwire.cli.demo_worker:whoami", "--endpoint", "f.cli.whoami"]
    worker = Worker(command, tmp_path / "stderr-cli")
    worker.noisy = True
    try:
        async with managers() as manager:
            client = await manager.client("f.cli.whoami")
            pid = (await client.call(1))["pid"]
            assert pid == worker.pid
            worker.kill()
            await fails(client.call(1, timeout=2.0), dynwire.DynwireError)
    finally:
        worker.close()
