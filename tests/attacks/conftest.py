"""A server in a process of its own, a victim that shares it with the attacker, and what the attack has cost."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hpack import Decoder

from tests.http2 import frames as f
from tests.plane.faces import PATIENCE_S

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).with_name("server.py")
TICKS = os.sysconf("SC_CLK_TCK")

CPU_S = 1.0
"""of the server for one attack, the victim's requests included: a bound on work"""
GROWN_MIB = 8.0
"""of the server's resident memory at its peak, above what it was before the attack"""


class Connection:
    """A client that sends what it is told and remembers what came."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.sock.setblocking(False)
        self.reader = f.FrameReader()
        self.decoder = Decoder()
        self.frames: list[f.Frame] = []
        self.raw = b""
        self.heads: dict[int, dict[bytes, bytes]] = {}
        self.closed = False
        self.sent = 0

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def send(self, *pieces: bytes, read: bool = True) -> None:
        """Write, and read meanwhile. What the server does not take because it has closed is dropped."""
        view = memoryview(b"".join(pieces))
        deadline = time.monotonic() + PATIENCE_S
        while view and not self.closed:
            readable, writable, _ = select.select([self.sock] if read else [], [self.sock], [], PATIENCE_S)
            assert readable or (writable and time.monotonic() < deadline), "the server takes nothing more"
            if readable:
                self.take()
            if writable and not self.closed:
                try:
                    done = self.sock.send(view[:262144])
                except (ConnectionResetError, BrokenPipeError):
                    while not self.closed:  # what had come before is still there
                        self.take()
                    return
                view, self.sent = view[done:], self.sent + done

    def stuffed(self, piece: bytes, total: int) -> bool:
        """Write without reading until the server takes nothing for a second, or has closed; False if it has taken all of it."""
        while self.sent < total and not self.closed:
            if not select.select([], [self.sock], [], 1.0)[1]:
                return True
            try:
                self.sent += self.sock.send(piece)
            except (ConnectionResetError, BrokenPipeError):
                self.closed = True
        return self.closed

    def take(self, size: int = 262144) -> None:
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError):
            data = b""
        self.closed = not data
        self.raw += data[: 1 << 20]
        for frame in self.reader.feed(data):
            self.frames.append(frame)
            if frame.type == f.HEADERS:
                self.heads[frame.stream] = dict(self.decoder.decode(frame.body, raw=True))  # type: ignore[arg-type]

    def until(self, condition: Callable[[], object], patience: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0 and not self.closed, f"{'closed' if self.closed else 'silence'} after {self.story()}"
            if select.select([self.sock], [], [], left)[0]:
                self.take()

    def until_closed(self) -> None:
        self.until(lambda: self.closed)

    def story(self) -> str:
        last = ", ".join(map(str, self.frames[-8:])) or repr(self.raw[:200])
        return f"{len(self.frames)} frames, the last ones {last}"

    def goaway(self) -> tuple[str, bytes]:
        """Code and text of the GOAWAY that came before the end."""
        self.until_closed()
        found = [frame for frame in self.frames if frame.type == f.GOAWAY]
        assert found, self.story()
        return f.error_name(found[-1].code), found[-1].payload[8:]

    def resets(self) -> dict[int, str]:
        return {frame.stream: f.error_name(frame.code) for frame in self.frames if frame.type == f.RST_STREAM}

    # --- HTTP/2 -------------------------------------------------------------------------------------------------------------

    def handshake(self, *pairs: tuple[int, int]) -> None:
        self.send(f.PREFACE, f.settings(*pairs))
        self.until(lambda: sum(frame.type == f.SETTINGS for frame in self.frames) == 2)
        self.send(f.SETTINGS_ACK)

    def alive(self) -> None:
        """A PING comes back."""
        before = len(self.frames)
        self.send(f.ping(b"-alive?-"))
        self.until(lambda: any(frame.ack and frame.payload == b"-alive?-" for frame in self.frames[before:]))

    def body(self, stream: int) -> bytes:
        self.until(lambda: any(frame.end_stream and frame.stream == stream for frame in self.frames))
        return b"".join(frame.body for frame in self.frames if frame.type == f.DATA and frame.stream == stream)


def fields(name: str = "echo", method: bytes = b"POST", *extra: f.Field) -> list[f.Field]:
    path = f"/v1/rpc/a/t/{name}".encode()
    return [(b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost"), *extra]


RAW = ((b"content-type", b"application/octet-stream"), (b"accept", b"application/vnd.dynwire.items"))


def request(stream: int, name: str = "echo", *extra: f.Field, end: bool = False) -> bytes:
    """HEADERS of a request for a handler"""
    return f.headers(stream, f.block(fields(name, b"POST", *(extra or RAW))), end=end)


def get(stream: int, path: bytes = b"/live", *extra: f.Field) -> bytes:
    head = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost"), *extra]
    return f.headers(stream, f.block(head), end=True)


class Victim(Connection):
    """A client with a connection of its own, opened before the attack."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.handshake()
        self.stream = -1

    def call(self) -> None:
        self.stream += 2
        payload = json.dumps({"n": self.stream}).encode()
        head = request(self.stream, "echo", (b"content-type", b"application/json"), (b"accept", b"application/json"))
        self.send(head, f.data(self.stream, payload, end=True))
        assert json.loads(self.body(self.stream)) == {"n": self.stream}, self.story()
        self.frames.clear()


class Server:
    """A process of server.py."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
        command = [sys.executable, "-X", "faulthandler", str(PROGRAM), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line and line[0] == "ready", "the server did not start"
        self.port = int(line[1])
        self.victim = Victim(self.port)
        for _ in range(20):
            self.victim.call()
        self.attackers: list[Connection] = []
        self.mark()

    def mark(self) -> None:
        """The attack begins."""
        self.cpu_before, self.rss_before = self.cpu(), self.status("VmRSS")
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu(self) -> float:
        """seconds of CPU time so far"""
        rest = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(rest[11]) + int(rest[12])) / TICKS

    def status(self, name: str) -> float:
        """MiB of a line of /proc/pid/status"""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
        raise KeyError(name)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def attacker(self, *pairs: tuple[int, int], handshake: bool = True) -> Connection:
        connection = Connection(self.port)
        self.attackers.append(connection)
        if handshake:
            connection.handshake(*pairs)
        return connection

    def flood(self, attacker: Connection, pieces: Iterable[bytes], *, read: bool = True, count: int = 4) -> None:
        """Send the pieces in ``count`` portions; the victim calls after each of them."""
        pieces = list(pieces)
        portion = -(-len(pieces) // count)
        for first in range(0, len(pieces), portion):
            attacker.send(*pieces[first : first + portion], read=read)
            self.victim.call()

    def check(self) -> None:
        """The server is well, and the attack has not cost it more than it may."""
        cpu, grown = self.cpu() - self.cpu_before, self.status("VmHWM") - self.rss_before
        print(f"server: {cpu:.2f} s of CPU, {grown:.1f} MiB more at its peak")
        self.victim.call()
        with Victim(self.port) as other:
            other.call()
        assert cpu < CPU_S
        assert grown < GROWN_MIB

    def close(self) -> None:
        for connection in (self.victim, *self.attackers):
            connection.sock.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start_server(discovery_dir: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        started.append(Server(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server()
