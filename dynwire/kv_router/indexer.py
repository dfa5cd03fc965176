"""The router's side of KV events: one tree of what all workers of a component have cached, kept up to date."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from .._kvtree import OverlapScores, RadixTree
from ..client import AsyncClient
from ..errors import ConfigError, DynwireError
from ..event_plane.base import EventIndex, EventReceiver, open_receiver
from ..event_plane.recovery import Batch, Follower, RangeAnswer, RangeQuery
from ..manager import AsyncNetworkManager
from ..types import EndpointId, Instance
from .publisher import EVENTS_ENDPOINT, joined

logger = logging.getLogger("dynwire.kv_router")

QUERY_TIMEOUT_S = 5.0
"""for a whole answer; a worker that is slower is asked again, later"""
BUDGET_BYTES = 4 * 1024**3
"""of the index: 4 × 10^7 blocks"""
SNAPSHOT_VERSION = 1


class IndexSnapshot(msgspec.Struct):
    """An index as it is stored: what its tree has, and up to which event of every rank."""

    version: int
    block_size: int | None
    positions: list[tuple[int, int, int, int]]
    """worker, rank, epoch, last applied event"""
    tree: bytes
    """of `RadixTree.snapshot`"""


class KvIndexer(EventIndex):
    """Follows the events of all workers of ``namespace.component``. Belongs to the event loop that started it.

    Losing the event plane never raises: the index keeps what it knows, `connected` and `staleness` say how old that is, and
    whatever was missed is asked for when workers can be reached again.
    """

    def __init__(
        self,
        manager: AsyncNetworkManager,
        namespace: str,
        component: str,
        block_size: int | None = None,
        *,
        router_id: str | None = None,
        reset: bool = False,
    ) -> None:
        self.tree = RadixTree(BUDGET_BYTES)
        self.follower = Follower(self.tree)
        self.block_size = block_size
        """tokens per block; of the first worker, if it is not given"""
        self.mismatched: dict[int, int] = {}
        """workers with another block size, which are left out of the index: worker id to their block size"""
        self.malformed = 0
        """messages on the event plane that were none of ours"""
        self._manager = manager
        self._path = EndpointId(namespace, component, EVENTS_ENDPOINT)
        self._receiver: EventReceiver | None = open_receiver(manager.config, namespace, component, router_id, reset)
        self._client: AsyncClient | None = None
        self._decode = msgspec.msgpack.Decoder(Batch).decode
        self._instances: dict[int, Instance] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._unlisten: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restored: set[int] = set()
        """workers of the snapshot that discovery has not shown yet"""
        self._restored_size: int | None = None
        self._restored_timer: asyncio.TimerHandle | None = None
        self._held: list[Callable[[], object]] | None = None
        """while a snapshot is taken: what would change the tree, and is done afterwards"""

    async def start(self) -> None:
        """Subscribe, and take over the trees of the workers that are there."""
        if self._receiver is None:
            return
        self._loop = asyncio.get_running_loop()
        self._receiver.bind(self)
        await self._receiver.start(self._on_message)
        try:
            self._client = await self._manager.endpoint(self._path).client(router="direct")
            route = await self._client._route()
        except BaseException:  # cancellation included
            await self._receiver.close()
            raise
        self._unlisten = route.listen(lambda: self._change(lambda: self._on_instances(route.instances)))
        self._change(lambda: self._on_instances(route.instances))
        if self._restored:
            # A worker that is still there writes its record within this time.
            self._restored_timer = self._loop.call_later(self._manager.config.discovery.ttl, self._change, self._forget_restored)

    async def close(self) -> None:
        """Unsubscribe. May be called twice."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._restored_timer is not None:
            self._restored_timer.cancel()
            self._restored_timer = None
        for task in self._asking:
            task.cancel()
        if self._asking:
            await asyncio.wait(tuple(self._asking))
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._receiver is not None:
            await self._receiver.close()

    # questions to the index

    def find_matches(self, block_hashes: list[int]) -> OverlapScores:
        """See `RadixTree.find_matches`."""
        return self.tree.find_matches(block_hashes)

    @property
    def connected(self) -> bool:
        """Can events come, as far as this end can tell?"""
        return self._receiver is not None and self._receiver.connected

    @property
    def workers(self) -> tuple[int, ...]:
        """Ids of the workers whose events are followed."""
        return tuple(self._instances)

    def staleness(self) -> float:
        """Seconds since the oldest gap that is still open was seen; 0 without one."""
        return self.follower.staleness(time.monotonic())

    # snapshots

    @property
    def _has_begun(self) -> bool:
        """Is something from workers in the tree?"""
        return bool(self.follower.stats.applied or self.follower.stats.dumps)

    async def restore(self, data: bytes) -> bool:
        """Read in another thread, which lets this one run in between."""

        def read() -> tuple[IndexSnapshot, RadixTree]:
            found = msgspec.msgpack.decode(data, type=IndexSnapshot)
            if found.version != SNAPSHOT_VERSION:
                raise ValueError(f"it has version {found.version}, this release reads version {SNAPSHOT_VERSION}")
            return found, RadixTree.restore(found.tree, BUDGET_BYTES)

        if self._has_begun:
            return False
        try:
            found, tree = await asyncio.to_thread(read)
        except (msgspec.MsgspecError, ValueError) as error:
            logger.warning("the stored snapshot of %s cannot be used: %s", self._path, error)
            return False
        if self._has_begun or (self.block_size or found.block_size) != found.block_size:
            return False
        self._forget_restored()
        self.tree = self.follower.tree = tree
        for worker_id, rank, epoch, last_id in found.positions:
            self.follower.set_position(worker_id, rank, epoch, last_id, wanted=worker_id in self._instances)
            if worker_id not in self._instances:
                self._restored.add(worker_id)
        self._restored_size = found.block_size
        return True

    async def snapshot(self) -> bytes:
        """Written in another thread, without the GIL where it takes long; look-ups go on meanwhile, changes wait."""
        assert self._held is None
        self._held = []
        tree, size = self.tree, self.block_size
        positions = [(*key, *position) for key, position in self.follower.positions().items() if position[0]]

        def write() -> bytes:
            return msgspec.msgpack.encode(IndexSnapshot(SNAPSHOT_VERSION, size, positions, tree.snapshot()))

        writing = asyncio.get_running_loop().run_in_executor(None, write)
        # Not when we stop waiting: a thread cannot be cancelled, and reads the tree to the end.
        writing.add_done_callback(self._release)
        return await asyncio.shield(writing)

    def _release(self, writing: asyncio.Future[bytes]) -> None:
        held, self._held = self._held or [], None
        for change in held:
            change()

    def resynchronise(self) -> None:
        self.follower.want_all()
        self._pump()

    def _change(self, change: Callable[[], object]) -> None:
        """Do what changes the tree, now or when the snapshot that is being taken is complete."""
        if self._held is None:
            change()
        else:
            self._held.append(change)

    def _forget_restored(self) -> None:
        """Workers that ended while no router was there: their blocks leave."""
        restored, self._restored = self._restored, set()
        for worker_id in restored:
            self.follower.remove_worker(worker_id)

    # workers come and go

    def _on_instances(self, instances: tuple[Instance, ...]) -> None:
        found = {}
        for instance in instances:
            worker_id = instance.metadata.get("worker_id")
            if isinstance(worker_id, int):
                found[worker_id] = instance
        for worker_id in self._instances.keys() - found.keys():
            self._forget(worker_id)
        for worker_id, instance in found.items():
            if worker_id not in self._instances:
                self._follow(worker_id, instance)
        self._pump()

    def _follow(self, worker_id: int, instance: Instance) -> None:
        metadata = instance.metadata
        size = metadata.get("block_size")
        if self.block_size is None and isinstance(size, int):
            self.block_size = size
        if self._restored and size != self._restored_size:
            self._forget_restored()  # blocks of another size mean nothing beside those of this worker
        if size != self.block_size:
            if worker_id not in self.mismatched:
                logger.warning(
                    "worker %x has KV blocks of %s tokens, this router uses %s: it is routed to by load only; start both with "
                    "the same block size (--kv-cache-block-size)",
                    worker_id, size, self.block_size,
                )  # fmt: skip
            self.mismatched[worker_id] = size if isinstance(size, int) else 0
            return
        assert self._receiver is not None
        try:
            self._receiver.add_sender(worker_id, metadata)
        except ConfigError as error:
            logger.warning("%s", error)
            return
        self._instances[worker_id] = instance
        self._restored.discard(worker_id)
        ranks = metadata.get("dp_size")
        self.follower.add_worker(worker_id, tuple(range(ranks)) if isinstance(ranks, int) and 0 < ranks <= 1024 else (0,))

    def _forget(self, worker_id: int) -> None:
        del self._instances[worker_id]
        self.mismatched.pop(worker_id, None)
        if self._receiver is not None:
            self._receiver.remove_sender(worker_id)
        self.follower.remove_worker(worker_id)

    # events and gaps

    def _on_message(self, data: bytes) -> None:
        try:
            batch = self._decode(data)
        except msgspec.MsgspecError:
            self.malformed += 1
            return
        self._change(lambda: self._take(batch))

    def _take(self, batch: Batch) -> None:
        # an unknown one's record is on its way; its tree will be asked for
        if batch.worker_id in self._instances or batch.worker_id in self._restored:
            try:
                self.follower.on_batch(batch, time.monotonic())
            except (ValueError, OverflowError):  # numbers that are no u64
                self.malformed += 1
            if self.follower.behind:
                self._pump()

    def _pump(self) -> None:
        """Ask what there is to ask, and wake up for the rest."""
        loop = self._loop
        if loop is None or self._client is None:
            return
        now = time.monotonic()
        for query in self.follower.questions(now):
            task = loop.create_task(self._ask(query), name=f"dynwire-kv-query-{query.worker_id:x}")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        wakeup = self.follower.next_wakeup()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wakeup is not None:
            self._timer = loop.call_later(max(0.0, wakeup - now), self._pump)

    async def _ask(self, query: RangeQuery) -> None:
        client, instance = self._client, self._instances.get(query.worker_id)
        try:
            if client is None or instance is None:
                return self.follower.on_failure(query.worker_id, query.dp_rank, time.monotonic())
            parts: list[RangeAnswer] = []
            try:
                async with client.stream(
                    query, instance=instance.id, timeout=QUERY_TIMEOUT_S, reply_type=RangeAnswer, deadline=None
                ) as stream:
                    async for part in stream:
                        parts.append(part)
            except DynwireError as error:
                logger.info("worker %x does not answer about its KV events: %s", query.worker_id, error)
                self.follower.on_failure(query.worker_id, query.dp_rank, time.monotonic())
                return None
            if not parts or parts[-1].more:
                self.follower.on_failure(query.worker_id, query.dp_rank, time.monotonic())
            else:
                answer = joined(parts)
                self._change(lambda: self.follower.on_answer(answer, time.monotonic()))
        finally:
            loop = self._loop
            if loop is not None and self._client is not None:
                loop.call_soon(self._pump)
        return None
