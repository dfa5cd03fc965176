from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire import Instance
from dynwire.discovery import open_discovery
from dynwire.types import Handler

from .conftest import Managers
from .faces import PATIENCE_S, Client, Signal, eventually

PATH = "test.worker.life"


async def echo(request: Any) -> Any:
    return request


async def test_instances_are_listed(managers: Managers, plane: str) -> None:
    async with managers() as manager:
        assert await manager.list_instances() == ()
        service = await manager.serve(PATH, echo, metadata={"model": "m"})
        other = await manager.serve("test.worker.other", echo)
        assert await manager.list_instances(PATH) == (service.instance,)
        assert await manager.list_instances(f"dyn://{PATH}") == (service.instance,)
        assert set(i.id for i in await manager.list_instances()) == {service.instance.id, other.instance.id}
        assert (service.instance.path, service.instance.plane) == (PATH, plane)
        assert service.instance.metadata == {"model": "m"}
        assert service.real.ready
        client = await manager.client(PATH)
        assert client.real.instances == (service.instance,)


async def test_an_endpoint_is_served_once(managers: Managers) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        with pytest.raises(dynwire.ConfigError, match="already served"):
            await manager.serve(PATH, echo)
        assert len(await manager.list_instances()) == 1
        with pytest.raises(dynwire.ConfigError):
            await manager.serve("not an endpoint", echo)
        with pytest.raises(dynwire.ConfigError):
            await manager.client(PATH, wait=0, router="nonsense")
        with pytest.raises(dynwire.ConfigError):
            await manager.client(PATH, wait=0, codec="pickle")


async def test_an_endpoint_may_be_served_again_after_draining(managers: Managers) -> None:
    async with managers() as manager:
        for _ in range(2):
            service = await manager.serve(PATH, echo)
            client = await manager.client(PATH)
            assert await client.call(1) == 1
            assert await service.drain(1.0) == 0
            assert not service.real.ready
            assert await service.drain(1.0) == 0
            assert await manager.list_instances() == ()
            await client.close()


async def test_draining_lets_requests_finish(managers: Managers) -> None:
    started, release = Signal(), Signal()

    async def handler(request: Any) -> Any:
        started.set()
        await release.wait()
        return request

    async with managers() as server, managers() as caller:
        service = await server.serve(PATH, handler)
        client = await caller.client(PATH)
        call = asyncio.create_task(client.call(1))
        await started.wait()
        draining = asyncio.create_task(service.drain())
        await eventually(lambda: not service.real.ready)
        await eventually(lambda: client.real.instances == ())
        assert not draining.done()
        release.set()
        assert await draining == 0
        assert await call == 1


