"""The engine on an event loop, and the handler on every kind of task."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import dynwire
from dynwire import Context
from dynwire.mocker.engine import Engine, Wake
from dynwire.mocker.scheduler import EngineConfig
from dynwire.mocker.timing import Timing
from dynwire.mocker.worker import Mocker
from dynwire.workers.protocol import EngineItem, EngineRequest, Routing, SamplingOptions, StopConditions

from .helpers import EOS, story

FAST = 1e6
NEVER = 1e-6
"""speedups: as fast as the machine can, and a first token in hours"""

SMALL = EngineConfig(num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=200)


def mocker(speedup: float = FAST, config: EngineConfig = SMALL, **more: Any) -> Mocker:
    return Mocker(Engine(config, story(), speedup=speedup, **more), [EOS])


def request(length: int = 6, first: int = 1, **stop: Any) -> EngineRequest:
    return EngineRequest("m", [first, *range(100, 99 + length)], StopConditions(**stop))


def to_rank(rank: int, asked: EngineRequest) -> EngineRequest:
    asked.routing = Routing(dp_rank=rank)
    return asked


async def tokens_of(items: AsyncIterator[EngineItem]) -> list[int]:
    found: list[int] = []
    async for item in items:
        assert item.token_ids or item.finish_reason == "cancelled"
        found += item.token_ids
    return found


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # the engine tells its consumers only
        await asyncio.sleep(0)


async def test_an_answer() -> None:
    items = [item async for item in mocker().generate(request(max_tokens=5), Context())]
    assert [len(item.token_ids) for item in items] == [1] * 5
    assert [item.finish_reason for item in items] == [None] * 4 + ["length"]
    assert [item.cached_tokens for item in items] == [0] + [None] * 4


async def test_one_step_serves_everybody() -> None:
    """Eight requests that arrive together get their tokens in the same turns of the loop."""
    worker = mocker()
    order: list[int] = []

    async def one(first: int) -> None:
        async for _ in worker.generate(request(first=first, max_tokens=4), Context()):
            order.append(first)

    async with asyncio.TaskGroup() as group:
        for first in range(8):
            group.create_task(one(first))
    assert [sorted(order[at : at + 8]) for at in range(0, 32, 8)] == [list(range(8))] * 4


@pytest.mark.parametrize(("speedup", "tokens"), [(FAST, 20), (0.2, 4)])
async def test_steps_that_are_due_at_once_share_a_turn_of_the_loop(speedup: float, tokens: int) -> None:
    """But a first token does not wait for what comes after it, and steps that time separates stay apart.

    At 0.2 a step takes 30 ms, more than a late engine catches up.
    """
    loop = asyncio.get_running_loop()
    turn = 0
    turns: list[int] = []

    def count() -> None:
        nonlocal turn
        turn += 1
        handles[:] = [loop.call_soon(count)]

    handles = [loop.call_soon(count)]
    async for item in mocker(speedup).generate(request(max_tokens=tokens), Context()):
        assert len(item.token_ids) == 1
        turns.append(turn)
    handles[0].cancel()
    assert len(turns) == tokens and turns[0] < turns[1]
    assert len(set(turns[1:])) == (1 if speedup == FAST else tokens - 1)


async def test_a_slow_reader_gets_several_tokens_at_once() -> None:
    worker = mocker()
    items = worker.generate(request(max_tokens=50), Context())
    first = await anext(items)
    # while it does something else, the engine leaves it alone
    elsewhere = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.01, elsewhere.set_result, 7)
    assert await elsewhere == 7
    await until(lambda: worker.engine.metrics()[0].active == 0)
    rest = [item async for item in items]
    assert len(rest) == 1 and len(first.token_ids + rest[0].token_ids) == 50 and rest[0].finish_reason == "length"


async def test_eos_and_its_switches() -> None:
    async def answer(ends: str, **stop: Any) -> list[int]:
        config = EngineConfig(max_model_len=3000)
        worker = Mocker(Engine(config, story(), speedup=FAST), [EOS], ends)
        return await tokens_of(worker.generate(request(**stop), Context()))

    open_end = await answer("open")
    assert open_end[-1] == EOS and len(open_end) < 2000
    assert await answer("always", max_tokens=2000) == open_end
    assert len(await answer("open", max_tokens=2000)) == 2000
    assert len(await answer("always", max_tokens=2000, ignore_eos=True)) == 2000
    assert len(await answer("never")) == 3000 - 6
    later = await answer("open", min_tokens=len(open_end))
    assert len(later) > len(open_end) and later[-1] == EOS
    stopped = await answer("never", stop_token_ids=[open_end[4]], max_tokens=2000)
    assert stopped == open_end[: open_end.index(open_end[4]) + 1]


async def test_eos_ids_of_the_request_count_more_than_the_models() -> None:
    worker = Mocker(Engine(EngineConfig(max_model_len=3000), story(), speedup=FAST), [EOS])
    asked = request()
    asked.eos_token_ids = [7]
    found = await tokens_of(worker.generate(asked, Context()))
    assert found[-1] == 7 and EOS not in found


async def test_a_seed_makes_another_answer() -> None:
    worker = mocker()
    answers = []
    for seed in (None, 1, 1, 2):
        asked = request(max_tokens=40)
        asked.sampling_options = SamplingOptions(seed=seed)
        answers.append(await tokens_of(worker.generate(asked, Context())))
    assert answers[1] == answers[2] and len({tuple(answer) for answer in answers}) == 3


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (request(length=200), "max_model_len"),
        (EngineRequest("m", []), "empty"),
        (EngineRequest("m", [1, -1]), "no token id"),
        (request(max_tokens=0), "max_tokens"),
        (to_rank(1, request()), "dp_rank is 1"),
    ],
)
async def test_a_request_that_can_never_be_answered(wrong: EngineRequest, text: str) -> None:
    worker = mocker()
    with pytest.raises(ValueError, match=text):
        await anext(worker.generate(wrong, Context()))
    assert worker.engine.metrics()[0].waiting == 0


# Ending early -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "stop", "kill"])
@pytest.mark.parametrize("when", ["waiting", "prefill", "decoding"])
async def test_ending_early_frees_the_blocks_at_once(how: str, when: str) -> None:
    timing = Timing(base=0.0, per_token=0.0, attention=1.0, cache_read=0.0)  # only prompts take time
    config = EngineConfig(
        num_blocks=64, block_size=4, max_num_seqs=1, max_num_batched_tokens=64, max_model_len=200, timing=timing
    )
    worker = Mocker(Engine(config, story(), speedup=FAST if when == "decoding" else NEVER), [EOS])
    others = []
    if when == "waiting":
        others.append(asyncio.ensure_future(tokens_of(worker.generate(request(first=2, max_tokens=3), Context()))))
        await until(lambda: worker.engine.metrics()[0].active == 1)
    context = Context()
    found: list[int] = []

    async def consume() -> None:
        async with contextlib.aclosing(worker.generate(request(max_tokens=190), context)) as items:
            async for item in items:
                found.extend(item.token_ids)

    def reached() -> bool:
        metrics = worker.engine.metrics()[0]
        return bool(metrics.waiting if when == "waiting" else found if when == "decoding" else metrics.active)

    task = asyncio.ensure_future(consume())
    await until(reached)
    blocks = worker.engine.metrics()[0].blocks_used
    assert blocks > 0
    if how == "stop":
        context.stop()
        await task
    elif how == "kill":
        context.kill()
        await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    metrics = worker.engine.metrics()[0]
    assert (metrics.waiting, metrics.active, metrics.blocks_used) == (0, len(others), blocks if others else 0)
    assert len(found) < 190
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    worker.engine.close()


async def test_stopping_from_another_thread() -> None:
    worker = mocker(NEVER)
    context = Context()
    task = asyncio.ensure_future(tokens_of(worker.generate(request(max_tokens=5), context)))
    await until(lambda: worker.engine.metrics()[0].active == 1)
    thread = threading.Thread(target=context.stop)
    thread.start()
    assert await task == []
    thread.join()
    worker.engine.close()


async def test_a_timeout_around_the_consumer() -> None:
    worker = mocker(NEVER)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await tokens_of(worker.generate(request(max_tokens=5), Context()))
    assert worker.engine.metrics()[0].blocks_used == 0
    worker.engine.close()


async def test_waking_twice_wakes_once() -> None:
    """A consumer that is busy elsewhere, or has gone on already, is left alone."""
    wake = Wake(asyncio.get_running_loop())
    woken: list[Wake] = []
    wake.add_done_callback(woken.append)
    wake()
    wake()
    wake.add_done_callback(woken.append)
    wake.remove_done_callback(woken.append)
    wake()
    assert woken == [wake]


async def test_context_variables_stay_with_the_consumer() -> None:
    """Consumers go on within the engine's callback, but each in its own context."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    worker = mocker()

    async def one(number: int) -> None:
        variable.set(number)
        async for _ in worker.generate(request(first=number, max_tokens=9), Context()):
            assert variable.get() == number and asyncio.current_task() in tasks

    tasks = [asyncio.ensure_future(one(number)) for number in range(5)]
    await asyncio.gather(*tasks)


