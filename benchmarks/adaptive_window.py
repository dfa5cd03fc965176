#!/usr/bin/env python3
"""What does it cost that the window of the http plane has to grow before it fits a long path?

A path of 50 ms and 1 Gbit/s: a proxy delays every byte by 25 ms each way; the rate comes from tc tbf between two network
namespaces where they can be made (root, iproute2), from the proxy otherwise. The delay is not netem's, which many kernels lack:
TCP itself sees a short path, so the windows of HTTP/2 are all that differs. Two variants in turn, round by round, each sample on
a new connection:

  adaptive  the defaults: 1 MiB per stream and 4 MiB per connection, growing
  fixed     DYN_HTTP2_ADAPTIVE_WINDOW=false and 16 MiB for both

Timed is a message of 64 MiB as the first and as the second one of its connection, in a reply and in a request. Promised:
adaptive reaches 0.8 of fixed with the first reply, and the idle connection then holds no more than 64 KiB.

    python benchmarks/adaptive_window.py
    python benchmarks/adaptive_window.py --rounds 3 --json -
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dynwire  # noqa: E402 - this tree's
from tests.http2.delayed import delayed  # noqa: E402

MIB = 1 << 20
WANTED_RATIO = 0.8
IDLE_LIMIT = 65536
TIMEOUT_S = 60.0
SIZE_LIMIT = {"DYN_TCP_MAX_MESSAGE_SIZE": str(256 * MIB), "DYN_REQUEST_PLANE": "http"}
VARIANTS = {
    "adaptive": {"DYN_HTTP2_ADAPTIVE_WINDOW": "true"},
    "fixed": {
        "DYN_HTTP2_ADAPTIVE_WINDOW": "false",
        "DYNWIRE_HTTP2_STREAM_WINDOW": str(16 * MIB),
        "DYNWIRE_HTTP2_CONNECTION_WINDOW": str(16 * MIB),
    },
}
METRICS = ("reply_first", "reply_later", "request_first", "request_later")


# Processes of one variant. Each prints a line of JSON; server and proxy end with their stdin ------------------------------------


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def stdin_closed() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def serve(args: argparse.Namespace) -> None:
    reply = bytes(args.mib * MIB)

    async def handler(request: Any) -> Any:
        return reply if request == b"reply" else len(request)

    settings = {"http_host": "127.0.0.1", "http_port": 0, "discovery": "mem"}
    async with dynwire.AsyncNetworkManager(**settings) as manager:
        service = await manager.endpoint("bench.window.message").serve(handler)
        say(port=int(service.instance.address.split(":")[2].split("/")[0]))
        await stdin_closed()


async def proxy(args: argparse.Namespace) -> None:
    rate = args.mbit * 125000.0 if args.mbit else float("inf")
    async with delayed("127.0.0.1", args.port, delay_s=args.rtt_ms / 2000, bytes_per_s=rate, bind=args.host) as port:
        say(port=port)
        await stdin_closed()


async def call(args: argparse.Namespace) -> None:
    """One sample: a new connection, two messages in one direction, and what the connection holds then."""
    payload: bytes = b"reply" if args.direction == "reply" else bytes(args.mib * MIB)
    out: dict[str, Any] = {}
    async with dynwire.AsyncNetworkManager(discovery="mem") as manager:
        plane: Any = manager.create_client()
        address = f"http://{args.host}:{args.port}/v1/rpc"
        channel = plane.channel(dynwire.Instance(1, "bench", "window", "message", "http", address))
        await channel.connect()
        await channel.call(b"", TIMEOUT_S)
        for name in ("first", "later"):
            before = time.perf_counter()
            result = await channel.call(payload, TIMEOUT_S)
            out[f"{args.direction}_{name}"] = args.mib * MIB / (time.perf_counter() - before)
            assert (len(result) if args.direction == "reply" else result) == args.mib * MIB
            del result
        await asyncio.sleep(0.2)  # idle: the turn that brought the reply still has the receive buffer
        (row,) = plane.stats()[address]
        out["held"] = row["held"] + row["backlog"]
        out["window"] = row["window"]
        await plane.close()
    say(**out)


# The path -----------------------------------------------------------------------------------------------------------------------


def quiet(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)


class Way:
    """Where the processes run: `near` is the client's side, `far` the server's and the proxy's."""

    def __init__(self, mbit: int) -> None:
        self.near: list[str] = []
        self.far: list[str] = []
        self.host = "127.0.0.1"
        self.proxy_mbit = mbit
        self.rate_by = "proxy"


