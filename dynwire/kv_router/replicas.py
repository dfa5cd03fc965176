"""What the routers of one component tell each other about the load of their workers. Does no I/O; time comes in as an argument.

Every router announces what it books, and what becomes of it (`LoadAnnouncer`); the others count that like their own
(`ReplicaLoads`). Messages with changes have consecutive numbers. What is lost is noticed by the next number, or by the one that
is repeated twice a second together with the number of requests, and then the router that lost it asks for a snapshot: all that
the other one has booked at that moment. Snapshots are announced to everybody, so that one answer serves all who ask.

A router that says nothing for `SILENCE_S` counts for nothing, until it is heard again. The index never travels this way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from .load import ActiveLoad, Booking

HEAD_S = 0.5
"""Between two repetitions of the newest number: a lost last message is missed after this."""
SILENCE_S = 3.0
"""Six lost heads. A router that stalls for longer is left out of the others' decisions and comes back with a snapshot."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 5.0
"""between two questions to a router that does not answer; doubles from the first to the second"""
ANSWER_PAUSE_S = 0.02
"""Between two snapshots: several routers that ask at once get one. Less than the pause after which they ask again."""
MESSAGE_BLOCKS = 16_384
"""Blocks per message: 150 KB, below the 1 MiB that a NATS server takes by default. A prompt with more blocks counts as if the
rest of them were shared with nobody."""
MESSAGE_NUMBERS = 16_384
MAX_REPLICAS = 1024
"""Routers that are listened to; whoever may publish here could invent any number of them."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class Booked(msgspec.Struct, array_like=True):
    """A request that a router has sent to a worker."""

    number: int
    """counts from 1 per router; a request that is tried again elsewhere gets another one"""
    worker_id: int
    dp_rank: int
    prefill_tokens: Count
    further_blocks: Count
    blocks: list[int]
    """sequence hashes"""


class LoadMessage(msgspec.Struct, omit_defaults=True):
    """What travels between routers, as msgpack."""

    replica: int
    """the router that sends it: random, another one at every start"""
    seq: int
    """``changes``: number of this message; otherwise that of the last one with changes"""
    kind: Literal["changes", "snapshot", "head", "ask", "leaving"]
    booked: list[Booked] = []
    computed: list[int] = []
    """requests whose prompts have been computed"""
    finished: list[int] = []
    part: int = 0
    more: bool = False
    """further parts of this snapshot follow, in consecutive messages"""
    requests: int = 0
    """(head) requests that are booked"""
    ask: list[int] = []
    """(ask) routers whose snapshots are wanted"""


class LoadAnnouncer:
    """Makes messages of what happens to a router's own requests; the `listener` of its load. One thread."""

    def __init__(self, replica: int, load: ActiveLoad) -> None:
        self.replica = replica
        self.seq = 0
        self._load = load
        self._next = itertools.count(1)
        self._numbers: dict[str, int] = {}
        self._new: dict[int, Booking] = {}
        self._computed: list[int] = []
        self._finished: list[int] = []
        self.wake: Callable[[], object] = lambda: None
        """called when there is something to say"""
        load.listener = self

    def booked(self, request_id: str, booking: Booking) -> None:
        """See `LoadListener`."""
        self._numbers[request_id] = number = next(self._next)
        self._new[number] = booking
        self.wake()

    def computed(self, request_id: str) -> None:
        """See `LoadListener`."""
        number = self._numbers[request_id]
        if number not in self._new:  # otherwise its booking says so when it is sent
            self._computed.append(number)
            self.wake()

    def finished(self, request_id: str) -> None:
        """See `LoadListener`."""
        number = self._numbers.pop(request_id)
        if self._new.pop(number, None) is None:
            self._finished.append(number)
            self.wake()

    def changes(self) -> Iterator[LoadMessage]:
        """What has happened since the last time, in as many messages as it takes."""
        new, computed, finished = self._new, self._computed, self._finished
        self._new, self._computed, self._finished = {}, [], []
        parts = list(_parts(new.items()))
        while parts or computed or finished:
            self.seq += 1
            message = LoadMessage(self.replica, self.seq, "changes", parts.pop(0) if parts else [])
            message.computed, computed = computed[:MESSAGE_NUMBERS], computed[MESSAGE_NUMBERS:]
            message.finished, finished = finished[:MESSAGE_NUMBERS], finished[MESSAGE_NUMBERS:]
            yield message

    def snapshot(self) -> Iterator[LoadMessage]:
        """All that is booked, after the changes that were not announced yet."""
        yield from self.changes()
        parts = list(_parts((self._numbers[name], booking) for name, booking in self._load.own.items())) or [[]]
        for number, part in enumerate(parts):
            yield LoadMessage(self.replica, self.seq, "snapshot", part, part=number, more=number + 1 < len(parts))

    def head(self) -> Iterator[LoadMessage]:
        """The newest number, after the changes that were not announced yet."""
        yield from self.changes()
        yield LoadMessage(self.replica, self.seq, "head", requests=self._load.requests)

    def ask(self, replicas: list[int]) -> LoadMessage:
        """The question for snapshots."""
        return LoadMessage(self.replica, self.seq, "ask", ask=replicas)

    def leaving(self) -> LoadMessage:
        """The last message."""
        return LoadMessage(self.replica, self.seq, "leaving")


def _parts(bookings: Iterable[tuple[int, Booking]]) -> Iterator[list[Booked]]:
    part: list[Booked] = []
    size = 0
    for number, booking in bookings:
        blocks = list(booking.blocks[:MESSAGE_BLOCKS])
        further = booking.further_blocks + len(booking.blocks) - len(blocks)
        if part and size + len(blocks) + 4 > MESSAGE_BLOCKS:
            yield part
            part, size = [], 0
        part.append(Booked(number, *booking.worker, booking.prefill_tokens, further, blocks))
        size += len(blocks) + 4  # the other fields are as large as about four hashes
    if part:
        yield part


