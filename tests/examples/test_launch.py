"""The launch scripts, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "backends" / "vllm" / "launch" / "agg_request_planes.sh"
READY_S = 40.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def launched(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    local = {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_HTTP_RPC_HOST": "127.0.0.1", "DYN_HTTP_RPC_PORT": str(free_port())}
    process = subprocess.Popen(
        [SCRIPT, *arguments],
        env={**os.environ, **local, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("plane", "number"),
    [
        ("tcp", signal.SIGINT),
        ("tcp", signal.SIGTERM),
        ("http", signal.SIGTERM),
        ("nats", signal.SIGINT),
        ("nats", signal.SIGTERM),
    ],
)
def test_frontend_and_simulated_worker(
    discovery_dir: Path, monkeypatch: pytest.MonkeyPatch, plane: str, number: signal.Signals
) -> None:
    """The curl that the script prints works, and a signal leaves nothing behind."""
    port = free_port()
    monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{free_port()}")  # where nobody answers: the script starts one
    with launched(f"--{plane}", "--mock", "--http-port", str(port), "--", "--speedup-ratio", "10") as process:
        assert process.stdout is not None
        printed: list[str] = []
        deadline = time.monotonic() + READY_S
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C"):
                break
            assert time.monotonic() < deadline
        text = "".join(printed)
        assert f"is served over {plane}" in text, text
        command = text[text.index("curl ") : text.index("Ctrl-C")]
        answer = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)
        assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 64
        children = children_of(process.pid)
        assert len(children) == (3 if plane == "nats" else 2)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 128 + number, out
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)


def test_a_worker_that_cannot_start_ends_the_script(discovery_dir: Path) -> None:
    with launched("--tcp", "--mock", "--http-port", str(free_port()), "--model", "/nowhere/at/all") as process:
        out, _ = process.communicate(timeout=READY_S)
    assert process.returncode == 2 and "/nowhere/at/all" in out


@pytest.mark.parametrize(("arguments", "text"), [([], "choose a request plane"), (["--pigeon"], "unknown option --pigeon")])
def test_wrong_usage(arguments: list[str], text: str) -> None:
    with launched(*arguments) as process:
        out, _ = process.communicate(timeout=READY_S)
    assert process.returncode == 2 and text in out
