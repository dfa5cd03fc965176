"""Runs the frontend on granian or uvicorn, from binding its port to the last answer after a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from ..config import Config, is_wildcard
from ..errors import BindError, ConfigError
from ..workers.process import Signals
from .app import Frontend

START_S = 10.0
STOP_S = 2.0
"""what the HTTP server itself may take to stop, after the answers have ended"""
CUT_S = 0.5
"""for the error events of answers that are cut"""
BACKLOG = 1024
GC_OBJECTS = 20_000
"""new containers between two looks for cycles; requests in flight hold a few hundred each"""


def listen_host(config: Config) -> str:
    """The address to bind: loopback when discovery cannot reach beyond this machine anyway."""
    if config.frontend.host is not None:
        return config.frontend.host.removeprefix("[").removesuffix("]")
    return "127.0.0.1" if config.discovery.backend in ("file", "mem") else "0.0.0.0"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that is not listening yet. Raises `BindError` with what to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise BindError(f"no socket for {host}: {error.strerror}", address=f"{host}:{port}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise BindError(
            f"the frontend cannot listen at {host}:{port}: {error.strerror}; choose another port with --http-port or "
            "DYN_HTTP_PORT (0: any free one), or another address with --http-host or DYN_HTTP_HOST",
            address=f"{host}:{port}",
        ) from error
    return sock


class GranianServer:
    """granian in this process: HTTP is read and written by threads of its own, outside of the GIL."""

    def __init__(self, app: Any, sock: socket.socket) -> None:
        try:
            from granian.constants import Interfaces
            from granian.http import HTTP1Settings
            from granian.server.embed import Server
        except ImportError as error:
            raise ConfigError("the frontend needs granian: pip install 'dynwire[frontend]'", name="granian") from error
        host, port = sock.getsockname()[:2]
        # It binds by itself, with SO_REUSEPORT, and would share the port with another one without a word: hence the first bind.
        sock.close()
        self._server: Any = Server(
            app,
            address=host,
            port=port,
            interface=Interfaces.ASGINL,
            websockets=False,
            backlog=BACKLOG,
            backpressure=BACKLOG * 64,
            http1_settings=HTTP1Settings(),
            log_enabled=False,
        )

    async def serve(self) -> None:
        """Until `stop`."""
        await self._server.serve()

    def stop(self) -> None:
        self._server.stop()


class UvicornServer:
    """uvicorn in this process, on the loop of everything else."""

    def __init__(self, app: Any, sock: socket.socket) -> None:
        try:
            import uvicorn
        except ImportError as error:
            text = "DYNWIRE_FRONTEND_SERVER is uvicorn, which is not installed: pip install uvicorn httptools"
            raise ConfigError(text, name="DYNWIRE_FRONTEND_SERVER", value="uvicorn", allowed="granian, or uvicorn") from error

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are ours: they begin a drain

        self._sock = sock
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = Server(config)

    async def serve(self) -> None:
        """Until `stop`."""
        await self._server.serve(sockets=[self._sock])

    def stop(self) -> None:
        self._server.should_exit = True


async def serve(config: Config) -> bool:
    """Serve until SIGINT or SIGTERM, then drain. Returns whether a second signal forced the end.

    Raises `ConfigError`, `BindError`, and what discovery raises.
    """
    signals = Signals()
    frontend = Frontend(config)
    sock = bind(listen_host(config), config.system.http_port)
    address = sock.getsockname()[:2]
    task: asyncio.Task[None] | None = None
    try:
        await frontend.startup()
        kind = GranianServer if config.frontend.server == "granian" else UvicornServer
        server = kind(frontend, sock)
        task = asyncio.create_task(server.serve(), name="HTTP server")
        await _until_listening(address, task)
        _tune_collector()
        print(f"listening at {url(address)} (plane {frontend.manager.plane}, pid {os.getpid()})", flush=True)
        first = asyncio.ensure_future(signals.first.wait())
        await asyncio.wait((first, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            first.cancel()
            task.result()
            raise BindError(f"the HTTP server at {url(address)} has stopped by itself", address=url(address))
        forced = await _drain(frontend, signals, config.frontend.grace)
        # Answers that are left end with an event that says why, while there is still a server to send it.
        await frontend.shutdown()
        await frontend.drain(CUT_S)
        server.stop()
        await asyncio.wait((task,), timeout=STOP_S)
        return forced
    finally:
        sock.close()
        await frontend.shutdown()
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=STOP_S)


def _tune_collector() -> None:
    """The interpreter's own thresholds make it look through all modules again and again: a tenth of the time under load."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS, 20, 20)


async def _drain(frontend: Frontend, signals: Signals, grace: float) -> bool:
    if frontend.metrics.in_flight:
        text = f"draining {frontend.metrics.in_flight} request(s), up to {grace:g} s; a second signal ends at once"
        print(text, file=sys.stderr, flush=True)
    draining = asyncio.ensure_future(frontend.drain(grace))
    second = asyncio.ensure_future(signals.second.wait())
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    forced = second.done()
    for future in (draining, second):
        future.cancel()
    return forced


async def _until_listening(address: tuple[str, int], task: asyncio.Task[None]) -> None:
    """The server accepts connections a moment after it was started. Whoever waits for our line must not be refused."""
    host, port = address
    if is_wildcard(host):
        host = "::1" if ":" in host else "127.0.0.1"
    loop = asyncio.get_running_loop()
    end = loop.time() + START_S
    while not task.done() and loop.time() < end:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.005)
            continue
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return
    if task.done():
        task.result()
    raise BindError(f"the HTTP server does not accept connections at {url(address)}", address=url(address))


def url(address: tuple[str, int]) -> str:
    """How clients write it."""
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
