#!/usr/bin/env python3
"""How fast is dynwire's http plane beside other HTTP/2 servers and clients, on the same machine, at the same minute?

Servers run on the first core, the load (h2load, or the client under test) on the second, cleartext with prior knowledge. A round
runs every contestant once, in turn; the next round starts with another one. Reported are medians over rounds with minimum and
maximum: requests per second, and CPU microseconds per request of the process under test, which neighbours disturb far less. At
the end stands a table of the ratios that are promised (promises.py), each judged by both.

    python benchmarks/compare_http.py --short                  under 3 minutes: every promised ratio
    python benchmarks/compare_http.py                          more workloads, peers and rounds
    python benchmarks/compare_http.py --without dynwire        the peers alone
    python benchmarks/compare_http.py --only post-1KiB --check
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import common  # noqa: E402 - lies in peers/
import compare  # noqa: E402 - lies beside this script
from compare import KIB, MIB, Peer, PeerFailed, human  # noqa: E402
from promises import HTTP_PROMISES  # noqa: E402

CALIBRATION_S = 0.2  # a shorter run says too little about the rate
H2LOAD_TIMEOUT_S = 60.0


# What is compared ---------------------------------------------------------------------------------------------------------


def _python(module: str, about: str, needs: str = "", **options: Any) -> Peer:
    return Peer(module, about, options, needs=needs)


PEERS: dict[str, Peer] = {
    "nghttpd": Peer(
        "nghttpd",
        "nghttpd (C, libnghttp2) sending files from disk cache; it reads a POST and drops it: the limit",
        uses_loop=False,
    ),
    "nghttpd-echo": Peer(
        "nghttpd", "nghttpd --echo-upload; it keeps an upload in a temporary file", {"echo": True}, uses_loop=False
    ),
    "dynwire": _python("dynwire_http.py", "dynwire's http plane, AsyncNetworkManager"),
    "dynwire-h2": Peer("dynwire_http.py", "the same on its second engine, the h2 library", env={"DYNWIRE_HTTP2_ENGINE": "h2"}),
    "stario": _python("stario_http.py", "stario: Cython over nghttp2, coroutine handlers"),
    "granian": _python(
        "granian_rsgi.py", "granian, RSGI application, one worker and one runtime thread; JSON by orjson", "granian"
    ),
    "hypercorn": _python("hypercorn_asgi.py", "hypercorn on h2, ASGI application; JSON by orjson", "hypercorn"),
    "grpc.aio": _python("grpc_aio.py", "grpc.aio, generic handlers on raw bytes, called by h2load with gRPC framing", "grpcio"),
    "node": Peer("node_http2.mjs", "Node's http2, stream API", {"warm_up_s": 1.0}, uses_loop=False),
    "dynwire-sync": _python("dynwire_http.py", "dynwire, blocking client with one manager", face="sync"),
    "pycurl-multi": Peer(
        "pycurl_http2.py", "pycurl, one CurlMulti, one connection", {"face": "sync"}, uses_loop=False, needs="pycurl"
    ),
    "pycurl": Peer("pycurl_http2.py", "pycurl, one easy handle, blocking", {"face": "sync"}, uses_loop=False, needs="pycurl"),
    "httpx": _python("httpx_http2.py", "httpx.AsyncClient(http2=True), one connection", "httpx"),
    "h2+asyncio": _python("h2_asyncio.py", "a client by hand on h2 and an asyncio Protocol", "h2"),
}


@dataclass(frozen=True)
class HttpRow(compare.Row):
    """A workload, and who takes part. ``concurrency`` is the number of requests under way on each of ``connections``."""

    connections: int = 1

    @property
    def name(self) -> str:
        return f"{self.label}/{self.placement}"

    def unit(self) -> str:
        return "req/s"


def all_rows() -> list[HttpRow]:
    def server(level: int, label: str, kind: str, size: int, connections: int, streams: int, contestants: str) -> HttpRow:
        who = tuple(contestants.split())
        return HttpRow(
            "h2load", kind, size, streams, who, level, label, "server", "split", "uvloop", "default", connections=connections
        )

    def client(level: int, label: str, where: str, workload: str, concurrency: int, contestants: str) -> HttpRow:
        who = tuple(contestants.split())
        return HttpRow(workload, "echo", KIB, concurrency, who, level, label, "client", where, "uvloop", "default")

    def streams(level: int, contestants: str) -> HttpRow:
        label, who = "open-streams", tuple(contestants.split())
        return HttpRow(label, "0", 64, 32, who, level, label, "server", "split", "uvloop", "default")

    everyone = "nghttpd nghttpd-echo dynwire stario granian node hypercorn grpc.aio"
    frameworks = "dynwire stario granian node hypercorn"
    rows = [
        server(0, "post-1KiB", "echo", KIB, 4, 32, everyone),
        server(0, "json", "json", len(json.dumps(common.JSON_REQUEST)), 4, 32, frameworks),
        server(0, "live", "live", 0, 4, 32, f"nghttpd {frameworks}"),
        server(0, "post-64KiB", "echo", 64 * KIB, 4, 4, "nghttpd dynwire stario granian node"),
        server(1, "post-64KiB", "echo", 64 * KIB, 4, 4, f"{everyone} dynwire-h2"),
        server(0, "chunks", "chunks", 64, 4, 8, "dynwire stario granian node"),
        server(1, "chunks", "chunks", 64, 4, 8, f"{frameworks} grpc.aio dynwire-h2"),
        server(1, "post-1KiB", "echo", KIB, 4, 32, f"{everyone} dynwire-h2"),
        server(1, "post-1KiB-c1m1", "echo", KIB, 1, 1, everyone),
        server(1, "post-1MiB", "echo", MIB, 1, 4, everyone),
        streams(0, "dynwire:1000 granian:1000 node:1000"),
        # with 1000 hypercorn's priority tree gives up; stario allows 256
        streams(1, "hypercorn:900 dynwire-h2:1000"),
        client(0, "client-32", "split", "unary", 32, "dynwire pycurl-multi node httpx h2+asyncio"),
        client(1, "client-1", "split", "unary", 1, "dynwire pycurl-multi node httpx h2+asyncio"),
        client(0, "client-blocking", "split", "threads", 1, "dynwire-sync pycurl"),
        client(0, "client-blocking", "one", "threads", 1, "dynwire-sync pycurl"),
    ]
    return rows


def select_rows(args: argparse.Namespace) -> list[HttpRow]:
    chosen: dict[str, HttpRow] = {}
    for row in all_rows():
        if row.level > (0 if args.short else 1) or (args.only and not re.search(args.only, row.name)):
            continue
        contestants = tuple(c for c in row.contestants if compare.takes_part(c, args))
        if row.name in chosen:  # listed again with more contestants
            earlier = chosen[row.name].contestants
            contestants = earlier + tuple(c for c in contestants if c not in earlier)
        if contestants:
            chosen[row.name] = dataclasses.replace(row, contestants=contestants)
    return sorted(chosen.values(), key=lambda row: (row.family == "client", row.placement))  # rows that share processes


# Requests -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    right: Callable[[bytes], bool]  # whether a reply is what was asked for


def request_for(peer_name: str, kind: str, size: int) -> Request:
    peer = peer_name.removesuffix("-h2")
    if kind == "live":
        return Request("GET", common.LIVE_PATH, {}, None, lambda body: bool(body))
    if kind == "json":
        body = json.dumps(common.JSON_REQUEST, separators=(",", ":")).encode()
        headers = {"content-type": common.JSON, "accept": common.JSON}
        return Request("POST", common.JSON_PATH, headers, body, lambda reply: json.loads(reply) == common.JSON_REQUEST)
    octets = {"content-type": common.OCTETS, "accept": common.OCTETS}
    if peer == "grpc.aio":
        octets = {"content-type": "application/grpc", "te": "trailers"}
        if kind == "chunks":
            wanted = grpc_message(common.CHUNK) * common.CHUNKS
            asked = grpc_message(common.stream_request(common.CHUNKS, len(common.CHUNK)))
            return Request("POST", "/bench/bulk", octets, asked, lambda reply: reply == wanted)
        payload = grpc_message(b"x" * size)
        return Request("POST", "/bench/echo", octets, payload, lambda reply: reply == payload)
    if kind == "chunks":
        wanted = common.CHUNK * common.CHUNKS
        return Request("POST", common.CHUNKS_PATH, octets, b"{}", lambda reply: reply == wanted)
    payload = b"x" * size
    path = static_path(size) if peer == "nghttpd" else common.ECHO_PATH
    return Request("POST", path, octets, payload, lambda reply: reply == payload)


def grpc_message(payload: bytes) -> bytes:
    return b"\0" + len(payload).to_bytes(4, "big") + payload


def static_path(size: int) -> str:
    """nghttpd's file that answers a POST of this size."""
    return common.ECHO_PATH if size == KIB else f"{common.ECHO_PATH}-{size}"


