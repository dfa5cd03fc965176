"""What a client gives back to the windows of HTTP/2, against a server whose replies are drawn at random.

The server is the engine itself with a script; its account of the windows has to be right whatever happens to single replies.
"""

from __future__ import annotations

import asyncio
import gc
import random
import struct
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

import dynwire
from dynwire import DynwireError
from dynwire._buffers import get_pool
from dynwire.config import load_config
from dynwire.handlers import prepare
from dynwire.planes.http import AsyncHttpClient, AsyncHttpServer, HttpClient
from dynwire.wire.http2 import Http2Connection

from .faces import PATIENCE_S, eventually

pytestmark = pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
WINDOW = 65536
CONNECTION_WINDOW = 131072
ITEMS = [(b":status", b"200"), (b"content-type", b"application/vnd.dynwire.items")]
ENGINES = pytest.mark.parametrize("engine", ["native", "h2"])


class Scripted:
    """Serves HTTP/2; what it answers stands in ``reply(connection, stream, path, body)``."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.connections: list[tuple[Http2Connection, asyncio.StreamWriter]] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Http2Connection("server", connection_window=1 << 25, stream_window=1 << 25)
        self.connections.append((connection, writer))
        requests: dict[int, tuple[bytes, bytearray]] = {}
        connection.start()
        while data := await reader.read(65536):
            await self.reads.wait()
            for event in connection.receive(data):
                match event:
                    case ("headers", stream, headers, _, end):
                        requests[stream] = (dict(headers)[b":path"], bytearray())
                        if end:
                            self.reply(connection, stream, *requests.pop(stream))
                    case ("data", stream, piece, end):
                        connection.consumed(stream, len(piece))
                        requests[stream][1].extend(piece)
                        if end:
                            self.reply(connection, stream, *requests.pop(stream))
                    case ("error", *_):
                        raise AssertionError(event)
            self.flush()
        writer.close()

    def flush(self) -> None:
        for connection, writer in self.connections:
            writer.write(connection.output())


@asynccontextmanager
async def scripted(reply: Any) -> AsyncIterator[tuple[Scripted, dynwire.Instance]]:
    script = Scripted(reply)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield script, dynwire.Instance(1, "a", "b", "c", "http", f"http://127.0.0.1:{port}/v1/rpc")
    finally:
        server.close()
        for _, writer in script.connections:
            writer.close()
        await asyncio.sleep(0)


def item(size: int, kind: int = 0) -> bytes:
    return struct.pack(">BI", kind, size) + bytes(size)


def config(engine: str, max_message: int = 1_000_000) -> Any:
    return load_config(
        {
            "http_engine": engine,
            "http_stream_window": WINDOW,
            "http_connection_window": CONNECTION_WINDOW,
            "http_adaptive_window": False,
            "tcp_pool_size": 1,
            "tcp_max_message_size": max_message,
        }
    )


def draw(rng: random.Random) -> tuple[list[tuple[bytes, bytes]], bytes, str]:
    """Headers, body and end of a reply."""
    how = rng.choice(["good"] * 6 + ["cut", "reset", "kind", "size", "error", "late", "json", "created", "problem"])
    if how == "json":
        return [(b":status", b"200"), (b"content-type", b"application/json")], b'"%s"' % (b"x" * rng.randrange(100_000)), "end"
    if how == "created":
        return [(b":status", b"201"), (b"content-type", b"application/octet-stream")], bytes(rng.randrange(200_000)), "end"
    if how == "problem":
        return [(b":status", b"503"), (b"content-type", b"text/html")], bytes(rng.randrange(200_000)), "end"
    sizes = [0, 1, 100, 5000, WINDOW - 5, WINDOW, 70_000, 200_000]
    body = b"".join(item(rng.choice(sizes)) for _ in range(rng.randrange(6)))
    if how == "cut":
        return ITEMS, body + item(rng.choice(sizes[1:]))[: -rng.randrange(1, 2)], "end"
    if how == "reset":
        return ITEMS, body + item(300_000)[: rng.randrange(300_000)], "reset"
    if how == "kind":
        return ITEMS, body + item(rng.choice(sizes), 9) + bytes(rng.randrange(3000)), "end"
    if how == "size":
        return ITEMS, body + struct.pack(">BI", 0, 2_000_000) + bytes(rng.randrange(100_000)), "end"
    if how in ("error", "late"):
        return ITEMS, body + item(rng.randrange(300), 3) + (bytes(rng.randrange(100_000)) if how == "late" else b""), "end"
    return ITEMS, body, "end"


def account(stats: dict[str, Any]) -> None:
    """All that came has been given back, as far as it is worth a frame, and not more than that."""
    windows = stats["windows"]
    assert stats["streams"] == 0 and windows["streams"] == {} and windows["queued"] == 0
    if "unread" in windows:
        assert windows["unread"] == 0
        assert windows["recv_window"] + windows["unannounced"] == CONNECTION_WINDOW
    else:  # h2 keeps some accounts of its own
        assert 0 < windows["recv_window"] <= CONNECTION_WINDOW


@ENGINES
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("face", ["async", "blocking"])
async def test_windows_after_any_replies(engine: str, seed: int, face: str) -> None:
    rng = random.Random(seed)
    in_use = get_pool().in_use_bytes

    def reply(connection: Http2Connection, stream: int, path: bytes, body: bytes) -> None:
        if bytes(body) == b"last":
            connection.send_headers(stream, ITEMS)
            connection.send_data(stream, item(900_000), True)
            return
        headers, data, end = draw(rng)
        connection.send_headers(stream, headers, not data and end == "end")
        at = 0
        while at < len(data):
            n = rng.choice([1, 5, 100, 16384, 100_000])
            connection.send_data(stream, data[at : at + n], at + n >= len(data) and end == "end")
            at += n
        if end == "reset":
            script.flush()
            connection.reset(stream, 8)

    async def read(channel: Any, mine: random.Random) -> None:
        limit = mine.choice([0, 1, 3, 100])
        try:
            if mine.random() < 0.3:
                await channel.call(b"x", PATIENCE_S)
                return
            items = channel.stream(b"x", PATIENCE_S)
            try:
                async for _ in items:
                    limit -= 1
                    if limit < 0:
                        break
                    if mine.random() < 0.5:
                        await asyncio.sleep(0)
            finally:
                items.close()
        except DynwireError:
            pass

    def read_blocking(channel: Any, mine: random.Random) -> None:
        limit = mine.choice([0, 1, 3, 100])
        try:
            if mine.random() < 0.3:
                channel.call(b"x", PATIENCE_S)
                return
            items = channel.stream(b"x", PATIENCE_S)
            try:
                for _ in items:
                    limit -= 1
                    if limit < 0:
                        break
            finally:
                items.close()
        except DynwireError:
            pass

    async with scripted(reply) as (script, instance):
        if face == "async":
            client: Any = AsyncHttpClient(config(engine))
            channel = client.channel(instance)
            await channel.connect()
            for _ in range(6):
                await asyncio.gather(*(read(channel, random.Random(rng.random())) for _ in range(8)))
            last = await channel.call(b"last", PATIENCE_S)
        else:
            client = HttpClient(config(engine))
            channel = client.channel(instance)
            with ThreadPoolExecutor(8) as threads:
                loop = asyncio.get_running_loop()
                for _ in range(6):
                    await asyncio.gather(
                        *(loop.run_in_executor(threads, read_blocking, channel, random.Random(rng.random())) for _ in range(8))
                    )
                last = await loop.run_in_executor(threads, channel.call, b"last", PATIENCE_S)
        assert len(last) == 900_000
        del last
        await asyncio.sleep(0)  # the call's end has woken this task from within the engine
        (stats,) = client.stats()[instance.address]
        account(stats)
        if face == "async":
            await client.close()
        else:
            client.close()
    gc.collect()
    assert get_pool().in_use_bytes == in_use


@ENGINES
async def test_a_connection_that_is_busy_for_a_moment_is_kept(engine: str) -> None:
    """The socket is full when a call is given up, so what it has begun to send waits. The next call takes the same connection."""

    def reply(connection: Http2Connection, stream: int, path: bytes, body: bytes) -> None:
        connection.send_headers(stream, ITEMS)
        connection.send_data(stream, item(len(body)), True)

    async with scripted(reply) as (script, instance):
        client = HttpClient(config(engine, 32_000_000))
        channel = client.channel(instance)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            assert len(await loop.run_in_executor(thread, channel.call, b"first", PATIENCE_S)) == 5
            script.reads.clear()
            with pytest.raises(dynwire.DeadlineExceeded):
                await loop.run_in_executor(thread, channel.call, bytes(24 << 20), 0.3)
            last = loop.run_in_executor(thread, channel.call, b"last", PATIENCE_S)
            script.reads.set()
            assert len(await last) == 4
        assert len(script.connections) == 1
        client.close()


@ENGINES
async def test_what_was_given_back_early_is_of_one_stream(engine: str) -> None:
    """Half an item is given back early to one reader; another one closes with unread items: both are counted once."""

    def reply(connection: Http2Connection, stream: int, path: bytes, body: bytes) -> None:
        connection.send_headers(stream, ITEMS)
        if bytes(body) == b"early":
            connection.send_data(stream, item(200_000)[:60_000], False)
        else:
            connection.send_data(stream, item(50_000), False)

    async with scripted(reply) as (_, instance):
        client = AsyncHttpClient(config(engine))
        channel: Any = client.channel(instance)
        await channel.connect()
        early = channel.stream(b"early", PATIENCE_S)
        waiting = asyncio.ensure_future(anext(early))
        await eventually(lambda: client.stats()[instance.address][0]["windows"]["received"] >= 60_000)
        closed = channel.stream(b"closed", PATIENCE_S)
        await eventually(lambda: client.stats()[instance.address][0]["windows"]["received"] >= 110_005)
        closed.close()
        windows = client.stats()[instance.address][0]["windows"]
        if engine == "native":
            assert windows["unread"] == 0
            assert windows["recv_window"] + windows["unannounced"] == CONNECTION_WINDOW
        else:
            assert windows["recv_window"] > CONNECTION_WINDOW // 2
        early.close()
        with pytest.raises(DynwireError):
            await waiting
        await client.close()


async def test_a_connection_that_is_lost_in_an_item_frees_its_memory() -> None:
    in_use = get_pool().in_use_bytes

    def reply(connection: Http2Connection, stream: int, path: bytes, body: bytes) -> None:
        connection.send_headers(stream, ITEMS)
        connection.send_data(stream, item(500_000)[:300_000], False)

    async with scripted(reply) as (script, instance):
        client = AsyncHttpClient(config("native"))
        channel: Any = client.channel(instance)
        await channel.connect()
        call = channel.call(b"x", PATIENCE_S)
        await eventually(lambda: client.stats()[instance.address][0]["windows"]["received"] >= 300_000)
        script.connections[0][1].close()
        with pytest.raises(dynwire.PeerLost):
            await call
        assert get_pool().in_use_bytes == in_use, "the call's memory waits for the garbage collector"
        await client.close()


@ENGINES
@pytest.mark.parametrize("fails", [False, True])
async def test_a_closing_server_sends_what_the_window_has_no_room_for(engine: str, fails: bool) -> None:
    """The handler has ended; the end of its reply waits for a slow reader."""

    async def items(request: Any) -> AsyncIterator[bytes]:
        for i in range(4):
            yield bytes([i]) * 50_000
        if fails:
            raise ValueError("as asked")

    settings = config(engine)
    server = AsyncHttpServer(load_config({"http_engine": engine, "http_host": "127.0.0.1", "http_port": 0}))
    await server.start()
    server.add_endpoint("a.b.c", prepare(items, _no_threads))
    client = AsyncHttpClient(settings)
    channel: Any = client.channel(dynwire.Instance(1, "a", "b", "c", "http", server.address))
    await channel.connect()
    stream = channel.stream(b"", PATIENCE_S)
    got = [await anext(stream)]
    await eventually(lambda: server.in_flight() == 0 or client.stats()[server.address][0]["windows"]["received"] >= WINDOW)
    await eventually(lambda: server.stats()[0]["backlog"] == 0)
    closing = asyncio.create_task(server.close(PATIENCE_S))
    done, _ = await asyncio.wait([closing], timeout=0.05)
    assert not done, "it did not wait for the reader"
    try:
        async for one in stream:
            got.append(one)
        assert not fails
    except DynwireError as error:
        assert fails and "as asked" in str(error), error
    assert [bytes(part)[:1] for part in got] == [b"\0", b"\1", b"\2", b"\3"]
    await closing
    await client.close()


def _no_threads() -> Any:
    raise AssertionError("every handler here is a coroutine")
