"""The part of ``dynwire demo`` that serves a model: frontend, two simulated workers, curl, load, one worker killed."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..config import Config, child_environment
from ..errors import ConfigError, ConnectError, PeerLost
from . import tables
from ._common import run_async
from .load import tick

if TYPE_CHECKING:
    from ..loadgen.run import Tally

MODEL = "tiny"
ENDPOINT = "demo.backend.generate"
METRICS = "demo.backend.engine_metrics"
# a step of the simulated engine takes 6 ms; so a token comes every 1.2 ms, and answers are long enough to be cut in the middle
SPEEDUP = 5
QUESTION = "Hello!"
CURL_TOKENS = 40
CONCURRENCY = 16
REQUESTS = 192
LOAD_TOKENS = 100
READY_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 30.0
LOCAL = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RPC_PORT": "0",
    "DYN_HTTP_RPC_HOST": "127.0.0.1",
    "DYN_HTTP_RPC_PORT": "0",
}
NEEDED = {"tokenizers": "mocker", "httptools": "load", "starlette": "frontend", "granian": "frontend", "jinja2": "frontend"}


class Child:
    """A process of the demo, with its output kept for the case that it fails."""

    def __init__(self, name: str, environment: dict[str, str], *arguments: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        # a session of its own: Ctrl-C in the terminal reaches only us, and we stop it in order
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def first_line(self, timeout: float) -> str:
        """What it prints when it serves. Raises `ConnectError` with its last words if it does not."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline, line = time.monotonic() + timeout, b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(stdout.fileno(), 65536) if readable else b""
            if not chunk:
                self.fail(f"said nothing for {timeout:g} s" if not readable else "ended before it served")
            line += chunk
        return line.decode("utf-8", "replace").splitlines()[0]

    def check(self) -> None:
        """Raises `ConnectError` if it has ended."""
        if self._process.poll() is not None:
            self.fail("ended before it served")

    def fail(self, state: str) -> None:
        self._errors.seek(0)
        last = (self._errors.read().decode("utf-8", "replace").strip().splitlines() or ["it printed nothing"])[-1]
        raise ConnectError(f"the {self.name} (process {self.pid}) {state}; its last words: {last}")

    def crash(self) -> None:
        """SIGKILL: no farewell to anybody."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM; SIGKILL after ``timeout`` seconds. Returns the exit code, negative for a signal."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


def play(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """Play it, telling what happens; the report says what was measured and whether all was as it should be.

    Raises `ConfigError` if packages are missing, `ConnectError` if a process does not start.
    """
    missing = sorted({extra for module, extra in NEEDED.items() if importlib.util.find_spec(module) is None})
    if missing:
        raise ConfigError(
            f"serving in the demo needs more packages: pip install 'dynwire[{','.join(missing)}]', or run it with --only calls",
            name="demo",
            allowed=missing,
        )
    # on this machine only, and on ports that are free
    environment = child_environment(config, LOCAL)
    checks: dict[str, bool] = {}
    with ExitStack() as children:

        def start(name: str, *arguments: str) -> Child:
            return children.enter_context(Child(name, environment, *arguments))

        mocker = ("dynwire.mocker", "--model-name", MODEL, "--endpoint", ENDPOINT, "--speedup-ratio", str(SPEEDUP))
        workers = [start("worker", *mocker) for _ in range(2)]
        frontend = start(
            "frontend", *("dynwire.frontend", "--http-host", "127.0.0.1", "--http-port", "0", "--migration-limit", "3")
        )
        for worker in workers:
            say(f"worker {worker.pid}: {worker.first_line(READY_TIMEOUT_S)}")
        url = _url_in(frontend.first_line(READY_TIMEOUT_S))
        _wait_for_model(url, [frontend, *workers])
        say(f"frontend {frontend.pid} at {url} knows the model {MODEL!r}")
        checks["curl: a whole answer and a streamed one say the same"] = _curl(url, say)
        victim, survivor = workers
        rows, more = run_async(_load(config, url, victim, say))
        checks |= more
        codes = [child.stop() for child in (frontend, survivor)]
        say(f"frontend and the other worker stopped (SIGTERM), exit codes {codes[0]} and {codes[1]}")
        checks["frontend and the other worker stopped in order"] = codes == [0, 0]
    return {
        "ok": all(checks.values()),
        "killed_pid": victim.pid,
        "rows": rows,
        "checks": [{"check": text, "ok": passed} for text, passed in checks.items()],
    }


def _url_in(line: str) -> str:
    found = re.search(r"https?://[^\s,)]+", line)
    if found is None:
        raise ConnectError(f"the frontend says {line!r}, which names no address")
    return found[0]


def _wait_for_model(url: str, children: list[Child]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        for child in children:
            child.check()
        with (
            suppress(urllib.error.URLError, OSError, msgspec.DecodeError),
            urllib.request.urlopen(f"{url}/v1/models", timeout=2.0) as reply,
        ):
            if any(model["id"] == MODEL for model in msgspec.json.decode(reply.read())["data"]):
                return
        time.sleep(0.05)
    children[0].fail(f"did not know the model {MODEL} within {READY_TIMEOUT_S:g} s")


def _curl(url: str, say: Callable[[str], None]) -> bool:
    """One answer as a whole and one as a stream."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": CURL_TOKENS}
    whole = msgspec.json.decode(_ask(url, body, say))["choices"][0]["message"]["content"]
    say(f"  {whole}")
    streamed = _ask(url, {**body, "stream": True}, say).decode()
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
    parts = [choice["delta"].get("content") or "" for e in events[:-1] for choice in msgspec.json.decode(e)["choices"]]
    say(f"  {len(events)} events: {' '.join(map(repr, [part for part in parts if part][:6]))} … {events[-1]}")
    return bool(whole) and "".join(parts) == whole and events[-1] == "[DONE]"