# Ranks --------------------------------------------------------------------------------------------------------------------


async def test_ranks_have_caches_of_their_own_and_share_the_load() -> None:
    events: list[dict[str, Any]] = []
    worker = mocker(dp_size=2, sink=events.append, worker_id=5)
    for rank in (0, 1, 1):
        await tokens_of(worker.generate(to_rank(rank, request(max_tokens=2)), Context()))
    assert [(e["worker_id"], e["event"]["dp_rank"], e["event"]["event_id"]) for e in events] == [(5, 0, 1), (5, 1, 1)]
    assert [metrics.hit_tokens for metrics in worker.engine.metrics()] == [0, 4]
    assert worker.engine.metrics()[1].prefix_hit_rate == 4 / 12

    slow = mocker(NEVER, dp_size=2)
    tasks = [asyncio.ensure_future(tokens_of(slow.generate(request(first=n, max_tokens=2), Context()))) for n in range(6)]
    await until(lambda: sum(metrics.active for metrics in slow.engine.metrics()) == 6)
    assert [metrics.active for metrics in slow.engine.metrics()] == [3, 3]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    slow.engine.close()


async def test_events_wait_for_the_worker_to_have_an_id() -> None:
    events: list[dict[str, Any]] = []
    worker = mocker(sink=events.append)
    await tokens_of(worker.generate(request(max_tokens=2), Context()))
    assert not events
    worker.engine.identify(9)
    await tokens_of(worker.generate(request(first=2, max_tokens=2), Context()))
    assert [(event["worker_id"], event["event"]["event_id"]) for event in events] == [(9, 1), (9, 2)]


