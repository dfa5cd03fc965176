"""Every DYN_HTTP*, DYN_HTTP2_* and DYNWIRE_HTTP* setting takes effect, over real sockets. TLS: test_tls.py."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from typing import Any

import pytest

import dynwire
from dynwire import BindError, ConnectError, DeadlineExceeded, MessageTooLarge, Overloaded, PeerLost, Unauthenticated
from tests.faults.conftest import StartWorker
from tests.faults.conftest import plane as plane  # a fixture, as is start_worker
from tests.faults.conftest import start_worker as start_worker
from tests.plane.faces import PATIENCE_S, Signal, eventually

from . import frames as f
from .live import ENGINES, FACES, ONE_LOOP, PATH, Direct, Raw, known_as, managing, outcome, raw_client, raw_server

pytestmark = pytest.mark.usefixtures("discovery_dir")


async def echo(request: Any) -> Any:
    return request


# Addresses -------------------------------------------------------------------------------------------------------------------


@ONE_LOOP
async def test_host_and_port(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HTTP_RPC_HOST", "127.0.0.2")
    monkeypatch.setenv("DYN_HTTP_RPC_PORT", str(free_port))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "http")
    async with dynwire.AsyncNetworkManager() as manager:
        service = await manager.endpoint(PATH).serve(echo)
        assert service.instance.address == f"http://127.0.0.2:{free_port}/v1/rpc"
        client = await manager.endpoint(PATH).client()
        await client.wait_for_instances()
        assert await client.call(1, timeout=PATIENCE_S) == 1
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", free_port)).close()  # only the address that was named


@ONE_LOOP
async def test_the_default_port_is_8888() -> None:
    async with managing(http_port=8888) as manager:
        assert dynwire.config.HttpConfig().port == 8888
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 8888))
            holder.listen()
            with pytest.raises(BindError):
                await manager.serve(PATH, echo)


@FACES
async def test_a_port_in_use(face: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        async with managing(face, http_port=port) as manager:
            with pytest.raises(BindError, match=rf"127\.0\.0\.1:{port}: the port is in use.*DYN_HTTP_RPC_PORT") as caught:
                await manager.serve(PATH, echo)
            assert caught.value.address == f"127.0.0.1:{port}"
            assert await manager.list_instances() == ()


@ONE_LOOP
async def test_advertised_host() -> None:
    async with managing(http_host="0.0.0.0", http_advertise_host="localhost") as manager:
        service = await manager.serve(PATH, echo)
        assert service.instance.address.startswith("http://localhost:")
        client = await manager.client(PATH)
        assert await client.call(1) == 1


@FACES
async def test_root_path(face: str) -> None:
    """The address carries it, so the caller's own setting does not matter."""
    async with managing(face, http_root_path="/a/b") as server, managing(face, http_root_path="/else") as caller:
        service = await server.serve(PATH, echo)
        address = service.instance.address
        assert address.endswith("/a/b")
        client = await caller.client(PATH)
        assert await client.call({"x": 1}) == {"x": 1}
        async with raw_client(address) as raw:
            await raw.greet()
            raw.post(1, path="/a/b/test/http/live")
            assert (await raw.reply(1))[::2] == (200, b"1")
            raw.post(3, path="/v1/rpc/test/http/live")
            assert (await raw.reply(3))[0] == 404


# Frames and streams ----------------------------------------------------------------------------------------------------------


@ENGINES
@ONE_LOOP
async def test_max_frame_size_of_the_server(engine: str) -> None:
    async with managing(http_engine=engine, http_max_frame_size=20000, tcp_max_message_size=100000) as manager:
        service = await manager.serve(PATH, echo)
        body = json.dumps("x" * 50000).encode()
        async with raw_client(service.instance.address) as raw:
            await raw.greet((f.MAX_FRAME_SIZE, 17000), (f.INITIAL_WINDOW_SIZE, 1 << 20))
            raw.send(f.window_update(0, 1 << 20))
            assert raw.settings[f.MAX_FRAME_SIZE] == 20000
            raw.post(1, body=None)
            # 20000 bytes in a frame are taken, 20001 are not
            raw.send(f.data(1, body[:20000]), f.data(1, body[20000:40000]), f.data(1, body[40000:], end=True))
            assert (await raw.reply(1))[::2] == (200, body)
            assert max(len(frame.payload) for frame in raw.seen) <= 17000, "the peer's limit counts for what is sent"
            raw.post(3, body=None)
            raw.send(f.data(3, bytes(20001)))
            assert (await raw.type(f.GOAWAY)).code == f.FRAME_SIZE_ERROR


