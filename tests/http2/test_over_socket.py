"""Every server case that can be seen from outside, over TCP against a served endpoint, on both engines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.faults.conftest import PROGRAM, Worker

from . import cases, deviations
from .over_socket import SocketPeer
from .peer import Case

SETTINGS = {"max_concurrent_streams": "http_max_concurrent_streams"}
"""limits of an engine that a server has settings for"""

Servers = dict[tuple[str, tuple[tuple[str, int], ...]], str]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Address by engine and limits. All are started first: what a test starts, it would have to end."""
    folder = tmp_path_factory.mktemp("servers")
    running: dict[tuple[str, tuple[tuple[str, int], ...]], Worker] = {}
    fixed = {"request_plane": "http", "http_host": "127.0.0.1", "http_port": 0, "discovery": "mem"}
    for limits in {case.limits for case in cases.SERVER if visible(case)}:
        for engine in ("native", "h2"):
            settings = {**fixed, "http_engine": engine, **{SETTINGS[name]: value for name, value in limits}}
            command = [sys.executable, str(PROGRAM), "asyncio", *(f"{name}={value}" for name, value in settings.items())]
            running[engine, limits] = Worker(command, folder / f"stderr-{len(running)}")
    yield {key: worker.line().split()[1] for key, worker in running.items()}
    for worker in running.values():
        worker.close()


def visible(case: Case) -> bool:
    return case.socket and all(name in SETTINGS for name, _ in case.limits)


def parameters(engine: str, deviating: bool) -> list[object]:
    return [
        pytest.param(case, id=case.id)
        for case in cases.SERVER
        if visible(case) and (engine == "h2" and case.id in deviations.H2) is deviating
    ]


def run(case: Case, address: str) -> None:
    parts = urlsplit(address)
    assert parts.port is not None
    peer = SocketPeer(parts.port, f"{parts.path}/f/w/echo".encode())
    try:
        case.run(peer)
    finally:
        peer.close()


@pytest.mark.parametrize("case", parameters("native", deviating=False))
def test_native(servers: Servers, case: Case) -> None:
    run(case, servers["native", case.limits])


@pytest.mark.parametrize("case", parameters("h2", deviating=False))
def test_h2(servers: Servers, case: Case) -> None:
    run(case, servers["h2", case.limits])
