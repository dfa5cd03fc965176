"""Connections that end at random offsets: every call ends, says truthfully whether it ran, and the client recovers."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.testing.proxy import FaultProxy, Faults, running_proxy

from .conftest import DirectClient, Managers, StartWorker, fails, in_time, known_as

ITEMS = 30
ITEM_SIZE = 700


def faults_for(rng: random.Random, reach: int) -> Faults:
    """A cut or a reset within the first ``reach`` bytes, or none; the first bytes (HELLO) get their share."""
    offset = rng.choice([rng.randrange(0, 300), rng.randrange(0, reach), rng.randrange(0, reach)])
    match rng.randrange(5):
        case 0 | 1:
            return Faults(reset_after=offset)
        case 2 | 3:
            return Faults(cut_after=offset)
    return Faults()


async def one_unary(client: DirectClient, n: int, payload: bytes | None) -> str:
    request: dict[str, Any] = {"n": n}
    if payload is not None:
        request["data"] = payload
    try:
        assert await client.call(request, timeout=10.0) == request
    except dynwire.DynwireError as error:
        assert error.sent in ("no", "maybe", "yes")
        return error.sent
    return "ok"


async def one_stream(client: DirectClient, n: int) -> str:
    got = 0
    try:
        async with client.stream({"n": n, "items": ITEMS, "size": ITEM_SIZE}, timeout=10.0) as stream:
            async for number, index, data in stream:
                assert (number, index, len(data)) == (n, got, ITEM_SIZE)
                got += 1
    except dynwire.PeerLost as error:
        assert error.delivered == got
        assert error.sent == "yes" or got == 0
        return error.sent
    except dynwire.DynwireError as error:
        assert got == 0, error
        return error.sent
    assert got == ITEMS
    return "ok"


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ["unary", "large", "stream"])
async def test_random_ends_of_connections(
    managers: Managers, start_worker: StartWorker, discovery_dir: Path, kind: str, seed: int
) -> None:
    worker = start_worker()
    rng = random.Random(seed)
    payload = random.Random(seed).randbytes(200 * 1024)
    up, down = {"unary": (1000, 1000), "large": (3_000_000, 3_000_000), "stream": (1000, 45_000)}[kind]

    def plan(number: int) -> tuple[Faults, Faults]:
        return faults_for(rng, up), faults_for(rng, down)

    endpoint = "f.w.counted_stream" if kind == "stream" else "f.w.counted"
    ends: dict[int, str] = {}
    async with FaultProxy(worker.address, plan=plan) as proxy, managers() as manager:
        client = DirectClient(manager, endpoint, proxy.address)

        async def one(n: int) -> str:
            return await (
                one_stream(client, n) if kind == "stream" else one_unary(client, n, payload if kind == "large" else None)
            )

        async def caller(first: int) -> None:
            for n in range(first, first + 12):
                ends[n] = await one(n)

        await asyncio.gather(*(caller(i * 1000) for i in range(4)))
        # From here on connections stay whole. Those that ended are noticed by the next call on them, at the latest.
        proxy.plan = lambda number: (Faults(), Faults())
        broken = proxy.accepted
        proxy.break_all("reset")
        after = [await one(9000 + i) for i in range(broken + 4)]
        assert after[-4:] == ["ok"] * 4, after
    async with managers(discovery_file_dir=str(discovery_dir)) as manager:
        report = await (await manager.client("f.w.report")).call(0)
    executed = dict(report["executed"])
    assert len(ends) == 48
    for n, end in ends.items():
        times = executed.get(n, 0)
        assert times <= 1, f"request {n} ran {times} times, its caller saw {end}"
        if end == "no":
            assert times == 0, f"request {n} ran, its caller was told that it was not sent"
        elif end in ("ok", "yes"):
            assert times == 1, f"request {n} did not run, its caller saw {end}"
    assert {"ok"} < set(ends.values()), f"the faults hit nothing, or everything: {ends}"


@pytest.mark.parametrize("end", ["cut", "reset"])
async def test_the_end_of_a_connection_inside_a_request(managers: Managers, start_worker: StartWorker, end: str) -> None:
    """A caller that dies while it sends harms nobody else."""
    worker = start_worker()
    faults = Faults(cut_after=100_000) if end == "cut" else Faults(reset_after=100_000)
    async with FaultProxy(worker.address, to_server=faults) as proxy, managers() as manager:
        error, _ = await fails(DirectClient(manager, "f.w.echo", proxy.address).call(b"x" * 200_000), dynwire.PeerLost)
        assert error.sent == "maybe"
        assert await DirectClient(manager, "f.w.echo", worker.address).call(1) == 1


async def test_a_stalled_network(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with FaultProxy(worker.address) as proxy, managers(tcp_pool_size=1) as manager:
        client = DirectClient(manager, "f.w.echo", proxy.address)
        assert await client.call(1) == 1
        proxy.stall()
        error, seconds = await fails(client.call(1, timeout=0.5), dynwire.DeadlineExceeded)
        in_time(seconds, 0.5)
        assert error.sent == "maybe"
        proxy.resume()
        assert await client.call(2) == 2


async def test_a_slow_network_is_no_fault(managers: Managers, start_worker: StartWorker, tmp_path: Path) -> None:
    worker = start_worker()
    slow = Faults(delay=0.02)
    other = tmp_path / "other"
    other.mkdir()
    async with (
        FaultProxy(worker.address, to_server=slow, to_client=slow) as proxy,
        managers(discovery_file_dir=str(other)) as manager,
        known_as(manager, "f.w.echo", proxy.address, other) as client,
    ):
        started = time.monotonic()
        assert await client.call("x") == "x"
        assert time.monotonic() - started >= 0.04
        assert bytes(await client.call(b"x" * 300_000)) == b"x" * 300_000


@pytest.mark.parametrize("face", ["async-asyncio"], indirect=True)
async def test_the_proxy_itself(face: str) -> None:
    """Its offsets are exact, and a cut and a reset look different."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def through(proxy: FaultProxy) -> tuple[bytes, str]:
        host, port = proxy.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"x" * 1000)
        got = b""
        try:
            while data := await reader.read(100):
                got += data
            end = "cut"
        except ConnectionResetError:
            end = "reset"
        writer.close()
        return got, end

    async with FaultProxy(target, to_client=Faults(cut_after=77)) as proxy:
        assert await through(proxy) == (b"x" * 77, "cut")
    async with FaultProxy(target, to_server=Faults(cut_after=33)) as proxy:
        got, end = await through(proxy)
        assert len(got) <= 33
        assert proxy.forwarded[0] == 33
    async with FaultProxy(target, to_client=Faults(reset_after=50)) as proxy:
        got, end = await through(proxy)
        assert (len(got) <= 50, end) == (True, "reset")
    server.close()
    await server.wait_closed()


@pytest.mark.planes("tcp")
@pytest.mark.parametrize("face", ["blocking"], indirect=True)
def test_the_proxy_for_blocking_code(start_worker: StartWorker, face: str) -> None:
    import socket

    worker = start_worker()
    with running_proxy(worker.address, to_client=Faults(stall_after=0)) as proxy:
        host, port = proxy.address.split(":")
        with socket.create_connection((host, int(port)), 5) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
