"""Durable requests as applications see them: real worker processes, a real server, ended in every way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.nats.connection import NatsConnection
from dynwire.nats.queue import QueueNames
from dynwire.nats.server import NatsServer, free_port
from dynwire.types import EndpointId
from tests.faults.conftest import in_time, outcome
from tests.plane.faces import PATIENCE_S, Manager, eventually

from .conftest import OUTAGES

ROOT = Path(__file__).parent.parent.parent
PROGRAM = Path(__file__).with_name("durable_worker.py")

ACK_WAIT_S = 1.0
"""until the requests of a killed worker go to another one: as short as the tests are patient"""


@pytest.fixture
def loop_factory(leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    """One loop: what is tested is between processes, or between us and the server."""
    return asyncio.new_event_loop


@pytest.fixture
def server(jetstream_server: NatsServer) -> NatsServer:
    return jetstream_server


@pytest.fixture
def settings(server: NatsServer, discovery_dir: Path) -> dict[str, Any]:
    """Of all managers and workers of the test; it may change them before it makes any."""
    return {
        "DYN_REQUEST_PLANE": "nats",
        "DYN_NATS_REQUEST_MODE": "jetstream",
        "NATS_SERVER": server.url,
        "DYN_FILE_KV": str(discovery_dir),
        "DYNWIRE_NATS_QUEUE_ACK_WAIT": ACK_WAIT_S,
        "DYNWIRE_NATS_QUEUE_MAX_BYTES": 1 << 26,
    }


class Worker:
    """A worker process (durable_worker.py)."""

    def __init__(self, log: Path, settings: dict[str, Any], errors: Path) -> None:
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        self.errors = errors
        with errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(PROGRAM), str(log)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment,
            )
        self.pid = self.process.pid

    def wait_ready(self) -> Worker:
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], PATIENCE_S)[0]
        line = os.read(self.process.stdout.fileno(), 100) if ready else b""
        assert line == b"ready\n", f"{line!r}; on standard error: {self.errors.read_text()}"
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """In an orderly way, and wait for the end."""
        self.process.terminate()
        assert self.process.wait(PATIENCE_S) == 0, self.errors.read_text()

    def close(self) -> None:
        self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Workers:
    """Starts worker processes, and knows what they have run."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._log = directory / "executions"
        self._errors = directory / "stderr"
        self._settings = settings
        self._started: list[Worker] = []

    def start(self, **changes: Any) -> Worker:
        worker = self.begin(**changes)
        return worker.wait_ready()

    def begin(self, **changes: Any) -> Worker:
        worker = Worker(self._log, {**self._settings, **changes}, self._errors)
        self._started.append(worker)
        return worker

    def executions(self) -> list[tuple[int, int, int]]:
        """``(number of the request, attempt, process id)`` of everything that has begun, in that order."""
        if not self._log.exists():
            return []
        lines = [line.split() for line in self._log.read_text().splitlines()]
        return [(int(n), int(attempt), int(pid)) for n, attempt, pid in lines]

    def attempts(self, number: int) -> list[int]:
        return [attempt for n, attempt, _ in self.executions() if n == number]

    async def until_running(self, number: int, attempt: int = 1) -> None:
        await eventually(lambda: attempt in self.attempts(number))

    def close(self) -> None:
        for worker in self._started:
            worker.close()


@pytest.fixture
def workers(tmp_path: Path, settings: dict[str, Any]) -> Iterator[Workers]:
    found = Workers(tmp_path, settings)
    try:
        yield found
    finally:
        found.close()


Managers = Callable[..., AbstractAsyncContextManager[Manager]]


