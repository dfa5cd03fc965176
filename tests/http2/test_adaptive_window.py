"""The window that grows with the path. How fast replies then are is measured by benchmarks/adaptive_window.py."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.plane.faces import PATIENCE_S, eventually

from . import frames as f
from .delayed import delayed
from .live import ENGINES, FACES, ONE_LOOP, PATH, ROOT, Direct, Raw, host_port, managing, raw_client, raw_server

pytestmark = pytest.mark.usefixtures("discovery_dir")

KIB = 1024
MIB = 1024 * KIB
LIMIT = 16 * MIB
IDLE_LIMIT = 64 * KIB


async def fill(raw: Raw, stream: int, body: bytes) -> list[int]:
    """Send a body, always as much as the windows allow; returns the initial windows that the peer announced, in order.

    Frames of the peer are read when a window is used up: the window is what limits this sender, however fast the machine is.
    Its PINGs are not answered.
    """
    announced = [raw.settings[f.INITIAL_WINDOW_SIZE]]
    connection = 65535 + sum(frame.increment for frame in raw.seen if frame.type == f.WINDOW_UPDATE and frame.stream == 0)
    window = announced[0]
    at = 0
    async with asyncio.timeout(PATIENCE_S):
        while at < len(body):
            n = min(connection, window, 16384, len(body) - at)
            if n > 0:
                raw.send(f.data(stream, body[at : at + n], end=at + n == len(body)))
                at += n
                connection -= n
                window -= n
                continue
            frame = await raw.next()
            assert frame is not None, raw.story()
            if frame.type == f.WINDOW_UPDATE and frame.stream == 0:
                connection += frame.increment
            elif frame.type == f.WINDOW_UPDATE and frame.stream == stream:
                window += frame.increment
            elif frame.type == f.SETTINGS and not frame.ack:
                raw.send(f.SETTINGS_ACK)
                announced.append(dict(frame.settings)[f.INITIAL_WINDOW_SIZE])
                window += announced[-1] - announced[-2]
    return announced


def expected(adaptive: bool) -> list[int]:
    return [MIB, 4 * MIB, LIMIT] if adaptive else [MIB]


@ENGINES
@FACES
@pytest.mark.parametrize("adaptive", [True, False])
async def test_a_reply_that_fills_the_window(face: str, engine: str, adaptive: bool) -> None:
    """The round trip never ends, so everything counts: the window grows to its limit while data arrive, and stays there."""
    body = b'"' + b"x" * (20 * MIB) + b'"'
    announced: list[int] = []

    async def script(raw: Raw) -> None:
        await raw.welcome()
        stream = await raw.request()
        raw.send(f.headers(stream, f.block([(b":status", b"200"), (b"content-type", b"application/json")])))
        announced.extend(await fill(raw, stream, body))
        await raw.until_closed()

    async with raw_server(script) as server, managing(face, http_engine=engine, http_adaptive_window=adaptive) as manager:
        direct = Direct(manager, server.address)
        assert len(await direct.call(0)) == 20 * MIB
        (row,) = direct.stats()
        assert announced == expected(adaptive)
        assert row["window"] == announced[-1]
        await direct.close()


@ENGINES
@ONE_LOOP
@pytest.mark.parametrize("adaptive", [True, False])
async def test_a_request_that_fills_the_window(engine: str, adaptive: bool) -> None:
    async def size(request: Any) -> int:
        return len(request)

    async with managing(http_engine=engine, http_adaptive_window=adaptive) as manager:
        service = await manager.serve(PATH, size)
        async with raw_client(service.instance.address) as raw:
            await raw.greet()
            raw.post(1, body=None)
            announced = await fill(raw, 1, b'"' + b"x" * (20 * MIB) + b'"')
            status, _, reply = await raw.reply(1)
            assert (status, json.loads(reply)) == (200, 20 * MIB)
            assert announced == expected(adaptive)
            (row,) = manager.real.server().stats()
            assert row["window"] == announced[-1]


@FACES
@pytest.mark.parametrize("adaptive", [True, False])
async def test_over_a_path_with_a_delay(face: str, adaptive: bool) -> None:
    """25 ms each way. Both roles grow; and what served a window of 16 MiB is gone when the connection is idle."""
    payload = bytes(8 * MIB)

    async def echo(request: Any) -> Any:
        return request

    settings = {"http_adaptive_window": adaptive}
    async with managing(**settings) as server, managing(face, **settings) as caller:
        service = await server.serve(PATH, echo)
        async with delayed(*host_port(service.instance.address)) as port:
            direct = Direct(caller, f"http://127.0.0.1:{port}{ROOT}")

            def rows() -> list[dict[str, Any]]:
                return [*direct.stats(), *server.real.server().stats()]

            assert await direct.call(payload) == payload
            if adaptive:
                async with asyncio.timeout(PATIENCE_S):  # a machine that is busy elsewhere needs more than one
                    while min(row["window"] for row in rows()) < 8 * MIB:
                        assert await direct.call(payload) == payload
            assert len(rows()) == 2
            assert all(8 * MIB <= row["window"] <= LIMIT if adaptive else row["window"] == MIB for row in rows())
            await asyncio.gather(*(direct.call("x" * 1000) for _ in range(300)))  # framed in copies, unlike large ones
            # an idle blocking client may keep a PING or its answer until the next call, so the backlog need not be 0
            await eventually(lambda: all(row["held"] + row["backlog"] + row["body_bytes"] <= IDLE_LIMIT for row in rows()))
            await direct.close()
