"""The command line, run as people run it: real processes, real workers, discovery in a directory of the test's own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynwire.cli import tables

# never reached unless something hangs
HANG_S = 60.0

HANDLERS = """
import asyncio, pathlib, time

async def hello(request, context):
    if isinstance(request, dict):
        return {"hello": request.get("name"), "tag": context.headers.get("tag")}
    return {"got": bytes(request).decode() if not isinstance(request, str) and request is not None else request}

async def raw(request):
    return b"\\x00\\xff" + bytes(request)

async def count(request):
    for n in range(request):
        yield {"n": n}

async def broken(request):
    raise ValueError("boom\\nsecond line")

async def slow(request):
    pathlib.Path(request["started"]).touch()
    await asyncio.sleep(request["seconds"])
    return "done"

def forever(request):
    pathlib.Path(request["started"]).touch()
    time.sleep(3600)

not_callable = 5
"""


def clean_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DYN_", "DYNWIRE_", "NATS_", "ETCD_"))}
    # the package that this process tests, whatever is installed
    return kept | {"PYTHONPATH": str(Path(tables.__file__).parents[2])}


class Shell:
    """Runs ``dynwire`` in a directory with the handlers above and a discovery directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = clean_environment() | {"DYN_FILE_KV": str(directory / "discovery")}
        (directory / "my_handlers.py").write_text(HANDLERS)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **keywords: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dynwire", *arguments],
            cwd=self.directory,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **keywords,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, input: bytes | None = None, timeout: float = HANG_S) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "dynwire", *arguments],
            cwd=self.directory,
            env=self.environment,
            input=b"" if input is None else input,
            capture_output=True,
            timeout=timeout,
        )

    def serve(self, **handlers: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """``endpoint_name="handler"``; returns the process and its first line."""
        endpoints = [argument for name in handlers for argument in ("--endpoint", f"test.worker.{name}")]
        process = self.start("serve", *(f"my_handlers:{h}" for h in handlers.values()), *endpoints, "--json")
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in handlers]
        assert all(lines), process.stderr.read()
        return process, json.loads(lines[0])


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


# The group ------------------------------------------------------------------------------------------------------------------


def test_version_and_help(shell: Shell) -> None:
    done = shell.run("--version")
    assert done.returncode == 0 and done.stdout.startswith(b"dynwire ")
    done = shell.run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in (b"serve", b"call", b"ls", b"config", b"bench", b"demo"))


