"""The queue of durable requests of one endpoint, in JetStream: its names, its settings, how it is made, what it answers.

A queue is a work-queue stream with one durable consumer that all workers share. Where requests are kept for replay, the server
republishes each to a second stream, the log; a work queue cannot do both, because it deletes what was acknowledged.
Everything here is used on the event loop of its connection; what is not ``async`` does no I/O.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import ConfigError, ConnectError, DynwireError, MessageTooLarge, Overloaded, ProtocolError

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.api import ConsumerConfig, StreamConfig, StreamInfo
    from nats.js.client import JetStreamContext

    from ..config import NatsConfig
    from ..types import EndpointId

logger = logging.getLogger("dynwire.nats")

CONSUMER = "workers"
"""name of the consumer that all workers of an endpoint share"""

OWNER = "dynwire-queue"
"""key in the metadata of our streams; the value is the version of this layout"""

MSG_ID = "Nats-Msg-Id"
MSG_TTL = "Nats-TTL"
REPLAY_OF = "dynwire-replay-of"
"""header of a replayed request: the id of the one it repeats"""

API_TIMEOUT_S = 2.0
"""one question to JetStream; it answers in milliseconds, or has lost it because its leader changed"""

PAUSE_S = 0.1
"""between two attempts while JetStream has no leader or is starting"""

MAX_PAUSE_S = 2.0
"""the longest pause between attempts to find a queue again"""

DISABLED_AFTER_S = 2.0
"""nobody answers questions to JetStream: a server that is just starting, for so long, after that one without JetStream"""

# Numbers of JetStream's errors, from nats-server's server/errors.json (2.15).
JS_NOT_ENABLED = (10039, 10076)  # for the account, on the server
JS_TEMPORARY = (10008, 10009, 10025)  # unavailable, no leader, shutting down
JS_NO_SPACE = (10023, 10028, 10047)  # insufficient resources, memory, storage
JS_NO_MESSAGE = 10037
JS_STREAM_IN_USE = 10058
JS_OVERLAP = 10065
JS_STORE_FAILED = 10077  # a limit with discard policy "new", or the disk
JS_MESSAGE_TOO_LARGE = (10054, 10097)  # the stream's max_msg_size, header too large


@dataclass(frozen=True)
class QueueNames:
    """Subjects and streams of one endpoint.

    Stream names join their parts with ``+``, which neither parts of an endpoint nor subjects contain: with ``_`` the endpoints
    ``a_b.c.d`` and ``a.b_c.d`` would share a queue. A ``.`` of the prefix becomes ``+`` too, NATS allows none in these names.
    """

    endpoint: str
    subject: str
    stream: str
    log_subject: str
    log_stream: str

    @classmethod
    def of(cls, prefix: str, endpoint: EndpointId) -> QueueNames:
        parts = (endpoint.namespace, endpoint.component, endpoint.name)
        path, flat, head = ".".join(parts), "+".join(parts), prefix.replace(".", "+")
        return cls(str(endpoint), f"{prefix}.d.{path}", f"{head}+q+{flat}", f"{prefix}.log.{path}", f"{head}+log+{flat}")


# What JetStream says about a publish -----------------------------------------------------------------------------------------


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct):
    """The answer of a stream to a publish."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _ApiError | None = None


_decode_ack = msgspec.json.Decoder(PubAck).decode


def parse_pub_ack(payload: bytes) -> PubAck:
    """Raises `ProtocolError` if it is none."""
    try:
        ack = _decode_ack(payload)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the NATS server answered a publish with {payload[:80]!r}, not with an acknowledgement") from error
    if ack.error is None and not ack.seq:
        raise ProtocolError(f"the acknowledgement {payload[:80]!r} has no sequence number")
    return ack


