"""What the jetstream event plane keeps at the NATS server: a stream of events per component, and snapshots of a router's index.

`EventStream` makes the stream and says what is in it. `SnapshotStore` keeps the snapshot: the bytes in a JetStream object
store, and a pointer to them in a key-value bucket, whose revisions decide who may write. Everything here is used on the event
loop of its connection and raises what `failures` names.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import Config
from ..errors import ConfigError, ConnectError, DynwireError
from ..nats.queue import API_TIMEOUT_S, JS_NO_SPACE, JS_NOT_ENABLED, JS_OVERLAP, differences, find_or_add, plain
from .base import STREAM_CHANNEL

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js.api import ConsumerConfig, ConsumerInfo, StreamConfig, StreamInfo
    from nats.js.object_store import ObjectStore

logger = logging.getLogger("dynwire.event_plane")

OWNER = "dynwire-events"
"""key in the metadata of our streams; the value is the version of this layout"""
CHUNK_BYTES = 256 * 1024
"""of a snapshot in the object store; half of the largest payload where a server takes less"""
BEAT_S = 4.0
LEASE_S = 3 * BEAT_S
"""Who writes a snapshot says so every `BEAT_S`; another router takes over when it has seen nothing new for `LEASE_S`, by its own
clock"""
PAGE = 256
"""consumers in one answer of JetStream"""
POINTER = "snapshot"
_CONSUMER_EXISTS = (10013, 10105, 10148)
"""numbers of JetStream's errors: the name is in use, with a client that waits, with another configuration"""


@dataclass(frozen=True)
class StreamNames:
    """What belongs to one component. Names join their parts with ``+``, see `dynwire.nats.queue.QueueNames`."""

    component: str
    subject: str
    stream: str
    bucket: str
    """of the object store and of the pointer; buckets may not have a ``+``, so a hash keeps components apart"""

    @classmethod
    def of(cls, prefix: str, namespace: str, component: str) -> StreamNames:
        path, head = f"{namespace}.{component}", prefix.replace(".", "+")
        mark = hashlib.sha256(f"{prefix} {path}".encode()).hexdigest()[:8]
        bucket = f"{prefix.replace('.', '-')}_kv_{namespace}_{component}_{mark}"
        return cls(path, f"{prefix}.{STREAM_CHANNEL}.{path}", f"{head}+kv+{namespace}+{component}", bucket)


def failures() -> tuple[type[BaseException], ...]:
    """What goes wrong at a server: what nats-py raises, and our own errors."""
    from nats.errors import Error

    return (Error, OSError, TimeoutError, msgspec.DecodeError, DynwireError)