@pytest.fixture(params=["async", "blocking"])
def face(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def managers(settings: dict[str, Any], face: str) -> Managers:
    threads = ThreadPoolExecutor(64, thread_name_prefix="test-body")

    @asynccontextmanager
    async def make(**changes: Any) -> AsyncIterator[Manager]:
        asyncio.get_running_loop().set_default_executor(threads)
        cls = dynwire.AsyncNetworkManager if face == "async" else dynwire.NetworkManager
        manager = Manager(cls(**{**settings, **changes}))
        try:
            yield manager
        finally:
            await manager.close()

    return make


@pytest.fixture
def manager(settings: dict[str, Any]) -> Callable[..., AbstractAsyncContextManager[Manager]]:
    """The async API alone, for what does not depend on the API."""

    @asynccontextmanager
    async def make(**changes: Any) -> AsyncIterator[Manager]:
        made = Manager(dynwire.AsyncNetworkManager(**{**settings, **changes}))
        try:
            yield made
        finally:
            await made.close()

    return make


def names(endpoint: str) -> QueueNames:
    return QueueNames.of("dynwire", EndpointId.parse(endpoint))


@asynccontextmanager
async def jetstream(server: NatsServer) -> AsyncIterator[Any]:
    """nats-py's view of the streams, over a connection of its own."""
    connection = await NatsConnection.acquire(dynwire.config.NatsConfig(servers=(server.url,), ping_interval=5.0), PATIENCE_S)
    try:
        yield connection.client.jetstream()
    finally:
        await connection.release()


async def queued(server: NatsServer, endpoint: str) -> int:
    async with jetstream(server) as js:
        found: int = (await js.stream_info(names(endpoint).stream)).state.messages
        return found


async def until_queued(server: NatsServer, endpoint: str, count: int) -> None:
    async with jetstream(server) as js, asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(Exception):  # the stream is not there yet
                if (await js.stream_info(names(endpoint).stream)).state.messages == count:
                    return
            await asyncio.sleep(0.01)


async def fails(call: Awaitable[Any], kind: type[dynwire.DynwireError]) -> Any:
    with pytest.raises(kind) as caught:
        await call
    return caught.value


# Workers that are absent, restart, die -----------------------------------------------------------------------------------------


async def test_a_request_waits_for_the_first_worker(
    server: NatsServer, managers: Managers, workers: Workers, settings: dict[str, Any]
) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        call = asyncio.ensure_future(client.call({"n": 1}))
        await until_queued(server, "d.w.work", 1)
        worker = workers.start()
        assert await call == {"n": 1, "attempt": 1, "pid": worker.pid}
        await until_queued(server, "d.w.work", 0)
        assert await client.items({"n": 2}) == [{"n": 2, "attempt": 1, "pid": worker.pid}]


async def test_a_stream_waits_for_the_first_worker(server: NatsServer, managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.items", wait=0)
        call = asyncio.ensure_future(client.items({"n": 1, "items": 0, "total": 5, "seconds": 0}))
        await until_queued(server, "d.w.items", 1)
        workers.start()
        assert await call == [[index, 1] for index in range(5)]


async def test_requests_outlive_a_restarting_worker(server: NatsServer, managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        first = workers.start()
        assert (await client.call({"n": 0}))["pid"] == first.pid
        running = asyncio.ensure_future(client.call({"n": 1, "seconds": 0.5}))
        await workers.until_running(1)
        first.process.terminate()
        assert (await running)["pid"] == first.pid, "what runs when a worker shuts down may end"
        assert await asyncio.to_thread(first.process.wait, PATIENCE_S) == 0
        waiting = [asyncio.ensure_future(client.call({"n": n})) for n in range(2, 10)]
        await until_queued(server, "d.w.work", 8)
        second = workers.start()
        assert [(await call)["pid"] for call in waiting] == [second.pid] * 8
        assert all(attempt == 1 for _, attempt, _ in workers.executions())


async def test_a_worker_that_shuts_down_gives_back_what_it_cannot_finish(manager: Managers, workers: Workers) -> None:
    """At once, not after the silence of the ack wait, which is a minute here."""
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        changes = {"DYNWIRE_NATS_QUEUE_ACK_WAIT": 60, "GRACE": 0}
        first = workers.start(**changes)
        call = asyncio.ensure_future(client.call({"n": 1, "seconds": 1.5}))
        await workers.until_running(1)
        second = workers.start(**changes)
        await asyncio.to_thread(first.terminate)
        assert await call == {"n": 1, "attempt": 2, "pid": second.pid}


async def test_a_killed_workers_request_goes_to_another(managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        first = workers.start()
        call = asyncio.ensure_future(client.call({"n": 1, "seconds": 1.0}))
        await workers.until_running(1)
        first.kill()
        second = workers.start()
        assert await call == {"n": 1, "attempt": 2, "pid": second.pid}
        assert workers.attempts(1) == [1, 2]


async def test_a_call_knows_soon_that_its_worker_was_killed(manager: Managers, workers: Workers) -> None:
    """It need not wait for the silence of the ack wait: a caller that finds its worker gone tells the queue."""
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        changes = {"DYNWIRE_NATS_QUEUE_ACK_WAIT": 60}
        first = workers.start(**changes)
        workers.start(**changes)
        call = asyncio.ensure_future(client.call({"n": 1, "seconds": 2.0}))
        # until the worker has said that it has the request
        await eventually(lambda: any(request["worker"] for request in caller_requests(made)))
        killed = {pid for _, _, pid in workers.executions()}
        for worker in workers._started:
            if worker.pid in killed:
                worker.kill()
        assert first is not None
        assert (await call)["attempt"] == 2


async def test_a_stopped_worker_that_wakes_up_repeats_nothing(manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        first = workers.start()
        call = asyncio.ensure_future(client.call({"n": 1, "seconds": 0.5}))
        await workers.until_running(1)
        os.kill(first.pid, signal.SIGSTOP)
        second = workers.start()
        reply = await call
        # the queue may have given it to the stopped one more than once, which still had questions waiting
        assert reply["pid"] == second.pid and reply["attempt"] >= 2
        os.kill(first.pid, signal.SIGCONT)
        replies = await asyncio.gather(*(client.call({"n": n}) for n in range(2, 22)))
        assert [reply["n"] for reply in replies] == list(range(2, 22))
        assert all(workers.attempts(n) == [1] for n in range(2, 22))


async def test_a_blocked_worker_does_not_run_its_own_request_twice(manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        client = await made.client("d.w.block", wait=0)
        workers.start()
        assert await client.call({"n": 1, "seconds": 2.5 * ACK_WAIT_S}) == 1
        assert workers.attempts(1) == [1]


async def test_a_request_that_kills_every_worker_fails(server: NatsServer, manager: Managers, workers: Workers) -> None:
    settings = {"DYNWIRE_NATS_QUEUE_MAX_DELIVER": 2}
    async with manager(**settings) as made:
        client = await made.client("d.w.deadly", wait=0)
        call = asyncio.ensure_future(client.call({"n": 1}))
        for _ in range(2):
            worker = workers.begin(**settings)
            await asyncio.to_thread(worker.process.wait, PATIENCE_S)
        workers.start(**settings)
        error = await fails(call, dynwire.PeerLost)
        assert "DYNWIRE_NATS_QUEUE_MAX_DELIVER" in str(error) and error.sent == "yes"
        assert workers.attempts(1) == [1, 2]
        await until_queued(server, "d.w.deadly", 0)


# Streams -----------------------------------------------------------------------------------------------------------------------


def caller_stats(manager: Manager) -> dict[str, Any]:
    """Counters of the calls of an async manager."""
    (runtime,) = manager.real._runtimes.values()  # type: ignore[union-attr]
    (client,) = runtime._clients.values()
    found: dict[str, Any] = client.stats()  # type: ignore[attr-defined]
    return found


def caller_requests(manager: Manager) -> list[dict[str, Any]]:
    """What the calls of an async manager know of their queued requests."""
    clients = [client for runtime in manager.real._runtimes.values() for client in runtime._clients.values()]  # type: ignore[union-attr]
    return [request for client in clients for request in client.link.requests()]  # type: ignore[attr-defined]


async def test_a_stream_that_nobody_has_read_starts_again_unseen(manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        client = await made.client("d.w.items", wait=0)
        first = workers.start()
        async with client.stream({"n": 1, "items": 3, "total": 5, "seconds": 30}) as stream:
            await workers.until_running(1)
            first.kill()
            workers.start()
            await eventually(lambda: caller_stats(made)["restarted"])
            assert [item async for item in stream] == [[index, 2] for index in range(5)]


async def test_a_stream_that_was_read_ends_with_its_worker(managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.items", wait=0)
        first = workers.start()
        async with client.stream({"n": 1, "items": 3, "total": 5, "seconds": 30}) as stream:
            assert [await stream.next() for _ in range(3)] == [[0, 1], [1, 1], [2, 1]]
            first.kill()
            workers.start()
            error = await fails(stream.next(), dynwire.PeerLost)
            assert error.delivered == 3 and error.sent == "yes"


async def test_a_stream_that_was_read_continues_by_migration(manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        client = await made.client(
            "d.w.items",
            wait=0,
            migration_limit=1,
            resume=lambda payload, delivered: {"n": 2, "items": 0, "total": payload["total"] - len(delivered), "seconds": 0},
        )
        first = workers.start()
        async with client.stream({"n": 1, "items": 3, "total": 5, "seconds": 30}) as stream:
            assert [await stream.next() for _ in range(3)] == [[0, 1], [1, 1], [2, 1]]
            first.kill()
            workers.start()
            assert [item async for item in stream] == [[0, 1], [1, 1]]


# The server --------------------------------------------------------------------------------------------------------------------


async def test_requests_outlive_a_killed_server(server: NatsServer, managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        waiting = [asyncio.ensure_future(client.call({"n": n})) for n in range(20)]
        await until_queued(server, "d.w.work", 20)
        await asyncio.to_thread(server.restart)
        workers.start()
        assert [(await call)["n"] for call in waiting] == list(range(20))


async def test_a_running_request_outlives_a_killed_server(server: NatsServer, managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        workers.start()
        call = asyncio.ensure_future(client.call({"n": 1, "seconds": 2.0}))
        await workers.until_running(1)
        await asyncio.to_thread(server.restart)
        assert (await call)["n"] == 1
        assert await client.call({"n": 2}) is not None


async def test_nobody_waits_for_answers_that_were_lost_with_the_connection(
    server: NatsServer, manager: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that shuts down tells the worker, which asks for its queue anew, too late: for an answer that takes 100 s here."""
    monkeypatch.setattr("dynwire.nats.queue.API_TIMEOUT_S", 100.0)
    async with manager(DYNWIRE_NATS_QUEUE_ACK_WAIT=10.0) as made:
        await made.serve("d.w.here", lambda request: request)
        client = await made.client("d.w.here", wait=0)
        for n in range(3):
            assert await client.call(n) == n
            await asyncio.to_thread(server.restart, kill=False)
            assert await client.call(n) == n


@pytest.mark.hard_timeout(90)
@pytest.mark.parametrize("kind", ["suspended", "lame_duck"])
async def test_an_outage_that_is_longer_than_deadlines(kind: str, server: NatsServer, manager: Managers) -> None:
    """Every call ends in time, and afterwards everything works by itself."""
    async with manager(nats_ping_interval=1.0) as made:
        await made.serve("d.w.here", lambda request: request)
        client = await made.client("d.w.here", wait=0)
        assert await client.call(0) == 0
        outage = asyncio.create_task(asyncio.to_thread(OUTAGES[kind], server))
        for _ in range(4):
            calls = [outcome(client.call(n, timeout=1.0)) for n in range(10)]
            for n, (result, error, seconds) in enumerate(await asyncio.gather(*calls)):
                in_time(seconds, 1.0, 0.0)
                assert result == n if error is None else isinstance(error, dynwire.DeadlineExceeded), error
        await outage
        assert await client.call(1) == 1


async def test_without_a_server_at_start(settings: dict[str, Any], managers: Managers) -> None:
    settings |= {"NATS_SERVER": f"nats://127.0.0.1:{free_port()}", "DYNWIRE_NATS_CONNECT_TIMEOUT": 0.6}
    async with managers() as made:
        _, error, seconds = await outcome(made.serve("d.w.here", lambda request: request))
        in_time(seconds, 0.6, 0.6)
        assert isinstance(error, dynwire.ConnectError) and "NATS_SERVER" in str(error)
        client = await made.client("d.w.here", wait=0)
        _, error, seconds = await outcome(client.call(1, timeout=0.3))
        in_time(seconds, 0.3, 0.0)
        assert isinstance(error, (dynwire.ConnectError, dynwire.DeadlineExceeded)) and error.sent == "no"


async def test_wrong_credentials(settings: dict[str, Any], managers: Managers) -> None:
    with NatsServer(jetstream=True, monitor=False, username="u", password="right") as other:
        settings |= {"NATS_SERVER": other.url, "NATS_AUTH_USERNAME": "u", "NATS_AUTH_PASSWORD": "wrong"}
        async with managers() as made:
            client = await made.client("d.w.here", wait=0)
            for attempt in (made.serve("d.w.here", lambda request: request), client.call(1, timeout=5.0)):
                _, error, seconds = await outcome(attempt)
                in_time(seconds, 5.0, 0.0)
                assert isinstance(error, dynwire.Unauthenticated) and error.sent == "no"
                assert "NATS_AUTH_PASSWORD" in str(error) and "wrong" not in str(error)


async def test_requests_made_while_the_server_is_away(server: NatsServer, managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        workers.start()
        assert await client.call({"n": 0})
        await asyncio.to_thread(server.kill)
        calls = [asyncio.ensure_future(client.call({"n": n})) for n in range(1, 11)]
        await asyncio.to_thread(server.start)
        assert sorted([(await call)["n"] for call in calls]) == list(range(1, 11))
        assert all(len(workers.attempts(n)) == 1 for n in range(1, 11))


async def test_the_storage_is_lost_with_requests_in_it(server: NatsServer, manager: Managers, workers: Workers) -> None:
    """The caller still has them, and finds a new queue: they are queued again."""
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        calls = [asyncio.ensure_future(client.call({"n": n})) for n in range(10)]
        await until_queued(server, "d.w.work", 10)
        await asyncio.to_thread(server.restart, wipe=True)
        workers.start()
        assert sorted([(await call)["n"] for call in calls]) == list(range(10))


async def test_the_storage_is_lost_while_requests_run(server: NatsServer, manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        workers.start()
        calls = [asyncio.ensure_future(client.call({"n": n, "seconds": 2.0})) for n in range(10)]
        await eventually(lambda: len(workers.executions()) == 10)
        await asyncio.to_thread(server.restart, wipe=True)
        assert sorted([(await call)["n"] for call in calls]) == list(range(10))
        assert (await client.call({"n": 100}))["n"] == 100


# Refused, expired, given up ----------------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once(server: NatsServer, managers: Managers) -> None:
    async with managers(DYNWIRE_NATS_QUEUE_MAX_MESSAGES=3) as made:
        client = await made.client("d.w.work", wait=0)
        waiting = [asyncio.ensure_future(client.call({"n": n}, timeout=5.0)) for n in range(3)]
        await until_queued(server, "d.w.work", 3)
        started = time.monotonic()
        error = await fails(client.call({"n": 4}), dynwire.Overloaded)
        assert time.monotonic() - started < 2.0
        assert (error.sent, error.limit) == ("no", 3) and "DYNWIRE_NATS_QUEUE_MAX_MESSAGES" in str(error)
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_request_ends_at_its_deadline_and_is_never_run(server: NatsServer, managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        error = await fails(client.call({"n": 1}, timeout=1.0), dynwire.DeadlineExceeded)
        assert error.sent == "yes", "it was stored: a worker might have run it"
        await until_queued(server, "d.w.work", 0)
        workers.start()
        assert (await client.call({"n": 2}))["n"] == 2
        assert workers.attempts(1) == []


async def test_a_request_without_a_timeout_ends_with_the_queues_age(manager: Managers) -> None:
    async with manager(DYNWIRE_NATS_QUEUE_MAX_AGE=1.0) as made:
        client = await made.client("d.w.work", wait=0)
        started = time.monotonic()
        error = await fails(client.call({"n": 1}, timeout=None), dynwire.DeadlineExceeded)
        assert 0.9 <= time.monotonic() - started < 3.0
        assert "DYNWIRE_NATS_QUEUE_MAX_AGE" in str(error)


async def test_a_cancelled_request_leaves_the_queue(server: NatsServer, manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        call = asyncio.ensure_future(client.call({"n": 1}))
        await until_queued(server, "d.w.work", 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await until_queued(server, "d.w.work", 0)
        workers.start()
        assert (await client.call({"n": 2}))["n"] == 2
        assert workers.attempts(1) == []


async def test_cancelling_reaches_a_handler_and_nobody_runs_it_again(
    server: NatsServer, manager: Managers, workers: Workers
) -> None:
    async with manager() as made:
        client = await made.client("d.w.work", wait=0)
        workers.start(DYNWIRE_NATS_QUEUE_MAX_IN_FLIGHT=1)
        call = asyncio.ensure_future(client.call({"n": 1, "seconds": 60}, timeout=60.0))
        await workers.until_running(1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        # the only place of the only worker is free again
        assert (await client.call({"n": 2}))["n"] == 2
        await until_queued(server, "d.w.work", 0)
        assert workers.attempts(1) == [1]


async def test_a_request_beyond_the_servers_limit_is_refused_before_it_is_sent(managers: Managers) -> None:
    async with managers() as made:
        client = await made.client("d.w.work", wait=0)
        error = await fails(client.call(b"x" * (1 << 20)), dynwire.MessageTooLarge)
        assert error.sent == "no" and error.limit < 1 << 20 and "tcp" in str(error)


async def test_a_request_that_names_its_instance_is_not_queued(server: NatsServer, manager: Managers, workers: Workers) -> None:
    async with manager() as made:
        workers.start()
        client = await made.client("d.w.work")
        (instance,) = await client.wait_for_instances(1)
        assert (await client.call({"n": 1}, instance=instance.id))["attempt"] == 1
        async with jetstream(server) as js:
            state = (await js.stream_info(names("d.w.work").stream)).state
            assert state.first_seq == state.last_seq + 1, "nothing was ever stored"


async def test_without_jetstream_the_error_says_so(settings: dict[str, Any]) -> None:
    with NatsServer(monitor=False) as without:
        async with dynwire.AsyncNetworkManager(**{**settings, "NATS_SERVER": without.url}) as made:
            error = await fails(made.endpoint("d.w.work").serve(lambda request: request), dynwire.ConfigError)
            assert "-js" in str(error)
            client = await made.endpoint("d.w.work").client()
            error = await fails(client.call(1, timeout=5.0), dynwire.ConfigError)
            assert error.name == "DYN_NATS_REQUEST_MODE"


async def test_what_the_handler_sees(managers: Managers, workers: Workers) -> None:
    async with managers() as made:
        workers.start()
        client = await made.client("d.w.headers")
        context = dynwire.Context(id="order-17", headers={"traceparent": "00-1-2-3"})
        seen = await client.call({"a": 1}, context=context, timeout=30.0)
        assert seen["id"] == "order-17" and seen["headers"]["traceparent"] == "00-1-2-3" and seen["request"] == {"a": 1}
        assert 25.0 < seen["left"] <= 30.1


async def test_the_same_id_twice_is_two_requests(manager: Managers, workers: Workers) -> None:
    """An application may choose ids as it likes, and a handler passes its own on: they are no keys for duplicates."""
    async with manager() as made:
        workers.start()
        client = await made.client("d.w.work")
        for n in range(3):
            assert (await client.call({"n": n}, context=dynwire.Context(id="same")))["n"] == n


# A storm -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.hard_timeout(120)
async def test_a_thousand_requests_across_a_restart_and_two_kills(
    server: NatsServer, manager: Managers, workers: Workers, record_property: Callable[[str, object], None]
) -> None:
    count = 1000
    for _ in range(3):
        workers.begin()
    for worker in workers._started:
        worker.wait_ready()
    first, second, _ = workers._started
    # those that the kill of the server overtakes wait for the connection
    async with manager(DYN_TCP_CHANNEL_BUFFER=count) as made:
        client = await made.client("d.w.work", wait=0)
        started = time.monotonic()
        calls = [asyncio.ensure_future(client.call({"n": n, "seconds": 0.2}, timeout=60.0)) for n in range(count)]
        await eventually(lambda: len(workers.executions()) >= 100)
        first.kill()
        await eventually(lambda: len(workers.executions()) >= 300)
        await asyncio.to_thread(server.restart)
        await eventually(lambda: len(workers.executions()) >= 500)
        second.kill()
        workers.start()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        seconds = time.monotonic() - started
    answered = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    failed = [outcome for outcome in outcomes if not isinstance(outcome, dict)]
    assert all(isinstance(error, dynwire.DynwireError) for error in failed), failed[:3]
    assert [outcome["n"] for outcome in answered] == [n for n, outcome in enumerate(outcomes) if isinstance(outcome, dict)]
    runs = Counter(n for n, _, _ in workers.executions())
    duplicates = sum(times - 1 for times in runs.values())
    reported = sum(attempt > 1 for _, attempt, _ in workers.executions())
    record_property("durable storm", f"{len(answered)} answered, {len(failed)} failed, {duplicates} duplicates, {seconds:.1f} s")
    print(f"{len(answered)} answered, {len(failed)} failed, {duplicates} executions too many, {reported} marked, {seconds:.1f} s")
    assert len(answered) == count, failed[:3]
    # What was run again says so, but for what the killed server had forgotten of its own counting when another worker took it.
    seen: dict[tuple[int, int], int] = {}
    for n, attempt, pid in workers.executions():
        assert attempt > seen.get((n, pid), 0), f"worker {pid} ran request {n} as number {attempt} after {seen[(n, pid)]}"
        seen[(n, pid)] = attempt
    unmarked = sum(workers.attempts(n).count(1) - 1 for n in runs)
    print(f"{unmarked} executions not marked as repetitions")
    assert reported >= duplicates - unmarked
    assert unmarked <= 256 * 3, "more than were running when the server was killed"


# Replay ------------------------------------------------------------------------------------------------------------------------


def replay(settings: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dynwire", "replay", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        check=False,
    )


async def test_a_time_range_is_replayed(manager: Managers, workers: Workers, settings: dict[str, Any]) -> None:
    settings["DYNWIRE_NATS_REPLAY_RETENTION"] = 600
    workers.start()
    async with manager() as made:
        client = await made.client("d.w.headers")
        for n in range(6):
            await client.call({"n": n}, headers={"traceparent": f"t{n}"})
    listed = await asyncio.to_thread(replay, settings, "d.w.headers", "--dry-run", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [row["id"] for row in rows if row] and len(rows) == 6
    before = len(workers.executions())
    done = await asyncio.to_thread(
        replay,
        settings,
        "d.w.headers",
        "--since",
        rows[2]["stored_at"],
        "--until",
        rows[5]["stored_at"],
        "--speed",
        "0",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    again = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in rows[2:5])
    assert all(row["items"] == 1 and row["error"] is None and row["new_id"] != row["id"] for row in again)
    assert len(workers.executions()) - before == 3
    # replays are recorded, and left out of the next replay
    text = await asyncio.to_thread(replay, settings, "d.w.headers", "--dry-run")
    assert "6 found" in text.stdout and "3 replays left out" in text.stdout


async def test_without_copies_replay_says_what_to_set(workers: Workers, settings: dict[str, Any]) -> None:
    workers.start()
    done = await asyncio.to_thread(replay, settings, "d.w.work")
    assert done.returncode == 2 and "DYNWIRE_NATS_REPLAY_RETENTION" in done.stderr
