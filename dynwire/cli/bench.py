"""``dynwire bench``: how fast one caller process gets on with one endpoint."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from ..config import Config
from ..errors import DynwireError
from ..types import EndpointId
from . import tables
from ._common import (
    Command,
    json_option,
    loop_factory,
    parse_payload,
    read_data,
    run_async,
    settings_options,
    to_json,
    tool_config,
)
from ._workers import Worker

if TYPE_CHECKING:
    from dynwire import AsyncNetworkManager, NetworkManager

ECHO = "bench.worker.echo"
REPEAT = "bench.worker.repeat"
HANDLERS = {ECHO: "dynwire.cli.demo_worker:echo", REPEAT: "dynwire.cli.demo_worker:repeat"}

READY_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 30.0
# connections open and caches fill in this part of the duration, which is not counted
WARM_UP_SHARE = 0.1
# so many failures without one success mean that it will not get better
GIVE_UP_AFTER = 20


@dataclass
class Lane:
    """What one thread or task counts. ``latencies`` in seconds: until the reply, or until the first item of a stream."""

    done: int = 0
    items: int = 0
    errors: int = 0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    last_error: DynwireError | None = None

    def fail(self, error: DynwireError) -> None:
        self.errors += 1
        self.last_error = error
        if self.errors >= GIVE_UP_AFTER and not self.done:
            raise error


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    mode: str
    api: str
    concurrency: int
    endpoint: str
    payload: Any
    duration: float


@click.command(name="bench", cls=Command)
@click.argument("endpoint", required=False)
@click.option("--mode", type=click.Choice(["unary", "stream", "both"]), default="both", show_default=True)
@click.option(
    "--api", type=click.Choice(["async", "threads", "both"]), default="async", show_default=True, help="asyncio tasks or threads."
)
@click.option("-c", "--concurrency", type=click.IntRange(1, 4096), multiple=True, default=(1, 32), show_default=True,
              help="Calls at once; may be repeated.")  # fmt: skip
@click.option("--size", type=click.IntRange(0), default=64, show_default=True, metavar="BYTES", help="Size of the payload.")
@click.option("--items", type=click.IntRange(1), default=100, show_default=True, help="Items per stream of the built-in worker.")
@click.option("--data", help="Payload for ENDPOINT as JSON, text, @FILE or - instead of bytes.")
@click.option("--duration", type=click.FloatRange(0.05), default=2.0, show_default=True, metavar="SECONDS", help="Per row.")
@json_option
@settings_options
def command(
    endpoint: str | None,
    mode: str,
    api: str,
    concurrency: tuple[int, ...],
    size: int,
    items: int,
    data: str | None,
    duration: float,
    as_json: bool,
    chosen: dict[str, object],
) -> None:
    """Measure calls per second and latency, from this process to ENDPOINT.

    Without ENDPOINT a worker process of its own answers: with the payload itself (unary), and with --items times the
    payload (stream). On shared machines compare rows of one run with each other, not runs with each other.
    """
    if endpoint is not None:
        EndpointId.parse(endpoint)
    elif data is not None:
        raise click.UsageError("--data is for an ENDPOINT of yours; the built-in worker gets --size bytes")
    if endpoint is not None and mode == "both":
        raise click.UsageError("an endpoint either streams or does not: choose --mode unary or --mode stream")
    payload: Any = bytes(size) if data is None else parse_payload(read_data(data), raw=False)
    modes = ("unary", "stream") if mode == "both" else (mode,)
    apis = ("async", "threads") if api == "both" else (api,)

    with _target(endpoint, chosen) as config:
        jobs = []
        for each in modes:
            sent = payload if endpoint is not None or each == "unary" else {"items": items, "payload": payload}
            to = endpoint or (ECHO if each == "unary" else REPEAT)
            jobs += [Job(each, a, c, to, sent, duration) for a in apis for c in concurrency]
        rows = [_measure(job, config, f"{n}/{len(jobs)}") for n, job in enumerate(jobs, 1)]
    if as_json:
        loop = "uvloop" if loop_factory() is not None else "asyncio"
        click.echo(
            to_json(
                {
                    "plane": config.request_plane,
                    "payload_bytes": len(payload) if data is None else None,
                    "loop": loop,
                    "rows": rows,
                }
            )
        )
        return
    body = [
        (
            r["mode"],
            r["api"],
            r["concurrency"],
            f"{r['calls_per_s']:,.0f}",
            f"{r['items_per_s']:,.0f}",
            tables.duration(r["p50"]),
            tables.duration(r["p99"]),
            r["errors"],
        )
        for r in rows
    ]
    click.echo(tables.render(("MODE", "API", "AT ONCE", "CALLS/S", "ITEMS/S", "P50", "P99", "ERRORS"), body))
    click.echo(f"({config.request_plane}; times until the reply, or until the first item of a stream)")


@contextmanager
def _target(endpoint: str | None, chosen: dict[str, object]) -> Iterator[Config]:
    """Settings with which the endpoint can be found; starts the built-in worker if there is none."""
    if endpoint is not None:
        yield tool_config(chosen)
        return
    directory = tempfile.mkdtemp(prefix="dynwire-bench-")
    try:
        config = tool_config({**chosen, "discovery": "file", "discovery_file_dir": directory})
        with Worker(HANDLERS, config) as worker:
            worker.wait_ready(READY_TIMEOUT_S)
            yield config
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(job: Job, config: Config, progress: str) -> dict[str, Any]:
    live = sys.stderr.isatty()
    if live:
        click.echo(
            f"\r[{progress}] {job.mode} {job.api} {job.concurrency} at once, {job.duration:g} s ...\x1b[K", nl=False, err=True
        )
    try:
        lanes, elapsed = run_async(_run_async(job, config)) if job.api == "async" else _run_threads(job, config)
    finally:
        if live:
            click.echo("\r\x1b[K", nl=False, err=True)
    done, errors = sum(lane.done for lane in lanes), sum(lane.errors for lane in lanes)
    failure = next((lane.last_error for lane in lanes if lane.last_error is not None), None)
    if failure is not None and not done:
        raise failure
    latencies = sorted(value for lane in lanes for value in lane.latencies)
    return {
        "mode": job.mode,
        "api": job.api,
        "concurrency": job.concurrency,
        "calls": done,
        "calls_per_s": round(done / elapsed, 1),
        "items_per_s": round(sum(lane.items for lane in lanes) / elapsed, 1),
        "p50": tables.percentile(latencies, 0.5),
        "p99": tables.percentile(latencies, 0.99),
        "max": latencies[-1] if latencies else None,
        "errors": errors,
        "first_error": None if failure is None else failure.to_dict(),
    }


async def _run_async(job: Job, config: Config) -> tuple[list[Lane], float]:
    from dynwire import AsyncNetworkManager

    async with AsyncNetworkManager(config=config) as manager:
        return await _async_lanes(job, manager)


async def _async_lanes(job: Job, manager: AsyncNetworkManager) -> tuple[list[Lane], float]:
    client = await manager.endpoint(job.endpoint).client()
    await client.wait_for_instances(1, timeout=READY_TIMEOUT_S)
    clock = time.perf_counter

    async def unary(lane: Lane, until: float) -> None:
        while (start := clock()) < until:
            try:
                await client.call(job.payload, timeout=CALL_TIMEOUT_S)
            except DynwireError as error:
                lane.fail(error)
                continue
            lane.latencies.append(clock() - start)
            lane.done += 1
            lane.items += 1

    async def stream(lane: Lane, until: float) -> None:
        while (start := clock()) < until:
            first = 0.0
            try:
                async with client.stream(job.payload, timeout=CALL_TIMEOUT_S) as items:
                    async for _ in items:
                        first = first or clock() - start
                        lane.items += 1
            except DynwireError as error:
                lane.fail(error)
                continue
            if first:
                lane.latencies.append(first)
            lane.done += 1

    async def run(seconds: float) -> tuple[list[Lane], float]:
        lanes = [Lane() for _ in range(job.concurrency)]
        began = clock()
        work = unary if job.mode == "unary" else stream
        await asyncio.gather(*(work(lane, began + seconds) for lane in lanes))
        return lanes, clock() - began

    await run(job.duration * WARM_UP_SHARE)
    return await run(job.duration)


def _run_threads(job: Job, config: Config) -> tuple[list[Lane], float]:
    from dynwire import NetworkManager

    with NetworkManager(config=config) as manager:
        return _thread_lanes(job, manager)


def _thread_lanes(job: Job, manager: NetworkManager) -> tuple[list[Lane], float]:
    client = manager.endpoint(job.endpoint).client()
    client.wait_for_instances(1, timeout=READY_TIMEOUT_S)
    clock = time.perf_counter

    def unary(lane: Lane, until: float) -> None:
        while (start := clock()) < until:
            try:
                client.call(job.payload, timeout=CALL_TIMEOUT_S)
            except DynwireError as error:
                lane.fail(error)
                continue
            lane.latencies.append(clock() - start)
            lane.done += 1
            lane.items += 1

    def stream(lane: Lane, until: float) -> None:
        while (start := clock()) < until:
            first = 0.0
            try:
                with client.stream(job.payload, timeout=CALL_TIMEOUT_S) as items:
                    for _ in items:
                        first = first or clock() - start
                        lane.items += 1
            except DynwireError as error:
                lane.fail(error)
                continue
            if first:
                lane.latencies.append(first)
            lane.done += 1

    def work(lane: Lane, until: float) -> None:
        with suppress(DynwireError):  # lane.fail() gave up and kept the error
            (unary if job.mode == "unary" else stream)(lane, until)

    def run(seconds: float) -> tuple[list[Lane], float]:
        lanes = [Lane() for _ in range(job.concurrency)]
        began = clock()
        # daemon: after Ctrl-C nobody waits for calls on their way
        threads = [threading.Thread(target=work, args=(lane, began + seconds), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return lanes, clock() - began

    run(job.duration * WARM_UP_SHARE)
    return run(job.duration)