@pytest.mark.parametrize("command", ["serve", "call", "ls", "config", "bench", "demo", "load", "tail", "tree"])
def test_every_command_has_help(shell: Shell, command: str) -> None:
    done = shell.run(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(b"Usage: dynwire")


def test_usage_errors(shell: Shell) -> None:
    done = shell.run("srve")
    assert done.returncode == 2 and b"did you mean 'serve'" in done.stderr
    for arguments in (["call"], ["serve", "m:h"], ["ls", "--nope"], ["config", "show", "--set", "x"]):
        done = shell.run(*arguments)
        assert done.returncode == 2 and b"Error" in done.stderr and b"Traceback" not in done.stderr


def test_without_click_it_says_what_to_install(shell: Shell) -> None:
    code = "import sys; sys.modules['click'] = None; import dynwire.cli; dynwire.cli.main(['ls'])"
    done = subprocess.run([sys.executable, "-c", code], env=shell.environment, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install dynwire[cli]" in done.stderr and "Traceback" not in done.stderr


# config show ----------------------------------------------------------------------------------------------------------------


def test_config_show(shell: Shell) -> None:
    shell.environment |= {"DYN_TCP_RPC_PORT": "7", "DYNWIRE_TOKEN": "s3cret", "NATS_SERVER": "nats://u:s3cret@h:1"}
    done = shell.run("config", "show", "--origin", "--plane", "http")
    text = done.stdout.decode()
    assert done.returncode == 0 and b"s3cret" not in done.stdout + done.stderr
    (line,) = [line for line in text.splitlines() if line.startswith("tcp.port ")]
    assert line.split() == ["tcp.port", "7", "env", "DYN_TCP_RPC_PORT", "DYN_TCP_RPC_PORT"]
    (line,) = [line for line in text.splitlines() if line.startswith("request_plane ")]
    assert line.split() == ["request_plane", "http", "command", "line", "DYN_REQUEST_PLANE"]
    rows = {row["name"]: row for row in json.loads(shell.run("config", "show", "--json", "--set", "tcp.pool_size=3").stdout)}
    assert rows["tcp.pool_size"]["value"] == 3 and rows["tcp.pool_size"]["origin"] == "command line"
    assert rows["token"]["value"] == "********" and rows["nats.servers"]["value"] == ["nats://********@h:1"]
    assert shell.run("config", "show", "tcp.port").stdout.decode().splitlines()[1].split() == ["tcp.port", "7"]
    assert shell.run("config", "show", "nothing").returncode == 2


def test_wrong_settings_are_one_line_and_exit_code_2(shell: Shell) -> None:
    for command in (["config", "show"], ["ls"], ["call", "a.b.c"], ["bench"], ["demo"]):
        done = shell.run(*command, "--plane", "grpc")
        assert done.returncode == 2, (command, done)
        (line,) = done.stderr.decode().splitlines()
        assert "Invalid request plane mode 'grpc'" in line and done.stdout == b""
    done = shell.run("ls", "--set", "tcp.prot=1", "--json")
    error = json.loads(done.stderr)["error"]
    assert done.returncode == 2 and error["code"] == "config_error" and error["name"] == "tcp.prot"
    shell.environment["DYN_REQUEST_PLANE"] = "grpc"
    done = shell.run("config", "show", "request_plane")
    assert done.returncode == 0 and b"Invalid request plane mode" in done.stderr and b"tcp" in done.stdout


# serve, call, ls ------------------------------------------------------------------------------------------------------------


def test_call(shell: Shell) -> None:
    _, line = shell.serve(hello="hello", raw="raw", count="count", broken="broken")
    assert line["endpoint"] == "test.worker.hello" and line["plane"] == "tcp" and line["address"].rpartition(":")[2].isdigit()

    def out(*arguments: str, input: bytes | None = None) -> bytes:
        done = shell.run("call", *arguments, input=input)
        assert done.returncode == 0, done
        return done.stdout

    (shell.directory / "request.json").write_text('{"name": "file"}')
    assert json.loads(out("test.worker.hello", '{"name": "Ada"}', "--header", "tag=x")) == {"hello": "Ada", "tag": "x"}
    assert json.loads(out("dyn://test.worker.hello", "@request.json"))["hello"] == "file"
    assert json.loads(out("test.worker.hello", "-", input=b'{"name": "stdin"}'))["hello"] == "stdin"
    assert json.loads(out("test.worker.hello", "just text")) == {"got": "just text"}
    assert json.loads(out("test.worker.hello")) == {"got": None}
    assert json.loads(out("test.worker.hello", "5x", "--raw")) == {"got": "5x"}
    assert json.loads(out("test.worker.hello", '{"name": 1}', "--instance", line["instance"]))["hello"] == 1
    assert out("test.worker.raw", "-", "--raw", input=b"\x01\xfe") == b"\x00\xff\x01\xfe"
    assert json.loads(out("test.worker.raw", "a", "--raw", "--json")) == {"base64": "AP9h"}
    assert out("test.worker.count", "3", "--stream") == b'{"n":0}\n{"n":1}\n{"n":2}\n'
    assert out("test.worker.count", "0", "--stream") == b""

    done = shell.run("call", "test.worker.broken", "1")
    assert done.returncode == 1 and done.stdout == b""
    (text,) = done.stderr.decode().splitlines()
    assert "RemoteError" in text and "boom" in text and "sent=yes" in text and "type_name=ValueError" in text
    done = shell.run("call", "test.worker.broken", "1", "--json")
    error = json.loads(done.stderr)["error"]
    assert done.returncode == 1 and (error["code"], error["type_name"], error["sent"]) == ("remote_error", "ValueError", "yes")


def test_call_without_anybody(shell: Shell) -> None:
    done = shell.run("call", "test.worker.nobody", "1", "--wait", "0.1")
    assert done.returncode == 1 and b"test.worker.nobody" in done.stderr and b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_call_usage(shell: Shell) -> None:
    for arguments, text in (
        (["no-endpoint"], "namespace.component.endpoint"),
        (["a.b.c", "@missing"], "cannot read 'missing': No such file"),
        (["a.b.c", "-"], "--raw"),
        (["a.b.c", "1", "--header", "x"], "NAME=VALUE"),
        (["a.b.c", "1", "--instance", "xyz"], "hexadecimal"),
    ):
        done = shell.run("call", *arguments, input=b"\xff\xfe")
        assert done.returncode == 2 and text in done.stderr.decode() and b"Traceback" not in done.stderr


def test_raw_reply_on_a_terminal_is_made_harmless(shell: Shell) -> None:
    shell.serve(raw="raw")
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "dynwire", "call", "test.worker.raw", "\x1b[2Jx", "--raw"],
        cwd=shell.directory,
        env=shell.environment,
        stdout=slave,
    ) as process:
        assert process.wait(HANG_S) == 0
    os.close(slave)
    assert select.select([master], [], [], HANG_S)[0]
    shown = os.read(master, 1000)
    os.close(master)
    assert b"\x1b" not in shown and b"[2Jx" in shown


