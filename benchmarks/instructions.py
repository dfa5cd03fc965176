#!/usr/bin/env python3
"""Did a change make a hot path longer? Instructions executed per operation, counted by callgrind.

Counts repeat to a fraction of a percent on a busy machine, where times do not; that is what makes them a gate. They say nothing
about caches, system calls or waiting: for those there is compare.py.

    python benchmarks/instructions.py                    count, compare with the stored baseline, print a table
    python benchmarks/instructions.py --check            the same; exit status 1 if a path is more than 3 % longer
    python benchmarks/instructions.py --update           store what was counted as the new baseline
    python benchmarks/instructions.py --only 'exchange'  some of them

Each bench runs in a Python of its own under ``valgrind --tool=callgrind`` with collection switched on only around the measured
loop (after a warm-up), with a fixed hash seed and environment and the garbage collector off. The same loop with nothing in it
is subtracted. Counts depend on the interpreter and compiler, so the baseline (instructions-baseline.json) keeps one set for
each such environment; in an environment without one, nothing can be checked, and the tool says so.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this tree, whatever is installed
BASELINE = HERE / "instructions-baseline.json"
TOLERANCE = 0.03
REPEATS = 5  # the smallest counts: how often a loop turns for nothing depends on what else the machine does

TOGGLE_C = """
#include <valgrind/callgrind.h>
void toggle_start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void toggle_stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""

# What is counted ------------------------------------------------------------------------------------------------------------
# A bench is a generator: it sets up, yields (function, operations per call of it), and cleans up. A function that is a coroutine
# function runs in the standard asyncio loop.

Bench = Callable[[], Iterator[tuple[Callable[[], Any], int]]]
BENCHES: dict[str, tuple[Bench, int]] = {}
SMALL = b"x" * 64


def bench(calls: int) -> Callable[[Bench], Bench]:
    """Register a bench whose function is called ``calls`` times."""

    def register(function: Bench) -> Bench:
        BENCHES[function.__name__] = (function, calls)
        return function

    return register


@bench(2000)
def empty() -> Iterator[tuple[Callable[[], Any], int]]:
    yield (lambda: None), 1


@bench(2000)
def context_create() -> Iterator[tuple[Callable[[], Any], int]]:
    from dynwire import Context

    yield Context, 1


@bench(2000)
def payload_64B() -> Iterator[tuple[Callable[[], Any], int]]:
    from dynwire import Payload

    yield (lambda: memoryview(Payload(SMALL))), 1


@bench(2000)
def pool_1MiB() -> Iterator[tuple[Callable[[], Any], int]]:
    from dynwire._buffers import BufferPool

    pool = BufferPool()
    yield (lambda: pool.acquire(1 << 20)), 1


def _pair() -> tuple[Any, Any]:
    """Two ends of the wire that have said hello, no socket between them."""
    from dynwire._frames import EventConnection

    client, server = EventConnection(True), EventConnection(False)
    client.start(software="bench", connection_id=b"12345678")
    server.receive(client.output())
    server.start(software="bench")
    client.receive(server.output())
    return client, server


def _exchange(in_flight: int, payload: bytes) -> Iterator[tuple[Callable[[], Any], int]]:
    client, server = _pair()

    def exchange() -> None:
        for _ in range(in_flight):
            client.request("bench.worker.echo", payload)
        for event in server.receive(client.output()):
            server.send_item(event[1], payload, last=True)
        replies = client.receive(server.output())
        client.take(None, in_flight * (len(payload) + 64))
        assert len(replies) == in_flight

    yield exchange, in_flight


@bench(300)
def exchange_64B() -> Iterator[tuple[Callable[[], Any], int]]:
    """Request and reply between the two state machines, through their Python face."""
    yield from _exchange(1, SMALL)


@bench(30)
def exchange_64B_x32() -> Iterator[tuple[Callable[[], Any], int]]:
    yield from _exchange(32, SMALL)


@bench(10)
def exchange_1KiB_x32() -> Iterator[tuple[Callable[[], Any], int]]:
    yield from _exchange(32, SMALL * 16)


