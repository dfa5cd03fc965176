"""``python -m dynwire.vllm`` as a process: what routers learn of its cache, draining, and the death of its engine."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.kv_router import compute_block_hashes
from dynwire.kv_router.client import KvAsyncClient
from dynwire.vllm.__main__ import DEFAULT_ENDPOINT
from dynwire.workers.card import ModelCard

from ..plane.faces import eventually
from .conftest import FLAGS, START_S, Process, environment, needs_vllm, running

BLOCK_SIZE = 32
BLOCKS = 24
"""of the whole cache; vLLM keeps one of them for itself"""
LENGTH = 512

pytestmark = [needs_vllm, pytest.mark.hard_timeout(START_S + 60)]


def flags(model: Path, *further: str) -> list[str]:
    return ["-m", "dynwire.vllm", "--model", str(model), *FLAGS, "--max-model-len", str(LENGTH), "--grace", "30", *further]


@pytest.fixture(scope="module")
def worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("worker")
    env = environment(folder / "discovery", DYN_EVENT_PLANE="zmq")
    with running(flags(model, "--num-gpu-blocks-override", str(BLOCKS)), env, folder / "log") as started:
        yield started


@pytest.fixture
def at_worker(worker: Process, clean_env: None, monkeypatch: pytest.MonkeyPatch) -> Process:
    """The module's worker, which managers of this process find."""
    monkeypatch.setenv("DYN_FILE_KV", str(worker.log.parent / "discovery"))
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    return worker


@asynccontextmanager
async def kv_client() -> AsyncIterator[KvAsyncClient]:
    async with dynwire.AsyncNetworkManager() as manager:
        client = await manager.endpoint(DEFAULT_ENDPOINT).client(router="kv")
        assert isinstance(client, KvAsyncClient) and client.kv.indexer is not None
        await client.wait_for_instances(1, 10.0)
        indexer = client.kv.indexer
        await eventually(lambda: len(indexer.workers) == 1 and not indexer.follower.behind)
        yield client


async def ask(client: KvAsyncClient, tokens: list[int], length: int) -> tuple[int, list[int]]:
    """``(tokens of the prompt that vLLM had in its cache, answer)``, when the router has learnt of everything since."""
    asked = {
        "model": "m",
        "token_ids": tokens,
        "stop_conditions": {"max_tokens": length, "ignore_eos": True},
        "sampling_options": {"temperature": 0.0},
    }
    async with client.stream(asked, timeout=60.0) as stream:
        items = [item async for item in stream]
    answer = [token for item in items for token in item["token_ids"]]
    assert len(answer) == length
    indexer = client.kv.indexer
    assert indexer is not None
    # The blocks of this request are the last that vLLM has stored, so with them all earlier events have come. The last token's
    # place in the cache has not been computed.
    blocks = compute_block_hashes([*tokens, *answer][:-1], BLOCK_SIZE)
    await eventually(lambda: max(indexer.find_matches(blocks).scores.values(), default=0) == len(blocks))
    return items[0]["cached_tokens"], answer


def predicted(client: KvAsyncClient, tokens: list[int]) -> int:
    """Blocks that the router expects in the worker's cache. vLLM computes a prompt's last token in any case."""
    assert client.kv.indexer is not None
    scores = client.kv.indexer.find_matches(compute_block_hashes(tokens[:-1], BLOCK_SIZE)).scores
    return max(scores.values(), default=0)


async def test_the_model_is_registered_as_vllm_has_it(at_worker: Process) -> None:
    async with dynwire.AsyncNetworkManager() as manager:
        client = await manager.endpoint(DEFAULT_ENDPOINT).client()
        (instance,) = await client.wait_for_instances(1, 10.0)
        card = ModelCard.from_metadata(instance.metadata)
    assert card is not None and instance.metadata["dp_size"] == 1
    assert (card.name, card.block_size, card.context_length) == ("tiny-qwen3", BLOCK_SIZE, LENGTH)
    assert card.limits.total_blocks == BLOCKS and (card.limits.max_sequences or 0) > 0
    assert card.eos_token_ids == (2, 0) and card.chat_template is not None and card.tokenizer.read() is not None


async def test_a_second_turn_finds_what_the_router_predicts(at_worker: Process) -> None:
    async with kv_client() as client:
        rng = random.Random(1)
        first = [rng.randrange(3, 1024) for _ in range(100)]
        cached, answer = await ask(client, first, 40)
        assert cached == 0
        second = [*first, *answer, *(rng.randrange(3, 1024) for _ in range(20))]
        expected = predicted(client, second)
        assert expected == (len(first) + len(answer) - 1) // BLOCK_SIZE == 4
        cached, _ = await ask(client, second, 10)
        assert cached == expected * BLOCK_SIZE
        stats = client.kv.stats
        assert (stats.routed, stats.reported, stats.agreed, stats.reported_blocks) == (2, 2, 2, 4)


async def test_the_index_is_what_vllm_holds(at_worker: Process) -> None:
    """Conversations that together need three times the cache: whatever vLLM finds in it, the router has known before."""
    async with kv_client() as client:
        rng = random.Random(2)
        conversations = [[rng.randrange(3, 1024) for _ in range(rng.randrange(33, 90))] for _ in range(12)]
        hits = misses = 0
        for _ in range(60):
            number = rng.randrange(len(conversations))
            tokens = conversations[number]
            expected = predicted(client, tokens)
            cached, answer = await ask(client, tokens, rng.randrange(1, 40))
            assert cached == expected * BLOCK_SIZE
            hits += expected
            misses += (len(tokens) - 1) // BLOCK_SIZE - expected
            if len(tokens) + len(answer) < 300:
                conversations[number] = [*tokens, *answer]
            assert client.kv.indexer is not None and client.kv.indexer.tree.entries < BLOCKS
        assert hits > 30 and misses > 30, (hits, misses)
        # a router that comes later learns the same
        async with kv_client() as late:
            for tokens in conversations:
                assert predicted(late, tokens) == predicted(client, tokens)


