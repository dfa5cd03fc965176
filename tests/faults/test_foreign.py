"""Foreign protocols on the port, foreign servers at the address, wrong tokens: said in words, and in time."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire import ConnectError, PlaneMismatch, Unauthenticated
from dynwire.planes.sockets import server as tcp_server
from tests.plane.faces import eventually

from .conftest import DirectClient, Managers, StartWorker, fails, in_time

pytestmark = pytest.mark.planes("tcp")  # tests/http2 and tests/attacks have the foreign peers of the http plane

only_once = pytest.mark.parametrize("face", ["async-asyncio"], indirect=True)


def address_of(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def talk(address: str, data: bytes) -> bytes:
    """Everything that the server answers until it closes the connection."""
    with socket.create_connection(address_of(address), 10) as sock:
        sock.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
        return answer


@only_once
def test_curl_gets_a_readable_answer(start_worker: StartWorker, face: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    worker = start_worker()
    done = subprocess.run([curl, "-sS", "-i", "--max-time", "10", f"http://{worker.address}/v1/models"], capture_output=True)
    assert done.returncode == 0, done.stderr
    head, _, body = done.stdout.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 ")
    assert "dynwire" in body
    assert "HTTP" in body


@only_once
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"HTTP/1.1 400"),
        (b"POST /x HTTP/1.0\r\n\r\n", b"HTTP/1.1 400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), b"dynwire"),
        (b'CONNECT {"verbose":false}\r\nPING\r\n', b"-ERR"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", b"dynwire"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300), b"\x15\x03\x01\x00\x02\x02\x46"),
        (b"\x00" * 200, b""),
        (b"\xff" * 200, b""),
        (b"garbage without an end", b""),
    ],
)
def test_foreign_clients(start_worker: StartWorker, face: str, data: bytes, words: bytes) -> None:
    worker = start_worker()
    worker.noisy = True
    assert words in talk(worker.address, data)
    assert worker.process.poll() is None
    with dynwire.NetworkManager() as manager:
        client = manager.endpoint("f.w.echo").client()
        client.wait_for_instances(1, timeout=10)
        assert client.call(1, timeout=10) == 1


@only_once
def test_a_real_tls_client(start_worker: StartWorker, face: str) -> None:
    worker = start_worker()
    worker.noisy = True
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(address_of(worker.address), 10) as sock, pytest.raises(ssl.SSLError) as caught:
        context.wrap_socket(sock)
    assert "VERSION" in str(caught.value).upper(), "an alert, not just the end of the connection"


@only_once
@pytest.mark.parametrize("said", [b"", b"DYN"])
async def test_silence_ends(managers: Managers, monkeypatch: pytest.MonkeyPatch, face: str, said: bytes) -> None:
    monkeypatch.setattr(tcp_server, "HELLO_TIMEOUT_S", 0.2)
    async with managers() as manager:

        async def echo(request: object) -> object:
            return request

        service = await manager.serve("f.here.echo", echo)
        reader, writer = await asyncio.open_connection(*address_of(service.instance.address))
        writer.write(said)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        await eventually(lambda: not service.real._runtime._server._connections)


# The other direction -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def banner_server(banner: bytes, first: bool) -> Iterator[str]:
    """Sends ``banner`` at once, or after something has come."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    ended = threading.Event()

    def work() -> None:
        open_ones = []
        while not ended.is_set():
            with contextlib.suppress(OSError):
                sock, _ = listener.accept()
                sock.settimeout(2)
                open_ones.append(sock)
                if not first:
                    sock.recv(65536)
                sock.sendall(banner)
        for sock in open_ones:
            sock.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("banner", "first", "theirs"),
    [
        (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", False, "HTTP"),
        (b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576} \r\n', True, "NATS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", True, "SSH"),
        pytest.param(b"\x15\x03\x01\x00\x02\x02\x46", False, "TLS"),
        (b"220 mail.example ESMTP ready\r\n", True, ""),
        (bytes(64), True, ""),
    ],
)
async def test_foreign_servers(managers: Managers, banner: bytes, first: bool, theirs: str) -> None:
    with banner_server(banner, first) as address:
        async with managers() as manager:
            for timeout in (10.0, 10.0):
                error, seconds = await fails(
                    DirectClient(manager, "f.w.echo", address).call(1, timeout), (PlaneMismatch, dynwire.ProtocolError)
                )
                assert seconds < 2.5, "found out by the connect timeout only"
                assert error.sent == "no"
                if theirs:
                    assert isinstance(error, PlaneMismatch), error
                    assert theirs in error.theirs
                    assert address in str(error) or error.peer == address


async def test_a_closed_port(managers: Managers, free_port: int) -> None:
    async with managers() as manager:
        address = f"127.0.0.1:{free_port}"
        error, seconds = await fails(DirectClient(manager, "f.w.echo", address).call(1), ConnectError)
        assert seconds < 2
        assert "refused" in str(error)
        assert address in str(error)
        assert (error.sent, error.retryable, error.peer) == ("no", True, address)


@pytest.mark.parametrize("kind", ["silent", "full"])
async def test_a_port_that_swallows(managers: Managers, kind: str) -> None:
    """A listener that never speaks, and one whose backlog is full: ConnectError within the connect timeout, in words."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0 if kind == "full" else 16)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(4 if kind == "full" else 0):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        async with managers(tcp_connect_timeout=0.6) as manager:
            error, seconds = await fails(DirectClient(manager, "f.w.echo", address).call(1), ConnectError)
            in_time(seconds, 0.6)
            assert "DYN_TCP_CONNECT_TIMEOUT" in str(error)
            assert error.sent == "no"


@pytest.mark.parametrize("token", ["wrong", None])
async def test_tokens(managers: Managers, start_worker: StartWorker, face: str, token: str | None) -> None:
    worker = start_worker(token="secret")
    async with managers(token=token) as manager:
        error, seconds = await fails(DirectClient(manager, "f.w.echo", worker.address).call(1), Unauthenticated)
        assert seconds < 2.5
        assert error.sent == "no"
        assert "secret" not in str(error)
        assert "DYNWIRE_TOKEN" in str(error)
    async with managers(token="secret") as manager:
        assert await DirectClient(manager, "f.w.echo", worker.address).call(1) == 1


@pytest.mark.parametrize("face", ["async-asyncio", "async-uvloop"], indirect=True)
async def test_refused_connections_are_forgotten(start_worker: StartWorker, face: str) -> None:
    worker = start_worker(token="secret")
    async with dynwire.AsyncNetworkManager(token="wrong") as manager:
        plane: Any = manager.create_client()
        channel = plane.channel(dynwire.Instance(1, "f", "w", "echo", "tcp", worker.address))
        for _ in range(5):
            with contextlib.suppress(dynwire.DynwireError):
                await channel.connect()
        await asyncio.sleep(0)
        assert len(plane.stats()[worker.address]) == 0


@only_once
def test_the_token_is_nowhere_in_the_workers_output(start_worker: StartWorker, face: str, tmp_path: Path) -> None:
    worker = start_worker(token="hushhush")
    worker.noisy = True
    talk(worker.address, b"GET / HTTP/1.1\r\n\r\n")
    assert "hushhush" not in worker.errors.read_text()
