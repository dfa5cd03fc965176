"""What callers do not see: GOAWAY, used-up stream ids, REFUSED_STREAM. And what they do: one error that names both planes."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

import dynwire
from dynwire import ConnectError, PeerLost, PlaneMismatch
from dynwire.planes.http.async_client import HttpDialler
from dynwire.planes.http.client import HttpClient
from tests.plane.faces import PATIENCE_S, eventually

from . import frames as f
from .live import ENGINES, FACES, ONE_LOOP, PATH, Direct, Raw, h1, known_as, managing, outcome, raw_client, raw_server

pytestmark = pytest.mark.usefixtures("discovery_dir")


async def echo(request: Any) -> Any:
    return request


@ENGINES
@FACES
async def test_goaway_in_the_middle_of_many_calls(face: str, engine: str) -> None:
    """Calls up to its last id are answered on the old connection, the others are repeated on a new one."""
    connections = 0

    async def script(raw: Raw) -> None:
        nonlocal connections
        connections += 1
        first = connections == 1
        await raw.welcome()
        streams: list[int] = []
        while (frame := await raw.next()) is not None:
            if not frame.end_stream:
                continue
            if not first:
                raw.answer(frame.stream, b"2")
                continue
            streams.append(frame.stream)
            if len(streams) == 20:
                raw.send(f.goaway(streams[9], f.NO_ERROR, b"moving"))
                for stream in streams[:10]:
                    raw.answer(stream, b"1")

    async with (
        raw_server(script) as server,
        managing(face, http_engine=engine, tcp_pool_size=1) as manager,
        known_as(manager, server.address) as client,
    ):
        results = await asyncio.gather(*(client.call(i) for i in range(20)))
        assert (results.count(1), results.count(2)) == (10, 10)
        assert await client.call(0) == 2
        assert connections == 2


@ENGINES
@FACES
async def test_a_worker_that_leaves_while_it_is_called(face: str, engine: str) -> None:
    """GOAWAY of our own server when it drains: callers go to the other worker and notice nothing."""
    ran: list[int] = []

    async def handler(request: int) -> int:
        ran.append(request)
        await asyncio.sleep(0)
        return request

    async with managing(face, http_engine=engine) as stays, managing(face, http_engine=engine) as caller:
        async with managing(face, http_engine=engine) as leaves:
            await leaves.serve(PATH, handler)
            await stays.serve(PATH, handler)
            client = await caller.client(PATH, wait=2)
            calls = [asyncio.create_task(client.call(i)) for i in range(200)]
            await eventually(lambda: len(ran) > 20)
            await leaves.close(PATIENCE_S)
            assert await asyncio.gather(*calls) == list(range(200))
        assert sorted(ran) == list(range(200)), "each ran once"


@ENGINES
@FACES
async def test_used_up_stream_ids(face: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ids before its end a connection takes three requests, then the next connection does; callers notice nothing."""
    for cls, name in ((HttpDialler, "connection"), (HttpClient, "make_connection")):
        make = getattr(cls, name)

        def near_the_end(*args: Any, make: Any = make) -> Any:
            connection = make(*args)
            connection.engine.next_id = (1 << 30) - 5
            return connection

        monkeypatch.setattr(cls, name, near_the_end)

    async with (
        raw_server(answering) as server,
        managing(face, http_engine=engine) as manager,
        known_as(manager, server.address) as client,
    ):
        for _ in range(7):
            assert await client.call(0) == 1
        assert await asyncio.gather(*(client.call(0) for _ in range(20))) == [1] * 20
        used = [[frame.stream for frame in raw.seen if frame.end_stream] for raw in server.connections]
        assert sum(map(len, used)) == 27
        assert all(streams == [2**30 - 5, 2**30 - 3, 2**30 - 1][: len(streams)] for streams in used)


async def answering(raw: Raw) -> None:
    await raw.welcome()
    while (frame := await raw.next()) is not None:
        if frame.end_stream:
            raw.answer(frame.stream)


