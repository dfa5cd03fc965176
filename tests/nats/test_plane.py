"""The nats plane on a real NATS server: what other planes do not have. What they share is in tests/plane."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire import Instance
from dynwire._natsproto import CallbackSink
from dynwire.config import NatsConfig
from dynwire.nats import NatsConnection
from dynwire.nats.server import NatsServer, find_binary

from .kept import WAIT_S, connected, eventually

pytest.importorskip("nats")

PATH = "demo.worker.generate"


@pytest.fixture(autouse=True)
def needs_the_program() -> None:
    try:
        find_binary()
    except dynwire.ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shared() -> Iterator[NatsServer]:
    """For tests that do not harm it."""
    with NatsServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """For tests that do."""
    with NatsServer() as one:
        yield one


@asynccontextmanager
async def manager(server: NatsServer, directory: Path, **settings: Any) -> AsyncIterator[dynwire.AsyncNetworkManager]:
    # nothing here may take the way through discovery that its neighbour has left
    async with dynwire.AsyncNetworkManager(
        **{"request_plane": "nats", "nats_servers": server.url, "discovery_file_dir": str(directory), **settings}
    ) as one:
        yield one


async def served(one: dynwire.AsyncNetworkManager, handler: Any, path: str = PATH, **options: Any) -> dynwire.AsyncClient:
    """A client of what ``one`` itself serves."""
    await one.endpoint(path).serve(handler, **options)
    client = await one.endpoint(path).client()
    await client.wait_for_instances(1, timeout=WAIT_S)
    return client


async def echo(request: Any) -> Any:
    return request


async def count(request: Any) -> AsyncIterator[int]:
    for i in range(int(request)):
        yield i


async def hang(request: Any) -> AsyncIterator[int]:
    yield 0
    await asyncio.get_running_loop().create_future()


WORKER = """
import asyncio, sys
import dynwire

async def hang(request):
    yield 0
    await asyncio.get_running_loop().create_future()

async def silent(request):
    await asyncio.get_running_loop().create_future()

async def main(url, directory, work):
    async with dynwire.AsyncNetworkManager(request_plane="nats", nats_servers=url, discovery_file_dir=directory) as manager:
        if work == "serve":
            await manager.endpoint("demo.worker.generate").serve(hang)
            await manager.endpoint("demo.worker.silent").serve(silent)
            print("ready", flush=True)
            await asyncio.get_running_loop().create_future()
        client = await manager.endpoint("demo.worker.generate").client()
        await client.wait_for_instances(1, timeout=20)
        async with client.stream(1) as stream:
            print(await anext(stream), flush=True)
            await asyncio.get_running_loop().create_future()

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def process(server: NatsServer, directory: Path, work: str) -> AsyncIterator[subprocess.Popen[str]]:
    """A worker, or a caller with a stream in flight; returns when it has come so far."""
    arguments = [sys.executable, "-c", WORKER, server.url, str(directory), work]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as one:  # noqa: ASYNC220  # forks in a moment
        try:
            assert one.stdout is not None
            assert await asyncio.to_thread(one.stdout.readline) in ("ready\n", "0\n")
            yield one
        finally:
            one.kill()


# Tools that know nothing of dynwire -------------------------------------------------------------------------------------------


async def test_any_nats_client_may_ask(shared: NatsServer, discovery_dir: Path) -> None:
    async with manager(shared, discovery_dir) as one:
        await served(one, echo)
        connection = await NatsConnection.acquire(NatsConfig(servers=(shared.url,)))
        reply = await connection.client.request(f"dynwire.q.{PATH}", b"hello", timeout=WAIT_S)
        assert reply.data == b"hello"
        headers = {"Content-Type": "application/json"}
        reply = await connection.client.request(f"dynwire.q.{PATH}", b'{"a": [1]}', timeout=WAIT_S, headers=headers)
        assert reply.data == b'{"a":[1]}'
        await connection.release()


