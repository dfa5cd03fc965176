"""Many requests at once, with workers killed and started in between: nothing hangs, nothing is silent, nothing is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .stack import ROOT, Deployment, Frontend, until

pytest.importorskip("click")
pytest.importorskip("httptools")

REQUESTS = 600
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
