"""What every peer shares: the worker loops that are measured, the clock, and the line protocol with compare.py.

A peer is a module with two roles, each run in a process of its own::

    python PEER.py server SETUP     prints {"port": N} when it listens, serves until its stdin closes
    python PEER.py client SETUP     prints {"ready": true}, then one JSON result for each JSON command line on stdin

SETUP is one JSON object: ``loop`` (uvloop | asyncio), ``port`` and ``server_pid`` (client only), ``directory`` (for discovery
files), ``options``, ``nats`` and ``broker_pid`` (URL and process of the nats-server, where there is one). Everything else a
process prints goes to stderr.

The measured loops are the same for every peer: N workers, each making a fixed number of calls one after the other. That number
is chosen in a warm-up so that the run takes about the wanted time. Throughput is calls by wall time from the first call to the
last reply. Latency is taken on each call, or, when many calls are in flight, on one in eight, so that reading the clock does
not become part of what is measured. CPU time is that of both processes between the same two moments (the process clocks of
both, which is what getrusage adds up at a finer grain), so neither start-up nor shutdown is in it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

# Kinds of request; the number travels in the peers' hand-made headers.
ECHO, SUSPEND, BULK, TICK, SINK, IDLE = range(6)
KINDS = {"echo": ECHO, "suspend": SUSPEND, "bulk": BULK, "tick": TICK, "sink": SINK, "idle": IDLE}
DONE = b"ok"
"""The tiny reply of SINK."""

WARM_UP_S = 0.05
MAX_MESSAGE = 64 << 20
now_ns = time.perf_counter_ns


def stream_request(items: int, size: int) -> bytes:
    """Payload that asks for ``items`` items of ``size`` bytes."""
    return b"%d %d" % (items, size)


def parse_stream_request(payload: Any) -> tuple[int, int]:
    items, size = bytes(payload).split()
    return int(items), int(size)


# Peers of compare_http.py ---------------------------------------------------------------------------------------------------

HTTP_ROOT = "/v1/rpc/demo/bench"
ECHO_PATH, JSON_PATH, CHUNKS_PATH = f"{HTTP_ROOT}/echo", f"{HTTP_ROOT}/json", f"{HTTP_ROOT}/chunks"
LIVE_PATH = "/live"
LIVE_BODY = b"alive\n"
CHUNK, CHUNKS = b"x" * 64, 100
MAX_HTTP_STREAMS = 2000
"""Concurrent streams per connection that every server is told to allow, where it has such a setting."""
OCTETS, JSON = "application/octet-stream", "application/json"
JSON_REQUEST = {
    "id": "6f1c2a90-0b7e-4a51-9a3e-3d5b7f7b1c11",
    "model": "demo-8b",
    "prompt": "Write one sentence about the sea. " * 6,
    "token_ids": list(range(1000, 1032)),
    "sampling": {"temperature": 0.7, "top_p": 0.95, "max_tokens": 128, "stop": ["\n\n"]},
    "stream": False,
}
"""About 500 bytes of JSON: a small completion request."""


def end_with_stdin(stop: Callable[[], object]) -> None:
    """For servers that own the main thread: call ``stop`` from another thread when stdin closes."""

    def wait() -> None:
        while os.read(0, 65536):  # not through sys.stdin: a child forked meanwhile would find its lock held
            pass
        stop()

    threading.Thread(target=wait, daemon=True).start()


def free_port() -> int:
    """A port for servers that cannot be asked which one they got; the kernel does not hand it out again soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Line protocol ------------------------------------------------------------------------------------------------------------

_out = None


def _claim_stdout() -> None:
    """Keep the pipe to compare.py to ourselves; whatever a library prints goes to stderr."""
    global _out
    if _out is None:
        _out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)


def say(message: dict[str, Any]) -> None:
    assert _out is not None
    _out.write(json.dumps(message) + "\n")
    _out.flush()


