"""A router with replica sync, told on standard input what to do: ``replica.py SEED``. Answers are JSON, a line each.

``know N``    waits for N other routers
``load N``    N steps of routing, first tokens and ends, as fast as they go
``own``       requests that are booked here
``settle N``  waits until N requests are booked everywhere; the counters per worker
``end``       leaves
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from functools import partial

import dynwire
from dynwire.kv_router.approximate import ApproximateIndex
from dynwire.kv_router.router import KvRouter, KvRouterSettings

WORKERS = [(worker, 0) for worker in (101, 102, 103, 104)]


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # nobody sets an event for it
            await asyncio.sleep(0.005)


def knows(router: KvRouter, count: int) -> bool:
    assert router.replicas is not None
    return router.replicas.others.synced and len(router.replicas.others.replicas) == count


def settled(router: KvRouter, requests: int) -> bool:
    assert router.replicas is not None
    return router.replicas.others.synced and sum(count for count, _, _ in router.load.totals().values()) == requests


async def load(router: KvRouter, rng: random.Random, steps: int) -> None:
    running: list[str] = []
    for step in range(steps):
        if rng.random() < 0.51 or not running:
            tokens = [rng.randrange(50) for _ in range(rng.randrange(1, 200))]
            router.choose(tokens, WORKERS, f"r{step}")
            running.append(f"r{step}")
        elif rng.random() < 0.5:
            router.first_token(rng.choice(running))
        else:
            router.finish(running.pop(rng.randrange(len(running))))
        await asyncio.sleep(0)


async def main(seed: int) -> None:
    rng = random.Random(seed)
    async with dynwire.AsyncNetworkManager(tcp_host="127.0.0.1") as manager:
        router = KvRouter(manager, "demo", "worker", KvRouterSettings(replica_sync=True, block_size=4, seed=seed))
        router.indexer = None  # there are no workers
        router.approximate = router.approximate or ApproximateIndex()
        await router.start()
        assert router.replicas is not None
        say("ready")
        while True:
            words = (await asyncio.to_thread(sys.stdin.readline)).split()
            if words[0] == "know":
                await until(partial(knows, router, int(words[1])))
                say(len(router.replicas.others.replicas))
            elif words[0] == "load":
                await load(router, rng, int(words[1]))
                say("loaded")
            elif words[0] == "own":
                say(router.load.requests)
            elif words[0] == "settle":
                await until(partial(settled, router, int(words[1])))
                say({str(worker): counters for (worker, _), counters in sorted(router.load.totals().items())})
            else:
                break
        await router.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
