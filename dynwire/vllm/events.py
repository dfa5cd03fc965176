"""vLLM's cache events, from its ZMQ publisher to routers.

vLLM publishes per data-parallel rank, in messages of three parts: ``[topic, sequence (u64, big-endian), msgpack [timestamp,
[event, …], rank]]``. Its publisher connects to an address without a wildcard, so this end binds: the port is known before the
engine starts, and nobody else can take it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from .._kvhash import compute_block_hashes
from ..errors import BindError, ConfigError

if TYPE_CHECKING:
    from ..kv_router.publisher import KvEventPublisher

logger = logging.getLogger("dynwire.vllm")

HOST = "127.0.0.1"
QUEUE_BATCHES = 100_000
"""Batches that may wait to be read, as many as vLLM keeps on its side. The engine makes one per step, so this is hours."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
BIND_ATTEMPTS = 50
"""For data-parallel ranks, which need as many ports in a row."""
WHOLE_PREFIX_KINDS = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of cache groups that keep a whole prefix. Of a model that mixes kinds, the others (sliding windows, state spaces) keep
what their layers still need, which says nothing about prefixes."""
DEVICE = (None, "GPU")
"""vLLM's word for the cache that the model runs on, also on a CPU; blocks that were offloaded are reported with other words"""

_U64 = (1 << 64) - 1


class BlockStored(msgspec.Struct, tag=True):
    """As vLLM 0.32 writes it; fields that are not needed here are left out."""

    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


class EventBatch(msgspec.Struct, array_like=True):
    timestamp: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


def as_u64(block_hash: int | bytes) -> int:
    """The engine's id of a block as the u64 of our events: the last 8 bytes, big-endian.

    vLLM shortens its SHA-256 digests to integers in the same way, unless VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is 0; so the ids are
    the same with either setting.
    """
    return block_hash & _U64 if isinstance(block_hash, int) else int.from_bytes(block_hash[-8:], "big")


class Translator:
    """Turns vLLM's batches into calls of a `KvEventPublisher`. Does no I/O."""

    def __init__(self, publisher: KvEventPublisher, block_size: int) -> None:
        self.skipped = 0
        """events that say nothing about prefixes of plain tokens on the device"""
        self.malformed = 0
        self.lost = 0
        """batches that never came"""
        self._publisher = publisher
        self._block_size = block_size
        self._decode = msgspec.msgpack.Decoder(EventBatch).decode
        self._next: dict[int, int] = {}
        self._group: int | None = None

    def on_message(self, parts: list[bytes]) -> None:
        """A message as it came from the socket. What cannot be read is counted and logged."""
        try:
            _, sequence_bytes, payload = parts
            batch = self._decode(payload)
        except (ValueError, msgspec.MsgspecError) as error:
            self.malformed += 1
            if self.malformed == 1:
                logger.warning("vLLM has published a cache event that this version does not understand: %s", error)
            return
        rank = batch.data_parallel_rank or 0
        self._follow(rank, int.from_bytes(sequence_bytes, "big"))
        for event in batch.events:
            self._translate(event, rank)

    def _follow(self, rank: int, sequence: int) -> None:
        expected = self._next.get(rank, 0)
        self._next[rank] = sequence + 1
        if sequence > expected:
            self.lost += sequence - expected
            # Removals may be among them, and a router must not believe in blocks that are gone.
            logger.warning(
                "%d batches of cache events of rank %d were lost: its blocks are forgotten, routers learn of them again as they "
                "are stored anew",
                sequence - expected, rank,
            )  # fmt: skip
            self._publisher.publish_cleared(rank)

    def _translate(self, event: BlockStored | BlockRemoved | AllBlocksCleared, rank: int) -> None:
        if isinstance(event, BlockStored):
            if event.medium in DEVICE and event.kv_cache_spec_kind in WHOLE_PREFIX_KINDS and self._is_of_group(event.group_idx):
                self._stored(event, rank)
            else:
                self.skipped += 1
        elif isinstance(event, BlockRemoved):
            if event.medium in DEVICE and self._is_of_group(event.group_idx):
                self._publisher.publish_removed([as_u64(value) for value in event.block_hashes], rank)
            else:
                self.skipped += 1
        else:
            self._publisher.publish_cleared(rank)

    def _is_of_group(self, group: int | None) -> bool:
        """Whether this is the cache group that is followed: the first one that keeps whole prefixes."""
        if self._group is None:
            self._group = group
        return group == self._group

    def _stored(self, event: BlockStored, rank: int) -> None:
        count = len(event.block_hashes)
        if event.block_size != self._block_size or len(event.token_ids) != count * self._block_size:
            self.skipped += 1  # a block that is not full yet, or with holes before it
            return
        plain = _plain_blocks(event, count)
        if plain < count:
            self.skipped += 1
        if plain:
            tokens = event.token_ids[: plain * self._block_size]
            self._publisher.publish_stored(
                None if event.parent_block_hash is None else as_u64(event.parent_block_hash),
                [as_u64(value) for value in event.block_hashes[:plain]],
                compute_block_hashes(tokens, self._block_size, event.lora_name),
                rank,
            )


def _plain_blocks(event: BlockStored, count: int) -> int:
    """Blocks at the front whose content is tokens (and a LoRA adapter) only, without images, salts or embeddings."""
    if event.extra_keys is None:
        return count
    known = [] if event.lora_name is None else [event.lora_name]
    for number, keys in enumerate(event.extra_keys[:count]):
        if keys is not None and keys != known:
            return number
    return count


class EventSocket:
    """Where vLLM's publishers connect to. Belongs to the event loop that calls `relay`."""

    def __init__(self, ranks: int = 1) -> None:
        """Binds a free port of this machine, as many in a row as there are ranks. Raises `BindError`, `ConfigError`."""
        try:
            import zmq
            import zmq.asyncio
        except ImportError as error:
            raise ConfigError(
                "vLLM's cache events need pyzmq: pip install 'dynwire[zmq]', or --kv-events off", name="kv-events"
            ) from error
        self._zmq = zmq
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.rcvhwm = QUEUE_BATCHES
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        self._socket.subscribe(b"")
        self._task: asyncio.Task[None] | None = None
        try:
            self.endpoint = self._bind(ranks)
            """of the first rank; each further one has the next port"""
        except BaseException:
            self._close()
            raise

    def _bind(self, ranks: int) -> str:
        for _ in range(BIND_ATTEMPTS):
            port = self._socket.bind_to_random_port(f"tcp://{HOST}")
            bound = [port]
            try:
                for further in range(port + 1, port + ranks):
                    self._socket.bind(f"tcp://{HOST}:{further}")
                    bound.append(further)
            except self._zmq.ZMQError:
                for number in bound:
                    self._socket.unbind(f"tcp://{HOST}:{number}")
                continue
            return f"tcp://{HOST}:{port}"
        raise BindError(f"no {ranks} free ports in a row at {HOST} for vLLM's cache events", address=HOST)

    def relay(self, translator: Translator) -> None:
        """Hand over everything that comes, from now on and from before."""
        self._task = asyncio.create_task(self._read(translator), name="dynwire-vllm-events")

    async def _read(self, translator: Translator) -> None:
        while True:
            translator.on_message(await self._socket.recv_multipart())

    async def close(self) -> None:
        """May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._close()

    def _close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
