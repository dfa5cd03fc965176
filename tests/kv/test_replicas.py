"""Replica sync: what routers tell each other about load; first without sockets, then over every transport, then as processes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import dynwire
from dynwire.config import load_config
from dynwire.errors import ConfigError
from dynwire.event_plane.base import LOAD_CHANNEL, open_load_receiver, open_load_sender
from dynwire.event_plane.nats import NatsReceiver, NatsSender, subject_of
from dynwire.kv_router.load import ActiveLoad
from dynwire.kv_router.replicas import (
    HEAD_S,
    MAX_PAUSE_S,
    MAX_REPLICAS,
    MESSAGE_BLOCKS,
    SILENCE_S,
    LoadAnnouncer,
    LoadMessage,
    ReplicaLoads,
)
from dynwire.kv_router.router import KvRouter, KvRouterSettings

from ..plane.faces import eventually

ROOT = Path(__file__).parent.parent.parent
WORKERS = [(worker, rank) for worker in (7, 8, 9) for rank in (0, 1)]


# Without sockets ---------------------------------------------------------------------------------------------------------------


class Replica:
    """A router's load and both ends of its talk."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.load = ActiveLoad()
        self.announcer = LoadAnnouncer(number, self.load)
        self.others = ReplicaLoads(number, self.load)
        self.names = 0

    def act(self, rng: random.Random) -> None:
        """Something that happens to a router's requests."""
        running = list(self.load.own)
        what = rng.random()
        if what < 0.45 or not running:
            self.names += 1
            blocks = [rng.randrange(1 << 64) for _ in range(rng.randrange(6))]
            self.load.book(f"r{self.names}", rng.choice(WORKERS), rng.randrange(500), blocks, rng.randrange(2))
        elif what < 0.65:
            self.load.first_token(rng.choice(running))
        elif what < 0.98:
            self.load.finish(rng.choice(running))
        elif what < 0.99:  # tried again elsewhere
            self.load.book(rng.choice(running), rng.choice(WORKERS), 100, [1, 2, 3])
        else:
            self.load.remove_worker(rng.choice(WORKERS)[0])


