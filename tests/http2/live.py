"""Real sockets for tests of the http plane: managers of both APIs, and raw peers, client or server, that speak in frames."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from hpack import Decoder

import dynwire
from dynwire.discovery.file import FileDiscovery
from tests.plane.faces import PATIENCE_S, Client, Manager

from . import frames as f
from .frames import Frame

PATH = "test.http.live"
ROOT = "/v1/rpc"

FACES = pytest.mark.parametrize(
    ("face", "loop_factory"),
    [("async", "asyncio"), ("async", "uvloop"), ("blocking", "asyncio")],
    indirect=["loop_factory"],
    ids=["asyncio", "uvloop", "blocking"],
)
"""the caller's API; the blocking one does not see which loop the body runs on"""

ENGINES = pytest.mark.parametrize("engine", ["native", "h2"])

ONE_LOOP = pytest.mark.parametrize("loop_factory", ["asyncio"], indirect=True)

_with_threads: weakref.WeakSet[Any] = weakref.WeakSet()


@asynccontextmanager
async def managing(face: str = "async", **settings: Any) -> AsyncIterator[Manager]:
    """A manager of the http plane with any free port."""
    loop = asyncio.get_running_loop()
    if loop not in _with_threads:
        loop.set_default_executor(ThreadPoolExecutor(64, thread_name_prefix="test-body"))  # blocking calls wait in them
        _with_threads.add(loop)
    cls = dynwire.NetworkManager if face == "blocking" else dynwire.AsyncNetworkManager
    # what discovery knows of a stopped or raw server must not expire while a test looks at it
    defaults = {"request_plane": "http", "http_host": "127.0.0.1", "tcp_host": "127.0.0.1", "http_port": 0, "discovery_ttl": 60.0}
    manager = Manager(cls(**{**defaults, **settings}))
    try:
        yield manager
    finally:
        await manager.close()


def settings_of(manager: Manager) -> Any:
    return manager.real.config


@asynccontextmanager
async def known_as(manager: Manager, address: str, *, plane: str = "http", path: str = PATH) -> AsyncIterator[Client]:
    """A client of ``manager`` for an endpoint that discovery says is at ``address``: a raw server, say."""
    discovery = FileDiscovery(os.environ["DYN_FILE_KV"], ttl=60.0)
    await discovery.start()
    namespace, component, endpoint = path.split(".")
    number = int.from_bytes(os.urandom(7), "big")
    await discovery.register(dynwire.Instance(number, namespace, component, endpoint, plane, address))
    try:
        yield await manager.client(path)
    finally:
        await discovery.close()