async def ended(task: asyncio.Future[Any]) -> None:
    """Cancel it until it has ended: before Python 3.12 `asyncio.wait_for`, and so nats-py, loses a cancellation now and then."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.05)


def stream_config(names: StreamNames, config: Config) -> StreamConfig:
    """The stream of a component: the oldest events go first, whoever has missed them asks the worker."""
    from nats.js import api

    events = config.events
    return api.StreamConfig(
        name=names.stream,
        description=f"KV cache events of {names.component}",
        subjects=[names.subject],
        retention=api.RetentionPolicy.LIMITS,
        discard=api.DiscardPolicy.OLD,
        max_age=events.stream_max_age,
        max_msgs=events.stream_max_messages,
        max_bytes=events.stream_max_bytes,
        storage=api.StorageType.FILE,
        num_replicas=events.replicas,
        # The server refuses a window that is longer than the messages live.
        duplicate_window=min(events.duplicate_window, events.stream_max_age),
        # Microseconds since 1970, more than events can have been stored in: the numbers of a stream that was lost and made anew
        # lie above those of the old one, so that a snapshot of then and the place of a router stay true.
        first_seq=time.time_ns() // 1000,
        metadata={OWNER: "1"},
    )


_SETTINGS = {
    "max_age": "DYNWIRE_EVENTS_STREAM_MAX_AGE",
    "max_msgs": "DYNWIRE_EVENTS_STREAM_MAX_MESSAGES",
    "max_bytes": "DYNWIRE_EVENTS_STREAM_MAX_BYTES",
    "num_replicas": "DYNWIRE_EVENTS_REPLICAS",
    "duplicate_window": "DYNWIRE_EVENTS_DUPLICATE_WINDOW",
}


class EventStream:
    """The stream of one component over one connection."""

    def __init__(self, client: Client, config: Config, names: StreamNames, timeout: float = API_TIMEOUT_S) -> None:
        self.js = client.jetstream(timeout=timeout)
        self.names = names
        self._client = client
        self._config = config

    async def ensure(self, *, worker: bool) -> StreamInfo:
        """The stream, made if it is missing. A worker changes the limits of an existing one to its own, a router does not.

        Raises `ConfigError` where JetStream is off for the account, has no space, or another stream is in the way, `ConnectError`
        where it does not answer at all.
        """
        from nats.js.errors import APIError

        names = self.names
        wanted = stream_config(names, self._config)
        try:
            info, made = await find_or_add(self.js, wanted)
            if made:
                return info
            found = info.config
            if found.subjects != wanted.subjects or plain(found.retention) != plain(wanted.retention):
                raise ConfigError(
                    f"the stream {names.stream} exists, but is none of ours: it has subjects {found.subjects} and retention "
                    f"{plain(found.retention)}; delete it or use another DYNWIRE_NATS_PREFIX",
                    name=names.stream, value=found.subjects, allowed=wanted.subjects,
                )  # fmt: skip
            other = differences(wanted, found, _SETTINGS)
            if worker and other:
                changes = ", ".join(f"{_SETTINGS[f]} from {have} to {want}" for f, (want, have) in other.items())
                logger.warning("the stream %s had other limits than this worker; changed: %s", names.stream, changes)
                return await self.js.update_stream(wanted, first_seq=found.first_seq)
            return info
        except APIError as error:
            raise self._translated(error) from error

    def _translated(self, error: Any) -> Exception:
        names, what = self.names, error.description or f"error {error.err_code}"
        off = (
            "the NATS server has no JetStream for us, which DYN_EVENT_PLANE=jetstream needs: start nats-server with -js, or "
            "enable it for the account, or choose another event plane"
        )
        if error.err_code is None:  # nobody answered: it is off, or is just starting
            return ConnectError(off, phase="connect")
        if error.err_code in JS_NOT_ENABLED:
            return ConfigError(
                off, name="DYN_EVENT_PLANE", value="jetstream", allowed="nats, zmq, none, or a NATS server with JetStream"
            )
        if error.err_code in JS_NO_SPACE:
            return ConfigError(
                f"the NATS server has no space for the events of {names.component} ({self._config.events.stream_max_bytes} bytes "
                f"are set aside, DYNWIRE_EVENTS_STREAM_MAX_BYTES): {what}",
                name="DYNWIRE_EVENTS_STREAM_MAX_BYTES", value=self._config.events.stream_max_bytes, allowed="less",
            )  # fmt: skip
        if error.err_code == JS_OVERLAP:
            return ConfigError(
                f"another stream of the NATS server has the subject {names.subject}; use another DYNWIRE_NATS_PREFIX",
                name="DYNWIRE_NATS_PREFIX", value=names.subject, allowed="a prefix of its own",
            )  # fmt: skip
        return error  # type: ignore[no-any-return]

    async def make_consumer(self, config: ConsumerConfig) -> int | None:
        """Make a consumer; how many messages wait for it. None if there is another one of this name.

        nats-py's `add_consumer` would change that one to be ours.
        """
        from nats.js.errors import APIError

        names = self.names
        body = msgspec.json.encode({"stream_name": names.stream, "config": config.as_dict(), "action": "create"})
        subject = f"$JS.API.CONSUMER.CREATE.{names.stream}.{config.name}"
        answer = msgspec.json.decode((await self._client.request(subject, body, timeout=API_TIMEOUT_S)).data)
        error = answer.get("error")
        if error is None:
            return int(answer.get("num_pending", 0))
        if error.get("err_code") in _CONSUMER_EXISTS:
            return None
        APIError.from_error(error)  # raises
        return None

    async def consumers(self) -> list[ConsumerInfo]:
        """All consumers, each a router's."""
        found: list[ConsumerInfo] = []
        while True:
            page = await self.js.consumers_info(self.names.stream, offset=len(found))
            found += page
            if len(page) < PAGE:
                return found

    async def purge(self, covered: int, first: int, least: int) -> int:
        """Delete what every router has acknowledged and the snapshot covers (up to ``covered``), if these are ``least`` messages.

        ``first``: the stream's first message. A router that is gone counts until its consumer is. Returns the last number that
        was deleted, 0 if nothing was.
        """
        bound = min([covered, *(info.ack_floor.stream_seq for info in await self.consumers() if info.ack_floor is not None)])
        if bound - first + 1 < max(least, 1):
            return 0
        await self.js.purge_stream(self.names.stream, seq=bound + 1)
        return bound

    async def purge_all(self) -> None:
        """Delete all events; the stream stays."""
        await self.js.purge_stream(self.names.stream)


