"""``dynwire demo``: the whole of dynwire in a few seconds, checked by itself.

First a model is served (`demo_serving`), then endpoints are called, which is the part in this file: two worker processes serve
over a directory for discovery. A threaded caller (`NetworkManager`) and an asyncio caller (`AsyncNetworkManager`) go through
three phases in step: calm; crash, where one worker is killed while streams run; after, where everything must go on with the
other worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from ..config import Config, mask_url
from ..errors import ConfigError, DynwireError, PeerLost
from . import demo_serving, tables
from ._common import Command, json_option, loop_factory, run_async, settings_options, to_json, tool_config
from ._workers import Worker

if TYPE_CHECKING:
    from dynwire import AsyncNetworkManager

    from ..nats.server import NatsServer

GENERATE = "demo.worker.generate"
WHOAMI = "demo.worker.whoami"
HANDLERS = {GENERATE: "dynwire.cli.demo_worker:generate", WHOAMI: "dynwire.cli.demo_worker:whoami"}

THREADS = 4
TASKS = 16
UNARY_PER_LANE = 50
STREAMS_PER_LANE = 5
CALM = {"items": 10, "delay": 0.0}
# long enough to be killed in the middle (about 1.2 s), short enough that the survivors do not bore anybody
LONG = {"items": 60, "delay": 0.02}
# how far every stream must have come before the worker is killed
ITEMS_BEFORE_CRASH = 3
CALL_TIMEOUT_S = 10.0
# for a phase as a whole; far above what one needs, far below what a person waits for
PHASE_TIMEOUT_S = 60.0


@dataclass
class Tally:
    """What one thread or task saw. Each has its own, so that counting needs no lock."""

    phase: str
    caller: str
    kind: str
    ok: int = 0
    items: int = 0
    latencies: list[float] = field(default_factory=list)
    """seconds: until the reply, or until the first item of a stream"""
    failures: list[DynwireError] = field(default_factory=list)
    pids: Counter[int] = field(default_factory=Counter)
    holes: int = 0
    """items that were repeated, missing or out of order"""

    def take(self, item: dict[str, Any], expected_index: int) -> None:
        self.items += 1
        self.pids[item["pid"]] += 1
        self.holes += item["index"] != expected_index


class Crash:
    """Brings all streams to the middle, and lets the short calls go on until the dust has settled."""

    def __init__(self, streams: int) -> None:
        self._missing = streams
        self._lock = threading.Lock()
        self.all_in_the_middle = threading.Event()
        self.over = threading.Event()

    def arrive(self) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing == 0:
                self.all_in_the_middle.set()


class Lane(threading.Thread):
    """A thread whose exception is not lost."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        # daemon: after Ctrl-C nobody waits for a call that is still on its way
        super().__init__(daemon=True)
        self._call = (function, arguments)
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, arguments = self._call
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001  handed over to the thread that calls finish()
            self.error = error

    def finish(self, timeout: float) -> None:
        self.join(timeout)
        if self.error is not None:
            raise self.error
        if self.is_alive():
            raise click.ClickException(f"a caller of the demo did not finish within {timeout:g} s")


