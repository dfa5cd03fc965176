from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dynwire import ManagerClosed
from dynwire.portal import NOWHERE, Portal, check_may_block, new_event_loop, where

PATIENCE_S = 20.0


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal()
    yield made
    made.close()


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


def test_nothing_starts_before_the_first_use(portal: Portal) -> None:
    before = threading.active_count()
    assert not portal.running
    assert threading.active_count() == before
    assert portal.run(add, 1, 2) == 3
    assert portal.running
    assert threading.active_count() == before + 1
    portal.close()
    assert threading.active_count() == before
    assert not portal.running


def test_closing_without_use(portal: Portal) -> None:
    portal.close()
    portal.close()
    with pytest.raises(ManagerClosed):
        portal.run(add, 1, 2)


def test_uvloop_is_used_when_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")
    loop = new_event_loop()
    try:
        assert isinstance(loop, uvloop.Loop)
    finally:
        loop.close()


def test_exceptions_come_back(portal: Portal) -> None:
    async def fail() -> None:
        raise KeyError("a")

    with pytest.raises(KeyError):
        portal.run(fail)
    assert portal.run(add, 1, 2) == 3


def test_context_variables_come_along(portal: Portal) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    async def read() -> int:
        return variable.get()

    variable.set(5)
    assert portal.run(read) == 5


def test_many_threads(portal: Portal) -> None:
    results = []

    def work(number: int) -> None:
        results.append(sum(portal.run(add, number, i) for i in range(50)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [n * 50 + 1225 for n in range(8)]


def test_in_its_own_thread_it_says_so(portal: Portal) -> None:
    async def nested() -> None:
        portal.run(add, 1, 2)

    with pytest.raises(RuntimeError, match="own background event loop"):
        portal.run(nested)

    async def closes() -> None:
        portal.close()

    with pytest.raises(RuntimeError, match="own thread"):
        portal.run(closes)


async def test_in_a_running_loop_it_says_so(portal: Portal) -> None:
    with pytest.raises(RuntimeError, match="AsyncNetworkManager"):
        portal.run(add, 1, 2)
    with pytest.raises(RuntimeError):
        check_may_block()
    assert await asyncio.to_thread(portal.run, add, 1, 2) == 3


def test_ctrl_c_cancels_the_awaited_work_and_keeps_the_portal(portal: Portal) -> None:
    cancelled = threading.Event()

    async def never() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        portal.run(never)
    assert cancelled.wait(PATIENCE_S)
    assert portal.run(add, 1, 2) == 3


def test_closing_ends_the_work_of_other_threads(portal: Portal) -> None:
    started = threading.Event()
    errors = []

    async def never() -> None:
        started.set()
        await asyncio.get_running_loop().create_future()

    def work() -> None:
        try:
            portal.run(never)
        except ManagerClosed as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(PATIENCE_S)
    portal.close()
    thread.join(PATIENCE_S)
    assert len(errors) == 1


async def test_where_tells_loops_apart() -> None:
    here = where()
    assert here == where()
    assert here != NOWHERE
    assert await asyncio.to_thread(where) == NOWHERE

    async def elsewhere() -> bool:
        await asyncio.sleep(0)
        return here != where() and where() == where()

    assert await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    assert here == where()


def test_where_tells_loops_of_one_thread_apart() -> None:
    async def find() -> object:
        return where()

    one, two = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        found = [one.run_until_complete(find()), two.run_until_complete(find()), one.run_until_complete(find())]
    finally:
        one.close()
        two.close()
    assert found[0] != found[1]
    assert found[0] == found[2]
