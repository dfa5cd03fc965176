"""The server under attack: ``server.py [setting=value …] [--limit name=value …]``. Prints ``ready PORT``."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import dynwire
from dynwire.planes.http import server as http_server
from dynwire.planes.sockets import server as socket_server

ITEM = bytes(65536)


async def echo(request: Any) -> Any:
    return request


async def endless(request: Any) -> AsyncIterator[bytes]:
    while True:
        yield ITEM


async def tokens(request: dynwire.Payload) -> AsyncIterator[bytes]:
    """As many items of one byte as the request has bytes, each in a turn of the loop of its own."""
    for _ in range(len(request)):
        yield b"x"
        await asyncio.sleep(0)


async def wait(request: Any) -> None:
    """Never answers."""
    await asyncio.get_running_loop().create_future()


async def first(request: Any) -> AsyncIterator[bytes]:
    """One item, and then nothing for ever."""
    yield b"x"
    await asyncio.get_running_loop().create_future()


counted = itertools.count(1)


async def count(request: Any) -> int:
    """How many requests have been here so far, this one included. It keeps the loop busy for a while."""
    until = time.perf_counter() + 0.0005
    while time.perf_counter() < until:
        pass
    return next(counted)


async def size(request: dynwire.Payload) -> int:
    return len(request)


async def main(settings: dict[str, Any]) -> None:
    manager = dynwire.AsyncNetworkManager(request_plane="http", http_host="127.0.0.1", http_port=0, **settings)
    for handler in (echo, endless, tokens, wait, size, first, count):
        service = await manager.endpoint(f"a.t.{handler.__name__}").serve(handler)
    port = service.instance.address.rpartition(":")[2].partition("/")[0]
    os.write(1, f"ready {port}\n".encode())
    await asyncio.get_running_loop().create_future()


def use_limits(limits: dict[str, float]) -> None:
    """Limits that are no settings: tests do not want to wait for as long as the defaults."""
    original = http_server.http2_limits
    http_server.http2_limits = lambda config: {**original(config), **limits}  # type: ignore[attr-defined]
    socket_server.HELLO_TIMEOUT_S = limits.get("handshake_s", socket_server.HELLO_TIMEOUT_S)


if __name__ == "__main__":
    given = [argument.split("=", 1) for argument in sys.argv[1:]]
    use_limits({name.removeprefix("--"): float(value) for name, value in given if name.startswith("--")})
    asyncio.run(main({name: value for name, value in given if not name.startswith("--")}))