class Scene:
    """What both callers share."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tallies: list[Tally] = []
        self.crash = Crash(THREADS + TASKS)
        self.barrier = threading.Barrier(3)

    def tally(self, phase: str, caller: str, kind: str) -> Tally:
        made = Tally(phase, caller, kind)
        self.tallies.append(made)
        return made

    def meet(self) -> None:
        self.barrier.wait(PHASE_TIMEOUT_S)

    def wait_for_the_middle(self) -> None:
        """Until every stream of the crash phase has delivered some items; an error if one of them fails before."""
        deadline = time.monotonic() + PHASE_TIMEOUT_S
        while not self.crash.all_in_the_middle.wait(0.1):
            failures = [error for t in self.tallies if t.phase == "crash" for error in t.failures]
            if failures:
                raise failures[0]
            if self.barrier.broken:
                raise threading.BrokenBarrierError
            if time.monotonic() > deadline:
                raise click.ClickException(f"the streams of the demo did not get going within {PHASE_TIMEOUT_S:g} s")


# The threaded caller ---------------------------------------------------------------------------------------------------------


def threaded_caller(scene: Scene) -> None:
    from dynwire import NetworkManager

    try:
        with NetworkManager(config=scene.config) as manager:
            unary = manager.endpoint(WHOAMI).client(router="round_robin")
            streams = manager.endpoint(GENERATE).client(router="round_robin")
            for client in (unary, streams):
                client.wait_for_instances(2, timeout=CALL_TIMEOUT_S)

            def call(tally: Tally, request: Any) -> None:
                start = time.perf_counter()
                try:
                    reply = unary.call(request, timeout=CALL_TIMEOUT_S)
                except DynwireError as error:
                    tally.failures.append(error)
                    return
                tally.latencies.append(time.perf_counter() - start)
                tally.ok += 1
                tally.pids[reply["pid"]] += 1

            def stream(tally: Tally, request: dict[str, Any], crash: Crash | None) -> None:
                start, count = time.perf_counter(), 0
                try:
                    with streams.stream(request, timeout=PHASE_TIMEOUT_S) as items:
                        for item in items:
                            if count == 0:
                                tally.latencies.append(time.perf_counter() - start)
                            tally.take(item, count)
                            count += 1
                            if crash is not None and count == ITEMS_BEFORE_CRASH:
                                crash.arrive()
                except DynwireError as error:
                    tally.failures.append(error)
                    return
                tally.ok += 1
                tally.holes += count != request["items"]

            def calm(phase: str) -> None:
                calls, many = scene.tally(phase, "threads", "unary"), scene.tally(phase, "threads", "stream")
                for n in range(UNARY_PER_LANE):
                    call(calls, n)
                for _ in range(STREAMS_PER_LANE):
                    stream(many, CALM, None)

            def busy(phase: str) -> None:
                tally = scene.tally(phase, "threads", "unary")
                while not scene.crash.over.is_set():
                    call(tally, 0)

            for phase in ("calm", "crash", "after"):
                scene.meet()
                if phase == "crash":
                    lanes = [Lane(stream, scene.tally(phase, "threads", "stream"), LONG, scene.crash) for _ in range(THREADS)]
                    short = [Lane(busy, phase) for _ in range(2)]
                    _finish(lanes)
                    scene.meet()
                    _finish(short)
                else:
                    _finish([Lane(calm, phase) for _ in range(THREADS)])
                scene.meet()
    except BaseException:
        scene.barrier.abort()
        raise


def _finish(lanes: Iterable[Lane]) -> None:
    for lane in lanes:
        lane.finish(PHASE_TIMEOUT_S)


# The asyncio caller ----------------------------------------------------------------------------------------------------------


def asyncio_caller(scene: Scene) -> None:
    async def main() -> None:
        from dynwire import AsyncNetworkManager

        async with AsyncNetworkManager(config=scene.config) as manager:
            await _asyncio_phases(scene, manager)

    try:
        run_async(main())
    except BaseException:
        scene.barrier.abort()
        raise


async def _asyncio_phases(scene: Scene, manager: AsyncNetworkManager) -> None:
    unary = await manager.endpoint(WHOAMI).client(router="round_robin")
    streams = await manager.endpoint(GENERATE).client(router="round_robin")
    for client in (unary, streams):
        await client.wait_for_instances(2, timeout=CALL_TIMEOUT_S)

    async def call(tally: Tally, request: Any) -> None:
        start = time.perf_counter()
        try:
            reply = await unary.call(request, timeout=CALL_TIMEOUT_S)
        except DynwireError as error:
            tally.failures.append(error)
            return
        tally.latencies.append(time.perf_counter() - start)
        tally.ok += 1
        tally.pids[reply["pid"]] += 1

    async def stream(tally: Tally, request: dict[str, Any], crash: Crash | None) -> None:
        start, count = time.perf_counter(), 0
        try:
            async with streams.stream(request, timeout=PHASE_TIMEOUT_S) as items:
                async for item in items:
                    if count == 0:
                        tally.latencies.append(time.perf_counter() - start)
                    tally.take(item, count)
                    count += 1
                    if crash is not None and count == ITEMS_BEFORE_CRASH:
                        crash.arrive()
        except DynwireError as error:
            tally.failures.append(error)
            return
        tally.ok += 1
        tally.holes += count != request["items"]

    async def calm(phase: str) -> None:
        calls, many = scene.tally(phase, "asyncio", "unary"), scene.tally(phase, "asyncio", "stream")
        for n in range(UNARY_PER_LANE):
            await call(calls, n)
        for _ in range(STREAMS_PER_LANE):
            await stream(many, CALM, None)

    async def busy(phase: str) -> None:
        tally = scene.tally(phase, "asyncio", "unary")
        while not scene.crash.over.is_set():
            await call(tally, 0)
            # calls that fail at once would otherwise never let the streams read
            await asyncio.sleep(0)

    for phase in ("calm", "crash", "after"):
        await asyncio.to_thread(scene.meet)
        if phase == "crash":
            short = [asyncio.create_task(busy(phase)) for _ in range(2)]
            async with asyncio.TaskGroup() as group:
                for _ in range(TASKS):
                    group.create_task(stream(scene.tally(phase, "asyncio", "stream"), LONG, scene.crash))
            await asyncio.to_thread(scene.meet)
            await asyncio.gather(*short)
        else:
            async with asyncio.TaskGroup() as group:
                for _ in range(TASKS):
                    group.create_task(calm(phase))
        await asyncio.to_thread(scene.meet)


# The director ----------------------------------------------------------------------------------------------------------------


@click.command(name="demo", cls=Command)
@click.option("--only", type=click.Choice(["serving", "calls"]), help="One of the two parts.")
@json_option
@settings_options
def command(only: str | None, as_json: bool, chosen: dict[str, object]) -> None:
    """Serve a model, kill a worker, call endpoints, kill a worker: see it all work in a few seconds.

    First an OpenAI-compatible frontend and two workers with a simulated engine, asked by curl and put under load while one
    worker is killed. Then two worker processes that are called from threads and from asyncio, one of which is killed in the
    middle of streams. Discovery is in a temporary directory; everything is stopped and removed. Exit code 1 if anything was
    not as promised.
    """
    began = time.monotonic()
    # without this, SIGTERM would leave the workers behind
    previous = signal.signal(signal.SIGTERM, _terminate)
    directory = tempfile.mkdtemp(prefix="dynwire-demo-")

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.1f} s] {text}", err=as_json)

    try:
        chosen |= {"discovery": "file", "discovery_file_dir": directory}
        config = tool_config(chosen)
        with contextlib.ExitStack() as undo:
            if config.request_plane == "nats":
                # a server of others may hold a demo of others
                chosen.setdefault("nats.prefix", f"dynwire-demo-{secrets.token_hex(4)}")
                if not _nats_answers(config):
                    server = undo.enter_context(_own_nats_server(config, say))
                    chosen["nats.servers"] = server.url
                config = tool_config(chosen)
            report: dict[str, Any] = {"ok": True, "plane": config.request_plane}
            if only != "calls":
                served = demo_serving.play(config, say)
                report |= {"serving": served, "ok": served["ok"]}
                if not as_json:
                    demo_serving.show(served)
            if only != "serving":
                called = _play(config, say)
                report |= {**called, "ok": report["ok"] and called["ok"]}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)
    report["seconds"] = round(time.monotonic() - began, 1)
    if as_json:
        click.echo(to_json(report))
    else:
        if only != "serving":
            _show(report)
        click.echo(f"\n{'All as promised' if report['ok'] else 'NOT as promised'}, {report['seconds']} s.")
    if not report["ok"]:
        click.get_current_context().exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _nats_answers(config: Config) -> bool:
    """Whether anybody listens at one of the servers."""
    for url in config.nats.servers:
        parts = urlsplit(url)
        with contextlib.suppress(OSError), socket.create_connection((parts.hostname, parts.port or 4222), timeout=1.0):
            return True
    return False


def _own_nats_server(config: Config, say: Callable[[str], None]) -> NatsServer:
    """A started nats-server. Raises `ConfigError` that says what to install, or where it was looked for a running one."""
    from ..nats.server import NatsServer

    where = ", ".join(map(mask_url, config.nats.servers))
    try:
        server = NatsServer(jetstream=True).start()
    except ConfigError as error:
        text = f"no NATS server answers at {where} (NATS_SERVER), and the demo cannot start one: {error}"
        raise ConfigError(text, name=error.name, value=error.value, allowed=error.allowed) from error
    say(f"no NATS server at {where}; started one at {server.url} (pid {server.pid})")
    return server


def _play(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    loop = "uvloop" if loop_factory() is not None else "asyncio's own loop"
    say(f"plane {config.request_plane}, discovery in {config.discovery.file_dir}, {loop}")
    with Worker(HANDLERS, config) as victim, Worker(HANDLERS, config) as survivor:
        for worker in (victim, survivor):
            worker.wait_ready(PHASE_TIMEOUT_S)
            say(f"worker {worker.pid} serves {' and '.join(HANDLERS)} at {worker.address}")
        scene = Scene(config)
        callers = [Lane(threaded_caller, scene), Lane(asyncio_caller, scene)]
        try:
            scene.meet()
            say(f"calm: {THREADS} threads and {TASKS} tasks call and stream")
            scene.meet()
            scene.meet()
            say(f"crash: {THREADS + TASKS} streams of {LONG['items']} items begin, short calls go on beside them")
            scene.wait_for_the_middle()
            victim.crash()
            say(f"worker {victim.pid} killed (SIGKILL) while every stream was in the middle")
            scene.meet()
            scene.crash.over.set()
            scene.meet()
            scene.meet()
            say("after: the same calls as in the beginning, with one worker left")
            scene.meet()
        except threading.BrokenBarrierError:
            for caller in callers:
                caller.join(PHASE_TIMEOUT_S)
            # whoever failed broke the barrier for the others: its error is the one to show
            errors = [caller.error for caller in callers if caller.error is not None]
            first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
            raise first[0] if first else click.ClickException("the callers of the demo lost step") from None
        except BaseException:
            # Ctrl-C, for example: nobody may go on waiting for us
            scene.crash.over.set()
            scene.barrier.abort()
            raise
        _finish(callers)
        code = survivor.stop()
        say(f"worker {survivor.pid} stopped (SIGTERM), exit code {code}")
        return _report(config, scene.tallies, victim.pid, survivor.pid, code)


def _report(config: Config, tallies: list[Tally], victim: int, survivor: int, exit_code: int) -> dict[str, Any]:
    rows = []
    for phase in ("calm", "crash", "after"):
        for caller in ("threads", "asyncio"):
            for kind in ("unary", "stream"):
                group = [t for t in tallies if (t.phase, t.caller, t.kind) == (phase, caller, kind)]
                latencies = sorted(value for t in group for value in t.latencies)
                rows.append(
                    {
                        "phase": phase,
                        "caller": caller,
                        "kind": kind,
                        "ok": sum(t.ok for t in group),
                        "failed": sum(len(t.failures) for t in group),
                        "p50": tables.percentile(latencies, 0.50),
                        "p99": tables.percentile(latencies, 0.99),
                    }
                )
    seen: Counter[tuple[str, str, str, str, int | None]] = Counter()
    for t in tallies:
        for error in t.failures:
            delivered = error.delivered if isinstance(error, PeerLost) and t.kind == "stream" else None
            seen[(t.caller, t.kind, type(error).__name__, error.sent, delivered)] += 1
    errors = [
        {"caller": caller, "kind": kind, "error": name, "sent": sent, "delivered": delivered, "count": count}
        for (caller, kind, name, sent, delivered), count in sorted(seen.items(), key=lambda item: tuple(map(str, item[0])))
    ]

    def part(phase: str) -> list[Tally]:
        return [t for t in tallies if t.phase == phase]

    lost = [(t, e) for t in part("crash") if t.kind == "stream" for e in t.failures]
    checks = {
        "calm: no call failed": not any(t.failures for t in part("calm")),
        "calm: both workers answered both callers": all(
            {pid for t in part("calm") if t.caller == caller for pid in t.pids} == {victim, survivor}
            for caller in ("threads", "asyncio")
        ),
        "no stream had a repeated, missing or misplaced item": not any(t.holes for t in tallies),
        "crash: streams of the killed worker ended with PeerLost": bool(lost)
        and all(isinstance(e, PeerLost) and e.sent == "yes" for _, e in lost),
        "crash: PeerLost says how many items had been delivered": all(
            isinstance(e, PeerLost) and e.delivered == t.items for t, e in lost
        ),
        "crash: streams of the other worker went on to their end": all(
            t.failures or t.ok == 1 for t in part("crash") if t.kind == "stream"
        )
        and not any(t.failures and survivor in t.pids for t in part("crash") if t.kind == "stream"),
        "after: no call failed, all answered by the other worker": not any(t.failures for t in part("after"))
        and {pid for t in part("after") for pid in t.pids} == {survivor},
        "the other worker drained and exited with 0": exit_code == 0,
    }
    return {
        "ok": all(checks.values()),
        "plane": config.request_plane,
        "killed_pid": victim,
        "surviving_pid": survivor,
        "rows": rows,
        "errors": errors,
        "checks": [{"check": text, "ok": passed} for text, passed in checks.items()],
    }


def _show(report: dict[str, Any]) -> None:
    body = [
        (r["phase"], r["caller"], r["kind"], r["ok"], r["failed"], tables.duration(r["p50"]), tables.duration(r["p99"]))
        for r in report["rows"]
    ]
    click.echo()
    click.echo(tables.render(("PHASE", "CALLER", "KIND", "OK", "FAILED", "P50", "P99"), body))
    click.echo("(times: until the reply, or until the first item of a stream)\n")
    click.echo(f"What the callers saw of the crash of {report['killed_pid']}:")
    seen = [(e["count"], e["caller"], e["kind"], e["error"], e["sent"], e["delivered"]) for e in report["errors"]]
    click.echo(tables.render(("COUNT", "CALLER", "KIND", "ERROR", "SENT", "DELIVERED"), seen))
    click.echo()
    for check in report["checks"]:
        click.echo(f"  {'ok    ' if check['ok'] else 'FAILED'}  {check['check']}")
