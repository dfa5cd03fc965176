"""Handlers that misbehave: their callers get a typed error, other calls go on, the worker stays whole."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import dynwire
from dynwire import Cancelled, DeadlineExceeded, RemoteError
from tests.plane.faces import Manager, eventually

from .conftest import Managers, StartWorker, fails, in_time

KINDS = {
    "exception": "ValueError",
    "cancelled": "CancelledError",
    "system_exit": "SystemExit",
    "keyboard_interrupt": "KeyboardInterrupt",
    "base_exception": "Dull",
    "generator_exit": "GeneratorExit",
    "stop_iteration": "RuntimeError",
    "stop_async_iteration": "StopAsyncIteration",
    "unprintable": "Unprintable",
    "group": "ExceptionGroup",
    "huge": "ValueError",
    "surrogates": "ValueError",
    "unencodable": "",
    "recursion": "RecursionError",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("handler", ["wrong", "wrong_later", "wrong_in_thread", "wrong_midway", "wrong_midway_in_thread"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_what_handlers_raise(start_worker: StartWorker, managers: Managers, loop: str, handler: str, kind: str) -> None:
    worker = start_worker(loop)
    worker.noisy = True
    async with managers() as manager:
        client = await manager.client(f"f.w.{handler}")
        got: list[Any] = []
        started = time.monotonic()
        with pytest.raises(dynwire.DynwireError) as caught:
            if "midway" in handler:
                async with client.stream(kind, timeout=10.0) as stream:
                    async for item in stream:
                        got.append(item)
            else:
                await client.call(kind, timeout=10.0)
        assert time.monotonic() - started < 9, "ended by the deadline only"
        error = caught.value
        assert isinstance(error, RemoteError), error
        assert error.sent == "yes"
        assert not error.retryable
        if KINDS[kind] and not (kind == "generator_exit" or kind.startswith("stop_")):
            assert error.type_name == KINDS[kind]
        if kind == "exception":
            assert error.message == "that was wrong"
        assert len(str(error)) < 1_000_000
        if "midway" in handler:
            assert got == [0, 1]
        echo = await manager.client("f.w.echo")
        assert await echo.call(1) == 1, "the worker has gone on"
        assert worker.process.poll() is None


async def test_a_handler_that_holds_up_the_loop(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers() as manager:
        block, echo = await manager.client("f.w.block"), await manager.client("f.w.echo")
        await echo.call(0)
        blocked = asyncio.create_task(block.call(2.0))
        await worker.says("blocked")
        error, seconds = await fails(echo.call(1, timeout=0.5), (DeadlineExceeded, dynwire.ConnectError))
        if isinstance(error, DeadlineExceeded):
            in_time(seconds, 0.5)
        assert await echo.call(2, timeout=10.0) == 2
        assert await blocked == "slept"


async def test_a_handler_that_ignores_cancellation(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers() as manager:
        client, echo = await manager.client("f.w.stubborn"), await manager.client("f.w.echo")
        error, seconds = await fails(client.call(3.0, timeout=0.6), DeadlineExceeded)
        in_time(seconds, 0.6)
        assert error.sent in ("maybe", "yes")
        assert await echo.call(1) == 1
        report = await manager.client("f.w.report")

        async def events() -> list[str]:
            found: list[str] = (await report.call(0))["events"]
            return found

        async with asyncio.timeout(10):
            while "stubborn ended" not in await events():
                await asyncio.sleep(0.02)
        assert "ignored" in await events(), "cancellation did not reach it"
        assert await echo.call(2) == 2


async def events_of(manager: Manager) -> list[str]:
    found: list[str] = (await (await manager.client("f.w.report")).call(0))["events"]
    return found


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_finally_blocks_run_when_a_stream_is_killed(
    managers: Managers, start_worker: StartWorker, loop: str, when: str
) -> None:
    worker = start_worker(loop)
    async with managers() as manager:
        client = await manager.client("f.w.cleans_up")
        stream = client.stream(when)
        async with stream:
            waiting = asyncio.create_task(fails(stream.next(), dynwire.DynwireError)) if when == "first" else None
            if waiting is None:
                assert await stream.next() == 0
            await worker.says("cleanable")
            stream.context.kill()
            if waiting is not None:
                error, _ = await waiting
                assert isinstance(error, Cancelled)
        async with asyncio.timeout(10):
            while "cleaned" not in await events_of(manager):
                await asyncio.sleep(0.01)
        assert (await events_of(manager))[-2:] == ["CancelledError", "cleaned"]


async def test_finally_blocks_run_when_the_caller_dies(managers: Managers, start_worker: StartWorker) -> None:
    """The caller's connection is gone: the handler is cancelled all the same."""
    worker = start_worker()
    async with managers() as watching:
        async with managers() as manager:
            client = await manager.client("f.w.cleans_up")
            async with client.stream("later") as stream:
                assert await stream.next() == 0
                await worker.says("cleanable")
                await manager.close()
        async with asyncio.timeout(10):
            while "cleaned" not in await events_of(watching):
                await asyncio.sleep(0.01)


async def test_stop_is_cooperative(managers: Managers, start_worker: StartWorker) -> None:
    start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.stoppable")
        got = []
        async with client.stream(0) as stream:
            async for item in stream:
                got.append(item)
                if item == 0:
                    stream.context.stop()
        assert got == [0, 1, 2]


async def test_no_task_stays_behind(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers(tcp_pool_size=1) as manager:
        wait, report = await manager.client("f.w.wait"), await manager.client("f.w.report")
        before = (await report.call(0))["tasks"]
        for _ in range(20):
            await fails(wait.call(0, timeout=0.05), DeadlineExceeded)
            await worker.says("waiting")
        after = -1
        deadline = time.monotonic() + 10
        while after != before and time.monotonic() < deadline:
            after = (await report.call(0))["tasks"]
            await asyncio.sleep(0.01)
        assert after == before
        await eventually(lambda: True)
