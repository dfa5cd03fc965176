"""``router="kv"``: prompts go where their prefix is cached, over every event plane and without one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.kv_router import compute_block_hashes, sequence_hashes
from dynwire.kv_router.client import KvAsyncClient, KvClient
from dynwire.kv_router.publisher import KvEventPublisher
from dynwire.kv_router.router import KvRouterSettings

from ..plane.faces import eventually

BLOCK_SIZE = 4
PATH = "demo.worker.generate"


class Worker:
    """Caches every prompt that it sees, and says what it found."""

    def __init__(self, manager: dynwire.AsyncNetworkManager) -> None:
        self.manager = manager
        self.seen: list[list[int]] = []
        self.routing: list[Any] = []
        self.cached: set[int] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self) -> None:
        self.service = await self.manager.endpoint(PATH).serve(self.generate)
        self.id = self.service.instance.id
        self.publisher = KvEventPublisher(self.manager, "demo", "worker", self.id, BLOCK_SIZE)
        await self.publisher.start()

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        blocks = compute_block_hashes(request["token_ids"], BLOCK_SIZE)
        ids = sequence_hashes(blocks)
        found = next((i for i, value in enumerate(ids) if value not in self.cached), len(ids))
        self.seen.append(request["token_ids"])
        self.routing.append(request.get("routing"))
        if found < len(ids):
            self.publisher.publish_stored(ids[found - 1] if found else None, ids[found:], blocks[found:])
            self.cached.update(ids)
        await self.gate.wait()
        yield {"token_ids": [1], "cached_tokens": found * BLOCK_SIZE}
        yield {"token_ids": [2], "finish_reason": "stop"}


class Setup:
    def __init__(self, stack: AsyncExitStack, event_plane: str) -> None:
        self.stack = stack
        self.event_plane = event_plane
        self.workers: list[Worker] = []

    async def manager(self) -> dynwire.AsyncNetworkManager:
        return await self.stack.enter_async_context(
            dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", event_plane=self.event_plane)
        )

    async def start(self, count: int) -> None:
        for _ in range(count):
            worker = Worker(await self.manager())
            await worker.start()
            self.stack.push_async_callback(worker.publisher.close)
            self.workers.append(worker)

    async def client(self, **options: Any) -> KvAsyncClient:
        manager = await self.manager()
        settings = KvRouterSettings(block_size=BLOCK_SIZE, seed=1, **options.pop("settings", {}))
        client = await manager.endpoint(PATH).client(router="kv", kv_settings=settings, **options)
        assert isinstance(client, KvAsyncClient)
        await client.wait_for_instances(len(self.workers), 10)
        if client.kv.indexer is not None:
            indexer = client.kv.indexer
            await eventually(lambda: len(indexer.workers) == len(self.workers) and not indexer.follower.behind)
        return client

    def of(self, tokens: list[int]) -> Worker:
        return next(worker for worker in self.workers if tokens in worker.seen)


async def ask(client: KvAsyncClient, tokens: list[int]) -> list[Any]:
    async with client.stream({"token_ids": tokens}, timeout=20) as stream:
        return [item async for item in stream]


def settled(setup: Setup, client: KvAsyncClient) -> bool:
    indexer = client.kv.indexer
    return indexer is None or indexer.tree.entries == sum(worker.publisher.index.tree.entries for worker in setup.workers)


def prompt(rng: random.Random, n: int = 40) -> list[int]:
    return [rng.randrange(50_000) for _ in range(n)]


@pytest.mark.parametrize("event_plane", ["zmq", "none"])
async def test_a_prompt_goes_where_its_prefix_is(discovery_dir: Path, event_plane: str) -> None:
    rng = random.Random(1)
    async with AsyncExitStack() as stack:
        setup = Setup(stack, event_plane)
        await setup.start(3)
        client = await setup.client()
        conversations = [prompt(rng) for _ in range(6)]
        homes = {}
        for turn in range(4):
            for number, tokens in enumerate(conversations):
                items = await ask(client, tokens)
                await eventually(lambda: settled(setup, client))
                home = setup.of(tokens)
                assert homes.setdefault(number, home) is home
                assert items[0]["cached_tokens"] == (0 if turn == 0 else (len(tokens) - 7) // BLOCK_SIZE * BLOCK_SIZE)
                assert home.routing[-1]["expected_blocks"] * BLOCK_SIZE == items[0]["cached_tokens"]
                tokens += prompt(rng, 7)
        stats = client.kv.stats
        assert (stats.routed, stats.reported, stats.agreed) == (24, 24, 24)
        assert client.kv.load.requests == 0


async def test_load_spreads_what_is_cached_nowhere(discovery_dir: Path) -> None:
    rng = random.Random(2)
    async with AsyncExitStack() as stack:
        setup = Setup(stack, "zmq")
        await setup.start(2)
        client = await setup.client()
        for worker in setup.workers:
            worker.gate.clear()
        tasks = [asyncio.create_task(ask(client, prompt(rng))) for _ in range(10)]
        await eventually(lambda: sum(len(worker.seen) for worker in setup.workers) == 10)
        assert [len(worker.seen) for worker in setup.workers] == [5, 5]
        assert client.kv.load.requests == 10
        for worker in setup.workers:
            worker.gate.set()
        await asyncio.gather(*tasks)
        assert client.kv.load.totals() == {}


async def test_a_worker_that_left_is_not_chosen(discovery_dir: Path) -> None:
    rng = random.Random(3)
    async with AsyncExitStack() as stack:
        setup = Setup(stack, "zmq")
        await setup.start(2)
        client = await setup.client()
        tokens = prompt(rng)
        await ask(client, tokens)
        home = setup.of(tokens)
        await home.service.drain(0.0)
        await eventually(lambda: len(client.instances) == 1)
        assert (await ask(client, tokens))[-1]["finish_reason"] == "stop"
        assert all(tokens in worker.seen for worker in setup.workers)


async def test_a_worker_that_refuses_is_not_the_only_one(discovery_dir: Path) -> None:
    """The prompt goes to another worker, and its load is booked there and nowhere else."""
    rng = random.Random(8)
    async with AsyncExitStack() as stack:
        setup = Setup(stack, "none")
        await setup.start(2)
        client = await setup.client()
        tokens = prompt(rng)
        await ask(client, tokens)
        home = setup.of(tokens)
        other = next(worker for worker in setup.workers if worker is not home)
        home.manager.server().entries[PATH].draining = True  # type: ignore[attr-defined]  # its record is still there
        other.gate.clear()
        asking = asyncio.create_task(ask(client, tokens))
        await eventually(lambda: other.seen)
        assert {worker for worker, _ in client.kv.load.totals()} == {other.id}
        other.gate.set()
        assert (await asking)[-1]["finish_reason"] == "stop"
        assert client.kv.load.requests == 0


async def test_a_stream_that_is_left_early_frees_its_load(discovery_dir: Path) -> None:
    rng = random.Random(4)
    async with AsyncExitStack() as stack:
        setup = Setup(stack, "none")
        await setup.start(1)
        client = await setup.client()
        async with client.stream({"token_ids": prompt(rng)}) as stream:
            await anext(stream)
            assert client.kv.load.requests == 1
        assert client.kv.load.requests == 0


async def test_other_requests_are_routed_by_load(discovery_dir: Path) -> None:
    async with AsyncExitStack() as stack:
        setup = Setup(stack, "none")
        manager = await setup.manager()

        async def echo(request: Any) -> Any:
            return request

        await manager.endpoint("demo.other.echo").serve(echo)
        client = await (await setup.manager()).endpoint("demo.other.echo").client(router="kv")
        await client.wait_for_instances(1, 10)
        assert await client.call({"text": "no tokens"}, timeout=10) == {"text": "no tokens"}


async def test_blocking_callers_are_routed_the_same_way(discovery_dir: Path) -> None:
    rng = random.Random(7)
    prompts = [prompt(rng) for _ in range(6)]
    async with AsyncExitStack() as stack:
        setup = Setup(stack, "zmq")
        await setup.start(2)

        def work() -> None:
            with dynwire.NetworkManager(tcp_host="127.0.0.1", event_plane="zmq") as manager:
                client = manager.endpoint(PATH).client(router="kv", kv_settings=KvRouterSettings(block_size=BLOCK_SIZE))
                assert isinstance(client, KvClient)
                client.wait_for_instances(2, 10)
                indexer = client.kv.indexer
                assert indexer is not None
                for tokens in prompts:
                    with client.stream({"token_ids": tokens}, timeout=20) as stream:
                        assert [item["token_ids"] for item in stream] == [[1], [2]]
                deadline = time.monotonic() + 20
                while indexer.tree.entries < 60:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                for tokens in prompts:
                    with client.stream({"token_ids": [*tokens, 1]}, timeout=20) as stream:
                        assert next(stream)["cached_tokens"] == 40
                decision = client.best_worker([*prompts[0], 1], "mine")
                assert (decision.overlap_blocks, len(decision.alternatives)) == (10, 2)
                assert client.kv.load.requests == 1
                client.first_token("mine")
                client.finish("mine")
                while client.kv.load.requests:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                with pytest.raises(dynwire.NoInstances):
                    client.best_worker([1], exclude=[choice.worker[0] for choice in decision.alternatives])

        await asyncio.to_thread(work)