class Bus:
    """Delivers to everybody else, encoded, and loses, repeats and swaps what it is told to."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = list(replicas)
        self.rng = random.Random(1)
        self.loss = self.repeat = self.swap = 0.0
        self.now = 1000.0
        self.held: list[tuple[Replica, bytes]] = []

    def send(self, sender: Replica, messages: Iterator[LoadMessage] | list[LoadMessage]) -> None:
        for message in messages:
            data = msgspec.msgpack.encode(message)
            assert len(data) < 1024 * 1024
            for other in self.replicas:
                if other is sender or self.rng.random() < self.loss:
                    continue
                if self.rng.random() < self.swap:
                    self.held.append((other, data))
                    continue
                for _ in range(2 if self.rng.random() < self.repeat else 1):
                    self.deliver(other, data)
        while self.held:
            self.deliver(*self.held.pop())

    def deliver(self, to: Replica, data: bytes) -> None:
        if to.others.on_message(msgspec.msgpack.decode(data, type=LoadMessage), self.now):
            self.send(to, to.announcer.snapshot())

    def round(self) -> None:
        """Half a second: everybody repeats its number and asks what it has to ask."""
        self.now += HEAD_S
        for replica in self.replicas:
            self.send(replica, replica.announcer.head())
        for replica in self.replicas:
            wanted = replica.others.questions(self.now)
            if wanted:
                self.send(replica, [replica.announcer.ask(wanted)])

    def converge(self, rounds: int = 30) -> int:
        """Rounds until all say the same; fails after too many."""
        for count in range(rounds):
            self.round()
            if all(replica.others.synced for replica in self.replicas):
                totals = [replica.load.totals() for replica in self.replicas]
                assert all(each == totals[0] for each in totals)
                assert sum(requests for requests, _, _ in totals[0].values()) == sum(r.load.requests for r in self.replicas)
                return count + 1
        raise AssertionError("the replicas do not converge")


@pytest.fixture
def bus() -> Bus:
    return Bus(*(Replica(number) for number in (1, 2, 3)))


def test_changes_arrive(bus: Bus) -> None:
    rng = random.Random(2)
    bus.converge()
    for _ in range(2000):
        replica = rng.choice(bus.replicas)
        replica.act(rng)
        if rng.random() < 0.5:
            bus.send(replica, replica.announcer.changes())
    for replica in bus.replicas:
        bus.send(replica, replica.announcer.changes())
    assert len({str(sorted(replica.load.totals().items())) for replica in bus.replicas}) == 1
    assert all(replica.others.stats.gaps == 0 for replica in bus.replicas)
    assert bus.converge() == 1
    assert all(replica.others.stats.snapshots == 2 for replica in bus.replicas)


@pytest.mark.parametrize("seed", range(5))
def test_lost_repeated_and_swapped_messages_are_made_up_for(bus: Bus, seed: int) -> None:
    rng = random.Random(seed)
    bus.rng = random.Random(seed)
    bus.loss, bus.repeat, bus.swap = 0.2, 0.2, 0.2
    for step in range(1500):
        replica = rng.choice(bus.replicas)
        replica.act(rng)
        if rng.random() < 0.5:
            bus.send(replica, replica.announcer.changes())
        if step % 100 == 0:
            bus.round()
    assert any(replica.others.stats.gaps for replica in bus.replicas)
    bus.loss = bus.repeat = bus.swap = 0.0
    bus.now += MAX_PAUSE_S
    bus.converge()


def test_the_last_message_is_missed_too(bus: Bus) -> None:
    bus.converge()
    first, second, third = bus.replicas
    first.load.book("a", (7, 0), 10, [1, 2])
    bus.loss = 1.0
    bus.send(first, first.announcer.changes())
    bus.loss = 0.0
    assert second.load.totals() == third.load.totals() == {}
    bus.converge()
    assert second.load.totals() == third.load.totals() == {(7, 0): (1, 10, 2)}
    assert (second.others.stats.gaps, second.load.requests) == (1, 0)


def test_a_wrong_number_of_requests_is_noticed(bus: Bus) -> None:
    bus.converge()
    first, second, _ = bus.replicas
    first.load.book("a", (7, 0), 10, [1, 2])
    bus.converge()
    second.load.remove_replica(1)
    bus.converge()
    assert second.load.totals() == {(7, 0): (1, 10, 2)}


def test_who_joins_gets_what_is_booked(bus: Bus) -> None:
    bus.converge()
    rng = random.Random(3)
    for replica in bus.replicas:
        for number in range(50):
            blocks = [rng.randrange(1 << 64) for _ in range(1000)]
            replica.load.book(f"a{number}", rng.choice(WORKERS), 16_000, blocks)
    newcomer = Replica(4)
    for replica in bus.replicas:
        newcomer.others.found(replica.number, bus.now)
    bus.replicas.append(newcomer)
    bus.converge()
    assert sum(requests for requests, _, _ in newcomer.load.totals().values()) == 150


def test_half_a_snapshot_changes_nothing(bus: Bus) -> None:
    first, second, _ = bus.replicas
    for number in range(40):
        first.load.book(f"a{number}", (7, 0), 10, list(range(1000)))
    parts = list(first.announcer.snapshot())
    parts = [part for part in parts if part.kind == "snapshot"]
    assert len(parts) > 2
    for part in (parts[0], parts[2], *parts[2:]):
        second.others.on_message(part, bus.now)
    assert second.load.requests_of(1) == 0
    assert not second.others.synced
    bus.converge()


def test_an_enormous_prompt_keeps_its_size(bus: Bus) -> None:
    first, second, _ = bus.replicas
    first.load.book("a", (7, 0), 10, list(range(3 * MESSAGE_BLOCKS)), 1)
    bus.converge()
    assert second.load.totals() == {(7, 0): (1, 10, 3 * MESSAGE_BLOCKS + 1)}


def test_the_silent_count_for_nothing_until_they_are_heard_again(bus: Bus) -> None:
    bus.converge()
    first, second, third = bus.replicas
    second.others.found(1, bus.now)
    first.load.book("a", (7, 0), 10, [1, 2])
    bus.converge()
    bus.replicas.remove(first)
    heard = bus.now
    while bus.now < heard + SILENCE_S - HEAD_S:
        bus.round()
    assert second.load.requests_of(1) == 1
    bus.round()
    for replica in (second, third):
        assert replica.load.totals() == {}
        assert replica.others.stats.silent == 1
    assert 1 in second.others.replicas  # discovery has it
    assert 1 not in third.others.replicas
    bus.replicas.append(first)
    bus.converge()
    assert second.load.totals() == third.load.totals() == {(7, 0): (1, 10, 2)}


def test_who_leaves_takes_its_load_along(bus: Bus) -> None:
    first, second, third = bus.replicas
    first.load.book("a", (7, 0), 10, [1, 2])
    bus.converge()
    bus.send(first, [first.announcer.leaving()])
    third.others.left(1)  # a record that went, for one that is gone
    assert second.load.totals() == third.load.totals() == {}
    assert second.others.replicas == (3,)


def test_hostile_messages_are_bounded() -> None:
    replica = Replica(1)
    for number in range(2, MAX_REPLICAS + 100):
        replica.others.on_message(LoadMessage(number, 1, "head"), 0.0)
    assert len(replica.others.replicas) == MAX_REPLICAS
    with pytest.raises(msgspec.ValidationError):
        booked = [[1, 7, 0, -10, 0, []]]
        raw = msgspec.msgpack.encode({"replica": 5, "seq": 1, "kind": "changes", "booked": booked})
        msgspec.msgpack.decode(raw, type=LoadMessage)


def test_load_of_others_counts_in_decisions() -> None:
    load = ActiveLoad()
    load.book((5, 1), (7, 0), 100, [1, 2, 3])
    load.book("own", (7, 0), 50, [1, 2, 4], 1)
    assert load.totals() == {(7, 0): (2, 150, 5)}
    assert (load.requests, load.requests_of(5)) == (1, 1)
    assert load.decode_blocks_with((7, 0), [1, 2, 3, 9]) == 6
    load.first_token((5, 1))
    load.remove_worker(7)  # the other router will say so itself
    assert load.totals() == {(7, 0): (1, 0, 3)}
    load.finish((5, 1))
    assert load.totals() == {}


# Over sockets and servers ------------------------------------------------------------------------------------------------------

Routers = Callable[..., AbstractAsyncContextManager[KvRouter]]


@pytest.fixture(params=["zmq", "nats", "jetstream"])
def transport(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of an event plane."""
    if request.param == "zmq":
        pytest.importorskip("zmq")
        return {"event_plane": "zmq"}
    server = request.getfixturevalue("nats_server")
    return {
        "event_plane": request.param,
        "nats_servers": server.url,
        "nats_prefix": request.getfixturevalue("nats_prefix"),
    }


