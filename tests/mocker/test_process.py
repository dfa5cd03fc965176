"""``python -m dynwire.mocker`` as a process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import dynwire
from dynwire.mocker import TINY_MODEL
from dynwire.mocker.__main__ import DEFAULT_ENDPOINT, METRICS_ENDPOINT, main
from dynwire.workers.card import ModelCard
from dynwire.workers.protocol import EngineItem, EngineRequest, StopConditions

SERVING = re.compile(r"serving (\S+) as (\S+) on (\w+) at (\S+) \(instance ([0-9a-f]{16}), pid (\d+)\)")


METRICS = f"{DEFAULT_ENDPOINT.rpartition('.')[0]}.{METRICS_ENDPOINT}"


@dataclass
class Worker:
    process: asyncio.subprocess.Process
    addresses: list[str]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def mocker(*arguments: str, workers: int = 1, plane: str = "tcp") -> AsyncIterator[Worker]:
    local = {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_HTTP_RPC_HOST": "127.0.0.1", "DYN_HTTP_RPC_PORT": "0"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dynwire.mocker", "--request-plane", plane, *arguments),
        env={**os.environ, **local},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    worker = Worker(process, [])
    try:
        assert process.stdout is not None
        for _ in range(workers):
            line = (await process.stdout.readline()).decode()
            found = SERVING.fullmatch(line.strip())
            assert found, line
            worker.addresses.append(found[4])
        yield worker
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def request(first: int = 5, **stop: object) -> EngineRequest:
    return EngineRequest("m", [first, *range(100, 230)], StopConditions(**stop))  # type: ignore[arg-type]


@pytest.mark.parametrize("plane", ["tcp", "http"])
async def test_workers_answer_alike_and_register_their_model(discovery_dir: Path, plane: str) -> None:
    arguments = ("--model-name", "tiny-model", "--num-workers", "2", "--speedup-ratio", "1e6", "--block-size", "32")
    async with (
        mocker(*arguments, workers=2, plane=plane) as worker,
        dynwire.AsyncNetworkManager(request_plane=plane) as manager,
    ):
        client = await manager.endpoint(DEFAULT_ENDPOINT).client(router="direct")
        instances = await client.wait_for_instances(2, timeout=10.0)
        cards = [ModelCard.from_metadata(instance.metadata) for instance in instances]
        assert cards[0] is not None and cards[0] == cards[1]
        assert (cards[0].name, cards[0].block_size, cards[0].context_length) == ("tiny-model", 32, 32768)
        assert cards[0].limits.total_blocks == 16384 and cards[0].tokenizer.read() == (TINY_MODEL / "tokenizer.json").read_bytes()
        answers = []
        for instance in instances:
            async with client.stream(request(max_tokens=40), instance=instance.id, reply_type=EngineItem, timeout=10.0) as stream:
                answers.append([token async for item in stream for token in item.token_ids])
        assert len(answers[0]) == 40 and answers[0] == answers[1]
        metrics = await manager.endpoint(METRICS).client()
        await metrics.wait_for_instances(2, timeout=10.0)
        for _ in range(2):
            (rank,) = await metrics.call(None, timeout=5.0)
            assert (rank["generated_tokens"], rank["prompt_tokens"], rank["blocks_used"]) == (40, 131, 0)
        worker.signal(signal.SIGTERM)
        assert await worker.process.wait() == 0


async def test_a_stream_that_loses_its_worker_goes_on_with_the_other(discovery_dir: Path) -> None:
    """The caller gets the same tokens as from one worker alone: none twice, none missing."""
    timing = ("--timing", "base=2e-3,per_token=0,attention=0,cache_read=0")
    async with mocker(*timing) as first, mocker(*timing) as second, dynwire.AsyncNetworkManager() as manager:
        client = await manager.endpoint(DEFAULT_ENDPOINT).client(migration_limit=3)
        metrics = await manager.endpoint(METRICS).client("direct")
        await client.wait_for_instances(2, timeout=10.0)
        instances = await metrics.wait_for_instances(2, timeout=10.0)
        asked = {"model": "m", "token_ids": [5, *range(100, 230)], "stop_conditions": {"max_tokens": 300}}
        async with client.stream(asked, timeout=30.0) as stream:
            whole = [token async for item in stream for token in item["token_ids"]]
        tokens: list[int] = []
        killed = 0
        async with client.stream(asked, timeout=30.0) as stream:
            async for item in stream:
                tokens += item["token_ids"]
                if len(tokens) < 100 or killed:
                    continue
                for instance in instances:
                    if (await metrics.call(None, instance=instance.id, timeout=5.0))[0]["active"]:
                        (first if instance.address in first.addresses else second).signal(signal.SIGKILL)
                        killed += 1
        assert killed == 1 and len(whole) == 300 and tokens == whole


async def test_draining_lets_an_answer_finish(discovery_dir: Path) -> None:
    timing = "base=5e-3,per_token=0,attention=0,cache_read=0"
    async with (
        mocker("--timing", timing, "--grace", "20") as worker,
        dynwire.AsyncNetworkManager() as manager,
    ):
        client = await manager.endpoint(DEFAULT_ENDPOINT).client()
        await client.wait_for_instances(1, timeout=10.0)
        tokens = 0
        async with client.stream(request(max_tokens=100), reply_type=EngineItem, timeout=20.0) as stream:
            async for item in stream:
                if not tokens:
                    worker.signal(signal.SIGTERM)
                tokens += len(item.token_ids)
        assert tokens == 100 and await worker.process.wait() == 0


async def test_a_second_signal_ends_at_once(discovery_dir: Path) -> None:
    async with (
        mocker("--speedup-ratio", "1e-3") as worker,
        dynwire.AsyncNetworkManager() as manager,
    ):
        client = await manager.endpoint(DEFAULT_ENDPOINT).client()
        await client.wait_for_instances(1, timeout=10.0)
        call = asyncio.ensure_future(client.call(request(max_tokens=1), timeout=30.0))
        metrics = await manager.endpoint(METRICS).client()
        await metrics.wait_for_instances(1, timeout=10.0)
        while not (await metrics.call(None, timeout=5.0))[0]["active"]:  # noqa: ASYNC110  # in another process
            await asyncio.sleep(0.01)
        worker.signal(signal.SIGTERM)
        assert worker.process.stderr is not None and b"draining" in await worker.process.stderr.readline()
        worker.signal(signal.SIGTERM)
        assert await worker.process.wait() == 1
        with pytest.raises(dynwire.DynwireError):
            await call


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--max-num-batched-tokens", "8"], "less than max_num_seqs"),
        (["--speedup-ratio", "0"], "speedup"),
        (["--request-plane", "pigeon"], "Invalid request plane mode"),
        (["--endpoint", "a.b"], "a.b"),
    ],
)
def test_wrong_settings_are_one_line(
    discovery_dir: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert text in err and err.count("\n") == 1 and "ConfigError" in err


@pytest.mark.parametrize("arguments", [["--timing", "base"], ["--timing", "base=-1"], ["--num-workers", "0"], ["--ends", "now"]])
def test_wrong_flags(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and arguments[0] in capfd.readouterr().err


def test_help_names_every_default(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = " ".join(capfd.readouterr().out.split())
    for default in ("16384", "64", "256", "8192", "1.0", DEFAULT_ENDPOINT):
        assert f"(default: {default})" in out
