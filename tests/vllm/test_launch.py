"""The launch script with the real vLLM, on every plane."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ..examples.test_launch import children_of, free_port, launched
from .conftest import FLAGS, START_S, environment, needs_vllm

pytestmark = [needs_vllm, pytest.mark.hard_timeout(START_S + 90)]

TEXTS: dict[str, str] = {}
"""the greedy answer per plane"""


def post(port: int, body: dict[str, Any]) -> dict[str, Any]:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


@pytest.mark.parametrize("plane", ["tcp", "http", "nats"])
def test_curl_frontend_and_vllm(model: Path, discovery_dir: Path, monkeypatch: pytest.MonkeyPatch, plane: str) -> None:
    port = free_port()
    for name, value in environment(discovery_dir).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{free_port()}")  # where nobody answers: the script starts one
    arguments = (f"--{plane}", "--model", str(model), "--http-port", str(port), "--", *FLAGS, "--max-model-len", "512")
    with launched(*arguments) as process:
        assert process.stdout is not None
        printed: list[str] = []
        deadline = time.monotonic() + START_S
        for line in process.stdout:
            printed.append(line)
            if line.startswith("Ctrl-C"):
                break
            assert time.monotonic() < deadline
        text = "".join(printed)
        assert f"tiny-qwen3 is served over {plane}" in text, text
        command = text[text.index("curl ") : text.index("Ctrl-C")]
        answer = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)
        assert answer["choices"][0]["finish_reason"] in ("stop", "length") and 0 < answer["usage"]["completion_tokens"] <= 64
        asked = {"model": "tiny-qwen3", "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}
        answer = post(port, {**asked, "max_tokens": 40, "ignore_eos": True})
        assert answer["usage"]["completion_tokens"] == 40
        TEXTS[plane] = answer["choices"][0]["message"]["content"]
        assert len(set(TEXTS.values())) == 1
        children = children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, out
        for child in children:
            assert not Path(f"/proc/{child}").exists()
