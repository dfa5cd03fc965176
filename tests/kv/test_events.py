"""From a publisher to an index, over every event plane, with real sockets and servers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.kv_router import RadixTree
from dynwire.kv_router.indexer import KvIndexer
from dynwire.kv_router.publisher import PART_BLOCKS, KvEventPublisher

from ..plane.faces import eventually
from .test_tree import chain, content

WORKERS = (11, 22)
BLOCK_SIZE = 16

Managers = Callable[..., AbstractAsyncContextManager[dynwire.AsyncNetworkManager]]


@pytest.fixture(params=["zmq", "nats", "jetstream"])
def event_plane(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of an event plane."""
    if request.param == "jetstream":
        server, prefix = request.getfixturevalue("nats_server"), request.getfixturevalue("nats_prefix")
        return {"event_plane": "jetstream", "nats_servers": server.url, "nats_prefix": prefix, "events_stream_max_bytes": 1 << 24}
    if request.param == "nats":
        return {"event_plane": "nats", "nats_servers": request.getfixturevalue("nats_server").url}
    pytest.importorskip("zmq")
    return {"event_plane": "zmq"}


@pytest.fixture
def managers(event_plane: dict[str, Any], discovery_dir: Path) -> Managers:
    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[dynwire.AsyncNetworkManager]:
        async with dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", **event_plane, **settings) as manager:
            yield manager

    return make


@asynccontextmanager
async def publisher(managers: Managers, worker: int, **options: Any) -> AsyncIterator[KvEventPublisher]:
    """A worker of its own."""
    async with managers() as manager:
        made = KvEventPublisher(manager, "demo", "worker", worker, **{"block_size": BLOCK_SIZE, **options})
        await made.start()
        try:
            yield made
        finally:
            await made.close()


@asynccontextmanager
async def indexer(manager: dynwire.AsyncNetworkManager, **options: Any) -> AsyncIterator[KvIndexer]:
    made = KvIndexer(manager, "demo", "worker", **options)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


def store(publisher: KvEventPublisher, blocks: list[tuple[int, int]], parent: int | None = None, rank: int = 0) -> None:
    publisher.publish_stored(parent, [b for b, _ in blocks], [t for _, t in blocks], rank)


def same(index: KvIndexer, *publishers: KvEventPublisher) -> bool:
    union: dict[Any, Any] = {}
    for each in publishers:
        union |= content(each.index.tree)
    return content(index.tree) == union


def equal(index: KvIndexer, *publishers: KvEventPublisher) -> bool:
    """Has the index all events? To compare trees would hold up everybody for longer than what is waited for."""
    workers = [publisher.index for publisher in publishers]
    return not index.follower.behind and all(
        index.follower.position(worker.worker_id, rank) == (worker.epoch, worker.last_id(rank))
        for worker in workers
        for rank in worker.ranks or (0,)
    )


async def test_events_arrive_in_the_index(managers: Managers) -> None:
    rng = random.Random(1)
    async with (
        managers() as router,
        publisher(managers, 11) as first,
        publisher(managers, 22, dp_size=2) as second,
        indexer(router) as index,
    ):
        await eventually(lambda: set(index.workers) == {11, 22})
        blocks = chain(rng, 20)
        store(first, blocks)
        store(second, blocks[:5], rank=1)
        first.publish_removed([blocks[19][0], blocks[18][0]])
        await eventually(lambda: index.find_matches([t for _, t in blocks]).scores == {(11, 0): 18, (22, 1): 5})
        first.publish_cleared()
        await eventually(lambda: same(index, first, second))
        assert index.block_size == BLOCK_SIZE
        assert index.connected
        assert index.staleness() == 0.0


async def test_a_late_router_takes_over_the_whole_tree(managers: Managers) -> None:
    rng = random.Random(2)
    async with managers() as router, publisher(managers, 11) as first:
        store(first, chain(rng, 3 * PART_BLOCKS + 7))
        for _ in range(1500):
            store(first, chain(rng, 3))
        await eventually(lambda: not first._waiting)  # sent, and nobody was there
        async with indexer(router) as index:
            await eventually(lambda: same(index, first))
            # a stream may have had it all
            assert index.follower.stats.dumps == 1 or router.config.events.plane == "jetstream"
            store(first, chain(rng, 2 * PART_BLOCKS))
            await eventually(lambda: same(index, first))


async def test_a_worker_that_leaves_takes_its_blocks_along(managers: Managers) -> None:
    rng = random.Random(3)
    async with managers() as router, indexer(router) as index:
        async with publisher(managers, 11) as first:
            store(first, chain(rng, 5))
            await eventually(lambda: same(index, first) and index.tree.nodes == 5)
        await eventually(lambda: index.tree.nodes == 0)
        assert index.workers == ()


async def test_what_the_plane_loses_is_found_again(managers: Managers, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    async with managers() as router, publisher(managers, 11) as first, indexer(router) as index:
        store(first, chain(rng, 5))
        await eventually(lambda: same(index, first) and not index.follower.behind and not index._asking)
        sender = first._sender
        assert sender is not None
        with monkeypatch.context() as patch:
            patch.setattr(type(sender), "send", lambda self, data, key="": None)
            for _ in range(30):
                store(first, chain(rng, 5))
                await asyncio.sleep(0)
        # nothing follows: only the repeated numbers tell
        await eventually(lambda: same(index, first))
        assert index.follower.stats.gaps == 1
        assert index.follower.stats.dumps <= 1


async def test_any_thread_may_publish(managers: Managers) -> None:
    rng = random.Random(5)
    async with managers() as router, publisher(managers, 11) as first, indexer(router) as index:
        chains = [chain(rng, 3) for _ in range(200)]

        def work() -> None:
            for blocks in chains:
                store(first, blocks[:1])
                store(first, blocks[1:], parent=blocks[0][0])

        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(thread.join)
        await eventually(lambda: index.tree.entries == 600 and same(index, first))
        assert first.index.orphans == 0


async def test_another_block_size_is_left_out_with_a_warning(managers: Managers, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(6)
    async with (
        managers() as router,
        publisher(managers, 11, block_size=32) as first,
        publisher(managers, 22) as second,
        indexer(router, block_size=BLOCK_SIZE) as index,
    ):
        store(first, chain(rng, 5))
        store(second, chain(rng, 5))
        await eventually(lambda: same(index, second) and index.tree.nodes == 5)
        assert index.mismatched == {11: 32}
        assert "KV blocks of 32 tokens, this router uses 16" in caplog.text


async def test_without_an_event_plane_nothing_is_opened(discovery_dir: Path) -> None:
    async with dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", event_plane="none") as manager, indexer(manager) as index:
        worker = KvEventPublisher(manager, "demo", "worker", 11, BLOCK_SIZE)
        await worker.start()
        store(worker, [(1, 1)])
        assert worker.index.last_id() == 0
        assert not index.connected
        assert await manager.list_instances() == ()
        assert isinstance(index.tree, RadixTree)
        await worker.close()
