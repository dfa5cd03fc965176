"""The jetstream event plane: what the server keeps for routers, and what happens when they, or it, end in every way."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import dynwire
from dynwire.event_plane import jetstream, stream
from dynwire.event_plane.jetstream import JetStreamReceiver, JetStreamSender
from dynwire.event_plane.stream import EventStream, SnapshotStore, StreamNames
from dynwire.kv_router import RadixTree
from dynwire.kv_router.indexer import IndexSnapshot, KvIndexer
from dynwire.kv_router.publisher import KvEventPublisher
from dynwire.nats.connection import NatsConnection
from dynwire.nats.server import NatsCluster, NatsServer

from ..plane.faces import PATIENCE_S, eventually
from .test_events import BLOCK_SIZE, equal, same, store
from .test_tree import chain

logger = logging.getLogger("tests.kv")

PROGRAM = Path(__file__).with_name("router_process.py")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def loop_factory(leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    """One loop: what is tested is between processes, or between us and the server."""
    return asyncio.new_event_loop


@pytest.fixture
def server(jetstream_server: NatsServer) -> NatsServer:
    return jetstream_server


class Lab:
    """Workers and routers of one component, and a look at what the server has."""

    def __init__(self, server: NatsServer, discovery: Path) -> None:
        self.server = server
        self.settings: dict[str, Any] = {
            "tcp_host": "127.0.0.1",
            "event_plane": "jetstream",
            "nats_servers": server.url,
            "events_stream_max_bytes": 1 << 26,
            "router_snapshot_threshold": 100,
        }
        self.environment = {
            "DYN_EVENT_PLANE": "jetstream",
            "NATS_SERVER": server.url,
            "DYN_FILE_KV": str(discovery),
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYNWIRE_EVENTS_STREAM_MAX_BYTES": str(1 << 26),
            "DYN_ROUTER_SNAPSHOT_THRESHOLD": "100",
        }

    @asynccontextmanager
    async def worker(self, worker: int, **settings: Any) -> AsyncIterator[KvEventPublisher]:
        async with dynwire.AsyncNetworkManager(**self.settings, **settings) as manager:
            made = KvEventPublisher(manager, "demo", "worker", worker, BLOCK_SIZE)
            await made.start()
            try:
                yield made
            finally:
                await made.close()

    @asynccontextmanager
    async def router(self, name: str | None = None, reset: bool = False, **settings: Any) -> AsyncIterator[KvIndexer]:
        async with dynwire.AsyncNetworkManager(**self.settings, **settings) as manager:
            made = KvIndexer(manager, "demo", "worker", router_id=name, reset=reset)
            await made.start()
            try:
                yield made
            finally:
                await made.close()

    @asynccontextmanager
    async def look(self) -> AsyncIterator[Look]:
        async with dynwire.AsyncNetworkManager(**self.settings) as manager:
            connection = await NatsConnection.acquire(manager.config.nats, purpose="test")
            try:
                yield Look(connection, manager.config)
            finally:
                await connection.release()

    def process(self, *arguments: str, name: str = "") -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment, **({"DYNWIRE_ROUTER_ID": name} if name else {})}
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip


class Look:
    """What the server has of the component."""

    def __init__(self, connection: NatsConnection, config: dynwire.Config) -> None:
        self.names = StreamNames.of(config.nats.prefix, "demo", "worker")
        self.stream = EventStream(connection.client, config, self.names)
        self.store = SnapshotStore(connection.client, config, self.names)
        self.js = self.stream.js

    async def messages(self) -> int:
        return (await self.js.stream_info(self.names.stream)).state.messages

    async def first(self) -> int:
        return (await self.js.stream_info(self.names.stream)).state.first_seq

    async def consumers(self) -> dict[str, int]:
        """Name to the last acknowledged number."""
        found = await self.stream.consumers()
        return {info.name: info.ack_floor.stream_seq for info in found if info.ack_floor is not None}

    async def objects(self) -> tuple[set[str], set[str]]:
        """Subjects of the parts and of the descriptions in the object store."""
        info = await self.js.stream_info(f"OBJ_{self.names.bucket}", subjects_filter=">")
        found = set(info.state.subjects or ())
        return {s for s in found if ".C." in s}, {s for s in found if ".M." in s}


@pytest.fixture
def lab(server: NatsServer, discovery_dir: Path) -> Lab:
    return Lab(server, discovery_dir)


def receiver_of(index: KvIndexer) -> JetStreamReceiver:
    assert isinstance(index._receiver, JetStreamReceiver)
    return index._receiver


def sender_of(publisher: KvEventPublisher) -> JetStreamSender:
    assert isinstance(publisher._sender, JetStreamSender)
    return publisher._sender


async def later(condition: Callable[[], Any]) -> None:
    """`eventually` for a coroutine function that asks the server."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110  # nobody sets an event for it
            await asyncio.sleep(0.02)