def _ask(url: str, body: dict[str, Any], say: Callable[[str], None]) -> bytes:
    url, data = f"{url}/v1/chat/completions", msgspec.json.encode(body).decode()
    curl = shutil.which("curl")
    command = ["curl", "-sS", "--fail-with-body", "-N", url, "-H", "Content-Type: application/json", "-d", data]
    if curl is None:
        say(f"(curl is not installed, Python asks instead) POST {url} {data}")
        request = urllib.request.Request(url, data.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
            found: bytes = reply.read()
            return found
    say(shlex.join(command))
    done = subprocess.run([curl, *command[1:]], capture_output=True, timeout=REQUEST_TIMEOUT_S)
    if done.returncode:
        raise ConnectError(f"curl ended with {done.returncode}: {(done.stderr + done.stdout).decode('utf-8', 'replace').strip()}")
    return done.stdout


async def _load(
    config: Config, url: str, victim: Child, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, bool]]:
    from ..loadgen.http import Target
    from ..loadgen.prompts import Shape
    from ..loadgen.run import Plan, Run

    shape = Shape(MODEL, max_tokens=LOAD_TOKENS, prompt_words=50, prefix_groups=4, prefix_words=100)

    async def phase(name: str, kill: bool) -> Tally:
        plan = Plan(concurrency=CONCURRENCY, requests=REQUESTS, timeout=REQUEST_TIMEOUT_S, seed=len(name))
        run = Run(Target(url), shape, plan)
        bar = asyncio.ensure_future(tick(run, name))
        running = asyncio.ensure_future(run.start())
        try:
            if kill:
                while run.tally.done < REQUESTS / 3 and not running.done():  # noqa: ASYNC110  # nobody tells
                    await asyncio.sleep(0.001)
                victim.crash()
            tally = await running
        finally:
            running.cancel()
            bar.cancel()
            await asyncio.gather(bar, running, return_exceptions=True)
        if kill:
            say(f"worker {victim.pid} killed (SIGKILL) with {CONCURRENCY} streams under way")
        return tally

    tallies = {}
    say(f"load: {REQUESTS} chat completions of {LOAD_TOKENS} tokens, streamed, {CONCURRENCY} at once")
    tallies["calm"] = await phase("calm", False)
    both = await _generated(config)
    say("the same load again, and one worker is killed in the middle")
    tallies["crash"] = await phase("crash", True)
    say("and again, with one worker left")
    tallies["after"] = await phase("after", False)
    wanted = REQUESTS * LOAD_TOKENS
    checks = {
        "calm: no request failed": tallies["calm"].done == REQUESTS and tallies["calm"].tokens == wanted,
        "calm: both workers answered": len(both) == 2 and all(both),
        "crash: every answer came to its end, no token missing": tallies["crash"].tokens == wanted,
        "after: no request failed": tallies["after"].done == REQUESTS and tallies["after"].tokens == wanted,
    }
    return [_row(name, tally) for name, tally in tallies.items()], checks


async def _generated(config: Config) -> list[int]:
    """Tokens that each worker has generated."""
    from dynwire import AsyncNetworkManager

    async with AsyncNetworkManager(config=config) as manager:
        client = await manager.endpoint(METRICS).client(router="direct")
        instances = await client.wait_for_instances(2, timeout=READY_TIMEOUT_S)
        counts = []
        for instance in instances:
            with suppress(PeerLost):
                ranks = await client.call(None, instance=instance.id, timeout=READY_TIMEOUT_S)
                counts.append(sum(rank["generated_tokens"] for rank in ranks))
        return counts


def _row(name: str, tally: Tally) -> dict[str, Any]:
    from ..loadgen.report import summary

    found = summary(tally)
    return {
        "phase": name,
        "done": tally.done,
        "failed": tally.failed,
        **{key: found[key] for key in ("requests_per_s", "tokens_per_s", "ttft", "itl", "latency", "errors")},
    }


def show(report: dict[str, Any]) -> None:
    body = [
        (
            *(row["phase"], row["done"], row["failed"], f"{row['tokens_per_s']:,.0f}"),
            *(tables.duration(row[name][q]) for name in ("ttft", "itl") for q in ("p50", "p90", "p99")),
        )
        for row in report["rows"]
    ]
    heads = ("LOAD", "DONE", "FAILED", "TOKENS/S", "TTFT P50", "P90", "P99", "BETWEEN P50", "P90", "P99")
    click.echo()
    click.echo(tables.render(heads, body))
    click.echo("(TTFT: until the first token; between: from token to token)\n")
    for row in report["rows"]:
        for kind, error in row["errors"].items():
            click.echo(f"  {row['phase']}: {error['count']} × {kind}: {error['examples'][0]}")
    for check in report["checks"]:
        click.echo(f"  {'ok    ' if check['ok'] else 'FAILED'}  {check['check']}")
    click.echo()
