"""Reading the log of an endpoint: copies of its durable requests, for `dynwire replay`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .._natswire import read_headers
from ..errors import ConfigError, ConnectError
from .queue import API_TIMEOUT_S, MSG_ID, REPLAY_OF, QueueNames

if TYPE_CHECKING:
    from nats.aio.client import Client

BATCH = 64
"""requests that are fetched at once; they are in memory together"""

INACTIVE_S = 3600.0
"""after so long without a fetch the server forgets the reader: longer than any gap between two requests of a slow replay"""


@dataclass(frozen=True)
class Copy:
    """One request as it was published."""

    seq: int
    """number of the copy in the log"""
    id: str
    stored_at: datetime
    """when the queue stored the request, by the NATS server's clock"""
    headers: dict[str, str]
    """without those that the server added"""
    payload: bytes
    kind: int
    """codec of the payload (`dynwire.codec.KINDS`)"""
    timeout: float | None
    """seconds that it was sent with"""
    replay_of: str
    """id of the request that this one repeats, or empty"""


async def read_log(
    client: Client, names: QueueNames, since: datetime | None = None, until: datetime | None = None
) -> AsyncIterator[Copy]:
    """The copies with ``since`` <= stored_at < ``until``, oldest first, as far as the log has them when it is read.

    Raises `ConfigError` if nothing is recorded for the endpoint, `ConnectError` if JetStream does not answer.
    """
    from nats.errors import Error as NatsError
    from nats.errors import TimeoutError as NatsTimeout
    from nats.js import api
    from nats.js.errors import NotFoundError

    js = client.jetstream(timeout=API_TIMEOUT_S)
    consumer = api.ConsumerConfig(
        ack_policy=api.AckPolicy.NONE,
        deliver_policy=api.DeliverPolicy.ALL if since is None else api.DeliverPolicy.BY_START_TIME,
        opt_start_time=since,
        inactive_threshold=INACTIVE_S,
        mem_storage=True,
        num_replicas=1,
    )
    try:
        try:
            await js.stream_info(names.log_stream)
        except NotFoundError as error:
            raise ConfigError(
                f"no requests of {names.endpoint} are kept for replay: set DYNWIRE_NATS_REPLAY_RETENTION (seconds) for its "
                "workers; what is sent to them from then on is kept",
                name="DYNWIRE_NATS_REPLAY_RETENTION",
                value=0,
                allowed="a number of seconds",
            ) from error
        reader = await js.pull_subscribe(names.log_subject, stream=names.log_stream, config=consumer)
        try:
            left = (await reader.consumer_info()).num_pending or 0
            while left > 0:
                try:
                    messages = await reader.fetch(min(left, BATCH), timeout=API_TIMEOUT_S)
                except NatsTimeout:  # the log forgot them in the meantime, or the server is gone, which the question finds out
                    left = (await reader.consumer_info()).num_pending or 0
                    continue
                for message in messages:
                    metadata = message.metadata
                    left = metadata.num_pending
                    copy = _copy(message.headers or {}, message.data, metadata.sequence.stream, metadata.timestamp)
                    if until is not None and copy.stored_at >= until:
                        return
                    if since is None or copy.stored_at >= since:
                        yield copy
        finally:
            with contextlib.suppress(NatsError):  # the server forgets it by itself
                await js.delete_consumer(names.log_stream, (await reader.consumer_info()).name)
            with contextlib.suppress(NatsError):
                await reader.unsubscribe()
    except NatsError as error:
        raise ConnectError(f"the log of {names.endpoint} cannot be read: {error or type(error).__name__}") from error


def _copy(headers: dict[str, str], payload: bytes, seq: int, recorded_at: datetime) -> Copy:
    stamp = headers.get("Nats-Time-Stamp")
    # Nanoseconds are more than datetime takes.
    stored_at = recorded_at if stamp is None else datetime.fromisoformat(stamp.partition(".")[0].rstrip("Z") + "+00:00")
    if stamp is not None and "." in stamp:
        stored_at = stored_at.replace(microsecond=int(stamp.partition(".")[2].rstrip("Z").ljust(6, "0")[:6]))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    kept, request_id, _ = read_headers(lines.encode())
    fields = headers.get("D", "").split()
    numbers = [int(word) for word in fields[1:] if word.isdecimal()]
    kind, timeout_ms = (numbers[0], numbers[3]) if fields[:1] == ["r"] and len(numbers) > 3 else (0, 0)
    return Copy(
        seq=seq,
        id=request_id or headers.get(MSG_ID, ""),
        stored_at=stored_at.astimezone(UTC),
        headers=kept,
        payload=payload,
        kind=kind,
        timeout=timeout_ms / 1000 if timeout_ms else None,
        replay_of=kept.get(REPLAY_OF, ""),
    )