@pytest.mark.parametrize("wrong", [{"speedup": 0.0}, {"speedup": float("nan")}, {"dp_size": 0}])
async def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        mocker(**wrong)


async def test_time_passes_as_the_timing_says() -> None:
    """20 steps of 10 ms for the one, and the other gets its tokens in the same steps; the loop may be late, but never early."""
    timing = Timing(base=10e-3, per_token=0.0, attention=0.0, cache_read=0.0)
    worker = Mocker(Engine(EngineConfig(timing=timing), story()), [EOS])
    loop = asyncio.get_running_loop()
    begin = loop.time()
    items = worker.generate(request(first=1, max_tokens=20), Context())
    await anext(items)
    other = asyncio.ensure_future(tokens_of(worker.generate(request(first=2, max_tokens=10), Context())))
    assert len(await tokens_of(items)) == 19 and loop.time() - begin > 0.19
    assert other.done() and len(await other) == 10


# Over a plane -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["memory", "tcp"])
async def test_over_a_plane(plane: str) -> None:
    worker = mocker()
    async with dynwire.AsyncNetworkManager(request_plane=plane, discovery="mem") as manager:
        endpoint = manager.endpoint("mocker.worker.generate")
        await endpoint.serve(worker.generate, request_type=EngineRequest)
        client = await endpoint.client()
        await client.wait_for_instances(1, timeout=5.0)

        async def one(first: int) -> list[int]:
            async with client.stream(request(first=first, max_tokens=100), timeout=20.0, reply_type=EngineItem) as stream:
                return await tokens_of(stream)

        answers = await asyncio.gather(*(one(first) for first in range(8)))
        assert all(len(answer) == 100 for answer in answers) and len({tuple(answer) for answer in answers}) == 8
        with pytest.raises(dynwire.RemoteError, match="max_model_len"):
            await client.call(request(length=300), timeout=5.0)


async def test_a_caller_that_leaves_frees_the_blocks() -> None:
    worker = mocker(NEVER)
    async with dynwire.AsyncNetworkManager(request_plane="tcp", discovery="mem") as manager:
        endpoint = manager.endpoint("mocker.worker.generate")
        await endpoint.serve(worker.generate, request_type=EngineRequest)
        client = await endpoint.client()
        await client.wait_for_instances(1, timeout=5.0)
        task = asyncio.ensure_future(client.call(request(max_tokens=3), timeout=20.0))
        await until(lambda: worker.engine.metrics()[0].blocks_used == 2)
        task.cancel()
        await until(lambda: worker.engine.metrics()[0].blocks_used == 0)
    worker.engine.close()
