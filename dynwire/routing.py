"""Which instance gets the next request: routers, and setting aside instances that fail. Does no I/O.

An instance leaves the choice in one of two ways:

*failed* (no connection, lost, another wire, not let in, no accept in time): set aside for a pause that doubles with every failure
in a row, 0.1 to 10 s with jitter. After it one request probes the instance; a success brings it back, a failure sets it aside
for longer. A record that is stale (`EndpointNotFound`) is set aside the same way, briefly, without counting.

*busy* (`Overloaded`): with ``retry_after`` it gets nothing until then. Without, others are preferred for a moment; if there are
none it stays in the choice, because its free places are the only ones, and what exceeds them is refused at once anyway.

Errors of the request itself (`RemoteError`, `DecodeError`, `MessageTooLarge`, …) never count against an instance.
"""

from __future__ import annotations

import itertools
import random as _random
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .errors import (
    Cancelled,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    DecodeError,
    DynwireError,
    EndpointNotFound,
    NoInstances,
    Overloaded,
    PeerLost,
    PermissionDenied,
    PlaneMismatch,
    RemoteError,
    Unauthenticated,
)
from .types import Instance

MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 10.0
STALE_PAUSE_S = 0.5
"""After `EndpointNotFound`: long enough for discovery to remove the record or for a worker to add the endpoint."""
BUSY_PAUSE_S = 0.05
"""After `Overloaded` without ``retry_after``."""
MAX_RETRY_AFTER_S = 60.0
"""A longer ``retry_after`` counts as this: a peer's number must not switch it off for good."""
PROBE_LEASE_S = 10.0
"""A probe of which nothing was heard for this long is given up, and another request may probe."""

_NEVER = float("inf")

# Entry.state; the order does not matter
_HEALTHY, _FAILED, _BUSY, _REFUSING = range(4)
_STATE_NAMES = {_FAILED: "after failures", _REFUSING: "overloaded"}

_FAILURES = (ConnectError, PeerLost, PlaneMismatch, Unauthenticated)
_ANSWERS = (RemoteError, DecodeError, Cancelled, PermissionDenied)
# errors that only an instance that works can cause


class Entry:
    """One instance of an `InstanceTable`, with its channel and its record of failures."""

    __slots__ = ("_channel", "_table", "failures", "instance", "probing", "retry_at", "state")

    def __init__(self, table: InstanceTable, instance: Instance) -> None:
        self._table = table
        self._channel: Any = None
        self.instance = instance
        self.failures = 0
        """failures in a row that led to setting it aside"""
        self.retry_at = 0.0
        """time of the table's clock at which it is tried again; 0 while nothing is wrong"""
        self.probing = False
        self.state = _HEALTHY

    @property
    def channel(self) -> Any:
        """The channel, made on first use and only once. Any thread. Raises what the plane's ``channel`` raises."""
        channel = self._channel
        return self._table._make(self) if channel is None else channel

    @property
    def has_channel(self) -> bool:
        """Whether there is a channel to close."""
        return self._channel is not None

    @property
    def in_flight(self) -> int:
        """Calls and streams of the channel that have not ended; 0 if there is no channel yet."""
        channel = self._channel
        return 0 if channel is None else int(channel.in_flight)

    def __repr__(self) -> str:
        return f"<Entry {self.instance.path} {self.instance.id:016x} at {self.instance.address}>"


Chooser = Callable[[tuple[Entry, ...]], Entry]
"""Picks one of a non-empty tuple; any thread may call it, without a lock."""


def _round_robin(rng: _random.Random) -> Chooser:
    # A random start: otherwise the first request of every short-lived client would go to the same instance.
    step = itertools.count(rng.randrange(1 << 16)).__next__

    def choose(entries: tuple[Entry, ...]) -> Entry:
        return entries[step() % len(entries)]

    return choose


def _random_choice(rng: _random.Random) -> Chooser:
    uniform = rng.random  # atomic, and five times as fast as randrange or choice

    def choose(entries: tuple[Entry, ...]) -> Entry:
        return entries[int(uniform() * len(entries))]

    return choose


def _p2c(rng: _random.Random) -> Chooser:
    uniform = rng.random

    def choose(entries: tuple[Entry, ...]) -> Entry:
        count = len(entries)
        if count == 1:
            return entries[0]
        first = int(uniform() * count)
        second = int(uniform() * (count - 1))
        if second >= first:
            second += 1
        one, other = entries[first], entries[second]
        return one if one.in_flight <= other.in_flight else other

    return choose


def _least_loaded(rng: _random.Random) -> Chooser:
    step = itertools.count(rng.randrange(1 << 16)).__next__

    def choose(entries: tuple[Entry, ...]) -> Entry:
        count = len(entries)
        start = step() % count
        best = entries[start]
        least = best.in_flight
        for offset in range(1, count):
            if least == 0:
                break
            entry = entries[(start + offset) % count]
            load = entry.in_flight
            if load < least:
                best, least = entry, load
        return best

    return choose


