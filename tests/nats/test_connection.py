"""Connecting to NATS, sharing the connection, moving to another server, and what is said when it does not work."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynwire._natsproto import CLOSED, DOWN, UP
from dynwire.config import NatsConfig
from dynwire.errors import ConfigError, ConnectError, DynwireError, ManagerClosed, PermissionDenied, Unauthenticated
from dynwire.nats import NatsConnection
from dynwire.nats import connection as connection_module
from dynwire.nats.credentials import Operator, new_user_seed
from dynwire.nats.server import NatsCluster, NatsServer, ServerTls, find_binary, free_port

from .kept import WAIT_S, Inbox, connected, eventually

nats = pytest.importorskip("nats")


@pytest.fixture(autouse=True)
def needs_the_program() -> None:
    try:
        find_binary()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["fast", "plain"])
def port(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with NatsServer(monitor=True) as one:
        yield one


def config(url: str, **settings: Any) -> NatsConfig:
    return NatsConfig(servers=tuple(url.split(",")), **settings)


async def works(connection: NatsConnection) -> None:
    inbox = Inbox()
    subscription = await connection.subscribe("works", inbox.sink)
    connection.port.send(b"works", b"yes")
    await inbox.count(1)
    subscription.unsubscribe()


async def refused(settings: NatsConfig, kind: type[DynwireError], timeout: float = WAIT_S) -> DynwireError:
    with pytest.raises(kind) as caught:
        await NatsConnection.acquire(settings, timeout)
    assert not connection_module._shared
    return caught.value


# --- sharing


async def test_shared_and_counted(server: NatsServer, port: str) -> None:
    first = await NatsConnection.acquire(config(server.url, port=port))
    second, third = await asyncio.gather(*(NatsConnection.acquire(config(server.url, port=port)) for _ in range(2)))
    other = await NatsConnection.acquire(config(server.url, port=port, ping_interval=7.0))
    assert first is second is third and other is not first
    await first.release()
    await second.release()
    await works(third)
    await third.release()
    assert third.port.state == CLOSED and other.up
    again = await NatsConnection.acquire(config(server.url, port=port))
    assert again is not first
    await works(again)
    await again.release()
    await other.release()
    for use in (third.wait_up(1.0), third.subscribe("a", Inbox().sink)):
        with pytest.raises(ManagerClosed):
            await use


async def test_everybody_who_waits_gets_the_connection_or_the_error(port: str) -> None:
    place = free_port()
    url = f"nats://127.0.0.1:{place}"
    waiting = [asyncio.create_task(NatsConnection.acquire(config(url, port=port, connect_timeout=WAIT_S))) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # the one who began it
    await asyncio.wait([waiting[0]])
    with NatsServer(port=place):
        connections = await asyncio.gather(*waiting[1:])
        assert connections[0] is connections[1]
        await works(connections[0])
        for connection in connections:
            await connection.release()
    failing = [NatsConnection.acquire(config(url, port=port, connect_timeout=0.2)) for _ in range(3)]
    errors = await asyncio.gather(*failing, return_exceptions=True)
    assert [type(error) for error in errors] == [ConnectError] * 3
    given_up = asyncio.create_task(NatsConnection.acquire(config(url, port=port, connect_timeout=WAIT_S)))
    await asyncio.sleep(0.05)
    given_up.cancel()
    await asyncio.wait([given_up])
    assert given_up.cancelled() and not connection_module._shared


async def test_its_name_tells_who_it_is(server: NatsServer) -> None:
    import json

    from dynwire.nats.server import fetch

    connection = await NatsConnection.acquire(config(server.url), purpose="worker")
    page = await asyncio.to_thread(fetch, f"{server.monitor_url}/connz")
    names = [entry.get("name") for entry in json.loads(page[1])["connections"]]
    assert f"dynwire worker {socket.gethostname()} {os.getpid()}" in names
    assert connection.server_info["server_name"] == server.name and connection.url == server.url
    await connection.release()


def test_two_loops_have_their_own(server: NatsServer) -> None:
    found = []

    async def main() -> None:
        async with connected(server.url) as connection:
            found.append(connection)

    asyncio.run(main())
    asyncio.run(main())
    assert found[0] is not found[1]


def test_a_fork_leaves_the_connection_alone(server: NatsServer, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        connection = runner.run(NatsConnection.acquire(config(server.url)))
        inbox = Inbox()
        subscription = runner.run(connection.subscribe("fork", inbox.sink))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert not connection_module._shared
                with asyncio.Runner(loop_factory=loop_factory) as own:

                    async def use() -> None:
                        async with connected(server.url) as mine:
                            assert mine is not connection
                            mine.port.send(b"fork", b"from the child")
                            await mine.client.flush()

                    own.run(use())
                    code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0

        async def check() -> None:
            connection.port.send(b"fork", b"from the parent")
            await inbox.count(2)
            assert sorted(inbox.payloads) == [b"from the child", b"from the parent"]
            assert inbox.states == []
            subscription.unsubscribe()
            await connection.release()

        runner.run(check())


# --- which port


async def test_plain_when_asked_without_a_word(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(server.url, port="plain") as connection:
        assert not connection.port.fast
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["2.15.0", "2.17.0", "3.0.0", "2.16.0rc1"])
async def test_other_versions_of_nats_py(
    server: NatsServer, version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nats.aio.client.__version__", version)
    async with connected(server.url) as connection:
        assert connection.port.fast is version.startswith("2.16")
        await works(connection)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (0 if version.startswith("2.16") else 1)
    assert all(version in text and "slower" in text for text in warned)


@pytest.mark.filterwarnings("ignore:parameter 'timeout' of type:DeprecationWarning")  # how nats-py calls aiohttp
async def test_web_sockets_take_the_plain_port(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("aiohttp")
    place = free_port()
    with NatsServer(config=f'websocket {{ port: {place}, host: "127.0.0.1", no_tls: true }}'):
        async with connected(f"ws://127.0.0.1:{place}") as connection:
            assert not connection.port.fast
            await works(connection)
    assert "WebSocket" in caplog.text


# --- credentials

SECRET = "s3cret-value"


@pytest.mark.parametrize("kind", ["userpass", "token", "nkey", "credentials_file", "url", "url token"])
async def test_credentials(kind: str, port: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The right ones work, wrong ones are an error that names the setting and no secret, as is having none."""
    caplog.set_level(logging.DEBUG, "dynwire")
    seed, wrong_seed = new_user_seed(), new_user_seed()
    operator, stranger = Operator(), Operator()
    files = [one.write_credentials(tmp_path / f"{i}.creds") for i, one in enumerate((operator, stranger))]
    server, right, wrong, setting = {
        "userpass": (
            {"username": "u", "password": SECRET},
            {"username": "u", "password": SECRET},
            {"username": "u", "password": SECRET + "x"},
            "NATS_AUTH_PASSWORD",
        ),
        "token": ({"token": SECRET}, {"token": SECRET}, {"token": SECRET + "x"}, "NATS_AUTH_TOKEN"),
        "nkey": ({"nkey": seed}, {"nkey": seed}, {"nkey": wrong_seed}, "NATS_AUTH_NKEY"),
        "credentials_file": (
            {"operator": operator},
            {"credentials_file": files[0]},
            {"credentials_file": files[1]},
            "NATS_AUTH_CREDENTIALS_FILE",
        ),
        "url": ({"username": "u", "password": SECRET}, f"u:{SECRET}", f"u:{SECRET}x", "NATS_SERVER"),
        "url token": ({"token": SECRET}, SECRET, SECRET + "x", "NATS_SERVER"),
    }[kind]
    arguments: Any = server

    def settings(given: Any) -> NatsConfig:
        if isinstance(given, str):
            return config(running.url.replace("://", f"://{given}@"), port=port)
        return config(running.url, port=port, **given)

    with NatsServer(**arguments) as running:
        connection = await NatsConnection.acquire(settings(right))
        await works(connection)
        assert SECRET not in repr(connection) + connection.url and seed not in repr(connection)
        await connection.release()
        error = await refused(settings(wrong), Unauthenticated)
        assert setting in str(error) and f"127.0.0.1:{running.port} (NATS_SERVER)" in str(error)
        nothing = await refused(config(running.url, port=port), Unauthenticated)
        assert "none are set" in str(nothing)
    shown = str(error) + repr(error.to_dict()) + str(nothing) + caplog.text + repr(error.__cause__)
    for secret in (SECRET, seed, wrong_seed):
        assert secret not in shown


