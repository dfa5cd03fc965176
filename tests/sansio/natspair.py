"""A client and a worker of the nats plane that hand each other messages, as a NATS server between them would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynwire._natsqueue import EventWire
from dynwire._natswire import NatsPeer, NatsTarget

Message = tuple[bytes, bytes | None, bytes, bytes]
"""subject, reply, headers, payload"""
Event = tuple[Any, ...]

CLIENT = b"_INBOX.0123456789abcdef."
WORKER = b"dynwire.i.00112233aabbccdd"
QUEUE = b"dynwire.q."
PATH = "a.b.echo"
NOBODY = b"NATS/1.0 503\r\n\r\n"
UP, DOWN = 1, 0


def block(*lines: str) -> bytes:
    """A header block."""
    return "\r\n".join(["NATS/1.0", *lines, "", ""]).encode()


class Pair:
    """``pass_on`` delivers what both sides have published, until nothing is left.

    ``tamper`` gets each message and returns those to deliver in its place; ``worker_there`` and ``client_there``: whether anybody
    has subscribed.
    """

    def __init__(self, *, client: dict[str, Any] | None = None, worker: dict[str, Any] | None = None) -> None:
        self.client = EventWire(True, CLIENT, **(client or {}))
        self.worker = EventWire(False, WORKER, queue_subject=QUEUE, served=[PATH], **(worker or {}))
        self.peer = NatsPeer("nats:" + WORKER.decode())
        self.target = NatsTarget(self.peer, PATH)
        self.tamper: Callable[[Message], list[Message]] = lambda message: [message]
        self.worker_there = self.client_there = True
        self.carried: list[Message] = []
        self.to_others: list[Message] = []
        """messages whose subject neither side listens to"""

    def _deliver(self, message: Message, now: float) -> list[Event]:
        subject, reply, headers, payload = message
        self.carried.append(message)
        if subject.startswith((WORKER + b".", QUEUE)):
            if self.worker_there:
                return [("worker", *event) for event in self.worker.deliver(subject, reply, headers, payload, now)]
        elif subject.startswith(CLIENT):
            if self.client_there:
                return [("client", *event) for event in self.client.deliver(subject, reply, headers, payload, now)]
        else:
            self.to_others.append(message)
            return []
        return [] if reply is None else self._deliver((reply, None, NOBODY, b""), now)

    def pass_on(self, now: float = 0.0) -> list[Event]:
        """Events of both sides, in order, with the side before the event."""
        events: list[Event] = []
        while True:
            messages = self.client.output() + self.worker.output()
            if not messages:
                return events
            for message in messages:
                for changed in self.tamper(message):
                    events += self._deliver(changed, now)

    def ask(self, payload: Any = b"x", now: float = 0.0, **options: Any) -> int:
        """A request that has reached the worker; returns its number."""
        stream = self.client.request(self.target, payload, now=now, **options)
        events = self.pass_on(now)
        assert [event[:3] for event in events] == [("worker", "request", stream.number)]
        number: int = stream.number
        return number


def of(events: list[Event], *names: str) -> list[Event]:
    """Those with one of these names."""
    return [event for event in events if event[1] in names]
