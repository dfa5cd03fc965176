"""A request whose payload stops arriving: the worker gives its memory back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire._buffers import get_pool
from dynwire._frames import EventConnection


@pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
async def test_a_payload_that_never_arrives_is_given_up(discovery_dir: Path) -> None:
    async def echo(request: Any) -> Any:
        return request

    async with dynwire.AsyncNetworkManager(discovery_file_dir=str(discovery_dir), tcp_host="127.0.0.1") as manager:
        service = await manager.endpoint("a.b.echo").serve(echo)
        host, port = service.instance.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        before = get_pool().stats()["in_use_bytes"]
        client = EventConnection(True)
        try:
            await _stop_in_the_middle(client, reader, writer)
            assert get_pool().stats()["in_use_bytes"] == before
        finally:
            writer.close()
            await writer.wait_closed()


async def _stop_in_the_middle(client: EventConnection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    client.start(software="test", connection_id=b"12345678")
    writer.write(client.output())
    events: list[Any] = []
    while not events:
        events = client.receive(await reader.read(65536))
    assert client.request("a.b.echo", bytes(1 << 20), timeout_ms=100) == 0
    writer.write(client.output(limit=5000))
    events = []
    while not events:
        data = await reader.read(65536)
        assert data, "the worker closed the connection instead of answering"
        events = [event for event in client.receive(data) if event[0] == "error"]
    assert b"deadline_exceeded" in events[0][3] and b"of the request's 1048576 bytes only" in events[0][3]