async def test_draining_without_grace_kills(managers: Managers) -> None:
    started, ended = Signal(), Signal()

    async def handler(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            started.set()
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    async with managers() as server, managers() as caller:
        service = await server.serve(PATH, handler)
        client = await caller.client(PATH)
        async with client.stream(1) as stream:
            assert await stream.next() == 1
            await started.wait()
            assert await service.drain(0.0) == 1
            with pytest.raises(dynwire.PeerLost) as caught:
                await stream.next()
            assert caught.value.delivered == 1
            assert caught.value.sent == "yes"
        await ended.wait()


@pytest.mark.not_queued("what a worker does not finish goes to another one")
async def test_a_second_drain_forces(managers: Managers) -> None:
    started = Signal()

    async def handler(request: Any) -> None:
        started.set()
        await asyncio.get_running_loop().create_future()

    async with managers() as server, managers() as caller:
        service = await server.serve(PATH, handler)
        client = await caller.client(PATH)
        call = asyncio.create_task(client.call(1))
        await started.wait()
        gentle = asyncio.create_task(service.drain(PATIENCE_S * 10))
        await eventually(lambda: not service.real.ready)
        assert await service.drain(0.0) == 1
        await gentle
        with pytest.raises(dynwire.PeerLost):
            await call


async def _served_by(client: Client, calls: int, **options: Any) -> Counter[Any]:
    return Counter([await client.call(None, **options) for _ in range(calls)])


@pytest.mark.parametrize("router", ["round_robin", "random", "p2c", "least_loaded"])
async def test_routers(managers: Managers, router: str) -> None:
    async with managers() as one, managers() as two, managers() as caller:
        for name, server in (("one", one), ("two", two)):

            async def handler(request: Any, name: str = name) -> str:
                return name

            await server.serve(PATH, handler)
        client = await caller.client(PATH, wait=2, router=router)
        counts = await _served_by(client, 40)
        if router == "round_robin":
            assert counts == {"one": 20, "two": 20}
        else:
            assert counts.total() == 40 and set(counts) <= {"one", "two"}


async def test_direct_calls(managers: Managers) -> None:
    async with managers() as one, managers() as two, managers() as caller:
        services = {}
        for name, server in (("one", one), ("two", two)):

            async def handler(request: Any, name: str = name) -> str:
                return name

            services[name] = await server.serve(PATH, handler)
        client = await caller.client(PATH, wait=2, router="direct")
        for name, service in services.items():
            assert await _served_by(client, 3, instance=service.instance.id) == {name: 3}
            assert await client.items(None, instance=service.instance.id) == [name]
        with pytest.raises(dynwire.ConfigError):
            await client.call(None)
        with pytest.raises(dynwire.NoInstances):
            await client.call(None, instance=1)


async def test_calls_move_to_another_instance(managers: Managers) -> None:
    """What was certainly not sent is tried elsewhere: callers do not see that one of two workers goes."""
    async with managers() as one, managers() as two, managers() as caller:
        await one.serve(PATH, echo)
        await two.serve(PATH, echo)
        client = await caller.client(PATH, wait=2)
        for i in range(4):
            assert await client.call(i) == i
        await two.close()
        for i in range(20):
            assert await client.call(i) == i
            assert await client.items(i) == [i]


async def tokens(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Continues the sequence of its prompt, whoever began it."""
    stop = request["stop_conditions"]["max_tokens"]
    for i in range(stop):
        yield {"token_ids": [request["token_ids"][-1] + 1 + i], "finish_reason": "length" if i == stop - 1 else None}


@pytest.mark.parametrize("limit", [0, 1])
async def test_migration_without_repeat_and_without_hole(managers: Managers, limit: int) -> None:
    stalled = Signal()

    async def breaks(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        count = 0
        async for item in tokens(request):
            if count == 3:
                stalled.set()
                await asyncio.get_running_loop().create_future()
            count += 1
            yield item

    async with managers() as bad, managers() as good, managers() as caller:
        await bad.serve(PATH, breaks)
        client = await caller.client(PATH, migration_limit=limit)
        request = {"token_ids": [1, 2, 3], "stop_conditions": {"max_tokens": 10}}
        async with client.stream(request) as stream:
            received = [await stream.next() for _ in range(3)]
            await good.serve(PATH, tokens)
            await client.wait_for_instances(2)
            await stalled.wait()
            await bad.close()
            if limit == 0:
                with pytest.raises(dynwire.PeerLost) as caught:
                    await stream.next()
                assert caught.value.delivered == 3
                return
            received += [item async for item in stream]
        assert [item["token_ids"] for item in received] == [[i] for i in range(4, 14)]
        assert received[-1]["finish_reason"] == "length"


async def test_migration_with_a_rule_of_ones_own(managers: Managers) -> None:
    stalled = Signal()

    async def breaks(request: int) -> AsyncIterator[int]:
        yield request
        stalled.set()
        await asyncio.get_running_loop().create_future()

    async def count(request: int) -> AsyncIterator[int]:
        for i in range(request, 5):
            yield i

    async with managers() as bad, managers() as good, managers() as caller:
        await bad.serve(PATH, breaks)
        client = await caller.client(PATH, migration_limit=2, resume=lambda payload, delivered: payload + len(delivered))
        async with client.stream(0) as stream:
            assert await stream.next() == 0
            await good.serve(PATH, count)
            await client.wait_for_instances(2)
            await stalled.wait()
            await bad.close()
            assert [item async for item in stream] == [1, 2, 3, 4]


async def test_the_plane_is_named_when_it_is_another_one(managers: Managers, plane: str, discovery_dir: Path) -> None:
    theirs = "http" if plane == "nats" else "nats"
    other = Instance(7, "test", "worker", "elsewhere", theirs, "nowhere:1")
    discovery = open_discovery("file", file_dir=str(discovery_dir), ttl=10.0)
    await discovery.register(other)
    async with managers() as manager:
        client = await manager.client(other.path, wait=0)
        for attempt in (client.call(1), client.items(1), client.wait_for_instances(1, timeout=0.0)):
            with pytest.raises(dynwire.PlaneMismatch, match="DYN_REQUEST_PLANE") as caught:
                await attempt
            assert (caught.value.ours, caught.value.theirs) == (plane, theirs)
    await discovery.close()


async def test_closing_twice_and_using_what_is_closed(managers: Managers) -> None:
    async with managers() as manager:
        service = await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        await client.close()
        await client.close()
        with pytest.raises(dynwire.ManagerClosed):
            await client.call(1)
        await service.close()
        await service.close()
        await manager.close()
        await manager.close()
        await service.close()
        with pytest.raises(dynwire.ManagerClosed):
            await manager.serve(PATH, echo)
        with pytest.raises(dynwire.ManagerClosed):
            await manager.list_instances()


async def test_closing_ends_waiting_for_instances(managers: Managers) -> None:
    async with managers() as manager:
        client = await manager.client(PATH, wait=0)
        waiting = asyncio.create_task(client.wait_for_instances(1, timeout=None))
        route = client.real._home
        await eventually(lambda: route._listeners)
        await manager.close()
        with pytest.raises(dynwire.ManagerClosed):
            await waiting


@pytest.mark.faces("async")
async def test_several_loops_and_threads_on_one_manager(managers: Managers, loop_factory: Any) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = await manager.client(PATH)
        replies: list[list[int]] = []
        errors: list[BaseException] = []

        async def use() -> None:
            await client.wait_for_instances(1, timeout=PATIENCE_S)
            got = await asyncio.gather(*(client.call(i) for i in range(50)))
            got += await client.items(5)
            replies.append(got)

        def in_thread() -> None:
            try:
                with asyncio.Runner(loop_factory=loop_factory) as runner:
                    runner.run(use())
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=in_thread) for _ in range(4)]
        for thread in threads:
            thread.start()
        await use()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert not errors
        assert replies == [[*range(50), 5]] * 5


@pytest.mark.faces("async")
async def test_serving_on_several_loops(managers: Managers, loop_factory: Any) -> None:
    ready, finish = Signal(), Signal()

    async with managers() as manager:

        async def elsewhere() -> None:
            service = await manager.serve("test.worker.elsewhere", echo)
            ready.set()
            await finish.wait()
            await service.close()

        def in_thread() -> None:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                runner.run(elsewhere())

        thread = threading.Thread(target=in_thread)
        thread.start()
        await ready.wait()
        await manager.serve(PATH, echo)
        one, two = await manager.client(PATH), await manager.client("test.worker.elsewhere")
        assert await one.call(1) == 1
        assert await two.call(2) == 2
        finish.set()
        await asyncio.to_thread(thread.join)
        assert await one.call(1) == 1


@pytest.mark.faces("blocking")
async def test_many_threads_on_one_manager(managers: Managers) -> None:
    def count(request: int) -> Iterator[int]:
        yield from range(request)

    async with managers() as manager:
        await manager.serve(PATH, echo)
        await manager.serve("test.worker.count", count)
        client, streams = (await manager.client(PATH)).real, (await manager.client("test.worker.count")).real
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(20):
                    assert client.call([number, i], timeout=PATIENCE_S) == [number, i]
                    with streams.stream(i, timeout=PATIENCE_S) as stream:
                        assert list(stream) == list(range(i))
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert not errors


@pytest.mark.faces("blocking")
async def test_blocking_calls_in_an_event_loop_are_refused(managers: Managers) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        client = (await manager.client(PATH)).real
        for use in (lambda: client.call(1), lambda: next(iter(client.stream(1))), manager.real.list_instances):
            with pytest.raises(RuntimeError, match="AsyncNetworkManager"):
                use()


@pytest.mark.faces("blocking")
async def test_a_plain_handler_may_call_blocking(managers: Managers) -> None:
    async with managers() as manager:
        await manager.serve(PATH, echo)
        inner = (await manager.client(PATH)).real

        def outer(request: Any) -> Any:
            return inner.call(request, timeout=PATIENCE_S)

        await manager.serve("test.worker.outer", outer)
        client = await manager.client("test.worker.outer")
        assert await client.call({"a": 1}) == {"a": 1}


async def test_the_planes_own_server_and_client(managers: Managers) -> None:
    """Below endpoints and discovery: `manager.server()` and `manager.create_client()`."""
    async with managers() as manager:
        real: Any = manager.real
        handler = Handler(echo, streaming=False, takes_context=False)
        if isinstance(real, dynwire.AsyncNetworkManager):
            server = real.server()
            assert server is real.server()
            await server.start()
            server.add_endpoint(PATH, handler)
            client = real.create_client()
            assert client is not real.create_client()
            channel: Any = client.channel(Instance(1, "test", "worker", "life", server.plane, server.address))
            await channel.connect()
            assert channel.ready
            assert await channel.call({"a": 1}, 5.0) == {"a": 1}
            assert channel.in_flight == 0
        else:
            server = await asyncio.to_thread(real.server)
            assert server is await asyncio.to_thread(real.server)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.add_endpoint, PATH, handler)
            client = real.create_client()
            instance = Instance(1, "test", "worker", "life", server.plane, server.address)
            channel = await asyncio.to_thread(client.channel, instance)
            assert await asyncio.to_thread(channel.call, {"a": 1}, 5.0) == {"a": 1}
            assert channel.in_flight == 0
        assert server.in_flight() == 0
        if isinstance(real, dynwire.AsyncNetworkManager):
            ours, theirs = client.stats(), server.stats()
        else:
            ours, theirs = await asyncio.to_thread(client.stats), await asyncio.to_thread(server.stats)
        if server.plane == "nats":
            assert ours["up"] and ours["streams"] == ours["waiting"] == ours["granted"] == 0 and theirs[0]["up"]
        elif server.plane != "memory":  # which counts nothing
            (connections,) = ours.values()
            assert [side["streams"] for side in connections] == [0] and len(theirs) == 1
        other = Instance(1, "a", "b", "c", "http" if server.plane == "nats" else "nats", "x")
        with pytest.raises(dynwire.PlaneMismatch):
            if isinstance(real, dynwire.AsyncNetworkManager):
                client.channel(other)
            else:
                await asyncio.to_thread(client.channel, other)
