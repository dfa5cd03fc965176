"""TLS with ALPN between a worker of ours and curl and nghttp; our client with nghttpd over TLS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import Managers, StartWorker

from .conftest import HTTP, Direct, StartForeign
from .programs import program, run


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    run(
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        *subject,
        "-out",
        cert,
        "-keyout",
        key,
    )
    return cert, key


@pytest.fixture
def tls_worker(start_worker: StartWorker, certificate: tuple[Path, Path]) -> str:
    cert, key = certificate
    return start_worker(**HTTP, http_tls_cert=cert, http_tls_key=key).address


@pytest.mark.parametrize(("option", "version"), [("--http2", "2"), ("--http1.1", "1.1")])
def test_curl(tls_worker: str, certificate: tuple[Path, Path], option: str, version: str) -> None:
    assert tls_worker.startswith("https://")
    curl = (program("curl"), "-sS", "--max-time", "15", "--cacert", certificate[0], option)
    urls = (f"{tls_worker}/f/w/echo", f"{tls_worker}/f/w/echo")
    out = run(*curl, "-d", '{"a": 1}', "-w", "%{http_version} %{num_connects}\n", *urls).stdout.decode().splitlines()
    assert [json.loads(out[0]), json.loads(out[2])] == [{"a": 1}, {"a": 1}]
    assert [out[1], out[3]] == [f"{version} 1", f"{version} 0"]  # ALPN chose, and the connection was kept


def test_nghttp(tls_worker: str, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"z" * 200_000)
    out = run(program("nghttp"), "-d", body, "-H", "content-type: application/octet-stream", f"{tls_worker}/f/w/echo").stdout
    assert out == b"z" * 200_000


async def test_nghttpd(
    managers: Managers, start_foreign: StartForeign, free_port: int, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    command = [program("nghttpd"), "--echo-upload", "-d", str(tmp_path), str(free_port), str(key), str(cert)]
    start_foreign(command, free_port)
    async with managers(request_plane="http", http_tls_ca=str(cert)) as manager:
        echo = Direct(manager, f"https://127.0.0.1:{free_port}/v1/rpc")
        large = bytes(range(256)) * 2000
        assert await echo.call(b"echoed") == b"echoed"
        assert await echo.call(large) == large