@pytest.fixture
def routers(transport: dict[str, Any], discovery_dir: Path) -> Routers:
    @asynccontextmanager
    async def make() -> AsyncIterator[KvRouter]:
        async with dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", **transport) as manager:
            router = KvRouter(manager, "demo", "worker", KvRouterSettings(replica_sync=True, block_size=4))
            router.indexer = None  # its plane is not what is tested here
            await router.start()
            try:
                yield router
            finally:
                await router.close()

    return make


def same(*routers: KvRouter) -> bool:
    totals = [router.load.totals() for router in routers]
    return all(router.replicas is not None and router.replicas.others.synced for router in routers) and all(
        each == totals[0] for each in totals
    )


def know_each_other(*routers: KvRouter) -> bool:
    return all(
        router.replicas is not None and router.replicas.others.synced and len(router.replicas.others.replicas) == len(routers) - 1
        for router in routers
    )


async def test_three_routers_share_their_load(routers: Routers) -> None:
    rng = random.Random(4)
    async with AsyncExitStack() as stack:
        all_of = [await stack.enter_async_context(routers()) for _ in range(3)]
        await eventually(lambda: know_each_other(*all_of))
        names: list[tuple[KvRouter, str]] = []
        for number in range(600):
            router = rng.choice(all_of)
            tokens = [rng.randrange(1000) for _ in range(rng.randrange(1, 40))]
            router.load.book(f"r{number}", rng.choice(WORKERS), len(tokens), tokens)
            names.append((router, f"r{number}"))
            if len(names) > 60:
                router, name = names.pop(rng.randrange(len(names)))
                router.first_token(name)
                router.finish(name)
            if number % 7 == 0:
                await asyncio.sleep(0)
        await eventually(lambda: same(*all_of))
        assert sum(requests for requests, _, _ in all_of[0].load.totals().values()) == 60
        # nothing had to be asked for again
        assert [router.replicas.stats.gaps for router in all_of if router.replicas is not None] == [0, 0, 0]
        # one joins, one leaves
        fourth = await stack.enter_async_context(routers())
        await eventually(lambda: same(fourth, *all_of) and fourth.load.totals())
        await all_of[0].close()
        left = sum(router.load.requests for router in all_of[1:])
        await eventually(lambda: sum(requests for requests, _, _ in fourth.load.totals().values()) == left)
        await eventually(lambda: same(fourth, *all_of[1:]))