async def test_any_nats_client_gets_a_stream(shared: NatsServer, discovery_dir: Path) -> None:
    async with manager(shared, discovery_dir) as one:
        await served(one, count, codec="json")
        connection = await NatsConnection.acquire(NatsConfig(servers=(shared.url,)))
        inbox = connection.client.new_inbox()
        subscription = await connection.client.subscribe(inbox)
        await connection.client.publish(f"dynwire.q.{PATH}", b"3", reply=inbox)
        messages = [await subscription.next_msg(timeout=WAIT_S) for _ in range(4)]
        assert [message.data for message in messages] == [b"0", b"1", b"2", b""]
        assert messages[-1].headers is not None and messages[-1].headers["D"] == "e 3"
        await subscription.unsubscribe()
        await connection.release()


async def test_any_nats_client_sees_errors(shared: NatsServer, discovery_dir: Path) -> None:
    async def fails(request: Any) -> None:
        raise ValueError("no such thing")

    async with manager(shared, discovery_dir) as one:
        await served(one, fails)
        connection = await NatsConnection.acquire(NatsConfig(servers=(shared.url,)))
        reply = await connection.client.request(f"dynwire.q.{PATH}", b"hello", timeout=WAIT_S)
        assert reply.headers is not None
        assert reply.headers["Nats-Service-Error"] == "remote_error: no such thing"
        await connection.release()


async def test_a_stream_for_a_client_that_has_gone_ends(shared: NatsServer, discovery_dir: Path) -> None:
    ended = asyncio.Event()

    async def forever(request: Any) -> AsyncIterator[int]:
        try:
            for i in range(1 << 60):
                yield i
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with manager(shared, discovery_dir) as one:
        await served(one, forever)
        connection = await NatsConnection.acquire(NatsConfig(servers=(shared.url,)))
        inbox = connection.client.new_inbox()
        subscription = await connection.client.subscribe(inbox)
        await connection.client.publish(f"dynwire.q.{PATH}", b"", reply=inbox)
        await subscription.next_msg(timeout=WAIT_S)
        await subscription.unsubscribe()
        async with asyncio.timeout(WAIT_S):
            await ended.wait()
        await connection.release()


async def test_the_queue_group_shares_requests(shared: NatsServer, discovery_dir: Path) -> None:
    """And a worker that leaves takes none any more: every request is answered."""
    names: list[bytes] = []

    def handler(name: bytes) -> Any:
        async def handle(request: Any) -> bytes:
            return name

        return handle

    async with manager(shared, discovery_dir) as one, manager(shared, discovery_dir) as two:
        await served(one, handler(b"one"))
        service = await two.endpoint(PATH).serve(handler(b"two"))
        connection = await NatsConnection.acquire(NatsConfig(servers=(shared.url,)))

        async def ask() -> None:
            reply = await connection.client.request(f"dynwire.q.{PATH}", b"", timeout=WAIT_S)
            names.append(reply.data)

        async with asyncio.timeout(WAIT_S):
            while set(names) != {b"one", b"two"}:
                await ask()
        draining = asyncio.create_task(service.drain(WAIT_S))
        while not draining.done():
            await ask()
        names.clear()
        for _ in range(20):
            await ask()
        assert set(names) == {b"one"}
        await connection.release()


# Workers and callers that die -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "call"])
async def test_a_worker_that_is_killed(shared: NatsServer, discovery_dir: Path, kind: str) -> None:
    async with process(shared, discovery_dir, "serve") as worker, manager(shared, discovery_dir) as one:
        client = await one.endpoint(PATH if kind == "stream" else "demo.worker.silent").client()
        await client.wait_for_instances(1, timeout=WAIT_S)
        if kind == "stream":
            async with client.stream(1, timeout=WAIT_S) as stream:
                assert await anext(stream) == 0
                worker.kill()
                with pytest.raises(dynwire.PeerLost) as caught:
                    await anext(stream)
            assert (caught.value.delivered, caught.value.sent) == (1, "yes")
        else:
            call = asyncio.create_task(client.call(1, timeout=WAIT_S))
            channel: Any = client._home.table.entries[0].channel
            await eventually(lambda: channel.in_flight == 1)
            worker.kill()
            with pytest.raises(dynwire.PeerLost) as caught:
                await call
        # and the next one is told at once that nobody is there
        with pytest.raises((dynwire.ConnectError, dynwire.NoInstances)) as refused:
            await client.call(1, timeout=WAIT_S)
        assert refused.value.sent == "no"


