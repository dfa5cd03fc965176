"""Bounds of memory, in real processes: numbers from /proc, no timing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.conftest import Connection
from tests.http2 import frames as f

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).with_name("program.py")


class Program:
    """A process of program.py: one JSON line for each answer."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the program ended early"
        return json.loads(line)

    def go_on(self) -> None:
        """After `answer`: the baseline has been read."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def status(self, name: str) -> int:
        """A number of /proc/pid/status, in KiB where it is a size."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
        raise KeyError(name)

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def plane(request: pytest.FixtureRequest, clean_env: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plane of the programs: the native wire's unless the test is one of `both_planes`."""
    name: str = getattr(request, "param", "tcp")
    for variable, value in (("REQUEST_PLANE", name), ("HTTP_RPC_HOST", "127.0.0.1"), ("HTTP_RPC_PORT", "0")):
        monkeypatch.setenv(f"DYN_{variable}", value)
    return name


both_planes = pytest.mark.parametrize("plane", ["tcp", "http"], indirect=True)


@pytest.fixture
def programs(plane: str, discovery_dir: Path) -> Iterator[Any]:
    started: list[Program] = []

    def start(*arguments: str) -> Program:
        started.append(Program(*arguments))
        return started[-1]

    yield start
    for program in started:
        program.close()


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.hard_timeout(120)
def test_idle_streams(programs: Any, loop: str) -> None:
    """10,000 idle streams on one connection: at most 8 KiB each in the server."""
    server = programs("serve", loop)
    assert server.answer() == "ready"
    client = programs("idle", loop, "10000")
    assert client.answer() == "warm"
    before = server.status("VmRSS")
    client.go_on()
    assert client.answer() == {"open": 10000, "connections": 1}
    each = (server.status("VmRSS") - before) / 10000
    print(f"{each:.2f} KiB for each idle stream in the server")
    assert 0.3 < each <= 8, "less than that would mean that they are not there"


@both_planes
@pytest.mark.hard_timeout(180)
@pytest.mark.parametrize("face", ["async", "blocking"])
def test_a_large_stream_to_a_slow_reader(programs: Any, loop: str, face: str) -> None:
    """1 GiB in items of 1 MiB; the reader stops at the beginning for as long as the writer can go on, then drains."""
    if face == "blocking" and loop == "uvloop":
        pytest.skip("a blocking reader has no loop")
    server = programs("serve", loop)
    assert server.answer() == "ready"
    client = programs("drain", loop, face)
    assert client.answer() == "warm"
    before = [p.status("VmRSS") for p in (server, client)]
    for program in (server, client):
        program.reset_peak()
    client.go_on()
    assert client.answer() == "paused"
    assert client.answer() == {"items": 1024, "bytes": 1 << 30}
    grown = [(p.status("VmHWM") - rss) / 1024 for p, rss in zip((server, client), before, strict=True)]
    print(f"peak above baseline: server {grown[0]:.1f} MiB, client {grown[1]:.1f} MiB")
    assert max(grown) < 64


@pytest.mark.hard_timeout(180)
@pytest.mark.parametrize("face", ["async", "blocking"])
def test_many_calls_leave_nothing(programs: Any, loop: str, face: str) -> None:
    """100,000 calls: resident memory within 2 MiB, descriptors, threads and tasks as before, in both processes."""
    if face == "blocking" and loop == "uvloop":
        pytest.skip("a blocking caller has no loop")
    server = programs("serve", loop)
    assert server.answer() == "ready"
    client = programs("calls", loop, face)
    warm = client.answer()

    def state() -> list[tuple[int, int]]:
        return [(p.descriptors, p.status("Threads")) for p in (server, client)]

    before, rss = state(), [p.status("VmRSS") for p in (server, client)]
    client.go_on()
    done = client.answer()
    grown = [(p.status("VmRSS") - old) / 1024 for p, old in zip((server, client), rss, strict=True)]
    print(f"grown: server {grown[0]:.2f} MiB, client {grown[1]:.2f} MiB")
    assert done == {**warm, "calls": 100_000}
    assert state() == before
    assert max(grown) <= 2


@both_planes
@pytest.mark.hard_timeout(120)
@pytest.mark.parametrize("face", ["async", "blocking"])
def test_streams_leave_nothing(programs: Any, loop: str, face: str) -> None:
    """10,000 calls, streams and streams that are given up: within 2 MiB, nothing open on either side, in either process."""
    if face == "blocking" and loop == "uvloop":
        pytest.skip("a blocking caller has no loop")
    server = programs("serve", loop)
    assert server.answer() == "ready"
    client = programs("mixed", loop, face)
    warm = client.answer()
    assert warm["server"]["streams"] == 1, "the one that asks"

    def state() -> list[tuple[int, int]]:
        return [(p.descriptors, p.status("Threads")) for p in (server, client)]

    before, rss = state(), [p.status("VmRSS") for p in (server, client)]
    client.go_on()
    done = client.answer()
    grown = [(p.status("VmRSS") - old) / 1024 for p, old in zip((server, client), rss, strict=True)]
    print(f"grown: server {grown[0]:.2f} MiB, client {grown[1]:.2f} MiB, {warm}")
    assert done == warm
    assert state() == before
    assert max(grown) <= 2


@pytest.mark.parametrize("plane", ["http"], indirect=True)
def test_idle_connections(programs: Any, loop: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 connections that have done some work: at most 64 KiB each in the server."""
    monkeypatch.setenv("DYN_HTTP_RPC_PORT", str(free_port))
    server = programs("serve", loop)
    assert server.answer() == "ready"
    payload = os.urandom(1024)
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            connection = stack.enter_context(Connection(free_port))
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.handshake()
            head = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/v1/rpc/m/w/echo"), (b":authority", b"localhost")]
            octets = [(name, b"application/octet-stream") for name in (b"content-type", b"accept")]
            connection.send(f.headers(1, f.block([*head, *octets])), f.data(1, payload, end=True))
            assert connection.body(1) == payload

        for _ in range(50):
            connect()
        before, descriptors = server.status("VmRSS"), server.descriptors
        for _ in range(500):
            connect()
        each = (server.status("VmRSS") - before) / 500
        assert server.descriptors == descriptors + 500
    print(f"{each:.2f} KiB for each idle connection in the server")
    assert 0.3 < each <= 64, "less than that would mean that they are not there"


def test_a_large_payload_is_received_where_it_stays(programs: Any, loop: str) -> None:
    """16 MiB: all but what came with the header is read by the kernel into the memory that the handler sees."""
    server = programs("serve", loop)
    assert server.answer() == "ready"
    client = programs("large", loop)
    found = client.answer()
    size = 16 << 20
    print(found)
    assert found["length"] == size
    assert size - found["landed"] <= 256 * 1024, "it went through another buffer"
    assert found["address"] == found["view_address"], "a view is the same memory"


@both_planes
@pytest.mark.parametrize("face", ["async", "blocking"])
def test_a_large_payload_is_sent_by_reference(programs: Any, loop: str, face: str) -> None:
    server = programs("serve", loop)
    assert server.answer() == "ready"
    client = programs("send", loop, face)
    grown_mib = client.answer() / 1024
    print(f"peak of the sender above what it held before: {grown_mib:.1f} MiB")
    assert grown_mib < 8
