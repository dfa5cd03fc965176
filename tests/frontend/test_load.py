"""Many requests at once, with workers killed and started in between: nothing hangs, nothing is silent, nothing is kept."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .stack import PATIENCE_S, ROOT, Deployment, Frontend, chat, until

pytest.importorskip("click")
pytest.importorskip("httptools")

REQUESTS = 600
MANY, AT_ONCE, PROMPTS, TOKENS = 5000, 256, 50, 48
GROWTH_MIB = 24
"""what buffers and caches may take after the first round"""


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def ended(frontend: Frontend) -> int:
    models = frontend.get("/state.json").json()["models"]
    return int(sum(model["requests"] for model in models))


class Load:
    """``dynwire load`` in the background."""

    def __init__(self, deployment: Deployment, frontend: Frontend) -> None:
        self.report = deployment.directory / "load.json"
        options = ["--concurrency", "128", "--requests", str(REQUESTS), "--max-tokens", "48", "--json", str(self.report)]
        command = [sys.executable, "-m", "dynwire", "load", frontend.url, *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=deployment.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )

    def result(self) -> dict[str, Any]:
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
        found: dict[str, Any] = json.loads(self.report.read_text())
        return found


@pytest.mark.hard_timeout(240)
@pytest.mark.parametrize(("server", "limit"), [("granian", 0), ("granian", 3), ("uvicorn", 3)])
def test_worker_killed_and_started_under_load(deployment: Deployment, server: str, limit: int) -> None:
    workers = [deployment.mocker("--model-name", "tiny", "--speedup-ratio", "50") for _ in range(2)]
    frontend = deployment.frontend("--http-server", server, "--migration-limit", str(limit))
    until(lambda: len(frontend.get("/state.json").json()["models"][0]["instances"]) == 2)
    assert Load(deployment, frontend).result()["requests"]["failed"] == 0
    before = resident_mib(frontend.process.pid)

    for _ in range(2):
        start = ended(frontend)
        load = Load(deployment, frontend)
        until(lambda start=start: ended(frontend) > start + REQUESTS // 4)  # type: ignore[misc]
        workers.pop(0).kill()
        until(lambda start=start: ended(frontend) > start + REQUESTS // 2)  # type: ignore[misc]
        workers.append(deployment.mocker("--model-name", "tiny", "--speedup-ratio", "50"))
        result = load.result()
        requests = result["requests"]
        assert requests["done"] + requests["failed"] == REQUESTS
        if limit:
            assert requests["failed"] == 0, result["errors"]
        # every failure has a code; none is a connection that just ended, or a timeout
        assert all("worker_lost" in kind or "no_worker" in kind or "worker_unreachable" in kind for kind in result["errors"])
        # answers that were not cut have all of their tokens, and those that were are not counted twice
        assert result["tokens"]["completion"] >= requests["done"] * 48
    until(lambda: frontend.get("/state.json").json()["in_flight"] == 0)
    assert resident_mib(frontend.process.pid) - before < GROWTH_MIB


class Crowd:
    """Many requests with few different prompts, half of them streamed; keeps what each prompt was answered with."""

    def __init__(self, frontend: Frontend) -> None:
        from dynwire.loadgen.http import Target

        self.target = Target(frontend.url)
        self.ended = 0
        self.quarter = asyncio.Event()
        """so many have ended"""
        self.go_on = asyncio.Event()
        """the last quarter waits for it"""
        self.go_on.set()
        self.errors: Counter[str] = Counter()
        self.texts: dict[int, set[str]] = {}
        self.lengths: Counter[int | None] = Counter()

    async def one(self, pool: Any, number: int) -> None:
        from dynwire.loadgen.http import Exchange, LoadError, clock

        prompt, stream = number % PROMPTS, number // PROMPTS % 2 == 1
        more = {"stream_options": {"include_usage": True}} if stream else {}
        body = chat(f"prompt number {prompt}", max_tokens=TOKENS, ignore_eos=True, stream=stream, **more)
        exchange = Exchange(clock())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await pool.run(self.target.post("/v1/chat/completions", json.dumps(body).encode()), exchange)
        except LoadError as error:
            self.errors[error.kind] += 1
        else:
            self.lengths[exchange.completion_tokens] += 1
            if not stream:
                answer = json.loads(exchange.body)["choices"][0]["message"]["content"]
                self.texts.setdefault(prompt, set()).add(answer)
        self.ended += 1
        if self.ended >= MANY // 4:
            self.quarter.set()

    async def run(self) -> None:
        from dynwire.loadgen.http import Pool

        pool, numbers = Pool(self.target), iter(range(MANY))

        async def lane() -> None:
            for number in numbers:
                if number >= MANY * 3 // 4:
                    await self.go_on.wait()
                await self.one(pool, number)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(lane())
        finally:
            pool.close()


@pytest.mark.hard_timeout(240)
@pytest.mark.parametrize("limit", [0, 3])
async def test_thousands_of_requests_with_a_worker_killed_and_started_again(deployment: Deployment, limit: int) -> None:
    def mocker() -> Any:
        return deployment.mocker("--model-name", "tiny", "--speedup-ratio", "50")

    victim, _ = mocker(), mocker()
    frontend = deployment.frontend("--migration-limit", str(limit))
    until(lambda: len(frontend.get("/state.json").json()["models"][0]["instances"]) == 2)
    quiet = Crowd(frontend)
    await quiet.run()
    assert not quiet.errors and quiet.lengths == {TOKENS: MANY}
    assert all(len(texts) == 1 for texts in quiet.texts.values())  # an engine says the same to the same prompt
    before = resident_mib(frontend.process.pid)

    crowd = Crowd(frontend)
    crowd.go_on.clear()
    load = asyncio.create_task(crowd.run())
    await crowd.quarter.wait()
    await asyncio.to_thread(victim.kill)
    await asyncio.to_thread(mocker)
    crowd.go_on.set()
    await load
    # Nothing hangs: each has its answer or an error that says what happened.
    assert crowd.ended == MANY
    failed = crowd.errors.total()
    assert failed == 0 if limit else 0 < failed <= AT_ONCE, crowd.errors
    assert all("worker_lost" in kind or "no_worker" in kind or "worker_unreachable" in kind for kind in crowd.errors)
    # What was repeated or has moved is neither cut nor doubled.
    assert crowd.lengths == {TOKENS: MANY - failed}
    assert crowd.texts == quiet.texts
    until(lambda: frontend.get("/state.json").json()["in_flight"] == 0)
    assert resident_mib(frontend.process.pid) - before < GROWTH_MIB