def fetch(port: int, request: Request) -> tuple[int, bytes]:
    """One request over a connection of its own. Raises OSError, or PeerFailed if the answer is not one."""
    import h2.connection
    import h2.events
    import h2.exceptions

    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        head = [(":method", request.method), (":scheme", "http"), (":authority", f"127.0.0.1:{port}"), (":path", request.path)]
        left = memoryview(request.body or b"")
        connection.send_headers(1, head + list(request.headers.items()), end_stream=not left)
        status, body = 0, bytearray()
        while True:
            while left and (room := min(connection.local_flow_control_window(1), 16384)):
                connection.send_data(1, bytes(left[:room]), end_stream=len(left) <= room)
                left = left[room:]
            sock.sendall(connection.data_to_send())
            data = sock.recv(65536)
            if not data:
                raise PeerFailed("the server closed the connection")
            try:
                events = connection.receive_data(data)
            except h2.exceptions.ProtocolError as error:
                raise PeerFailed(f"no HTTP/2: {error}") from error
            for event in events:
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, h2.events.StreamReset):
                    raise PeerFailed(f"stream reset with code {event.error_code}")
                elif isinstance(event, h2.events.ConnectionTerminated):
                    raise PeerFailed(f"GOAWAY with code {event.error_code}")
                elif isinstance(event, h2.events.StreamEnded):
                    return status, bytes(body)


