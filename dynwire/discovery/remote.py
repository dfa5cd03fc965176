"""What backends share that reach a server: which records are known, who watches, and what is told while the server is away."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Iterable

from ..errors import ManagerClosed
from ..types import Instance
from .base import Discovery, Instances, Watch, WatchCallback, check_process, ordered
from .record import Record, check_ttl

log = logging.getLogger("dynwire.discovery")


class RemoteDiscovery(Discovery):
    """A set made of own records and of those known of others, which stays in use while the server is away.

    Backends keep `_own` and `_known`, call `_refresh` when one has changed, and set `_synced` while what is known is complete.
    """

    _place: str
    """of the records, as log lines name it"""

    def __init__(self, ttl: float) -> None:
        check_ttl(ttl)
        self._ttl = ttl
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        self._starting = asyncio.Lock()
        self._failing: set[str] = set()  # "read", "write": each is logged once, when it begins and when it ends

        self._own: dict[str, tuple[Instance, bytes]] = {}
        self._withdrawn: set[str] = set()  # keys that could not be deleted yet

        self._watches: set[Watch] = set()
        self._synced = False
        self._expiry_handle: asyncio.TimerHandle | None = None
        self._snapshot: Instances = ()

    # -- for backends to fill in

    @abstractmethod
    def _follow_soon(self) -> None:
        """Begin to read what is stored, unless that goes on already."""

    @abstractmethod
    def _records(self) -> Iterable[tuple[str, Record | None]]:
        """Key and record of everybody known."""

    @abstractmethod
    def _due(self) -> float | None:
        """Loop time at which somebody known has to be looked at again; None if nobody has to."""

    @abstractmethod
    def _on_due(self) -> None:
        """It is that time."""

    # -- the interface

    def watch(self, path: str | None, callback: WatchCallback) -> Watch:
        self._check()
        loop = asyncio.get_running_loop()
        watch = Watch(path, callback, loop, self._watches.discard)
        self._watches.add(watch)
        if self._synced:
            loop.call_soon(self._deliver, watch)
        else:
            self._follow_soon()
        return watch

    # -- state

    def _check(self) -> None:
        if self._closed:
            raise ManagerClosed("this discovery object is closed")
        check_process(self._pid)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def _lost(self, what: str, reason: object) -> None:
        """Note that the server cannot be read or written; the last known set stays."""
        if what not in self._failing:
            self._failing.add(what)
            log.warning("cannot %s %s (%s); keeping %d known instances", what, self._place, reason, len(self._snapshot))

    def _recovered(self, what: str) -> None:
        if what in self._failing:
            self._failing.discard(what)
            log.warning("can %s %s again", what, self._place)

    def _refresh(self, deliver: bool = False) -> None:
        """Make the set anew from what is known, and tell the watches if it has changed."""
        if self._closed:
            return
        others = (record.instance for key, record in self._records() if record and key not in self._own)
        fresh = ordered([*(instance for instance, _ in self._own.values()), *others])
        if fresh != self._snapshot or deliver:
            self._snapshot = fresh
            for watch in tuple(self._watches):
                # One callback each, so that an exception in one watcher's code does not keep the others from hearing.
                watch.loop.call_soon(self._deliver, watch)
        self._look_later()

    def _look_later(self) -> None:
        self._stop_looking()
        due = self._due()
        if due is not None:
            assert self._loop is not None
            self._expiry_handle = self._loop.call_at(due, self._on_due)

    def _stop_looking(self) -> None:
        if self._expiry_handle is not None:
            self._expiry_handle.cancel()
            self._expiry_handle = None

    def _deliver(self, watch: Watch) -> None:
        if self._synced:
            watch.deliver(self._snapshot)
