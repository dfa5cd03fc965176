"""The queue of one endpoint as a caller sees it: found at first use, looked for again when it may be gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._natsproto import UP
from ..errors import DynwireError
from .queue import MAX_PAUSE_S, PAUSE_S, Queue, QueueAdmin, QueueNames, parse_pub_ack, refusal

if TYPE_CHECKING:
    from ..config import NatsConfig
    from .connection import NatsConnection

logger = logging.getLogger("dynwire.nats")

MAX_DELETES = 256
"""requests that are being taken back at once; others stay until they expire, or until a worker sees that they have"""

LOOK_TIMEOUT_S = 5.0
"""for one attempt to find the queue again; there is another one after it"""


class CallerQueue:
    """All methods: the loop's thread.

    ``on_found(anew)`` is called when the queue was looked for and is there: what is not confirmed can be published again.
    ``anew``: it is not the one that it was, so what was confirmed is lost too.
    """

    def __init__(
        self, connection: NatsConnection, names: QueueNames, config: NatsConfig, on_found: Callable[[bool], object]
    ) -> None:
        self.names = names
        self.config = config
        self.queue: Queue | None = None
        """as it was found last; None before `open`"""
        self._connection = connection
        self._admin = QueueAdmin(connection.client, config)
        self._on_found = on_found
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.Task[None] | None = None
        self._deletes: set[asyncio.Task[None]] = set()
        self._forget_state = connection.on_state(self._on_state)

    async def open(self, timeout: float) -> Queue:
        """Make the queue if it is missing. Raises what `QueueAdmin.ensure` raises."""
        if self.queue is None:
            self.queue = await self._admin.ensure(self.names, worker=False, timeout=timeout)
        return self.queue

    def _on_state(self, state: int, error: BaseException | None) -> None:
        if state == UP and error is None and self.queue is not None:
            self.look()  # another server, or the same one without its storage

    def look(self) -> None:
        """It may be gone: look for it, make it anew if need be, and tell. Does nothing while it is being looked for."""
        if self._looking is None or self._looking.done():
            self._looking = self._loop.create_task(self._look(), name=f"dynwire-queue-{self.names.endpoint}")

    async def _look(self) -> None:
        pause = PAUSE_S
        while True:
            try:
                found = await self._admin.ensure(self.names, worker=False, timeout=LOOK_TIMEOUT_S)
                break
            except DynwireError as error:
                logger.warning("durable requests to %s wait for their queue: %s", self.names.endpoint, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)
        before, self.queue = self.queue, found
        self._on_found(before is not None and before.created != found.created)

    def take_back(self, seq: int) -> None:
        """A request that nobody waits for any more leaves the queue, if no worker has finished it. Best effort, never waits."""
        if self._connection.up and not self._looking_now and len(self._deletes) < MAX_DELETES:
            task = self._loop.create_task(self._delete(seq))
            self._deletes.add(task)
            task.add_done_callback(self._deletes.discard)

    def answered(self, answer: bytes, size: int) -> int:
        """The number that the queue gave a request; 0: it could not store it now, and is to be asked again.

        Raises why it refuses it. ``size`` of its payload, for that.
        """
        ack = parse_pub_ack(answer)
        if ack.error is None:
            return ack.seq
        error = refusal(self.names, ack.error, self.config, size)
        if error is None:
            return 0
        raise error

    def confirmed_late(self, answer: bytes) -> None:
        """The answer to a request that was given up before it came."""
        with contextlib.suppress(DynwireError):  # refused: so much the better
            number = self.answered(answer, 0)
            if number:
                self.take_back(number)

    @property
    def _looking_now(self) -> bool:
        return self._looking is not None and not self._looking.done()

    async def _delete(self, seq: int) -> None:
        from nats.errors import Error as NatsError

        try:
            await self._admin.delete(self.names, seq)
        except (NatsError, OSError) as error:  # it ends with its time to live then
            logger.debug("request %d of %s stays in its queue: %r", seq, self.names.endpoint, error)

    async def close(self) -> None:
        """End what runs in the background; requests that are being taken back are waited for."""
        self._forget_state()
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        if self._deletes:
            await asyncio.wait(self._deletes)
