"""Requests that are answered before they have ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from . import frames as f
from .live import ENGINES, ONE_LOOP, PATH, Raw, managing, raw_client

pytestmark = [pytest.mark.usefixtures("discovery_dir"), ONE_LOOP]


async def echo(request: Any) -> Any:
    return request


@asynccontextmanager
async def greeted(**settings: Any) -> AsyncIterator[Raw]:
    """A raw connection to a server with these settings."""
    async with managing(**settings) as manager, raw_client((await manager.serve(PATH, echo)).instance.address) as raw:
        await raw.greet()
        yield raw


async def refused(raw: Raw, stream: int, *extra: f.Field) -> None:
    """A request that a page does not take, whose body is still to come, and the whole answer."""
    raw.post(stream, *extra, path="/live", body=None)
    assert (await raw.reply(stream))[0] == 405


async def alive(raw: Raw) -> None:
    raw.send(f.ping(b"-alive?-"))
    await raw.until(lambda frame: frame.type == f.PING and frame.ack)


def resets(raw: Raw) -> list[tuple[int, int]]:
    return [(frame.stream, frame.code) for frame in raw.seen if frame.type == f.RST_STREAM]


LENGTH_1 = ((b"content-length", b"1"),)
FAULTS = {
    "more than content-length": (LENGTH_1, [f.data(1, b"test", end=True)], f.PROTOCOL_ERROR),
    "less than content-length": (LENGTH_1, [f.data(1, b"", end=True)], f.PROTOCOL_ERROR),
    "trailers without END_STREAM": ((), [f.headers(1, f.block([(b"x-test", b"ok")]), end=False)], f.PROTOCOL_ERROR),
    "pseudo-header in trailers": ((), [f.headers(1, f.block([(b":method", b"POST")]), end=True)], f.PROTOCOL_ERROR),
    "WINDOW_UPDATE by 0": ((), [f.window_update(1, 0)], f.PROTOCOL_ERROR),
    "window above 2^31-1": ((), [f.window_update(1, f.MAX_WINDOW)], f.FLOW_CONTROL_ERROR),
    "DATA after RST_STREAM": ((), [f.rst_stream(1), f.data(1, b"test", end=True)], f.STREAM_CLOSED),
    "HEADERS after RST_STREAM": ((), [f.rst_stream(1), f.headers(1, f.block([(b"x", b"y")]), end=True)], f.STREAM_CLOSED),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_rest_is_checked(fault: str) -> None:
    extra, rest, code = FAULTS[fault]
    async with greeted() as raw:
        await refused(raw, 1, *extra)
        raw.send(*rest)
        assert (await raw.type(f.RST_STREAM)).code == code
        await alive(raw)
        assert resets(raw) == [(1, code)]


@ENGINES
@pytest.mark.parametrize("size", [0, 1000, 65536])
async def test_a_short_rest_ends_by_itself(engine: str, size: int) -> None:
    async with greeted(http_engine=engine) as raw:
        await refused(raw, 1)
        for at in range(0, size, 16384):
            raw.send(f.data(1, bytes(min(16384, size - at))))
        raw.send(f.data(1, b"", end=True))
        raw.post(3)
        assert await raw.reply(3) == (200, raw.fields[3][0], b"1")
        assert resets(raw) == []


@ENGINES
async def test_a_long_rest_is_not_wanted(engine: str) -> None:
    async with greeted(http_engine=engine) as raw:
        await refused(raw, 1)
        for _ in range(5):
            raw.send(f.data(1, bytes(16384)))
        assert (await raw.type(f.RST_STREAM, 1)).code == f.NO_ERROR
        await alive(raw)
        assert resets(raw) == [(1, f.NO_ERROR)]


@ENGINES
async def test_few_may_be_unfinished(engine: str) -> None:
    async with greeted(http_engine=engine) as raw:
        for stream in range(1, 17, 2):
            await refused(raw, stream)
        await alive(raw)
        assert resets(raw) == []
        await refused(raw, 17)
        assert (await raw.type(f.RST_STREAM)).code == f.NO_ERROR
        raw.send(f.data(3, b"1", end=True))  # makes room
        await refused(raw, 19)
        await alive(raw)
        assert resets(raw) == [(1, f.NO_ERROR)]


@ENGINES
@pytest.mark.parametrize("limit", [7, 8])
async def test_they_leave_room_for_others(engine: str, limit: int) -> None:
    async with greeted(http_engine=engine, http_max_concurrent_streams=limit) as raw:
        streams = range(1, 41, 2)
        for stream in streams:
            await refused(raw, stream)
        raw.post(41)
        assert (await raw.reply(41))[0] == 200
        await alive(raw)
        unfinished = limit // 8
        assert resets(raw) == [(stream, f.NO_ERROR) for stream in streams[: len(streams) - unfinished]]
