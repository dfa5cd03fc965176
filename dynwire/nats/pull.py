"""How a worker takes requests from a queue: it asks for as many as it can run, and says of each how it went.

`PullWindow` and `Progress` are pure: no I/O, time comes in as an argument. `QueueConsumer` drives them on an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from .._natsproto import UP
from ..errors import DeadlineExceeded, DynwireError, PeerLost
from .queue import ACK, CONSUMER, MAX_PAUSE_S, NAK, PAUSE_S, PROGRESS, TERM, Delivery, Queue, QueueAdmin, QueueNames, nak_later

if TYPE_CHECKING:
    from .._natsport import PortSubscription
    from .._natsproto import MessageSink
    from ..config import NatsConfig
    from .connection import NatsConnection

logger = logging.getLogger("dynwire.nats")

LAST_ACKS_S = 1.0
"""how long closing waits for the last acknowledgements"""

SAY_AGAIN = 7
SAY_AGAIN_S = 0.1
"""A reply that nobody listened for is published so often again, after a pause that doubles: for 12 s. Then its caller is gone"""

REOPEN_TIMEOUT_S = 5.0
"""for one attempt to find the queue again; there is another one after it"""

PULL_EXPIRES_S = 30.0
"""a question that the queue has not answered completely after this time is asked anew"""

HEARTBEAT_S = 2.0
"""so often the server shows that a question is still waiting"""

SILENT_AFTER_S = 2.5 * HEARTBEAT_S
"""no word from the server for so long: it has forgotten the question (a new leader, a lost connection), ask anew"""

# Status codes of messages that the server sends in answer to a question (ADR-13).
HEARTBEAT = 100
NO_MESSAGES = 404
EXPIRED = 408
CONFLICT = 409  # consumer deleted, leader changed, server shutting down, too many questions
NO_RESPONDERS = 503  # no such consumer, or no JetStream


FEW = 8
BOLDER_S = 0.05
"""After a reconnect a worker takes a few requests at first, and twice as many in each of these periods in which no caller was
missing. Those that were connected to the same server come back at about the same moment, not all of them before it"""

_PENDING = re.compile(rb"\r\nNats-Pending-Messages: *(\d{1,9})\r\n")


class PullWindow:
    """How many requests the queue was asked for and has not delivered.

    The sum over all questions that are waiting at the server; a question ends when its last message was delivered (without
    a word), or with a status message that says how many were left.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ceiling = limit
        """what is taken at the moment: after a reconnect it begins with a few, see `careful`"""
        self.asked = 0
        self.last_heard = 0.0

    def wanted(self, running: int, now: float) -> int:
        """How many to ask for now, with ``running`` requests in the handlers; 0: nothing.

        Not for every one that ends: a question costs as much as a message, so it waits until a quarter of what this worker
        takes is free. A worker that waits for nothing at all asks at once.
        """
        free = self.ceiling - running - self.asked
        if free <= 0 or (self.asked and free * 4 < self.ceiling):
            return 0
        return free

    def careful(self) -> None:
        """Take a few requests only: their callers may be away, and would hear nothing of what is run for them."""
        self.ceiling = min(self.limit, FEW)

    def bolder(self) -> bool:
        """Take twice as many; False when that is all."""
        self.ceiling = min(self.limit, 2 * self.ceiling)
        return self.ceiling < self.limit

    def sent(self, count: int, now: float) -> None:
        """A question for ``count`` requests is on its way."""
        if not self.asked:
            self.last_heard = now
        self.asked += count

    def delivered(self, now: float) -> None:
        self.last_heard = now
        if self.asked:
            self.asked -= 1

    def status(self, code: int, left: int | None, now: float) -> bool:
        """A status message; ``left`` from its header Nats-Pending-Messages. Returns False if the questions are void."""
        self.last_heard = now
        if code == HEARTBEAT:
            return True
        if code in (NO_MESSAGES, EXPIRED) and left is not None:
            self.asked = max(0, self.asked - left)
            return True
        return False

    def silent(self, now: float) -> bool:
        """Does the server seem to have forgotten what it was asked?"""
        return self.asked > 0 and now - self.last_heard > SILENT_AFTER_S

    def reset(self) -> None:
        """All questions are void: the connection or the consumer is another one."""
        self.asked = 0


def pull_request(count: int, expires_s: float = PULL_EXPIRES_S) -> bytes:
    """Body of a question for ``count`` requests."""
    return msgspec.json.encode({"batch": count, "expires": int(expires_s * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)})