def test_ls(shell: Shell) -> None:
    done = shell.run("ls")
    assert done.returncode == 0 and done.stdout == b"" and b"no instances" in done.stderr and b"discovery" in done.stderr
    assert json.loads(shell.run("ls", "--json").stdout) == []
    _, first = shell.serve(hello="hello", count="count")
    _, second = shell.serve(hello="hello")
    rows = json.loads(shell.run("ls", "--json").stdout)
    assert [row["endpoint"] for row in rows] == ["test.worker.count", "test.worker.hello", "test.worker.hello"]
    assert {row["instance"] for row in rows} >= {first["instance"], second["instance"]}
    assert all(row["plane"] == "tcp" and row["age"] >= 0 for row in rows)
    lines = shell.run("ls", "test.worker.hello").stdout.decode().splitlines()
    assert lines[0].split() == ["ENDPOINT", "INSTANCE", "PLANE", "ADDRESS", "AGE"] and len(lines) == 3
    assert {line.split()[1] for line in lines[1:]} == {first["instance"], second["instance"]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_drains(shell: Shell, number: signal.Signals) -> None:
    worker, _ = shell.serve(slow="slow")
    started = shell.directory / "started"
    call = shell.start("call", "test.worker.slow", json.dumps({"started": str(started), "seconds": 1.0}))
    wait_until(started.exists)
    worker.send_signal(number)
    out, err = call.communicate(timeout=HANG_S)
    assert (call.returncode, out) == (0, '"done"\n'), err
    _, err = worker.communicate(timeout=HANG_S)
    assert worker.returncode == 0 and "Traceback" not in err
    assert json.loads(shell.run("ls", "--json").stdout) == []


@pytest.mark.parametrize("handler", ["slow", "forever"])
def test_second_signal_ends_at_once(shell: Shell, handler: str) -> None:
    worker, _ = shell.serve(slow=handler)
    started = shell.directory / "started"
    call = shell.start("call", "test.worker.slow", json.dumps({"started": str(started), "seconds": 3600}), "--timeout", "600")
    wait_until(started.exists)
    worker.send_signal(signal.SIGTERM)
    # deregistering is the first thing a drain does
    wait_until(lambda: shell.run("ls", "--json").stdout == b"[]\n")
    worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate(timeout=HANG_S)
    assert worker.returncode == 1 and "Traceback" not in err
    call.communicate(timeout=HANG_S)
    assert call.returncode == 1


def test_serve_usage(shell: Shell) -> None:
    for handler, text in (
        ("my_handlers", "MODULE:HANDLER"),
        ("no_such_module:x", "no module 'no_such_module'"),
        ("my_handlers:helo", "did you mean 'hello'"),
        ("my_handlers:not_callable", "not callable"),
    ):
        done = shell.run("serve", handler, "--endpoint", "a.b.c")
        assert done.returncode == 2 and text in done.stderr.decode() and b"Traceback" not in done.stderr
    done = shell.run("serve", "my_handlers:hello", "--endpoint", "a.b.c", "--endpoint", "a.b.d")
    assert done.returncode == 2 and b"one endpoint per handler" in done.stderr
    done = shell.run("serve", "my_handlers:hello", "--endpoint", "a.b")
    assert done.returncode == 2 and b"namespace.component.endpoint" in done.stderr


def test_port_in_use(shell: Shell) -> None:
    _, line = shell.serve(hello="hello")
    port = line["address"].rpartition(":")[2]
    done = shell.run("serve", "my_handlers:hello", "--endpoint", "a.b.c", "--port", port)
    assert done.returncode == 1 and b"BindError" in done.stderr and port.encode() in done.stderr
    assert b"DYN_TCP_RPC_PORT" in done.stderr and b"Traceback" not in done.stderr


def test_ctrl_c_in_a_call_is_quiet(shell: Shell) -> None:
    shell.serve(slow="slow")
    started = shell.directory / "started"
    call = shell.start("call", "test.worker.slow", json.dumps({"started": str(started), "seconds": 3600}))
    wait_until(started.exists)
    call.send_signal(signal.SIGINT)
    out, err = call.communicate(timeout=HANG_S)
    assert (call.returncode, out, err.strip()) == (130, "", "")


def test_reader_that_goes_away_ends_a_stream_quietly(shell: Shell) -> None:
    shell.serve(count="count")
    call = shell.start("call", "test.worker.count", "100000000", "--stream")
    assert call.stdout is not None and call.stderr is not None
    assert call.stdout.readline() == '{"n":0}\n'
    call.stdout.close()
    assert call.wait(HANG_S) == 1 and "Traceback" not in call.stderr.read()
    call.stdout = None


# demo, bench ----------------------------------------------------------------------------------------------------------------


def test_demo(shell: Shell) -> None:
    shell.environment["TMPDIR"] = str(shell.directory)
    done = shell.run("demo", "--only", "calls")
    text = done.stdout.decode()
    assert done.returncode == 0, text + done.stderr.decode()
    assert "All as promised" in text and "PeerLost" in text and "FAILED  " not in text.replace("OK  FAILED", "")
    assert not list(shell.directory.glob("dynwire-demo-*"))


@pytest.mark.hard_timeout(120)
@pytest.mark.parametrize("plane", ["tcp", "http", "nats"])
def test_demo_of_serving(shell: Shell, plane: str) -> None:
    shell.environment["TMPDIR"] = str(shell.directory)
    done = shell.run("demo", "--only", "serving", "--plane", plane, "--json", timeout=100)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and report["plane"] == plane, report
    checks = report["serving"]["checks"]
    assert len(checks) == 6 and all(check["ok"] for check in checks)
    assert [(row["phase"], row["failed"]) for row in report["serving"]["rows"]] == [("calm", 0), ("crash", 0), ("after", 0)]
    assert b"curl" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(report["serving"]["killed_pid"], 0)
    assert not list(shell.directory.glob("dynwire-demo-*"))


def test_the_error_of_a_worker_that_cannot_start_is_shown(shell: Shell) -> None:
    done = shell.run("bench", "--set", "tcp.host=203.0.113.1")  # RFC 5737: nobody's address
    assert done.returncode == 1 and b"BindError" in done.stderr and b"203.0.113.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_demo_json(shell: Shell) -> None:
    done = shell.run("demo", "--only", "calls", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and all(check["ok"] for check in report["checks"])
    assert {row["phase"] for row in report["rows"]} == {"calm", "crash", "after"}
    for pid in (report["killed_pid"], report["surviving_pid"]):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopping_the_demo_leaves_nothing_behind(shell: Shell, number: signal.Signals, code: int) -> None:
    shell.environment["TMPDIR"] = str(shell.directory)
    demo = shell.start("demo", "--only", "calls")
    assert demo.stdout is not None
    pids = []
    for line in demo.stdout:
        if "] worker " in line and " serves " in line:
            pids.append(int(line.split("worker ")[1].split()[0]))
        if "calm:" in line:
            break
    demo.send_signal(number)
    _, err = demo.communicate(timeout=HANG_S)
    assert demo.returncode == code and "Traceback" not in err and len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(shell.directory.glob("dynwire-demo-*"))


def test_bench(shell: Shell) -> None:
    done = shell.run("bench", "--duration", "0.1", "-c", "1", "-c", "4", "--api", "both", "--json")
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert [(r["mode"], r["api"], r["concurrency"]) for r in report["rows"]] == [
        (mode, api, c) for mode in ("unary", "stream") for api in ("async", "threads") for c in (1, 4)
    ]
    assert all(r["calls"] > 0 and r["errors"] == 0 and r["p50"] > 0 for r in report["rows"])


def test_bench_of_an_endpoint(shell: Shell) -> None:
    shell.serve(hello="hello", broken="broken")
    done = shell.run("bench", "test.worker.hello", "--mode", "unary", "--data", '{"name": 1}', "--duration", "0.1", "-c", "2")
    assert done.returncode == 0 and done.stdout.decode().splitlines()[0].split()[0] == "MODE"
    done = shell.run("bench", "test.worker.broken", "--mode", "unary", "--data", "1", "--duration", "0.1", "-c", "2")
    assert done.returncode == 1 and b"RemoteError" in done.stderr and b"Traceback" not in done.stderr
    assert shell.run("bench", "test.worker.hello").returncode == 2
    assert shell.run("bench", "--data", "1").returncode == 2


# Tables ---------------------------------------------------------------------------------------------------------------------


def test_table() -> None:
    text = tables.render(("NAME", "N", "TIME"), [("a", 5, "1.5 ms"), ("日本", 12345, "83 µs"), ("\x1b[31m", None, None)])
    assert text.splitlines() == [
        "NAME       N    TIME",
        "a          5  1.5 ms",
        "日本   12345   83 µs",
        "�[31m      -       -",
    ]
    assert tables.render(("A", "B"), []) == "A  B"


def test_units() -> None:
    assert [tables.duration(s) for s in (83e-6, 0.0012, 0.9996, 3.456, 250.0)] == ["83 µs", "1.2 ms", "1.00 s", "3.46 s", "250 s"]
    assert [tables.age(s) for s in (-1, 5.9, 192, 7500, 360000)] == ["0s", "5s", "3m12s", "2h05m", "4d04h"]
    assert tables.percentile([], 0.5) is None
    assert tables.percentile([1.0, 2.0, 3.0], 0.5) == 2.0 and tables.percentile([1.0, 2.0], 0.99) == 2.0
