#!/usr/bin/env python3
"""How many messages a second go through a NATS connection of ours, and how many through nats-py alone?

One process publishes to a subject that it subscribes to, through a nats-server of its own (pip install 'dynwire[nats-server]').
Contestants take turns, round by round; reported are medians and their ratio to nats-py:

  fast      the compiled port under nats-py
  plain     the same interface over nats-py's public API
  nats-py   Client.publish and subscribe(cb=...), written by hand

The publisher never has more than a window of messages on their way, so that nothing but the path is measured.

    python benchmarks/nats_port.py
    python benchmarks/nats_port.py --seconds 0.5 --rounds 3 --sizes 64,1024
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dynwire._natsproto import CallbackSink  # noqa: E402
from dynwire.config import NatsConfig  # noqa: E402
from dynwire.nats import NatsConnection  # noqa: E402
from dynwire.nats.server import NatsServer  # noqa: E402
from dynwire.portal import new_event_loop  # noqa: E402

CONTESTANTS = ("fast", "plain", "nats-py")
BATCH = 64
"""messages between two turns of the loop"""


class Window:
    """Counts what has arrived, and lets the publisher wait while too much is on its way."""

    def __init__(self, size: int) -> None:
        self.most = max(4, min(1024, (8 << 20) // size))
        self.arrived = 0
        self.wake: asyncio.Future[None] | None = None

    def count(self, *message: Any) -> None:
        self.arrived += 1
        wake, self.wake = self.wake, None
        if wake is not None:
            wake.set_result(None)

    async def room(self, sent: int) -> None:
        while sent - self.arrived >= self.most:
            self.wake = asyncio.get_running_loop().create_future()
            await self.wake


async def through_port(url: str, kind: str, size: int, seconds: float) -> float:
    connection = await NatsConnection.acquire(NatsConfig(servers=(url,), port=kind))
    window = Window(size)
    subscription = await connection.subscribe("bench", CallbackSink(window.count))
    payload, send, sent = b"x" * size, connection.port.send, 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(min(BATCH, window.most)):
            send(b"bench", payload)
            sent += 1
        await window.room(sent)
        await asyncio.sleep(0)
    await window.room(sent + window.most - 1)
    rate = window.arrived / (time.perf_counter() - began)
    subscription.unsubscribe()
    await connection.release()
    return rate


async def through_nats_py(url: str, kind: str, size: int, seconds: float) -> float:
    import nats

    client = await nats.connect(url)
    window = Window(size)

    async def take(message: Any) -> None:
        window.count()

    await client.subscribe("bench", cb=take)
    payload, sent = b"x" * size, 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(min(BATCH, window.most)):
            await client.publish("bench", payload)
            sent += 1
        await window.room(sent)
        await asyncio.sleep(0)
    await window.room(sent + window.most - 1)
    rate = window.arrived / (time.perf_counter() - began)
    await client.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,1024,65536,1048576", help="bytes of a payload, comma separated")
    parser.add_argument("--loops", default="asyncio,uvloop")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
        "asyncio": asyncio.new_event_loop,
        "uvloop": new_event_loop,  # asyncio's where uvloop is not installed
    }
    print(f"{'loop':8} {'bytes':>8} " + " ".join(f"{name + '/s':>12}" for name in CONTESTANTS) + "  fast : nats-py")
    with NatsServer(max_payload=8 << 20) as server:
        for loop in arguments.loops.split(","):
            for size in map(int, arguments.sizes.split(",")):
                rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
                for turn in range(arguments.rounds):
                    for name in (*CONTESTANTS[turn % 3 :], *CONTESTANTS[: turn % 3]):
                        use = through_nats_py if name == "nats-py" else through_port
                        with asyncio.Runner(loop_factory=factories[loop]) as runner:
                            rates[name].append(runner.run(use(server.url, name, size, arguments.seconds)))
                median = {name: statistics.median(values) for name, values in rates.items()}
                columns = " ".join(f"{median[name]:12,.0f}" for name in CONTESTANTS)
                print(f"{loop:8} {size:8} {columns}  {median['fast'] / median['nats-py']:.2f}", flush=True)


if __name__ == "__main__":
    main()