def refusal(names: QueueNames, error: _ApiError, config: NatsConfig, size: int) -> DynwireError | None:
    """What a publish that the queue refused means to the caller, or None if it is worth another attempt.

    All of these have ``sent="no"``: the stream did not store the request, so no worker can see it.
    """
    text = error.description or f"error {error.err_code}"
    if error.err_code == JS_STORE_FAILED and "maximum" in text:
        in_bytes = "bytes" in text
        limit = config.queue_max_bytes if in_bytes else config.queue_max_messages
        setting = "DYNWIRE_NATS_QUEUE_MAX_BYTES" if in_bytes else "DYNWIRE_NATS_QUEUE_MAX_MESSAGES"
        return Overloaded(
            f"the queue of {names.endpoint} is full ({text}; the limit is {setting}, {limit} here): no worker finishes its "
            "requests as fast as they come",
            limit=limit,
            phase="send",
            details={"stream": names.stream},
        )
    if error.err_code in JS_NO_SPACE or error.err_code == JS_STORE_FAILED:
        return Overloaded(
            f"the NATS server could not store a request for {names.endpoint}: {text}",
            phase="send",
            details={"stream": names.stream},
        )
    if error.err_code in JS_MESSAGE_TOO_LARGE:
        return MessageTooLarge(
            f"the queue of {names.endpoint} does not take a request of {size} bytes: {text}",
            size=size,
            setting=f"max_msg_size of the stream {names.stream}",
            details={"stream": names.stream},
        )
    if error.err_code in JS_TEMPORARY or error.code in (500, 503):
        return None
    return ConnectError(
        f"the queue of {names.endpoint} refused a request: {text} (JetStream error {error.err_code})",
        phase="send",
        retryable=False,
        details={"stream": names.stream},
    )


# What JetStream says about a delivery ----------------------------------------------------------------------------------------


class Delivery:
    """One request as JetStream gave it to this worker. ``ack`` is the subject on which the worker says how it went."""

    __slots__ = ("ack", "attempt", "final", "pending", "progress_at", "seq", "stored_at", "unheard")

    def __init__(self, ack: bytes, seq: int, attempt: int, stored_at: float, pending: int) -> None:
        self.ack = ack
        self.seq = seq
        """number of the request in its stream"""
        self.attempt = attempt
        """how often it has been given to a worker, this time included"""
        self.stored_at = stored_at
        """Unix time in seconds, by the clock of the NATS server"""
        self.pending = pending
        """requests behind it in the queue"""
        self.progress_at = 0.0
        self.unheard = 0
        """how often its reply was published while nobody listened"""
        self.final = 0
        """for the plane: by what it knows the last message of the reply"""

    @classmethod
    def parse(cls, reply: bytes) -> Delivery:
        """From the reply subject of a delivered message; `ProtocolError` if that is not one of JetStream's.

        ``$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>``, or with domain and account
        before the stream and perhaps a token at the end (ADR-15).
        """
        parts = reply.split(b".")
        start = 2 if len(parts) == 9 else 4
        if len(parts) not in (9, 11, 12) or parts[:2] != [b"$JS", b"ACK"]:
            raise ProtocolError(f"{reply[:120]!r} is not the acknowledgement subject of a delivered message")
        try:
            attempt, seq, _, stamp, pending = (int(part) for part in parts[start + 2 : start + 7])
        except ValueError as error:
            raise ProtocolError(f"{reply[:120]!r} is not the acknowledgement subject of a delivered message") from error
        return cls(reply, seq, attempt, stamp / 1e9, pending)


# How a worker says how it went. The server reads the words and publishes nothing back (no reply subject is given).
ACK = b"+ACK"  # done: it leaves the queue
NAK = b"-NAK"  # another worker shall have it, at once
PROGRESS = b"+WPI"  # still at it: the time until it is given to another starts anew
TERM = b"+TERM"  # it leaves the queue, nobody shall have it


def nak_later(attempt: int) -> bytes:
    """Another worker shall have it, or the same one, in a quarter of a second; in twice as long each time, up to 4 s."""
    return b'-NAK {"delay": %d}' % (250_000_000 << min(attempt - 1, 4))


# Settings of the streams -----------------------------------------------------------------------------------------------------


def queue_config(names: QueueNames, config: NatsConfig, ttl: bool = True) -> StreamConfig:
    """The work queue. Limits refuse (discard "new"): an accepted request is never dropped for a newer one.

    ``ttl``: messages may carry a time to live, which nats-server knows from 2.11 on.
    """
    from nats.js import api

    recording = config.replay_retention > 0
    return api.StreamConfig(
        name=names.stream,
        description=f"durable requests to {names.endpoint}",
        subjects=[names.subject],
        retention=api.RetentionPolicy.WORK_QUEUE,
        discard=api.DiscardPolicy.NEW,
        max_age=config.queue_max_age,
        max_msgs=config.queue_max_messages,
        max_bytes=config.queue_max_bytes,
        storage=api.StorageType(config.queue_storage),
        num_replicas=config.queue_replicas,
        # The server refuses a window that is longer than the messages live.
        duplicate_window=min(config.queue_duplicate_window, config.queue_max_age),
        # Requests carry their own time to live, so that those of dead callers do not fill the queue.
        allow_msg_ttl=True if ttl else None,
        # Microseconds since 1970, more than requests can have been stored in: the numbers of a queue that was lost and made anew
        # are no numbers of the old one, so that nobody takes back somebody else's request.
        first_seq=time.time_ns() // 1000,
        republish=api.RePublish(src=names.subject, dest=names.log_subject) if recording else None,
        metadata={OWNER: "1"},
    )