async def test_a_caller_that_is_killed(shared: NatsServer, discovery_dir: Path) -> None:
    ended = asyncio.Event()

    async def watched(request: Any) -> AsyncIterator[int]:
        try:
            async for item in hang(request):
                yield item
        finally:
            ended.set()

    async with manager(shared, discovery_dir, nats_probe_interval=0.05) as one:
        await served(one, watched)
        async with process(shared, discovery_dir, "call") as caller:
            caller.kill()
            async with asyncio.timeout(WAIT_S):
                await ended.wait()


async def test_workers_that_close_one_after_the_other(shared: NatsServer, discovery_dir: Path) -> None:
    """Callers see nothing of it, although requests are on their way all the time."""
    calls = 0
    failures: list[BaseException] = []
    async with manager(shared, discovery_dir) as caller:
        managers = [manager(shared, discovery_dir) for _ in range(4)]
        workers = [await one.__aenter__() for one in managers]
        for worker in workers:
            await worker.endpoint(PATH).serve(echo)
        client = await caller.endpoint(PATH).client()
        await client.wait_for_instances(4, timeout=WAIT_S)
        going_on = True

        async def call_on() -> None:
            nonlocal calls
            while going_on:
                try:
                    assert await client.call(calls, timeout=WAIT_S) is not None
                except dynwire.DynwireError as error:
                    failures.append(error)
                calls += 1

        callers = [asyncio.create_task(call_on()) for _ in range(16)]
        for one in managers[1:]:
            target = calls + 50

            def reached(target: int = target) -> bool:
                return calls > target

            await eventually(reached)
            await one.__aexit__(None, None, None)
        going_on = False
        await asyncio.gather(*callers)
        await managers[0].__aexit__(None, None, None)
    assert failures == [] and calls > 150


# The NATS server --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["fast", "plain"])
async def test_streams_outlive_a_restart_of_the_server(server: NatsServer, discovery_dir: Path, port: str) -> None:
    """Whoever was waiting goes on: nothing is lost, because nothing was under way."""
    go_on = asyncio.Event()

    async def two_parts(request: Any) -> AsyncIterator[int]:
        yield 0
        await go_on.wait()
        for i in range(1, 100):
            yield i

    async with manager(server, discovery_dir, nats_port=port) as one:
        client = await served(one, two_parts)
        async with client.stream(1, timeout=WAIT_S) as stream:
            assert await anext(stream) == 0
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            go_on.set()
            assert [item async for item in stream] == list(range(1, 100))
        async with client.stream(1, timeout=WAIT_S) as stream:
            assert [item async for item in stream] == list(range(100))


async def test_no_item_is_lost_or_repeated_when_the_server_is_killed(server: NatsServer, discovery_dir: Path) -> None:
    """In the middle of a flood: each stream is complete, or ends with a typed error behind what came in order."""
    async with manager(server, discovery_dir) as one:
        client = await served(one, count)
        begun = asyncio.Event()
        outcomes: list[str] = []

        async def read() -> None:
            expected = 0
            try:
                async for item in client.stream(200_000, timeout=WAIT_S * 2):
                    assert item == expected
                    expected += 1
                    if expected == 1000:
                        begun.set()
                assert expected == 200_000
                outcomes.append("complete")
            except dynwire.PeerLost as error:
                assert error.delivered == expected
                outcomes.append("lost")

        readers = [asyncio.create_task(read()) for _ in range(8)]
        async with asyncio.timeout(WAIT_S):
            await begun.wait()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await asyncio.gather(*readers)
        assert len(outcomes) == 8
        assert [item async for item in client.stream(10, timeout=WAIT_S)] == list(range(10))


