"""Two vLLM workers behind ``router="kv"``: what vLLM finds in its caches is what the router predicted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import dynwire
from dynwire.kv_router import compute_block_hashes
from dynwire.kv_router.client import KvAsyncClient
from dynwire.vllm.__main__ import DEFAULT_ENDPOINT

from ..plane.faces import eventually
from .conftest import FLAGS, START_S, environment, needs_vllm, running

BLOCK_SIZE = 32
CONVERSATIONS = 40
"""Of those that begin at once, some share a system prompt that nobody has computed yet: no router can know of that."""
TURNS = 4
AT_ONCE = 4

pytestmark = [needs_vllm, pytest.mark.hard_timeout(START_S + 120)]


@pytest.fixture(scope="module")
def discovery(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two workers, each a process with an engine of its own."""
    folder = tmp_path_factory.mktemp("two-workers")
    env = environment(folder / "discovery", DYN_EVENT_PLANE="zmq")
    sizes = ("--max-model-len", "1024", "--num-gpu-blocks-override", "800")
    arguments = ["-m", "dynwire.vllm", "--model", str(model), *FLAGS, *sizes]
    with ExitStack() as stack:
        for number in range(2):
            stack.enter_context(running(arguments, env, folder / f"log-{number}"))
        yield folder / "discovery"


async def converse(client: KvAsyncClient, system: list[int], seed: int) -> None:
    """One conversation: every turn's prompt is all that was said before, and something new.

    In place of the time that a person takes to read the answer, it waits until the router has learnt of it.
    """
    indexer = client.kv.indexer
    assert indexer is not None
    rng = random.Random(seed)
    prompt = list(system)
    for _ in range(TURNS):
        prompt += [rng.randrange(3, 1024) for _ in range(rng.randrange(20, 60))]
        if len(prompt) % BLOCK_SIZE == 0:  # vLLM computes a prompt's last token in any case, and its block with it
            prompt.append(3)
        asked = {
            "model": "m",
            "token_ids": prompt,
            "stop_conditions": {"max_tokens": rng.randrange(8, 40), "ignore_eos": True},
            "sampling_options": {"temperature": 0.0},
        }
        async with client.stream(asked, timeout=60.0) as stream:
            async for item in stream:
                prompt += item["token_ids"]
        computed = compute_block_hashes(prompt[:-1], BLOCK_SIZE)  # all but the last token have their place in the cache
        while max(indexer.find_matches(computed).scores.values(), default=0) < len(computed):  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.005)


async def test_vllm_finds_in_its_cache_what_the_router_predicted(
    discovery: Path, clean_env: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_FILE_KV", str(discovery))
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    async with dynwire.AsyncNetworkManager() as manager:
        client = await manager.endpoint(DEFAULT_ENDPOINT).client(router="kv")
        assert isinstance(client, KvAsyncClient)
        await client.wait_for_instances(2, 10.0)
        indexer, stats = client.kv.indexer, client.kv.stats
        assert indexer is not None
        await eventually(lambda: len(indexer.workers) == 2 and not indexer.follower.behind)

        rng = random.Random(7)
        systems = [[rng.randrange(3, 1024) for _ in range(length)] for length in (70, 130, 200)]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with places:
                await converse(client, systems[number % 3], number)

        await asyncio.gather(*(one(number) for number in range(CONVERSATIONS)))

        cached = f"{stats.reported_blocks} of {stats.prompt_blocks} blocks cached"
        print(f"{stats.agreed} of {stats.reported} predictions exact, {cached}")
        assert stats.reported == stats.routed == CONVERSATIONS * TURNS
        assert stats.agreed >= 0.95 * stats.reported
        assert stats.reported_blocks > 0.5 * stats.prompt_blocks
        assert all(sum(1 for _ in indexer.tree.dump(worker)) for worker in indexer.workers), "one worker has had nothing to do"