# Processes ----------------------------------------------------------------------------------------------------------------


def process_tree(pid: int) -> list[int]:
    """The process and all that it started: granian serves in a child."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += process_tree(int(child))
    return found


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """What is started here runs on that core."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def h2load_seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    if match is None:
        raise PeerFailed(f"h2load printed a time that is not understood: {text}")
    return float(match[1]) * UNITS[match[2]]


class HttpPair(compare.Pair):
    """For a server row the server of a peer, for a client row its client process and an nghttpd."""

    bench: HttpBench
    row: HttpRow

    def command(self, role: str, arguments: list[str]) -> list[str]:
        module = self.peer.module
        if module == "nghttpd" or (self.row.family == "client" and role == "server"):
            self.port = common.free_port()
            options = ["--echo-upload"] if self.peer.options.get("echo") else []
            limit = str(common.MAX_HTTP_STREAMS)
            server = [
                "nghttpd",
                "--no-tls",
                "-a",
                "127.0.0.1",
                "-m",
                limit,
                "-d",
                str(self.bench.htdocs),
                *options,
                str(self.port),
            ]
            # ends with our stdin like every other peer; nghttpd itself does not look at it
            return ["sh", "-c", '"$@" & cat > /dev/null; kill $!', "sh", *server]
        if module == "node_http2.mjs":
            constants = {"LIVE_BODY": common.LIVE_BODY.decode(), "CHUNK": common.CHUNK.decode()}
            for name in ("ECHO_PATH", "JSON_PATH", "CHUNKS_PATH", "LIVE_PATH", "CHUNKS", "MAX_HTTP_STREAMS"):
                constants[name] = getattr(common, name)
            return ["node", str(HERE / "peers" / module), role, *arguments, json.dumps(constants)]
        python = self.bench.stario_python if module == "stario_http.py" else sys.executable
        return [python, str(HERE / "peers" / module), role, *arguments]

    def start(self) -> None:
        server_core, client_core = self.placement()
        setup = {"loop": self.row.loop, "directory": self.directory, "options": self.peer.options}
        self.port = 0
        self.server = self._spawn("server", [json.dumps(setup)], server_core)
        self.client = self.server
        if not self.port:
            self.port = self._line(self.server, compare.STARTUP_TIMEOUT_S)["port"]
        self.await_listening()
        self.tree = process_tree(self.server.pid)
        self.known: dict[str, int] = {}
        if self.row.family == "client":
            named = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in self.tree}
            setup |= {"port": self.port, "server_pid": named["nghttpd"]}
            self.client = self._spawn("client", [json.dumps(setup)], client_core)
            self._line(self.client, compare.STARTUP_TIMEOUT_S)

    def await_listening(self) -> None:
        end = time.monotonic() + compare.STARTUP_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.server.poll() is not None or time.monotonic() > end:
                    raise PeerFailed(f"the server does not listen: {self.log_tail()}") from None
                time.sleep(0.02)

    def server_cpu_s(self) -> float:
        return sum(map(common.process_cpu_s, self.tree))

    def cpu_s(self) -> float:
        client = common.process_cpu_s(self.client.pid) if self.client is not self.server else 0.0
        return self.server_cpu_s() + client + children_cpu_s()

    def run(self, row: compare.Row, kind: str, seconds: float) -> dict[str, Any]:
        assert isinstance(row, HttpRow)
        try:
            result = self.watched(lambda: self.measure(row, kind, seconds))
        except PeerFailed as error:
            if self.server.poll() is not None:
                raise PeerFailed(f"{error}; the server ended: {self.log_tail()}") from None
            raise
        result["rss_server"] = sum(map(compare.rss_bytes, self.tree))
        result["server_us"] = result["cpu_server"] / result["units"] * 1e6
        result["client_us"] = result["cpu_client"] / result["units"] * 1e6
        result["rate"] = result["units"] / result["seconds"]
        # load and start-up of h2load leave the server idle for a moment; 100 % is not reached
        result["server_busy"] = result["cpu_server"] / result["seconds"]
        result["client_busy"] = result["cpu_client"] / result["seconds"]
        return result

    def measure(self, row: HttpRow, kind: str, seconds: float) -> dict[str, Any]:
        if row.workload == "h2load":
            return self.h2load(row, kind, seconds)
        if row.workload == "open-streams":
            return self.open_streams(int(kind), seconds)
        workload = row.workload
        if workload == "unary" and self.peer.options.get("face") == "sync":
            workload = "pipeline"
        command = {"workload": workload, "kind": kind, "size": row.size, "concurrency": row.concurrency, "seconds": seconds}
        return self.ask(json.dumps({**command, "items": 1}), seconds)

    def h2load(self, row: HttpRow, kind: str, seconds: float) -> dict[str, Any]:
        request = request_for(self.name, kind, row.size)
        count = self.known.get(row.name)
        if count is None:
            self.check(request)
            count, took = row.connections * row.concurrency, 0.0
            warm_up = self.peer.options.get("warm_up_s", CALIBRATION_S)  # longer where a JIT compiler is at work
            while took < warm_up:
                if took:
                    count *= max(2, min(20, int(warm_up * 1.3 / took)))
                took = self.h2load_once(row, request, count)["seconds"]
            count = self.known[row.name] = max(row.connections, int(count * seconds / took))
        return self.h2load_once(row, request, count)

    def check(self, request: Request) -> None:
        try:
            status, body = fetch(self.port, request)
        except OSError as error:
            raise PeerFailed(f"{request.method} {request.path}: {error}") from error
        if status != 200 or not request.right(body):
            raise PeerFailed(f"{request.method} {request.path}: status {status}, wrong reply {body[:60]!r}")

    def h2load_once(self, row: HttpRow, request: Request, count: int) -> dict[str, Any]:
        command = ["h2load", "-t1", f"-n{count}", f"-c{row.connections}", f"-m{row.concurrency}"]
        for name, value in request.headers.items():
            command += ["-H", f"{name}: {value}"]
        if request.body is not None:
            command += ["-d", str(self.bench.body_file(request.body))]
        command.append(f"http://127.0.0.1:{self.port}{request.path}")
        before, load = self.server_cpu_s(), children_cpu_s()
        try:
            with on_core(self.placement()[1]):
                done = subprocess.run(command, capture_output=True, text=True, timeout=H2LOAD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"h2load has not finished within {H2LOAD_TIMEOUT_S:.0f} s") from None
        server, load = self.server_cpu_s() - before, children_cpu_s() - load
        finished = re.search(r"finished in (\S+),", done.stdout)
        succeeded = re.search(r"(\d+) succeeded", done.stdout)
        good = re.search(r"status codes: (\d+) 2xx", done.stdout)
        if not (finished and succeeded and good) or int(succeeded[1]) != count or int(good[1]) != count:
            line = re.search(r"requests: .*", done.stdout)
            raise PeerFailed(f"h2load: {line[0] if line else done.stderr.strip() or done.stdout.strip()}")
        mean = re.search(r"time for request:\s+\S+\s+\S+\s+(\S+)", done.stdout)
        return {
            "calls": count,
            "units": count,
            "seconds": h2load_seconds(finished[1]),
            "mean_us": h2load_seconds(mean[1]) * 1e6 if mean else None,
            "cpu_server": server,
            "cpu_client": load,
        }

    def open_streams(self, count: int, seconds: float) -> dict[str, Any]:
        script = str(HERE / "peers" / "h2_streams.py")
        pids = ",".join(map(str, self.tree))
        load = children_cpu_s()
        with on_core(self.placement()[1]):
            done = subprocess.run(
                [sys.executable, script, str(self.port), common.ECHO_PATH, str(count), str(seconds), pids],
                capture_output=True,
                text=True,
                timeout=H2LOAD_TIMEOUT_S,
            )
        try:
            result: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise PeerFailed(f"h2_streams.py: {(done.stderr.strip().splitlines() or ['no output'])[-1]}") from None
        if "error" in result:
            raise PeerFailed(result["error"])
        return {**result, "units": result["calls"], "cpu_client": children_cpu_s() - load}