async def test_requests_wait_for_the_server(server: NatsServer, discovery_dir: Path) -> None:
    async with manager(server, discovery_dir, tcp_channel_buffer=8) as one:
        client = await served(one, echo)
        assert await client.call(0, timeout=WAIT_S) == 0
        plane: Any = client._home.table.entries[0].channel.client
        await asyncio.to_thread(server.kill)
        await eventually(lambda: not plane.link.stats()["up"])
        waiting = [asyncio.create_task(client.call(i, timeout=WAIT_S)) for i in range(8)]
        await eventually(lambda: plane._waiting == 8)
        with pytest.raises(dynwire.Overloaded, match="wait for the connection to NATS"):
            await client.call(9, timeout=WAIT_S)
        with pytest.raises(dynwire.DynwireError) as caught:
            async with asyncio.timeout(WAIT_S):
                await client.call(9, timeout=0.05)
        assert caught.value.sent == "no"
        await asyncio.to_thread(server.start)
        assert await asyncio.gather(*waiting) == list(range(8))


async def test_a_reply_above_the_callers_limit(server: NatsServer, discovery_dir: Path) -> None:
    """Only the caller knows its limit; that the handler has run is certain."""

    async def grow(request: Any) -> bytes:
        return bytes(20_000)

    async with manager(server, discovery_dir) as one, manager(server, discovery_dir, tcp_max_message_size=10_000) as small:
        await served(one, grow)
        client = await small.endpoint(PATH).client()
        await client.wait_for_instances(1, timeout=WAIT_S)
        with pytest.raises(dynwire.MessageTooLarge) as caught:
            await client.call(b"", timeout=WAIT_S)
        assert (caught.value.size, caught.value.limit, caught.value.sent) == (20_000, 10_000, "yes")


async def test_a_worker_that_answers_nobody(server: NatsServer, discovery_dir: Path) -> None:
    """It is there, and silent: those who want to connect to it end in time, and leave nothing behind."""
    silent = Instance(1, "demo", "worker", "generate", "nats", "nats:dynwire.i.silent")
    asked = asyncio.Event()
    async with manager(server, discovery_dir) as one, connected(server.url, ping_interval=2.9) as connection:
        subscription = await connection.subscribe(
            "dynwire.i.silent._",
            CallbackSink(lambda *message: asked.set(), lambda begin: None, lambda *state: None, lambda: None),
        )
        client: Any = one.create_client()
        channel = client.channel(silent)
        for _ in range(3):
            asked.clear()
            with pytest.raises(dynwire.ConnectError, match="DYNWIRE_NATS_CONNECT_TIMEOUT"):
                await channel.connect(0.05)
            await asked.wait()
        peer = client._peers[silent.address]
        assert [waiter for waiter in peer.waiters if not waiter.done()] == []
        asked.clear()
        connecting = asyncio.create_task(channel.connect(WAIT_S))
        await asked.wait()
        await client.close()
        with pytest.raises(dynwire.ManagerClosed):
            await connecting
        subscription.unsubscribe()


async def test_a_frozen_server(server: NatsServer, discovery_dir: Path) -> None:
    async with manager(server, discovery_dir) as one:
        client = await served(one, echo)
        assert await client.call(0, timeout=WAIT_S) == 0
        server.pause()
        with pytest.raises(dynwire.DeadlineExceeded):
            await client.call(1, timeout=0.2)
        patient = asyncio.create_task(client.call(2, timeout=WAIT_S))
        await asyncio.sleep(0)
        server.resume()
        assert await patient == 2


async def test_no_server_at_start(server: NatsServer, discovery_dir: Path) -> None:
    server.kill()
    async with manager(server, discovery_dir, nats_connect_timeout=0.2) as one:
        with pytest.raises(dynwire.ConnectError, match="NATS_SERVER"):
            await one.endpoint(PATH).serve(echo)
        client: Any = one.create_client()
        channel = client.channel(Instance(1, "demo", "worker", "generate", "nats", "nats:dynwire.i.0"))
        with pytest.raises(dynwire.ConnectError, match="NATS_SERVER"):
            await channel.connect()
        server.start()
        client = await served(one, echo)
        assert await client.call(1, timeout=WAIT_S) == 1


