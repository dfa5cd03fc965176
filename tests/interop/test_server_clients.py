"""A worker of ours, asked by nghttp, h2load, Node's http2 and httpx."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from .programs import HERE, module, program, run


def test_nghttp(worker: str, tmp_path: Path) -> None:
    """It opens with PRIORITY frames on idle streams and uses stream 13 first."""
    body = tmp_path / "body"
    body.write_text('{"from": "nghttp"}')
    out = run(program("nghttp"), "-nv", "-d", body, "-H", "content-type: application/json", f"{worker}/f/w/echo").stdout.decode()
    out = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "send PRIORITY frame" in out, "this nghttp does not do what the test is for"
    assert re.search(r"recv \(stream_id=13\) :status: 200", out), out
    assert "RST_STREAM" not in out and not re.search(r"recv GOAWAY", out), out
    plain = run(program("nghttp"), "-d", body, "-H", "content-type: application/json", f"{worker}/f/w/echo").stdout
    assert json.loads(plain) == {"from": "nghttp"}


def test_nghttp_padding_and_small_windows(worker: str, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"z" * 200_000)
    options = ("-b", "255", "-w", "10", "-W", "10", "-m", "5")  # padding; windows of 2^10 - 1 bytes; five times
    out = run(
        program("nghttp"), *options, "-d", body, "-H", "content-type: application/octet-stream", f"{worker}/f/w/echo"
    ).stdout
    assert out == b"z" * 1_000_000


@pytest.mark.parametrize("path", ["/live", "/v1/rpc/f/w/echo"])
def test_h2load(worker: str, tmp_path: Path, path: str) -> None:
    body = tmp_path / "body"
    body.write_text('{"a": 1}')
    load = ("-n", "2000", "-c", "4", "-m", "32")
    origin = worker.rpartition("/v1")[0]
    post = ("-d", str(body), "-H", "content-type: application/json") if path != "/live" else ()
    out = run(program("h2load"), *load, *post, f"{origin}{path}").stdout.decode()
    assert "2000 succeeded, 0 failed, 0 errored" in out, out
    assert "2000 2xx" in out, out


def test_h2load_http1(worker: str, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_text("1")
    post = ("-d", str(body), "-H", "content-type: application/json")
    out = run(program("h2load"), "--h1", "-n", "500", "-c", "4", *post, f"{worker}/f/w/echo").stdout.decode()
    assert "500 succeeded, 0 failed, 0 errored" in out and "500 2xx" in out, out


def test_node(worker: str) -> None:
    seen = json.loads(run(program("node"), HERE / "client.mjs", worker, timeout=30).stdout)
    assert seen["live"]["status"] == 200 and seen["live"]["type"] == "application/json"
    assert (seen["echo"]["status"], json.loads(seen["echo"]["body"]), seen["echo"]["id"]) == (200, {"a": [1, 2]}, "from-node")
    assert seen["big"] == {"status": 200, "same": True}
    assert seen["many"] == list(range(200))
    assert seen["lines"] == [[7, index] for index in range(5)]
    assert (seen["unknown"]["status"], seen["unknown"]["type"]) == (404, "application/problem+json")
    assert seen["ping"] is True and json.loads(seen["after"]["body"]) == "after"


@pytest.mark.parametrize("http2", [True, False], ids=["h2", "http1"])
def test_httpx(worker: str, http2: bool) -> None:
    module("httpx", "httpx[http2]")
    import httpx

    # trust_env: a proxy in the environment of the developer is none of this test's business
    with httpx.Client(http1=not http2, http2=http2, trust_env=False, timeout=15) as client:
        reply = client.post(f"{worker}/f/w/echo", json={"a": 1}, headers={"x-request-id": "mine"})
        assert (reply.status_code, reply.json(), reply.headers["x-request-id"]) == (200, {"a": 1}, "mine")
        assert reply.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        with client.stream("POST", f"{worker}/f/w/counted_stream", json={"n": 1, "items": 50, "size": 9}) as stream:
            assert [json.loads(line)[1] for line in stream.iter_lines()] == list(range(50))
        with client.stream("POST", f"{worker}/f/w/some_then_wait", json=2) as stream:
            assert next(stream.iter_lines()) == "0"  # the rest is given up
        data = b"q" * 3_000_000
        assert (
            client.post(f"{worker}/f/w/echo", content=data, headers={"content-type": "application/octet-stream"}).content == data
        )
        assert client.post(f"{worker}/f/w/nothing", json=1).json()["code"] == "endpoint_not_found"


@pytest.mark.parametrize("loop_factory", ["asyncio"], indirect=True)
async def test_httpx_many_at_once(worker: str) -> None:
    module("httpx", "httpx[http2]")
    import httpx

    async with httpx.AsyncClient(http1=False, http2=True, trust_env=False, timeout=30) as client:

        async def one(n: int) -> Any:
            return (await client.post(f"{worker}/f/w/echo", json=n)).json()

        assert await asyncio.gather(*map(one, range(150))) == list(range(150))
