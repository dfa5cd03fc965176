"""Discovery inside one process: for tests, notebooks, and services that share an interpreter."""

from __future__ import annotations

import asyncio
import os
import threading

from ..errors import ManagerClosed
from ..types import Instance
from .base import Discovery, Instances, Watch, WatchCallback, check_instance, ordered, select


class MemoryRegistry:
    """What several `MemoryDiscovery` objects share; any thread may call. Pass one explicitly to isolate a test."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owned: dict[int, tuple[object, Instance]] = {}
        self._watches: set[Watch] = set()
        self.snapshot: Instances = ()
        """all instances, sorted; replaced as a whole, so that reading it needs no lock"""

    def put(self, owner: object, instance: Instance) -> None:
        with self._lock:
            self._owned[instance.id] = (owner, instance)
            self._changed()

    def remove(self, owner: object, ids: list[int]) -> None:
        """Remove those of ``ids`` that ``owner`` put last."""
        with self._lock:
            mine = [i for i in ids if i in self._owned and self._owned[i][0] is owner]
            for i in mine:
                del self._owned[i]
            if mine:
                self._changed()

    def add_watch(self, watch: Watch) -> None:
        with self._lock:
            self._watches.add(watch)
            self._notify(watch)

    def remove_watch(self, watch: Watch) -> None:
        with self._lock:
            self._watches.discard(watch)

    def forget(self) -> None:
        """Drop everything, without callbacks. For the child of a fork: the instances and the loops are the parent's."""
        self._lock = threading.Lock()
        self._owned.clear()
        self._watches.clear()
        self.snapshot = ()

    def _changed(self) -> None:
        self.snapshot = ordered(instance for _, instance in self._owned.values())
        for watch in tuple(self._watches):
            self._notify(watch)

    def _notify(self, watch: Watch) -> None:
        # The callback reads the snapshot when it runs, not now: notifications from several threads may arrive out of order,
        # and so each delivers the newest set and the last one is right.
        try:
            watch.loop.call_soon_threadsafe(lambda: watch.deliver(self.snapshot))
        except RuntimeError:  # that loop was closed without cancelling its watches; nobody is left to tell
            self._watches.discard(watch)


_shared = MemoryRegistry()
os.register_at_fork(after_in_child=_shared.forget)


class MemoryDiscovery(Discovery):
    """Instances of this process. Objects on different event loops and threads see each other's registrations."""

    def __init__(self, registry: MemoryRegistry | None = None) -> None:
        self._registry = _shared if registry is None else registry
        self._ids: set[int] = set()
        self._watches: set[Watch] = set()
        self._closed = False

    @property
    def healthy(self) -> bool:
        return not self._closed

    async def start(self) -> None:
        self._check_open()

    async def register(self, instance: Instance) -> None:
        self._check_open()
        check_instance(instance)
        self._ids.add(instance.id)
        self._registry.put(self, instance)

    async def deregister(self, instance: Instance) -> None:
        self._ids.discard(instance.id)
        self._registry.remove(self, [instance.id])

    def watch(self, path: str | None, callback: WatchCallback) -> Watch:
        self._check_open()
        watch = Watch(path, callback, asyncio.get_running_loop(), self._forget_watch)
        self._watches.add(watch)
        self._registry.add_watch(watch)
        return watch

    async def list(self, path: str | None = None) -> Instances:
        self._check_open()
        return select(self._registry.snapshot, path)

    async def close(self) -> None:
        self._closed = True
        for watch in tuple(self._watches):
            watch.cancel()
        self._registry.remove(self, list(self._ids))
        self._ids.clear()

    def _forget_watch(self, watch: Watch) -> None:
        self._watches.discard(watch)
        self._registry.remove_watch(watch)

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosed("this discovery object is closed")
