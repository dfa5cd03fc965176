"""What looks like an attack and is none: 100,000 tiny DATA frames, as of an answer in tokens, to or by somebody slow."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.http2 import frames as f
from tests.http2.live import ENGINES, ONE_LOOP, Direct, Raw, managing, raw_server
from tests.plane.faces import PATIENCE_S, eventually

from .conftest import Server, request

COUNT = 100_000
ITEM = struct.Struct(">BI")


def items_of(body: bytes) -> list[bytes]:
    """The payloads of application/vnd.dynwire.items"""
    found, at = [], 0
    while at < len(body):
        _, size = ITEM.unpack_from(body, at)
        found.append(body[at + ITEM.size : at + ITEM.size + size])
        at += ITEM.size + size
    assert at == len(body)
    return found


@pytest.mark.hard_timeout(120)
def test_our_server_sends_to_a_slow_reader(server: Server) -> None:
    """Items that wait for it share frames. It grants every frame's bytes again, on the stream and on the connection."""
    reader = server.attacker()
    reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    reader.send(request(1, "tokens"))
    for first in range(0, COUNT, 10_000):
        reader.send(f.data(1, bytes(10_000), end=first + 10_000 == COUNT))
    at, ended = len(reader.frames), False
    body = bytearray()
    data_frames = 0
    while not ended:
        assert select.select([reader.sock], [], [], PATIENCE_S)[0] and not reader.closed, reader.story()
        reader.take(16384)
        granted = bytearray()
        for frame in reader.frames[at:]:
            assert frame.type not in (f.RST_STREAM, f.GOAWAY), reader.story()
            if frame.type == f.DATA:
                data_frames += 1
                body += frame.body
                ended = frame.end_stream
                if frame.payload:
                    granted += f.window_update(0, len(frame.payload)) + f.window_update(1, len(frame.payload))
        at = len(reader.frames)
        reader.send(bytes(granted), read=False)
        time.sleep(0.001)  # the reader's pace
    print(f"{COUNT} items in {data_frames} frames")
    assert [item for item in items_of(bytes(body)) if item] == [b"x"] * COUNT
    reader.alive()
    server.victim.call()


@pytest.mark.hard_timeout(120)
def test_a_slow_sender_and_our_server_that_is_slow_too(server: Server) -> None:
    """It does not run for some time: what has come meanwhile is read in one piece."""
    rng = random.Random(1)
    pieces = [f.data(1, bytes(rng.randint(1, 60))) for _ in range(COUNT)]
    total = sum(len(piece) - 9 for piece in pieces)
    sender = server.attacker()
    sender.send(request(1, "size"))
    for first in range(0, COUNT // 10, 100):
        sender.send(*pieces[first : first + 100])
        time.sleep(0.0005)  # the sender's pace
    rest = memoryview(b"".join(pieces[COUNT // 10 :]))
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        while rest and select.select([], [sender.sock], [], 0.1)[1]:
            rest = rest[sender.sock.send(rest[:65536]) :]
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    sender.send(bytes(rest), f.data(1, end=True))
    assert items_of(sender.body(1))[0] == struct.pack(">BI", 0xCE, total), "an integer of msgpack"
    assert not sender.resets()
    sender.alive()
    server.victim.call()


@ENGINES
@ONE_LOOP
async def test_our_client_is_slow(discovery_dir: Path, engine: str) -> None:
    """All of the answer has come before the application reads the second token."""
    item = ITEM.pack(2, 1) + b"1"
    sent = asyncio.Event()

    async def script(raw: Raw) -> None:
        await raw.welcome()
        stream = await raw.request()
        raw.send(f.headers(stream, f.block([(b":status", b"200"), (b"content-type", b"application/vnd.dynwire.items")])))
        raw.send(*[f.data(stream, item)] * (COUNT - 1), f.data(stream, item, end=True))
        await raw.writer.drain()
        sent.set()
        await raw.until_closed()

    async with raw_server(script) as far, managing(http_engine=engine) as manager:
        direct = Direct(manager, far.address)
        channel: Any = direct.channel
        await channel.connect()
        stream = channel.stream(0, PATIENCE_S)
        assert await anext(stream) == 1
        await sent.wait()
        await eventually(lambda: direct.stats()[0]["rx_bytes"] >= COUNT * len(f.data(1, item)))
        assert [token async for token in stream] == [1] * (COUNT - 1)
        await direct.close()
