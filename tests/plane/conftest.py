"""Every test here runs on every plane, with the async API on both event loops and with the blocking API."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.config import NatsConfig
from dynwire.nats.connection import NatsConnection
from dynwire.nats.server import NatsServer, find_binary

from .faces import PATIENCE_S, Manager

ANY_PORT = {"tcp_host": "127.0.0.1", "http_host": "127.0.0.1", "http_port": 0}

Managers = Callable[..., AbstractAsyncContextManager[Manager]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faces(*names): the APIs the test is for, of async and blocking")
    config.addinivalue_line("markers", "planes(*names): the planes the test is for")
    config.addinivalue_line(
        "markers", "not_queued(reason): in durable mode of the nats plane it is otherwise, and tested elsewhere"
    )


def available_planes() -> list[str]:
    try:
        find_binary()
    except dynwire.ConfigError:
        return ["memory", "tcp", "http"]
    return ["memory", "tcp", "http", "nats"]


ENGINES = {"http": ("native", "h2"), "nats": ("native", "plain", "jetstream")}
"""Of planes with two implementations of something: the usual one, and the other one"""


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    """A NATS server that takes messages as large as the plane does."""
    if "nats" not in available_planes():
        yield "nats://there.is.none:4222"
        return
    with NatsServer(max_payload=17 << 20, jetstream=True) as server:
        yield server.url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "managers" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("faces")
    faces = marker.args if marker else ("async", "blocking")
    marker = metafunc.definition.get_closest_marker("planes")
    planes = [plane for plane in available_planes() if marker is None or plane in marker.args]
    combinations = [
        pytest.param(plane, face, loop, engine, id=f"{plane}{'' if engine == 'native' else '-' + engine}-{face}-{loop}")
        for plane in planes
        for engine in ENGINES.get(plane, ("native",))
        for face in faces
        # a blocking caller does not see which loop the test body runs on; the portal has its own
        for loop in (["asyncio", "uvloop"] if face == "async" else ["asyncio"])
        # the slow way through nats-py is a way out, and has tests of its own
        if engine != "plain" or (face == "async" and loop == "asyncio")
        # in durable mode what differs is the way of a request, not the loop
        if engine != "jetstream" or (loop == "asyncio" and not metafunc.definition.get_closest_marker("not_queued"))
    ]
    metafunc.parametrize(("plane", "face", "loop_kind", "engine"), combinations)


@pytest.fixture
def loop_factory(loop_kind: str, leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    """The event loop of the test's body."""
    if loop_kind == "asyncio":
        return asyncio.new_event_loop
    uvloop: Any = pytest.importorskip("uvloop")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


@pytest.fixture
def durable(engine: str, nats_url: str, leak_guard: None) -> Iterator[dict[str, Any]]:
    """Settings of durable mode, with queues of the test's own, which are deleted at its end."""
    prefix = f"test-{secrets.token_hex(6)}"
    yield {"nats_request_mode": "jetstream", "nats_prefix": prefix, "nats_queue_max_bytes": 1 << 28, "nats_queue_ack_wait": 5.0}

    async def clean_up() -> None:
        connection = await NatsConnection.acquire(NatsConfig(servers=(nats_url,)), PATIENCE_S)
        try:
            js = connection.client.jetstream()
            for stream in await js.streams_info():
                if stream.config.name is not None and stream.config.name.startswith(f"{prefix}+"):
                    await js.delete_stream(stream.config.name)
        finally:
            await connection.release()

    if engine == "jetstream":
        asyncio.run(clean_up())


@pytest.fixture
def managers(plane: str, face: str, engine: str, discovery_dir: Path, nats_url: str, durable: dict[str, Any]) -> Managers:
    """``async with managers(setting=…) as manager``: a manager of the API under test, closed at the end."""
    threads = ThreadPoolExecutor(64, thread_name_prefix="test-body")

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[Manager]:
        # Blocking calls run in threads of the body's loop, and some tests have more of them waiting than CPUs + 4.
        # An executor starts its threads when they are needed; the loop's end joins them.
        asyncio.get_running_loop().set_default_executor(threads)
        cls = dynwire.AsyncNetworkManager if face == "async" else dynwire.NetworkManager
        if plane == "nats":
            mode = durable if engine == "jetstream" else {}
            port = "plain" if engine == "plain" else "fast"
            settings = {"nats_servers": nats_url, "nats_port": port, **mode, **settings}
        elif plane == "http":
            settings = {"http_engine": engine, **settings}
        manager = Manager(cls(**{"request_plane": plane, **ANY_PORT, **settings}))
        try:
            yield manager
        finally:
            await manager.close()

    return make
