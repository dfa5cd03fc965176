"""Deployments: one per test, and one per module and HTTP server for tests that only ask questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .stack import Deployment, Frontend, Process

SERVERS = ("granian", "uvicorn")

for package in ("starlette", "granian", "tokenizers", "jinja2", "prometheus_client"):
    pytest.importorskip(package)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """An empty one on the tcp plane."""
    made = Deployment(tmp_path / "deployment")
    yield made
    made.close()


class Shared:
    """A frontend and a worker that several tests use."""

    def __init__(self, deployment: Deployment, frontend: Frontend, worker: Process) -> None:
        self.deployment = deployment
        self.frontend = frontend
        self.worker = worker


@pytest.fixture(scope="module", params=SERVERS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """One worker behind one frontend, on each HTTP server."""
    if request.param == "uvicorn":
        pytest.importorskip("uvicorn")
    deployment = Deployment(tmp_path_factory.mktemp("shared") / "deployment")
    try:
        worker = deployment.worker()
        worker.noisy = True  # some requests make its handler raise
        yield Shared(deployment, deployment.frontend("--http-server", request.param), worker)
    finally:
        deployment.close()


@pytest.fixture
def frontend(shared: Shared) -> Frontend:
    return shared.frontend