async def test_credentials_that_cannot_be_any(tmp_path: Path) -> None:
    broken = tmp_path / "broken.creds"
    broken.write_text(f"-----BEGIN NATS USER JWT-----\n{SECRET}\n")
    for settings, name in (
        ({"nkey": SECRET}, "NATS_AUTH_NKEY"),
        ({"credentials_file": str(tmp_path / "absent")}, "NATS_AUTH_CREDENTIALS_FILE"),
        ({"credentials_file": str(broken)}, "NATS_AUTH_CREDENTIALS_FILE"),
        ({"tls_ca": str(tmp_path / "absent")}, "DYNWIRE_NATS_TLS_CA"),
        ({"tls_cert": str(broken)}, "DYNWIRE_NATS_TLS_CERT"),
    ):
        error = await refused(config("nats://127.0.0.1:1", **settings), ConfigError)
        assert name in str(error) and SECRET not in str(error)


async def test_credentials_of_the_url_are_for_the_whole_cluster(port: str) -> None:
    with NatsCluster(2, username="u", password=SECRET) as cluster:
        url = cluster.servers[0].url.replace("://", f"://u:{SECRET}@")
        async with connected(url, port=port) as connection:
            await eventually(lambda: len(connection.client.servers) == 2)
            await asyncio.to_thread(cluster.servers[0].kill)
            await eventually(lambda: not connection.up)
            await connection.wait_up(WAIT_S)
            assert connection.url == cluster.servers[1].url
            await works(connection)