class Pointer(msgspec.Struct, omit_defaults=True):
    """Value of the key ``snapshot``."""

    seq: int = 0
    """the snapshot covers the stream's messages up to this one; 0: there is none"""
    object: str = ""
    previous: str = ""
    """the object before that, which somebody may be reading"""
    writer: str = ""
    """router that is writing the next one; empty: nobody"""
    beat: int = 0
    """counts while it does"""


class SnapshotStore:
    """The snapshot of one component: one object, one pointer, one writer at a time.

    A writer announces itself in the pointer, uploads an object under a name of its own, and points to it; each step replaces the
    revision of the pointer that it has seen, so somebody who was taken for dead meanwhile changes nothing. Whoever dies in
    between leaves the old snapshot valid, and an object without pointer that the next writer removes.
    """

    def __init__(self, client: Client, config: Config, names: StreamNames) -> None:
        self._client = client
        self._js = client.jetstream(timeout=API_TIMEOUT_S)
        self._bucket = names.bucket
        self._component = names.component
        self._replicas = config.events.replicas
        self._seen = (0, 0.0)
        """revision of somebody else's announcement, and since when it is the newest"""

    async def pointer(self) -> tuple[Pointer, int]:
        """The pointer and its revision; an empty one and 0 if there is none."""
        from nats.js.errors import KeyNotFoundError, NotFoundError

        try:
            entry = await (await self._js.key_value(self._bucket)).get(POINTER)
        except (KeyNotFoundError, NotFoundError):  # no key, no bucket
            return Pointer(), 0
        return msgspec.json.decode(entry.value or b"{}", type=Pointer), entry.revision or 0

    async def load(self) -> tuple[int, bytes] | None:
        """``(covers the stream up to, bytes)`` of the newest snapshot; None if there is none."""
        pointer, _ = await self.pointer()
        while pointer.object:
            data = await self._read(pointer.object)
            if data is not None:
                return pointer.seq, data
            again, _ = await self.pointer()  # two newer ones while we read: it was removed
            if again.object == pointer.object:
                logger.warning("the snapshot %s of %s is not complete and is not used", pointer.object, self._component)
                return None
            pointer = again
        return None

    async def _read(self, name: str) -> bytes | None:
        """An object, or None if it is not there as a whole.

        Chunk by chunk with direct gets: nats-py's own `get` waits for ever for a chunk that is not there.
        """
        from nats.js.errors import NotFoundError

        try:
            info = await (await self._js.object_store(self._bucket)).get_info(name)
            stream, subject = f"OBJ_{self._bucket}", f"$O.{self._bucket}.C.{info.nuid}"
            parts: list[bytes] = []
            seq = 1
            for _ in range(info.chunks or 0):
                message = await self._js.get_msg(stream, seq=seq, subject=subject, direct=True, next=True)
                parts.append(message.data or b"")
                seq = (message.seq or 0) + 1
        except NotFoundError:
            return None

        def checked() -> bytes | None:
            data = b"".join(parts)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            return data if info.digest == f"SHA-256={digest}" else None

        return await asyncio.to_thread(checked)

    async def begin(self, writer: str) -> SnapshotWriter | None:
        """The right to write, for the router ``writer``; None while another one has it."""
        from nats.js.errors import KeyWrongLastSequenceError, NotFoundError

        pointer, revision = await self.pointer()
        now = time.monotonic()
        if pointer.writer not in ("", writer):  # our own name: we were killed at it
            if self._seen[0] != revision:
                self._seen = (revision, now)
            if now - self._seen[1] < LEASE_S:
                return None
        try:
            values = await self._js.key_value(self._bucket)
        except NotFoundError:
            values = await self._js.create_key_value(bucket=self._bucket, history=1, replicas=self._replicas)
        try:
            store = await self._js.object_store(self._bucket)
        except NotFoundError:
            store = await self._js.create_object_store(self._bucket, config=_object_store(self._replicas))
        pointer.writer, pointer.beat = writer, 0
        try:
            revision = await values.update(POINTER, msgspec.json.encode(pointer), last=revision)
        except KeyWrongLastSequenceError:
            return None  # somebody was faster
        limit = min(CHUNK_BYTES, self._client.max_payload // 2)
        return SnapshotWriter(self._js, values, store, self._bucket, pointer, revision, limit)

    async def delete(self) -> None:
        """Forget the snapshot. One that is being written will not be pointed to."""
        from nats.js.errors import NotFoundError

        with contextlib.suppress(NotFoundError):
            values = await self._js.key_value(self._bucket)
            await values.put(POINTER, msgspec.json.encode(Pointer()))
        with contextlib.suppress(NotFoundError):
            await self._js.purge_stream(f"OBJ_{self._bucket}")


def _object_store(replicas: int) -> Any:
    from nats.js import api

    return api.ObjectStoreConfig(
        description="index of KV routers, dynwire", storage=api.StorageType.FILE, replicas=replicas, max_bytes=-1
    )


class SnapshotWriter:
    """The right to write the next snapshot; made by `SnapshotStore.begin`, ends with `write` or `give_up`."""

    def __init__(
        self, js: Any, values: Any, store: ObjectStore, bucket: str, pointer: Pointer, revision: int, chunk_bytes: int
    ) -> None:
        self._js, self._values, self._store, self._bucket = js, values, store, bucket
        self._pointer, self._revision, self._chunk = pointer, revision, chunk_bytes

    async def write(self, seq: int, data: bytes) -> bool:
        """Upload, point to it, remove what nobody needs. False if another router has taken over."""
        from nats.js import api
        from nats.js.errors import KeyWrongLastSequenceError

        old = self._pointer
        try:
            await self._replace(old)  # taking the index may have taken long: nobody else must have begun
        except KeyWrongLastSequenceError:
            return False
        await self._sweep({old.object, old.previous})
        name = f"index-{seq}-{secrets.token_hex(4)}"
        meta = api.ObjectMeta(name=name, options=api.ObjectMetaOptions(max_chunk_size=self._chunk))
        uploading = asyncio.ensure_future(self._store.put(name, data, meta))
        try:
            while not (await asyncio.wait([uploading], timeout=BEAT_S))[0]:
                old.beat += 1
                await self._replace(old)
            uploading.result()
            await self._replace(Pointer(seq, name, old.object))
        except KeyWrongLastSequenceError:
            return False
        finally:
            await ended(uploading)
        await self._sweep({name, old.object})
        return True

    async def give_up(self) -> None:
        """Let others write."""
        from nats.js.errors import KeyWrongLastSequenceError

        self._pointer.writer = ""
        with contextlib.suppress(KeyWrongLastSequenceError):
            await self._replace(self._pointer)

    async def _replace(self, pointer: Pointer) -> None:
        self._revision = await self._values.update(POINTER, msgspec.json.encode(pointer), last=self._revision)

    async def _sweep(self, keep: set[str]) -> None:
        """Remove all objects but those named, and parts of uploads that ended early."""
        from nats.js.errors import NotFoundError

        stream, head = f"OBJ_{self._bucket}", f"$O.{self._bucket}."
        wanted = set()
        for name in keep - {""}:
            with contextlib.suppress(NotFoundError):
                info = await self._store.get_info(name)
                wanted.add(f"{head}C.{info.nuid}")
                wanted.add(f"{head}M.{base64.urlsafe_b64encode(name.encode()).decode()}")
        found = (await self._js.stream_info(stream, subjects_filter=f"{head}>")).state.subjects or {}
        for subject in found.keys() - wanted:
            await self._js.purge_stream(stream, subject=subject)
