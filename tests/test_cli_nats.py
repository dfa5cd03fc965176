"""``dynwire nats up`` and ``dynwire doctor``, run as people run them."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynwire.cli import doctor
from dynwire.nats.server import NatsServer, fetch, free_port
from tests.test_cli import clean_environment

HANG_S = 60.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


class Commands:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = clean_environment() | {"DYN_FILE_KV": str(directory / "discovery")}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dynwire", *arguments],
            cwd=self.directory,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dynwire", *arguments],
            cwd=self.directory,
            env=self.environment | more,
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HANG_S,
        )

    def up(self, *arguments: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = self.start("nats", "up", "--json", "--port", "0", *arguments)
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        return process, json.loads(line)

    def doctor(self, *arguments: str, **more: str) -> tuple[int, dict[str, tuple[str, str, str]]]:
        """Exit code; check -> status, text, remedy (the last of each)."""
        done = self.run("doctor", "--json", *arguments, **more)
        assert done.stdout, done.stderr
        report = json.loads(done.stdout)
        assert report["ok"] == (done.returncode == 0)
        return done.returncode, {f["check"]: (f["status"], f["text"], f["remedy"]) for f in report["findings"]}


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


# --- nats up --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_until_a_signal(nats_server: NatsServer, commands: Commands, number: signal.Signals) -> None:
    process, shown = commands.up()
    assert shown["url"] == f"nats://127.0.0.1:{shown['port']}"
    assert shown["environment"] == {"NATS_SERVER": shown["url"]}
    assert shown["max_payload"] == 1 << 20
    assert os.path.isdir(shown["jetstream"])
    with socket.create_connection(("127.0.0.1", shown["port"]), HANG_S) as sock:
        assert sock.recv(4) == b"INFO"
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG_S)
    assert (process.returncode, out, err) == (0, "", "")
    assert gone(shown["pid"])
    assert not os.path.exists(shown["jetstream"])


def test_up_prints_what_a_shell_takes(nats_server: NatsServer, commands: Commands) -> None:
    process = commands.start("nats", "up", "--port", "0", "--max-payload", str(16 << 20), "--no-jetstream")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0].startswith("# nats-server ")
    assert "no JetStream, messages up to 16 MiB" in lines[0]
    shell = "".join(lines) + "printf %s $NATS_SERVER"
    url = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert url.startswith("nats://127.0.0.1:")
    status, page = fetch(f"{lines[1].split()[-1]}/varz")
    assert (status, json.loads(page)["max_payload"]) == (200, 16 << 20)


def test_up_options(nats_server: NatsServer, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "more.conf").write_text("max_payload: 4096\n")
    process, shown = commands.up(
        "--jetstream", str(tmp_path / "js"), "--server-config", str(tmp_path / "more.conf"), "--log", str(tmp_path / "log")
    )
    assert shown["max_payload"] == 4096
    assert shown["jetstream"] == str(tmp_path / "js")
    process.send_signal(signal.SIGINT)
    process.wait(HANG_S)
    assert (tmp_path / "js").is_dir(), "kept"
    assert "Server is ready" in (tmp_path / "log").read_text()
    done = commands.run("nats", "up", "--jetstream", "x", "--no-jetstream")
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


def test_up_goes_with_its_process(nats_server: NatsServer, commands: Commands) -> None:
    process, shown = commands.up()
    process.kill()
    eventually(lambda: gone(shown["pid"]) and not os.path.exists(shown["jetstream"]))


def test_up_when_the_server_ends_by_itself(nats_server: NatsServer, commands: Commands) -> None:
    process, shown = commands.up()
    os.kill(shown["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 1
    assert "ended by itself with code -9" in err


def test_up_on_a_port_in_use(nats_server: NatsServer, commands: Commands) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = commands.run("nats", "up", "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--port 0 takes a free port" in done.stderr


# --- doctor ---------------------------------------------------------------------------------------------------------------


def test_doctor_without_trouble(commands: Commands) -> None:
    code, found = commands.doctor()
    assert code == 0, found
    assert all(status in ("ok", "note") for status, _, _ in found.values()), found
    assert found["request plane"][:2] == ("ok", "tcp (default)")
    assert str(commands.directory / "discovery") in found["discovery"][1]
    assert found["nats"][0] == "note"
    text = commands.run("doctor")
    assert text.returncode == 0
    assert text.stdout.endswith("All is well.\n")


def test_doctor_settings(commands: Commands, tmp_path: Path) -> None:
    code, found = commands.doctor(DYN_TCP_POOL_SIZE="many")
    assert code == 1
    assert found["settings"][0] == "fail"
    assert "DYN_TCP_POOL_SIZE" in found["settings"][1]
    assert "correct DYN_TCP_POOL_SIZE" in found["settings"][2]
    assert "discovery" not in found, "nothing that depends on settings"
    done = commands.run("doctor", DYN_TCP_POLL_SIZE="5", DYN_REQUEST_PLANE="carrier-pigeon", DYN_TCP_POOL_SIZE="7")
    assert done.returncode == 1
    assert "WARN  settings: unknown setting DYN_TCP_POLL_SIZE" in done.stdout
    assert "FAIL  settings: Invalid request plane mode 'carrier-pigeon'" in done.stdout
    assert "2 from the environment" in done.stdout
    assert "1 failed, 1 to look at." in done.stdout
    assert done.stderr == "", "said once, in the report"


def test_doctor_ports(commands: Commands) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, found = commands.doctor("--plane", "http", DYN_HTTP_RPC_PORT=port, DYN_SYSTEM_PORT="0")
        assert code == 1
        assert found["address"][0] == "fail"
        assert port in found["address"][1]
        assert "DYN_HTTP_RPC_PORT" in found["address"][2]
        assert found["system port"][0] == "ok"
    code, found = commands.doctor(DYN_TCP_RPC_HOST="192.0.2.1")
    assert code == 1
    assert "DYN_TCP_RPC_HOST to an address of this host" in found["address"][2]


def test_doctor_discovery(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, found = commands.doctor("--discovery-dir", str(tmp_path / "file"))
    assert code == 1
    assert found["discovery"][0] == "fail"
    assert "DYN_FILE_KV" in found["discovery"][2]
    code, found = commands.doctor("--discovery", "mem")
    assert code == 0
    assert found["discovery"][0] == "note"
    code, found = commands.doctor("--discovery", "etcd", ETCD_ENDPOINTS="http://127.0.0.1:1")
    assert code == 1
    assert "ETCD_ENDPOINTS" in found["discovery"][2]


def test_doctor_with_a_default_server(nats_server: NatsServer, commands: Commands) -> None:
    code, found = commands.doctor("--plane", "nats", "--discovery", "nats", NATS_SERVER=nats_server.url)
    assert code == 0, found
    assert found["request plane"][:2] == ("ok", "nats (command line)")
    assert nats_server.url in found["nats server"][1]
    status, text, remedy = found["nats max_payload"]
    assert status == "note"
    assert "1 MiB" in text
    assert "nats-server's default" in text
    assert "max_payload: 16777216" in remedy
    assert found["nats port"][1].startswith("fast")
    assert "median" in found["nats round trip"][1]
    assert found["nats jetstream"][0] == "ok"
    assert found["discovery"][0] == "ok"


def test_doctor_with_a_large_payload_and_without_jetstream(nats_server: NatsServer, commands: Commands) -> None:
    with NatsServer(max_payload=32 << 20) as server:
        code, found = commands.doctor(NATS_SERVER=server.url)
        assert code == 0, found
        assert found["nats max_payload"][0] == "ok"
        assert "up to 16 MiB" in found["nats max_payload"][1]
        assert "allows 32 MiB" in found["nats max_payload"][1]
        assert found["nats jetstream"][:2] == ("note", "not available (it is off); not needed here")
        code, found = commands.doctor("--discovery", "nats", NATS_SERVER=server.url)
        assert code == 1
        assert found["nats jetstream"][0] == "fail"
        assert "-js" in found["nats jetstream"][2]
        assert found["discovery"][0] == "fail"
        code, found = commands.doctor(NATS_SERVER=server.url, DYN_EVENT_PLANE="jetstream")
        assert code == 1
        assert found["nats jetstream"][0] == "fail"
        assert "needed for KV events (DYN_EVENT_PLANE=jetstream)" in found["nats jetstream"][1]


def test_doctor_without_the_server(commands: Commands) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    code, found = commands.doctor("--set", "nats.connect_timeout=0.3", NATS_SERVER=url)
    assert code == 0, "nobody needs it"
    assert found["nats server"][0] == "warn"
    code, found = commands.doctor("--discovery", "nats", "--set", "nats.connect_timeout=0.3", NATS_SERVER=url)
    assert code == 1
    assert found["nats server"][0] == "fail"
    assert url in found["nats server"][1]
    assert "dynwire nats up" in found["nats server"][2]


def test_doctor_with_wrong_credentials(nats_server: NatsServer, commands: Commands) -> None:
    with NatsServer(token="right") as server:
        code, found = commands.doctor(NATS_SERVER=server.url, NATS_AUTH_TOKEN="wrong-one")
    assert code == 0
    assert "NATS_AUTH_TOKEN" in found["nats server"][1]
    assert "correct the NATS_AUTH_*" in found["nats server"][2]
    assert "wrong-one" not in json.dumps(found)


def test_doctor_finds_broken_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "dynwire._tcpio":
            raise ImportError("undefined symbol: x")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    (finding,) = doctor._compiled()
    assert finding.status == "fail"
    assert "_tcpio" in finding.text
    assert "undefined symbol" in finding.text
    assert "make build" in finding.remedy


def test_doctor_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    import dynwire

    versions = {"nats-py": "3.0.1", "nkeys": "0.2.1", "uvloop": "0.22.0", "h2": "4.4.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    requires = [
        'uvloop<1,>=0.21; extra == "speed"',
        'h2<5,>=4.4.1; extra == "http"',
        'hpack<5,>=4.1; extra == "http"',
        'nats-py[x]<3,>=2.16; extra == "nats"',
        'nkeys<1,>=0.2; extra == "nats"',
        'httpx[http2]<1,>=0.27; extra == "test"',
        "msgspec<1,>=0.19",
    ]
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    found = {f.check: f for f in doctor._extras(dynwire.load_config({"plane": "http"}))}
    assert (found["extra speed"].status, found["extra http"].status, found["extra nats"].status) == ("ok", "fail", "warn")
    assert "hpack not installed" in found["extra http"].text
    assert found["extra http"].remedy == "pip install 'dynwire[http]'"
    assert "nats-py 3.0.1" in found["extra nats"].text
    assert {f.check: f.status for f in doctor._extras(dynwire.load_config({"plane": "tcp"}))}["extra http"] == "note"


# --- demo -----------------------------------------------------------------------------------------------------------------


def test_demo_with_a_server_of_its_own(nats_server: NatsServer, commands: Commands) -> None:
    done = commands.run("demo", "--plane", "nats", "--json", NATS_SERVER=f"nats://127.0.0.1:{free_port()}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plane"] == "nats"
    started = re.search(r"started one at nats://127.0.0.1:\d+ \(pid (\d+)\)", done.stderr)
    assert started, done.stderr
    assert gone(int(started[1]))


def test_demo_with_a_server_that_answers(nats_server: NatsServer, commands: Commands) -> None:
    done = commands.run("demo", "--plane", "nats", "--json", NATS_SERVER=nats_server.url)
    assert done.returncode == 0, done.stderr
    assert "started one" not in done.stderr
    assert "nats:dynwire-demo-" in done.stderr, "names of its own, on a server of others"
