"""Workers of ours and servers of others, each in a process of its own; callers with every API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.faults.conftest import DirectClient, StartWorker, face, known_as, loop_factory, managers, plane, start_worker  # noqa: F401
from tests.plane.faces import Client, Manager

from . import programs
from .programs import HERE, Foreign

HTTP = {"request_plane": "http", "http_host": "127.0.0.1", "http_port": 0}

StartForeign = Callable[..., Foreign]


class Direct(DirectClient):
    """Calls over the http plane at an address, below discovery and routing."""

    def __init__(self, manager: Manager, address: str, endpoint: str = "f.w.echo") -> None:
        super().__init__(manager, endpoint, address)
        self.instance = msgspec.structs.replace(self.instance, plane="http")

    async def items(self, payload: Any) -> list[Any]:
        async with self.stream(payload) as stream:
            return [item async for item in stream]


@pytest.fixture
def worker(start_worker: StartWorker) -> str:  # noqa: F811
    """Address (``http://host:port/root``) of a worker with the handlers of tests/faults/worker.py."""
    return start_worker(**HTTP).address


@pytest.fixture
def start_foreign(tmp_path: Path) -> Iterator[StartForeign]:
    """``start_foreign(command, port)``: a server, ended with the test."""
    with ExitStack() as stack:
        count = 0

        def start(command: list[str], port: int, cwd: Path | None = None) -> Foreign:
            nonlocal count
            count += 1
            server = Foreign(command, port, tmp_path / f"foreign-{count}.log", cwd)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def node_server(start_foreign: StartForeign, free_port: int) -> Callable[[str], Foreign]:
    """``node_server("refuse-first")``: the server of server.mjs with that behaviour."""
    node = programs.program("node")
    return lambda mode: start_foreign([node, str(HERE / "server.mjs"), mode, str(free_port)], free_port)


@pytest.fixture
def known_at(discovery_dir: Path) -> Callable[[Manager, str, str], AbstractAsyncContextManager[Client]]:
    """``async with known_at(manager, endpoint, address) as client``: one that tries again as users' clients do."""

    @asynccontextmanager
    async def enter(manager: Manager, endpoint: str, address: str) -> AsyncIterator[Client]:
        async with known_as(manager, endpoint, address, discovery_dir, plane="http") as client:
            yield client

    return enter
