"""The conformance cases over TCP: against a bare server around the engine, which tests the runner, and the http plane."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

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
    """Over TCP h2 fails the same cases as without: all that are fast to fail, the others end in silence."""
    chosen = [case for case in SOCKET_CASES if case.id.startswith(("http2/4", "http2/5", "http2/6", "http2/8.1", "hpack"))]
    with EngineServer("h2") as server:
        failed = set()
        for case in chosen:
            try:
                run_case_over_socket(case, "127.0.0.1", server.port, "/", silence_s=0.5)
            except AssertionError:
                failed.add(case.id)
    assert failed == {case.id for case in chosen if case.id in deviations.H2}


def plane_server() -> AbstractContextManager[tuple[str, int, str]]:
    """Start a server of the http plane; gives host, port and a path that takes GET and POST with any body."""
    pytest.fail("plane_server() is to start the http plane, now that there is one", pytrace=False)


@pytest.fixture(scope="module")
def plane() -> Iterator[tuple[str, int, str]]:
    with plane_server() as target:
        yield target


HAVE_PLANE = importlib.util.find_spec("dynwire.planes.http") is not None


@pytest.mark.skipif(not HAVE_PLANE, reason="dynwire.planes.http does not exist yet")
@pytest.mark.parametrize("case", PARAMETERS if HAVE_PLANE else [pytest.param(None, id="all")])
def test_plane(case: Case, plane: tuple[str, int, str]) -> None:
    run_case_over_socket(case, *plane)