async def test_changes_are_told_at_once(routers: Routers) -> None:
    async with routers() as first, routers() as second:
        await eventually(lambda: know_each_other(first, second))
        assert first.replicas is not None and first.replicas._heads is not None
        first.replicas._heads.cancel()  # which would bring them along
        first.load.book("a", (7, 0), 10, [1, 2])
        await eventually(lambda: second.load.totals() == {(7, 0): (1, 10, 2)})
        first.load.first_token("a")
        await eventually(lambda: second.load.totals() == {(7, 0): (1, 0, 2)})
        first.load.finish("a")
        await eventually(lambda: second.load.totals() == {})


async def test_lost_messages_are_made_up_for(routers: Routers, monkeypatch: pytest.MonkeyPatch) -> None:
    async with routers() as first, routers() as second:
        await eventually(lambda: know_each_other(first, second))
        assert first.replicas is not None and second.replicas is not None
        with monkeypatch.context() as patch:
            patch.setattr(first.replicas._sender, "send", lambda data: None)
            first.load.book("a", (7, 0), 10, [1, 2])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert second.load.totals() == {}
        await eventually(lambda: second.load.totals() == {(7, 0): (1, 10, 2)})
        assert second.replicas.stats.gaps == 1


async def test_routers_are_seen_in_discovery(routers: Routers, transport: dict[str, Any]) -> None:
    async with routers() as router, dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", **transport) as manager:
        (instance,) = await manager.list_instances("demo.worker.router_load")
        assert router.replicas is not None
        assert (instance.id, instance.plane) == (router.replicas.id, "events")
        assert instance.address.startswith("tcp://" if transport["event_plane"] == "zmq" else "subject ")
        await router.close()
        assert await manager.list_instances("demo.worker.router_load") == ()


def test_load_is_not_stored_where_events_are() -> None:
    config = load_config({"event_plane": "jetstream", "nats_prefix": "p"}, environ={})
    sender, receiver = open_load_sender(config, "demo", "worker"), open_load_receiver(config, "demo", "worker")
    assert isinstance(sender, NatsSender) and isinstance(receiver, NatsReceiver)
    assert subject_of(config, "demo", "worker", LOAD_CHANNEL) == "p.load.demo.worker"