@ENGINES
@FACES
async def test_max_frame_size_of_clients(face: str, engine: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.welcome((f.MAX_FRAME_SIZE, 17000), (f.INITIAL_WINDOW_SIZE, 1 << 20))
        raw.send(f.window_update(0, 1 << 20))
        raw.answer(await raw.request())
        await raw.until_closed()

    async with (
        raw_server(script) as server,
        managing(face, http_engine=engine, http_max_frame_size=20000) as manager,
        known_as(manager, server.address) as client,
    ):
        assert await client.call(bytes(200000)) == 1
        raw = server.connections[0]
        assert raw.settings[f.MAX_FRAME_SIZE] == 20000
        assert max(len(frame.payload) for frame in raw.seen) <= 17000


@ONE_LOOP
async def test_one_stream_too_many_is_refused() -> None:
    release = Signal()

    async def handler(request: Any) -> Any:
        await release.wait()
        return request

    async with managing(http_max_concurrent_streams=3) as manager:
        service = await manager.serve(PATH, handler)
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            assert raw.settings[f.MAX_CONCURRENT_STREAMS] == 3
            for stream in (1, 3, 5, 7):
                raw.post(stream, body=str(stream).encode())
            frame = await raw.type(f.RST_STREAM)
            assert (frame.stream, frame.code) == (7, f.REFUSED_STREAM)
            release.set()
            for _ in range(3):
                await raw.until(lambda frame: frame.end_stream)
            raw.post(9, body=b"9")
            assert (await raw.reply(9))[::2] == (200, b"9"), "the connection goes on"


@ONE_LOOP
async def test_one_stream_too_many_on_h2() -> None:
    """The library ends the connection instead (tests/http2/deviations.py); the setting counts all the same."""
    async with managing(http_engine="h2", http_max_concurrent_streams=3) as manager:
        service = await manager.serve(PATH, never)
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            assert raw.settings[f.MAX_CONCURRENT_STREAMS] == 3
            for stream in (1, 3, 5):
                raw.post(stream)
            raw.send(f.ping(b"-fewer--"))
            await raw.until(lambda frame: frame.type == f.PING and frame.payload == b"-fewer--")
            raw.post(7)
            await raw.type(f.GOAWAY)
            assert not any(frame.type in (f.RST_STREAM, f.HEADERS) for frame in raw.seen)


async def never(request: Any) -> None:
    await asyncio.get_running_loop().create_future()


@ENGINES
@FACES
async def test_callers_do_not_see_the_limit_of_streams(face: str, engine: str) -> None:
    async def handler(request: Any) -> Any:
        await asyncio.sleep(0)
        return request

    async with (
        managing(face, http_engine=engine, http_max_concurrent_streams=2) as server,
        managing(face, http_engine=engine, tcp_pool_size=2) as caller,
    ):
        await server.serve(PATH, handler)
        client = await caller.client(PATH)
        assert await asyncio.gather(*(client.call(i) for i in range(40))) == list(range(40))


@FACES
async def test_pool_size(face: str) -> None:
    release, running = Signal(), []

    async def handler(request: Any) -> Any:
        running.append(request)
        await release.wait()
        return request

    async with managing(face, http_max_concurrent_streams=1) as server, managing(face, tcp_pool_size=2) as caller:
        service = await server.serve(PATH, handler)
        direct = Direct(caller, service.instance.address)
        calls = [asyncio.create_task(direct.call(0))]
        await eventually(lambda: len(running) == 1)
        calls.append(asyncio.create_task(direct.call(1)))
        await eventually(lambda: len(direct.stats()) == 2)  # a full connection makes the client open another one
        calls += [asyncio.create_task(direct.call(number)) for number in range(2, 9)]
        await eventually(lambda: len(running) == 2)
        assert [row["streams"] for row in direct.stats()] == [1, 1]
        release.set()
        assert await asyncio.gather(*calls) == list(range(9))
        assert len(direct.stats()) == 2
        await direct.close()


@FACES
async def test_channel_buffer(face: str) -> None:
    """DYN_TCP_CHANNEL_BUFFER calls wait for a stream, one more is refused at once."""
    release, started = Signal(), Signal()

    async def handler(request: Any) -> Any:
        started.set()
        await release.wait()
        return request

    async with (
        managing(face, http_max_concurrent_streams=1) as server,
        managing(face, tcp_pool_size=1, tcp_channel_buffer=3) as caller,
    ):
        service = await server.serve(PATH, handler)
        direct = Direct(caller, service.instance.address)
        first = asyncio.create_task(direct.call(0))
        await started.wait()
        others = [asyncio.create_task(outcome(direct.call(1))) for _ in range(5)]
        await eventually(lambda: sum(task.done() for task in others) == 2)
        for error in (task.result() for task in others if task.done()):
            assert isinstance(error, Overloaded)
            assert (error.limit, error.sent) == (3, "no")
            assert "DYN_TCP_CHANNEL_BUFFER" in str(error)
        release.set()
        assert await first == 0
        assert [await task for task in others].count(1) == 3
        await direct.close()


# The pool --------------------------------------------------------------------------------------------------------------------


@FACES
@pytest.mark.parametrize("kept", [0, 1])
async def test_idle_connections_that_are_kept(face: str, kept: int) -> None:
    release, running = Signal(), []

    async def handler(request: Any) -> Any:
        running.append(request)
        await release.wait()
        return request

    # The async client looks at its idle connections every eighth of their timeout.
    async with (
        managing(face, http_max_concurrent_streams=1) as server,
        managing(face, tcp_pool_size=3, http_pool_max_idle_per_host=kept, http_pool_idle_timeout=4) as caller,
    ):
        service = await server.serve(PATH, handler)
        direct = Direct(caller, service.instance.address)
        calls = []
        while (before := len(direct.stats())) < 3:
            count = len(running)
            calls.append(asyncio.create_task(direct.call(0)))
            await eventually(lambda before=before, count=count: len(direct.stats()) > before or len(running) > count)
        release.set()
        assert set(await asyncio.gather(*calls)) == {0}
        await eventually(lambda: len(direct.stats()) == kept)
        await direct.close()


async def answering(raw: Raw) -> None:
    await raw.welcome()
    while (frame := await raw.next()) is not None:
        if frame.end_stream:
            raw.answer(frame.stream)


@FACES
@pytest.mark.parametrize("timeout", [0.1, 60.0])
async def test_idle_timeout(face: str, timeout: float) -> None:
    async with raw_server(answering) as server, managing(face, http_pool_idle_timeout=timeout) as manager:
        direct = Direct(manager, server.address)
        assert await direct.call(0) == 1
        (raw,) = server.connections
        if timeout > 1:
            assert await direct.call(0) == 1
            assert len(server.connections) == 1
        elif direct.blocking:
            await asyncio.sleep(0.15)  # nobody looks at the clock until the next call
            assert await direct.call(0) == 1
            assert len(server.connections) == 2
        if timeout < 1:
            await eventually(lambda: raw.closed)
        await direct.close()


@FACES
async def test_keep_alive_interval(face: str) -> None:
    """A silent peer that answers PINGs is alive, however long the handler takes."""

    async def script(raw: Raw) -> None:
        await raw.welcome()
        stream = await raw.request()
        for _ in range(3):
            raw.send(f.ping((await raw.type(f.PING)).payload, ack=True))
        raw.answer(stream)
        await raw.until_closed()

    async with (
        raw_server(script) as server,
        managing(face, http_keep_alive_interval=0.03, http_keep_alive_timeout=5) as manager,
        known_as(manager, server.address) as client,
    ):
        assert await client.call(0) == 1


@FACES
async def test_keep_alive_timeout(face: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.welcome()
        await raw.request()
        await raw.type(f.PING)
        await raw.until_closed()

    async with (
        raw_server(script) as server,
        managing(face, http_keep_alive_interval=0.05, http_keep_alive_timeout=0.1) as manager,
    ):
        direct = Direct(manager, server.address)
        with pytest.raises(PeerLost, match=r"0\.1 s, DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS") as caught:
            await direct.call(0)
        assert caught.value.sent == "maybe"
        await direct.close()


@FACES
async def test_a_stopped_worker(face: str, start_worker: StartWorker) -> None:
    worker = start_worker(request_plane="http", http_host="127.0.0.1", http_port=0, discovery_ttl=60)
    async with managing(face, http_keep_alive_interval=0.05, http_keep_alive_timeout=0.2) as manager:
        client = await manager.client("f.w.echo")
        assert await client.call(1) == 1
        worker.signal(signal.SIGSTOP)
        with pytest.raises(PeerLost, match="no sign of life"):
            await client.call(2)
        worker.signal(signal.SIGCONT)


# Windows ---------------------------------------------------------------------------------------------------------------------


@ENGINES
@FACES
async def test_windows(face: str, engine: str) -> None:
    """Both windows as a raw peer sees them, of the server and of the client."""
    windows = {"http_engine": engine, "http_stream_window": 100000, "http_connection_window": 300000}

    async def script(raw: Raw) -> None:
        await raw.welcome()
        raw.answer(await raw.request())
        await raw.until_closed()

    async with (
        raw_server(script) as server,
        managing(face, **windows) as manager,
        known_as(manager, server.address) as client,
    ):
        assert await client.call(0) == 1
        service = await manager.serve("test.http.other", echo)
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            raw.send(f.ping(b"-answer-"))
            await raw.until(lambda frame: frame.type == f.PING and frame.ack)
            for peer in (raw, server.connections[0]):
                assert peer.settings[f.INITIAL_WINDOW_SIZE] == 100000
                updates = [frame.increment for frame in peer.seen if frame.type == f.WINDOW_UPDATE and frame.stream == 0]
                assert updates[0] == 300000 - 65535


@ENGINES
@FACES
@pytest.mark.parametrize("adaptive", [True, False])
async def test_adaptive_window_of_clients(face: str, engine: str, adaptive: bool) -> None:
    """With it, a PING measures the path, and what arrives in a round trip makes the window grow."""

    async def script(raw: Raw) -> None:
        await raw.welcome()
        stream = await raw.request()
        head = f.block([(b":status", b"200"), (b"content-type", b"application/json")])
        raw.send(f.headers(stream, head), f.data(stream, b'"' + bytes(b"x" * 14999)))
        if adaptive:
            ping = await raw.type(f.PING)
            raw.send(*(f.data(stream, b"x" * 15000) for _ in range(3)))
            raw.send(f.ping(ping.payload, ack=True))
            grown = await raw.until(lambda frame: frame.type == f.SETTINGS and not frame.ack)
            assert dict(grown.settings)[f.INITIAL_WINDOW_SIZE] >= 100000
            raw.send(f.SETTINGS_ACK)
        raw.send(f.data(stream, b'"', end=True))
        await raw.until_closed()
        assert adaptive or not any(frame.type == f.PING for frame in raw.seen)

    async with (
        raw_server(script) as server,
        managing(face, http_engine=engine, http_stream_window=65535, http_adaptive_window=adaptive) as manager,
    ):
        direct = Direct(manager, server.address)
        reply = await direct.call(0)
        assert len(reply) == (59999 if adaptive else 14999)
        (row,) = direct.stats()
        assert row["window"] > 65535 if adaptive else row["window"] == 65535
        await direct.close()


@ENGINES
@ONE_LOOP
@pytest.mark.parametrize("adaptive", [True, False])
async def test_adaptive_window_of_the_server(engine: str, adaptive: bool) -> None:
    async with managing(http_engine=engine, http_stream_window=65535, http_adaptive_window=adaptive) as manager:
        service = await manager.serve(PATH, echo)
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            raw.post(1, body=None)
            raw.send(f.data(1, b'"' + b"x" * 14999))
            if adaptive:
                ping = await raw.type(f.PING)
                raw.send(*(f.data(1, b"x" * 15000) for _ in range(3)), f.ping(ping.payload, ack=True))
                grown = await raw.until(lambda frame: frame.type == f.SETTINGS and not frame.ack)
                assert dict(grown.settings)[f.INITIAL_WINDOW_SIZE] >= 100000
                raw.send(f.SETTINGS_ACK)
            raw.send(f.data(1, b'"', end=True))
            assert (await raw.reply(1))[0] == 200
            (row,) = manager.real.server().stats()
            assert row["window"] > 65535 if adaptive else row["window"] == 65535
            assert adaptive or not any(frame.type == f.PING for frame in raw.seen)


@ENGINES
@FACES
async def test_engine(face: str, engine: str) -> None:
    async with managing(face, http_engine=engine) as manager:
        service = await manager.serve(PATH, echo)
        direct = Direct(manager, service.instance.address)
        assert await direct.call(0) == 0
        assert [row["engine"] for row in direct.stats()] == [engine]
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            raw.post(1, path="/v1/rpc", method=b"GET", body=b"")
            assert json.loads((await raw.reply(1))[2])["engine"] == engine
        await direct.close()


# The limits of every plane ---------------------------------------------------------------------------------------------------


@FACES
async def test_max_message_size_of_the_caller(face: str) -> None:
    async with managing(face) as server, managing(face, tcp_max_message_size=1000) as caller:
        await server.serve(PATH, echo)
        await server.serve("test.http.large", large)
        client = await caller.client(PATH)
        assert len(await client.call(bytes(1000))) == 1000
        with pytest.raises(MessageTooLarge, match=r"1001 bytes.*DYN_TCP_MAX_MESSAGE_SIZE") as caught:
            await client.call(bytes(1001))
        assert (caught.value.size, caught.value.limit, caught.value.sent) == (1001, 1000, "no")
        other = await caller.client("test.http.large")
        with pytest.raises(MessageTooLarge, match="DYN_TCP_MAX_MESSAGE_SIZE") as caught:
            await other.call(1001)
        assert (caught.value.size, caught.value.limit) == (1001, 1000)
        assert len(await other.call(1000)) == 1000


async def large(size: int) -> bytes:
    return bytes(size)


@FACES
async def test_max_message_size_of_the_worker(face: str) -> None:
    async with managing(face, tcp_max_message_size=1000) as server, managing(face) as caller:
        await server.serve(PATH, echo)
        client = await caller.client(PATH)
        assert len(await client.call(bytes(1000))) == 1000
        with pytest.raises(MessageTooLarge, match="DYN_TCP_MAX_MESSAGE_SIZE") as caught:
            await client.call(bytes(1001))
        assert (caught.value.size, caught.value.limit) == (1001, 1000)


@FACES
async def test_request_timeout(face: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.welcome()
        await raw.request()
        await raw.type(f.RST_STREAM)  # nobody waits any more
        await raw.until_closed()

    async with raw_server(script) as server, managing(face, tcp_request_timeout=0.2) as manager:
        direct = Direct(manager, server.address)
        with pytest.raises(DeadlineExceeded) as caught:
            await direct.call(0)
        assert (caught.value.phase, caught.value.timeout) == ("accept", 0.2)
        await eventually(lambda: any(frame.type == f.RST_STREAM for frame in server.connections[0].seen))
        await direct.close()


@FACES
async def test_connect_timeout(face: str) -> None:
    """Also for a listener that accepts and says nothing."""

    async def script(raw: Raw) -> None:
        await raw.reader.read()

    async with raw_server(script) as server, managing(face, tcp_connect_timeout=0.2) as manager:
        direct = Direct(manager, server.address)
        with pytest.raises(ConnectError, match=r"0\.2 s \(DYN_TCP_CONNECT_TIMEOUT\)") as caught:
            await direct.call(0)
        assert caught.value.sent == "no"
        await direct.close()


@FACES
async def test_token(face: str) -> None:
    async with managing(face, token="secret") as server, managing(face, token="secret") as caller:
        service = await server.serve(PATH, echo)
        address = service.instance.address
        client = await caller.client(PATH)
        assert await client.call(1) == 1
        for token, words in ((None, "no token"), ("wrong", "a wrong token")):
            async with managing(face, token=token) as stranger:
                other = await stranger.client(PATH)
                with pytest.raises(Unauthenticated, match=f"{words}.*DYNWIRE_TOKEN"):
                    await other.call(1)
        async with raw_client(address) as raw:
            await raw.greet()
            for stream, field, status in ((1, (), 401), (3, ((b"authorization", b"Bearer wrong"),), 401),
                                          (5, ((b"authorization", b"Bearer secret"),), 200),
                                          (7, ((b"authorization", b"bearer secret"),), 200)):  # fmt: skip
                raw.post(stream, *field)
                assert (await raw.reply(stream))[0] == status
            assert raw.fields[1][0][b"www-authenticate"] == b"Bearer"
            for stream, path, status in (
                (9, "/live", 200),
                (11, "/ready", 200),
                (13, "/v1/rpc", 401),
                (15, "/openapi.json", 401),
            ):
                raw.post(stream, path=path, method=b"GET", body=b"")
                assert (await raw.reply(stream))[0] == status, path
