"""A worker of ours, asked by curl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .programs import program, run

VERSIONS = {"h2c": ("--http2-prior-knowledge", "2"), "http1": ("--http1.1", "1.1"), "upgrade": ("--http2", "1.1")}
"""RFC 9113 3.1 has dropped the upgrade to h2c: who asks for it is answered in HTTP/1.1"""


@pytest.fixture(params=VERSIONS)
def curl(request: pytest.FixtureRequest) -> tuple[list[str], str]:
    """How to start curl, and the version of HTTP that it must end up with."""
    option, version = VERSIONS[request.param]
    return [program("curl"), "--silent", "--show-error", "--max-time", "15", option], version


def test_echo(worker: str, curl: tuple[list[str], str]) -> None:
    command, version = curl
    out = run(
        *command, "-d", '{"a": [1, "ä"]}', "-H", "x-request-id: mine", "-D", "-", "-w", "\n%{http_version}", f"{worker}/f/w/echo"
    )
    head, _, rest = out.stdout.partition(b"\r\n\r\n")
    body, _, got = rest.rstrip().rpartition(b"\n")
    assert got.decode() == version
    assert json.loads(body) == {"a": [1, "ä"]}
    assert f"HTTP/{version} 200".encode() in head
    assert b"content-type: application/json" in head and b"x-request-id: mine" in head


def test_pages_and_errors(worker: str, curl: tuple[list[str], str]) -> None:
    command, version = curl
    origin = worker.rpartition("/v1")[0]
    assert json.loads(run(*command, f"{origin}/live").stdout)
    assert run(*command, "--head", f"{origin}/live", "-w", "%{http_code} %{http_version}").stdout.endswith(
        b"200 " + version.encode()
    )
    for path, code, kind in (("f/w/nothing", "404", "endpoint_not_found"), ("f/w/wrong", "500", "remote_error")):
        out = run(*command, "-d", '"exception"', "-w", "\n%{http_code} %{content_type}", f"{worker}/{path}").stdout.decode()
        document, _, status = out.rpartition("\n")
        assert status == f"{code} application/problem+json"
        assert json.loads(document)["code"] == kind
    assert run(*command, "-d", "{", "-o", "/dev/null", "-w", "%{http_code}", f"{worker}/f/w/echo").stdout == b"400"


def test_stream(worker: str, curl: tuple[list[str], str]) -> None:
    command, _ = curl
    request = '{"n": 1, "items": 100, "size": 10}'
    lines = run(*command, "-d", request, f"{worker}/f/w/counted_stream").stdout.splitlines()
    assert [json.loads(line)[1] for line in lines] == list(range(100))
    events = run(*command, "-N", "-H", "accept: text/event-stream", "-d", request, f"{worker}/f/w/counted_stream").stdout
    assert events.count(b"data: [") == 100 and events.endswith(b"event: end\ndata: {}\n\n")


def test_large_bodies(worker: str, curl: tuple[list[str], str], tmp_path: Path) -> None:
    """More than any window; over HTTP/1.1 curl waits for ``100 Continue`` first."""
    command, _ = curl
    data = bytes(range(256)) * 20_000
    (tmp_path / "body").write_bytes(data)
    out = run(
        *command, "--data-binary", f"@{tmp_path / 'body'}", "-H", "content-type: application/octet-stream", f"{worker}/f/w/echo"
    )
    assert out.stdout == data
    chunked = ("-T", "-", "-X", "POST", "-H", "content-type: application/octet-stream", "-H", "transfer-encoding: chunked")
    if "--http1.1" in command:
        assert run(*command, *chunked, f"{worker}/f/w/echo", stdin=data).stdout == data


@pytest.mark.parametrize("curl", ["http1", "upgrade"], indirect=True)
def test_one_connection_for_many(worker: str, curl: tuple[list[str], str]) -> None:
    """Without h2c: curl 7.88.1 sends a second request with prior knowledge to no server, nghttpd included, without an error."""
    command, _ = curl
    urls = [part for n in range(20) for part in (f"{worker}/f/w/echo", "-o", "/dev/null")]
    out = run(*command, "-d", "1", "-w", "%{num_connects} %{http_code}\n", *urls).stdout.decode().splitlines()
    assert out == ["1 200"] + ["0 200"] * 19


def test_deadline(worker: str, curl: tuple[list[str], str]) -> None:
    command, _ = curl
    out = run(*command, "-d", "1", "-H", "x-request-timeout-ms: 50", "-w", "\n%{http_code}", f"{worker}/f/w/wait").stdout.decode()
    assert out.endswith("\n504")
