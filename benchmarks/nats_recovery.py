"""How soon does the nats plane work again after its server was away? Core and durable requests, every kind of outage.

A worker in a process of its own and a caller here, on a nats-server of their own. While that is down, for ``--down`` seconds,
nothing is asked; from the moment that it takes connections again (or, of a cluster, that a member is lost) a call begins every
10 ms, and the first that succeeds ends the measurement. Of a suspended server: from SIGCONT on.

    python benchmarks/nats_recovery.py [--rounds 5] [--down 0.5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dynwire
from dynwire.nats.server import NatsCluster, NatsServer

PATH = "bench.recovery.echo"
TOO_LATE_S = 30.0

WORKER = """
import asyncio
import dynwire

async def echo(request):
    return request

async def main():
    async with dynwire.AsyncNetworkManager() as manager:
        await manager.endpoint("bench.recovery.echo").serve(echo)
        print("ready", flush=True)
        await asyncio.get_running_loop().create_future()

asyncio.run(main())
"""


def killed(server: NatsServer, down: float) -> float:
    server.kill()
    time.sleep(down)
    server.start()
    return time.monotonic()


def stopped(server: NatsServer, down: float) -> float:
    server.shut_down()
    time.sleep(down)
    server.start()
    return time.monotonic()


def wiped(server: NatsServer, down: float) -> float:
    server.kill()
    server.wipe()
    time.sleep(down)
    server.start()
    return time.monotonic()


def suspended(server: NatsServer, down: float) -> float:
    with server.paused():
        time.sleep(5.0)
    return time.monotonic()


def lame_duck(server: NatsServer, down: float) -> float:
    server.lame_duck()
    server.wait_ended(60.0)
    server.start()
    return time.monotonic()


def member_killed(server: NatsServer, down: float) -> float:
    server.kill()
    return time.monotonic()


OUTAGES: dict[str, Callable[[NatsServer, float], float]] = {
    "killed": killed,
    "stopped in order": stopped,
    "suspended for 5 s": suspended,
    "lame duck": lame_duck,
    "storage wiped": wiped,
    "one of three members killed": member_killed,
}


async def recovery(client: dynwire.AsyncClient, since: float) -> float:
    """Seconds from ``since`` until the first call that began later has succeeded."""
    calls: set[asyncio.Task[Any]] = set()
    try:
        while time.monotonic() - since < TOO_LATE_S:
            calls.add(asyncio.create_task(client.call(b"", timeout=TOO_LATE_S)))
            done, calls = await asyncio.wait(calls, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() is None for task in done):
                return time.monotonic() - since
    finally:
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    raise SystemExit(f"nothing works {TOO_LATE_S:g} s after the outage")


async def measure(mode: str, name: str, rounds: int, down: float, directory: str) -> list[float]:
    cluster = name.startswith("one of")
    found = []
    for number in range(rounds):
        servers: NatsCluster | NatsServer = NatsCluster(3, jetstream=True) if cluster else NatsServer(jetstream=True)
        with servers:
            settings = {
                "DYN_REQUEST_PLANE": "nats",
                "DYN_NATS_REQUEST_MODE": mode,
                "NATS_SERVER": servers.url,
                "DYN_FILE_KV": os.path.join(directory, f"{mode}-{name}-{number}"),
                "DYNWIRE_DISCOVERY_TTL": "60",
                "DYNWIRE_NATS_QUEUE_MAX_BYTES": str(1 << 26),
                **({"DYNWIRE_NATS_QUEUE_REPLICAS": "3"} if cluster else {}),
            }
            with subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", WORKER], stdout=subprocess.PIPE, env={**os.environ, **settings}
            ) as worker:
                assert worker.stdout is not None
                worker.stdout.readline()
                async with dynwire.AsyncNetworkManager(**settings) as manager:
                    client = await manager.endpoint(PATH).client()
                    await client.wait_for_instances(1, 10.0)
                    for _ in range(20):
                        await client.call(b"", timeout=TOO_LATE_S)
                    server = servers.servers[0] if isinstance(servers, NatsCluster) else servers
                    ready = await asyncio.to_thread(OUTAGES[name], server, down)
                    found.append(await recovery(client, ready))
                worker.kill()
    return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--down", type=float, default=0.5, help="seconds; default 0.5")
    parser.add_argument("--only", default="", help="kinds of outages whose name contains this")
    parser.add_argument("--mode", choices=("core", "jetstream"), action="append", help="default: both")
    parser.add_argument("--json", help="a file for all figures")
    arguments = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    print(f"{'':32} {'mode':>10} {'median':>8} {'longest':>8}  seconds, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="dynwire-recovery-") as directory:
        for mode in arguments.mode or ("core", "jetstream"):
            for name in OUTAGES:
                if arguments.only in name and not (mode == "core" and name == "storage wiped"):
                    figures = await measure(mode, name, arguments.rounds, arguments.down, directory)
                    results.setdefault(mode, {})[name] = figures
                    print(f"{name:32} {mode:>10} {statistics.median(figures):8.3f} {max(figures):8.3f}", flush=True)
    if arguments.json:
        report = {"rounds": arguments.rounds, "down_s": arguments.down, "recovery_s": results}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # noqa: ASYNC240  # all is done


if __name__ == "__main__":
    asyncio.run(main())