async def test_another_transport_is_told(discovery_dir: Path, caplog: pytest.LogCaptureFixture, nats_server: Any) -> None:
    pytest.importorskip("zmq")
    async with AsyncExitStack() as stack:
        for plane in ("zmq", "nats"):
            manager = await stack.enter_async_context(
                dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", event_plane=plane, nats_servers=nats_server.url)
            )
            router = KvRouter(manager, "demo", "worker", KvRouterSettings(replica_sync=True))
            await router.start()
            stack.push_async_callback(router.close)
        await eventually(lambda: "DYN_EVENT_PLANE" in caplog.text)
        assert "over zmq, this one over nats" in caplog.text or "over nats, this one over zmq" in caplog.text


async def test_sync_needs_something_to_travel_over(discovery_dir: Path) -> None:
    async with dynwire.AsyncNetworkManager(event_plane="none") as manager:
        with pytest.raises(ConfigError, match="DYN_EVENT_PLANE is none"):
            KvRouter(manager, "demo", "worker", KvRouterSettings(replica_sync=True))
    async with dynwire.AsyncNetworkManager(event_plane="nats") as manager:
        with pytest.raises(ConfigError, match="--no-kv-events"):
            KvRouter(manager, "demo", "worker", KvRouterSettings(replica_sync=True, use_events=False))


async def test_a_server_that_is_away_fails_nobody(discovery_dir: Path, dynwire_ports: Callable[[], int]) -> None:
    address = f"nats://127.0.0.1:{dynwire_ports()}"
    async with dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", event_plane="nats", nats_servers=address) as manager:
        router = KvRouter(manager, "demo", "worker", KvRouterSettings(replica_sync=True, block_size=4))
        await router.start()
        try:
            assert router.choose([1, 2, 3, 4], [(7, 0)], "a").worker_id == 7
            assert router.replicas is not None
            assert not router.replicas.connected
            await eventually(lambda: router.replicas is not None and router.replicas.dropped)
        finally:
            await router.close()


# Processes ---------------------------------------------------------------------------------------------------------------------


class Process:
    """A router of replica.py."""

    def __init__(self, seed: int, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("replica.py")), str(seed)],
            env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the router ended with {self.process.wait(10)}"
        return json.loads(line)

    def ask(self, line: str) -> Any:
        self.say(line)
        return self.hear()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.mark.hard_timeout(120)
def test_three_processes(transport: dict[str, Any], discovery_dir: Path, dynwire_manager: Any) -> None:
    """Under load from three routers the counters agree within 5 %; one is killed, and its load goes."""
    env = dynwire_manager.environment(**transport) | {"DYN_FILE_KV": str(discovery_dir)}
    processes = [Process(seed, env) for seed in range(3)]
    try:
        for process in processes:
            assert process.hear() == "ready"
        for process in processes:
            assert process.ask("know 2") == 2
        for process in processes:
            process.say("load 3000")
        for process in processes:
            assert process.hear() == "loaded"  # what is left stays booked

        own = [process.ask("own") for process in processes]
        assert all(count > 20 for count in own)
        totals = [process.ask(f"settle {sum(own)}") for process in processes]
        for total in totals:  # requests, prefill tokens, decode blocks; per worker
            assert total.keys() == totals[0].keys()
            for worker, counters in total.items():
                for one, other in zip(counters, totals[0][worker], strict=True):
                    assert abs(one - other) <= 0.05 * max(one, other)

        processes[0].process.kill()
        left = [process.ask(f"settle {own[1] + own[2]}") for process in processes[1:]]
        assert left[0] == left[1]
        assert sum(requests for requests, _, _ in left[0].values()) == own[1] + own[2]
        for process in processes[1:]:
            process.say("end")
            assert process.process.wait(20) == 0
    finally:
        for process in processes:
            process.close()