# stario's environment -----------------------------------------------------------------------------------------------------


def find_python() -> str | None:
    """A Python 3.12 or later that runs: on PATH, or installed by pyenv but not selected."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in ("3.12", "3.13", "3.14"):
        for found in (f"python{version}", *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            with contextlib.suppress(OSError):
                done = subprocess.run([found, "-c", code], capture_output=True, text=True)
                if done.stdout.strip() == version:
                    return found
    return None


def stario_python(report: Callable[[str], None]) -> tuple[str, str | None]:
    """An interpreter that has stario, and None; or why there is none. Makes an environment beside ours if necessary."""
    if importlib.util.find_spec("stario") is not None:
        return sys.executable, None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [r.split(";")[0].strip() for r in project["optional-dependencies"]["bench"] if r.startswith("stario")]
    wanted += [r for r in project["dependencies"] if r.startswith("orjson")]
    beside = Path(sys.prefix).parent if sys.prefix != sys.base_prefix else ROOT
    place = beside / ".venv-stario"
    python = place / "bin" / "python"
    have = subprocess.run([python, "-c", "import stario, uvloop, orjson"], capture_output=True) if python.exists() else None
    if have is not None and have.returncode == 0:
        return str(python), None
    base = find_python()
    if base is None:
        return "", "it needs Python 3.12 or later, and neither PATH nor pyenv has one"
    report(f"making {place} for stario")
    for command in ([base, "-m", "venv", str(place)], [str(python), "-m", "pip", "install", "--quiet", *wanted]):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"})
        if done.returncode:
            return "", f"{' '.join(command[:4])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
    return str(python), None


# The run ------------------------------------------------------------------------------------------------------------------


class HttpBench(compare.Bench):
    peers = PEERS

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.stario_python = ""
        self.htdocs = Path(self.scratch) / "htdocs"
        self.bodies: dict[bytes, Path] = {}

    def rows(self) -> list[compare.Row]:
        return list(select_rows(self.args))

    def make_pair(self, peer_name: str, row: compare.Row) -> HttpPair:
        return HttpPair(peer_name, row, self)

    def body_file(self, body: bytes) -> Path:
        if body not in self.bodies:
            path = self.bodies[body] = Path(self.scratch) / f"body-{len(self.bodies)}"
            path.write_bytes(body)
        return self.bodies[body]

    def prepare(self, rows: list[compare.Row]) -> list[compare.Row]:
        taking_part = {contestant.split(":")[0] for row in rows for contestant in row.contestants}
        modules = {PEERS[name].module for name in taking_part}
        for program, package in (("nghttpd", "nghttp2-server"), ("node_http2.mjs", "nodejs")):
            command = "node" if program.startswith("node") else program
            if program in modules and shutil.which(command) is None:
                self.missing[program] = f"{command} is not installed (Debian package {package})"
        if "dynwire_http.py" in modules:
            done = subprocess.run(
                [sys.executable, "-c", "import dynwire.manager; dynwire.manager.load_plane('http')"],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            if done.returncode:
                self.missing["dynwire_http.py"] = done.stderr.strip().splitlines()[-1]
        for name in taking_part:
            peer = PEERS[name]
            module = {"grpcio": "grpc"}.get(peer.needs, peer.needs)
            if module and importlib.util.find_spec(module) is None:
                self.missing[peer.module] = f"{peer.needs} is not installed"
        if "stario_http.py" in modules:
            self.stario_python, reason = stario_python(self.progress.print)
            if reason is not None:
                self.missing["stario_http.py"] = reason
        for module, reason in self.missing.items():
            who = sorted(name for name in taking_part if PEERS[name].module == module)
            self.note(f"{', '.join(who)} left out: {reason}")
        if shutil.which("h2load") is None:
            self.note("rows with h2load are left out: it is not installed (Debian package nghttp2-client)")
            rows = [row for row in rows if row.workload != "h2load"]
        if shutil.which("nghttpd") is None:
            self.note("rows of clients are left out: nghttpd is not installed (Debian package nghttp2-server)")
            rows = [row for row in rows if row.family != "client"]
        for path, content in {
            common.LIVE_PATH: common.LIVE_BODY,
            **{static_path(size): b"x" * size for size in (KIB, 64 * KIB, MIB)},
        }.items():
            file = self.htdocs / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return rows

    def summarize(self, row: compare.Row, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        assert isinstance(row, HttpRow)
        contestants = {}
        for name, raw in runs.items():
            metrics = {}
            for metric in METRICS:
                values = [run[metric] for run in raw if run.get(metric) is not None]
                if values:
                    metrics[metric] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            if raw:
                about = PEERS[name.split(":")[0]].about
                contestants[name] = {"about": about, "rounds": len(raw), **metrics, "raw": raw}
        return {
            "name": row.name,
            "workload": row.workload,
            "kind": row.kind,
            "payload": row.size,
            "connections": row.connections,
            "concurrency": row.concurrency,
            "placement": row.placement,
            "unit": row.unit(),
            "family": row.family,
            "contestants": contestants,
        }

    def brief(self, result: dict[str, Any]) -> str:
        cpu = "client_us" if result["family"] == "client" else "server_us"
        parts = [f"{name} {human(c['rate']['median'])}/s {c[cpu]['median']:.1f} us" for name, c in result["contestants"].items()]
        return f"{result['name']}: " + ", ".join(parts or ["nobody took part"])


METRICS = (
    "rate",
    "server_us",
    "client_us",
    "p50_us",
    "p99_us",
    "mean_us",
    "open_cost",
    "server_busy",
    "client_busy",
    "rss_server",
    "others",
)


# Output -------------------------------------------------------------------------------------------------------------------

ABOUT_ROWS = {
    "post-1KiB": "POST 1 KiB, raw echo",
    "json": "POST of a small completion request as JSON, decoded into objects and encoded again",
    "live": "GET of a few constant bytes",
    "post-64KiB": "POST 64 KiB, raw echo",
    "post-1MiB": "POST 1 MiB, raw echo",
    "post-1KiB-c1m1": "the same, one request at a time",
    "chunks": "a reply of 100 chunks of 64 bytes",
    "open-streams": "POST 64 bytes, 32 at a time, while that many other requests of the connection are open. Open cost: CPU per "
    "request by that of a connection without, in turn with it",
    "client-32": "clients: POST 1 KiB, 32 at a time on one connection, to nghttpd",
    "client-1": "clients: POST 1 KiB, one at a time, to nghttpd",
    "client-blocking": "blocking clients: POST 1 KiB, one thread, to nghttpd",
}


def row_table(row: dict[str, Any]) -> list[str]:
    client = row["family"] == "client"
    cpu, busy, side = ("client_us", "client_busy", "client") if client else ("server_us", "server_busy", "server")
    last, digits = ("open_cost", 2) if row["workload"] == "open-streams" else ("p50_us" if client else "mean_us", 0)
    head = [
        "peer",
        "req/s (min-max)",
        f"{side} CPU us/request (min-max)",
        f"{side} busy",
        {"open_cost": "open cost", "p50_us": "p50 us", "mean_us": "mean us"}[last],
        "others",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, c in sorted(row["contestants"].items(), key=lambda item: item[1][cpu]["median"]):
        lines.append(
            "| "
            + " | ".join(
                (
                    f"**{name}**" if name.startswith("dynwire") else name,
                    "{} ({}-{})".format(*(human(c["rate"][k]) for k in ("median", "min", "max"))),
                    "{:.1f} ({:.1f}-{:.1f})".format(*(c[cpu][k] for k in ("median", "min", "max"))),
                    f"{c[busy]['median'] * 100:.0f} %",
                    f"{c[last]['median']:.{digits}f}" if last in c else "-",
                    f"{c['others']['median'] * 100:.0f} %",
                )
            )
            + " |"
        )
    return lines


def markdown(report: dict[str, Any], stem: str) -> str:
    remarks = [
        "Server on one core, load on another (one: both on one core); cleartext HTTP/2 with prior knowledge; every server has",
        "one process that works. Busy: CPU time of the measured side by wall time; where it is far below 100 % the other side or",
        "turn-taking is the limit, and only CPU per request tells the contestants apart. Others: share of the machine that",
        "other processes used meanwhile. nghttpd answers a POST from a file, so that its temporary files are not measured;",
        "clients talk to that nghttpd.",
    ]
    results: list[str] = []
    for row in report["rows"]:
        label = row["name"].split("/")[0]
        load = f"{row['connections']} connections x {row['concurrency']} requests" if row["workload"] == "h2load" else ""
        results += [f"## {row['name']}", "", ABOUT_ROWS[label] + (f", {load}" if load else "") + ".", "", *row_table(row), ""]
    return compare.page(report, stem, "dynwire's http plane beside other HTTP/2 servers and clients", remarks, PEERS, results)


CHARTS = [
    ("POST 1 KiB echo", r"^post-1KiB/", "rate", "req/s"),
    ("POST 1 KiB echo, server CPU", r"^post-1KiB/", "server_us", "µs per request (less is better)"),
    ("JSON in and out, server CPU", r"^json/", "server_us", "µs per request (less is better)"),
    ("GET /live", r"^live/", "rate", "req/s"),
    ("POST 64 KiB echo, server CPU", r"^post-64KiB/", "server_us", "µs per request (less is better)"),
    ("Reply of 100 chunks, server CPU", r"^chunks/", "server_us", "µs per reply (less is better)"),
    ("1000 other streams open: cost per request", r"^open-streams/", "open_cost", "by that with none (1 is best)"),
    ("Clients, 32 at a time", r"^client-32/", "rate", "req/s"),
    ("Clients, 32 at a time, client CPU", r"^client-32/", "client_us", "µs per request (less is better)"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = compare.common_options(
        (__doc__ or "").split("\n\n")[0], "short 3, else 7", "short 0.4, else 1", "short 165, else 1500"
    )
    args = parser.parse_args(argv)
    return compare.complete(parser, args, "compare-http", *((3, 0.4, 165.0) if args.short else (7, 1.0, 1500.0)))


def tool_versions() -> dict[str, str]:
    found = {}
    for name, command in {"nghttp2": ["nghttpd", "--version"], "node": ["node", "--version"]}.items():
        with contextlib.suppress(OSError):
            text = subprocess.run(command, capture_output=True, text=True).stdout.strip()
            found[name] = text.rsplit("/", 1)[-1].removeprefix("v")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        compare.list_rows(list(select_rows(args)))
        return 0
    env = compare.environment(
        ("dynwire", "uvloop", "h2", "granian", "Hypercorn", "grpcio", "httpx", "pycurl", "orjson", "Cython")
    )
    env["versions"] |= tool_versions()
    return compare.execute(args, HttpBench(args), env, HTTP_PROMISES, markdown, CHARTS)


if __name__ == "__main__":
    sys.exit(main())