def _direct(rng: _random.Random) -> Chooser:
    def choose(entries: tuple[Entry, ...]) -> Entry:
        raise ConfigError(
            "the direct router needs to be told which instance: pass instance=", name="instance", allowed="an instance's id"
        )

    return choose


ROUTERS: dict[str, Callable[[_random.Random], Chooser]] = {
    "round_robin": _round_robin,
    "random": _random_choice,
    "p2c": _p2c,
    "least_loaded": _least_loaded,
    "direct": _direct,
    # of requests without token ids; the others are chosen for by dynwire.kv_router.client
    "kv": _least_loaded,
}
"""Router name to a function that makes a chooser for one table."""


def make_chooser(router: str, rng: _random.Random) -> Chooser:
    """Raises `ConfigError` for a router that is unknown."""
    factory = ROUTERS.get(router)
    if factory is None:
        raise ConfigError(
            f"router {router!r} does not exist; available: {', '.join(ROUTERS)}",
            name="router",
            value=router,
            allowed=list(ROUTERS),
        )
    return factory(rng)


class InstanceTable:
    """The instances of one endpoint, and the choice among them. Any thread may call anything.

    ``make_channel(instance)`` must not call back into the table. ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        endpoint: str,
        router: str,
        make_channel: Callable[[Instance], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: _random.Random | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.router = router
        self._rng = _random.Random() if rng is None else rng
        self._choose = make_chooser(router, self._rng)
        self._make_channel = make_channel
        self._clock = clock
        self._lock = threading.Lock()
        self._channel_lock = threading.Lock()  # a lock of its own: making a channel must not hold up picks
        self._by_id: dict[int, Entry] = {}
        # Written under the lock, read without it. Both are replaced as a whole, and any mixture of old and new is harmless.
        self._ready: tuple[Entry, ...] = ()
        self._due = _NEVER  # when the first entry set aside may be tried again

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries in the order of the last update, set aside or not."""
        with self._lock:
            return tuple(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def update(self, instances: Iterable[Instance]) -> tuple[Entry, ...]:
        """Replace the set; returns the entries that left, whose channels are the caller's to close.

        An instance that is reached in the same way as before keeps its entry, channel and failures, even if its metadata
        changed.
        """
        with self._lock:
            before = self._by_id
            after: dict[int, Entry] = {}
            for instance in instances:
                entry = before.get(instance.id)
                if entry is None or not _same_way(entry.instance, instance):
                    entry = Entry(self, instance)
                else:
                    entry.instance = instance
                after[instance.id] = entry
            self._by_id = after
            self._rebuild()
            return tuple(entry for key, entry in before.items() if after.get(key) is not entry)

    def pick(self, exclude: Collection[int] = (), instance_id: int | None = None) -> Entry:
        """Choose an instance whose id is not in ``exclude``, or the one named.

        Raises `NoInstances` if there is none or all are set aside, `ConfigError` if the router is ``direct`` and
        ``instance_id`` is missing.
        """
        if instance_id is None and not exclude:
            ready = self._ready
            if ready and (self._due is _NEVER or self._clock() < self._due):
                return self._choose(ready)
        return self._pick_slowly(exclude, instance_id)

    def report_success(self, entry: Entry) -> None:
        """A request got its reply. Costs one attribute lookup unless the entry is set aside."""
        if entry.retry_at:
            with self._lock:
                # Replies of an overloaded instance are no sign that it has room again: only time ends that.
                if entry.state == _FAILED:
                    self._clear(entry)
                    self._rebuild()

    def report_failure(self, entry: Entry, error: DynwireError) -> None:
        """A request failed; sets the entry aside if the error is the instance's."""
        if error.details.get("refused") and error.sent == "no" and not entry.probing:
            # The peer is alive and said so: it takes no more on this connection (GOAWAY, REFUSED_STREAM), perhaps on the next.
            # If it has really gone, connecting fails. Setting it aside would fail calls that have nothing to do with it.
            return
        if error.details.get("alive") and not entry.probing:
            # What stands between us and the instance has failed, for all instances alike (the NATS server was away).
            return
        with self._lock:
            if self._by_id.get(entry.instance.id) is not entry:
                return
            now = self._clock()
            if isinstance(error, Overloaded):
                self._overloaded(entry, error.retry_after, now)
            elif isinstance(error, EndpointNotFound):
                if entry.state != _FAILED or entry.probing:
                    self._set_aside(entry, _FAILED, now + STALE_PAUSE_S)
            elif isinstance(error, _FAILURES) or (isinstance(error, DeadlineExceeded) and error.phase in ("accept", "connect")):
                # When a connection breaks, all its requests report it; one of them is enough. Likewise requests that were
                # sent before the entry was set aside and fail during the pause.
                if entry.state != _FAILED or entry.probing:
                    entry.failures += 1
                    self._set_aside(entry, _FAILED, now + self._pause(entry.failures))
            elif entry.probing:
                if isinstance(error, _ANSWERS):
                    self._clear(entry)
                else:  # says nothing about the instance: the probe is still owed
                    self._set_aside(entry, _FAILED, now + self._pause(entry.failures))
            else:
                return
            self._rebuild()

    # -- below: with the lock held, but for _make

    def _make(self, entry: Entry) -> Any:
        with self._channel_lock:
            if entry._channel is None:
                entry._channel = self._make_channel(entry.instance)
            return entry._channel

    def _pause(self, failures: int) -> float:
        longest = min(MAX_PAUSE_S, MIN_PAUSE_S * 2.0 ** min(failures, 10))
        # Jitter: many clients that lost the same worker at the same moment must not come back together.
        return longest * (0.5 + 0.5 * self._rng.random())

    def _set_aside(self, entry: Entry, state: int, until: float) -> None:
        entry.state = state
        entry.retry_at = until
        entry.probing = False

    def _clear(self, entry: Entry) -> None:
        entry.state = _HEALTHY
        entry.retry_at = 0.0
        entry.failures = 0
        entry.probing = False

    def _overloaded(self, entry: Entry, retry_after: float | None, now: float) -> None:
        # An instance that refuses with this error is alive, so this ends a probe too.
        if entry.state == _FAILED and not entry.probing:
            return
        entry.failures = 0
        if retry_after is not None and retry_after > 0:
            until = now + min(retry_after, MAX_RETRY_AFTER_S)
            self._set_aside(entry, _REFUSING, max(entry.retry_at, until) if entry.state == _REFUSING else until)
        elif entry.state != _REFUSING:
            self._set_aside(entry, _BUSY, now + BUSY_PAUSE_S)

    def _rebuild(self) -> None:
        entries = self._by_id.values()
        healthy = tuple(e for e in entries if e.state == _HEALTHY)
        self._ready = healthy or tuple(e for e in entries if e.state == _BUSY)
        # The constant itself if nothing is set aside: pick compares identity.
        self._due = min((e.retry_at for e in entries if e.state != _HEALTHY), default=_NEVER)

    def _pick_slowly(self, exclude: Collection[int], instance_id: int | None) -> Entry:
        with self._lock:
            now = self._clock()
            if now >= self._due:
                self._end_overload(now)
            if instance_id is not None:
                entry = self._by_id.get(instance_id)
                if entry is None or instance_id in exclude:
                    raise self._none(now, exclude, instance_id)
                if entry.state in (_HEALTHY, _BUSY):
                    return entry
                if entry.state == _FAILED and now >= entry.retry_at:
                    return self._probe(entry, now)
                raise self._none(now, exclude, instance_id)
            if self.router != "direct" and now >= self._due:
                for entry in self._by_id.values():
                    if entry.state == _FAILED and now >= entry.retry_at and entry.instance.id not in exclude:
                        return self._probe(entry, now)
            ready = self._ready
            if exclude:
                ready = tuple(e for e in ready if e.instance.id not in exclude) or tuple(
                    e for e in self._by_id.values() if e.state == _BUSY and e.instance.id not in exclude
                )
            if not ready and self.router != "direct":
                raise self._none(now, exclude, None)
            return self._choose(ready)

    def _end_overload(self, now: float) -> None:
        for entry in self._by_id.values():
            if entry.state in (_BUSY, _REFUSING) and now >= entry.retry_at:
                self._clear(entry)
        self._rebuild()

    def _probe(self, entry: Entry, now: float) -> Entry:
        entry.probing = True
        entry.retry_at = now + PROBE_LEASE_S
        self._rebuild()
        return entry

    def _none(self, now: float, exclude: Collection[int], instance_id: int | None) -> NoInstances:
        known = len(self._by_id)
        aside = [e for e in self._by_id.values() if e.state in _STATE_NAMES]
        excluded = sum(1 for i in exclude if i in self._by_id)
        text = f"no instance of {self.endpoint} can take a request: {known} known"
        if instance_id is not None:
            text = f"instance {instance_id:016x} of {self.endpoint} cannot take a request: {known} known"
            if instance_id not in self._by_id:
                text += ", this one not among them"
            aside = [e for e in aside if e.instance.id == instance_id]
        details: dict[str, Any] = {"known": known, "set_aside": len(aside), "excluded": excluded}
        if aside:
            first = min(aside, key=lambda e: e.retry_at)
            wait = max(0.0, first.retry_at - now)
            why = " and ".join(sorted({_STATE_NAMES[e.state] for e in aside}))
            text += f", {len(aside)} set aside {why}"
            text += f", the next one for another {wait:.2f} s"
            if first.probing:
                text += " unless the request that tries it out succeeds earlier"
            details["retry_in"] = wait
        if excluded:
            text += f", {excluded} excluded because this request was tried there"
        return NoInstances(text, endpoint=self.endpoint, details=details)


def _same_way(one: Instance, other: Instance) -> bool:
    return (one.address, one.plane, one.wire, one.codecs, one.path) == (
        other.address,
        other.plane,
        other.wire,
        other.codecs,
        other.path,
    )
