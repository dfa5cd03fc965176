"""Simulated workers in processes of their own, events, index and routing together."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.kv_router.client import KvAsyncClient

from ..plane.faces import eventually

PATH = "dynwire.backend.generate"
BLOCK_SIZE = 16


@pytest.fixture
def mockers(discovery_dir: Path) -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("zmq")
    command = [sys.executable, "-m", "dynwire.mocker", "--num-workers", "2", "--block-size", str(BLOCK_SIZE)]
    command += ["--speedup-ratio", "1000", "--num-blocks", "256"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "DYN_EVENT_PLANE": "zmq", "DYN_FILE_KV": str(discovery_dir), "DYN_TCP_RPC_HOST": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for _ in range(2):
            line = process.stdout.readline()
            assert line.startswith("serving"), line + process.communicate()[1]
        yield process
        process.terminate()
        process.communicate(timeout=20)


async def test_predictions_are_what_the_engines_find(mockers: Any) -> None:
    rng = random.Random(1)
    async with dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", event_plane="zmq") as manager:
        client = await manager.endpoint(PATH).client(router="kv")
        assert isinstance(client, KvAsyncClient)
        indexer = client.kv.indexer
        assert indexer is not None
        await client.wait_for_instances(2, 20)
        await eventually(lambda: len(indexer.workers) == 2 and not indexer.follower.behind)
        assert client.kv.block_size == BLOCK_SIZE
        conversations = [[rng.randrange(3, 1000) for _ in range(80)] for _ in range(4)]
        for _ in range(5):
            for tokens in conversations:
                request = {
                    "model": "tiny", "token_ids": list(tokens), "stop_conditions": {"max_tokens": 20, "ignore_eos": True}
                }  # fmt: skip
                async with client.stream(request, timeout=20) as stream:
                    async for item in stream:
                        tokens += item["token_ids"]
                seen = indexer.follower.stats.applied
                await eventually(lambda seen=seen: indexer.tree.entries and indexer.follower.stats.applied >= seen)
        stats = client.kv.stats
        assert stats.reported == 20
        assert stats.reported_blocks > 100
        # the last blocks of an answer may still be on their way when the next turn is routed
        assert abs(stats.reported_blocks - stats.predicted_blocks) <= 20
