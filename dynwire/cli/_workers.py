"""Worker processes that a command starts, watches and stops again, by process id."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import msgspec

from ..config import Config, settings
from ..errors import BY_CODE, ConnectError, DynwireError


class Worker:
    """``dynwire serve --json`` in a process of its own, with standard error kept for the case that it fails."""

    def __init__(self, handlers: Mapping[str, str], config: Config, grace: float = 5.0) -> None:
        """``handlers``: endpoint -> ``module:name``. The process is started; `wait_ready` waits until it serves."""
        command = [
            sys.executable,
            "-m",
            "dynwire",
            "serve",
            "--json",
            "--grace",
            str(grace),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        command += ["--plane", config.request_plane]
        # what came from the environment or a file reaches the worker the same way; secrets are no arguments: `ps` shows those
        for setting in settings():
            if config.origins.get(setting.name) == "command line" and not setting.secret:
                value = config.get(setting.name)
                command += ["--set", f"{setting.name}={','.join(value) if isinstance(value, tuple) else value}"]
        command += handlers.values()
        for endpoint in handlers:
            command += ["--endpoint", endpoint]
        self.addresses: dict[str, str] = {}
        self._handlers = handlers
        self._lines = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        # A session of its own: Ctrl-C in the terminal reaches only us, and we stop the worker in order
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout: float) -> None:
        """Until every endpoint is served; its error if it ends before, `ConnectError` after ``timeout`` seconds."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout
        while len(self.addresses) < len(self._handlers):
            readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(stdout.fileno(), 65536) if readable else b""
            if not chunk:
                raise self._failure(f"did not serve within {timeout:g} s" if not readable else "ended before it served")
            *lines, self._lines = (self._lines + chunk).split(b"\n")
            for line in lines:
                event: dict[str, Any] = msgspec.json.decode(line)
                self.addresses[event["endpoint"]] = event["address"]

    @property
    def address(self) -> str:
        return next(iter(self.addresses.values()))

    def _failure(self, state: str) -> DynwireError:
        """The error that it reported (it runs with ``--json``), otherwise the last line it wrote, where tracebacks say what."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines() or ["it printed nothing"]
        try:
            reported: dict[str, Any] = msgspec.json.decode(lines[-1])["error"]
            return BY_CODE[reported["code"]](f"worker process {self.pid} {state}: {reported['message']}")
        except (msgspec.DecodeError, KeyError, TypeError):
            return ConnectError(f"worker process {self.pid} {state}; its last words: {lines[-1]}")

    def crash(self) -> None:
        """SIGKILL: no farewell to anybody."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, which drains; SIGKILL after ``timeout`` seconds. Returns the exit code, negative for a signal."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode

    def close(self) -> None:
        self.stop()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
