"""The hot path's choice among channels, and the course of a call, without any I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from dynwire import ConnectError, DynwireError, Instance, NoInstances, Overloaded, PeerLost, PlaneMismatch
from dynwire.routing import Entry
from dynwire.runtime import Route, attempts


class Channel:
    ready = True
    in_flight = 0

    def __init__(self, instance: Instance) -> None:
        self.instance = instance


def route_to(count: int, router: str = "round_robin") -> Route:
    route = Route("a.b.c", router, "memory", Channel)
    route.update(tuple(instance(i) for i in range(count)))
    return route


def instance(number: int) -> Instance:
    return Instance(number, "a", "b", "c", "memory", f"address-{number}")


def turns(route: Route, count: int) -> Counter[int]:
    assert route.turn is not None
    return Counter(route.turn().instance.id for _ in range(count))


def test_turns_go_round() -> None:
    route = route_to(3)
    assert turns(route, 30) == {0: 10, 1: 10, 2: 10}
    ring = route.turn
    route.update(tuple(instance(i) for i in range(3)))
    assert route.turn is ring, "the same set again must not restart the round"
    route.update((instance(1),))
    assert turns(route, 3) == {1: 3}
    route.update(())
    assert route.turn is None


@pytest.mark.parametrize("router", ["round_robin", "random", "p2c", "least_loaded"])
def test_what_is_set_aside_gets_no_turn_until_it_is_due(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    route = route_to(3, router)
    failed = route.table.entries[1]
    route.failed(failed, ConnectError("refused"))
    assert 1 not in turns(route, 50)
    monkeypatch.setattr("dynwire.runtime.time.monotonic", lambda: failed.retry_at + 1)
    assert route.turn is not None
    route.turn()
    assert route.turn is None, "the slow path has to try it out"
    route.succeeded(failed)
    assert route.turn is not None
    assert failed.retry_at == 0


def test_no_turn_when_all_are_set_aside() -> None:
    route = route_to(1)
    route.failed(route.table.entries[0], ConnectError("refused"))
    assert route.turn is None


Course = Generator[Any, Any, Any]


def course(route: Route, deadline: float | None = None, **options: Any) -> Course:
    return attempts(route, None, deadline, options.pop("instance", None), lambda: 100.0, **options)


def entry_of(step: Any) -> Entry:
    entry: Entry = step[0]
    return entry


def test_what_was_not_sent_goes_to_all_others() -> None:
    route = route_to(4)
    steps = course(route)
    tried = [entry_of(next(steps)).instance.id]
    for _ in range(3):
        tried.append(entry_of(steps.throw(ConnectError("refused"))).instance.id)
    assert sorted(tried) == [0, 1, 2, 3]
    with pytest.raises(ConnectError):
        steps.throw(ConnectError("refused"))


def test_a_reply_ends_it() -> None:
    steps = course(route_to(1))
    next(steps)
    with pytest.raises(StopIteration) as caught:
        steps.send("reply")
    assert caught.value.value == "reply"


@pytest.mark.parametrize(
    "error", [PeerLost("gone", sent="maybe"), PeerLost("gone", sent="yes"), ConnectError("x", retryable=False)]
)
def test_what_may_have_been_sent_is_the_callers(error: DynwireError) -> None:
    steps = course(route_to(4))
    next(steps)
    with pytest.raises(type(error)) as caught:
        steps.throw(error)
    assert caught.value is error


def test_an_only_instance_is_tried_again_after_a_pause() -> None:
    route = route_to(1)
    steps = course(route)
    next(steps)
    pauses = [steps.throw(ConnectError("refused"))]
    # it is set aside now, so after the pause there is nobody, and after the last one the error is the connection's
    with pytest.raises(ConnectError):
        while True:
            pauses.append(steps.send(None))
    assert all(isinstance(pause, float) and 0 < pause <= 1 for pause in pauses)
    assert len(pauses) == 2


def test_a_full_queue_refuses_at_once() -> None:
    steps = course(route_to(1))
    next(steps)
    with pytest.raises(Overloaded):
        steps.throw(Overloaded("full"))


def test_the_deadline_bounds_attempts() -> None:
    steps = course(route_to(4), deadline=100.0)
    with pytest.raises(DynwireError) as caught:
        next(steps)
    assert caught.value.sent == "no"


def test_a_choice_that_was_made_counts() -> None:
    route = route_to(3)
    chosen = route.table.entries[2]
    assert entry_of(next(course(route, first=(chosen, None)))) is chosen
    after = course(route, first=(chosen, ConnectError("refused")))
    assert entry_of(next(after)) is not chosen


def test_left_out_as_long_as_there_are_others() -> None:
    route = route_to(2)
    assert entry_of(next(course(route, exclude=frozenset({0})))).instance.id == 1
    assert entry_of(next(course(route, exclude=frozenset({0, 1})))).instance.id in (0, 1)


def test_nobody() -> None:
    with pytest.raises(NoInstances):
        next(course(route_to(0)))
    with pytest.raises(NoInstances):
        next(course(route_to(2), instance=9))


# A queue in front of the instances ---------------------------------------------------------------------------------------------


def queued(router: str = "round_robin", count: int = 0) -> Route:
    route = Route("a.b.c", router, "memory", Channel, queue=Instance(0, "a", "b", "c", "memory", "queue"))
    route.update(tuple(instance(i + 1) for i in range(count)))
    return route


@pytest.mark.parametrize("router", ["round_robin", "random", "p2c", "least_loaded"])
@pytest.mark.parametrize("count", [0, 2])
def test_a_queue_takes_every_request_that_names_no_instance(router: str, count: int) -> None:
    route = queued(router, count)
    assert turns(route, 10) == {0: 10}
    assert entry_of(next(course(route))) is route.queue
    assert len(route.instances) == count, "wait_for_instances still counts workers"


def test_a_request_that_names_its_instance_goes_past_the_queue() -> None:
    assert entry_of(next(course(queued(count=2), instance=2))).instance.id == 2
    with pytest.raises(NoInstances):
        next(course(queued(count=2), instance=9))
    assert queued("direct", 2).queue is None


def test_a_queue_is_never_set_aside() -> None:
    route = queued(count=1)
    assert route.queue is not None
    route.failed(route.queue, PeerLost("worker gone", sent="maybe"))
    assert route.turn is not None and not route.queue.retry_at
    assert route.entry_of(route.queue.channel) is route.queue
    route.succeeded(route.queue)


def test_the_refusal_of_a_full_queue_is_not_repeated() -> None:
    steps = course(queued(count=1))
    next(steps)
    with pytest.raises(Overloaded):
        steps.throw(Overloaded("full"))


def test_a_queue_that_could_not_be_reached_is_tried_again() -> None:
    steps = course(queued())
    next(steps)
    pause = steps.throw(ConnectError("refused"))
    assert 0 < pause < 1
    assert entry_of(steps.send(None)).instance.id == 0


def test_nothing_is_queued_for_workers_on_another_plane() -> None:
    route = queued()
    route.update((Instance(7, "a", "b", "c", "tcp", "127.0.0.1:1"),))
    assert route.turn is None
    with pytest.raises(PlaneMismatch):
        next(course(route))
    route.update(())
    assert route.turn is not None
