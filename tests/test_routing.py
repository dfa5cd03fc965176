"""Routers and the table of instances: distribution, setting aside, probing, threads."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwire.errors import (
    BY_CODE,
    Cancelled,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    DecodeError,
    DynwireError,
    EndpointNotFound,
    MessageTooLarge,
    NoInstances,
    Overloaded,
    PeerLost,
    PlaneMismatch,
    ProtocolError,
    RemoteError,
    Unauthenticated,
)
from dynwire.routing import MAX_PAUSE_S, PROBE_LEASE_S, ROUTERS, STALE_PAUSE_S, Entry, InstanceTable
from dynwire.types import Instance

CHOOSING = [name for name in ROUTERS if name != "direct"]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeChannel:
    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.in_flight = 0


def instance(number: int, **fields: Any) -> Instance:
    values: dict[str, Any] = {"plane": "tcp", "address": f"10.0.0.{number}:1", **fields}
    return Instance(number, "ns", "comp", "ep", **values)


def table(count: int, router: str = "round_robin", clock: Clock | None = None, seed: int = 1) -> InstanceTable:
    made = InstanceTable("ns.comp.ep", router, FakeChannel, clock=clock or Clock(), rng=random.Random(seed))
    made.update([instance(n) for n in range(count)])
    return made


def by_id(of: InstanceTable, number: int) -> Entry:
    return next(e for e in of.entries if e.instance.id == number)


def picked(of: InstanceTable, times: int) -> Counter[int]:
    return Counter(of.pick().instance.id for _ in range(times))


# -- routers


def test_round_robin_is_exact() -> None:
    assert picked(table(5), 500) == dict.fromkeys(range(5), 100)


def test_round_robin_of_many_clients_does_not_start_at_the_same_instance() -> None:
    assert len({table(8, seed=seed).pick().instance.id for seed in range(64)}) > 4


def test_random_reaches_all() -> None:
    assert set(picked(table(5, "random"), 1000)) == set(range(5))


def test_p2c_takes_the_less_loaded_of_two_different_ones() -> None:
    two = table(2, "p2c")
    by_id(two, 0).channel.in_flight = 3
    assert picked(two, 200) == {1: 200}
    several = table(5, "p2c")
    by_id(several, 4).channel.in_flight = 1
    assert set(picked(several, 1000)) == {0, 1, 2, 3}


def test_least_loaded_takes_the_minimum_and_rotates_ties() -> None:
    of = table(4, "least_loaded")
    for number, load in enumerate((2, 1, 5, 1)):
        by_id(of, number).channel.in_flight = load
    counts = picked(of, 400)
    assert set(counts) == {1, 3}
    idle = table(4, "least_loaded")
    assert picked(idle, 400) == dict.fromkeys(range(4), 100)


def test_direct_needs_an_id() -> None:
    of = table(3, "direct")
    assert of.pick(instance_id=2).instance.id == 2
    for exclude in ((), (1,)):
        with pytest.raises(ConfigError) as caught:
            of.pick(exclude)
        assert caught.value.name == "instance"
    with pytest.raises(ConfigError):
        table(0, "direct").pick()
    with pytest.raises(NoInstances, match=r"0000000000000009.*3 known"):
        of.pick(instance_id=9)


def test_unknown_routers() -> None:
    with pytest.raises(
        ConfigError, match="'nope' does not exist; available: round_robin, random, p2c, least_loaded, direct"
    ) as caught:
        table(1, "nope")
    assert caught.value.allowed == list(ROUTERS)


@pytest.mark.parametrize("router", CHOOSING)
def test_every_router_honours_exclude_and_instance_id(router: str) -> None:
    of = table(4, router)
    assert {of.pick((0, 2)).instance.id for _ in range(100)} == {1, 3}
    assert {of.pick(instance_id=2).instance.id for _ in range(10)} == {2}
    with pytest.raises(NoInstances, match="4 known, 4 excluded"):
        of.pick({0, 1, 2, 3})
    with pytest.raises(NoInstances):
        of.pick({2}, instance_id=2)


def test_empty_table() -> None:
    with pytest.raises(NoInstances, match=r"ns\.comp\.ep.* 0 known") as caught:
        table(0).pick()
    assert caught.value.endpoint == "ns.comp.ep"
    assert caught.value.retryable
    assert caught.value.details["known"] == 0


# -- update


def test_update_keeps_entries_and_channels() -> None:
    of = table(3)
    kept = by_id(of, 1)
    channel = kept.channel
    gone = {by_id(of, 0), by_id(of, 2)}
    assert set(of.update([instance(1, metadata={"load": 1}), instance(3)])) == gone
    assert by_id(of, 1) is kept
    assert kept.channel is channel
    assert kept.instance.metadata == {"load": 1}
    assert len(of) == 2
    moved = of.update([instance(1, address="10.0.0.99:1")])
    assert kept in moved
    assert by_id(of, 1).channel is not channel


def test_entry_makes_its_channel_lazily_and_once() -> None:
    made: list[Instance] = []
    started = threading.Barrier(8)

    def make(of: Instance) -> FakeChannel:
        made.append(of)
        return FakeChannel(of)

    of = InstanceTable("ns.comp.ep", "random", make)
    of.update([instance(1)])
    entry = of.pick()
    assert (entry.in_flight, entry.has_channel, made) == (0, False, [])
    found: list[object] = []

    def ask() -> None:
        started.wait(10)
        found.append(entry.channel)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(map(id, found))) == 1
    entry.channel.in_flight = 4
    assert entry.in_flight == 4


# -- failures

COUNTED = [
    ConnectError("x"),
    PeerLost("x"),
    PlaneMismatch("x"),
    Unauthenticated("x"),
    DeadlineExceeded("x", phase="accept"),
    DeadlineExceeded("x", phase="connect"),
]
IGNORED = [
    RemoteError("x"),
    DecodeError("x"),
    MessageTooLarge("x"),
    ProtocolError("x"),
    Cancelled("x"),
    DeadlineExceeded("x", phase="total"),
    DeadlineExceeded("x", phase="first_item"),
]


def name_of(error: DynwireError) -> str:
    return f"{error.code}-{error.phase}"


@pytest.mark.parametrize("error", COUNTED, ids=name_of)
def test_failures_set_aside_at_once(error: DynwireError) -> None:
    of = table(3)
    bad = by_id(of, 1)
    of.report_failure(bad, error)
    assert bad.failures == 1
    assert set(picked(of, 100)) == {0, 2}


@pytest.mark.parametrize("error", IGNORED, ids=name_of)
def test_errors_of_the_request_never_count(error: DynwireError) -> None:
    of = table(3)
    bad = by_id(of, 1)
    of.report_failure(bad, error)
    assert (bad.failures, bad.retry_at) == (0, 0.0)
    assert picked(of, 300) == dict.fromkeys(range(3), 100)


@pytest.mark.parametrize("router", CHOOSING)
def test_one_probe_after_the_pause_then_back(router: str) -> None:
    clock = Clock()
    of = table(3, router, clock)
    bad = by_id(of, 1)
    of.report_failure(bad, ConnectError("x"))
    clock.now = bad.retry_at
    assert of.pick() is bad
    assert set(picked(of, 100)) == {0, 2}, "only one request may probe"
    of.report_success(bad)
    assert (bad.failures, bad.retry_at) == (0, 0.0)
    assert 1 in {of.pick().instance.id for _ in range(200)}


def test_back_off_doubles_with_jitter_up_to_the_longest() -> None:
    clock = Clock()
    of = table(1, clock=clock)
    bad = by_id(of, 0)
    pauses = []
    for _ in range(12):
        of.report_failure(bad, ConnectError("x"))
        pauses.append(bad.retry_at - clock.now)
        clock.now = bad.retry_at
        assert of.pick() is bad
    for number, pause in enumerate(pauses, 1):
        longest = min(MAX_PAUSE_S, 0.1 * 2**number)
        assert longest / 2 - 1e-6 <= pause <= longest + 1e-6
    assert len({round(p, 9) for p in pauses[-4:]}) > 1


def test_a_broken_connection_counts_once_however_many_requests_it_had() -> None:
    of = table(2)
    bad = by_id(of, 0)
    for _ in range(256):
        of.report_failure(bad, PeerLost("x"))
    assert bad.failures == 1


def test_all_set_aside() -> None:
    clock = Clock()
    of = table(2, clock=clock)
    for entry in of.entries:
        of.report_failure(entry, ConnectError("x"))
    with pytest.raises(NoInstances, match=r"2 known, 2 set aside after failures, the next one for another 0\.\d\d s") as caught:
        of.pick()
    assert caught.value.details["set_aside"] == 2
    clock.now += caught.value.details["retry_in"]
    assert of.pick() in of.entries


def test_what_stands_between_is_not_the_instance() -> None:
    of = table(2)
    for error in (ConnectError("x", details={"alive": True}), PeerLost("x", details={"alive": True})):
        for entry in of.entries:
            of.report_failure(entry, error)
    assert {of.pick().instance.id for _ in range(4)} == {0, 1}
    of.report_failure(of.entries[0], PeerLost("x"))
    assert {of.pick().instance.id for _ in range(4)} == {1}


def test_probe_without_an_outcome_is_repeated_after_its_lease() -> None:
    clock = Clock()
    of = table(1, clock=clock)
    bad = by_id(of, 0)
    of.report_failure(bad, ConnectError("x"))
    clock.now = bad.retry_at
    assert of.pick() is bad
    with pytest.raises(NoInstances, match="tries it out"):
        of.pick()
    clock.now += PROBE_LEASE_S
    assert of.pick() is bad


@pytest.mark.parametrize(("error", "back"), [(RemoteError("x"), True), (DecodeError("x"), True), (MessageTooLarge("x"), False)])
def test_what_a_probe_learns_from_errors_of_the_request(error: DynwireError, back: bool) -> None:
    clock = Clock()
    of = table(1, clock=clock)
    bad = by_id(of, 0)
    of.report_failure(bad, ConnectError("x"))
    clock.now = bad.retry_at
    of.report_failure(of.pick(), error)
    assert (bad.retry_at == 0.0) is back
    assert bad.failures == (0 if back else 1)


def test_named_instance_set_aside() -> None:
    clock = Clock()
    of = table(2, "direct", clock)
    bad = by_id(of, 1)
    of.report_failure(bad, ConnectError("x"))
    with pytest.raises(NoInstances, match="1 set aside"):
        of.pick(instance_id=1)
    assert of.pick(instance_id=0).instance.id == 0
    clock.now = bad.retry_at
    assert of.pick(instance_id=1) is bad
    with pytest.raises(NoInstances):
        of.pick(instance_id=1)


def test_stale_record_is_set_aside_briefly_without_counting() -> None:
    clock = Clock()
    of = table(2, clock=clock)
    stale = by_id(of, 0)
    of.report_failure(stale, EndpointNotFound("x"))
    assert (stale.failures, stale.retry_at) == (0, clock.now + STALE_PAUSE_S)
    assert set(picked(of, 10)) == {1}


def test_stale_record_does_not_shorten_a_back_off() -> None:
    of = table(1)
    bad = by_id(of, 0)
    for _ in range(8):
        of.report_failure(bad, ConnectError("x"))
        bad.probing = True
    of.report_failure(bad, ConnectError("x"))
    until = bad.retry_at
    of.report_failure(bad, EndpointNotFound("x"))
    assert bad.retry_at == until


# -- overload


def test_overload_with_retry_after_is_honoured_and_does_not_count() -> None:
    clock = Clock()
    of = table(2, clock=clock)
    full = by_id(of, 0)
    of.report_failure(full, Overloaded("x", retry_after=3.0))
    assert full.failures == 0
    of.report_success(full)  # an earlier request ended: no sign of room
    clock.now += 2.99
    assert set(picked(of, 20)) == {1}
    with pytest.raises(NoInstances, match="1 set aside overloaded"):
        of.pick({1})
    clock.now += 0.02
    assert picked(of, 20) == {0: 10, 1: 10}, "everybody comes back at once, not one probe"


def test_overload_without_retry_after_prefers_others_but_never_refuses() -> None:
    of = table(2)
    of.report_failure(by_id(of, 0), Overloaded("x"))
    assert set(picked(of, 20)) == {1}
    assert of.pick({1}).instance.id == 0
    of.report_failure(by_id(of, 1), Overloaded("x"))
    assert picked(of, 20) == {0: 10, 1: 10}


@pytest.mark.parametrize("retry_after", [float("nan"), -1.0, 0.0, float("inf"), 1e300])
def test_strange_retry_after(retry_after: float) -> None:
    clock = Clock()
    of = table(1, clock=clock)
    of.report_failure(by_id(of, 0), Overloaded("x", retry_after=retry_after))
    clock.now += 60.0
    assert of.pick().instance.id == 0


def test_overload_ends_a_probe() -> None:
    clock = Clock()
    of = table(1, clock=clock)
    bad = by_id(of, 0)
    of.report_failure(bad, ConnectError("x"))
    clock.now = bad.retry_at
    of.report_failure(of.pick(), Overloaded("x", retry_after=1.0))
    assert (bad.failures, bad.retry_at) == (0, clock.now + 1.0)


def test_reports_about_an_entry_that_left() -> None:
    of = table(2)
    gone = by_id(of, 0)
    of.update([instance(1)])
    of.report_failure(gone, ConnectError("x"))
    of.report_success(gone)
    assert picked(of, 5) == {1: 5}


# -- anything goes

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sets(st.integers(0, 5), max_size=6)),
        st.tuples(st.just("pick"), st.sets(st.integers(0, 5), max_size=3)),
        st.tuples(st.just("ok"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.tuples(st.integers(0, 5), st.sampled_from(sorted(BY_CODE)))),
        st.tuples(st.just("time"), st.floats(0, 20)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(router=st.sampled_from(CHOOSING), operations=OPERATIONS)
def test_any_sequence_keeps_the_promises(router: str, operations: list[tuple[str, Any]]) -> None:
    clock = Clock()
    of = table(3, router, clock)
    for action, value in operations:
        known = {e.instance.id: e for e in of.entries}
        if action == "update":
            left = of.update([instance(n) for n in sorted(value)])
            assert {e.instance.id for e in left} == set(known) - value
        elif action == "pick":
            usable = {n for n, e in known.items() if n not in value and (e.retry_at == 0 or e.retry_at <= clock.now)}
            try:
                entry = of.pick(value)
            except NoInstances:
                assert not usable
            else:
                assert entry.instance.id not in value
                assert known[entry.instance.id] is entry
        elif action == "ok" and value in known:
            of.report_success(known[value])
        elif action == "fail" and value[0] in known:
            of.report_failure(known[value[0]], BY_CODE[value[1]]("x"))
        elif action == "time":
            clock.now += value
        assert all(e.retry_at <= clock.now + MAX_PAUSE_S for e in of.entries)
    clock.now += max(MAX_PAUSE_S, PROBE_LEASE_S)
    for _ in of.entries:  # whatever happened, everyone can come back
        of.report_success(of.pick())
    assert all(e.retry_at == 0.0 or e.retry_at <= clock.now for e in of.entries)


@pytest.mark.parametrize("router", CHOOSING)
def test_many_threads(router: str) -> None:
    of = InstanceTable("ns.comp.ep", router, FakeChannel)
    everyone = [instance(n) for n in range(8)]
    of.update(everyone)
    errors: list[BaseException] = []
    stop = threading.Event()

    def use(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(3000):
                try:
                    entry = of.pick()
                except NoInstances:
                    continue
                entry.channel  # noqa: B018
                if rng.random() < 0.05:
                    of.report_failure(entry, rng.choice((ConnectError("x"), Overloaded("x", retry_after=0.001), PeerLost("x"))))
                else:
                    of.report_success(entry)
        except BaseException as error:
            errors.append(error)
            raise

    def change() -> None:
        rng = random.Random(0)
        while not stop.is_set():
            of.update(rng.sample(everyone, rng.randrange(4, 9)))

    changer = threading.Thread(target=change)
    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    changer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changer.join()
    assert not errors
