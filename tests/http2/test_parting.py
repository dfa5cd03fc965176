"""Connections that are given up with GOAWAY while the peer still sends."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from dynwire.planes.http.parting import Parting
from tests.plane.faces import PATIENCE_S, eventually

from . import frames as f
from .frames import Frame
from .live import ENGINES, PATH, host_port, managing, raw_client

LOOPS = pytest.mark.parametrize("loop_factory", ["asyncio", "uvloop"], indirect=True)

pytestmark = [pytest.mark.usefixtures("discovery_dir"), LOOPS]


async def echo(request: Any) -> Any:
    return request


def until_the_end(sock: socket.socket) -> list[Frame]:
    """What a client reads that sends a broken frame and, before it reads, much more."""
    frames, found = f.FrameReader(), []
    sock.sendall(f.PREFACE + f.settings() + f.SETTINGS_ACK)
    sock.sendall(f.frame(f.PING, 0, 3, bytes(8)) + bytes(200_000))
    while data := sock.recv(65536):  # ConnectionResetError: the server's socket was closed with unread bytes
        found += frames.feed(data)
    return found


@ENGINES
async def test_goaway_can_be_read(engine: str) -> None:
    async with managing(http_engine=engine) as manager:
        address = (await manager.serve(PATH, echo)).instance.address
        parting = manager.real.server().parting
        with socket.create_connection(host_port(address), timeout=PATIENCE_S) as sock:
            frames = await asyncio.to_thread(until_the_end, sock)
            assert [frame.code for frame in frames if frame.type == f.GOAWAY] == [f.PROTOCOL_ERROR]
            await eventually(lambda: len(parting) == 1)
        await eventually(lambda: len(parting) == 0)  # not because its time is over: the client has closed


async def test_closing_the_server_does_not_wait_for_them() -> None:
    async with managing() as manager:
        address = (await manager.serve(PATH, echo)).instance.address
        parting = manager.real.server().parting
        async with raw_client(address) as raw:
            await raw.greet()
            raw.send(f.ping(bytes(8)), f.frame(f.PING, 0, 3, bytes(8)))
            assert (await raw.type(f.GOAWAY)).code == f.PROTOCOL_ERROR
            await eventually(lambda: len(parting) == 1)
            await manager.close()
            assert len(parting) == 0


def parted(parting: Parting) -> socket.socket:
    """Our end of a connection whose other end is parting."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    parting.add(asyncio.get_running_loop(), theirs)
    return ours


async def test_sockets_are_closed_in_time() -> None:
    parting = Parting()
    with parted(parting) as silent, parted(parting) as closing, parted(parting) as talking:
        assert len(parting) == 3
        assert silent.recv(1) == b""  # our side ends at once
        closing.close()
        await eventually(lambda: len(parting) == 2)
        talking.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionError):
            await asyncio.to_thread(talking.sendall, bytes(1_000_000))
        assert len(parting) == 1
        await eventually(lambda: len(parting) == 0)


async def test_they_are_few() -> None:
    parting = Parting()
    others = [parted(parting) for _ in range(32)]
    with parted(parting) as one_more:
        assert len(parting) == 32
        with pytest.raises(ConnectionError):
            one_more.send(b"1")
    parting.close()
    assert len(parting) == 0
    for sock in others:
        sock.close()
