"""What the tests of NATS connections share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from dynwire._natsproto import CallbackSink
from dynwire.config import NatsConfig
from dynwire.nats import NatsConnection

WAIT_S = 20.0
"""until something that must happen counts as not happening; nothing is judged by how long it took"""


class Inbox:
    """A sink that keeps what it gets, and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bytes, bytes | None, Any]] = []
        self.batches: list[bool] = []
        self.states: list[tuple[int, BaseException | None]] = []
        self.writable = 0
        self.in_task = False
        self._changed: asyncio.Event = asyncio.Event()
        self.sink = CallbackSink(self._message, self._batch, self._state, self._writable)

    def _note(self) -> None:
        self.in_task |= asyncio.current_task() is not None
        self._changed.set()

    def _message(self, subject: bytes, reply: bytes, headers: bytes | None, payload: Any) -> None:
        self.messages.append((subject, reply, headers, payload))
        self._note()

    def _batch(self, begin: bool) -> None:
        self.batches.append(begin)
        self._note()

    def _state(self, state: int, error: BaseException | None) -> None:
        self.states.append((state, error))
        self._note()

    def _writable(self) -> None:
        self.writable += 1
        self._note()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that happened here makes ``condition`` true."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def count(self, n: int) -> None:
        await self.until(lambda: len(self.messages) >= n)

    @property
    def payloads(self) -> list[bytes]:
        return [bytes(message[3]) for message in self.messages]


async def eventually(condition: Callable[[], object]) -> None:
    """For what nobody tells."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(url: str, **settings: Any) -> AsyncIterator[NatsConnection]:
    connection = await NatsConnection.acquire(NatsConfig(servers=tuple(url.split(",")), **settings))
    try:
        yield connection
    finally:
        await connection.release()
