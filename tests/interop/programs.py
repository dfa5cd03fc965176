"""Starts programs that are not ours, and says what to install where one is missing."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE_S = 20.0

PACKAGES = {
    "curl": "curl",
    "nghttp": "nghttp2-client",
    "h2load": "nghttp2-client",
    "nghttpd": "nghttp2-server",
    "nginx": "nginx-light",
    "node": "nodejs",
}
"""program to Debian package; `.ci/install-peers` installs them"""


def program(name: str) -> str:
    """Path of the program; skips the test if it is missing."""
    # Debian keeps servers in /usr/sbin, which is not on every user's path
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is missing: apt-get install {PACKAGES[name]}")
    return found


def module(name: str, requirement: str) -> None:
    """Skips the test if a Python package is missing."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is missing: pip install '{requirement}'")


def run(*command: str | Path, timeout: float = PATIENCE_S, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; a status other than 0 fails the test with what it printed."""
    done = subprocess.run([str(part) for part in command], input=stdin, capture_output=True, timeout=timeout)
    assert done.returncode == 0, (
        f"{command[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace')}{done.stdout!r}"
    )
    return done


class Foreign:
    """A server process that listens on ``port``; ended by its process id."""

    def __init__(self, command: list[str], port: int, log: Path, cwd: Path | None = None) -> None:
        self.port = port
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                if self.process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
            self.close()
            pytest.fail(f"{command[0]} does not listen on port {port}; it said: {log.read_text(errors='replace')}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def free_ports(count: int) -> list[int]:
    """So many different ports that were free a moment ago."""
    socks = [socket.socket() for _ in range(count)]
    try:
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]
    finally:
        for sock in socks:
            sock.close()
