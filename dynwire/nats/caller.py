"""The queue of one endpoint as a caller sees it: found at first use, looked for again when it may be gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

from .._natsproto import UP
from ..errors import DynwireError
from .queue import MAX_PAUSE_S, PAUSE_S, Queue, QueueAdmin, QueueNames, parse_pub_ack, refusal

if TYPE_CHECKING:
    from ..config import NatsConfig
    from .connection import NatsConnection

ON_THE_WAY_S = 0.25
"""A reply was published before its request left the queue. It may still be on its way through another server of a cluster"""

logger = logging.getLogger("dynwire.nats")

MAX_DELETES = 256
"""requests that are being taken back at once; others stay until they expire, or until a worker sees that they have"""

LOOK_TIMEOUT_S = 5.0
"""for one attempt to find the queue again; there is another one after it"""


class Requests(Protocol):
    """Those of one caller that go to one queue."""

    def found(self, anew: bool) -> None:
        """The queue is there: publish again what it has not confirmed. ``anew``: it is another one, and has lost all others."""

    def waiting(self) -> list[int]:
        """Numbers of those that it has confirmed, and that no worker has taken as far as we know."""

    def missing(self, numbers: set[int]) -> None:
        """These are not in the queue any more."""


class CallerQueue:
    """All methods: the loop's thread.

    ``requests`` are told when the queue was looked for and is there.
    """

    def __init__(self, connection: NatsConnection, names: QueueNames, config: NatsConfig, requests: Requests) -> None:
        self.names = names
        self.config = config
        self.queue: Queue | None = None
        """as it was found last; None before `open`"""
        self._connection = connection
        self._admin = QueueAdmin(connection.client, config)
        self._requests = requests
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.Task[None] | None = None
        self._doubtful: set[int] = set()
        self._verifying: asyncio.Task[None] | None = None
        self._deletes: set[asyncio.Task[None]] = set()
        self._forget_state = connection.on_state(self._on_state)

    async def open(self, timeout: float) -> Queue:
        """Make the queue if it is missing. Raises what `QueueAdmin.ensure` raises."""
        if self.queue is None:
            self.queue = await self._admin.ensure(self.names, worker=False, timeout=timeout)
        return self.queue

    def _on_state(self, state: int, error: BaseException | None) -> None:
        if state == UP and error is None and self.queue is not None:
            # What was asked over the connection before gets no answer. Looking also verifies anew.
            for task in (self._looking, self._verifying):
                if task is not None:
                    task.cancel()
            self._looking = self._verifying = None
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
        anew = before is not None and before.created != found.created
        self._requests.found(anew)
        if not anew:
            # Replies that came while we were away are lost, and their requests may have left the queue.
            for number in self._requests.waiting():
                self.verify(number)

    def verify(self, number: int) -> None:
        """The reply to a request may be lost: if the request is not in the queue (any more), tell."""
        self._doubtful.add(number)
        if self._verifying is None or self._verifying.done():
            self._verifying = self._loop.create_task(self._verify(), name=f"dynwire-verify-{self.names.endpoint}")

    async def _verify(self) -> None:
        from nats.errors import Error as NatsError

        while self._doubtful:
            numbers, self._doubtful = self._doubtful, set()
            try:
                missing = {number for number in numbers if not await self._admin.has(self.names, number)}
            except (NatsError, OSError, DynwireError) as error:
                logger.info("the queue of %s could not be asked for requests that wait: %r", self.names.endpoint, error)
                self._doubtful |= numbers
                missing = set()
            await asyncio.sleep(ON_THE_WAY_S)
            if missing:
                self._requests.missing(missing)

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
        if self._verifying is not None:
            self._verifying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._verifying
        if self._deletes:
            await asyncio.wait(self._deletes)
