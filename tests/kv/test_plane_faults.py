"""Whatever event planes, workers and the NATS server do, indexes end up equal to the workers' trees and requests do not fail."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dynwire
from dynwire.event_plane.base import EventSender
from dynwire.event_plane.zmq import ZmqSender
from dynwire.kv_router.indexer import KvIndexer
from dynwire.kv_router.publisher import KvEventPublisher
from dynwire.kv_router.router import KvRouterSettings
from dynwire.nats.server import NatsServer
from dynwire.testing.proxy import FaultProxy
from dynwire.wire.kv_events import KvCacheEvent, cleared, removed, stored

from ..nats.conftest import crash, wiped
from ..plane.faces import eventually
from .test_events import BLOCK_SIZE, equal, same
from .test_routing import PATH, Worker, ask, prompt

logger = logging.getLogger("tests.kv")

# Random histories over real planes ---------------------------------------------------------------------------------------------


class Faulty(EventSender):
    """Loses, repeats, holds back and replays what its worker sends, as a random number generator says."""

    def __init__(self, inner: EventSender, rng: random.Random) -> None:
        self.inner = inner
        self.rng = rng
        self.faulty = True
        self.held: list[bytes] = []
        self.sent: list[bytes] = []

    @property
    def metadata(self) -> Any:
        return self.inner.metadata

    async def start(self) -> None:
        await self.inner.start()

    def send(self, data: bytes, key: str = "") -> None:
        if not self.faulty:
            return self.inner.send(data, key)
        rng, fate = self.rng, self.rng.random()
        self.sent.append(data)
        if fate < 0.2:
            return None  # lost
        if fate < 0.4:
            self.held.append(data)
            return None
        self.inner.send(data)  # without a name: nobody may take a repeat for one
        if fate < 0.5:
            self.inner.send(data)
        if fate < 0.6:
            self.inner.send(rng.choice(self.sent))
        while self.held and rng.random() < 0.5:
            self.inner.send(self.held.pop(rng.randrange(len(self.held))))
        return None

    def send_heads(self, data: bytes) -> None:
        self.inner.send_heads(data)

    async def close(self) -> None:
        await self.inner.close()


class Cache:
    """An engine's cache: makes plausible events, and some that are not."""

    def __init__(self, rng: random.Random, ranks: int) -> None:
        self.rng = rng
        self.have: dict[int, list[int]] = {rank: [] for rank in range(ranks)}

    def event(self) -> KvCacheEvent:
        rng = self.rng
        rank = rng.randrange(len(self.have))
        mine, action = self.have[rank], rng.random()
        if action < 0.65 or not mine:
            blocks = [(rng.getrandbits(64), rng.randrange(4)) for _ in range(rng.randrange(1, 4))]
            parent = rng.choice(mine) if mine and rng.random() < 0.6 else None
            if rng.random() < 0.08:
                parent = rng.getrandbits(64)  # that nobody has announced
            else:
                mine.extend(block for block, _ in blocks)
            return stored(0, parent, blocks, rank)
        if action < 0.9:
            gone = rng.sample(mine, min(len(mine), 2))
            self.have[rank] = [block for block in mine if block not in gone]
            return removed(0, gone, rank)
        if action < 0.96:
            return removed(0, [rng.getrandbits(64)], rank)  # before it is stored, if ever
        self.have[rank] = []
        return cleared(0, rank)


async def history(settings_: dict[str, Any], seed: int, lives: list[int], ranks: int) -> KvIndexer:
    """A worker publishes, ends and starts again with events from 1, ``lives`` events in each life."""
    rng = random.Random(seed)
    async with dynwire.AsyncNetworkManager(**settings_) as router:
        index = KvIndexer(router, "demo", "worker")
        await index.start()
        try:
            for number, count in enumerate(lives):
                last = number == len(lives) - 1
                async with dynwire.AsyncNetworkManager(**settings_) as manager:
                    worker = KvEventPublisher(manager, "demo", "worker", 2**63 + 5, BLOCK_SIZE, ranks)
                    assert worker._sender is not None
                    faults = Faulty(worker._sender, rng)
                    worker._sender = faults
                    await worker.start()
                    try:
                        await eventually(lambda: index.workers)
                        cache = Cache(rng, ranks)
                        for _ in range(count):
                            worker.publish(cache.event())
                            if rng.random() < 0.5:
                                await asyncio.sleep(0)
                                await asyncio.sleep(0)
                        await asyncio.sleep(0)
                        faults.faulty = False
                        if last:
                            await eventually(partial(equal, index, worker))
                            assert same(index, worker)
                    finally:
                        await worker.close()
                await eventually(lambda: not index.workers)
                if last:
                    assert index.tree.entries == 0
            return index
        finally:
            await index.close()


@pytest.fixture(params=["zmq", "nats", "jetstream"])
def plane(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = {"event_plane": request.param, "tcp_host": "127.0.0.1"}
    if request.param == "zmq":
        pytest.importorskip("zmq")
    else:
        found["nats_servers"] = request.getfixturevalue("nats_server").url
        found["events_stream_max_bytes"] = 1 << 22
    return found


@pytest.mark.hard_timeout(240)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), lives=st.lists(st.integers(1, 40), min_size=1, max_size=2), ranks=st.sampled_from((1, 2)))
def test_any_history_ends_in_the_workers_tree(
    plane: dict[str, Any], discovery_dir: Path, seed: int, lives: list[int], ranks: int
) -> None:
    """Lost, repeated, reordered, replayed; unknown parents, removals of what is not there, two ranks, event 1 again."""
    own = {"nats_prefix": f"test-{secrets.token_hex(6)}"} if plane["event_plane"] != "zmq" else {}
    index = asyncio.run(history({**plane, **own}, seed, lives, ranks))
    stats = index.follower.stats
    # each gap costs a few questions; a loop would ask for ever
    assert stats.repairs + stats.dumps + stats.failed <= 20 + 4 * sum(lives)


