"""The router service: which worker, bookings, and requests through it; with workers in this process, and as people run it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.errors import ConfigError, RemoteError
from dynwire.kv_router.router import KvRouterSettings
from dynwire.router import service as module
from dynwire.router.service import BestWorkerRequest, BookingRequest, RouterService
from dynwire.types import EndpointId

from ..frontend.stack import Deployment, until
from ..kv.test_routing import BLOCK_SIZE, PATH, Setup, prompt
from ..plane.faces import eventually


@pytest.fixture
def setups(discovery_dir: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def make(workers: int, event_plane: str = "zmq", **options: Any) -> AsyncIterator[tuple[Setup, RouterService]]:
        async with AsyncExitStack() as stack:
            setup = Setup(stack, event_plane)
            await setup.start(workers)
            manager = await setup.manager()
            settings = KvRouterSettings(block_size=BLOCK_SIZE, seed=1)
            router = RouterService(manager, EndpointId.parse(PATH), settings, **options)
            await router.start()
            stack.push_async_callback(router.close)
            await router.client.wait_for_instances(workers, 10)
            indexer = router.client.kv.indexer
            if indexer is not None:
                await eventually(lambda: len(indexer.workers) == workers and not indexer.follower.behind)
            yield setup, router

    return make


async def test_which_worker(setups: Callable[..., Any]) -> None:
    rng = random.Random(1)
    async with setups(3) as (setup, router):
        caller = await (await setup.manager()).endpoint("demo.worker-router.best_worker").client()
        tokens = prompt(rng)
        async with router.client.stream({"token_ids": tokens}, timeout=20) as stream:
            assert len([item async for item in stream]) == 2
        home = setup.of(tokens)
        await eventually(lambda: router.client.kv.tree.entries == 10)
        found = await caller.call({"token_ids": [*tokens, 1, 2]}, timeout=20)
        assert found["worker_id"] == home.id
        assert found["instance"] == f"{home.id:016x}"
        assert (found["overlap_blocks"], found["prompt_blocks"], found["prefill_tokens"]) == (10, 10, 2)
        assert found["block_size"] == BLOCK_SIZE
        assert len(found["candidates"]) == 3
        assert found["cost"] == min(each["cost"] for each in found["candidates"])
        assert "booked" not in found
        assert router.client.kv.load.requests == 0  # nothing was booked
        elsewhere = await caller.call({"token_ids": tokens, "exclude": [home.id]}, timeout=20)
        assert elsewhere["worker_id"] != home.id
        other = await caller.call({"token_ids": tokens, "lora": "adapter"}, timeout=20)
        assert other["overlap_blocks"] == 0


async def test_bookings(setups: Callable[..., Any]) -> None:
    async with setups(2, "none") as (setup, router):
        manager = await setup.manager()
        ask, first, free = [
            await manager.endpoint(f"demo.worker-router.{name}").client() for name in ("best_worker", "first_token", "free")
        ]
        found = await ask.call({"token_ids": list(range(9)), "request_id": "a"}, timeout=20)
        assert found["booked"]
        assert found["free_instance"] == router.services["free"].instance.id
        worker = (found["worker_id"], found["dp_rank"])
        assert router.client.kv.load.totals() == {worker: (1, 9, 3)}
        second = await ask.call({"token_ids": list(range(100, 109)), "request_id": "b"}, timeout=20)
        assert second["worker_id"] != found["worker_id"]  # the first one is busy
        told = {"instance": found["first_token_instance"], "timeout": 20}
        assert await first.call({"request_id": "a", "cached_tokens": 0}, **told) == {"known": True}
        assert router.client.kv.load.totals()[worker] == (1, 0, 3)
        assert router.client.kv.stats.reported == 1
        assert await free.call({"request_id": "a"}, timeout=20) == {"known": True}
        assert await free.call({"request_id": "a"}, timeout=20) == {"known": False}
        assert await first.call({"request_id": "a"}, timeout=20) == {"known": False}
        assert router.client.kv.load.requests == 1
        # the same name again replaces its booking
        await ask.call({"token_ids": [1, 2], "request_id": "b"}, timeout=20)
        assert router.client.kv.load.requests == 1


async def test_what_is_never_freed_expires(setups: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    async with setups(1, "none", booking_ttl=0.2) as (_, router):
        await router.best_worker(BestWorkerRequest([1, 2], "a"))
        await router.best_worker(BestWorkerRequest([1, 2], "b"))
        await router.free(BookingRequest("b"))
        assert router.client.kv.load.requests == 1
        await eventually(lambda: router.client.kv.load.requests == 0)
        assert "1 booked requests were not freed within 0.2 s" in caplog.text


async def test_bookings_are_bounded(setups: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BOOKINGS", 2)
    async with setups(1, "none") as (_, router):
        for name in ("a", "b", "a"):
            await router.best_worker(BestWorkerRequest([1, 2], name))
        with pytest.raises(dynwire.Overloaded, match="2 requests are booked"):
            await router.best_worker(BestWorkerRequest([1, 2], "c"))


async def test_requests_go_through(setups: Callable[..., Any]) -> None:
    rng = random.Random(2)
    async with setups(2) as (setup, router):
        client = await (await setup.manager()).endpoint("demo.worker-router.generate").client()
        tokens = prompt(rng)
        for turn in range(3):
            async with client.stream({"token_ids": tokens}, timeout=20) as stream:
                items = [item async for item in stream]
            assert items[0]["cached_tokens"] == (40 if turn else 0)
            assert items[1]["finish_reason"] == "stop"
            await eventually(lambda: router.client.kv.tree.entries == 10)
        assert router.client.kv.stats.agreed == 3
        # who leaves early is not paid for any longer
        for worker in setup.workers:
            worker.gate.clear()
        stream = client.stream({"token_ids": tokens}, timeout=20)
        await stream.__aenter__()
        await eventually(lambda: router.client.kv.load.requests == 1)
        stream.close()
        await eventually(lambda: router.client.kv.load.requests == 0)
        state = await (await setup.manager()).endpoint("demo.worker-router.state").client()
        seen = await state.call(None, timeout=20)
        assert {worker["instance"] for worker in seen["workers"]} == {f"{worker.id:016x}" for worker in setup.workers}
        assert sum(worker["cached_blocks"] for worker in seen["workers"]) == 10
        assert (seen["metrics"]["exact_predictions"], seen["block_size"]) == (3, BLOCK_SIZE)


async def test_nobody_is_there(setups: Callable[..., Any]) -> None:
    async with setups(0, "none") as (setup, _):
        client = await (await setup.manager()).endpoint("demo.worker-router.best_worker").client()
        with pytest.raises(RemoteError, match=r"no instance of demo\.worker\.generate can take a request: 0 known") as caught:
            await client.call({"token_ids": [1]}, timeout=20)
        assert caught.value.type_name == "NoInstances"


async def test_names(discovery_dir: Path) -> None:
    async with dynwire.AsyncNetworkManager(event_plane="none") as manager:
        assert RouterService(manager, EndpointId.parse("a.b.c")).component == "b-router"
        with pytest.raises(ConfigError, match="the workers themselves"):
            RouterService(manager, EndpointId.parse("a.b.c"), component="b")
        with pytest.raises(ConfigError, match="is not an endpoint"):
            RouterService(manager, EndpointId.parse(f"a.{'b' * 60}.c"))


# As people run it --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    pytest.importorskip("tokenizers")
    made = Deployment(tmp_path / "deployment", "http")
    yield made
    made.close()


def curl(address: str, endpoint: str, body: object, *more: str) -> Any:
    url = f"{address}/{endpoint.replace('.', '/')}"
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", url, "-d", json.dumps(body), *more], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[0] if len(lines) == 1 else lines


def dynwire_command(deployment: Deployment, *arguments: str, **env: str) -> str:
    command = [sys.executable, "-m", "dynwire", *arguments]
    done = subprocess.run(command, env={**deployment.env, **env}, capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.hard_timeout(120)
@pytest.mark.parametrize("events", [["--no-kv-events"], []])
def test_the_process_and_curl(deployment: Deployment, events: list[str]) -> None:
    plane = "none" if events else "zmq"
    if not events:
        pytest.importorskip("zmq")
    for _ in range(2):
        worker = deployment.start(
            "-m", "dynwire.mocker", "--endpoint", "demo.engine.generate", "--block-size", "8", "--speedup-ratio", "100",
            DYN_EVENT_PLANE=plane,
        )  # fmt: skip
        worker.line("serving")
    router = deployment.start("-m", "dynwire.router", "--endpoint", "demo.engine.generate", *events, DYN_EVENT_PLANE=plane)
    line = router.line("routing demo.engine.generate as demo.engine-router on http at ")
    address = line.split(" at ")[1].split()[0]
    until(lambda: len(curl(address, "demo.engine-router.state", {})["workers"]) == 2)

    tokens = [5, 6, 7, 8] * 16
    request = {"model": "tiny", "token_ids": tokens, "stop_conditions": {"max_tokens": 4, "ignore_eos": True}}
    items = curl(address, "demo.engine-router.generate", request)
    assert sum(len(item["token_ids"]) for item in items) == 4
    assert items[-1]["finish_reason"] == "length"
    until(lambda: curl(address, "demo.engine-router.best_worker", {"token_ids": tokens})["overlap_blocks"] == 8)
    found = curl(address, "demo.engine-router.best_worker", {"token_ids": tokens, "request_id": "one"})
    assert (found["block_size"], found["booked"]) == (8, True)
    assert curl(address, "demo.engine-router.first_token", {"request_id": "one"}) == {"known": True}
    assert curl(address, "demo.engine-router.free", {"request_id": "one"}) == {"known": True}
    assert curl(address, "demo.engine-router.free", {"request_id": "one"}) == {"known": False}
    again = curl(address, "demo.engine-router.generate", request)
    assert again[0]["cached_tokens"] >= 56

    listed = dynwire_command(deployment, "ls", "demo.engine-router")
    assert sorted(text.split()[0] for text in listed.splitlines()[1:]) == [
        f"demo.engine-router.{name}" for name in ("best_worker", "first_token", "free", "generate", "state")
    ]
    report = dynwire_command(deployment, "doctor", "--json", DYN_EVENT_PLANE="nats")
    findings = {finding["check"]: finding for finding in json.loads(report)["findings"]}
    assert findings["routing"]["text"].endswith("router services: demo.engine-router")
    if events:
        assert "event plane" not in findings  # nobody publishes anything
    else:
        assert findings["routing"]["text"].startswith("2 workers publish KV events; ")
        assert findings["event plane"]["status"] == "warn"
        assert "over zmq, DYN_EVENT_PLANE is nats here" in findings["event plane"]["text"]
    assert router.stop(signal.SIGINT) == 0
    assert router.errors.read_text().startswith("draining")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--endpoint", "nonsense"], "'nonsense' is not an endpoint"),
        (["--endpoint", "a.b.c", "--block-size", "0"], "DYN_KV_CACHE_BLOCK_SIZE"),
        (["--endpoint", "a.b.c", "--component", "b"], "the workers themselves"),
        (["--endpoint", "a.b.c", "--router-replica-sync", "--no-kv-events"], "promises that no NATS connection"),
    ],
)
def test_wrong_usage(deployment: Deployment, arguments: list[str], text: str) -> None:
    router = deployment.start("-m", "dynwire.router", *arguments)
    assert router.process.wait(20) == 2
    assert text in router.errors.read_text()


async def test_a_router_that_cannot_start_leaves_nothing(discovery_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with dynwire.AsyncNetworkManager(event_plane="none", tcp_host="127.0.0.1") as manager:

        async def taken(request: Any) -> Any:
            return request

        await manager.endpoint("demo.worker-router.free").serve(taken)
        router = RouterService(manager, EndpointId.parse(PATH))
        with pytest.raises(ConfigError, match="already served"):
            await router.start()
        await router.close()
    await asyncio.sleep(0)
