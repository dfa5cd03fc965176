"""The system port (``DYN_SYSTEM_PORT``): one per process, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire import system
from dynwire.errors import BindError, ConfigError
from dynwire.runtime import Report, Served
from dynwire.types import Instance

ENDPOINT = "demo.worker.generate"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"system_system_port": 0, "discovery_file_dir": str(tmp_path), "tcp_host": "127.0.0.1"}


def exchange(data: bytes, address: str | None = None, finish: bool = False) -> tuple[int, dict[str, str], bytes]:
    """What a raw socket gets: status, header fields, body; the server has to close."""
    address = address or system.address()
    assert address is not None
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        sock.sendall(data)
        if finish:
            sock.shutdown(socket.SHUT_WR)
        received = bytearray()
        while chunk := sock.recv(65536):
            received += chunk
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in rest)}
    return int(line.split()[1]), fields, body


def get(path: str, address: str | None = None, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    return exchange(f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode(), address)


def health(address: str | None = None) -> tuple[int, dict[str, Any]]:
    status, _, body = get("/health", address)
    return status, json.loads(body)


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def test_a_blocking_manager(settings: dict[str, Any]) -> None:
    running, go_on = threading.Event(), threading.Event()

    def handler(request: object) -> object:
        running.set()
        go_on.wait(20)
        return request

    with dynwire.NetworkManager(**settings) as manager:
        assert system.address() is None, "nothing is started before it is used"
        service = manager.endpoint(ENDPOINT).serve(handler)
        client = manager.endpoint(ENDPOINT).client()
        caller = threading.Thread(target=client.call, args=("x",))
        caller.start()
        assert running.wait(20)
        try:
            status, shown = health()
            assert (status, shown["status"], shown["pid"]) == (200, "ready", os.getpid())
            assert shown["instances"] == [
                {
                    "endpoint": ENDPOINT,
                    "id": f"{service.instance.id:016x}",
                    "plane": "tcp",
                    "address": service.instance.address,
                    "ready": True,
                    "in_flight": 1,
                }
            ]
            status, fields, body = get("/live")
            assert (status, json.loads(body), fields["connection"]) == (200, {"status": "live"}, "close")
            status, fields, body = get("/metrics")
            text = body.decode()
            assert (status, fields["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
            assert f'\ndynwire_requests_in_flight{{endpoint="{ENDPOINT}",plane="tcp"}} 1.0\n' in text
            assert '\ndynwire_connections{plane="tcp",side="client"} 1.0\n' in text
            assert '\ndynwire_connections{plane="tcp",side="server"} 1.0\n' in text
            assert re.search(r'\ndynwire_open_connections_received_bytes\{plane="tcp",side="server"\} [1-9]', text)
            for name in ("process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"):
                assert re.search(rf"\n{name} [1-9]", text)
        finally:
            go_on.set()
            caller.join()
        address = system.address()
        assert address is not None
    assert system.address() is None
    assert not listens(address)


@pytest.mark.parametrize("plane", ["memory", "http"])
def test_other_planes(settings: dict[str, Any], plane: str) -> None:
    with dynwire.NetworkManager(request_plane=plane, http_host="127.0.0.1", **settings) as manager:
        manager.endpoint(ENDPOINT).serve(lambda request: request)
        assert manager.endpoint(ENDPOINT).client().call("x") == "x"
        assert health()[1]["instances"][0]["plane"] == plane
        assert f'dynwire_requests_in_flight{{endpoint="{ENDPOINT}",plane="{plane}"}} 0.0' in get("/metrics")[2].decode()


async def test_an_async_manager_and_its_drain(settings: dict[str, Any]) -> None:
    running, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: object) -> object:
        running.set()
        await go_on.wait()
        return request

    async with dynwire.AsyncNetworkManager(**settings) as manager:
        service = await manager.endpoint(ENDPOINT).serve(handler)
        client = await manager.endpoint(ENDPOINT).client()
        call = asyncio.ensure_future(client.call("x"))
        await running.wait()
        assert (await asyncio.to_thread(health))[1]["status"] == "ready"
        drain = asyncio.ensure_future(service.drain(grace=20))
        await asyncio.sleep(0)
        status, shown = await asyncio.to_thread(health)
        assert (status, shown["status"]) == (503, "draining")
        assert (shown["instances"][0]["ready"], shown["instances"][0]["in_flight"]) == (False, 1)
        assert 'state="draining"} 1.0' in (await asyncio.to_thread(get, "/metrics"))[2].decode()
        go_on.set()
        assert await call == "x"
        assert await drain == 0
        status, shown = await asyncio.to_thread(health)
        assert (status, shown["status"], shown["instances"]) == (503, "draining", []), "nobody should send it work any more"
        assert (await asyncio.to_thread(get, "/live"))[0] == 200


async def test_closing_with_grace_is_a_drain_that_can_be_seen(settings: dict[str, Any]) -> None:
    running, go_on = asyncio.Event(), asyncio.Event()

    async def handler(request: object) -> object:
        running.set()
        await go_on.wait()
        return request

    manager = dynwire.AsyncNetworkManager(**settings)
    await manager.endpoint(ENDPOINT).serve(handler)
    async with dynwire.AsyncNetworkManager(discovery_file_dir=settings["discovery_file_dir"]) as caller:
        client = await caller.endpoint(ENDPOINT).client()
        call = asyncio.ensure_future(client.call("x"))
        await running.wait()
        closing = asyncio.ensure_future(manager.close(grace=20))
        await asyncio.sleep(0)
        status, shown = await asyncio.to_thread(health)
        assert (status, shown["status"], len(shown["instances"])) == (503, "draining", 1)
        go_on.set()
        assert await call == "x"
        await closing
    assert system.address() is None


def test_a_process_that_only_calls_is_ready(settings: dict[str, Any]) -> None:
    with dynwire.NetworkManager(**settings) as manager:
        manager.endpoint(ENDPOINT).client()
        assert health() == (200, {"status": "ready", "pid": os.getpid(), "instances": []})


def test_looking_does_not_open_the_port(settings: dict[str, Any]) -> None:
    """``dynwire ls`` beside a worker inherits its settings."""
    with dynwire.NetworkManager(**settings) as manager:
        assert manager.list_instances() == ()
        assert system.address() is None


def test_two_managers_share_one(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    first = dynwire.NetworkManager(**settings)
    second = dynwire.NetworkManager(**{**settings, "system_system_port": 1})
    first.endpoint("demo.a.x").serve(lambda request: request)
    address = system.address()
    with caplog.at_level(logging.WARNING, "dynwire.system"):
        second.endpoint("demo.b.x").serve(lambda request: request)
    assert "DYN_SYSTEM_PORT is 1" in caplog.text
    assert system.address() == address
    assert sorted(i["endpoint"] for i in health()[1]["instances"]) == ["demo.a.x", "demo.b.x"]
    first.close()
    assert [i["endpoint"] for i in health(address)[1]["instances"]] == ["demo.b.x"]
    second.close()
    assert system.address() is None


def test_it_outlives_the_loop_that_started_it(settings: dict[str, Any]) -> None:
    with dynwire.NetworkManager(**settings) as second:

        async def first() -> None:
            async with dynwire.AsyncNetworkManager(**settings) as manager:
                await manager.endpoint("demo.a.x").serve(lambda request: request)
                await asyncio.to_thread(second.endpoint("demo.b.x").serve, lambda request: request)

        asyncio.run(first())
        assert [i["endpoint"] for i in health()[1]["instances"]] == ["demo.b.x"]


def test_port_in_use(settings: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with dynwire.NetworkManager(**{**settings, "system_system_port": port}) as manager:
            with pytest.raises(BindError, match=rf"127\.0\.0\.1:{port}: Address already in use.*DYN_SYSTEM_PORT") as caught:
                manager.endpoint(ENDPOINT).serve(lambda request: request)
            assert caught.value.address == f"127.0.0.1:{port}"
            assert manager.list_instances() == ()


@pytest.mark.parametrize("package", ["h11", "prometheus_client"])
def test_a_missing_package(settings: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "dynwire.wire.http1", raising=False)
    with dynwire.NetworkManager(**settings) as manager, pytest.raises(ConfigError, match=r"dynwire\[system\]"):
        manager.endpoint(ENDPOINT).serve(lambda request: request)


def test_what_is_no_request_for_it(settings: dict[str, Any]) -> None:
    with dynwire.NetworkManager(**settings) as manager:
        manager.endpoint(ENDPOINT).client()
        status, fields, body = get("/live", method="HEAD")
        assert (status, fields["content-length"], body) == (200, "17", b"")
        status, fields, _ = get("/live", method="POST")
        assert (status, fields["allow"]) == (405, "GET, HEAD")
        status, _, body = get("/secret")
        assert status == 404
        assert b"/health, /live, /metrics" in body
        assert get("/live?probe=1")[0] == 200
        assert exchange(b"\x16\x03\x01\r\n\r\n")[0] == 400
        assert exchange(b"GET /live HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")[0] == 400
        assert exchange(b"GET /live HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 70_000)[0] == 431
        assert exchange(b"GET /live HTTP/1.1\r\nho", finish=True)[0] == 400
        assert exchange(b"GET /live HTTP/1.0\r\n\r\n")[0] == 200
        assert get("/live")[0] == 200


def test_limits_of_connections_and_of_time(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "CONNECTIONS_LIMIT", 2)
    with dynwire.NetworkManager(**settings) as manager:
        manager.endpoint(ENDPOINT).client()
        address = system.address()
        assert address is not None
        host, _, port = address.rpartition(":")
        monkeypatch.setattr(system, "REQUEST_S", 3600.0)
        slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(2)]
        try:
            slow[0].sendall(b"GET /li")
            status, _, body = get("/live")
            assert status == 503
            assert b"2 connections" in body
        finally:
            for sock in slow:
                sock.close()
        monkeypatch.setattr(system, "CONNECTIONS_LIMIT", 32)
        monkeypatch.setattr(system, "REQUEST_S", 0.05)
        assert exchange(b"GET /li")[0] == 408


async def test_a_loop_that_does_not_turn(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "ANSWER_S", 0.1)
    async with dynwire.AsyncNetworkManager(**settings) as manager:
        await manager.endpoint(ENDPOINT).serve(lambda request: request)
        found: list[tuple[int, Any]] = []

        def look() -> None:
            status, _, body = get("/live")
            found.append((status, json.loads(body)["status"]))
            found.append((get("/metrics")[0], b"dynwire_stuck_event_loops 1.0" in get("/metrics")[2]))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()  # the loop's own thread waits here
        assert found == [(503, "stuck"), (200, True)]


def test_closing_cuts_open_connections(settings: dict[str, Any]) -> None:
    with dynwire.NetworkManager(**settings) as manager:
        manager.endpoint(ENDPOINT).client()
        get("/live")
        address = system.address()
        assert address is not None
        host, _, port = address.rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=20)
        sock.sendall(b"GET /li")
        get("/live")  # accepted after the other one
    with sock, contextlib.suppress(ConnectionResetError):
        assert sock.recv(100) == b""


CHILD = """
import os, sys
import dynwire
from dynwire import system