@ENGINES
@FACES
async def test_goaway_with_an_error(face: str, engine: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.welcome()
        await raw.request()
        raw.send(f.goaway(0x7FFFFFFF, f.ENHANCE_YOUR_CALM, b"too_many_resets"))
        await raw.until_closed()

    async with raw_server(script) as server, managing(face, http_engine=engine) as manager:
        direct = Direct(manager, server.address)
        error = await outcome(direct.call(0))
        assert isinstance(error, dynwire.Overloaded)
        assert "ENHANCE_YOUR_CALM (too_many_resets)" in str(error)
        assert error.sent == "maybe", "it is not known what the server did with the request"
        await direct.close()


@ENGINES
@FACES
async def test_refused_streams_are_repeated(face: str, engine: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.welcome()
        refused = 0
        while (frame := await raw.next()) is not None:
            if not frame.end_stream:
                continue
            if refused < 2:
                refused += 1
                raw.send(f.rst_stream(frame.stream, f.REFUSED_STREAM))
            else:
                raw.answer(frame.stream)

    async with (
        raw_server(script) as server,
        managing(face, http_engine=engine) as manager,
        known_as(manager, server.address) as client,
    ):
        assert await client.call(0) == 1
        resets = [frame for raw in server.connections for frame in raw.seen if frame.end_stream]
        assert len(resets) == 3


@ENGINES
@FACES
async def test_other_resets_are_not_repeated(face: str, engine: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.welcome()
        raw.send(f.rst_stream(await raw.request(), f.INTERNAL_ERROR))
        await raw.until_closed()

    async with (
        raw_server(script) as server,
        managing(face, http_engine=engine) as manager,
        known_as(manager, server.address) as client,
    ):
        error = await outcome(client.call(0))
        assert isinstance(error, PeerLost)
        assert error.sent == "maybe"
        assert "INTERNAL_ERROR" in str(error)
        assert sum(frame.end_stream for raw in server.connections for frame in raw.seen) == 1


# Other planes, other protocols -----------------------------------------------------------------------------------------------


@FACES
@pytest.mark.parametrize(("ours", "theirs"), [("tcp", "http"), ("http", "tcp")])
async def test_discovery_says_another_plane(face: str, ours: str, theirs: str) -> None:
    async with managing(face, request_plane=theirs) as server, managing(face, request_plane=ours) as caller:
        await server.serve(PATH, echo)
        client = await caller.client(PATH, wait=0)
        for error in (await outcome(client.wait_for_instances(timeout=0.1)), await outcome(client.call(1))):
            assert isinstance(error, PlaneMismatch), error
            assert (error.ours, error.theirs) == (ours, theirs)
            assert all(word in str(error) for word in (ours, theirs, "DYN_REQUEST_PLANE"))


@FACES
async def test_a_tcp_client_at_an_http_server(face: str) -> None:
    async with managing(face) as server, managing(face, request_plane="tcp") as caller:
        service = await server.serve(PATH, echo)
        address = service.instance.address.removeprefix("http://").removesuffix("/v1/rpc")
        async with known_as(caller, address, plane="tcp", path="test.http.misled") as client:
            error = await outcome(client.call(1))
        assert isinstance(error, PlaneMismatch), error
        assert "DYN_REQUEST_PLANE" in str(error)
        assert "tcp" in str(error)
        assert "http" in str(error).lower()


@FACES
async def test_an_http_client_at_a_tcp_server(face: str) -> None:
    async with managing(face, request_plane="tcp") as server, managing(face) as caller:
        service = await server.serve(PATH, echo)
        async with known_as(caller, f"http://{service.instance.address}/v1/rpc", path="test.http.misled") as client:
            error = await outcome(client.call(1))
        assert isinstance(error, PlaneMismatch), error
        assert "DYN_REQUEST_PLANE" in str(error)
        assert "http" in str(error)
        assert "tcp" in str(error)


@FACES
@pytest.mark.parametrize(
    ("first", "code", "words"),
    [
        (f.frame(f.SETTINGS, 0, 1, bytes(6)), f.PROTOCOL_ERROR, "SETTINGS on a stream"),
        (f.frame(f.SETTINGS, f.ACK, 0, b"\0"), f.FRAME_SIZE_ERROR, "its acknowledgement none"),
    ],
    ids=["on-a-stream", "acknowledgement"],
)
async def test_a_server_that_begins_with_a_wrong_frame(face: str, first: bytes, code: int, words: str) -> None:
    """It speaks HTTP/2, so it is not said to be on another plane, and it is told by GOAWAY what was wrong."""
    said: list[f.Frame] = []

    async def script(raw: Raw) -> None:
        assert await raw.reader.readexactly(len(f.PREFACE)) == f.PREFACE
        raw.send(first)
        said.append(await raw.type(f.GOAWAY))

    async with raw_server(script) as server, managing(face) as manager:
        direct = Direct(manager, server.address)
        error = await outcome(direct.call(0))
        assert isinstance(error, dynwire.ProtocolError), error
        assert words in str(error) and server.address in str(error)
        await eventually(lambda: said)
        assert int.from_bytes(said[0].payload[4:8], "big") == code
        await direct.close()


@ONE_LOOP
async def test_bytes_that_come_too_late_do_not_reset_the_connection(
    monkeypatch: pytest.MonkeyPatch, loop_factory: object
) -> None:
    """A reset can overtake the GOAWAY before it: the server sees GOAWAY, then the end."""
    servers: list[Raw] = []
    make = HttpDialler.connection

    class Socket(socket.socket):
        def close(self) -> None:
            servers[0].send(f.ping())
            super().close()

    def connection(dialler: HttpDialler, loop: asyncio.AbstractEventLoop, sock: socket.socket, address: str) -> Any:
        return make(dialler, loop, Socket(fileno=sock.detach()), address)

    monkeypatch.setattr(HttpDialler, "connection", connection)
    got = bytearray()

    async def script(raw: Raw) -> None:
        servers.append(raw)
        await raw.welcome()
        raw.send(f.frame(f.PING, 0, 1, bytes(8)))
        while data := await raw.reader.read(65536):
            got.extend(data)

    async with raw_server(script) as server, managing() as manager:
        direct = Direct(manager, server.address)
        assert isinstance(await outcome(direct.call(0)), dynwire.ProtocolError)
        await eventually(lambda: b"PING on a stream" in got)
        await direct.close()


NATS = b'INFO {"server_id":"X","version":"2.10.0","proto":1,"max_payload":1048576}\r\n'
HTTP1 = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@ENGINES
@FACES
@pytest.mark.parametrize(
    ("banner", "words"),
    [(NATS, "NATS"), (HTTP1, "HTTP/1"), (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"), (b"220 mail ESMTP\r\n", "DYN_REQUEST_PLANE")],
    ids=["nats", "http1", "ssh", "smtp"],
)
async def test_foreign_servers(face: str, engine: str, banner: bytes, words: str) -> None:
    async def script(raw: Raw) -> None:
        if banner is HTTP1:
            await raw.reader.readuntil(b"\r\n\r\n")
        raw.send(banner)
        await raw.reader.read()

    async with raw_server(script) as server, managing(face, http_engine=engine) as manager:
        direct = Direct(manager, server.address)
        started = asyncio.get_running_loop().time()
        error = await outcome(direct.call(0))
        assert isinstance(error, PlaneMismatch), error
        assert words in str(error)
        assert "DYN_REQUEST_PLANE" in str(error)
        assert error.sent == "no"
        assert asyncio.get_running_loop().time() - started < 2.5, "not by the connect timeout"
        await direct.close()


@FACES
async def test_a_server_that_hangs_up(face: str) -> None:
    async def script(raw: Raw) -> None:
        await raw.reader.readexactly(len(f.PREFACE))

    async with raw_server(script) as server, managing(face) as manager:
        direct = Direct(manager, server.address)
        error = await outcome(direct.call(0))
        assert isinstance(error, ConnectError)
        assert "during the handshake" in str(error)
        assert "DYN_REQUEST_PLANE" in str(error)
        await direct.close()


@ONE_LOOP
@pytest.mark.parametrize(
    ("data", "words"),
    [(b'CONNECT {"verbose":false}\r\nPING\r\n', b""), (b"SSH-2.0-x\r\n", b""), (b"\x16\x03\x01\x02\x00\x01" + bytes(300), b"")],
    ids=["nats", "ssh", "tls"],
)
async def test_foreign_clients(data: bytes, words: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The connection is closed, the log says why, and others are served."""
    async with managing() as manager:
        service = await manager.serve(PATH, echo)
        await h1(service.instance.address, data)
        assert any("DYN_REQUEST_PLANE" in record.getMessage() for record in caplog.records)
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            raw.post(1)
            assert (await raw.reply(1))[0] == 200