@pytest.mark.parametrize("how", ["restart", "reload"])
async def test_credentials_taken_away_and_given_back(port: str, how: str) -> None:
    """nats-py closes for good when a server tells it that its user was revoked."""

    def change(password: str) -> None:
        server._password = password
        if how == "restart":
            server.restart()
        else:
            Path(server.directory, "server.conf").write_text(server._render())
            server.reload()

    with NatsServer(username="u", password="a") as server:
        async with connected(server.url, port=port, username="u", password="a") as connection:
            states: list[tuple[int, BaseException | None]] = []
            connection.on_state(lambda *change: states.append(change))
            await asyncio.to_thread(change, "b")
            await eventually(lambda: not connection.up)
            with pytest.raises(Unauthenticated):
                await connection.wait_up(0.5)
            await asyncio.to_thread(change, "a")
            await connection.wait_up(WAIT_S)
            await works(connection)
            assert [state for state, _ in states] == [DOWN, UP]


# --- what the server does not allow

PERMISSIONS = (
    'authorization { users: [{ user: "u", password: "p", permissions: { publish: ["ok.>", "_INBOX.>"], subscribe: ["ok.>"] } }] }'
)


async def test_permissions(port: str, caplog: pytest.LogCaptureFixture) -> None:
    with NatsServer(config=PERMISSIONS) as server:
        async with connected(server.url, port=port, username="u", password="p") as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("ok.A", inbox.sink)
            with pytest.raises(PermissionDenied, match=r"subscribe to 'not\.B'") as caught:
                await connection.subscribe("not.B", Inbox().sink)
            assert caught.value.details == {"operation": "subscription", "subject": "not.B"}
            for _ in range(3):
                connection.port.send(b"not.C", b"x")
            connection.port.send(b"ok.A", b"y")
            await inbox.until(lambda: inbox.messages and len(inbox.states) >= 3)
            assert {state for state, _ in inbox.states} == {UP}
            errors = [error for _, error in inbox.states if isinstance(error, PermissionDenied)]
            assert any(error.details["operation"] == "publish" for error in errors)
            assert {error.details["subject"].lower() for error in errors} <= {"not.b", "not.c"}
            assert connection.up
            subscription.unsubscribe()
    assert caplog.text.lower().count("publish to 'not.c'") == 1, "once per subject"


# --- TLS


@pytest.mark.parametrize("scheme", ["tls", "nats"])
@pytest.mark.parametrize("first", [False, True], ids=["upgrade", "handshake first"])
async def test_tls(authority: dict[str, str], port: str, scheme: str, first: bool) -> None:
    tls = ServerTls(authority["server"], authority["server_key"])
    settings = {"port": port, "tls_ca": authority["ca"], "tls_handshake_first": first}
    if first:
        extra = f'tls {{ cert_file: "{tls.cert}", key_file: "{tls.key}", handshake_first: true }}'
        server = NatsServer(config=extra, max_payload=4 << 20)
    else:
        server = NatsServer(tls=tls, max_payload=4 << 20)
    with server:
        url = f"{scheme}://127.0.0.1:{server.port}"
        async with connected(url, **settings) as connection:
            await works(connection)
            if port == "fast":
                assert connection.port.socket is not None and connection.port.socket.tls
            inbox = Inbox()
            subscription = await connection.subscribe("big", inbox.sink)
            for i in range(40):
                connection.port.send(b"big", bytes([i]) * 300000)
            await inbox.count(40)
            assert inbox.payloads == [bytes([i]) * 300000 for i in range(40)]
            await asyncio.to_thread(server.restart)
            await inbox.until(lambda: inbox.states)
            await connection.wait_up(WAIT_S)
            await works(connection)
            subscription.unsubscribe()