@dataclass
class ReplicaStats:
    """What became of the messages of other routers; for metrics."""

    messages: int = 0
    gaps: int = 0
    """times that messages were missing, or the number of requests was another one"""
    snapshots: int = 0
    silent: int = 0
    """times that a router's load was dropped because nothing was heard of it"""


@dataclass
class _Replica:
    heard: float
    listed: bool = False
    """discovery knows it"""
    seq: int = 0
    wanted: bool = True
    """its snapshot is"""
    retry_at: float = 0.0
    pause: float = FIRST_PAUSE_S
    parts: list[list[Booked]] = field(default_factory=list)
    """of a snapshot that is not complete yet"""
    parts_seq: int = 0


class ReplicaLoads:
    """Counts in what other routers say. One thread.

    `on_message`, `found` and `left` take what has happened, `questions` says whom to ask now, `next_wakeup` when to look again.
    """

    def __init__(self, own: int, load: ActiveLoad) -> None:
        self.stats = ReplicaStats()
        self._own = own
        self._load = load
        self._replicas: dict[int, _Replica] = {}

    @property
    def replicas(self) -> tuple[int, ...]:
        """The other routers that are known."""
        return tuple(self._replicas)

    @property
    def synced(self) -> bool:
        """Is everything known that they have said, as far as this end can tell?"""
        return not any(state.wanted for state in self._replicas.values())

    def found(self, replica: int, now: float) -> None:
        """Discovery knows a router."""
        if replica != self._own:
            self._replicas.setdefault(replica, _Replica(now)).listed = True

    def left(self, replica: int) -> None:
        """A router is gone, and its requests with it."""
        if self._replicas.pop(replica, None) is not None:
            self._load.remove_replica(replica)

    def on_message(self, message: LoadMessage, now: float) -> bool:
        """A message came; whether it asks for the own snapshot."""
        if message.replica == self._own:
            return False
        self.stats.messages += 1
        if message.kind == "leaving":
            self.left(message.replica)
            return False
        state = self._replicas.get(message.replica)
        if state is None:
            if len(self._replicas) >= MAX_REPLICAS:
                return False
            state = self._replicas[message.replica] = _Replica(now)
        if now - state.heard >= SILENCE_S:  # it can answer again
            state.pause, state.retry_at = FIRST_PAUSE_S, 0.0
        state.heard = now
        if message.kind == "changes":
            self._on_changes(state, message)
        elif message.kind == "snapshot":
            self._on_snapshot(state, message)
        elif message.kind == "head":
            self._on_head(state, message)
        return self._own in message.ask

    def _on_head(self, state: _Replica, message: LoadMessage) -> None:
        miscounted = message.seq == state.seq and message.requests != self._load.requests_of(message.replica)
        if message.seq > state.seq or miscounted:
            self._want(state)

    def _on_changes(self, state: _Replica, message: LoadMessage) -> None:
        if message.seq <= state.seq:
            return  # a repetition
        if message.seq != state.seq + 1:
            self._want(state)
        state.seq = message.seq
        replica, load = message.replica, self._load
        for one in message.booked:
            load.book((replica, one.number), (one.worker_id, one.dp_rank), one.prefill_tokens, one.blocks, one.further_blocks)
        for number in message.computed:
            load.first_token((replica, number))
        for number in message.finished:
            load.finish((replica, number))

    def _on_snapshot(self, state: _Replica, message: LoadMessage) -> None:
        if not state.wanted or message.seq < state.seq:
            return
        if message.part == 0:
            state.parts, state.parts_seq = [], message.seq
        elif message.seq != state.parts_seq or message.part != len(state.parts):
            state.parts = []  # a part is missing; it will be asked for again
            return
        state.parts.append(message.booked)
        if message.more:
            return
        replica, load = message.replica, self._load
        load.remove_replica(replica)
        for one in itertools.chain.from_iterable(state.parts):
            load.book((replica, one.number), (one.worker_id, one.dp_rank), one.prefill_tokens, one.blocks, one.further_blocks)
        state.seq, state.wanted, state.parts = message.seq, False, []
        state.pause, state.retry_at = FIRST_PAUSE_S, 0.0
        self.stats.snapshots += 1

    def _want(self, state: _Replica) -> None:
        if not state.wanted:
            state.wanted = True
            self.stats.gaps += 1

    def questions(self, now: float) -> list[int]:
        """Routers to ask for a snapshot now; they will be asked again until one comes."""
        self._expire(now)
        out = []
        for replica, state in self._replicas.items():
            if state.wanted and state.retry_at <= now:
                out.append(replica)
                state.retry_at = now + state.pause
                state.pause = min(state.pause * 2, MAX_PAUSE_S)
        return out

    def _expire(self, now: float) -> None:
        for replica, state in list(self._replicas.items()):
            if now - state.heard < SILENCE_S:
                continue
            if self._load.requests_of(replica):
                self.stats.silent += 1
            self._load.remove_replica(replica)
            state.wanted = True
            if not state.listed:
                del self._replicas[replica]

    def next_wakeup(self) -> float | None:
        """When `questions` will have something new without anything happening; None: never."""
        states = self._replicas.values()
        waiting = [state.retry_at for state in states if state.wanted]
        # a silent one has been dropped already, and is asked from time to time
        return min([*waiting, *(state.heard + SILENCE_S for state in states if not state.wanted)], default=None)
