"""A path with a delay and a rate, in user space: TCP in, TCP out, every byte some time later. A benchmark uses it too."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast


class _Way(asyncio.Protocol):
    """One direction: bytes that come here leave on ``other`` after the delay. It never pauses: what is in flight is in memory."""

    def __init__(self, delay_s: float, bytes_per_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport
        self.other: _Way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        now = self._loop.time()
        self._free_at = max(self._free_at, now) + len(data) / self._bytes_per_s
        self._waiting.append((self._free_at + self._delay_s, data))
        if self._timer is None:
            self._timer = self._loop.call_at(self._waiting[0][0], self._deliver)

    def _deliver(self) -> None:
        now = self._loop.time()
        while self._waiting and self._waiting[0][0] <= now:
            self.other.transport.write(self._waiting.popleft()[1])
        self._timer = self._loop.call_at(self._waiting[0][0], self._deliver) if self._waiting else None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.other.transport.abort()


@asynccontextmanager
async def delayed(
    host: str, port: int, *, delay_s: float = 0.025, bytes_per_s: float = float("inf"), bind: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """The port of a proxy to ``host:port``. ``delay_s`` is each way's; the rate is for each direction of each connection."""
    loop = asyncio.get_running_loop()
    dialling: set[asyncio.Task[None]] = set()

    class Front(_Way):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()  # until there is somewhere to write to
            task = asyncio.ensure_future(self._dial())
            dialling.add(task)
            task.add_done_callback(dialling.discard)

        async def _dial(self) -> None:
            back = _Way(delay_s, bytes_per_s)
            back.other, self.other = self, back
            try:
                await loop.create_connection(lambda: back, host, port)
            except OSError:
                back.transport = self.transport
                self.transport.abort()
                return
            self.transport.resume_reading()

    server = await loop.create_server(lambda: Front(delay_s, bytes_per_s), bind, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(dialling):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