with dynwire.NetworkManager(system_system_port=0, discovery_file_dir=sys.argv[1], tcp_host="127.0.0.1") as manager:
    manager.endpoint("demo.worker.generate").serve(lambda request: request)
    port = int(system.address().rpartition(":")[2])
    tried, has_tried = os.pipe()
    pid = os.fork()
    if pid == 0:
        print("inherited", system.address(), flush=True)
        try:
            with dynwire.NetworkManager(system_system_port=port, discovery_file_dir=sys.argv[1]) as taken:
                taken.endpoint("demo.worker.generate").client()
                print("not refused", flush=True)
        except dynwire.BindError as error:
            print("refused", "a forked child" in str(error), flush=True)
        with dynwire.NetworkManager(system_system_port=0, discovery_file_dir=sys.argv[1]) as own:
            own.endpoint("demo.worker.generate").client()
            print("own", system.address().rpartition(":")[2] not in ("", str(port)), flush=True)
        os.write(has_tried, b"x")
        sys.stdin.readline()
        os._exit(0)
    os.close(has_tried)
    os.read(tried, 1)  # until then the port is taken
manager.close()
print("closed", port, flush=True)
os.waitpid(pid, 0)
"""


def test_fork(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        lines = sorted(process.stdout.readline().split() for _ in range(4))
        assert [line for line in lines if line[0] != "closed"] == [["inherited", "None"], ["own", "True"], ["refused", "True"]]
        assert not listens(f"127.0.0.1:{lines[0][1]}"), "the child must not hold the parent's port"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(20) == 0


def test_dynwire_serve_says_where(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("async def echo(request):\n    return request\n")
    command = [sys.executable, "-m", "dynwire", "serve", "handlers:echo", "--endpoint", ENDPOINT, "--discovery-dir", "kv"]
    environment = {**os.environ, "DYN_SYSTEM_PORT": "0", "DYN_TCP_RPC_HOST": "127.0.0.1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        match = re.search(r"system port (127\.0\.0\.1:\d+)", process.stdout.readline())
        assert match is not None
        assert health(match[1])[1]["pid"] == process.pid
        # a tool with the same settings, beside the worker
        tool = ["call", ENDPOINT, "hello", "--discovery-dir", "kv"]
        port = match[1].rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, "-m", "dynwire", *tool],
            cwd=tmp_path,
            env={**environment, "DYN_SYSTEM_PORT": port},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_overall() -> None:
    instance = Instance(id=1, namespace="a", component="b", endpoint="c", plane="tcp", address="x:1")
    idle = Report("tcp", (), 0, False, [], [])
    assert system.overall([]) == "ready"
    assert system.overall([idle]) == "ready"
    assert system.overall([replace(idle, starting=1)]) == "starting"
    ready, draining = Served(instance, True, 0), Served(instance, False, 1)
    assert system.overall([replace(idle, starting=1, served=(ready,), has_served=True)]) == "ready"
    assert system.overall([idle, replace(idle, served=(draining,), has_served=True)]) == "draining"
    assert system.overall([replace(idle, served=(draining, ready), has_served=True)]) == "ready"
    assert system.overall([replace(idle, has_served=True)]) == "draining"
