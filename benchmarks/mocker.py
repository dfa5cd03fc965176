"""What does the simulated engine cost per token? ``python benchmarks/mocker.py [--answers N] [--output FILE]``

One process of ``python -m dynwire.mocker --speedup-ratio 1000000`` and this process as its caller, over tcp, no frontend between
them. Streams of 128 tokens at several concurrencies; CPU time of the worker is read from /proc before and after. ``items`` tells
how many messages carried the tokens: one token each, and more only where the caller reads slower than the engine runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dynwire import AsyncNetworkManager
from dynwire.cli import tables
from dynwire.workers.protocol import EngineItem, EngineRequest, StopConditions

TOKENS = 128
PROMPT = 100
ENDPOINT = "bench.mocker.generate"


def cpu_of(pid: int) -> float:
    """Seconds of user and system time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(client: Any, pid: int, concurrency: int, answers: int, first: int) -> dict[str, Any]:
    tokens = items = 0

    async def lane(number: int) -> None:
        nonlocal tokens, items
        for turn in range(max(1, answers // concurrency)):
            prompt = [first + number, turn, *range(PROMPT - 2)]
            request = EngineRequest("tiny", prompt, StopConditions(max_tokens=TOKENS))
            async with client.stream(request, reply_type=EngineItem) as stream:
                async for item in stream:
                    tokens += len(item.token_ids)
                    items += 1

    worker, caller, begin = cpu_of(pid), own_cpu(), time.perf_counter()
    await asyncio.gather(*map(lane, range(concurrency)))
    seconds = time.perf_counter() - begin
    return {
        "concurrency": concurrency,
        "tokens": tokens,
        "items": items,
        "tokens_per_s": round(tokens / seconds),
        "worker_us_per_token": round((cpu_of(pid) - worker) / tokens * 1e6, 2),
        "worker_ms_per_answer": round((cpu_of(pid) - worker) / tokens * TOKENS * 1e3, 3),
        "caller_us_per_token": round((own_cpu() - caller) / tokens * 1e6, 2),
    }


async def run(answers: int, directory: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dynwire.mocker", "--endpoint", ENDPOINT, "--speedup-ratio", "1e6"]
    environment = {**os.environ, "DYN_FILE_KV": directory, "DYN_TCP_RPC_HOST": "127.0.0.1"}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        async with AsyncNetworkManager(discovery_file_dir=directory) as manager:
            client = await manager.endpoint(ENDPOINT).client()
            await client.wait_for_instances(1, timeout=10.0)
            await measure(client, process.pid, 32, 200, 900)  # connections, caches
            return [await measure(client, process.pid, n, answers, n) for n in (1, 32, 128)]
    finally:
        process.terminate()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=2000, help="per row")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner(loop_factory=factory) as runner:
        rows = runner.run(run(arguments.answers, directory))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(tables.render([name.upper() for name in rows[0]], [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