def children(pid: int) -> dict[int, str]:
    found = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def engine_of(pid: int) -> int | None:
    """Process id of the worker's engine; its title comes a moment after its start."""
    return next((child for child, command in children(pid).items() if "EngineCore" in command), None)


async def test_the_death_of_the_engine_ends_the_worker(at_worker: Process) -> None:
    """The last test with this worker."""
    pid = at_worker.process.pid
    async with dynwire.AsyncNetworkManager() as manager:
        client = await manager.endpoint(DEFAULT_ENDPOINT).client()
        await client.wait_for_instances(1, 10.0)
        asked = {"model": "m", "token_ids": [5, 6, 7], "stop_conditions": {"max_tokens": 500, "ignore_eos": True}}
        engine = engine_of(pid)
        assert engine is not None
        tokens = 0
        with pytest.raises(dynwire.PeerLost) as caught:
            async with client.stream(asked, timeout=60.0) as stream:
                async for item in stream:
                    if not tokens:
                        os.kill(engine, signal.SIGKILL)
                    tokens += len(item["token_ids"])
        # such a stream goes on with another worker, if there is one and migration is allowed
        assert caught.value.sent == "yes" and 0 < tokens < 500
        await eventually(lambda: not client.instances)
    assert at_worker.process.wait(60) == 1
    (line,) = (line for line in at_worker.text.splitlines() if line.startswith("dynwire.vllm: "))
    assert line.startswith("dynwire.vllm: DynwireError: vLLM's engine has died") and "tiny-qwen3 is not served here" in line


async def test_draining_lets_an_answer_finish(model: Path, discovery_dir: Path, tmp_path: Path) -> None:
    """Also when the signal reaches all processes, as Ctrl-C in a terminal does."""
    with running(flags(model), environment(discovery_dir), tmp_path / "log") as worker:
        engine = os.pidfd_open(engine_of(worker.process.pid) or 0)
        try:
            async with dynwire.AsyncNetworkManager() as manager:
                client = await manager.endpoint(DEFAULT_ENDPOINT).client()
                await client.wait_for_instances(1, 10.0)
                asked = {"model": "m", "token_ids": [5, 6, 7], "stop_conditions": {"max_tokens": 400, "ignore_eos": True}}
                tokens = 0
                async with client.stream(asked, timeout=60.0) as stream:
                    async for item in stream:
                        if not tokens:
                            os.killpg(worker.process.pid, signal.SIGINT)
                        tokens += len(item["token_ids"])
                assert tokens == 400
            assert worker.process.wait(60) == 0 and "draining, up to 30 s" in worker.text
            assert select.select([engine], [], [], 0)[0], "the engine still runs"
        finally:
            os.close(engine)


async def test_a_second_signal_ends_at_once(model: Path, discovery_dir: Path, tmp_path: Path) -> None:
    with running(flags(model), environment(discovery_dir), tmp_path / "log") as worker:
        engine = os.pidfd_open(engine_of(worker.process.pid) or 0)
        try:
            async with dynwire.AsyncNetworkManager() as manager:
                client = await manager.endpoint(DEFAULT_ENDPOINT).client()
                await client.wait_for_instances(1, 10.0)
                asked = {"model": "m", "token_ids": [5, 6, 7], "stop_conditions": {"max_tokens": 500, "ignore_eos": True}}
                tokens = 0
                with pytest.raises(dynwire.PeerLost):
                    async with client.stream(asked, timeout=60.0) as stream:
                        async for item in stream:
                            if not tokens:
                                worker.process.send_signal(signal.SIGTERM)
                                await eventually(lambda: "draining, up to" in worker.text)
                                worker.process.send_signal(signal.SIGTERM)
                            tokens += len(item["token_ids"])
            assert worker.process.wait(20) == 1
            assert select.select([engine], [], [], 0)[0], "the engine still runs"
        finally:
            os.close(engine)


def test_a_signal_interrupts_the_start(model: Path, discovery_dir: Path, tmp_path: Path) -> None:
    worker = Process([sys.executable, *flags(model)], environment(discovery_dir), tmp_path / "log")
    try:
        deadline = time.monotonic() + START_S
        while (engine := engine_of(worker.process.pid)) is None:
            assert worker.process.poll() is None and time.monotonic() < deadline, worker.text
            time.sleep(0.05)
        handle = os.pidfd_open(engine)
        try:
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(60) == 0, worker.text
            assert select.select([handle], [], [], 0)[0], "the engine still runs"
            assert "serving " not in worker.text
        finally:
            os.close(handle)
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kv-events-config", '{"enable_kv_cache_events": true}'], "--kv-events on or off"),
        (["--max-model-len", "100000"], "max_model_len"),
    ],
)
def test_wrong_settings_are_one_line(model: Path, discovery_dir: Path, arguments: list[str], text: str) -> None:
    command: list[Any] = [sys.executable, *flags(model), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(discovery_dir))
    lines = [line for line in done.stderr.splitlines() if line.startswith("dynwire.vllm: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("dynwire.vllm: ConfigError: ") and text in lines[0]