def log_config(names: QueueNames, config: NatsConfig) -> StreamConfig:
    """The log: copies of requests for `dynwire replay`, the oldest go first."""
    from nats.js import api

    return api.StreamConfig(
        name=names.log_stream,
        description=f"copies of requests to {names.endpoint}, for dynwire replay",
        subjects=[names.log_subject],
        retention=api.RetentionPolicy.LIMITS,
        discard=api.DiscardPolicy.OLD,
        max_age=config.replay_retention,
        max_msgs=-1,
        max_bytes=config.replay_max_bytes,
        storage=api.StorageType(config.queue_storage),
        num_replicas=config.queue_replicas,
        duplicate_window=min(config.queue_duplicate_window, config.replay_retention),
        metadata={OWNER: "1"},
    )


def consumer_config(config: NatsConfig) -> ConsumerConfig:
    """What all workers of an endpoint take from.

    Deliveries are not limited here: a worker counts them, so that the caller is told when there were too many.
    """
    from nats.js import api

    return api.ConsumerConfig(
        name=CONSUMER,
        durable_name=CONSUMER,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=config.queue_ack_wait,
        max_deliver=-1,
        # Bounded by what the workers take at once; a bound of its own would only be one more thing to be stuck at.
        max_ack_pending=-1,
        max_waiting=512,
        deliver_policy=api.DeliverPolicy.ALL,
        replay_policy=api.ReplayPolicy.INSTANT,
    )


# A field of the stream -> the setting to name. All can be changed in place but the storage.
_QUEUE_SETTINGS = {
    "max_age": "DYNWIRE_NATS_QUEUE_MAX_AGE",
    "max_msgs": "DYNWIRE_NATS_QUEUE_MAX_MESSAGES",
    "max_bytes": "DYNWIRE_NATS_QUEUE_MAX_BYTES",
    "storage": "DYNWIRE_NATS_QUEUE_STORAGE",
    "num_replicas": "DYNWIRE_NATS_QUEUE_REPLICAS",
    "duplicate_window": "DYNWIRE_NATS_QUEUE_DUPLICATE_WINDOW",
    "republish": "DYNWIRE_NATS_REPLAY_RETENTION",
    "allow_msg_ttl": "",
}
_LOG_SETTINGS = _QUEUE_SETTINGS | {
    "max_age": "DYNWIRE_NATS_REPLAY_RETENTION",
    "max_bytes": "DYNWIRE_NATS_REPLAY_MAX_BYTES",
}
_CONSUMER_SETTINGS = {"ack_wait": "DYNWIRE_NATS_QUEUE_ACK_WAIT", "max_deliver": "", "max_ack_pending": ""}
_FIXED = ("storage",)


def plain(value: Any) -> Any:
    """Values of nats-py's configurations in a form that compares: enumerations by value, parts as dictionaries."""
    value = getattr(value, "value", value)
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) is not None} or None
    if isinstance(value, float):
        return round(value, 3)
    return value or None if isinstance(value, (bool, dict)) else value


async def find_or_add(js: JetStreamContext, wanted: StreamConfig) -> tuple[StreamInfo, bool]:
    """The stream of the name that is wanted, and whether it was made just now. Raises what nats-py's JetStream raises."""
    from nats.js.errors import APIError, NotFoundError

    assert wanted.name is not None
    try:
        return await js.stream_info(wanted.name), False
    except NotFoundError:
        # Two make it at the same moment: with equal settings both succeed, with others the second is told and looks again.
        try:
            return await js.add_stream(wanted), True
        except APIError as error:
            if error.err_code != JS_STREAM_IN_USE:
                raise
        return await js.stream_info(wanted.name), False