async def publish(publisher: KvEventPublisher, count: int, rng: random.Random, blocks: int = 3) -> None:
    """So many messages."""
    for _ in range(count):
        store(publisher, chain(rng, blocks))
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the stream follow one another as fast as tests want to see their effect."""
    monkeypatch.setattr(jetstream, "TEND_S", 0.2)
    monkeypatch.setattr(jetstream, "TEND_PAUSE_S", 0.05)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    impatience(monkeypatch)


# What is kept ------------------------------------------------------------------------------------------------------------------


async def test_above_the_threshold_the_index_is_stored_and_the_stream_purged(lab: Lab) -> None:
    rng = random.Random(1)
    async with lab.worker(11) as worker, lab.router("r1") as index, lab.look() as look:
        await publish(worker, 90, rng)
        await eventually(lambda: same(index, worker))
        assert (await look.store.pointer())[0].object == "", "not before it is needed"
        await publish(worker, 60, rng)
        await eventually(lambda: receiver_of(index).snapshots == 1)
        pointer, _ = await look.store.pointer()
        await later(lambda: _purged(look, pointer.seq))
        found = await look.store.load()
        assert found is not None
        assert found[0] == pointer.seq
        assert same(index, worker)


async def _purged(look: Look, seq: int) -> bool:
    return await look.first() == seq + 1


async def test_a_restarted_router_is_warm_without_asking_for_trees(lab: Lab) -> None:
    """It has ≥ 95 % of what the workers have from what is stored."""
    rng = random.Random(2)
    async with lab.worker(11) as first, lab.worker(22) as second, lab.look() as look:
        async with lab.router("r1") as index:
            for _ in range(10):
                await publish(first, 50, rng, 10)
                await publish(second, 50, rng, 10)
            await eventually(lambda: receiver_of(index).snapshots >= 1 and equal(index, first, second))
        kept, _ = await look.store.pointer()
        await publish(first, 30, rng, 10)  # while there is no router
        await publish(second, 30, rng, 10)
        async with lab.router("r1") as index:
            ready = time.monotonic()
            await eventually(lambda: index.tree.entries >= 0.95 * (first.index.tree.entries + second.index.tree.entries))
            logger.info("warm_after_s: %.3f", time.monotonic() - ready)
            await eventually(lambda: equal(index, first, second))
            assert same(index, first, second)
            assert index.follower.stats.dumps == 0
            assert receiver_of(index)._covered >= kept.seq


async def test_what_has_changed_while_no_router_was_there(lab: Lab) -> None:
    """A worker that ended leaves; one that started again begins anew."""
    rng = random.Random(3)
    lab.settings["discovery_ttl"] = 1.0
    async with lab.worker(11) as stays, lab.router("r1") as index:
        async with lab.worker(22) as ends, lab.worker(33) as restarts:
            for worker in (stays, ends, restarts):
                await publish(worker, 60, rng)
            await eventually(lambda: receiver_of(index).snapshots >= 1 and same(index, stays, ends, restarts))
            await index.close()
        async with lab.worker(33) as restarted, lab.router("r1") as again:
            await publish(restarted, 5, rng)
            await eventually(lambda: same(again, stays, restarted))
            assert set(again.workers) == {11, 33}
            assert again._restored == set()


async def test_a_snapshot_that_cannot_be_read_is_not_needed(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(16)
    async with lab.worker(11) as worker, lab.look() as look:
        await publish(worker, 20, rng)
        await eventually(lambda: sender_of(worker).unconfirmed == 0)
        state = (await look.js.stream_info(look.names.stream)).state
        writer = await look.store.begin("somebody:")
        assert writer is not None
        assert await writer.write(state.last_seq, b"no snapshot")
        await look.stream.purge_all()
        async with lab.router("r1") as index:
            await eventually(lambda: equal(index, worker))
            assert same(index, worker)
            assert index.follower.stats.dumps == 1
        assert "the stored snapshot of demo.worker.kv_events cannot be used" in caplog.text


async def test_a_snapshot_of_another_block_size_is_left(lab: Lab) -> None:
    rng = random.Random(17)
    async with lab.worker(11) as worker, lab.router("r1") as index:
        await publish(worker, 150, rng)
        await eventually(lambda: receiver_of(index).snapshots == 1)
    async with dynwire.AsyncNetworkManager(**lab.settings) as manager:
        other = KvEventPublisher(manager, "demo", "worker", 22, 2 * BLOCK_SIZE)
        await other.start()
        try:
            async with lab.router("r1", discovery_ttl=3600.0) as index:
                await publish(other, 5, rng)
                await eventually(lambda: equal(index, other))
                assert index.block_size == 2 * BLOCK_SIZE
                assert same(index, other), "the blocks of before have left at once"
        finally:
            await other.close()


async def test_events_wait_while_a_snapshot_is_taken_and_questions_do_not(lab: Lab) -> None:
    rng = random.Random(18)
    async with lab.worker(11) as worker, lab.router("r1") as index:
        blocks = chain(rng, 5)
        store(worker, blocks)
        await eventually(lambda: equal(index, worker))
        tree, begun, go_on = index.tree, threading.Event(), threading.Event()

        class Slow:
            entries, find_matches = tree.entries, tree.find_matches

            def snapshot(self) -> bytes:
                begun.set()
                assert go_on.wait(PATIENCE_S)
                return tree.snapshot()

        index.tree = Slow()  # type: ignore[assignment]
        taking = asyncio.create_task(index.snapshot())
        try:
            await asyncio.to_thread(begun.wait)
            await publish(worker, 20, rng)
            receiver = receiver_of(index)
            await eventually(lambda: sender_of(worker).unconfirmed == 0 and index._held)
            assert index.find_matches([t for _, t in blocks]).scores == {(11, 0): 5}
            assert index.follower.position(11) == (worker.index.epoch, 1)
            assert receiver.connected
        finally:
            go_on.set()
        data = await taking
        index.tree = tree
        await eventually(lambda: equal(index, worker))
        assert same(index, worker)
        assert RadixTree.restore(msgspec.msgpack.decode(data, type=IndexSnapshot).tree).entries == 5


async def test_the_stream_keeps_what_a_slow_router_has_not_acknowledged(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    async with lab.worker(11) as worker, lab.router("slow") as slow, lab.router("fast") as fast, lab.look() as look:
        await publish(worker, 20, rng)
        await eventually(lambda: same(slow, worker) and same(fast, worker))
        receiver = receiver_of(slow)
        await later(lambda: _said(look, "slow", receiver._applied))
        held = receiver._applied
        monkeypatch.setattr(receiver, "_acknowledge", lambda: None)
        monkeypatch.setattr(receiver, "_store_snapshot", _no_snapshot)
        await publish(worker, 150, rng)
        await eventually(lambda: receiver_of(fast).snapshots >= 1)
        pointer, _ = await look.store.pointer()
        assert pointer.seq > held
        await later(lambda: _purged(look, held))
        monkeypatch.undo()
        impatience(monkeypatch)
        receiver._acknowledge()
        await later(lambda: _purged_beyond(look, pointer.seq))


async def _no_snapshot(store: SnapshotStore) -> bool:
    return False


async def _said(look: Look, name: str, seq: int) -> bool:
    return (await look.consumers())[name] == seq


async def _purged_beyond(look: Look, seq: int) -> bool:
    return await look.first() > seq


async def test_a_router_that_is_gone_keeps_nothing(lab: Lab) -> None:
    lab.environment["DYNWIRE_EVENTS_ROUTER_TTL"] = "1"
    rng = random.Random(15)
    async with lab.worker(11) as worker, lab.look() as look:
        process = lab.process(name="dead")
        try:
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"  # type: ignore[union-attr]
            assert "dead" in await look.consumers()
        finally:
            _end(process)
        await publish(worker, 1, rng)  # which the server cannot deliver
        await later(lambda: _gone(look, "dead"))


async def _gone(look: Look, name: str) -> bool:
    return name not in await look.consumers()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


async def test_a_generated_name_ends_with_its_router(lab: Lab) -> None:
    async with lab.look() as look, lab.worker(11):
        async with lab.router() as index:
            assert set(await look.consumers()) == {receiver_of(index).name}
        assert await look.consumers() == {}


async def test_routers_of_one_name_do_not_share_events(lab: Lab) -> None:
    rng = random.Random(5)
    async with lab.worker(11) as worker, lab.router("r") as first, lab.router("r") as second:
        assert {receiver_of(first).name, receiver_of(second).name} == {"r", "r-2"}
        await publish(worker, 20, rng)
        await eventually(lambda: same(first, worker) and same(second, worker))


async def test_of_two_processes_with_one_name_one_takes_another(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(6)
    async with lab.worker(11) as worker, lab.router("r") as first, lab.look() as look:
        jetstream._used.clear()  # as in another process
        async with lab.router("r") as second:
            await eventually(lambda: receiver_of(first).name != receiver_of(second).name and first.connected and second.connected)
            assert set(await look.consumers()) == {receiver_of(first).name, receiver_of(second).name}
            assert "two routers of demo.worker are called r (DYNWIRE_ROUTER_ID)" in caplog.text
            await publish(worker, 20, rng)
            await eventually(lambda: equal(first, worker) and equal(second, worker))
            assert same(first, worker) and same(second, worker)


async def test_reset_starts_with_nothing(lab: Lab) -> None:
    rng = random.Random(7)
    async with lab.look() as look:
        async with lab.worker(11) as worker, lab.router("r1") as index:
            await publish(worker, 150, rng)
            await eventually(lambda: receiver_of(index).snapshots == 1)
        assert (await look.store.pointer())[0].object
        jetstream._reset.clear()
        async with lab.router("r1", reset=True) as index:
            assert (index.tree.entries, index._restored) == (0, set())
            assert (await look.store.pointer())[0].object == ""
            assert await look.objects() == (set(), set())
            assert await look.messages() == 0
        async with lab.worker(11) as worker:
            await publish(worker, 20, rng)
            await eventually(lambda: sender_of(worker).unconfirmed == 0)
            async with lab.router("r1", reset=True) as index:  # the second one of this process takes what there is
                assert await look.messages() > 0
                await eventually(lambda: same(index, worker))


async def test_an_idle_worker_fills_no_stream(lab: Lab) -> None:
    rng = random.Random(8)
    async with lab.worker(11) as worker, lab.look() as look:
        await publish(worker, 5, rng)
        sender = sender_of(worker)
        heads = worker._encode(worker.index.heads())
        await eventually(lambda: sender._heads == heads)
        before = await look.messages()
        assert before == 6
        worker._send_heads()
        assert (sender.unconfirmed, await look.messages()) == (0, 6)


async def test_a_batch_that_is_sent_twice_is_stored_once(lab: Lab) -> None:
    rng = random.Random(9)
    async with lab.worker(11) as worker, lab.look() as look:
        sender = sender_of(worker)
        await eventually(lambda: sender._kept.open)
        store(worker, chain(rng, 3))
        worker._flush()
        for number, waiting in tuple(sender._waiting.items()):
            sender._publish(number, waiting)
        await eventually(lambda: sender.unconfirmed == 0)
        assert [await look.messages()] == [1]


async def test_two_routers_store_one_snapshot_at_a_time(lab: Lab) -> None:
    rng = random.Random(10)
    async with lab.worker(11) as worker, lab.look() as look:
        store_, other = look.store, SnapshotStore(look.store._client, worker._manager.config, look.names)
        writer = await store_.begin("r1:")
        assert writer is not None
        assert await other.begin("r2:") is None
        assert await writer.write(5, b"five" * 1000)
        assert await other.load() == (5, b"five" * 1000)
        second = await other.begin("r2:")
        assert second is not None
        assert await store_.begin("r1:") is None
        # r2 was silent for too long
        store_._seen = (store_._seen[0], store_._seen[1] - stream.LEASE_S)
        third = await store_.begin("r1:")
        assert third is not None
        data = rng.randbytes(3 * stream.CHUNK_BYTES + 5)
        assert await third.write(9, data)
        assert not await second.write(7, b"late"), "whoever was taken for dead changes nothing"
        assert await other.load() == (9, data)
        assert [len(each) for each in await look.objects()] == [2, 2], "this one, and the one before"


# Ends --------------------------------------------------------------------------------------------------------------------------


async def test_a_router_killed_in_its_snapshot_leaves_the_old_one_valid(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    async with lab.worker(11) as worker, lab.look() as look:
        async with lab.router("before") as index:
            await publish(worker, 150, rng, 20)
            await eventually(lambda: receiver_of(index).snapshots == 1)
            await later(lambda: _only(look, "before"))
        old, _ = await look.store.pointer()
        await later(lambda: _purged(look, old.seq))
        await publish(worker, 50, rng, 20)
        process = lab.process("hang", name="killed")
        try:
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"  # type: ignore[union-attr]
            await publish(worker, 100, rng, 20)
            assert await asyncio.to_thread(process.stdout.readline) == "uploading\n"  # type: ignore[union-attr]
            last = (await look.js.stream_info(look.names.stream)).state.last_seq
        finally:
            _end(process)
        pointer, _ = await look.store.pointer()
        assert (pointer.object, pointer.seq) == (old.object, old.seq)
        assert pointer.writer.startswith("killed:")
        assert await look.first() == old.seq + 1, "nothing is purged"
        orphans = len((await look.objects())[0])
        monkeypatch.setattr(stream, "LEASE_S", 0.3)
        async with lab.router("after") as index:
            await eventually(lambda: equal(index, worker))
            assert same(index, worker)
            assert index.follower.stats.dumps == 0
            # the next one takes over the right to write, and cleans up
            await eventually(lambda: receiver_of(index).snapshots == 1)
            pointer, _ = await look.store.pointer()
            assert pointer.seq >= last
            assert pointer.writer == ""
            parts, descriptions = await look.objects()
            assert (len(parts), len(descriptions)) == (2, 2)
            assert orphans >= 2


async def _only(look: Look, name: str) -> bool:
    return set(await look.consumers()) == {name}


async def busy(worker: KvEventPublisher, rng: random.Random, stop: asyncio.Event) -> int:
    """Publishes until told otherwise, and removes now and then; how many events."""
    count = 0
    mine: list[int] = []
    while not stop.is_set():
        blocks = chain(rng, 3)
        store(worker, blocks)
        mine += [block for block, _ in blocks]
        if count % 5 == 4:
            gone = [mine.pop(rng.randrange(len(mine))) for _ in range(2)]
            worker.publish_removed(gone)
        count += 1
        await asyncio.sleep(0.001)
    return count


@pytest.mark.parametrize("how", ["crash", "orderly", "wiped", "suspended"])
async def test_a_server_that_ends_in_the_middle_of_events(lab: Lab, how: str) -> None:
    from ..nats.conftest import crash, orderly, suspended, wiped

    outage = {"crash": crash, "orderly": orderly, "wiped": wiped, "suspended": lambda s, d: suspended(s, 3.0)}[how]
    rng = random.Random(12)
    async with lab.worker(11) as worker, lab.router("r1") as index:
        stop = asyncio.Event()
        publishing = asyncio.create_task(busy(worker, rng, stop))
        await eventually(lambda: worker.index.last_id() > 300 and index.follower.position(11)[1] > 200)
        was = await asyncio.to_thread(outage, lab.server, 0.5)
        await eventually(lambda: index.connected)
        at = worker.index.last_id()
        await eventually(lambda: index.follower.position(11)[1] > at)
        logger.info("%s: followed_after_s: %.3f", how, time.monotonic() - was.ready)
        stop.set()
        await publishing
        await eventually(lambda: equal(index, worker))
        logger.info("%s: equal_after_s: %.3f, dropped: %d", how, time.monotonic() - was.ready, worker.dropped)
        assert same(index, worker)
        await _quiet(index)


async def _quiet(index: KvIndexer) -> None:
    """No question follows another for ever: that all workers are asked once more brings nothing new."""
    stats = index.follower.stats
    await eventually(lambda: not index._asking)
    before = (stats.gaps, stats.dumps, stats.failed, stats.repairs)
    for _ in range(3):
        index.resynchronise()
        await eventually(lambda: not index.follower.behind and not index._asking)
    assert (stats.gaps, stats.dumps, stats.failed, stats.repairs) == (*before[:3], before[3] + 3)
    assert index.follower.next_wakeup() is None


async def test_a_stream_that_is_deleted_is_made_anew(lab: Lab) -> None:
    rng = random.Random(13)
    async with lab.worker(11) as worker, lab.router("r1") as index, lab.look() as look:
        stop = asyncio.Event()
        publishing = asyncio.create_task(busy(worker, rng, stop))
        await eventually(lambda: index.follower.position(11)[1] > 200)
        await look.js.delete_stream(look.names.stream)
        await eventually(lambda: not index.connected)
        await eventually(lambda: index.connected)
        at = worker.index.last_id()
        await eventually(lambda: index.follower.position(11)[1] > at)
        stop.set()
        await publishing
        await eventually(lambda: equal(index, worker))
        assert same(index, worker)
        await _quiet(index)


async def test_without_jetstream_everything_else_goes_on(
    lab: Lab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are asked for their trees, as on every plane."""
    rng = random.Random(20)
    with NatsServer(monitor=False) as plain:
        lab.settings |= {"nats_servers": plain.url}
        monkeypatch.setattr(jetstream, "OPEN_S", 0.5)
        async with lab.worker(11) as worker:
            store(worker, chain(rng, 5))
            async with lab.router("r1") as index:
                await eventually(lambda: equal(index, worker))
                assert same(index, worker)
                assert not index.connected
    assert "the NATS server has no JetStream for us, which DYN_EVENT_PLANE=jetstream needs: start nats-server" in caplog.text