async def stdin_lines() -> AsyncIterator[str]:
    """Lines of stdin through the loop's own poller: no second thread beside the measured one."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue()
    os.set_blocking(0, False)

    def readable() -> None:
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            return
        if not data:
            loop.remove_reader(0)
        chunks.put_nowait(data)

    loop.add_reader(0, readable)
    rest = b""
    while data := await chunks.get():
        rest += data
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line.decode()


async def stdin_closed() -> None:
    async for _ in stdin_lines():
        pass


def run_loop(setup: dict[str, Any], main: Awaitable[None]) -> None:
    if setup["loop"] == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)


def entry(server: Callable[[dict[str, Any]], None], client: Callable[[dict[str, Any]], None]) -> None:
    """``main()`` of a peer module."""
    _claim_stdout()
    role, setup = sys.argv[1], json.loads(sys.argv[2])
    try:
        (server if role == "server" else client)(setup)
    except KeyboardInterrupt:
        sys.exit(130)


# Measuring ----------------------------------------------------------------------------------------------------------------


def process_cpu_s(pid: int) -> float:
    """CPU seconds (user + system, all threads) of another process, from its process clock (see clock_getcpuclockid(3))."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return float("nan")


def own_cpu_s() -> float:
    return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Meter:
    """Wall time and CPU time of both processes over the measured interval."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.server_pid = setup["server_pid"]
        self.broker_pid = setup.get("broker_pid")

    def start(self) -> None:
        self.server0 = process_cpu_s(self.server_pid)
        self.broker0 = process_cpu_s(self.broker_pid) if self.broker_pid else 0.0
        self.client0 = own_cpu_s()
        self.faults0 = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.started = now_ns()

    def stop(self) -> None:
        self.seconds = (now_ns() - self.started) / 1e9
        self.cpu_client = own_cpu_s() - self.client0
        self.cpu_server = process_cpu_s(self.server_pid) - self.server0
        self.cpu_broker = process_cpu_s(self.broker_pid) - self.broker0 if self.broker_pid else None

    def result(self, calls: int, units: int, latencies_ns: list[int]) -> dict[str, Any]:
        ordered = sorted(latencies_ns)
        last = len(ordered) - 1

        def at(quantile: float) -> float | None:
            return ordered[min(last, int(len(ordered) * quantile))] / 1e3 if ordered else None

        return {
            "calls": calls,
            "units": units,
            "seconds": self.seconds,
            "p50_us": at(0.50),
            "p99_us": at(0.99),
            "samples": len(ordered),
            "cpu_client": self.cpu_client,
            "cpu_server": self.cpu_server,
            "cpu_broker": self.cpu_broker,
        }


def _rounds_per_worker(run_seconds: float, done: int, wanted: float) -> int:
    return max(1, min(int(wanted / max(run_seconds, 1e-6) * done), done * 16))


class Calibration:
    """Finds how many calls each worker makes in the wanted time; remembered, so that later rounds need little warm-up."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def key(self, command: dict[str, Any]) -> str:
        return json.dumps([command.get(k) for k in ("workload", "kind", "size", "concurrency", "items", "seconds")])

    def plan(self, command: dict[str, Any]) -> Iterator[list[float]]:
        """Yields ``[count, 0.0]`` per run; the caller writes the run's seconds into it. The last run is the measurement."""
        key, seconds = self.key(command), command["seconds"]
        count = self.known.get(key)
        if count is not None:
            yield [max(1, count // 8), 0.0]
        else:
            count = 1
            for _ in range(12):
                run = [count, 0.0]
                yield run
                if run[1] >= WARM_UP_S:
                    break
                count = _rounds_per_worker(run[1], count, WARM_UP_S * 1.5)
            count = max(1, int(count * seconds / max(run[1], 1e-6)))
            self.known[key] = count
        yield [count, 0.0]


class AsyncClient:
    """What an asyncio peer implements for the worker loops below."""

    def caller(self, kind: str) -> Callable[[bytes], Awaitable[Any]]:
        """The function to await for each call; the workers call it directly, nothing of ours in between."""
        raise NotImplementedError

    async def consume(self, kind: str, payload: bytes) -> int:
        """Run one stream to its end; returns how many items came."""
        count = 0
        async for _ in self.items(kind, payload):
            count += 1
        return count

    async def first(self, kind: str, payload: bytes) -> int:
        """Nanoseconds until the first item of one stream; the stream is read to its end."""
        started = now_ns()
        took = 0
        async for _ in self.items(kind, payload):
            took = took or now_ns() - started
        return took

    def items(self, kind: str, payload: bytes) -> AsyncIterator[Any]:
        raise NotImplementedError

    def request(self, kind: str, size: int) -> Any:
        return b"x" * size

    async def idle(self, setup: dict[str, Any], count: int) -> dict[str, Any]:
        raise NotImplementedError

    async def close(self) -> None:
        pass


async def _run_unary(client: AsyncClient, meter: Meter, command: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    concurrency, kind = command["concurrency"], command["kind"]
    payload = client.request(kind, command["size"])
    call = client.caller(kind)
    reply = await call(payload)
    check_reply(kind, payload, reply)
    del reply
    latencies: list[int] = []

    async def every(count: int) -> None:
        add = latencies.append
        for _ in range(count):
            t = now_ns()
            await call(payload)
            add(now_ns() - t)

    async def one_in_eight(count: int) -> None:
        add = latencies.append
        for _ in range(count >> 3):
            t = now_ns()
            await call(payload)
            add(now_ns() - t)
            await call(payload)
            await call(payload)
            await call(payload)
            await call(payload)
            await call(payload)
            await call(payload)
            await call(payload)

    for run in calibration.plan(command):
        count = int(run[0])
        sparse = concurrency > 1 and count >= 64
        if sparse:
            count &= ~7
        latencies.clear()
        worker = one_in_eight if sparse else every
        meter.start()
        if concurrency == 1:
            await worker(count)
        else:
            await asyncio.gather(*[worker(count) for _ in range(concurrency)])
        meter.stop()
        run[1] = meter.seconds
    result = meter.result(count * concurrency, count * concurrency, latencies)
    check_reply(kind, payload, await call(payload))
    return result


async def _run_stream(client: AsyncClient, meter: Meter, command: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    concurrency, kind, items = command["concurrency"], command["kind"], command["items"]
    payload = stream_request(items, command["size"])
    latencies: list[int] = []
    got = await client.consume(kind, payload)
    if got != items:
        raise RuntimeError(f"stream gave {got} items instead of {items}")

    async def worker(count: int) -> int:
        total = 0
        for _ in range(count):
            t = now_ns()
            total += await client.consume(kind, payload)
            latencies.append(now_ns() - t)
        return total

    for run in calibration.plan(command):
        count = int(run[0])
        latencies.clear()
        meter.start()
        totals = await asyncio.gather(*[worker(count) for _ in range(concurrency)])
        meter.stop()
        run[1] = meter.seconds
        if sum(totals) != count * concurrency * items:
            raise RuntimeError(f"streams gave {sum(totals)} items instead of {count * concurrency * items}")
    return meter.result(count * concurrency, sum(totals), latencies)


async def _run_first(client: AsyncClient, meter: Meter, command: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    payload = stream_request(command["items"], command["size"])
    latencies: list[int] = []
    for run in calibration.plan(command):
        count = int(run[0])
        latencies.clear()
        meter.start()
        for _ in range(count):
            latencies.append(await client.first("bulk", payload))
        meter.stop()
        run[1] = meter.seconds
    return meter.result(count, count, latencies)


async def _run_beside(client: AsyncClient, meter: Meter, command: dict[str, Any], _: Calibration) -> dict[str, Any]:
    """64-byte calls one after the other while 16 MiB transfers go over the same connection all the time."""
    payload = client.request("echo", command["size"])
    large = client.request(command["large_kind"], command["large"])
    call, transfer = client.caller("echo"), client.caller(command["large_kind"])
    stop, transfers, latencies = False, 0, []

    async def background() -> None:
        nonlocal transfers
        while not stop:
            await transfer(large)
            transfers += 1

    for seconds in (command["seconds"] / 4, command["seconds"]):
        stop, transfers = False, 0
        latencies.clear()
        task = asyncio.ensure_future(background())
        meter.start()
        end = now_ns() + int(seconds * 1e9)
        while (t := now_ns()) < end:
            await call(payload)
            latencies.append(now_ns() - t)
        meter.stop()
        stop = True
        await task
    result = meter.result(len(latencies), len(latencies), latencies)
    result["transfers"] = transfers
    return result


def check_reply(kind: str, payload: Any, reply: Any) -> None:
    """The echo must be one: same length, same first and last bytes, so that nobody is fast by being wrong."""
    if kind == "sink":
        if bytes(reply) != DONE:
            raise RuntimeError("wrong reply to a one-way transfer")
    elif isinstance(payload, (bytes, bytearray)):
        view = memoryview(reply).cast("B") if not isinstance(reply, bytes) else memoryview(reply)
        if len(view) != len(payload) or view[:16] != payload[:16] or view[-16:] != payload[-16:]:
            raise RuntimeError(f"echo of {len(payload)} bytes came back as {len(view)} other bytes")
    elif reply != payload:
        raise RuntimeError("echo of an object came back different")


async def async_client(setup: dict[str, Any], client: AsyncClient) -> None:
    meter, calibration = Meter(setup), Calibration()
    runs = {"unary": _run_unary, "stream": _run_stream, "first": _run_first, "beside": _run_beside}
    say({"ready": True})
    async for line in stdin_lines():
        command = json.loads(line)
        gc.collect()
        try:
            if command["workload"] == "idle":
                result = await client.idle(setup, command["concurrency"])
            else:
                result = await runs[command["workload"]](client, meter, command, calibration)
        except Exception as error:  # noqa: BLE001 - one failed row must not end the comparison
            result = {"error": f"{type(error).__name__}: {error}"}
            if os.environ.get("BENCH_TRACEBACK"):
                import traceback

                traceback.print_exc()
        say(result)
    await client.close()


async def idle_streams(setup: dict[str, Any], count: int, open_stream: Callable[[], Any]) -> dict[str, Any]:
    """Open ``count`` streams that yield one item and then wait; RSS of both processes before and after.

    Ten streams are opened first, so that what the first stream loads is not counted.
    """
    held, pid = [], setup["server_pid"]

    async def open_some(n: int) -> None:
        for _ in range(n):
            iterator = aiter(open_stream())
            await anext(iterator)
            held.append(iterator)

    started = now_ns()
    await open_some(10)
    before = rss_bytes(pid), rss_bytes(os.getpid())
    await open_some(count)
    after = rss_bytes(pid), rss_bytes(os.getpid())
    seconds = (now_ns() - started) / 1e9
    for iterator in held:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
        else:
            iterator.close()
    return {
        "calls": count,
        "units": count,
        "seconds": seconds,
        "p50_us": None,
        "p99_us": None,
        "cpu_client": 0.0,
        "cpu_server": 0.0,
        "server_bytes_per_stream": (after[0] - before[0]) / count,
        "client_bytes_per_stream": (after[1] - before[1]) / count,
    }


# Blocking peers -----------------------------------------------------------------------------------------------------------


class SyncClient:
    """What a blocking peer implements. ``caller(thread, kind)`` may open a connection for that thread and keep it."""

    def caller(self, thread: int, kind: str) -> Callable[[bytes], Any]:
        raise NotImplementedError

    def request(self, kind: str, size: int) -> Any:
        return b"x" * size

    def consume(self, kind: str, payload: bytes) -> int:
        raise NotImplementedError

    def pipeline(self, payload: bytes, in_flight: int, count: int, latencies: list[int]) -> None:
        """Make ``count`` calls from this thread with ``in_flight`` of them under way."""
        raise NotImplementedError

    def close(self) -> None:
        pass


def _run_sync(client: SyncClient, meter: Meter, command: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    concurrency, kind = command["concurrency"], command["kind"]
    payload = client.request(kind, command["size"])
    callers = [client.caller(i, kind) for i in range(concurrency)]
    for call in callers:
        check_reply(kind, payload, call(payload))
    kept: list[list[int]] = []

    def worker(call: Callable[[bytes], Any], count: int) -> None:
        latencies: list[int] = []
        add = latencies.append
        for _ in range(count):
            t = now_ns()
            call(payload)
            add(now_ns() - t)
        kept.append(latencies)

    for run in calibration.plan(command):
        count = int(run[0])
        kept.clear()
        if concurrency == 1:
            meter.start()
            worker(callers[0], count)
            meter.stop()
        else:
            failures: list[BaseException] = []
            barrier = threading.Barrier(concurrency + 1)

            def body(
                call: Callable[[bytes], Any],
                count: int = count,
                barrier: threading.Barrier = barrier,
                failures: list[BaseException] = failures,
            ) -> None:
                barrier.wait()
                try:
                    worker(call, count)
                except Exception as error:  # noqa: BLE001 - raised again below, in the main thread
                    failures.append(error)

            threads = [threading.Thread(target=body, args=(call,), daemon=True) for call in callers]
            for thread in threads:
                thread.start()
            meter.start()
            barrier.wait()
            for thread in threads:
                thread.join()
            meter.stop()
            if failures:
                raise failures[0]
        run[1] = meter.seconds
    return meter.result(count * concurrency, count * concurrency, [n for one in kept for n in one])


def _run_sync_pipeline(client: SyncClient, meter: Meter, command: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    payload, in_flight = client.request("echo", command["size"]), command["concurrency"]
    latencies: list[int] = []
    for run in calibration.plan(command):
        count = int(run[0]) * in_flight
        latencies.clear()
        meter.start()
        client.pipeline(payload, in_flight, count, latencies)
        meter.stop()
        run[1] = meter.seconds
    return meter.result(count, count, latencies)


def _run_sync_stream(client: SyncClient, meter: Meter, command: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    payload, latencies, units = stream_request(command["items"], command["size"]), [], 0
    for run in calibration.plan(command):
        count, units = int(run[0]), 0
        latencies.clear()
        meter.start()
        for _ in range(count):
            t = now_ns()
            units += client.consume(command["kind"], payload)
            latencies.append(now_ns() - t)
        meter.stop()
        run[1] = meter.seconds
    if units != count * command["items"]:
        raise RuntimeError(f"streams gave {units} items instead of {count * command['items']}")
    return meter.result(count, units, latencies)


def sync_client(setup: dict[str, Any], client: SyncClient) -> None:
    meter, calibration = Meter(setup), Calibration()
    say({"ready": True})
    runs = {"unary": _run_sync, "threads": _run_sync, "pipeline": _run_sync_pipeline, "stream": _run_sync_stream}
    for line in sys.stdin:
        command = json.loads(line)
        gc.collect()
        try:
            result = runs[command["workload"]](client, meter, command, calibration)
        except Exception as error:  # noqa: BLE001 - one failed row must not end the comparison
            result = {"error": f"{type(error).__name__}: {error}"}
            if os.environ.get("BENCH_TRACEBACK"):
                import traceback

                traceback.print_exc()
        say(result)
    client.close()


def serve_in_thread(serve: Callable[[], None], port: int) -> None:
    """For blocking servers: serve in a daemon thread while the main thread waits for stdin to close."""
    threading.Thread(target=serve, daemon=True).start()
    say({"port": port})
    sys.stdin.read()
    os._exit(0)  # daemon threads sit in system calls of their libraries; nothing is left to save
