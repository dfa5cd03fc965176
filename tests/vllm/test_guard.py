"""The process that ends the engine when its worker was killed, and the command where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynwire.vllm.__main__ import main

ROOT = Path(__file__).parent.parent.parent

PARENT = """
import signal, subprocess, sys
from dynwire.vllm.guard import Guard
guard = Guard()
child = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
guard.watch(child.pid)
guard.watch(child.pid)
if sys.argv[1] == "close":
    guard.close()
    print(child.wait(), flush=True)
else:
    print(child.pid, flush=True)
    signal.pause()
"""


def start(what: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PARENT, what], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_the_engine_ends_when_its_worker_is_killed() -> None:
    with start("stay") as parent:
        assert parent.stdout is not None
        handle = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert not select.select([handle], [], [], 0)[0]
            parent.send_signal(signal.SIGKILL)
            # readable when the process has ended
            assert select.select([handle], [], [], 20)[0]
        finally:
            os.close(handle)


def test_closing_kills_what_is_left() -> None:
    with start("close") as parent:
        assert parent.communicate(timeout=20)[0] == f"{-signal.SIGKILL}\n"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_extra(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m"]) == 2
    err = capfd.readouterr().err
    assert "pip install 'dynwire[vllm]'" in err and err.count("\n") == 1


def test_importing_the_package_imports_no_vllm() -> None:
    names = ", ".join(f"dynwire.vllm{name}" for name in ("", ".__main__", ".worker", ".events", ".engine"))
    code = f"import sys, {names}; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"