# Requests go on ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(jetstream_server: NatsServer) -> NatsServer:
    return jetstream_server


async def test_requests_go_on_while_a_zmq_connection_is_cut(discovery_dir: Path) -> None:
    """The way of the events of one worker of two: what is lost meanwhile is found again."""
    pytest.importorskip("zmq")
    rng = random.Random(10)
    common: dict[str, Any] = {"tcp_host": "127.0.0.1", "event_plane": "zmq"}
    async with AsyncExitStack() as stack:
        workers = []
        proxies = []
        for _ in range(2):
            worker = Worker(await stack.enter_async_context(dynwire.AsyncNetworkManager(**common)))
            worker.service = await worker.manager.endpoint(PATH).serve(worker.generate)
            worker.id = worker.service.instance.id
            worker.publisher = KvEventPublisher(worker.manager, "demo", "worker", worker.id, BLOCK_SIZE // 4)
            sender = worker.publisher._sender
            assert isinstance(sender, ZmqSender)
            start = sender.start

            async def behind_a_proxy(sender: ZmqSender = sender, start: Callable[[], Any] = start) -> None:
                await start()
                proxy = await stack.enter_async_context(FaultProxy(sender._address))
                sender._address = proxy.address
                proxies.append(proxy)

            sender.start = behind_a_proxy  # type: ignore[method-assign]
            await worker.publisher.start()
            stack.push_async_callback(worker.publisher.close)
            workers.append(worker)
        publishers = [worker.publisher for worker in workers]
        manager = await stack.enter_async_context(dynwire.AsyncNetworkManager(**common))
        client: Any = await manager.endpoint(PATH).client(router="kv", kv_settings=KvRouterSettings(block_size=4, seed=1))
        await client.wait_for_instances(2, 10)
        index = client.kv.indexer
        await eventually(lambda: len(index.workers) == 2)
        for _ in range(20):
            await ask(client, prompt(rng))
        await eventually(lambda: equal(index, *publishers))
        for kind in ("cut", "reset"):
            connections = [proxy.accepted for proxy in proxies]
            proxies[0].break_all(kind)
            for _ in range(60):
                assert (await ask(client, prompt(rng)))[-1]["finish_reason"] == "stop"
            await eventually(lambda: proxies[0].accepted > connections[0])  # noqa: B023  # it is used at once
            await eventually(lambda: equal(index, *publishers))
            assert proxies[1].accepted == connections[1]
        assert same(index, *publishers)
        assert index.follower.stats.gaps >= 1


@pytest.mark.parametrize("how", [crash, wiped], ids=["killed", "wiped"])
@pytest.mark.parametrize("event_plane", ["nats", "jetstream"])
async def test_requests_go_on_while_the_server_is_away(
    server: NatsServer, discovery_dir: Path, event_plane: str, how: Callable[[NatsServer, float], Any]
) -> None:
    """Requests and events, across an end of the NATS server: no request fails, and the index is repaired."""
    rng = random.Random(9)
    common: dict[str, Any] = {
        "tcp_host": "127.0.0.1", "event_plane": event_plane, "nats_servers": server.url, "events_stream_max_bytes": 1 << 26,
    }  # fmt: skip
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(2):
            worker = Worker(await stack.enter_async_context(dynwire.AsyncNetworkManager(**common)))
            await worker.start()
            stack.push_async_callback(worker.publisher.close)
            workers.append(worker)
        manager = await stack.enter_async_context(dynwire.AsyncNetworkManager(**common))
        client: Any = await manager.endpoint(PATH).client(router="kv", kv_settings=KvRouterSettings(block_size=4, seed=1))
        await client.wait_for_instances(2, 10)
        index = client.kv.indexer
        await eventually(lambda: len(index.workers) == 2 and index.connected)
        stop, done = asyncio.Event(), 0

        async def requests() -> None:
            nonlocal done
            tokens = prompt(rng)
            while not stop.is_set():
                items = await ask(client, tokens)
                assert items[-1]["finish_reason"] == "stop"
                done += 1
                tokens = prompt(rng) if len(tokens) > 100 else [*tokens, *prompt(rng, 8)]
                await asyncio.sleep(0.002)

        running = [asyncio.create_task(requests()) for _ in range(4)]
        await eventually(lambda: done > 100)
        was = await asyncio.to_thread(how, server, 1.0)
        before = done
        await eventually(lambda: index.connected and done > before + 50)
        stop.set()
        await asyncio.gather(*running)
        publishers = [worker.publisher for worker in workers]
        await eventually(lambda: equal(index, *publishers))
        logger.info("equal_after_s: %.3f", time.monotonic() - was.ready)
        logger.info("requests: %d", done)
        assert same(index, *publishers)
        assert client.kv.stats.by_load_only > 0
