"""Durable requests with more than one server, and over TLS: what `test_durable.py` has on one server, where losing it costs more.

Of three members one may be lost: each request is stored by two of them when it counts as accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.config import NatsConfig
from dynwire.nats.connection import NatsConnection
from dynwire.nats.server import NatsCluster, NatsServer, ServerTls
from tests.plane.faces import PATIENCE_S, Manager, eventually

from .test_durable import ACK_WAIT_S, Workers, names

Made = Callable[..., AbstractAsyncContextManager[Manager]]


@pytest.fixture
def loop_factory(leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    return asyncio.new_event_loop


@pytest.fixture
def settings(discovery_dir: Path) -> dict[str, Any]:
    """Of all managers and workers of the test, which adds where its servers are."""
    return {
        "DYN_REQUEST_PLANE": "nats",
        "DYN_NATS_REQUEST_MODE": "jetstream",
        "DYN_FILE_KV": str(discovery_dir),
        "DYNWIRE_NATS_QUEUE_ACK_WAIT": ACK_WAIT_S,
        "DYNWIRE_NATS_QUEUE_MAX_BYTES": 1 << 26,
    }


@pytest.fixture
def cluster(nats_cluster: NatsCluster, settings: dict[str, Any]) -> NatsCluster:
    settings |= {"NATS_SERVER": nats_cluster.url, "DYNWIRE_NATS_QUEUE_REPLICAS": 3}
    return nats_cluster


@pytest.fixture
def workers(tmp_path: Path, settings: dict[str, Any]) -> Iterator[Workers]:
    found = Workers(tmp_path, settings)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def manager(settings: dict[str, Any]) -> Made:
    @asynccontextmanager
    async def make(**changes: Any) -> AsyncIterator[Manager]:
        made = Manager(dynwire.AsyncNetworkManager(**{**settings, **changes}))
        try:
            yield made
        finally:
            await made.close()

    return make


class Stored:
    """What JetStream says about the queue of ``d.w.work``, asked through one member."""

    def __init__(self, connection: NatsConnection) -> None:
        self._js = connection.client.jetstream(timeout=PATIENCE_S)
        self._name = names("d.w.work").stream

    async def messages(self) -> int:
        found: int = (await self._js.stream_info(self._name)).state.messages
        return found

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.messages() != count:  # noqa: ASYNC110  # JetStream tells nobody
                await asyncio.sleep(0.01)

    async def leader(self, cluster: NatsCluster) -> NatsServer:
        """The member that answers for the queue; it has followers that have everything."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                info = await self._js.stream_info(self._name)
                assert info.config.num_replicas == 3
                if info.cluster and info.cluster.leader and all(replica.current for replica in info.cluster.replicas or ()):
                    return next(server for server in cluster.servers if server.name == info.cluster.leader)
                await asyncio.sleep(0.01)


@asynccontextmanager
async def stored_at(server: NatsServer) -> AsyncIterator[Stored]:
    connection = await NatsConnection.acquire(NatsConfig(servers=(server.url,), ping_interval=5.0), PATIENCE_S)
    try:
        yield Stored(connection)
    finally:
        await connection.release()


async def test_waiting_requests_survive_the_loss_of_a_member(cluster: NatsCluster, manager: Made, workers: Workers) -> None:
    """Also when it does not come back: two of three have everything."""
    await asyncio.to_thread(workers.start().terminate)  # the workers' place in the queue is there, and nobody takes it
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        calls = [asyncio.ensure_future(client.call({"n": n}, timeout=60.0)) for n in range(30)]
        async with stored_at(cluster.servers[0]) as stored:
            await asyncio.wait_for(_stored(stored, 30), PATIENCE_S)
            leader = await stored.leader(cluster)
        lost, *_ = [server for server in cluster.servers if server is not leader]
        await asyncio.to_thread(lost.kill)
        workers.start()
        assert [(await call)["n"] for call in calls] == list(range(30))
        assert all(workers.attempts(n) == [1] for n in range(30)), "no worker had any of them when the member was lost"
        async with stored_at(leader) as stored:
            await stored.until(0)


async def _stored(stored: Stored, count: int) -> None:
    from nats.js.errors import Error

    while True:
        try:
            return await stored.until(count)
        except Error:  # the queue is being made
            await asyncio.sleep(0.01)


@pytest.mark.hard_timeout(120)
async def test_running_requests_survive_the_loss_of_the_leader(cluster: NatsCluster, manager: Made, workers: Workers) -> None:
    """And those that are made meanwhile: the two others elect one of them, and know what was acknowledged."""
    for _ in range(2):
        workers.begin()
    for worker in workers._started:
        worker.wait_ready()
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        assert (await client.call({"n": 0}, timeout=60.0))["n"] == 0
        async with stored_at(cluster.servers[0]) as stored:
            leader = await stored.leader(cluster)
        calls = [asyncio.ensure_future(client.call({"n": n, "seconds": 0.3}, timeout=60.0)) for n in range(1, 21)]
        await eventually(lambda: all(workers.attempts(n) for n in range(1, 21)))
        await asyncio.to_thread(leader.kill)
        calls += [asyncio.ensure_future(client.call({"n": n}, timeout=60.0)) for n in range(21, 31)]
        assert [(await call)["n"] for call in calls] == list(range(1, 31))
        await asyncio.to_thread(leader.start)
        await asyncio.to_thread(cluster.wait_ready)
        async with stored_at(leader) as stored:  # which was away, and has caught up
            await stored.until(0)


# TLS ---------------------------------------------------------------------------------------------------------------------------


async def test_durable_over_tls(authority: dict[str, str], settings: dict[str, Any], manager: Made, workers: Workers) -> None:
    """Calls and streams, and what waits while the server is killed."""
    tls = ServerTls(authority["server"], authority["server_key"], authority["ca"], verify=True)
    with NatsServer(jetstream=True, tls=tls) as server:
        settings |= {
            "NATS_SERVER": server.url,
            "DYNWIRE_NATS_TLS_CA": authority["ca"],
            "DYNWIRE_NATS_TLS_CERT": authority["client"],
            "DYNWIRE_NATS_TLS_KEY": authority["client_key"],
        }
        worker = workers.start()
        async with manager() as made:
            client, items = await made.client("d.w.work", wait=0), await made.client("d.w.items", wait=0)
            assert (await client.call({"n": 1}))["pid"] == worker.pid
            assert await items.items({"n": 2, "items": 0, "total": 3, "seconds": 0}) == [[n, 1] for n in range(3)]
            await asyncio.to_thread(server.kill)
            calls = [asyncio.ensure_future(client.call({"n": n})) for n in range(10, 20)]
            await asyncio.to_thread(server.start)
            assert sorted([(await call)["n"] for call in calls]) == list(range(10, 20))
