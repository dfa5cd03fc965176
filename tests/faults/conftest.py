"""Real worker processes, ended by pid only, and one body per test for both APIs: the async one on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.discovery.file import FileDiscovery
from tests.plane.faces import PATIENCE_S, Client, Manager, Stream

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).with_name("worker.py")

GRACE_S = 0.5
"""What promise P1 allows after a deadline"""
SLACK_S = 1.0
"""What a busy machine with two cores may add to any moment"""

Managers = Callable[..., AbstractAsyncContextManager[Manager]]


class Worker:
    """A worker process (worker.py, or any other command that prints ``ready ADDRESS``)."""

    def __init__(self, command: list[str], errors: Path) -> None:
        self.errors = errors
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, cwd=ROOT)
        self.pid = self.process.pid
        self._buffer = b""
        self.address = ""
        self.noisy = False

    def line(self) -> str:
        """The next line that it prints; fails if it ends or takes too long."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self.process.stdout], [], [], left)[0]
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert data, f"the worker printed nothing more; on standard error: {self.errors.read_text()}"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def says(self, text: str) -> None:
        """Wait for a line."""
        assert await asyncio.to_thread(self.line) == text

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        if number is signal.SIGSTOP:
            while self.state() != "T":  # until then it may still answer
                time.sleep(0.001)

    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        text = self.errors.read_text()
        assert self.noisy or ("Traceback" not in text and "rror" not in text), text


StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(discovery_dir: Path, tmp_path: Path) -> Iterator[StartWorker]:
    """``start_worker("uvloop", tcp_request_timeout=1)``: a process with the handlers of worker.py, registered and serving."""
    started: list[Worker] = []

    def start(loop: str = "asyncio", **settings: object) -> Worker:
        arguments = [f"{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-X", "faulthandler", str(PROGRAM), loop, *arguments]
        worker = Worker(command, tmp_path / f"stderr-{len(started)}")
        started.append(worker)
        word, worker.address = worker.line().split()
        assert word == "ready"
        return worker

    try:
        yield start
    finally:
        with contextlib.ExitStack() as stack:
            for worker in started:
                stack.callback(worker.close)


@pytest.fixture(params=["async-asyncio", "async-uvloop", "blocking"])
def face(request: pytest.FixtureRequest) -> str:
    """The caller's API and loop."""
    name: str = request.param
    return name


@pytest.fixture
def loop_factory(face: str, leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    if face != "async-uvloop":
        return asyncio.new_event_loop
    uvloop: Any = pytest.importorskip("uvloop")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


@pytest.fixture
def managers(face: str, discovery_dir: Path) -> Managers:
    """``async with managers(setting=…) as manager``: a manager of the API under test, closed at the end."""
    threads = ThreadPoolExecutor(64, thread_name_prefix="test-body")

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[Manager]:
        asyncio.get_running_loop().set_default_executor(threads)
        cls = dynwire.NetworkManager if face == "blocking" else dynwire.AsyncNetworkManager
        # A stopped worker must not vanish from discovery while a test looks at what its callers see.
        manager = Manager(cls(**{"request_plane": "tcp", "tcp_host": "127.0.0.1", "discovery_ttl": 60.0, **settings}))
        try:
            yield manager
        finally:
            await manager.close()

    return make


@asynccontextmanager
async def known_as(manager: Manager, endpoint: str, address: str, directory: Path, plane: str = "tcp") -> AsyncIterator[Client]:
    """A client of ``manager`` for an endpoint that discovery says is at ``address``: a proxy, or something foreign."""
    namespace, component, name = endpoint.split(".")
    discovery = FileDiscovery(str(directory), ttl=60.0)
    await discovery.start()
    instance = dynwire.Instance(
        id=int.from_bytes(os.urandom(7), "big"),
        namespace=namespace,
        component=component,
        endpoint=name,
        plane=plane,
        address=address,
    )
    await discovery.register(instance)
    try:
        yield await manager.client(endpoint)
    finally:
        await discovery.close()


class DirectClient:
    """Calls at an address, below discovery and routing: nothing is tried again or set aside. The face of `Client`."""

    def __init__(self, manager: Manager, endpoint: str, address: str) -> None:
        self._manager = manager
        self._plane: Any = None
        namespace, component, name = endpoint.split(".")
        self.instance = dynwire.Instance(1, namespace, component, name, "tcp", address)
        self.blocking = isinstance(manager.real, dynwire.NetworkManager)

    async def _channel(self) -> Any:
        if self._plane is None:
            made: Any = self._manager.real
            self._plane = await asyncio.to_thread(made.create_client) if self.blocking else made.create_client()
            self._made = self._plane.channel(self.instance)
        if not self.blocking and not self._made.ready:
            await self._made.connect()
        return self._made

    async def call(self, payload: Any, timeout: Any = PATIENCE_S) -> Any:
        channel = await self._channel()
        return await (asyncio.to_thread(channel.call, payload, timeout) if self.blocking else channel.call(payload, timeout))

    @asynccontextmanager
    async def stream(self, payload: Any, timeout: Any = PATIENCE_S) -> AsyncIterator[Stream]:
        channel = await self._channel()
        if self.blocking:
            items = await asyncio.to_thread(channel.stream, payload, timeout)
            stream = Stream(_Blocking(items))
        else:
            items = channel.stream(payload, timeout)
            stream = Stream(items)
        try:
            yield stream
        finally:
            if self.blocking:
                await asyncio.to_thread(items.close)
            else:
                items.close()

    def stats(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._plane.stats().get(self.instance.address, [])
        return found


class _Blocking(dynwire.ReplyStream):
    """Makes `Stream` iterate a plane's blocking stream in threads."""

    def __init__(self, items: Any) -> None:
        self._plain = items

    def __iter__(self) -> Any:
        return iter(self._plain)

    def __next__(self) -> Any:
        return next(self._plain)


async def outcome(call: Awaitable[Any]) -> tuple[Any, BaseException | None, float]:
    """What a call returned, what it raised, how long it took."""
    started = time.monotonic()
    try:
        result = await call
    except dynwire.DynwireError as error:
        return None, error, time.monotonic() - started
    return result, None, time.monotonic() - started


async def recovers(client: Client) -> None:
    """The client works again by itself: at most, the failed instance is set aside for a moment."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await client.call("after") == "after"
                return
            except dynwire.NoInstances:
                await asyncio.sleep(0.01)


async def fails(call: Awaitable[Any], kind: type[BaseException] | tuple[type[BaseException], ...]) -> tuple[Any, float]:
    """The error of a call and its duration; any other end fails the test."""
    result, error, seconds = await outcome(call)
    assert isinstance(error, kind), f"after {seconds:.2f} s: {error!r}, result {result!r}"
    return error, seconds


def in_time(seconds: float, deadline: float, earliest: float | None = None) -> None:
    """P1: a call ends by its deadline + 0.5 s; not before it either, when it was the deadline that ended it."""
    assert seconds <= deadline + GRACE_S + SLACK_S, f"took {seconds:.2f} s, deadline {deadline} s"
    assert seconds >= (deadline if earliest is None else earliest) - 0.01, f"gave up after {seconds:.2f} s, deadline {deadline} s"
