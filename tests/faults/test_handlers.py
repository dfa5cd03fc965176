"""Handlers that misbehave: their callers get a typed error, other calls go on, the worker stays whole."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import dynwire
from dynwire import Cancelled, DeadlineExceeded, RemoteError
from tests.plane.faces import Manager

from .conftest import Managers, StartWorker, fails, in_time

KINDS = {
    "exception": "ValueError",
    "cancelled": "",
    "system_exit": "SystemExit",
    "keyboard_interrupt": "KeyboardInterrupt",
    "base_exception": "Dull",
    "generator_exit": "GeneratorExit",
    "stop_iteration": "RuntimeError",
    "unprintable": "Unprintable",
    "group": "ExceptionGroup",
    "huge": "ValueError",
    "surrogates": "ValueError",
    "unencodable": "",
    "recursion": "RecursionError",
}


@pytest.mark.parametrize("handler", ["wrong", "wrong_later", "wrong_in_thread"])
async def test_stop_async_iteration(start_worker: StartWorker, managers: Managers, handler: str) -> None:
    """``await anext(iterator)`` without a default is a common way to raise it."""
    start_worker()
    async with managers() as manager:
        client = await manager.client(f"f.w.{handler}")
        await fails(client.call("stop_async_iteration"), RemoteError)


FATAL = {"system_exit", "keyboard_interrupt"}
"""Looked at one by one"""


async def problem_with(manager: Manager, handler: str, kind: str) -> str:
    """What is wrong with the error that a misdeed ends in; empty if nothing is."""
    client = await manager.client(f"f.w.{handler}")
    got: list[Any] = []
    started = time.monotonic()
    try:
        if "midway" in handler:
            async with client.stream(kind, timeout=5.0) as stream:
                async for item in stream:
                    got.append(item)
        else:
            got.append(await client.call(kind, timeout=5.0))
    except dynwire.DynwireError as error:
        if kind == "cancelled" and isinstance(error, Cancelled):
            return ""
        if kind == "unencodable" and isinstance(error, dynwire.DecodeError):
            return "" if error.sent == "yes" else f"sent {error.sent}"
        if not isinstance(error, RemoteError):
            return f"{error!r} after {time.monotonic() - started:.1f} s, items {got}"
        if (error.sent, error.retryable) != ("yes", False):
            return f"sent {error.sent}, retryable {error.retryable}"
        if KINDS[kind] and error.type_name != KINDS[kind]:
            return f"type_name {error.type_name}"
        if kind == "exception" and error.message != "that was wrong":
            return f"message {error.message}"
        if len(str(error)) > 1_000_000:
            return f"a message of {len(str(error))} characters"
        if "midway" in handler and got != [0, 1]:
            return f"items {got}"
        return ""
    return f"no error, but {got}"


@pytest.mark.parametrize("handler", ["wrong", "wrong_later", "wrong_in_thread", "wrong_midway", "wrong_midway_in_thread"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.hard_timeout(120)
async def test_what_handlers_raise(start_worker: StartWorker, managers: Managers, loop: str, handler: str) -> None:
    worker = start_worker(loop)
    worker.noisy = True
    problems = {}
    async with managers() as manager:
        echo = await manager.client("f.w.echo")
        for kind in [kind for kind in KINDS if kind not in FATAL]:
            if problem := await problem_with(manager, handler, kind):
                problems[kind] = problem
            assert await echo.call(kind) == kind, "the worker has gone on"
    assert problems == {}


@pytest.mark.parametrize("kind", sorted(FATAL))
@pytest.mark.parametrize("handler", ["wrong", "wrong_later", "wrong_in_thread", "wrong_midway", "wrong_midway_in_thread"])
@pytest.mark.parametrize("face", ["async-asyncio", "blocking"], indirect=True)
async def test_what_would_end_a_program(start_worker: StartWorker, managers: Managers, handler: str, kind: str) -> None:
    """As in any asyncio task it goes on to the loop and ends the program, but the caller learns first what it was."""
    worker = start_worker()
    worker.noisy = True
    async with managers() as manager:
        assert await problem_with(manager, handler, kind) == ""


async def test_a_handler_that_holds_up_the_loop(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers(tcp_pool_size=1) as manager:
        block, echo = await manager.client("f.w.block"), await manager.client("f.w.echo")
        await echo.call(0)
        blocked = asyncio.create_task(block.call(2.0))
        await worker.says("blocked")
        error, seconds = await fails(echo.call(1, timeout=0.5), DeadlineExceeded)
        in_time(seconds, 0.5)
        assert error.sent == "maybe"
        assert await echo.call(2, timeout=10.0) == 2
        assert await blocked == "slept"


async def test_a_handler_that_ignores_cancellation(managers: Managers, start_worker: StartWorker) -> None:
    start_worker()
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
            while "stubborn ended" not in await events():  # noqa: ASYNC110  # in another process
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
            while "cleaned" not in await events_of(manager):  # noqa: ASYNC110  # in another process
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
            while "cleaned" not in await events_of(watching):  # noqa: ASYNC110  # in another process
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