class Direct:
    """Calls at an address below discovery and routing: nothing is repeated, and the connections can be looked at."""

    def __init__(self, manager: Manager, address: str, path: str = PATH) -> None:
        namespace, component, endpoint = path.split(".")
        self.blocking = isinstance(manager.real, dynwire.NetworkManager)
        self.plane: Any = manager.real.create_client()
        self.address = address
        self.channel = self.plane.channel(dynwire.Instance(1, namespace, component, endpoint, "http", address))

    async def call(self, payload: Any, timeout: Any = PATIENCE_S) -> Any:
        if self.blocking:
            return await asyncio.to_thread(self.channel.call, payload, timeout)
        if not self.channel.ready:
            await self.channel.connect()
        return await self.channel.call(payload, timeout)

    def stats(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.plane.stats().get(self.address, [])
        return found

    async def close(self) -> None:
        if not self.blocking:
            await self.plane.close()


async def outcome(call: Awaitable[Any]) -> Any:
    """The result of a call, or the error it raised."""
    try:
        return await call
    except dynwire.DynwireError as error:
        return error


def host_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


# Raw peers -------------------------------------------------------------------------------------------------------------------


class Raw:
    """One connection, as frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.frames = f.FrameReader()
        self.waiting: list[Frame] = []
        self.seen: list[Frame] = []
        self.decoder = Decoder()
        self.fields: dict[int, list[dict[bytes, bytes]]] = {}
        """header sections received, by stream"""
        self.settings: dict[int, int] = {}
        self.closed = False

    def send(self, *pieces: bytes) -> None:
        self.writer.write(b"".join(pieces))

    async def next(self) -> Frame | None:
        """The next frame, None at the end of the connection."""
        while not self.waiting:
            data = b""
            with contextlib.suppress(ConnectionError):
                data = await self.reader.read(65536)
            if not data:
                self.closed = True
                return None
            self.waiting += self.frames.feed(data)
        frame = self.waiting.pop(0)
        self.seen.append(frame)
        if frame.type == f.SETTINGS and not frame.ack:
            self.settings.update(frame.settings)
        if frame.type == f.HEADERS:
            assert frame.flags & f.END_HEADERS, "tests of this file send short heads"
            self.fields.setdefault(frame.stream, []).append(dict(self.decoder.decode(frame.body, raw=True)))
        return frame

    def story(self) -> str:
        return ", ".join(map(str, self.seen)) or "nothing"

    async def until(self, match: Callable[[Frame], object]) -> Frame:
        async with asyncio.timeout(PATIENCE_S):
            while (frame := await self.next()) is not None:
                if match(frame):
                    return frame
        raise AssertionError(f"the connection ended; the peer had sent {self.story()}")

    async def until_closed(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.next() is not None:
                pass

    async def type(self, type_: int, stream: int | None = None) -> Frame:
        """The next frame of a type, not an ACK."""
        return await self.until(lambda frame: frame.type == type_ and not frame.ack and stream in (None, frame.stream))

    # as a client

    async def greet(self, *pairs: tuple[int, int]) -> None:
        self.send(f.PREFACE, f.settings(*pairs))
        await self.type(f.SETTINGS)
        self.send(f.SETTINGS_ACK)

    def post(self, stream: int, *extra: f.Field, path: str = PATH, body: bytes | None = b"1", method: bytes = b"POST") -> None:
        """A request with JSON; without a body the stream stays open."""
        target = f"{ROOT}/{path.replace('.', '/')}".encode() if not path.startswith("/") else path.encode()
        fields = [(b":method", method), (b":scheme", b"http"), (b":path", target), (b":authority", b"x"), *extra]
        self.send(f.headers(stream, f.block(fields), end=body == b""), f.data(stream, body, end=True) if body else b"")

    async def reply(self, stream: int) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, fields and body of the answer to one request; other streams' frames are dropped."""
        body = b""
        while True:
            frame = await self.until(lambda frame: frame.stream == stream and frame.type in (f.HEADERS, f.DATA, f.RST_STREAM))
            assert frame.type != f.RST_STREAM, f"reset: {self.story()}"
            if frame.type == f.DATA:
                body += frame.body
            if frame.end_stream:
                fields = self.fields[stream][0]
                return int(fields[b":status"]), fields, body.removesuffix(b"\n")  # JSON ends its line, for terminals

    # as a server

    async def welcome(self, *pairs: tuple[int, int]) -> None:
        """Take the client's preface and SETTINGS, and send ours."""
        assert await self.reader.readexactly(len(f.PREFACE)) == f.PREFACE
        self.send(f.settings(*pairs))
        await self.type(f.SETTINGS)
        self.send(f.SETTINGS_ACK)

    async def request(self) -> int:
        """The stream of the next request that has come completely."""
        return (await self.until(lambda frame: frame.end_stream)).stream

    def answer(self, stream: int, payload: bytes = b"1") -> None:
        """A reply of one JSON item, in the format of our own client."""
        item = struct.pack(">BI", 2, len(payload)) + payload
        head = f.block([(b":status", b"200"), (b"content-type", b"application/vnd.dynwire.items")])
        self.send(f.headers(stream, head), f.data(stream, item, end=True))


Script = Callable[[Raw], Awaitable[None]]


class RawServer:
    """Runs a script for every connection; errors of the scripts fail the test at the end."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.connections: list[Raw] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        raw = Raw(reader, writer)
        self.connections.append(raw)
        try:
            await self._script(raw)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def raw_server(script: Script, **options: Any) -> AsyncIterator[RawServer]:
    made = RawServer(script)
    server = await asyncio.start_server(made._serve, "127.0.0.1", 0, **options)
    made.port = server.sockets[0].getsockname()[1]
    made.address = f"{'https' if options else 'http'}://127.0.0.1:{made.port}{ROOT}"
    try:
        yield made
    finally:
        server.close()
        for raw in made.connections:
            raw.writer.transport.abort()  # what still reads there sees the end
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*made._tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


@asynccontextmanager
async def raw_client(address: str, **options: Any) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection(*host_port(address), **options)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def h1(address: str, data: bytes) -> bytes:
    """Everything that the server answers to these bytes until it closes the connection; ours stays open for writing."""
    async with raw_client(address) as raw, asyncio.timeout(PATIENCE_S):
        raw.send(data)
        return await raw.reader.read()