class Progress:
    """Which running requests must be reported as still running, so that the queue gives them to nobody else."""

    def __init__(self, ack_wait: float) -> None:
        # A third: two reports in a row may come late.
        self.interval = ack_wait / 3
        self.running: dict[int, Delivery] = {}

    def add(self, delivery: Delivery, now: float) -> None:
        delivery.progress_at = now + self.interval
        self.running[delivery.seq] = delivery

    def remove(self, delivery: Delivery) -> bool:
        """False if it was not there, or by now belongs to a later delivery of the same request."""
        if self.running.get(delivery.seq) is not delivery:
            return False
        del self.running[delivery.seq]
        return True

    def due(self, now: float) -> list[Delivery]:
        """Those to report now."""
        found = [delivery for delivery in self.running.values() if delivery.progress_at <= now]
        for delivery in found:
            delivery.progress_at = now + self.interval
        return found


class QueueConsumer:
    """Takes the requests of one endpoint from its queue, as many as this worker can run. All methods: the loop's thread.

    ``sink`` receives the messages of a subscription: the plane's own code, which calls `take` or `on_status` for each, and
    `finished` when a request has ended, after it handed the reply to the same connection. In that order: a worker that dies
    in between causes a second reply, never none.
    """

    def __init__(self, connection: NatsConnection, names: QueueNames, config: NatsConfig, sink: MessageSink, limit: int) -> None:
        self._connection = connection
        self._admin = QueueAdmin(connection.client, config)
        self._names = names
        self._config = config
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._window = PullWindow(min(limit, config.queue_max_in_flight))
        self._progress = Progress(config.queue_ack_wait)
        self._pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{names.stream}.{CONSUMER}".encode()
        self._inbox = b""
        self._subscription: PortSubscription | None = None
        self._unsaid: list[tuple[bytes, bytes]] = []
        """words to the queue that wait for the connection"""
        self._unproven: dict[int, Delivery] = {}
        """requests whose last message was published, and of which the server may still say that nobody listens for it"""
        self._proving: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._up.set()
        self.forget_final: Callable[[int], object] = lambda number: None
        """for the plane: called with ``delivery.final`` when a request was acknowledged"""
        self.mark: Callable[[Callable[[], object]], object] = lambda callback: callback()
        """for the plane: calls what it gets when the server has dealt with all that was published before"""
        self._void = asyncio.Event()
        self._finished: dict[int, float] = {}
        """requests that were acknowledged lately -> until when a further delivery of them is taken for one that crossed that"""
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._attempt: asyncio.Task[None] | None = None
        """to begin anew"""
        self._timer: asyncio.TimerHandle | None = None
        self._bolder: asyncio.TimerHandle | None = None
        self._forget_state = connection.on_state(self._on_state)
        self.queue: Queue | None = None
        """as it was found last; None before `start`"""
        self.taken = 0
        """deliveries, repeated ones included"""
        self.redelivered = 0
        """deliveries of requests that a worker had been given before: each may be a duplicate execution"""
        self.repeated_here = 0
        """deliveries of requests that this worker had been given before and were running or just done, and were not run again"""

    @property
    def running(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._progress.running)

    async def start(self, timeout: float) -> None:
        """Make the queue if it is missing, and begin to take requests. Raises what `QueueAdmin.ensure` raises."""
        try:
            await self._open(timeout)
        except BaseException:
            await self.close()
            raise
        self._task = self._loop.create_task(self._keep_open(), name=f"dynwire-queue-{self._names.endpoint}")
        self._tick()

    async def _open(self, timeout: float) -> None:
        self._void.clear()
        self.queue = await self._admin.ensure(self._names, worker=True, timeout=timeout)
        # A fresh inbox: what was asked for before has no interest any more, so the server forgets it.
        inbox = self._connection.client.new_inbox()
        self._subscription = await self._connection.subscribe(inbox, self._sink)
        self._inbox = inbox.encode()
        self.connected()
        self._window.reset()
        self._ask()

    async def _keep_open(self) -> None:
        """Begin anew whenever the server has forgotten us: reconnected, consumer or stream deleted, leader changed."""
        while True:
            await self._void.wait()
            # What an attempt has asked is lost with the connection, and would be waited for: `_on_state` ends it then.
            attempt = self._attempt = self._loop.create_task(self._reopened(), name=f"dynwire-queue-open-{self._names.endpoint}")
            try:
                await asyncio.wait((attempt,))
            finally:
                self._attempt = None
                attempt.cancel()
                await asyncio.wait((attempt,))
            if not attempt.cancelled():
                attempt.result()

    async def _reopened(self) -> None:
        pause = PAUSE_S
        while self._void.is_set():
            await self._end_subscription()
            try:
                await self._open(REOPEN_TIMEOUT_S)
            except DynwireError as error:
                self._void.set()
                logger.warning("%s takes no durable requests at the moment: %s", self._names.endpoint, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)

    async def _end_subscription(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._connection.finish(subscription)

    def _on_state(self, state: int, error: BaseException | None) -> None:
        # What we published last may be lost, and replies with it: then a further delivery is to be run.
        self._finished.clear()
        if state != UP:
            self._up.clear()
            if self._proving is not None:
                self._proving.cancel()
            # Their last messages may be lost with the connection.
            for delivery in self._unproven.values():
                self.forget_final(delivery.final)
                self._say(delivery.ack, NAK)
            self._unproven.clear()
        else:
            self._be_careful()
        self._reopen()
        if self._attempt is not None and (state != UP or error is None):
            self._attempt.cancel()

    def connected(self) -> None:
        """There is a connection again, and the plane has published its replies that waited for it."""
        unsaid, self._unsaid = self._unsaid, []
        for subject, word in unsaid:
            self._say(subject, word)
        self._up.set()
        self._prove_soon()

    def _be_careful(self) -> None:
        self._window.careful()
        if self._bolder is not None:
            self._bolder.cancel()
        self._bolder = self._loop.call_later(BOLDER_S, self._be_bolder)

    def _be_bolder(self) -> None:
        self._bolder = self._loop.call_later(BOLDER_S, self._be_bolder) if self._window.bolder() else None
        self._ask()

    def _reopen(self) -> None:
        """What we have asked is void."""
        self._window.reset()
        self._void.set()

    def _ask(self) -> None:
        now = self._loop.time()
        if self._stopping or self._void.is_set() or not self._connection.up:
            return
        count = self._window.wanted(self.running, now)
        if count:
            self._window.sent(count, now)
            self._connection.port.send(self._pull_subject, pull_request(count), self._inbox)

    def _say(self, subject: bytes, word: bytes) -> None:
        if self._connection.up:
            self._connection.port.send(subject, word)
        elif word != PROGRESS:
            self._unsaid.append((subject, word))

    def take(self, reply: bytes) -> Delivery | None:
        """A message with the reply subject ``reply`` was delivered. None: it is dealt with, do not run it.

        What is returned must be given to `finished` exactly once. Raises `ProtocolError` if JetStream did not send it.
        """
        now = self._loop.time()
        delivery = Delivery.parse(reply)
        self._window.delivered(now)
        if self._stopping:
            self._say(reply, NAK)
            return None
        self.taken += 1
        here = self._progress.running.get(delivery.seq)
        if here is not None:
            # We were silent for too long (a blocked loop, a stopped process), and got our own request again.
            self.repeated_here += 1
            here.ack = delivery.ack
            self._say(reply, PROGRESS)
            return None
        replied = self._unproven.get(delivery.seq)
        if replied is not None:
            self.repeated_here += 1
            replied.ack = delivery.ack
            return None
        if delivery.seq in self._finished:
            # It was given to us again while we finished it: the loop was blocked by its own handler, for example.
            self.repeated_here += 1
            self._say(reply, ACK)
            return None
        if delivery.attempt > 1:
            self.redelivered += 1
        self._progress.add(delivery, now)
        return delivery

    def on_status(self, code: int, headers: bytes) -> None:
        """A message without a request: a heartbeat, or why a question ended. ``headers`` is its block."""
        found = _PENDING.search(headers)
        left = None if found is None else int(found[1])
        if self._window.status(code, left, self._loop.time()):
            self._ask()
        elif not self._stopping:
            text = headers.partition(b"\r\n")[0].decode("latin-1").removeprefix("NATS/1.0 ")
            logger.info("the queue of %s answered %s: asking anew", self._names.endpoint, text)
            self._reopen()

    def refusal(self, delivery: Delivery, timeout_ms: int) -> int | DynwireError:
        """Milliseconds that are left to run it, or why it is not run. ``timeout_ms`` is what it was sent with; 0: none."""
        assert self.queue is not None
        if delivery.attempt > self._config.queue_max_deliver:
            return PeerLost(
                f"a request to {self._names.endpoint} was given to {self._config.queue_max_deliver} workers, and none of them "
                "finished it or gave it back (DYNWIRE_NATS_QUEUE_MAX_DELIVER)",
                sent="yes",
                retryable=False,
            )
        left = self.queue.expires_at(delivery, timeout_ms / 1000 if timeout_ms else None) - time.time()
        if left <= 0:
            return DeadlineExceeded(
                f"the request to {self._names.endpoint} waited in its queue until its deadline", phase="total", sent="no"
            )
        return min(int(left * 1000) + 1, 0xFFFFFFFF)

    def give_back(self, delivery: Delivery) -> None:
        """It can't be run here now: another worker shall have it, or this one in a moment."""
        self.finished(delivery, nak_later(delivery.attempt))

    def finished(self, delivery: Delivery, verdict: bytes) -> None:
        """The request has ended and its reply was published: `ACK`, `NAK` (another worker shall have it) or `TERM`.

        It is acknowledged when the NATS server has taken the reply and has not called `unheard`.
        """
        if not self._progress.remove(delivery):
            return
        if verdict == ACK:
            self._unproven[delivery.seq] = delivery
            self._prove_soon()
        else:
            if verdict == TERM:
                self._forget_later(delivery)
            self._say(delivery.ack, verdict)
        self._ask()

    def unheard(self, delivery: Delivery, again: Callable[[], object] | None) -> None:
        """Nobody listened for a message of the reply: the caller is gone, or reconnecting.

        ``again`` publishes a reply that is one message once more; it then calls `finished`. Without it the request is run anew.
        """
        self._be_careful()
        if self._unproven.get(delivery.seq) is not delivery:
            if self._progress.remove(delivery):
                self._say(delivery.ack, nak_later(delivery.attempt))
            return
        del self._unproven[delivery.seq]
        if again is None:
            self.forget_final(delivery.final)
            self._say(delivery.ack, nak_later(delivery.attempt))
        elif delivery.unheard < SAY_AGAIN:
            self._progress.add(delivery, self._loop.time())
            self._loop.call_later(SAY_AGAIN_S * 2**delivery.unheard, again)
            delivery.unheard += 1
        else:
            self._forget_later(delivery)
            self._say(delivery.ack, TERM)

    def _prove_soon(self) -> None:
        if self._unproven and self._up.is_set() and (self._proving is None or self._proving.done()):
            self._proving = self._loop.create_task(self._prove(), name=f"dynwire-queue-acks-{self._names.endpoint}")

    async def _prove(self) -> None:
        """Acknowledge what was replied to, as many requests with one question to the server as have come since the last."""
        while self._unproven:
            batch = tuple(self._unproven.values())
            dealt_with = asyncio.Event()
            self.mark(dealt_with.set)
            # If the connection is lost, `_on_state` gives back what was published over it, and cancels this.
            await dealt_with.wait()
            for delivery in batch:
                if self._unproven.get(delivery.seq) is delivery:
                    del self._unproven[delivery.seq]
                    self._forget_later(delivery)
                    self._say(delivery.ack, ACK)

    def _forget_later(self, delivery: Delivery) -> None:
        self._finished[delivery.seq] = self._loop.time() + self._config.queue_ack_wait
        self.forget_final(delivery.final)

    def _tick(self) -> None:
        now = self._loop.time()
        for delivery in self._progress.due(now):
            self._say(delivery.ack, PROGRESS)
        # Insertion is in the order of time.
        while self._finished and (first := next(iter(self._finished.items())))[1] < now:
            del self._finished[first[0]]
        if self._window.silent(now):
            self._reopen()
        self._ask()
        self._timer = self._loop.call_later(min(1.0, self._progress.interval / 2), self._tick)

    def stats(self) -> dict[str, int]:
        """Counters, for diagnostics and tests."""
        return {
            "running": self.running,
            "taken": self.taken,
            "redelivered": self.redelivered,
            "repeated_here": self.repeated_here,
        }

    async def stop(self) -> None:
        """Take no more requests, give back at once what arrives nevertheless. Those that run are reported until they end."""
        self._stopping = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._end_subscription()

    async def close(self) -> None:
        """After `stop`, when no request runs any more. What still runs is given to another worker, at once."""
        if self._proving is not None:
            await asyncio.wait((self._proving,), timeout=LAST_ACKS_S)
            self._proving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._proving
        self._forget_state()
        if self._bolder is not None:
            self._bolder.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for delivery in tuple(self._progress.running.values()):
            self.finished(delivery, NAK)
