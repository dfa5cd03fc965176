"""nginx in front of a worker: HTTP/1.1 and HTTP/2 on its front side, HTTP/1.1 (proxy_pass) and HTTP/2 (grpc_pass) behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.conftest import Managers

from .conftest import Direct, StartForeign
from .programs import free_ports, program, run

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 64m;
    keepalive_requests {requests};
    upstream worker {{ server {worker}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{front} http2;
        listen 127.0.0.1:{plain};
        location / {{ {behind} }}
    }}
}}
"""
BEHIND = {
    "http1": 'proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;',
    "h2c": "grpc_pass grpc://worker;",
}


class Proxy:
    def __init__(self, front: int, plain: int) -> None:
        self.h2 = f"http://127.0.0.1:{front}/v1/rpc"
        self.http1 = f"http://127.0.0.1:{plain}/v1/rpc"


@pytest.fixture(params=BEHIND)
def proxy(request: pytest.FixtureRequest, worker: str, start_foreign: StartForeign, tmp_path: Path) -> Proxy:
    front, plain = free_ports(2)
    options = {"worker": urlsplit(worker).netloc, "folder": tmp_path, "front": front, "plain": plain, "requests": 20}
    config = tmp_path / "nginx.conf"
    config.write_text(CONFIG.format(**options, behind=BEHIND[request.param]))
    start_foreign([program("nginx"), "-c", str(config), "-p", str(tmp_path)], front)
    return Proxy(front, plain)


async def test_our_client(proxy: Proxy, managers: Managers) -> None:
    async with managers(request_plane="http") as manager:
        echo = Direct(manager, proxy.h2)
        assert await echo.call({"a": [1, b"\0"]}) == {"a": [1, b"\0"]}
        large = bytes(range(256)) * 8000
        assert await echo.call(large) == large
        items = await Direct(manager, proxy.h2, "f.w.counted_stream").items({"n": 3, "items": 200, "size": 50})
        assert [item[:2] for item in items] == [[3, index] for index in range(200)]


async def test_our_client_outlives_the_proxys_connections(proxy: Proxy, managers: Managers, known_at) -> None:  # type: ignore[no-untyped-def]
    """nginx says GOAWAY after 20 requests (keepalive_requests); callers do not see it."""
    async with managers(request_plane="http") as manager, known_at(manager, "f.w.echo", proxy.h2) as client:
        for n in range(70):
            assert await client.call(n) == n
        assert await asyncio.gather(*(client.call(n) for n in range(60))) == list(range(60))


@pytest.mark.parametrize("front", ["http1", "h2"])
def test_curl(proxy: Proxy, front: str) -> None:
    option, base = ("--http1.1", proxy.http1) if front == "http1" else ("--http2-prior-knowledge", proxy.h2)
    curl = (program("curl"), "-sS", "--max-time", "15", option)
    assert json.loads(run(*curl, "-d", '{"a": 1}', f"{base}/f/w/echo").stdout) == {"a": 1}
    request = '{"n": 1, "items": 100, "size": 10}'
    lines = run(*curl, "-d", request, f"{base}/f/w/counted_stream").stdout.splitlines()
    assert [json.loads(line)[1] for line in lines] == list(range(100))
    assert run(*curl, "-d", "1", "-o", "/dev/null", "-w", "%{http_code}", f"{base}/f/w/nothing").stdout == b"404"