def differences(wanted: Any, found: Any, names: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    """Field -> (wanted, found) where the two differ."""
    pairs = {name: (plain(getattr(wanted, name)), plain(getattr(found, name))) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class Queue:
    """A queue that exists, with the settings it really has."""

    names: QueueNames
    max_age: float
    duplicate_window: float
    ttl: bool
    """requests may carry a time to live"""
    recording: bool
    created: datetime | None
    """changes when the storage was lost and the queue made anew"""
    clock_offset: float
    """seconds that the NATS server's clock is ahead of ours"""

    def expires_at(self, delivery: Delivery, timeout: float | None) -> float:
        """When a request ends, by the clock of this host: Unix time in seconds. ``timeout`` is the one it was sent with.

        Counted from the moment the server stored it, by its clock, so that the clocks of callers need not be right.
        """
        life = self.max_age if timeout is None else min(timeout, self.max_age)
        return delivery.stored_at - self.clock_offset + life


# Making sure that they exist -------------------------------------------------------------------------------------------------


class QueueAdmin:
    """Makes and changes the streams of queues over one connection.

    A worker's settings win over those of an existing queue: what can be changed is changed, with a warning in the log that
    names it. A caller makes a queue that is missing and takes an existing one as it is.
    """

    def __init__(self, client: Client, config: NatsConfig) -> None:
        self._client = client
        self._js = client.jetstream(timeout=API_TIMEOUT_S)
        self._config = config

    async def ensure(self, names: QueueNames, *, worker: bool, timeout: float) -> Queue:
        """The queue, made or changed if need be.

        Raises `ConfigError` if JetStream is not enabled, if a stream is in the way or has settings that cannot be changed,
        `Overloaded` if the server has no space for it, `ConnectError` if JetStream does not answer within ``timeout`` seconds.
        """
        from nats.errors import Error as NatsError
        from nats.js.errors import APIError, ServiceUnavailableError

        start = time.monotonic()
        while True:
            last: Exception
            try:
                return await self._ensure(names, worker)
            except APIError as error:
                # The same class without a number: nobody answered at all.
                silent = isinstance(error, ServiceUnavailableError) and error.err_code is None
                if error.err_code in JS_NOT_ENABLED or (silent and time.monotonic() - start >= min(timeout, DISABLED_AFTER_S)):
                    raise ConfigError(
                        f"the NATS server {self._url} has no JetStream for us, which durable requests need "
                        "(DYN_NATS_REQUEST_MODE=jetstream): start nats-server with -js, or enable it for the account",
                        name="DYN_NATS_REQUEST_MODE",
                        value="jetstream",
                        allowed="core, or a NATS server with JetStream",
                    ) from error
                if not silent and error.err_code not in JS_TEMPORARY:
                    raise self._translated(names, error) from error
                last = error
            except (NatsError, OSError) as error:  # timeouts, and a connection that is being made anew
                last = error
            if time.monotonic() - start >= timeout:
                raise ConnectError(
                    f"JetStream of the NATS server {self._url} did not answer within {timeout:g} s about the queue of "
                    f"{names.endpoint}: {last or type(last).__name__}",
                    peer=self._url,
                ) from last
            await asyncio.sleep(PAUSE_S)

    @property
    def _url(self) -> str:
        url = self._client.connected_url
        return "(not connected)" if url is None else f"{url.hostname}:{url.port}"

    def _knows_ttl(self) -> bool:
        version = self._client.connected_server_version
        return (version.major, version.minor) >= (2, 11)

    def _translated(self, names: QueueNames, error: Any) -> DynwireError:
        if error.err_code in JS_NO_SPACE:
            return Overloaded(
                f"the NATS server {self._url} has no space for the queue of {names.endpoint} "
                f"({self._config.queue_max_bytes} bytes are set aside, DYNWIRE_NATS_QUEUE_MAX_BYTES): {error.description}",
                limit=self._config.queue_max_bytes,
                peer=self._url,
                phase="connect",
            )
        what = "another stream has its subject" if error.err_code == JS_OVERLAP else error.description
        return ConfigError(
            f"the queue of {names.endpoint} (stream {names.stream}, subject {names.subject}) cannot be made: {what} "
            f"(JetStream error {error.err_code})",
            name=names.stream,
            value=names.subject,
        )

    async def _ensure(self, names: QueueNames, worker: bool) -> Queue:
        config = self._config
        if config.replay_retention > 0:
            await self._stream(names, log_config(names, config), _LOG_SETTINGS, worker)
        info = await self._stream(names, queue_config(names, config, self._knows_ttl()), _QUEUE_SETTINGS, worker)
        await self._consumer(names, worker)
        found = info.config
        return Queue(
            names=names,
            max_age=found.max_age or config.queue_max_age,
            duplicate_window=found.duplicate_window,
            # The copy in the log would end with the original, and a log that does not know the header refuses it.
            ttl=bool(found.allow_msg_ttl) and found.republish is None,
            recording=found.republish is not None,
            created=info.created,
            clock_offset=await self._clock_offset(names),
        )

    async def _stream(self, names: QueueNames, wanted: StreamConfig, settings: dict[str, str], worker: bool) -> StreamInfo:
        info, made = await find_or_add(self._js, wanted)
        if made:
            return info
        found = info.config
        if plain(found.retention) != plain(wanted.retention) or found.subjects != wanted.subjects:
            raise ConfigError(
                f"the stream {wanted.name} exists, but is none of ours: it has subjects {found.subjects} and retention "
                f"{plain(found.retention)}, where {wanted.subjects} and {plain(wanted.retention)} are needed for "
                f"{names.endpoint}; delete it or use another DYNWIRE_NATS_PREFIX",
                name=str(wanted.name),
                value=found.subjects,
                allowed=wanted.subjects,
            )
        if found.allow_msg_ttl:
            wanted.allow_msg_ttl = True  # cannot be taken back, and the version of a server that was lost just now is not known
        other = differences(wanted, found, settings)
        if not worker or not other:
            return info
        for field in _FIXED:
            if field in other:
                want, have = other[field]
                raise ConfigError(
                    f"the stream {wanted.name} exists with {field} {have!r}; {settings[field]} says {want!r}, and JetStream "
                    f"cannot change that: set it to {have!r}, or delete the stream (and the requests in it)",
                    name=settings[field],
                    value=want,
                    allowed=have,
                )
        changes = ", ".join(f"{f} from {have} to {want}" for f, (want, have) in other.items())
        logger.warning(
            "the stream %s of %s had other settings than this worker; changed: %s", wanted.name, names.endpoint, changes
        )
        return await self._js.update_stream(wanted, first_seq=found.first_seq)

    async def _consumer(self, names: QueueNames, worker: bool) -> None:
        """Workers make it; a caller does not need it, and a queue without workers keeps its requests."""
        from nats.js.errors import NotFoundError

        if not worker:
            return
        wanted = consumer_config(self._config)
        try:
            found = (await self._js.consumer_info(names.stream, CONSUMER)).config
        except NotFoundError:
            await self._js.add_consumer(names.stream, wanted)
            return
        other = differences(wanted, found, _CONSUMER_SETTINGS)
        if other:
            changes = ", ".join(f"{f} from {have} to {want}" for f, (want, have) in other.items())
            logger.warning("the consumer of %s had other settings than this worker; changed: %s", names.endpoint, changes)
            await self._js.add_consumer(names.stream, wanted)

    async def _clock_offset(self, names: QueueNames) -> float:
        """How far the clock of the stream's server is ahead of ours, good to the round trip's half.

        Its answers carry its time (``ts``), which nats-py's objects leave out.
        """
        asked = time.time()
        answer = await self._client.request(f"$JS.API.STREAM.INFO.{names.stream}", b"", timeout=API_TIMEOUT_S)
        half = (time.time() - asked) / 2
        stamp = msgspec.json.decode(answer.data, type=_Stamped).ts
        return 0.0 if stamp is None else stamp.timestamp() - (asked + half)

    async def delete(self, names: QueueNames, seq: int) -> bool:
        """Take a request out of the queue; False if it is not there any more. For callers that gave up."""
        body = msgspec.json.encode({"seq": seq, "no_erase": True})
        answer = await self._client.request(f"$JS.API.STREAM.MSG.DELETE.{names.stream}", body, timeout=API_TIMEOUT_S)
        return bool(msgspec.json.decode(answer.data).get("success", False))

    async def has(self, names: QueueNames, seq: int) -> bool:
        """Is a request still in the queue, waiting or running?"""
        body = msgspec.json.encode({"seq": seq})
        answer = await self._client.request(f"$JS.API.STREAM.MSG.GET.{names.stream}", body, timeout=API_TIMEOUT_S)
        error = msgspec.json.decode(answer.data, type=_Found).error
        if error is not None and error.err_code != JS_NO_MESSAGE:
            raise ConnectError(f"the queue of {names.endpoint} could not be asked: {error.description}")
        return error is None


class _Found(msgspec.Struct):
    error: _ApiError | None = None


class _Stamped(msgspec.Struct):
    ts: datetime | None = None
