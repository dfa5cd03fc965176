"""Blocking faces over a plane of compiled calls and streams: the asynchronous side of the tcp plane behind a portal.

The bodies in tests/plane run on them where a plane has no blocking client of its own; here is what only they can get wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dynwire import Cancelled, Context, DeadlineExceeded, DecodeError, EndpointNotFound, ManagerClosed, RemoteError, Timeouts
from dynwire._portal import ThreadItems
from dynwire.config import load_config
from dynwire.handlers import HandlerExecutor, prepare
from dynwire.planes.base import ItemStream
from dynwire.planes.portal_faces import PortalChannel, PortalClient, PortalServer
from dynwire.planes.tcp import AsyncTcpClient, AsyncTcpServer
from dynwire.portal import Portal
from dynwire.types import Instance

PATIENCE_S = 20.0
WINDOW = 65536
ITEM_COST = 64  # credit of an item beyond its payload


class Worker:
    """A tcp server on a loop of its own, and a client behind another portal."""

    def __init__(self) -> None:
        quiet = {"tcp_keepalive_interval": 3600.0, "tcp_request_timeout": 3600.0}  # no timers but those that a test sets
        config = load_config({"tcp_host": "127.0.0.1", "tcp_stream_window": WINDOW, **quiet})
        self.portal = Portal("worker")
        self.server = PortalServer(self.portal, AsyncTcpServer(config))
        self.server.start()
        self.callers = Portal("callers")
        self.client = PortalClient("tcp", self.callers, lambda: AsyncTcpClient(config))
        self.executor = HandlerExecutor(4)

    def channel(self, function: Callable[..., Any]) -> PortalChannel:
        """Serves the function, and returns the channel to it."""
        name = function.__name__
        self.server.add_endpoint(f"a.b.{name}", prepare(function, self.executor))
        return self.client.channel(self.instance(name))

    def instance(self, endpoint: str) -> Instance:
        return Instance(1, "a", "b", endpoint, "tcp", self.server.address)

    def close(self) -> None:
        self.client.close()
        self.callers.close()
        self.server.close()
        self.portal.close()
        self.executor.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


class Blocked:
    """Keeps the loop of a portal busy until the end of the ``with`` block."""

    def __init__(self, portal: Portal) -> None:
        self.portal = portal
        self.blocked = threading.Event()
        self.free = threading.Event()

    def block(self) -> None:
        self.blocked.set()
        self.free.wait(PATIENCE_S)

    def __enter__(self) -> Blocked:
        self.portal.call_soon(self.block)
        assert self.blocked.wait(PATIENCE_S)
        return self

    def __exit__(self, *exc: object) -> None:
        self.free.set()


async def echo(request: Any) -> Any:
    return request


async def count(request: int) -> AsyncIterator[int]:
    for i in range(request):
        yield i


def test_every_thread_gets_its_own_replies(worker: Worker) -> None:
    channel = worker.channel(echo)

    def work(number: int) -> bool:
        return all(channel.call([number, i]) == [number, i] for i in range(200))

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(work, range(16)))
    assert channel.in_flight == 0


def test_calls_of_many_threads_while_the_loop_is_busy(worker: Worker) -> None:
    """All of them are queued when it gets to them, and each is answered."""
    channel = worker.channel(echo)
    assert channel.call(0) == 0
    with ThreadPoolExecutor(8) as threads:
        with Blocked(worker.callers):
            calls = [threads.submit(channel.call, i) for i in range(8)]
        assert [call.result(PATIENCE_S) for call in calls] == list(range(8))


def test_errors_come_to_the_thread_that_called(worker: Worker) -> None:
    async def fail(request: Any) -> Any:
        raise KeyError(request)

    channel = worker.channel(fail)
    for _ in range(2):  # the first call connects
        with pytest.raises(RemoteError, match="KeyError"):
            channel.call("here")
    with pytest.raises(DecodeError):
        channel.call(object())
    with pytest.raises(EndpointNotFound):
        worker.client.channel(worker.instance("absent")).call(1)
    with pytest.raises(EndpointNotFound):
        list(worker.client.channel(worker.instance("absent")).stream(1))


def test_a_deadline_ends_the_wait(worker: Worker) -> None:
    async def never(request: Any) -> Any:
        await asyncio.get_running_loop().create_future()

    channel = worker.channel(never)
    with pytest.raises(DeadlineExceeded):
        channel.call(1, 0.05)


def test_nested_calls_inherit_the_deadline_of_their_thread(worker: Worker) -> None:
    async def remaining(request: Any, context: Context) -> Any:
        return [context.time_remaining(), context.headers.get("traceparent")]

    channel = worker.channel(remaining)
    surrounding = Context(timeout=50.0, headers={"traceparent": "00-1"})
    token = surrounding._enter()
    try:
        left, trace = channel.call(1)
        assert left is not None
        assert left <= 50.0
        assert trace == "00-1"
    finally:
        surrounding._exit(token)
    assert channel.call(1) == [None, None], "another thread's context has stayed on the loop"


def test_a_context_kills_the_call_from_another_thread(worker: Worker) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def wait(request: Any) -> Any:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    channel = worker.channel(wait)
    context = Context()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(channel.call, 1, None, None, context)
        assert started.wait(PATIENCE_S)
        context.kill()
        with pytest.raises(Cancelled):
            call.result(PATIENCE_S)
    assert cancelled.wait(PATIENCE_S)


# Streams -----------------------------------------------------------------------------------------------------------------------


def test_what_has_arrived_is_taken_without_the_loop(worker: Worker) -> None:
    sent = threading.Event()

    async def some(request: Any) -> AsyncIterator[int]:
        for i in range(100):
            yield i
        sent.set()

    stream = worker.channel(some).stream(1)
    assert isinstance(stream, ThreadItems)
    assert isinstance(stream, ItemStream)
    assert next(stream) == 0
    assert sent.wait(PATIENCE_S)
    assert worker.portal.run(asyncio.sleep, 0, 1) == 1  # the worker has written what it sent
    assert worker.callers.run(asyncio.sleep, 0.01, 1) == 1  # and the loop has read it
    with Blocked(worker.callers):
        assert [next(stream) for _ in range(99)] == list(range(1, 100))
    assert list(stream) == []
    assert stream.delivered == 100


def test_the_worker_waits_for_a_reader_that_takes_nothing(worker: Worker) -> None:
    produced = 0

    async def produce(request: int) -> AsyncIterator[bytes]:
        nonlocal produced
        for _ in range(request):
            produced += 1
            yield b"x" * 1000

    total = 1000
    fits = WINDOW // (1000 + ITEM_COST) + 2  # one is under way when the credit is gone, one waits in the handler
    stream = worker.channel(produce).stream(total)
    taken = 0
    for taken, _ in enumerate(stream, 1):
        if taken == 200:
            break
    for _ in range(5):
        worker.portal.run(asyncio.sleep, 0.01)
        worker.callers.run(asyncio.sleep, 0)
    assert produced <= taken + fits
    assert sum(1 for _ in stream) == total - taken


def test_many_streams_at_once(worker: Worker) -> None:
    channel = worker.channel(count)
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda n: list(channel.stream(n)), range(0, 4000, 100)))
    assert results == [list(range(n)) for n in range(0, 4000, 100)]
    assert channel.in_flight == 0


def test_an_error_comes_after_the_items_before_it(worker: Worker) -> None:
    async def breaks(request: Any) -> AsyncIterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    stream = worker.channel(breaks).stream(1)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(RemoteError, match="third"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_the_gap_between_items_is_limited(worker: Worker) -> None:
    async def stalls(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.get_running_loop().create_future()

    stream = worker.channel(stalls).stream(1, Timeouts(between_items=0.05))
    assert next(stream) == 1
    with pytest.raises(DeadlineExceeded) as caught:
        next(stream)
    assert caught.value.phase == "between_items"


def one_then_wait(started: threading.Event, ended: threading.Event) -> Callable[..., AsyncIterator[int]]:
    async def hold(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            started.set()
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    return hold


def test_closing_by_another_thread_ends_the_wait_and_the_handler(worker: Worker) -> None:
    started, ended = threading.Event(), threading.Event()
    stream = worker.channel(one_then_wait(started, ended)).stream(1)
    assert next(stream) == 1
    assert started.wait(PATIENCE_S)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, stream)
        worker.callers.run(asyncio.sleep, 0.01)
        stream.close()
        stream.close()
        with pytest.raises(Cancelled, match="closed"):
            waiting.result(PATIENCE_S)
    assert ended.wait(PATIENCE_S)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_closed_stream_gives_no_more_items(worker: Worker) -> None:
    stream = worker.channel(count).stream(100)
    assert next(stream) == 0
    stream.close()
    with contextlib.suppress(Cancelled):  # unless the end had arrived before
        assert list(stream) == []


def test_a_dropped_stream_kills_its_handler(worker: Worker) -> None:
    started, ended = threading.Event(), threading.Event()
    stream = worker.channel(one_then_wait(started, ended)).stream(1)
    assert next(stream) == 1
    del stream
    gc.collect()
    assert ended.wait(PATIENCE_S)


def test_a_second_thread_may_not_wait_too(worker: Worker) -> None:
    started, ended = threading.Event(), threading.Event()
    stream = worker.channel(one_then_wait(started, ended)).stream(1)
    assert next(stream) == 1
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(next, stream), threads.submit(next, stream)
        with pytest.raises(RuntimeError, match="another thread"):
            (second if not first.done() else first).result(0.2 if first.done() else PATIENCE_S)
        stream.close()
        for future in (first, second):
            with pytest.raises((Cancelled, RuntimeError)):
                future.result(PATIENCE_S)


async def test_iterating_in_a_running_loop_is_refused(worker: Worker) -> None:
    started, ended = threading.Event(), threading.Event()
    channel = await asyncio.to_thread(worker.channel, one_then_wait(started, ended))
    stream = await asyncio.to_thread(channel.stream, 1)
    await asyncio.to_thread(started.wait, PATIENCE_S)
    assert await asyncio.to_thread(next, stream) == 1
    with pytest.raises(RuntimeError, match="AsyncNetworkManager"):
        next(stream)
    with pytest.raises(RuntimeError, match="AsyncNetworkManager"):
        channel.call(1)
    await asyncio.to_thread(stream.close)


# The end -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closes", ["client", "portal"])
def test_closing_ends_calls_and_streams(worker: Worker, closes: str) -> None:
    started, ended, entered = threading.Event(), threading.Event(), threading.Event()

    async def wait(request: Any) -> Any:
        entered.set()
        await asyncio.get_running_loop().create_future()

    call_channel = worker.channel(wait)
    stream = worker.channel(one_then_wait(started, ended)).stream(1)
    assert next(stream) == 1
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(call_channel.call, 1), threads.submit(next, stream)]
        assert entered.wait(PATIENCE_S)
        assert started.wait(PATIENCE_S)
        (worker.client if closes == "client" else worker.callers).close()
        for wait_ in waits:
            with pytest.raises(ManagerClosed):
                wait_.result(PATIENCE_S)
    with pytest.raises(ManagerClosed):
        call_channel.call(1)
    asyncio.run(worker.client.async_client().close())  # its sockets, where the loop ended first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_somebody_ends_tells_those_who_wait() -> None:
    portal = Portal()
    started = threading.Event()

    async def never() -> None:
        started.set()
        await asyncio.get_running_loop().create_future()

    def leave() -> None:
        raise SystemExit

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(portal.run, never)
        assert started.wait(PATIENCE_S)
        portal.call_soon(leave)
        with pytest.raises(ManagerClosed):
            waiting.result(PATIENCE_S)
    portal.close()


def test_ctrl_c_ends_the_wait_for_an_item_and_kills_the_handler(worker: Worker) -> None:
    ended = threading.Event()

    async def interrupts(request: Any) -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(0.05)  # mostly so that the reader sleeps; it has to work in any case
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    channel = worker.channel(interrupts)
    with pytest.raises(KeyboardInterrupt):
        for _ in channel.stream(1):
            pass
    assert ended.wait(PATIENCE_S)
    assert list(worker.channel(count).stream(3)) == [0, 1, 2]


def test_ctrl_c_ends_a_call_and_kills_the_handler(worker: Worker) -> None:
    ended = threading.Event()

    async def interrupts(request: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    channel = worker.channel(interrupts)
    with pytest.raises(KeyboardInterrupt):
        channel.call(1)
    assert ended.wait(PATIENCE_S)


def test_a_child_after_fork_is_told() -> None:
    program = """
        import asyncio, os
        from dynwire import ForkedManager
        from dynwire.portal import Portal

        portal = Portal()
        portal.run(asyncio.sleep, 0)
        pid = os.fork()
        if pid == 0:
            try:
                portal.run(asyncio.sleep, 0)
            except ForkedManager:
                os._exit(7)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        portal.close()
    """
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "7\n"