@contextlib.contextmanager
def make_path(mbit: int) -> Iterator[Way]:
    path = Way(mbit)
    near, far = (f"dynwire-{os.getpid()}-{side}" for side in "nf")
    made = []
    try:
        try:
            for name in (near, far):
                quiet("ip", "netns", "add", name)
                made.append(name)
                quiet("ip", "-n", name, "link", "set", "lo", "up")
            quiet("ip", "-n", near, "link", "add", "path", "type", "veth", "peer", "name", "path", "netns", far)
            for name, address in ((near, "10.77.0.1"), (far, "10.77.0.2")):
                quiet("ip", "-n", name, "address", "add", f"{address}/24", "dev", "path")
                quiet("ip", "-n", name, "link", "set", "path", "up")
                # a limit above all windows: what waits is not dropped, so TCP's own control plays no part
                rate = ("tbf", "rate", f"{mbit}mbit", "burst", "1mb", "limit", "64mb")
                quiet("tc", "-n", name, "qdisc", "add", "dev", "path", "root", *rate)
            path.near, path.far = (["ip", "netns", "exec", name] for name in (near, far))
            path.host, path.proxy_mbit, path.rate_by = "10.77.0.2", 0, "tbf"
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no network namespaces ({error}): the proxy limits the rate", file=sys.stderr)
        yield path
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=TIMEOUT_S)


def command(role: str, args: argparse.Namespace, *more: str) -> list[str]:
    return [sys.executable, __file__, "--role", role, "--mib", str(args.mib), "--rtt-ms", str(args.rtt_ms), *more]


@contextlib.contextmanager
def running(argv: list[str], variant: str) -> Iterator[dict[str, Any]]:
    env = {**os.environ, **SIZE_LIMIT, **VARIANTS[variant]}
    with subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(argv)} ended")
            yield json.loads(line)
        finally:
            process.stdin.close()
            try:
                process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def sample(argv: list[str], variant: str) -> dict[str, Any]:
    env = {**os.environ, **SIZE_LIMIT, **VARIANTS[variant]}
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=4 * TIMEOUT_S)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# The run ------------------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    samples: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    with make_path(args.mbit) as path, contextlib.ExitStack() as stack:
        ports = {}
        for variant in VARIANTS:
            server = stack.enter_context(running([*path.far, *command("serve", args)], variant))
            more = ("--port", str(server["port"]), "--host", path.host, "--mbit", str(path.proxy_mbit))
            ports[variant] = stack.enter_context(running([*path.far, *command("proxy", args, *more)], variant))["port"]
        for number in range(args.rounds):
            order = list(VARIANTS) if number % 2 == 0 else list(VARIANTS)[::-1]
            for variant in order:
                row: dict[str, Any] = {}
                for direction in args.directions:
                    more = ("--port", str(ports[variant]), "--host", path.host, "--direction", direction)
                    row[direction] = sample([*path.near, *command("call", args, *more)], variant)
                samples[variant].append(row)
                print(f"round {number + 1} {variant}: {json.dumps(row)}", file=sys.stderr)
        rate_by = path.rate_by
    table: dict[str, Any] = {}
    for metric in METRICS:
        direction = metric.split("_")[0]
        if direction not in args.directions:
            continue
        values = {variant: [row[direction][metric] for row in rows] for variant, rows in samples.items()}
        ratios = [a / b for a, b in zip(values["adaptive"], values["fixed"], strict=True)]
        table[metric] = {
            **{f"{variant}_bytes_per_s": statistics.median(rates) for variant, rates in values.items()},
            "ratio": statistics.median(values["adaptive"]) / statistics.median(values["fixed"]),
            "ratio_range": [min(ratios), max(ratios)],
        }
    held = max(row[direction]["held"] for row in samples["adaptive"] for direction in args.directions)
    met = held <= IDLE_LIMIT and table.get("reply_first", {"ratio": 0.0})["ratio"] >= WANTED_RATIO
    return {"mib": args.mib, "rtt_ms": args.rtt_ms, "mbit": args.mbit, "rate_by": rate_by, "rounds": args.rounds,
            "results": table, "held_idle": held, "met": met, "samples": samples}  # fmt: skip


def show(report: dict[str, Any]) -> None:
    print(f"{report['mib']} MiB over {report['rtt_ms']:g} ms and {report['mbit']} Mbit/s (rate by {report['rate_by']})")
    print(f"{'':14} {'adaptive':>11} {'fixed 16 MiB':>13} {'ratio':>6}  range")
    for metric, row in report["results"].items():
        adaptive, fixed = row["adaptive_bytes_per_s"] / 1e6, row["fixed_bytes_per_s"] / 1e6
        low, high = row["ratio_range"]
        name = metric.replace("_", ", ")
        print(f"{name:14} {adaptive:6.1f} MB/s {fixed:8.1f} MB/s {row['ratio']:6.2f}  {low:.2f} to {high:.2f}")
    verdict = "met" if report["met"] else "NOT MET"
    print(f"held when idle: {report['held_idle']} bytes")
    print(f"promised: first reply >= {WANTED_RATIO}, held <= {IDLE_LIMIT} bytes: {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=64, help="size of a message")
    parser.add_argument("--rtt-ms", type=float, default=50.0)
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--directions", nargs="+", choices=["reply", "request"], default=["reply", "request"])
    parser.add_argument("--json", help="write the report there; - for standard output, instead of the table")
    parser.add_argument("--role", choices=["serve", "proxy", "call"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1", help=argparse.SUPPRESS)
    parser.add_argument("--direction", choices=["reply", "request"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        asyncio.run({"serve": serve, "proxy": proxy, "call": call}[args.role](args))
        return 0
    report = measure(args)
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        show(report)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
