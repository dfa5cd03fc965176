"""The processes of these tests: ``program.py ROLE LOOP [FACE or NUMBER]``. Prints JSON lines. Environment: the plane."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dynwire

ITEM = bytes(1 << 20)
MIXED = 10_000
"""calls and streams; a twentieth is given up, since an http server ends a connection with 1,000 resets at once"""


def say(value: Any) -> None:
    os.write(1, (json.dumps(value) + "\n").encode())


def announce(value: Any) -> None:
    """Say it, and wait until the parent has read its baseline."""
    say(value)
    sys.stdin.readline()


def settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


async def echo(request: Any) -> Any:
    return request


async def idle(request: int) -> AsyncIterator[int]:
    yield request
    await asyncio.get_running_loop().create_future()


async def flood(request: int) -> AsyncIterator[bytes]:
    for _ in range(request):
        yield ITEM


async def few(request: int) -> AsyncIterator[int]:
    for i in range(request):
        yield i


SERVER: list[dynwire.AsyncNetworkManager] = []


class PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the C API"""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("rest", ctypes.c_byte * 64),
    ]


def address_of(view: memoryview) -> int:
    """Where the bytes of a read-only view lie."""
    buffer = PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address = int(buffer.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


async def receive(request: dynwire.Payload) -> dict[str, Any]:
    """Where the payload lies, and how many bytes of it the kernel put there."""
    server: Any = SERVER[0].server()
    return {
        "length": len(request),
        "address": request.address,
        "view_address": address_of(memoryview(request)),
        "landed": sum(found["landed_bytes"] for found in server.stats()),
    }


async def size_of(request: dynwire.Payload) -> int:
    return len(request)


async def state(request: Any) -> dict[str, int]:
    """What the server holds, this request included."""
    server: Any = SERVER[0].server()
    found = server.stats()
    streams = sum(connection["streams"] for connection in found)
    return {"connections": len(found), "streams": streams, "tasks": len(asyncio.all_tasks())}


async def serve() -> None:
    manager = dynwire.AsyncNetworkManager(tcp_host="127.0.0.1")
    SERVER.append(manager)
    for handler in (echo, idle, flood, few, state, receive, size_of):
        await manager.endpoint(f"m.w.{handler.__name__}").serve(handler)
    say("ready")
    await asyncio.get_running_loop().create_future()


async def async_client(manager: dynwire.AsyncNetworkManager, name: str) -> dynwire.AsyncClient:
    client = await manager.endpoint(f"m.w.{name}").client()
    await client.wait_for_instances(1, timeout=20)
    return client


def client(manager: dynwire.NetworkManager, name: str) -> dynwire.Client:
    found = manager.endpoint(f"m.w.{name}").client()
    found.wait_for_instances(1, timeout=20)
    return found


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


async def open_idle(count: int) -> None:
    manager = dynwire.AsyncNetworkManager(tcp_pool_size=1)
    caller = await async_client(manager, "idle")
    streams = []

    async def one(number: int) -> None:
        stream = caller.stream(number)
        streams.append(stream)
        assert await anext(stream) == number

    await asyncio.gather(*(one(i) for i in range(100)))
    announce("warm")
    for first in range(100, count + 100, 50):
        await asyncio.gather(*(one(i) for i in range(first, min(first + 50, count + 100))))
    runtime = next(iter(manager._runtimes.values()))
    stats: Any = runtime.client("msgpack")
    say({"open": len(streams) - 100, "connections": sum(len(found) for found in stats.stats().values())})
    await asyncio.get_running_loop().create_future()


async def drain_async() -> None:
    manager = dynwire.AsyncNetworkManager(tcp_pool_size=1)
    caller = await async_client(manager, "flood")
    async with caller.stream(20) as stream:
        async for _ in stream:
            pass
    settle()
    announce("warm")
    items = total = 0
    async with caller.stream(1024) as stream:
        async for item in stream:
            items, total = items + 1, total + len(item)
            del item
            if items == 3:
                await asyncio.sleep(1)
                say("paused")
    say({"items": items, "bytes": total})
    await asyncio.get_running_loop().create_future()


def drain_blocking() -> None:
    manager = dynwire.NetworkManager(tcp_pool_size=1)
    caller = client(manager, "flood")
    with caller.stream(20) as stream:
        for _ in stream:
            pass
    settle()
    announce("warm")
    items = total = 0
    with caller.stream(1024) as stream:
        for item in stream:
            items, total = items + 1, total + len(item)
            del item
            if items == 3:
                time.sleep(1)
                say("paused")
    say({"items": items, "bytes": total})
    time.sleep(1000)


async def calls_async() -> None:
    manager = dynwire.AsyncNetworkManager()
    caller = await async_client(manager, "echo")

    async def some(count: int) -> None:
        for i in range(count):
            await caller.call(i)

    async def many(count: int) -> None:
        await asyncio.gather(*(some(count // 50) for _ in range(50)))

    await many(20_000)
    settle()
    state = {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}
    announce(state)
    await many(100_000)
    settle()
    say({"tasks": len(asyncio.all_tasks()), "threads": threading.active_count(), "calls": 100_000})
    await asyncio.get_running_loop().create_future()


def calls_blocking() -> None:
    manager = dynwire.NetworkManager()
    caller = client(manager, "echo")

    def some(count: int) -> None:
        for i in range(count):
            caller.call(i)

    def many(count: int) -> None:
        threads = [threading.Thread(target=some, args=(count // 4,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    many(20_000)
    settle()
    announce({"threads": threading.active_count()})
    many(100_000)
    settle()
    say({"threads": threading.active_count(), "calls": 100_000})
    time.sleep(1000)


async def mixed_async() -> None:
    """Calls, streams that are read and streams that are given up, on few connections."""
    manager = dynwire.AsyncNetworkManager(tcp_pool_size=2)
    echoes, fews, idles, states = [await async_client(manager, name) for name in ("echo", "few", "idle", "state")]

    async def some(count: int) -> None:
        for i in range(count):
            if i % 20 < 11:
                assert await echoes.call(i) == i
            elif i % 20 < 19:
                async with fews.stream(3) as stream:
                    assert [item async for item in stream] == [0, 1, 2]
            else:
                async with idles.stream(i) as stream:
                    assert await anext(stream) == i

    async def many(count: int) -> dict[str, Any]:
        await asyncio.gather(*(some(count // 20) for _ in range(20)))
        held = await states.call(0)
        while held["streams"] > 1:  # the last ones that were given up
            held = await states.call(0)
        settle()
        runtime = next(iter(manager._runtimes.values()))
        stats: Any = runtime.client("msgpack")
        streams = sum(connection["streams"] for found in stats.stats().values() for connection in found)
        return {"server": held, "streams": streams, "tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}

    announce(await many(MIXED // 5))
    say(await many(MIXED))
    await asyncio.get_running_loop().create_future()


def mixed_blocking() -> None:
    manager = dynwire.NetworkManager(tcp_pool_size=2)
    echoes, fews, idles, states = [client(manager, name) for name in ("echo", "few", "idle", "state")]

    def some(count: int) -> None:
        for i in range(count):
            if i % 20 < 11:
                assert echoes.call(i) == i
            elif i % 20 < 19:
                with fews.stream(3) as stream:
                    assert list(stream) == [0, 1, 2]
            else:
                with idles.stream(i) as stream:
                    assert next(stream) == i

    def many(count: int) -> dict[str, Any]:
        threads = [threading.Thread(target=some, args=(count // 4,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = states.call(0)
        while held["streams"] > 1:
            held = states.call(0)
        settle()
        return {"server": held, "threads": threading.active_count()}

    announce(many(MIXED // 5))
    say(many(MIXED))
    time.sleep(1000)


async def large() -> None:
    manager = dynwire.AsyncNetworkManager()
    caller = await async_client(manager, "receive")
    say(await caller.call(bytes(16 << 20)))


def reset_peak() -> int:
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


async def send_async() -> None:
    manager = dynwire.AsyncNetworkManager()
    caller = await async_client(manager, "size_of")
    payload = os.urandom(16 << 20)
    await caller.call(b"x")
    before = reset_peak()
    assert await caller.call(payload) == len(payload)
    say(status("VmHWM") - before)


def send_blocking() -> None:
    manager = dynwire.NetworkManager()
    caller = client(manager, "size_of")
    payload = os.urandom(16 << 20)
    caller.call(b"x")
    before = reset_peak()
    assert caller.call(payload) == len(payload)
    say(status("VmHWM") - before)


def main() -> None:
    role, loop, *rest = sys.argv[1:]
    if rest and rest[-1] == "blocking":
        {"drain": drain_blocking, "calls": calls_blocking, "mixed": mixed_blocking, "send": send_blocking}[role]()
        return
    factory: Any = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    made: Any = {"serve": serve, "drain": drain_async, "calls": calls_async, "large": large, "send": send_async}
    made["mixed"] = mixed_async
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(open_idle(int(rest[0])) if role == "idle" else made[role]())


if __name__ == "__main__":
    main()