async def test_tls_that_is_not_trusted(authority: dict[str, str], port: str) -> None:
    with NatsServer(tls=ServerTls(authority["server"], authority["server_key"])) as server:
        for ca in ({"tls_ca": authority["other"]}, {}):
            error = await refused(config(server.url, port=port, wait=False, **ca), ConnectError)
            assert "DYNWIRE_NATS_TLS_CA" in str(error) and "NATS_SERVER" in str(error)
            assert isinstance(error.__cause__, ssl.SSLError)


async def test_tls_with_our_certificate(authority: dict[str, str], port: str) -> None:
    tls = ServerTls(authority["server"], authority["server_key"], authority["ca"], verify=True)
    with NatsServer(tls=tls) as server:
        ours = {"tls_cert": authority["client"], "tls_key": authority["client_key"]}
        async with connected(server.url, port=port, tls_ca=authority["ca"], **ours) as connection:
            await works(connection)
        await refused(config(server.url, port=port, wait=False, tls_ca=authority["ca"]), ConnectError)


async def test_no_credentials_in_the_clear_where_tls_was_asked_for() -> None:
    """nats-py 2.16 sends them when the server, or whoever is in its place, does not mention TLS."""
    received = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        writer.write(b'INFO {"server_id":"x","version":"2.0.0","max_payload":1000,"headers":true,"auth_required":true}\r\n')
        received += await reader.read(1000)
        writer.close()

    impostor = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"tls://127.0.0.1:{impostor.sockets[0].getsockname()[1]}"
    error = await refused(config(url, token=SECRET, wait=False), ConnectError)
    assert "does not offer it" in str(error)
    assert received == b""
    impostor.close()
    await impostor.wait_closed()