@bench(10)
def items_64B_x256() -> Iterator[tuple[Callable[[], Any], int]]:
    """One streamed reply of 256 items; counted per item."""
    client, server = _pair()

    def stream() -> None:
        client.request("bench.worker.items", b"")
        ((_, sid, *_rest),) = server.receive(client.output())
        for _ in range(256):
            server.send_item(sid, SMALL)
        server.send_end(sid)
        events = client.receive(server.output())
        client.take(None, 256 * (64 + 64))
        server.receive(client.output())
        assert len(events) == 257

    yield stream, 256


@bench(1000)
def msgpack_object() -> Iterator[tuple[Callable[[], Any], int]]:
    """A small object through the codec, there and back."""
    from dynwire.codec import KIND_MSGPACK, encode, unpack

    thing = {"id": 1, "model": "demo", "tokens": [1, 20, 300]}

    def both() -> None:
        unpack(KIND_MSGPACK, encode(thing, "msgpack"))

    yield both, 1


class _Stack:
    """Server and client of the whole package in one event loop, over a loopback socket."""

    async def __aenter__(self) -> _Stack:
        import dynwire

        async def echo(request: Any) -> Any:
            return request

        async def suspend(request: Any) -> Any:
            await asyncio.sleep(0)
            return request

        async def items(request: Any) -> Any:
            for _ in range(256):
                yield SMALL

        self.directory = tempfile.mkdtemp(prefix="dynwire-instructions-")
        self.manager = dynwire.AsyncNetworkManager(
            request_plane="tcp", discovery="file", discovery_file_dir=self.directory, tcp_spin_us=0, tcp_host="127.0.0.1"
        )
        await self.manager.__aenter__()
        self.clients = {}
        for name, handler in (("echo", echo), ("suspend", suspend), ("items", items)):
            endpoint = self.manager.endpoint(f"bench.worker.{name}")
            await endpoint.serve(handler)
            self.clients[name] = await endpoint.client()
            await self.clients[name].wait_for_instances(1, timeout=30)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.manager.__aexit__(*exc)  # type: ignore[arg-type]
        shutil.rmtree(self.directory, ignore_errors=True)


CALLS_PER_WORKER = 16  # so that starting a task is a small part of a call
STACK: dict[str, tuple[Callable[[_Stack], Callable[[], Awaitable[Any]]], int, int]] = {}


def _stack_benches() -> None:
    def unary(name: str, in_flight: int, payload: Any) -> Callable[[_Stack], Callable[[], Awaitable[Any]]]:
        def make(stack: _Stack) -> Callable[[], Awaitable[Any]]:
            call = stack.clients[name].call

            async def worker() -> None:
                for _ in range(CALLS_PER_WORKER):
                    await call(payload)

            async def many() -> None:
                await asyncio.gather(*[worker() for _ in range(in_flight)])

            return many

        return make

    def items(stack: _Stack) -> Callable[[], Awaitable[Any]]:
        async def read() -> None:
            count = 0
            async with stack.clients["items"].stream(b"x") as stream:
                async for _ in stream:
                    count += 1
            assert count == 256

        return read

    # name: (what makes the coroutine function, calls, operations per call)
    STACK["call_64B_x64"] = unary("echo", 64, SMALL), 4, 64 * CALLS_PER_WORKER
    STACK["call_object_x64"] = unary("echo", 64, {"id": 1, "tokens": [1, 20, 300]}), 4, 64 * CALLS_PER_WORKER
    STACK["call_suspend_x64"] = unary("suspend", 64, SMALL), 4, 64 * CALLS_PER_WORKER
    STACK["stream_256"] = items, 20, 256


_stack_benches()


# Inside valgrind ------------------------------------------------------------------------------------------------------------


@contextmanager
def counting(library: ctypes.CDLL) -> Iterator[None]:
    library.toggle_start()
    try:
        yield
    finally:
        library.toggle_stop()


def run_inside(name: str, library_path: str) -> None:
    """The child: warm up, then run the loop with callgrind switched on."""
    library = ctypes.CDLL(library_path)
    if name in STACK:
        make, calls, _ = STACK[name]

        async def main() -> None:
            async with _Stack() as stack:
                function = make(stack)
                for _ in range(calls // 4 + 3):
                    await function()
                gc.collect()
                gc.disable()
                for _ in range(REPEATS):
                    with counting(library):
                        for _ in range(calls):
                            await function()
                gc.enable()

        asyncio.run(main())
        return
    setup, calls = BENCHES[name]
    for function, _ in setup():
        for _ in range(calls // 4 + 8):
            function()
        gc.collect()
        gc.disable()
        for _ in range(REPEATS):
            with counting(library):
                for _ in range(calls):
                    function()
        gc.enable()


# Outside --------------------------------------------------------------------------------------------------------------------


def environment_key() -> str:
    """Interpreter, libc and architecture: with another of these the counts differ without any change of ours."""
    return f"{platform.python_implementation()} {platform.python_version()} {platform.machine()} {' '.join(platform.libc_ver())}"


def operations(name: str) -> int:
    if name in STACK:
        return STACK[name][1] * STACK[name][2]
    setup, calls = BENCHES[name]
    generator = setup()
    _, per_call = next(generator)
    generator.close()
    return calls * per_call


def count(name: str, library: Path, scratch: Path) -> float:
    """Instructions per operation of one bench, the empty loop not yet subtracted."""
    out = scratch / f"{name}.out"
    env = {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(HERE.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
    }
    command = [
        "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}", "--quiet",
        sys.executable, str(Path(__file__).resolve()), "--inside", name, "--library", str(library),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        raise RuntimeError("did not end within 240 s under valgrind") from None
    parts = [Path(f"{out}.{i + 1}") for i in range(REPEATS)]  # one per counting(); what follows belongs to the interpreter's end
    if done.returncode or not all(part.exists() for part in parts):
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    totals = [re.search(r"^(?:summary|totals):\s*(\d+)", part.read_text(), re.MULTILINE) for part in parts]
    return min(int(total.group(1)) for total in totals if total) / operations(name)


def build_toggle(scratch: Path) -> Path:
    source, library = scratch / "toggle.c", scratch / "toggle.so"
    source.write_text(TOGGLE_C)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help=f"exit status 1 if a path is more than {TOLERANCE:.0%} longer than the baseline"
    )
    parser.add_argument("--update", action="store_true", help="store the counts as the new baseline of this environment")
    parser.add_argument("--only", metavar="REGEX", default="")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print counts and baseline as JSON")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_inside(args.inside, args.library)
        return 0
    names = [n for n in [*BENCHES, *STACK] if re.search(args.only, n)]
    if args.list:
        print("\n".join(names))
        return 0
    for tool in ("valgrind", "gcc"):
        if not shutil.which(tool):
            print(f"{tool} is not installed: instruction counts need valgrind (with its headers) and gcc", file=sys.stderr)
            return 2
    if "empty" not in names:
        names.insert(0, "empty")
    stored: dict[str, dict[str, float]] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline = stored.get(environment_key(), {})
    counts: dict[str, float] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="dynwire-instructions-") as directory:
        scratch = Path(directory)
        library = build_toggle(scratch)

        def one(name: str) -> None:
            try:
                counts[name] = count(name, library, scratch)
            except Exception as error:  # noqa: BLE001 - shown in the table
                failures[name] = str(error)
            if sys.stderr.isatty():
                print(f"\r{len(counts) + len(failures)}/{len(names)} {name:30}", end="", file=sys.stderr)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, names))
    if sys.stderr.isatty():
        print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    loop = counts.pop("empty", 0.0)
    for name in counts:
        # Several operations per call share one turn of the loop; benches of the whole stack have a loop of their own.
        counts[name] = round(counts[name] - (0 if name in STACK else loop * BENCHES[name][1] / operations(name)), 1)
    worse = {n: c / baseline[n] - 1 for n, c in counts.items() if n in baseline and c > baseline[n] * (1 + TOLERANCE)}
    if args.update:
        stored[environment_key()] = {**baseline, **counts}
        BASELINE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    if args.json:
        print(json.dumps({"environment": environment_key(), "counts": counts, "baseline": baseline, "failures": failures}))
    else:
        print(f"instructions per operation ({environment_key()})")
        for name in [n for n in names if n != "empty"]:
            if name in failures:
                print(f"  {name:20} {'failed':>12}   {failures[name]}")
                continue
            old = baseline.get(name)
            change = "no baseline" if old is None else f"{counts[name] / old - 1:+.2%}" + ("  LONGER" if name in worse else "")
            print(f"  {name:20} {counts[name]:12,.0f}   {change}")
        if not baseline:
            print("no baseline for this environment, nothing to compare with; --update stores one")
        if args.update:
            print(f"stored in {BASELINE}")
    if args.check and (worse or failures):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
