"""vLLM, really: what the tests that start its engine share. Without vLLM they are skipped; ``make test-vllm`` runs them."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm has an environment with it"
)
START_S = 240.0
"""Starting an engine takes 20 s on two idle cores, most of it importing vLLM in three processes."""

FLAGS = ("--enforce-eager", "--dtype", "float32", "--block-size", "32")
"""Eager, because compiling takes longer than these tests; float32 and blocks of 32 are what vLLM's CPU kernels take"""


def environment(discovery: Path, **further: str) -> dict[str, str]:
    """Of a process that runs vLLM. Nothing leaves this machine, and nothing is left after it."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DYN_FILE_KV": str(discovery),
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_HTTP_RPC_HOST": "127.0.0.1",
        "DYN_HTTP_RPC_PORT": "0",
        "DYNWIRE_EVENTS_HOST": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # a worker of vLLM on a CPU does not go by itself; this is how long its engine waits before it says so
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
        **further,
    }


class Process:
    """A process that says in a line of its own when it is ready. Its output goes to a file, which failures quote."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self._reader = log.open("w+")
        self.process = subprocess.Popen(arguments, env=env, stdout=self._reader, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.close()


@contextmanager
def running(module_or_script: list[str], env: dict[str, str], log: Path) -> Iterator[Process]:
    """Start Python, yield when it serves. Fails with the log if it ends before."""
    started = Process([sys.executable, *module_or_script], env, log)
    try:
        deadline = time.monotonic() + START_S
        while not any(line.startswith("serving ") for line in started.text.splitlines()):
            assert started.process.poll() is None, started.text[-4000:]
            assert time.monotonic() < deadline, started.text[-4000:]
            time.sleep(0.1)
        yield started
    finally:
        started.close()


@pytest.fixture
def loop_factory(leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    """One kind of loop is enough for the callers here; engines take their time."""
    return asyncio.new_event_loop


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with random weights."""
    directory = tmp_path_factory.mktemp("model") / "tiny-qwen3"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "make_model.py"), str(directory)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory
