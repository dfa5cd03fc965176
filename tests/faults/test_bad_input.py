"""What users get wrong: a typed error at once, with the value, the limit and the setting to change."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire import BindError, ConfigError, DynwireError, EndpointNotFound, MessageTooLarge

from .conftest import DirectClient, Managers, StartWorker, fails


async def echo(request: Any) -> Any:
    return request


async def test_an_oversized_request(managers: Managers, start_worker: StartWorker) -> None:
    start_worker()
    async with managers(tcp_max_message_size=100_000, tcp_pool_size=1) as manager:
        client = await manager.client("f.w.echo")
        await client.call(0)
        error, seconds = await fails(client.call(b"x" * 100_001), MessageTooLarge)
        assert (error.size, error.limit, error.setting) == (100_001, 100_000, "DYN_TCP_MAX_MESSAGE_SIZE")
        assert (error.sent, error.retryable) == ("no", False)
        for word in ("100001", "100000", "DYN_TCP_MAX_MESSAGE_SIZE"):
            assert word in str(error)
        assert seconds < 1
        assert len(bytes(await client.call(b"x" * 100_000))) == 100_000


async def test_a_request_that_the_worker_does_not_take(managers: Managers, start_worker: StartWorker) -> None:
    """The limits of both sides are known after HELLO: the smaller one holds, before anything is sent."""
    start_worker(tcp_max_message_size=50_000)
    async with managers() as manager:
        client = await manager.client("f.w.echo")
        error, _ = await fails(client.call(b"x" * 60_000), MessageTooLarge)
        assert (error.size, error.limit, error.sent) == (60_000, 50_000, "no")
        assert await client.call(1) == 1


async def test_an_oversized_reply(managers: Managers, start_worker: StartWorker) -> None:
    start_worker()
    async with managers(tcp_max_message_size=50_000) as manager:
        client = await manager.client("f.w.counted_stream")
        with pytest.raises(DynwireError) as caught:
            await client.items({"n": 1, "items": 3, "size": 60_000})
        assert isinstance(caught.value, MessageTooLarge), caught.value
        assert caught.value.limit == 50_000
        assert caught.value.sent == "yes"
        assert len(await client.items({"n": 2, "items": 3, "size": 10_000})) == 3


async def test_an_unknown_endpoint(managers: Managers, start_worker: StartWorker) -> None:
    worker = start_worker()
    async with managers() as manager:
        error, seconds = await fails(DirectClient(manager, "f.w.nothing", worker.address).call(1), EndpointNotFound)
        assert seconds < 2
        assert (error.endpoint, error.sent) == ("f.w.nothing", "no")
        client = await manager.client("f.w.nowhere", wait=0)
        error, seconds = await fails(client.call(1), dynwire.NoInstances)
        assert error.endpoint == "f.w.nowhere"
        assert seconds < 2


@pytest.mark.planes("tcp")
async def test_a_port_in_use(managers: Managers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with managers(tcp_port=port) as manager:
            error, _ = await fails(manager.serve("f.here.echo", echo), BindError)
            assert error.address == f"127.0.0.1:{port}"
            assert "DYN_TCP_RPC_PORT" in str(error)
            assert str(port) in str(error)
            assert await manager.list_instances("f.here.echo") == ()


@pytest.mark.planes("tcp")
async def test_an_address_of_somebody_else(managers: Managers) -> None:
    async with managers(tcp_host="192.0.2.1") as manager:
        error, _ = await fails(manager.serve("f.here.echo", echo), BindError)
        assert "192.0.2.1" in error.address
        assert "DYN_TCP_RPC_HOST" in str(error)


@pytest.mark.planes("tcp")
async def test_an_unwritable_discovery_directory(managers: Managers, tmp_path: Path) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    for place in (str(file / "below"), "/proc/dynwire-test"):
        async with managers(discovery_file_dir=place) as manager:
            error, seconds = await fails(manager.serve("f.here.echo", echo), DynwireError)
            assert place in str(error)
            assert "DYN_FILE_KV" in str(error)
            assert seconds < 2


@pytest.mark.parametrize("face", ["async-asyncio"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYN_TCP_RPC_PORT", "70000"),
        ("DYN_TCP_RPC_PORT", "http"),
        ("DYN_TCP_MAX_MESSAGE_SIZE", "-1"),
        ("DYN_TCP_MAX_MESSAGE_SIZE", "99999999999"),
        ("DYN_TCP_REQUEST_TIMEOUT", "nan"),
        ("DYN_TCP_REQUEST_TIMEOUT", "soon"),
        ("DYN_TCP_POOL_SIZE", "0"),
        ("DYN_TCP_CHANNEL_BUFFER", "1.5"),
        ("DYNWIRE_TCP_STREAM_WINDOW", "1"),
        ("DYNWIRE_CODEC", "pickle"),
        ("DYN_DISCOVERY_BACKEND", "zookeeper"),
        ("DYNWIRE_DISCOVERY_TTL", "0"),
        ("DYNWIRE_TCP_KEEPALIVE_INTERVAL", "-3"),
        ("DYNWIRE_TCP_ADVERTISE_HOST", "0.0.0.0"),
        ("DYNWIRE_CONFIG", "/nowhere/at/all.toml"),
    ],
)
def test_invalid_settings(monkeypatch: pytest.MonkeyPatch, face: str, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    for cls in (dynwire.NetworkManager, dynwire.AsyncNetworkManager):
        with pytest.raises(ConfigError) as caught:
            cls()
        assert caught.value.name == name
        assert name in str(caught.value)
        assert value in str(caught.value)
    assert os.environ[name] == value


@pytest.mark.parametrize("timeout", [0, 0.0, -1.0])
async def test_a_deadline_that_has_passed(managers: Managers, start_worker: StartWorker, timeout: float) -> None:
    start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.echo")
        await client.call(0)
        _, seconds = await fails(client.call(1, timeout=timeout), dynwire.DeadlineExceeded)
        assert seconds < 1


async def test_a_payload_that_nobody_can_encode(managers: Managers, start_worker: StartWorker) -> None:
    start_worker()
    async with managers() as manager:
        client = await manager.client("f.w.echo")
        for payload in (object(), {"a": object()}, lambda: 1, 1 << 200, "\ud800"):
            with pytest.raises((DynwireError, TypeError, ValueError, OverflowError, UnicodeEncodeError)) as caught:
                await client.call(payload)
            if isinstance(caught.value, DynwireError):
                assert caught.value.sent == "no"
        assert await client.call(1) == 1
