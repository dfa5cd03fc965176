"""The mixed deployments (requests over tcp; events over something else, or none), as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .test_launch import READY_S, ROOT, children_of, free_port

MIXED = ROOT / "examples" / "mixed"
EVENT_PLANES = {"tcp_jetstream": "jetstream", "tcp_nats_core": "nats", "tcp_no_events": "none"}

for package in ("starlette", "granian", "tokenizers", "prometheus_client"):
    pytest.importorskip(package)


@contextmanager
def launched(script: str, *arguments: str, nats_port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [MIXED / f"{script}.sh", *arguments],
        env={
            **os.environ,
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "NATS_SERVER": f"nats://127.0.0.1:{nats_port}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def printed_until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    printed: list[str] = []
    deadline = time.monotonic() + READY_S
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Ctrl-C"):
            break
        assert time.monotonic() < deadline, "".join(printed)
    return "".join(printed)


def metric(port: int, name: str) -> float | None:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
    found = re.search(rf"^dynwire_router_{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


@pytest.mark.hard_timeout(150)
@pytest.mark.parametrize("script", EVENT_PLANES)
def test_a_prompt_goes_where_it_is_cached(discovery_dir: Path, script: str) -> None:
    """The printed curl twice: the second answer reports what came from the cache, which one of two workers has."""
    port, nats_port, plane = free_port(), free_port(), EVENT_PLANES[script]
    with (
        socket.create_server(("127.0.0.1", 0)) as nobody,  # for the one that must not connect
        launched(
            script, "--mock", "--http-port", str(port), "--", "--speedup-ratio", "10",
            nats_port=nobody.getsockname()[1] if plane == "none" else nats_port,
        ) as process,
    ):  # fmt: skip
        nobody.setblocking(False)
        text = printed_until_ready(process)
        assert "is served by 2 workers: requests over tcp" in text, text
        assert ("starting one" in text) == (plane != "none")
        command = text[text.index("curl ") : text.index("What the router")]

        def ask() -> int:
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout)
            assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 32
            return int((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))

        if plane != "none":
            until(lambda: (metric(port, "event_dumps_total") or 0) >= 2 and metric(port, "event_plane_connected") == 1)
        assert ask() == 0
        until(lambda: (metric(port, "index_blocks") or 0) > 1)
        assert ask() >= 16
        assert metric(port, "exact_predictions_total") == 2
        assert metric(port, "by_load_only_total") == 0
        if plane == "none":
            assert metric(port, "event_plane_connected") is None
            with pytest.raises(BlockingIOError):  # nobody has connected to the NATS server
                nobody.accept()
        state = httpx.get(f"http://127.0.0.1:{port}/state.json", timeout=20).json()
        assert state["plane"] == "tcp"

        children = children_of(process.pid)
        assert len(children) == (3 if plane == "none" else 4)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=40)
        assert process.returncode == 130, out
        assert "Traceback" not in out
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)


def until(condition: Callable[[], object], patience: float = 30.0) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_cannot_start_ends_the_script(discovery_dir: Path) -> None:
    arguments = ("--mock", "--http-port", str(free_port()), "--model", "/nowhere/at/all")
    with launched("tcp_no_events", *arguments, nats_port=free_port()) as process:
        out, _ = process.communicate(timeout=READY_S)
    assert process.returncode == 2 and "/nowhere/at/all" in out


@pytest.mark.parametrize("script", EVENT_PLANES)
def test_help_and_wrong_usage(script: str) -> None:
    with launched(script, "--help", nats_port=1) as process:
        out, _ = process.communicate(timeout=READY_S)
    assert process.returncode == 0 and f"{script}.sh [--mock]" in out
    assert ("A NATS server is started" in out) == (EVENT_PLANES[script] != "none")
    with launched(script, "--pigeon", nats_port=1) as process:
        out, _ = process.communicate(timeout=READY_S)
    assert process.returncode == 2 and "unknown option --pigeon" in out


def test_every_script_is_tested() -> None:
    assert {path.stem for path in MIXED.glob("*.sh")} - {"common"} == set(EVENT_PLANES)