async def test_bytes_before_the_handshake_are_refused(authority: dict[str, str]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.0.0","max_payload":1000,"tls_required":true}\r\nPONG\r\n')
        await reader.read(1000)
        writer.close()

    impostor = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"tls://127.0.0.1:{impostor.sockets[0].getsockname()[1]}"
    error = await refused(config(url, tls_ca=authority["ca"], wait=False), ConnectError)
    assert "before the TLS handshake" in str(error)
    impostor.close()
    await impostor.wait_closed()


# --- no server, several servers


async def test_no_server(port: str) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    for settings in ({"wait": False, "connect_timeout": WAIT_S}, {"wait": True, "connect_timeout": 0.3}):
        error = await refused(config(url, port=port, **settings), ConnectError)
        assert url in str(error) and "NATS_SERVER" in str(error) and "refused" in str(error).lower()
        assert error.sent == "no" and error.retryable
    error = await refused(config(url, port=port), ConnectError, timeout=0.2)
    assert "0.2 s" in str(error)


async def test_a_server_that_says_nothing(port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        for wait in (False, True):
            error = await refused(config(url, port=port, wait=wait, connect_timeout=0.3), ConnectError)
            assert "answer" in str(error) and url in str(error)


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {not json}\r\n", b"x" * 200000])
async def test_something_else_than_nats(port: str, greeting: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    other = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{other.sockets[0].getsockname()[1]}"
    await refused(config(url, port=port, wait=False, connect_timeout=5.0), ConnectError)
    other.close()
    await other.wait_closed()


async def test_a_name_that_nobody_has(port: str) -> None:
    error = await refused(config("nats://no-such-host.invalid:4222", port=port, wait=False), ConnectError)
    assert "no-such-host.invalid" in str(error)


async def test_starts_before_its_server(port: str) -> None:
    place = free_port()
    connecting = asyncio.create_task(
        NatsConnection.acquire(config(f"nats://127.0.0.1:{place}", port=port, connect_timeout=WAIT_S))
    )
    await asyncio.sleep(0.2)
    with NatsServer(port=place):
        connection = await connecting
        await works(connection)
        await connection.release()


async def test_the_first_server_is_absent(server: NatsServer, port: str) -> None:
    url = f"nats://127.0.0.1:{free_port()},{server.url}"
    for wait in (True, False):
        async with connected(url, port=port, wait=wait) as connection:
            assert connection.url == server.url
            await works(connection)


async def test_one_of_three_is_lost(port: str) -> None:
    with NatsCluster(3) as cluster:
        async with connected(cluster.servers[0].url, port=port) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            await eventually(lambda: len(connection.client.servers) == 3)
            await asyncio.to_thread(cluster.servers[0].kill)
            await inbox.until(lambda: [state for state, _ in inbox.states] == [DOWN, UP])
            assert connection.url in {one.url for one in cluster.servers[1:]}
            await works(connection)
            subscription.unsubscribe()


async def test_attempts_that_failed_leave_no_socket(port: str) -> None:
    accepted = 0
    opened: set[asyncio.StreamWriter] = set()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        opened.add(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        opened.remove(writer)
        writer.close()

    with NatsServer() as server:
        async with connected(server.url, port=port, connect_timeout=0.1) as connection:
            await asyncio.to_thread(server.kill)
            silent = await asyncio.start_server(say_nothing, "127.0.0.1", server.port)
            await eventually(lambda: accepted >= 4)
            await eventually(lambda: len(opened) <= 1)
            assert not connection.up
        silent.close()
        await silent.wait_closed()


async def test_released_after_nats_py_has_closed_it(server: NatsServer, port: str) -> None:
    connection = await NatsConnection.acquire(config(server.url, port=port))
    states: list[int] = []
    connection.on_state(lambda state, error: states.append(state))
    await connection.client.close()
    await eventually(lambda: states == [CLOSED])
    with pytest.raises(ManagerClosed):
        connection.port.send(b"a", b"")
    async with connected(server.url, port=port) as another:
        assert another is not connection
        await works(another)
    await connection.release()


# --- lame duck


async def test_a_server_that_is_going_to_stop_is_left(port: str, caplog: pytest.LogCaptureFixture) -> None:
    # it would send its clients away much later
    with NatsCluster(2, config='lame_duck_duration: "120s"\nlame_duck_grace_period: "60s"', stop_timeout=0.5) as cluster:
        async with connected(cluster.servers[0].url, port=port) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            await eventually(lambda: len(connection.client.servers) == 2)
            with caplog.at_level(logging.INFO, "dynwire.nats"):
                cluster.servers[0].lame_duck()
                await inbox.until(lambda: [state for state, _ in inbox.states] == [DOWN, UP])
            assert connection.url == cluster.servers[1].url
            assert "moving to another one" in caplog.text
            await works(connection)
            subscription.unsubscribe()


async def test_a_lone_server_is_used_until_it_stops(port: str, caplog: pytest.LogCaptureFixture) -> None:
    with NatsServer() as server:
        async with connected(server.url, port=port) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            server.lame_duck()
            await eventually(lambda: "no other one is known" in caplog.text)
            connection.port.send(b"a", b"still there")
            await inbox.count(1)
            await inbox.until(lambda: inbox.states)
            await asyncio.to_thread(server.wait_ended, WAIT_S)
            await asyncio.to_thread(server.start)
            await connection.wait_up(WAIT_S)
            await works(connection)
            subscription.unsubscribe()


# --- time


def test_the_pauses_between_attempts(server: NatsServer) -> None:
    """50 ms after the first loss, doubling, never above what recovery within a second leaves; the lost server comes last."""

    class FakeServer:
        def __init__(self, name: str) -> None:
            self.uri = connection_module.urlsplit(f"nats://{name}")

    async def main() -> None:
        async with connected(server.url) as connection:
            pool: Any = [FakeServer("a:1"), FakeServer("b:1"), FakeServer("c:1")]
            connection._lost_server = "b:1"
            chosen, delays = [], []
            for _ in range(30):
                one, delay = connection._next_server(pool, {})
                assert one is not None
                chosen.append(one.uri.netloc)
                delays.append(delay)
            for at in range(0, 30, 3):
                assert {*chosen[at : at + 3]} == {"a:1", "b:1", "c:1"}
                assert chosen[at + 2] == "b:1"
                assert delays[at] > 0 and delays[at + 1] == 0, "a round has one pause"
            assert delays[0] <= 0.05
            assert max(delays) <= 0.8
            connection._tries.clear()
            alone = [connection._next_server(pool[:1], {})[1] for _ in range(10)]
            assert 0.025 <= alone[0] <= 0.05 and 0.4 <= alone[-1] <= 0.8

    asyncio.run(main())


async def test_cancelled_by_its_owner_while_connecting(port: str) -> None:
    """Ctrl-C, or a timeout around it."""
    with NatsServer() as server:
        server.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await NatsConnection.acquire(config(server.url, port=port, connect_timeout=WAIT_S))
        assert not connection_module._shared
        server.resume()
        assert signal.SIGCONT
