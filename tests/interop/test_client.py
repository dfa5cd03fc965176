"""Our clients against servers that are not ours."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dynwire
from tests.faults.conftest import Managers
from tests.plane.faces import PATIENCE_S, eventually

from .conftest import Direct, StartForeign
from .programs import HERE, Foreign, module, program

NodeServer = Callable[[str], Foreign]


def address(server: Foreign) -> str:
    return f"http://127.0.0.1:{server.port}/v1/rpc"


async def many(client: Direct, count: int) -> list[Any]:
    return list(await asyncio.gather(*(client.call({"n": n}) for n in range(count))))


def numbers(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


# nghttpd ---------------------------------------------------------------------------------------------------------------------


async def test_nghttpd(managers: Managers, start_foreign: StartForeign, free_port: int, tmp_path: Path) -> None:
    """It answers a POST with a file, and echoes the body when asked to."""
    root = tmp_path / "files"
    (root / "v1/rpc/a/b").mkdir(parents=True)
    (root / "v1/rpc/a/b/file").write_bytes(b"static file")
    server = start_foreign([program("nghttpd"), "--no-tls", "-d", str(root), "--echo-upload", str(free_port)], free_port)
    async with managers(request_plane="http") as manager:
        echo = Direct(manager, address(server))
        assert await echo.call(b"echoed") == b"echoed"
        large = bytes(range(256)) * 8000
        assert await echo.call(large) == large
        assert await asyncio.gather(*(echo.call(b"%d" % n) for n in range(150))) == [b"%d" % n for n in range(150)]


async def test_nghttpd_static_file(managers: Managers, start_foreign: StartForeign, free_port: int, tmp_path: Path) -> None:
    root = tmp_path / "files"
    (root / "v1/rpc/a/b").mkdir(parents=True)
    (root / "v1/rpc/a/b/file").write_bytes(b"static file")
    server = start_foreign([program("nghttpd"), "--no-tls", "-d", str(root), str(free_port)], free_port)
    async with managers(request_plane="http") as manager:
        assert await Direct(manager, address(server), "a.b.file").call(b"") == b"static file"
        with pytest.raises(dynwire.EndpointNotFound):
            await Direct(manager, address(server), "a.b.other").call(b"")


# Node ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "padded", "tiny-windows", "no-table", "one-stream", "fewer-streams"])
async def test_node(managers: Managers, node_server: NodeServer, mode: str) -> None:
    server = node_server(mode)
    async with managers(request_plane="http", codec="json") as manager:
        echo = Direct(manager, address(server))
        assert await echo.call({"first": 1}) == {"first": 1}
        if mode == "fewer-streams":
            async with asyncio.timeout(PATIENCE_S):
                while "lowered" not in server.said():  # a blocking client reads, and so acknowledges, when it is called
                    await echo.call({})
        assert await many(echo, 40) == numbers(40)
        large = b"L" * (3000 if mode == "tiny-windows" else 2_000_000)
        assert await echo.call(large) == large
        items = Direct(manager, address(server), "f.w.items")
        found = await items.items(300)
        assert [item["i"] for item in found] == list(range(300)) and found[-1]["text"] == "x" * 299
        await eventually(lambda: "most" in server.said())
        if mode in ("one-stream", "fewer-streams"):
            most = max(map(int, re.findall(r"most (\d+)", server.said())))
            assert most <= (1 if mode == "one-stream" else 2)
    # A socket that we close with frames unread (an acknowledgement, say) is reset; wrong frames of ours would stand there too.
    assert "error" not in server.said().replace("session error read ECONNRESET", "")


async def test_node_headers_trailers_and_pages(managers: Managers, node_server: NodeServer) -> None:
    server = node_server("plain")
    async with managers(request_plane="http", codec="json") as manager:
        head = await Direct(manager, address(server), "f.w.headers").call({})
        assert head[":method"] == "POST" and head[":path"] == "/v1/rpc/f/w/headers" and head[":scheme"] == "http"
        assert head[":authority"] == f"127.0.0.1:{server.port}"
        for name in ("trailers", "informational"):
            assert await Direct(manager, address(server), f"f.w.{name}").call({"a": 1}) == {"a": 1}
        with pytest.raises(dynwire.PeerLost, match=r"503.*out to lunch"):
            await Direct(manager, address(server), "f.w.page").call({})
        with pytest.raises(dynwire.ProtocolError, match="please log in"):
            await Direct(manager, address(server), "f.w.login").call({})
        assert await Direct(manager, address(server)).call("still") == "still"


@pytest.mark.parametrize("mode", ["refuse-first", "goaway", "close"])
async def test_node_not_processed(managers: Managers, node_server: NodeServer, mode: str, known_at: Callable[..., Any]) -> None:
    """REFUSED_STREAM, GOAWAY with a lower last stream, a graceful close: what was not processed is sent again, unseen."""
    server = node_server(mode)
    async with (
        managers(request_plane="http", codec="json") as manager,
        known_at(manager, "f.w.echo", address(server)) as client,
    ):
        for n in range(6):
            assert await client.call({"n": n}) == {"n": n}
        assert await asyncio.gather(*(client.call({"n": n}) for n in range(20))) == numbers(20)
    said = server.said()
    assert {"refuse-first": "refused", "goaway": "goaway", "close": "leaving"}[mode] in said, said


# hypercorn -------------------------------------------------------------------------------------------------------------------

# --workers 0: in the process itself; its worker processes would outlive it when it is killed


async def test_hypercorn(managers: Managers, start_foreign: StartForeign, free_port: int) -> None:
    module("hypercorn", "hypercorn")
    command = [sys.executable, "-m", "hypercorn", "--workers", "0", "--bind", f"127.0.0.1:{free_port}", "asgi:app"]
    server = start_foreign(command, free_port, HERE)
    async with managers(request_plane="http", codec="json") as manager:
        assert await Direct(manager, address(server), "f.w.version").call({}) == "2"
        echo = Direct(manager, address(server))
        assert await many(echo, 60) == numbers(60)
        large = b"h" * 300_000
        assert await echo.call(large) == large


async def test_hypercorn_ends_connections(
    managers: Managers, start_foreign: StartForeign, free_port: int, tmp_path: Path, known_at: Callable[..., Any]
) -> None:
    """After ten requests on a connection it says GOAWAY, counts the eleventh as processed, and never answers it (0.18).

    That one may have run: it is not sent again, its own deadline or the lost connection ends it. The next ones do not notice.
    """
    module("hypercorn", "hypercorn")
    (tmp_path / "hypercorn.toml").write_text(f'bind = "127.0.0.1:{free_port}"\nkeep_alive_max_requests = 10\n')
    command = [sys.executable, "-m", "hypercorn", "--workers", "0", "--config", str(tmp_path / "hypercorn.toml"), "asgi:app"]
    server = start_foreign(command, free_port, HERE)
    async with managers(request_plane="http", codec="json") as manager, known_at(manager, "f.w.echo", address(server)) as client:
        async with asyncio.timeout(PATIENCE_S):
            lost = []
            for n in range(45):
                try:
                    assert await client.call({"n": n}, timeout=1.0) == {"n": n}
                except (dynwire.PeerLost, dynwire.DeadlineExceeded) as error:
                    assert error.sent == "maybe", error
                    lost.append(n)
    assert lost == [10, 21, 32, 43]
