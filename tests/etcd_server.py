"""A real etcd on free ports of loopback, that a test may kill, suspend and wipe."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynwire.nats.server import free_port


class EtcdServer:
    def __init__(self, folder: Path) -> None:
        self._folder, self.port, self._peer = folder, free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        peer = f"http://127.0.0.1:{self._peer}"
        command = ["etcd", "--data-dir", str(self._folder / "data"), "--initial-cluster", f"default={peer}"]
        for name, url in (("client", self.url), ("peer", peer)):
            command += [f"--listen-{name}-urls", url]
        command += ["--advertise-client-urls", self.url, "--initial-advertise-peer-urls", peer]
        with open(self._folder / "log", "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while self.process.poll() is None:  # bounded by the test's own time limit
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.1):
                return
        pytest.fail((self._folder / "log").read_text())

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wipe(self) -> None:
        shutil.rmtree(self._folder / "data")


@pytest.fixture
def etcd_server(tmp_path: Path) -> Iterator[EtcdServer]:
    if shutil.which("etcd") is None:
        pytest.skip("no etcd on the path (apt-get install etcd-server)")
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()
