"""Processes of these tests: frontends and workers, each with its own settings, ended by pid."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).with_name("worker.py")
PATIENCE_S = 20.0
"""for what takes milliseconds on a quiet machine"""


def until(condition: Callable[[], object], what: str = "it") -> None:
    """Poll: what is waited for happens in another process, or tells nobody."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:g} s"
        time.sleep(0.005)


class Process:
    """A program that prints lines."""

    def __init__(self, command: list[str], env: Mapping[str, str], errors: Path) -> None:
        self.errors = errors
        self.noisy = False
        """errors on standard error are what the test wants"""
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, cwd=ROOT, env=env
            )
        self.pid = self.process.pid
        self._buffer = b""

    def line(self, beginning: str = "") -> str:
        """The next line that begins so; fails if the program ends or takes too long."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                ready = left > 0 and select.select([self.process.stdout], [], [], left)[0]
                data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
                assert data, f"no line {beginning!r} came; on standard error: {self.errors.read_text()}"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\n")
            text = line.decode()
            if text.startswith(beginning):
                return text

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal, and wait for the end; returns the exit code."""
        if self.process.poll() is None:
            self.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        if self.process.stdout is not None:
            self.process.stdout.close()
        text = self.errors.read_text()
        assert self.noisy or "Traceback" not in text, text


class Deployment:
    """A directory for discovery, and what is started in it."""

    def __init__(self, directory: Path, plane: str = "tcp") -> None:
        self.directory = directory
        (directory / "discovery").mkdir(parents=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "DYNWIRE_"))}
        self.env = {
            **kept,
            "PYTHONPATH": path,
            "DYN_FILE_KV": str(directory / "discovery"),
            "DYN_REQUEST_PLANE": plane,
            "DYN_HTTP_RPC_PORT": "0",
        }
        self._stack = ExitStack()
        self._count = 0

    def start(self, *command: str, **env: str) -> Process:
        """Run ``python COMMAND``."""
        self._count += 1
        process = Process([sys.executable, *command], {**self.env, **env}, self.directory / f"{self._count}.err")
        self._stack.callback(process.close)
        return process

    def worker(self, name: str = "tiny", *arguments: str, **env: str) -> Process:
        """A worker of worker.py, when it is ready."""
        process = self.start(str(WORKER), name, *arguments, **env)
        process.line("ready")
        return process

    def mocker(self, *arguments: str) -> Process:
        """A simulated engine, when it is ready."""
        process = self.start("-m", "dynwire.mocker", *arguments)
        process.line("serving")
        return process

    def frontend(self, *arguments: str, models: int = 1, **env: str) -> Frontend:
        """A frontend, when it serves so many models."""
        process = self.start("-m", "dynwire.frontend", "--http-port", "0", *arguments, **env)
        frontend = Frontend(process, process.line("listening at").split()[2])
        if models:
            until(lambda: len(frontend.models()) >= models, f"{models} model(s)")
        return frontend

    def close(self) -> None:
        self._stack.close()


class Frontend:
    """A frontend's process and URL."""

    def __init__(self, process: Process, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.process = process
        self.url = url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def get(self, path: str, **more: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S, **more)  # type: ignore[arg-type]

    def models(self) -> list[str]:
        """What /health says, which needs no key."""
        names: list[str] = self.get("/health").json()["models"]
        return names

    def chat(self, content: str, **fields: object) -> httpx.Response:
        """An answer in one piece."""
        return self.post("/v1/chat/completions", chat(content, **fields))

    def post(self, path: str, body: object, **more: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, **more)  # type: ignore[arg-type]

    @contextmanager
    def stream(self, content: str, **fields: object) -> Iterator[httpx.Response]:
        body = chat(content, stream=True, **fields)
        with httpx.stream("POST", self.url + "/v1/chat/completions", json=body, timeout=PATIENCE_S) as response:
            yield response


def chat(content: str, **fields: object) -> dict[str, object]:
    """Body of a chat of one message."""
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def events(response: httpx.Response) -> list[str]:
    """What follows ``data:`` in each event of a stream."""
    response.read()
    return split_events(response.text)


def split_events(text: str) -> list[str]:
    """The same of a body."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines), text
    return [line.removeprefix("data: ") for line in lines]
