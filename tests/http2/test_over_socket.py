"""The conformance cases over TCP: against a bare server around the engine, which tests the runner, and the http plane."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

import dynwire

from . import deviations
from .over_socket import SOCKET_CASES, EngineServer, run_case_over_socket
from .peer import Case

PARAMETERS = [pytest.param(case, id=case.id) for case in SOCKET_CASES]


@pytest.fixture(scope="module")
def bare() -> Iterator[EngineServer]:
    with EngineServer("native") as server:
        yield server


@pytest.mark.parametrize("case", PARAMETERS)
def test_bare_server(case: Case, bare: EngineServer) -> None:
    run_case_over_socket(case, "127.0.0.1", bare.port, "/")


def test_the_runner_sees_deviations() -> None:
    """Over TCP h2 fails the same cases as without. Sections whose failures are answers: others are seen by waiting only."""
    chosen = [case for case in SOCKET_CASES if case.id.startswith(("http2/4", "http2/6", "http2/8.1.", "hpack"))]
    with EngineServer("h2") as server:
        failed = set()
        for case in chosen:
            try:
                run_case_over_socket(case, "127.0.0.1", server.port, "/")
            except AssertionError:
                failed.add(case.id)
    assert failed == {case.id for case in chosen if case.id in deviations.H2}


async def echo(request: object) -> object:
    return request


@pytest.fixture(scope="module")
def plane() -> Iterator[tuple[str, int, str]]:
    """A server of the http plane: host, port and the path of an endpoint, which answers any request, if with an error."""
    with dynwire.NetworkManager(request_plane="http", http_host="127.0.0.1", http_port=0, discovery_backend="mem") as manager:
        manager.endpoint("test.http2.echo").serve(echo)
        address = urlsplit(manager.server().address or "")
        assert address.hostname is not None and address.port is not None
        yield address.hostname, address.port, f"{address.path}/test.http2.echo"


@pytest.mark.parametrize("case", PARAMETERS)
def test_plane(case: Case, plane: tuple[str, int, str]) -> None:
    run_case_over_socket(case, *plane)