async def test_the_payload_limit_is_the_servers(shared: NatsServer, discovery_dir: Path) -> None:
    async def grow(request: Any) -> bytes:
        return bytes(int(request))

    async with manager(shared, discovery_dir) as one:
        client = await served(one, grow)
        with pytest.raises(dynwire.MessageTooLarge, match=r"max_payload of the NATS server.*tcp plane") as caught:
            await client.call(bytes(2 << 20), timeout=WAIT_S)
        assert caught.value.sent == "no" and caught.value.size == 2 << 20 and caught.value.limit < 1 << 20
        with pytest.raises(dynwire.MessageTooLarge, match=r"max_payload of the NATS server.*tcp plane") as caught:
            await client.call(2 << 20, timeout=WAIT_S)
        assert caught.value.sent == "yes"
        assert len(await client.call(caught.value.limit, timeout=WAIT_S)) == caught.value.limit


async def test_what_a_user_may_not_do(discovery_dir: Path) -> None:
    """A caller who may not publish to workers is told so, and not after a timeout."""
    rules = """
    authorization { users: [
      {user: worker, password: w}
      {user: caller, password: c, permissions: {publish: ["elsewhere.>", "dynwire.i.*._"], subscribe: "_INBOX.>"}}
    ]}
    """
    with NatsServer(config=rules) as server:
        worker = manager(server, discovery_dir, nats_username="worker", nats_password="w")
        caller = manager(server, discovery_dir, nats_username="caller", nats_password="c")
        async with worker as one, caller as other:
            await served(one, echo)
            client = await other.endpoint(PATH).client()
            await client.wait_for_instances(1, timeout=WAIT_S)
            with pytest.raises(dynwire.PermissionDenied, match=r"does not allow this user to publish") as caught:
                await client.call(1, timeout=WAIT_S)
            assert caught.value.sent == "no"


async def test_the_token(shared: NatsServer, discovery_dir: Path) -> None:
    async with manager(shared, discovery_dir, token="secret") as one, manager(shared, discovery_dir, token="wrong") as other:
        client = await served(one, echo)
        assert await client.call(1, timeout=WAIT_S) == 1
        assert await client.call(1, timeout=WAIT_S, headers={"a": "b"}) == 1
        stranger = await other.endpoint(PATH).client()
        await stranger.wait_for_instances(1, timeout=WAIT_S)
        with pytest.raises(dynwire.Unauthenticated, match="DYNWIRE_TOKEN"):
            await stranger.call(1, timeout=WAIT_S)


async def test_two_deployments_on_one_server(shared: NatsServer, discovery_dir: Path) -> None:
    async with manager(shared, discovery_dir, nats_prefix="blue.x") as one:
        client = await served(one, echo)
        assert await client.call(1, timeout=WAIT_S) == 1
        assert client.instances[0].address.startswith("nats:blue.x.i.")


async def test_many_streams_at_once(shared: NatsServer, discovery_dir: Path) -> None:
    """More than the budget is for: they wait for each other, and the NATS server throws nobody out."""

    async def large(request: Any) -> AsyncIterator[bytes]:
        for _ in range(8):
            yield bytes(30_000)

    async with manager(shared, discovery_dir, nats_credit_budget=1 << 20, tcp_channel_buffer=1000) as one:
        client = await served(one, large)

        async def read() -> int:
            return sum([len(item) async for item in client.stream(1, timeout=WAIT_S * 2)])

        assert await asyncio.gather(*(read() for _ in range(300))) == [240_000] * 300
        link: Any = client._home.table.entries[0].channel.client.link
        assert link.stats()["granted"] == 0 and link.stats()["gaps"] == 0