async def test_another_stream_in_the_way_is_said(lab: Lab) -> None:
    async with lab.look() as look:
        await look.js.add_stream(name="theirs", subjects=[look.names.subject])
        with pytest.raises(dynwire.ConfigError, match="another stream of the NATS server has the subject"):
            async with lab.router("r1"):
                pytest.fail("it has started")
        with pytest.raises(dynwire.ConfigError, match="DYNWIRE_NATS_PREFIX"):
            async with lab.worker(11):
                pytest.fail("it has started")


async def test_a_worker_sets_the_limits_of_its_stream(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    async with lab.look() as look:
        async with lab.worker(11):
            pass
        lab.settings |= {"events_stream_max_age": 50.0}
        async with lab.router("r1"):
            assert (await look.js.stream_info(look.names.stream)).config.max_age == 86400
        async with lab.worker(11):
            assert (await look.js.stream_info(look.names.stream)).config.max_age == 50
        assert "DYNWIRE_EVENTS_STREAM_MAX_AGE from 86400.0 to 50.0" in caplog.text


async def test_a_cluster_goes_on_without_a_member(nats_server: NatsServer, discovery_dir: Path) -> None:
    rng = random.Random(19)
    with NatsCluster(3, jetstream=True) as cluster:
        lab = Lab(cluster.servers[0], discovery_dir)
        lab.settings |= {"nats_servers": cluster.url, "events_replicas": 3}
        async with lab.worker(11) as worker, lab.router("r1") as index, lab.look() as look:
            await publish(worker, 150, rng)
            await eventually(lambda: receiver_of(index).snapshots >= 1)
            info = await look.js.stream_info(look.names.stream)
            assert info.config.num_replicas == 3
            assert info.cluster is not None
            leader = next(server for server in cluster.servers if server.name == info.cluster.leader)
            stop = asyncio.Event()
            publishing = asyncio.create_task(busy(worker, rng, stop))
            await asyncio.to_thread(leader.kill)
            at = worker.index.last_id()
            await eventually(lambda: index.connected and index.follower.position(11)[1] > at + 50)
            stop.set()
            await publishing
            await eventually(lambda: equal(index, worker))
            assert same(index, worker)
            async with lab.router("r2") as again:
                await eventually(lambda: equal(again, worker))
                assert again._restored_size == BLOCK_SIZE, "the other two have the snapshot"


async def test_a_slow_router_finds_and_repairs_its_gap(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has lost its place: the stream's limit has cost what it had not taken."""
    rng = random.Random(14)
    lab.settings |= {"events_stream_max_messages": 1000, "router_snapshot_threshold": 10**9}
    async with lab.worker(11) as worker, lab.router("r1") as index:
        await publish(worker, 10, rng)
        await eventually(lambda: same(index, worker))
        receiver, before = receiver_of(index), dataclasses.replace(index.follower.stats)
        with monkeypatch.context() as patch:
            patch.setattr(receiver, "_ask", lambda: None)
            await publish(worker, jetstream.WINDOW + 3000, rng)
            await eventually(lambda: sender_of(worker).unconfirmed == 0)
        assert not equal(index, worker)
        started = time.monotonic()
        receiver._ask()
        await eventually(lambda: equal(index, worker))
        logger.info("repaired_after_s: %.3f", time.monotonic() - started)
        assert same(index, worker)
        stats = index.follower.stats
        assert stats.gaps >= 1
        assert stats.dumps >= before.dumps + 1, "more than the worker's ring is missing"
