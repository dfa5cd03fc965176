#!/usr/bin/env python3
"""How fast is dynwire beside its peers, on the same machine, at the same minute?

For each row (a workload in an environment) every contestant gets a server and a client process of its own on a free loopback
port. A round runs every contestant once, in turn; the next round starts with another one, so that drift of the machine hits all
alike. Reported is the median over rounds with minimum and maximum. Results go to ``benchmarks/results/``: raw JSON, a Markdown
table, charts as PNG and SVG. At the end stands a table of the ratios that are promised (promises.py) and whether this run shows
them.

    python benchmarks/compare.py --short                  under 3 minutes: every promised ratio
    python benchmarks/compare.py                          more payloads, peers and rounds
    python benchmarks/compare.py --full                   every placement, loop and congestion control
    python benchmarks/compare.py --only 'unary-64B-c256' --check
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import platform
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from promises import PROMISES, Promise  # noqa: E402 - lies beside this script

KIB, MIB = 1 << 10, 1 << 20
STARTUP_TIMEOUT_S = 20.0
QUIET = 0.10  # share of the machine that other processes may use during a measurement; above it, it is repeated (--patience)


# What is compared ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    module: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    uses_loop: bool = True
    needs: str = ""  # distribution


def _dynwire(about: str, spin_us: int, **options: Any) -> Peer:
    return Peer("dynwire_peer.py", about, options, {"DYNWIRE_TCP_SPIN_US": str(spin_us)})


PEERS: dict[str, Peer] = {
    "c": Peer("limits", "C, blocking recv and send: the limit for one call in flight", {"mode": "block"}, uses_loop=False),
    "c-epoll": Peer(
        "limits", "C, epoll server, pipelined client: the limit for many in flight", {"mode": "epoll"}, uses_loop=False
    ),
    "c-spin": Peer("limits", "C, both ends polling", {"mode": "spin"}, uses_loop=False),
    "dynwire": _dynwire("dynwire, asyncio on both sides, no spinning", 0),
    "dynwire-spin": _dynwire("dynwire, asyncio on both sides, spinning up to 60 us", 60),
    "dynwire-sync": _dynwire("dynwire, blocking client with one shared manager, asyncio server", 0, face="sync"),
    "dynwire-sync-spin": _dynwire("the same, spinning up to 60 us", 60, face="sync"),
    "dynwire-blocking": _dynwire("dynwire, blocking on both sides", 0, face="blocking"),
    "picows": Peer("picows_rpc.py", "RPC made by hand on picows: futures by id, handler in the callback", needs="picows"),
    "picows-split": Peer(
        "picows_rpc.py", "the same, large payloads in a frame of their own behind the header", {"split": True}, needs="picows"
    ),
    "protocol": Peer("raw_protocol.py", "RPC made by hand on an asyncio Protocol, pure Python"),
    "zmq.asyncio": Peer("zmq_aio.py", "zmq.asyncio DEALER/ROUTER, handler inline", needs="pyzmq"),
    "pyzmq-rep": Peer("zmq_sync.py", "pyzmq REQ/REP, blocking", {"pattern": "rep"}, uses_loop=False, needs="pyzmq"),
    "pyzmq-dealer": Peer(
        "zmq_sync.py", "pyzmq DEALER/ROUTER, blocking, a socket per thread", {"pattern": "router"}, uses_loop=False, needs="pyzmq"
    ),
    "grpc.aio": Peer("grpc_aio.py", "grpc.aio, generic handlers on raw bytes", needs="grpcio"),
    "grpcio": Peer("grpc_sync.py", "grpcio, shared channel, 32 server threads", uses_loop=False, needs="grpcio"),
    "socket": Peer("raw_socket.py", "blocking sockets in pure Python, one per thread", uses_loop=False),
}


@dataclass(frozen=True)
class Row:
    """One table: a workload in an environment, and who takes part (``peer`` or ``peer:kind``)."""

    workload: str  # unary | threads | stream | first | beside | idle
    kind: str
    size: int
    concurrency: int
    contestants: tuple[str, ...]
    level: int  # 0 short, 1 normal, 2 full
    label: str
    family: str
    placement: str
    loop: str
    congestion: str
    items: int = 0
    large: int = 0
    measure_s: float = 0.0  # 0: the mode's
    once: bool = False

    @property
    def name(self) -> str:
        return f"{self.label}/{self.placement}/{self.loop}/{self.congestion}"

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.family, self.placement, self.loop, self.congestion

    def unit(self) -> str:
        if self.family == "large":
            return "GB/s"
        return "items/s" if self.workload == "stream" else "calls/s"


def text_size(size: int) -> str:
    for unit, factor in (("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{size // factor}{unit}"
    return f"{size}B"


def all_rows() -> list[Row]:
    rows: list[Row] = []

    def add(
        level: int,
        family: str,
        label: str,
        where: tuple[str, str, str],
        contestants: str,
        workload: str,
        kind: str,
        size: int,
        concurrency: int,
        **more: Any,
    ) -> None:
        rows.append(Row(workload, kind, size, concurrency, tuple(contestants.split()), level, label, family, *where, **more))

    split, one, free = (("split", "uvloop", "default"), ("one", "uvloop", "default"), ("free", "uvloop", "default"))
    wheres = [(p, loop, "default") for loop in ("uvloop", "asyncio") for p in ("split", "one", "free")]

    for where in wheres:
        for size in (64, KIB):
            for concurrency in (1, 32, 256):
                c = "c" if concurrency == 1 else "c-epoll"
                zmq = "" if concurrency == 1 else " pyzmq-dealer"
                everyone = f"{c} dynwire picows protocol zmq.asyncio{zmq} grpc.aio"
                short = {
                    (split, 64, 1): "c dynwire picows zmq.asyncio grpc.aio",
                    (split, 64, 32): "c-epoll dynwire picows grpc.aio",
                    (split, 64, 256): "c-epoll dynwire picows zmq.asyncio pyzmq-dealer grpc.aio",
                    (one, 64, 1): "c dynwire picows",
                    (free, 64, 256): "dynwire picows",
                    (("split", "asyncio", "default"), 64, 256): "dynwire picows",
                }.get((where, size, concurrency))
                label = f"unary-{text_size(size)}-c{concurrency}"
                if short is not None:
                    add(0, "unary", label, where, short, "unary", "echo", size, concurrency)
                normal = where[1] == "uvloop" and (where[0] == "split" or size == 64)
                add(1 if normal else 2, "unary", label, where, everyone, "unary", "echo", size, concurrency)

        level = {split: 0, free: 1}.get(where, 2)
        add(level, "unary", "object-64B-c256", where, "dynwire dynwire:object", "unary", "echo", 64, 256)
        add(level, "unary", "suspend-64B-c256", where, "dynwire:suspend picows picows:suspend", "unary", "echo", 64, 256)
        add(level, "stream", "first-64B", where, "dynwire:first dynwire", "unary", "echo", 64, 1)
        for at_once in (1, 8):
            peers = "dynwire picows zmq.asyncio" if at_once == 8 and level == 0 else "dynwire picows zmq.asyncio grpc.aio"
            add(
                level if at_once == 8 else max(level, 1),
                "stream",
                f"stream-64B-x{at_once}",
                where,
                peers,
                "stream",
                "bulk",
                64,
                at_once,
                items=1000,
            )
        add(
            max(level, 1),
            "stream",
            "stream-1KiB-x8",
            where,
            "dynwire picows zmq.asyncio grpc.aio",
            "stream",
            "bulk",
            KIB,
            8,
            items=1000,
        )
        for at_once in (1, 64, 256):
            peers = "dynwire picows grpc.aio" if at_once == 256 and level == 0 else "dynwire picows zmq.asyncio grpc.aio"
            add(
                level if at_once == 256 else max(level, 1),
                "stream",
                f"tick-64B-x{at_once}",
                where,
                peers,
                "stream",
                "tick",
                64,
                at_once,
                items=100,
            )

        if where[1] == "uvloop":
            for threads in (1, 8, 32):
                peers = "dynwire-sync dynwire-blocking socket pyzmq-dealer grpcio"
                if threads == 1:
                    peers = "c dynwire-sync dynwire-blocking socket pyzmq-rep grpcio"
                    if where == one:
                        add(0, "blocking", "blocking-64B-t1", where, "c dynwire-sync socket pyzmq-rep", "threads", "echo", 64, 1)
                elif where == split:
                    add(
                        0,
                        "blocking",
                        f"blocking-64B-t{threads}",
                        where,
                        "dynwire-sync socket pyzmq-dealer grpcio",
                        "threads",
                        "echo",
                        64,
                        threads,
                    )
                add(1, "blocking", f"blocking-64B-t{threads}", where, peers, "threads", "echo", 64, threads)
                add(
                    1,
                    "spin",
                    f"spin-blocking-64B-t{threads}",
                    where,
                    "dynwire-sync-spin dynwire-sync socket",
                    "threads",
                    "echo",
                    64,
                    threads,
                )
            add(1, "blocking", "blocking-stream-64B", where, "dynwire-sync grpcio", "stream", "bulk", 64, 1, items=1000)

    add(0, "spin", "spin-64B-c1", split, "c-spin dynwire-spin dynwire picows", "unary", "echo", 64, 1)
    add(0, "spin", "spin-64B-c32", split, "dynwire-spin dynwire picows", "unary", "echo", 64, 32)
    add(1, "spin", "spin-64B-c256", split, "dynwire-spin dynwire picows", "unary", "echo", 64, 256)
    for concurrency in (1, 32):
        add(0, "spin", f"spin-64B-c{concurrency}", one, "dynwire-spin dynwire", "unary", "echo", 64, concurrency)
        add(1, "spin", f"spin-64B-c{concurrency}", free, "dynwire-spin dynwire picows", "unary", "echo", 64, concurrency)

    for congestion in ("default", "reno"):
        for placement in ("split", "free", "one"):
            where = (placement, "uvloop", congestion)
            level = 0 if placement == "split" else 2
            everyone = "c dynwire dynwire-sync picows picows-split pyzmq-rep zmq.asyncio socket grpc.aio grpcio"
            if level == 0:
                add(0, "large", "sink-16MiB-c1", where, "c dynwire pyzmq-rep picows", "unary", "sink", 16 * MIB, 1)
                for size in (MIB, 16 * MIB):
                    add(0, "large", f"echo-{text_size(size)}-c1", where, "dynwire pyzmq-rep grpc.aio", "unary", "echo", size, 1)
            for size in (MIB, 16 * MIB):
                for kind in ("sink", "echo"):
                    add(max(level, 1), "large", f"{kind}-{text_size(size)}-c1", where, everyone, "unary", kind, size, 1)
            add(max(level, 1), "large", "echo-64KiB-c1", where, everyone, "unary", "echo", 64 * KIB, 1)
            add(
                max(level, 1),
                "large",
                "echo-64KiB-c32",
                where,
                "dynwire picows zmq.asyncio grpc.aio",
                "unary",
                "echo",
                64 * KIB,
                32,
            )
            add(max(level, 1), "large", "echo-1MiB-c8", where, "dynwire picows zmq.asyncio grpc.aio", "unary", "echo", MIB, 8)

    add(0, "beside", "beside-16MiB", split, "dynwire dynwire:beside", "unary", "echo", 64, 1, large=16 * MIB)
    add(0, "idle", "idle-10000", split, "dynwire", "idle", "idle", 64, 10000, once=True)

    # A row that exists at several levels (with more contestants at the higher one) is listed from the lowest on.
    return rows


def takes_part(contestant: str, args: argparse.Namespace) -> bool:
    """By the options --peers and --without; ``*`` stands for anything in them, the part behind a colon does not count."""
    name = contestant.split(":")[0]

    def named(patterns: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern.strip()) for pattern in patterns.split(","))

    return (not args.peers or named(args.peers)) and not (args.without and named(args.without))


def select_rows(args: argparse.Namespace) -> list[Row]:
    level = 2 if args.full else 0 if args.short else 1
    chosen: dict[str, Row] = {}
    for row in sorted(all_rows(), key=lambda r: r.level):
        if row.level > level or (args.only and not re.search(args.only, row.name)):
            continue
        if args.placement != "all" and row.placement != args.placement:
            continue
        if args.loop != "all" and row.loop != args.loop:
            continue
        if args.congestion != "all" and row.congestion != args.congestion:
            continue
        contestants = tuple(c for c in row.contestants if takes_part(c, args))
        if row.name in chosen:  # the same row at a higher level: all who take part at either
            earlier = chosen[row.name]
            contestants = earlier.contestants + tuple(c for c in contestants if c not in earlier.contestants)
        if contestants:
            chosen[row.name] = dataclasses.replace(row, contestants=contestants)
    order: dict[tuple[str, ...], int] = {}
    for row in chosen.values():
        order.setdefault(row.group, len(order))
    return sorted(chosen.values(), key=lambda r: (order[r.group], r.size))


# Processes ----------------------------------------------------------------------------------------------------------------


class PeerFailed(Exception):
    pass


class RenoNamespace:
    """A private network namespace whose loopback uses reno, for every peer alike. Children enter it with nsenter."""

    def __init__(self) -> None:
        self.prefix: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> str | None:
        """Returns why it is not possible, or None."""
        if not shutil.which("unshare") or not shutil.which("nsenter"):
            return "unshare or nsenter is not installed"
        script = (
            "import fcntl, socket, struct, sys\n"
            "s = socket.socket()\n"
            "fcntl.ioctl(s, 0x8914, struct.pack('16sH22x', b'lo', 0x41))\n"  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING
            "open('/proc/sys/net/ipv4/tcp_congestion_control', 'w').write('reno')\n"
            "print(open('/proc/sys/net/ipv4/tcp_congestion_control').read().strip(), flush=True)\n"
            "sys.stdin.read()\n"
        )
        reason = ""
        for flags, enter in (("-n", []), ("-rn", ["-U", "--preserve-credentials"])):
            process = subprocess.Popen(
                ["unshare", flags, sys.executable, "-c", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert process.stdout and process.stderr
            if process.stdout.readline().strip() == "reno":
                self.process = process
                self.prefix = ["nsenter", "-t", str(process.pid), *enter, "-n", "--"]
                return None
            reason = (process.stderr.read().strip().splitlines() or ["no reason given"])[-1]
            process.wait()
        return reason

    def stop(self) -> None:
        if self.process:
            assert self.process.stdin
            self.process.stdin.close()
            _end(self.process)
            self.process = None


def _end(process: subprocess.Popen[Any], patience_s: float = 2.0) -> None:
    """End one of our own processes: it stops by itself when its stdin closes; if not, by its pid."""
    for step in (None, signal.SIGTERM, signal.SIGKILL):
        if step is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(step)
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue


class Pair:
    """Server and client process of one peer in one environment."""

    def __init__(self, peer_name: str, row: Row, bench: Bench) -> None:
        self.name, self.peer, self.row, self.bench = peer_name, bench.peers[peer_name], row, bench
        self.processes: list[subprocess.Popen[bytes]] = []
        self.buffers: dict[int, bytes] = {}
        self.directory = tempfile.mkdtemp(prefix="dynwire-bench-", dir=bench.scratch)
        self.log = open(os.path.join(self.directory, "stderr"), "w+b")  # noqa: SIM115 - closed in stop()

    def command(self, role: str, arguments: list[str]) -> list[str]:
        if self.peer.module == "limits":
            return [str(self.bench.limits), role, *arguments]
        return [sys.executable, str(HERE / "peers" / self.peer.module), role, *arguments]

    def _spawn(self, role: str, arguments: list[str], core: int | None) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", **self.peer.env}
        prefix = self.bench.reno.prefix if self.row.congestion == "reno" else []
        command = self.command(role, arguments)
        before = os.sched_getaffinity(0)
        if core is not None:
            os.sched_setaffinity(0, {core})  # inherited by every thread of the child
        try:
            process = subprocess.Popen(
                prefix + command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env=env,
                cwd=self.directory,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, before)
        self.processes.append(process)
        assert process.stdout
        self.buffers[process.stdout.fileno()] = b""
        return process

    def _line(self, process: subprocess.Popen[bytes], timeout: float) -> dict[str, Any]:
        assert process.stdout
        fd = process.stdout.fileno()
        end = time.monotonic() + timeout
        while b"\n" not in self.buffers[fd]:
            ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise PeerFailed(f"no answer within {timeout:.0f} s")
            data = os.read(fd, 65536)
            if not data:
                raise PeerFailed(f"process ended: {self.log_tail()}")
            self.buffers[fd] += data
        line, self.buffers[fd] = self.buffers[fd].split(b"\n", 1)
        return dict(json.loads(line))

    def log_tail(self) -> str:
        self.log.flush()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def placement(self) -> tuple[int | None, int | None]:
        """The cores of server and client."""
        cores = self.bench.cores
        return {"split": (cores[0], cores[1]), "one": (cores[0], cores[0])}.get(self.row.placement, (None, None))

    def more_setup(self) -> dict[str, Any]:
        """Entries of the setup that only another script's peers know."""
        return {}

    def start(self) -> None:
        server_core, client_core = self.placement()
        if self.peer.module == "limits":
            mode = self.peer.options["mode"]
            server = self._spawn("server", [mode], server_core)
            port = self._line(server, STARTUP_TIMEOUT_S)["port"]
            client = self._spawn("client", [str(port), str(server.pid), "spin" if mode == "spin" else "block"], client_core)
        else:
            options = {**self.peer.options, "large": self.row.family == "large"}
            setup = {"loop": self.row.loop, "directory": self.directory, "options": options, **self.more_setup()}
            server = self._spawn("server", [json.dumps(setup)], server_core)
            setup |= {"port": self._line(server, STARTUP_TIMEOUT_S)["port"], "server_pid": server.pid}
            client = self._spawn("client", [json.dumps(setup)], client_core)
        self._line(client, STARTUP_TIMEOUT_S)
        self.server, self.client = server, client

    def workload(self, row: Row) -> str:
        return row.workload

    def run(self, row: Row, kind: str, seconds: float) -> dict[str, Any]:
        workload = self.workload(row)
        if kind in ("first", "beside"):
            workload, kind = kind, "bulk" if kind == "first" else "echo"
        if self.peer.module == "limits":
            line = f"{kind} {row.size} {row.concurrency} {seconds}"
        else:
            if (workload == "unary" and not self.peer.uses_loop) or self.peer.options.get("face", "async") != "async":
                workload = (
                    "stream"
                    if workload == "stream"
                    else "pipeline"
                    if row.workload == "unary" and row.concurrency > 1
                    else "threads"
                )
            line = json.dumps(
                {
                    "workload": workload,
                    "kind": kind,
                    "size": row.size,
                    "concurrency": row.concurrency,
                    "seconds": seconds,
                    "items": row.items or 1,
                    "large": row.large,
                    "large_kind": "sink",
                }
            )
        result = self.watched(lambda: self.ask(line, seconds))
        result["rss_client"], result["rss_server"] = rss_bytes(self.client.pid), rss_bytes(self.server.pid)
        return result

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """Send a command to the client process and wait for its result."""
        assert self.client.stdin
        self.client.stdin.write(line.encode() + b"\n")
        self.client.stdin.flush()
        result = self._line(self.client, 15.0 + seconds * 12)
        if "error" in result:
            raise PeerFailed(result["error"])
        return result

    def watched(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one measurement and add which share of the machine somebody else used meanwhile."""
        cpu0, own0, t0 = busy_cpu_s(), self.cpu_s(), time.monotonic()
        result = measure()
        wall, busy, own = time.monotonic() - t0, busy_cpu_s() - cpu0, self.cpu_s() - own0
        result["others"] = max(0.0, (busy - own) / wall / len(self.bench.cores))
        return result

    def cpu_s(self) -> float:
        """CPU seconds of both processes so far, from their process clocks (clock_getcpuclockid(3))."""
        return sum(time.clock_gettime((~process.pid << 3) | 2) for process in (self.client, self.server))

    def stop(self) -> None:
        for process in reversed(self.processes):  # client first, so that no server is accused of leaving
            if process.stdin:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            _end(process)
            if process.stdout:
                process.stdout.close()
        self.processes.clear()
        self.log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def busy_cpu_s() -> float:
    with open("/proc/stat") as file:
        fields = [int(n) for n in file.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# The run ------------------------------------------------------------------------------------------------------------------


class Progress:
    def __init__(self, total: int) -> None:
        self.total, self.done, self.tty = total, 0, sys.stderr.isatty()
        self.started = time.monotonic()

    def show(self, text: str) -> None:
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            line = f"[{self.done}/{self.total} {time.monotonic() - self.started:4.0f} s] {text}"
            print(f"\r{line[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr)
        print(text, file=sys.stderr, flush=True)


class Bench:
    """The rows of this script; compare_http.py and compare_nats.py derive their own from it."""

    peers = PEERS
    caption = "dynwire beside its peers: server and client processes on a core each unless named otherwise"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scratch = tempfile.mkdtemp(prefix="dynwire-compare-")
        self.limits = Path(self.scratch) / "limits"
        self.cores = sorted(os.sched_getaffinity(0))
        self.reno = RenoNamespace()
        self.notes: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.pairs: dict[str, Pair] = {}
        self.missing: dict[str, str] = {}
        self.retried = 0

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.progress.print(f"note: {text}")

    def build_limits(self) -> None:
        compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
        if compiler is None:
            self.missing["limits"] = "no C compiler"
            return
        built = subprocess.run(
            [compiler, "-O2", "-o", str(self.limits), str(HERE / "peers" / "limits.c"), "-lpthread"],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            self.missing["limits"] = built.stderr.strip().splitlines()[-1]

    def rows(self) -> list[Row]:
        return select_rows(self.args)

    def make_pair(self, peer_name: str, row: Row) -> Pair:
        return Pair(peer_name, row, self)

    def prepare(self, rows: list[Row]) -> list[Row]:
        """Build and start what the rows need; returns those that can run here."""
        self.build_limits()
        if any(r.congestion == "reno" for r in rows):
            reason = self.reno.start()
            if reason is not None:
                self.note(f"reno rows are left out: no private network namespace here ({reason})")
                rows = [r for r in rows if r.congestion != "reno"]
        return rows

    def run(self) -> None:
        rows = self.rows()
        self.progress = Progress(len(rows))
        if len(self.cores) < 2:
            self.note("one core only: split rows are left out")
            rows = [r for r in rows if r.placement != "split"]
        rows = self.prepare(rows)
        deadline = time.monotonic() + self.args.budget
        group: tuple[str, ...] | None = None
        failed: dict[str, str] = {}
        self.progress.total = len(rows)
        try:
            for index, row in enumerate(rows):
                if row.group != group:
                    self.stop_pairs()
                    group, failed = row.group, {}
                left = deadline - time.monotonic()
                if left <= 0:
                    self.note(
                        f"time budget of {self.args.budget:.0f} s used up: {len(rows) - index} rows left out, from {row.name} on"
                    )
                    break
                self.run_row(row, failed, left / (len(rows) - index) * (2.0 if index < len(rows) * 0.8 else 1.0))
                self.progress.done += 1
        finally:
            self.close()

    def pair(self, peer_name: str, row: Row, failed: dict[str, str]) -> Pair | None:
        peer = self.peers[peer_name]
        if peer.module in self.missing or peer_name in failed:
            failed.setdefault(peer_name, self.missing.get(peer.module, ""))
            return None
        if peer_name not in self.pairs:
            self.progress.show(f"{row.name}: starting {peer_name}")
            pair = self.pairs[peer_name] = self.make_pair(peer_name, row)
            try:
                pair.start()
            except PeerFailed as error:
                self.drop(peer_name, row, str(error), failed)
                return None
        return self.pairs[peer_name]

    def drop(self, peer_name: str, row: Row, reason: str, failed: dict[str, str]) -> None:
        failed[peer_name] = reason
        self.note(f"{row.name}: {peer_name} left out: {reason}")
        pair = self.pairs.pop(peer_name, None)
        if pair is not None:
            pair.stop()

    def run_row(self, row: Row, failed: dict[str, str], slice_s: float) -> None:
        started = time.monotonic()
        seconds = row.measure_s or self.args.seconds
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in row.contestants}
        rounds = 1 if row.once else self.args.rounds
        kind_failed: set[str] = set()
        for round_index in range(rounds):
            if round_index and time.monotonic() - started > slice_s:
                break
            shift = round_index % len(row.contestants)
            for contestant in row.contestants[shift:] + row.contestants[:shift]:
                peer_name, _, kind = contestant.partition(":")
                if contestant in kind_failed:
                    continue
                pair = self.pair(peer_name, row, failed)
                if pair is None:
                    continue
                self.progress.show(f"{row.name}: round {round_index + 1}/{rounds}, {contestant}")
                try:
                    for again in range(self.args.patience, -1, -1):
                        run = pair.run(row, kind or row.kind, seconds)
                        if run["others"] < QUIET or not again:
                            break
                        self.retried += 1
                    runs[contestant].append(run)
                except PeerFailed as error:
                    kind_failed.add(contestant)
                    self.drop(peer_name, row, f"{contestant}: {error}", failed)
                    failed.pop(peer_name, None)  # other rows of the group may work: start afresh
        self.results.append(self.summarize(row, runs))
        self.progress.print(self.brief(self.results[-1]))

    def summarize(self, row: Row, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        return summarize(row, runs, self.peers)

    def brief(self, result: dict[str, Any]) -> str:
        return brief(result)

    def stop_pairs(self) -> None:
        for pair in self.pairs.values():
            pair.stop()
        self.pairs.clear()

    def close(self) -> None:
        self.stop_pairs()
        self.reno.stop()
        shutil.rmtree(self.scratch, ignore_errors=True)


def summarize(row: Row, runs: dict[str, list[dict[str, Any]]], peers: dict[str, Peer]) -> dict[str, Any]:
    contestants = {}
    for name, raw in runs.items():
        if not raw:
            continue
        peer = peers[name.split(":")[0]]
        for run in raw:
            scale = row.size / 1e9 if row.family == "large" else 1.0
            run["rate"] = run["units"] * scale / run["seconds"]
            per_100k = 1e5 / run["units"]
            run["cpu_s_per_100k"] = (run["cpu_client"] + run["cpu_server"]) * per_100k
            run["cpu_client_s_per_100k"] = run["cpu_client"] * per_100k
            run["cpu_server_s_per_100k"] = run["cpu_server"] * per_100k
            if run.get("cpu_broker") is not None:
                run["cpu_broker_s_per_100k"] = run["cpu_broker"] * per_100k
        metrics = {}
        for metric in [
            "rate",
            "p50_us",
            "p99_us",
            "cpu_s_per_100k",
            "cpu_client_s_per_100k",
            "cpu_server_s_per_100k",
            "cpu_broker_s_per_100k",
            "rss_client",
            "rss_server",
            "others",
            "server_bytes_per_stream",
            "client_bytes_per_stream",
            "transfers",
        ]:
            values = [run[metric] for run in raw if run.get(metric) is not None]
            if values:
                metrics[metric] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        contestants[name] = {
            "loop": row.loop if peer.uses_loop else "-",
            "about": peer.about,
            "rounds": len(raw),
            **metrics,
            "raw": raw,
        }
    return {
        "name": row.name,
        "workload": row.workload,
        "kind": row.kind,
        "payload": row.size,
        "concurrency": row.concurrency,
        "items": row.items,
        "placement": row.placement,
        "loop": row.loop,
        "congestion": row.congestion,
        "unit": row.unit(),
        "family": row.family,
        "contestants": contestants,
    }


def human(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    for factor, unit in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.{digits}g}{unit}"
    return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"


def brief(result: dict[str, Any]) -> str:
    parts = []
    for name, c in result["contestants"].items():
        parts.append(
            f"{name} {human(c['rate']['median'])}/s" if result["unit"] != "GB/s" else f"{name} {c['rate']['median']:.2f}"
        )
        if result["concurrency"] == 1 and result["unit"] != "GB/s" and "p50_us" in c:
            parts[-1] += f" ({c['p50_us']['median']:.1f} us)"
    return f"{result['name']}: " + ", ".join(parts or ["nobody took part"])


# Output -------------------------------------------------------------------------------------------------------------------


def judge(results: list[dict[str, Any]], promises: list[Promise]) -> list[dict[str, Any]]:
    """Every promise whose row was run, with the ratio measured (medians) and its range over single rounds."""
    by_name = {r["name"]: r for r in results}
    verdicts = []
    for promise in promises:
        row = by_name.get(promise.row)
        if row is None:
            continue
        left, right = row["contestants"].get(promise.left), row["contestants"].get(promise.right)
        verdict: dict[str, Any] = {**dataclasses.asdict(promise), "measured": None, "met": None}
        if left and promise.metric in left and (not promise.right or (right and promise.metric in right)):
            verdict["measured"] = left[promise.metric]["median"] / (right[promise.metric]["median"] if right else 1.0)
            pairs = list(zip(left["raw"], right["raw"] if right else [{promise.metric: 1.0}] * len(left["raw"]), strict=False))
            ratios = [a[promise.metric] / b[promise.metric] for a, b in pairs]
            verdict["range"] = [min(ratios), max(ratios)]
            verdict["met"] = promise.met(verdict["measured"])
        verdicts.append(verdict)
    return verdicts


def bound_text(verdict: dict[str, Any]) -> str:
    bound = verdict["bound"]
    number = f"1/{1 / bound:.0f}" if bound < 0.24 else f"{bound:.4g}"
    return f"{'≥' if verdict['op'] == '>=' else '≤'} {number}" + (" ×" if verdict["right"] else "")


def promise_table(verdicts: list[dict[str, Any]], markdown: bool) -> str:
    lines = []
    for v in verdicts:
        measured = "not measured" if v["measured"] is None else f"{v['measured']:.4g} ({v['range'][0]:.3g}-{v['range'][1]:.3g})"
        met = {True: "yes", False: "NO", None: "-"}[v["met"]]
        metric = v["metric"].replace("_us", "").replace("_s_per_100k", "").replace("server_bytes_per_stream", "bytes")
        lines.append(
            (
                v["text"],
                f"{v['left']} / {v['right']}" if v["right"] else v["left"],
                metric,
                bound_text(v),
                measured,
                met,
                v["row"],
            )
        )
    head = ("promise", "who", "metric", "wanted", "measured (range)", "met", "row")
    if markdown:
        rows = [head, tuple("---" for _ in head), *lines]
        return "\n".join("| " + " | ".join(r) + " |" for r in rows)
    widths = [max(len(r[i]) for r in [head, *lines]) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, *lines])


def result_tables(results: list[dict[str, Any]]) -> str:
    head = (
        "workload",
        "payload",
        "concurrency",
        "placement",
        "loop",
        "congestion",
        "peer",
        "rate (min-max)",
        "unit",
        "p50 us",
        "p99 us",
        "CPU s/100k client + server",
        "RSS MiB client + server",
        "others",
    )
    out = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in results:
        for name, c in sorted(r["contestants"].items(), key=lambda item: -item[1]["rate"]["median"]):
            rate = c["rate"]
            line = [
                r["name"].split("/")[0],
                text_size(r["payload"]),
                str(r["concurrency"]),
                r["placement"],
                c["loop"],
                r["congestion"],
                f"**{name}**" if name.startswith("dynwire") else name,
                f"{human(rate['median'])} ({human(rate['min'])}-{human(rate['max'])})",
                r["unit"],
                f"{c['p50_us']['median']:.1f}" if "p50_us" in c else "-",
                f"{c['p99_us']['median']:.1f}" if "p99_us" in c else "-",
                f"{c['cpu_client_s_per_100k']['median']:.3g} + {c['cpu_server_s_per_100k']['median']:.3g}",
                f"{c['rss_client']['median'] / MIB:.0f} + {c['rss_server']['median'] / MIB:.0f}",
                f"{c['others']['median'] * 100:.0f} %",
            ]
            if "cpu_broker_s_per_100k" in c:
                line[11] += f"; nats-server {c['cpu_broker_s_per_100k']['median']:.3g}"
            if "server_bytes_per_stream" in c:
                line[7] += f"; {c['server_bytes_per_stream']['median']:.0f} B of server RSS per stream"
            out.append("| " + " | ".join(line) + " |")
    return "\n".join(out)


def environment(packages: tuple[str, ...]) -> dict[str, Any]:
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)

    def read(path: str) -> str:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
        return "unknown"

    model = re.search(r"model name\s*:\s*(.*)", read("/proc/cpuinfo"))
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": model.group(1) if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit,
        "congestion_default": read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
    }


def markdown(report: dict[str, Any], stem: str) -> str:
    return page(
        report,
        stem,
        "dynwire beside its peers",
        [
            "Placement: split = server on one core, client on another; one = both on one core; free = not pinned.",
            "Congestion control: default = the system's (dynwire chooses its own for a peer on the same host); reno = all peers",
            "in a namespace with reno. Streams count items, and their latency is that of a whole stream. Others: share of the",
            "machine that other processes used meanwhile.",
        ],
        PEERS,
    )


def page(
    report: dict[str, Any], stem: str, title: str, remarks: list[str], peers: Mapping[str, Any], results: list[str] | None = None
) -> str:
    """The report as Markdown; ``results`` in place of this script's tables of all rows."""
    env = report["environment"]
    met = sum(v["met"] is True for v in report["promises"])
    known = [c for r in report["rows"] for c in r["contestants"]]
    lines = [
        f"# {title}",
        "",
        f"{env['time']}, {env['cpu']}, {env['cores']} cores, Linux {env['kernel']}, Python {env['python']}, "
        f"commit {env['commit'] or '?'}, "
        f"default congestion control {env['congestion_default']}, load at start {env['load_at_start']:.2f}; "
        + ", ".join(f"{k} {v}" for k, v in env["versions"].items())
        + f". {report['rounds']} rounds of {report['seconds']} s, median (min-max).",
        "",
        *remarks,
        "",
        *[f"- `{name}`: {peer.about}" for name, peer in peers.items() if any(c.split(":")[0] == name for c in known)],
        "",
        f"![chart]({stem}.png)",
        "",
        *(
            [f"## Promises: {met} of {len(report['promises'])} met", "", promise_table(report["promises"], markdown=True), ""]
            if report["promises"]
            else []
        ),
        *(results if results is not None else ["## All rows", "", result_tables(report["rows"]), ""]),
        *(["## Notes", "", *[f"- {n}" for n in report["notes"]], ""] if report["notes"] else []),
    ]
    return "\n".join(lines)


CHARTS = [  # title, row pattern, metric, axis
    ("64 B calls, 256 in flight", r"^unary-64B-c256/split/uvloop", "rate", "calls/s"),
    ("64 B calls, 32 in flight", r"^unary-64B-c32/split/uvloop", "rate", "calls/s"),
    ("64 B call, one core, p50", r"^unary-64B-c1/one/uvloop", "p50_us", "µs (less is better)"),
    ("64 B, 8 blocking threads", r"^blocking-64B-t8/split", "rate", "calls/s"),
    ("64 B items, 8 streams", r"^stream-64B-x8/split/uvloop", "rate", "items/s"),
    ("64 B item per tick, 256 streams", r"^tick-64B-x256/split/uvloop", "rate", "items/s"),
    ("16 MiB one way", r"^sink-16MiB-c1/split/uvloop/default", "rate", "GB/s"),
    ("16 MiB one way, reno", r"^sink-16MiB-c1/split/uvloop/reno", "rate", "GB/s"),
    ("CPU per 100,000 calls, 256 in flight", r"^unary-64B-c256/split/uvloop", "cpu_s_per_100k", "s (less is better)"),
]


def chart(report: dict[str, Any], base: Path, charts: list[tuple[str, str, str, str]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dynwire"
    from matplotlib import pyplot

    panels = []
    for title, pattern, metric, axis in charts:
        for row in report["rows"]:
            if re.search(pattern, row["name"]) and row["contestants"]:
                panels.append((title, row, metric, axis))
                break
    if not panels:  # a selection that has none of the usual rows: one panel per row
        panels = [(r["name"], r, "rate", r["unit"]) for r in report["rows"] if r["contestants"]][:9]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 2.6 * lines + 0.5), squeeze=False)
    for spot in axes.flat[len(panels) :]:
        spot.set_visible(False)
    for spot, (title, row, metric, axis) in zip(axes.flat, panels, strict=False):
        bars = [(n, c[metric]) for n, c in row["contestants"].items() if metric in c]
        bars.sort(key=lambda b: b[1]["median"], reverse=metric != "rate")
        values = [b[1]["median"] for b in bars]
        errors = [[b[1]["median"] - b[1]["min"] for b in bars], [b[1]["max"] - b[1]["median"] for b in bars]]
        colors = ["#c8553d" if n.startswith("dynwire") else "#444444" if n.startswith("c") else "#9db4c0" for n, _ in bars]
        spot.barh([n for n, _ in bars], values, color=colors, xerr=errors, error_kw={"elinewidth": 0.8, "ecolor": "#222222"})
        logarithmic = bool(values) and max(values) > 20 * min(values)
        if logarithmic:
            spot.set_xscale("log")
        spot.xaxis.set_major_formatter(lambda value, _: human(value).replace(" ", "") if value else "0")
        for y, value in enumerate(values):
            spot.annotate(
                human(value), (value + errors[1][y], y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
            )
        spot.set_title(title, fontsize=10)
        spot.set_xlabel(axis + (", log scale" if logarithmic else ""), fontsize=8)
        spot.tick_params(labelsize=8)
        spot.margins(x=0.25)
        for side in ("top", "right"):
            spot.spines[side].set_visible(False)
    env = report["environment"]
    figure.suptitle(f"{report['caption']}, loopback, {env['cores']} cores, Python {env['python']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(base.with_suffix(".png"), dpi=120)
    figure.savefig(base.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def common_options(description: str, rounds: str, seconds: str, budget: str) -> argparse.ArgumentParser:
    """The options of this script and of the others beside it; the texts name the defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--short", action="store_true", help="every promised ratio, under 3 minutes")
    parser.add_argument("--only", metavar="REGEX", help="rows whose name (as --list prints it) matches")
    parser.add_argument("--rounds", type=int, help=f"rounds per row ({rounds})")
    parser.add_argument("--seconds", type=float, help=f"length of one measurement ({seconds})")
    parser.add_argument(
        "--patience", type=int, help="repeat a measurement up to so often while others use the machine (short 0, else 2)"
    )
    parser.add_argument("--budget", type=float, help=f"seconds for the whole run: rounds are cut, then rows ({budget})")
    parser.add_argument("--peers", metavar="A,B*", help="contestants by name; * allowed")
    parser.add_argument("--without", metavar="A,B*", help="leave these contestants out; * allowed")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a promise of the rows that ran is not met")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON on stdout")
    parser.add_argument("--list", action="store_true", help="list the rows and who takes part, and stop")
    parser.add_argument("--output", type=Path, help="where to write, without suffix (default benchmarks/results/NAME-MODE)")
    return parser


def complete(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    name: str,
    rounds: int,
    seconds: float,
    budget: float,
    partial: bool = False,
) -> argparse.Namespace:
    """Check what `common_options` took, and fill in the defaults of this form (short or not) and the ``name`` of the results."""
    try:
        re.compile(args.only or "")
    except re.error as error:
        parser.error(f"--only: {error}")
    args.rounds = args.rounds or rounds
    args.seconds = args.seconds or seconds
    args.patience = args.patience if args.patience is not None else (0 if args.short else 2)
    args.budget = args.budget or budget
    args.mode = "short" if args.short else "full" if getattr(args, "full", False) else "normal"
    partial = partial or any([args.only, args.peers, args.without])
    args.output = args.output or HERE / "results" / f"{name}-{'partial' if partial else args.mode}"
    return args


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common_options(
        (__doc__ or "").split("\n\n")[0], "short 3, else 5", "short 0.25, else 0.5", "short 165, else 1500, full 5400"
    )
    parser.add_argument("--full", action="store_true", help="every placement, loop and congestion control")
    parser.add_argument("--placement", choices=["split", "one", "free", "all"], default="all")
    parser.add_argument("--loop", choices=["uvloop", "asyncio", "all"], default="all")
    parser.add_argument("--congestion", choices=["default", "reno", "all"], default="all")
    args = parser.parse_args(argv)
    if args.short and args.full:
        parser.error("--short and --full exclude each other")
    partial = any([args.placement != "all", args.loop != "all", args.congestion != "all"])
    if args.short:
        return complete(parser, args, "compare", 3, 0.25, 165.0, partial)
    return complete(parser, args, "compare", 5, 0.5, 5400.0 if args.full else 1500.0, partial)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        list_rows(select_rows(args))
        return 0
    packages = ("dynwire", "uvloop", "pyzmq", "grpcio", "picows", "msgspec", "Cython")
    return execute(args, Bench(args), environment(packages), PROMISES, markdown, CHARTS)


def list_rows(rows: list[Row]) -> None:
    for row in rows:
        print(f"{row.name:45} {' '.join(row.contestants)}")


def execute(
    args: argparse.Namespace,
    bench: Bench,
    env: dict[str, Any],
    promises: list[Promise],
    render: Callable[[dict[str, Any], str], str],
    charts: list[tuple[str, str, str, str]],
) -> int:
    """Run the rows, write the results, print the promises; returns the exit status."""
    # Also for SIGTERM, and where a shell started us with SIGINT ignored: end our processes, write what there is.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    started, interrupted = time.monotonic(), False
    try:
        bench.run()
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: writing what was measured", file=sys.stderr)
    finally:
        bench.close()
    report = {
        "environment": env,
        "mode": args.mode,
        "caption": bench.caption,
        "rounds": args.rounds,
        "seconds": args.seconds,
        "took_s": time.monotonic() - started,
        "repeated": bench.retried,
        "promises": judge(bench.results, promises),
        "notes": bench.notes,
        "rows": bench.results,
    }
    if not bench.results:
        print("nothing measured", file=sys.stderr)
        return 130 if interrupted else 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(render(report, args.output.name))
    chart(report, args.output, charts)
    if args.json:
        print(json.dumps(report))
    else:
        if report["promises"]:
            print(promise_table(report["promises"], markdown=False))
        unmet = [v for v in report["promises"] if v["met"] is False]
        unknown = [v for v in report["promises"] if v["met"] is None]
        print(
            f"{len(report['promises']) - len(unmet) - len(unknown)} promises met, {len(unmet)} not, {len(unknown)} not measured; "
            f"{report['took_s']:.0f} s; written to {args.output}.json .md .png .svg"
        )
    if interrupted:
        return 130
    return 1 if args.check and any(v["met"] is not True for v in report["promises"]) else 0


if __name__ == "__main__":
    sys.exit(main())
