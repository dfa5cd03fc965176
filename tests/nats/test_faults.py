"""The nats plane while a real server, a worker, a caller or the settings break.

Every call ends with its reply or a typed error by its deadline, what arrives of a stream is a prefix without a gap, and
everything works again by itself. Where nothing has to be killed, workers live in a thread of this process, on a connection of
their own.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import dynwire
from dynwire import ConnectError, DeadlineExceeded, MessageTooLarge, NoInstances, Overloaded, PeerLost, Unauthenticated
from dynwire.nats.credentials import Operator, new_user_seed
from dynwire.nats.server import NatsCluster, NatsServer, ServerTls, fetch, free_port
from tests.faults.conftest import PROGRAM, Worker, fails, in_time, known_as, outcome
from tests.plane.faces import PATIENCE_S, Client, Manager, Signal, Stream, eventually

from .conftest import OUTAGES, Outage

RECOVERY_S = 1.0
"""What is promised after a server is ready"""
BUSY_S = 4.0
"""What a machine with two cores and several test runs may add to that"""

PATH = "test.faults.{}"

Managers = Callable[..., AbstractAsyncContextManager[Manager]]

FACES = ("async-asyncio", "async-uvloop", "blocking")
both_apis = pytest.mark.parametrize("face", ("async-uvloop", "blocking"), indirect=True)


@pytest.fixture
def face(request: pytest.FixtureRequest) -> str:
    """The caller's API and loop."""
    name: str = getattr(request, "param", FACES[0])
    return name


@pytest.fixture
def loop_factory(face: str, leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    if face != "async-uvloop":
        return asyncio.new_event_loop
    uvloop: Any = pytest.importorskip("uvloop")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


@pytest.fixture
def managers(face: str, discovery_dir: Path) -> Managers:
    """``async with managers(url, setting=…) as manager``: a caller's manager of the API under test."""
    threads = ThreadPoolExecutor(32, thread_name_prefix="test-body")

    @asynccontextmanager
    async def make(url: str, **settings: Any) -> AsyncIterator[Manager]:
        asyncio.get_running_loop().set_default_executor(threads)
        cls = dynwire.NetworkManager if face == "blocking" else dynwire.AsyncNetworkManager
        defaults: dict[str, Any] = {"request_plane": "nats", "nats_servers": url, "discovery_ttl": 60.0}
        manager = Manager(cls(**{**defaults, **settings}))
        try:
            yield manager
        finally:
            await manager.close()

    return make


class Book:
    """A worker's handlers, and what they know."""

    def __init__(self) -> None:
        self.ran: Counter[int] = Counter()
        self.given: dict[int, int] = {}
        self.finish = Signal()
        self.cancelled = self.sized = 0
        self.held = Signal()
        self.hold: Signal | None = None

    async def echo(self, request: Any) -> Any:
        if isinstance(request, int):
            self.ran[request] += 1
        return request

    async def numbers(self, request: int) -> AsyncIterator[int]:
        """0, 1, … about 500 a second, until `finish`."""
        for index in itertools.count():
            if self.finish.is_set():
                return
            self.given[request] = index + 1
            yield index
            await asyncio.sleep(0.002)

    async def blocks(self, request: tuple[int, int]) -> AsyncIterator[bytes]:
        """Numbered items of some size, as fast as they are taken."""
        count, size = request
        for index in range(count):
            yield index.to_bytes(4) + bytes(size - 4)

    async def size(self, request: Any) -> int:
        self.sized += 1
        return len(request)

    async def make(self, request: int) -> bytes:
        if self.hold is not None:
            self.held.set()
            await self.hold.wait()
        return bytes(request)

    async def forever(self, request: int) -> AsyncIterator[int]:
        try:
            for index in range(request):
                yield index
            await asyncio.get_running_loop().create_future()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


@asynccontextmanager
async def serving(url: str, book: Book, **settings: Any) -> AsyncIterator[Manager]:
    """A worker in a thread. Its settings are not quite the callers', so that no connection is shared."""
    defaults: dict[str, Any] = {"nats_ping_interval": 2.9, "discovery_ttl": 60.0}
    manager = Manager(dynwire.NetworkManager(**{"request_plane": "nats", "nats_servers": url, **defaults, **settings}))
    try:
        for handler in (book.echo, book.numbers, book.blocks, book.size, book.make, book.forever):
            await manager.serve(PATH.format(handler.__name__), handler)
        yield manager
    finally:
        book.finish.set()
        await manager.close()


class Call(NamedTuple):
    number: int
    result: Any
    error: BaseException | None
    seconds: float
    ended: float


class Load:
    """Numbered calls, one after the other on each of some lanes, and streams of numbered items, while something happens."""

    LANES = 4
    DEADLINE_S = 4.0

    def __init__(self, calls: Client, streams: Client) -> None:
        self._calls, self._streams = calls, streams
        self._numbers = itertools.count(1)
        self._stop = False
        self.calls: list[Call] = []
        self.streams: dict[int, list[int]] = {}
        self.ends: dict[int, BaseException | None] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def _call(self) -> Call:
        number = next(self._numbers)
        result, error, seconds = await outcome(self._calls.call(number, timeout=self.DEADLINE_S))
        call = Call(number, result, error, seconds, time.monotonic())
        self.calls.append(call)
        return call

    async def _lane(self) -> None:
        while not self._stop:
            if (await self._call()).error is not None:
                await asyncio.sleep(0.01)  # refused at once: a caller does not spin either

    async def _stream(self, number: int) -> None:
        got = self.streams[number] = []
        self.ends[number] = None
        try:
            async with self._streams.stream(number, timeout=60.0) as stream:
                async for item in stream:
                    got.append(item)
        except dynwire.DynwireError as error:
            self.ends[number] = error

    def more_streams(self) -> list[int]:
        numbers = [next(self._numbers) for _ in range(self.LANES)]
        self._tasks += [asyncio.create_task(self._stream(number)) for number in numbers]
        return numbers

    async def start(self) -> None:
        self._tasks += [asyncio.create_task(self._lane()) for _ in range(self.LANES)]
        await self.flow(self.more_streams())

    async def flow(self, streams: list[int]) -> None:
        """Wait until calls succeed and items of these streams come."""
        at = time.monotonic()
        await eventually(
            lambda: (
                any(call.error is None and call.ended > at for call in self.calls)
                and all(len(self.streams.get(number, ())) > 10 or self.ends.get(number) for number in streams)
            )
        )
        assert [str(self.ends[number]) for number in streams] == ["None"] * len(streams)

    async def recovered(self, since: float) -> float:
        """How long after ``since`` a call has succeeded; and new streams do."""
        # The lanes may sit in calls that were lost: what is in flight is found out about later than new calls succeed.
        fresh: set[asyncio.Task[Call]] = set()
        async with asyncio.timeout(PATIENCE_S):
            while not any(task.done() and task.result().error is None for task in fresh):
                fresh.add(asyncio.create_task(self._call()))
                await asyncio.wait(fresh, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
        seconds = min(call.ended for call in await asyncio.gather(*fresh) if call.error is None) - since
        await self.flow(self.more_streams())
        return seconds

    async def finish(self, book: Book) -> None:
        self._stop = True
        book.finish.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._tasks)

    def check(self, book: Book) -> str:
        """Nothing twice, nothing missing, and errors that say the truth. Returns what happened, in words."""
        for call in self.calls:
            in_time(call.seconds, self.DEADLINE_S, 0.0)
            ran = book.ran[call.number]
            if call.error is None:
                assert (call.result, ran) == (call.number, 1), call
                continue
            assert isinstance(call.error, (ConnectError, DeadlineExceeded, NoInstances, Overloaded, PeerLost)), call
            assert ran <= (0 if call.error.sent == "no" else 1), call
        for number, got in self.streams.items():
            error = self.ends[number]
            assert got == list(range(len(got))), f"stream {number} has a gap or an item twice: {got}"
            if error is None:
                assert len(got) == book.given[number], f"stream {number} lost its tail"
                continue
            assert isinstance(error, PeerLost), error
            assert (error.delivered, error.sent) == (len(got), "yes"), (number, error)
        errors = Counter(type(call.error).__name__ for call in self.calls if call.error is not None)
        ended = Counter("end" if error is None else type(error).__name__ for error in self.ends.values())
        return f"{len(self.calls)} calls, errors {dict(errors)}; streams {dict(ended)}"


@asynccontextmanager
async def under_load(managers: Managers, worker_url: str, caller_url: str) -> AsyncIterator[tuple[Load, Book]]:
    """A worker and a caller, with `Load`; when the body has ended, nothing may be lost."""
    book = Book()
    async with serving(worker_url, book), managers(caller_url) as manager:
        load = Load(await manager.client(PATH.format("echo")), await manager.client(PATH.format("numbers")))
        await load.start()
        yield load, book
        await load.finish(book)
        print(load.check(book))


def within(seconds: float, what: str) -> None:
    print(f"{what}: {seconds:.3f} s")
    assert seconds < RECOVERY_S + BUSY_S, f"{what} after {seconds:.2f} s"


# The server --------------------------------------------------------------------------------------------------------------------


def outage_of(kind: str) -> Callable[..., Outage]:
    return OUTAGES[kind]


def check_blame(load: Load) -> None:
    """What was in flight may be lost; later calls wait for the server, and no worker is set aside for its sake."""
    errors = [call.error for call in load.calls if call.error is not None]
    assert all(isinstance(error, (PeerLost, DeadlineExceeded)) for error in errors), errors
    assert len(errors) <= 2 * load.LANES, errors


@pytest.mark.parametrize(
    ("kind", "face"), [*(("crash", face) for face in FACES), *(("suspended", face) for face in FACES[1:])], indirect=["face"]
)
async def test_the_server_goes_and_comes_back(kind: str, face: str, managers: Managers) -> None:
    with NatsServer() as server:
        async with under_load(managers, server.url, server.url) as (load, _):
            # as long as issue 4 has it once; the load's deadline is shorter than that
            down = 5.0 if kind == "suspended" and face == "blocking" else 0.3
            outage = await asyncio.to_thread(outage_of(kind), server, down)
            within(await load.recovered(outage.ready), f"{kind}: works again")
        check_blame(load)
        if kind == "suspended":  # nothing was lost, only late
            assert set(load.ends.values()) == {None}
            assert all(call.error is None or isinstance(call.error, DeadlineExceeded) for call in load.calls)
            assert down > load.DEADLINE_S or all(call.error is None for call in load.calls)


@pytest.mark.parametrize("kind", ["orderly", "lame_duck"])
async def test_the_server_stops_in_order(kind: str, managers: Managers) -> None:
    """It sends its clients away one by one: a caller that is still there hears for a moment that nobody listens."""
    with NatsServer() as server:
        async with under_load(managers, server.url, server.url) as (load, _):
            outage = await asyncio.to_thread(outage_of(kind), server)
            within(await load.recovered(outage.ready), f"{kind}: works again")


@both_apis
async def test_an_outage_longer_than_the_deadline(managers: Managers) -> None:
    """Calls end by their deadline while the server is away, and none of them is executed later."""
    book = Book()
    with NatsServer() as server:
        async with serving(server.url, book), managers(server.url) as manager:
            client, streams = await manager.client(PATH.format("echo")), await manager.client(PATH.format("blocks"))
            await client.call(0)
            await asyncio.to_thread(server.kill)
            calls = [fails(client.call(n, timeout=0.5), (DeadlineExceeded, ConnectError, NoInstances)) for n in range(1, 9)]
            calls.append(fails(streams.items((1, 10), timeout=0.5), (DeadlineExceeded, ConnectError, NoInstances)))
            for error, seconds in await asyncio.gather(*calls):
                in_time(seconds, 0.5, 0.0)
                assert error.sent == "no", error
            await asyncio.to_thread(server.start)
            await works_again(client, time.monotonic(), "after an outage longer than the deadline")
            assert sum(book.ran[n] for n in range(1, 9)) == 0


@both_apis
async def test_streams_that_wait_survive_a_crash(managers: Managers) -> None:
    """Nothing is on its way when their readers have stopped reading: the outage costs nothing."""
    book = Book()
    with NatsServer() as server:
        async with serving(server.url, book, nats_probe_interval=0.1), managers(server.url, nats_probe_interval=0.1) as manager:
            blocks, forever = await manager.client(PATH.format("blocks")), await manager.client(PATH.format("forever"))
            echo = await manager.client(PATH.format("echo"))
            async with AsyncExitStack() as stack:
                full = [await stack.enter_async_context(blocks.stream((100, 20_000))) for _ in range(4)]
                quiet = [await stack.enter_async_context(forever.stream(1)) for _ in range(2)]
                got = [[await stream.next()] for stream in full]
                for stream in quiet:
                    assert await stream.next() == 0
                # What was granted has come when an answer comes that was asked for later, twice.
                for _ in range(10):
                    await echo.call("in order")
                outage = await asyncio.to_thread(outage_of("crash"), server, 0.2)
                await works_again(echo, outage.ready, "with streams that wait")
                for items, stream in zip(got, full, strict=True):
                    items += [item async for item in stream]
                    assert [int.from_bytes(bytes(item)[:4]) for item in items] == list(range(100))
                waiting = [asyncio.create_task(stream.next()) for stream in quiet]
                for _ in range(10):  # probes go on, and nobody is taken for lost
                    await echo.call("still")
                assert not any(task.done() for task in waiting)
                for stream in quiet:
                    stream.close()
                await asyncio.gather(*waiting, return_exceptions=True)
            await eventually(lambda: book.cancelled == 2)


async def works_again(client: Client, since: float, what: str) -> None:
    """A call succeeds by itself, soon. Until then every call ends with a typed error in time."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            result, error, seconds = await outcome(client.call("after", timeout=2.0))
            in_time(seconds, 2.0, 0.0)
            if error is None:
                assert result == "after"
                break
            assert isinstance(error, (ConnectError, DeadlineExceeded, NoInstances, PeerLost)), error
            await asyncio.sleep(0.01)
    within(time.monotonic() - since, f"{what}: works again")


async def test_members_of_a_cluster_are_lost(managers: Managers) -> None:
    """Worker and caller are at different members; first the caller's goes, then the worker's, announced and not."""
    with NatsCluster(3) as cluster:
        first, second, _ = cluster.servers
        async with under_load(managers, second.url, first.url) as (load, _):
            for server in (first, second):
                server.lame_duck()
                assert await asyncio.to_thread(server.wait_ended, 60.0) == 0
                within(await load.recovered(time.monotonic()), f"{server.name} was a lame duck: works on")
                server.start()
                await asyncio.to_thread(cluster.wait_ready)
        hosts = [first, second]
        async with under_load(managers, second.url, first.url) as (load, _):
            for server in hosts:
                server.kill()
                within(await load.recovered(time.monotonic()), f"{server.name} is killed: works again")
                server.start()
                await asyncio.to_thread(cluster.wait_ready)


async def test_a_member_is_lost_over_tls(managers: Managers, authority: dict[str, str]) -> None:
    """The caller knows of the other member from the one that it loses, and trusts its certificate as well."""
    tls, settings = ServerTls(authority["server"], authority["server_key"]), {"nats_tls_ca": authority["ca"]}
    with NatsCluster(2, tls=tls) as cluster:
        first, second = cluster.servers
        async with serving(second.url, Book(), **settings), managers(first.url, **settings) as manager:
            echo, blocks = await manager.client(PATH.format("echo")), await manager.client(PATH.format("blocks"))
            assert await echo.call("over tls") == "over tls"
            async with blocks.stream((40, 20_000)) as stream:
                got = [await stream.next()]
                first.kill()
                await works_again(echo, time.monotonic(), "over tls, at another member")
                assert [len(item) async for item in stream] == [20_000] * (40 - len(got))


# Slow consumers ----------------------------------------------------------------------------------------------------------------


def connections(server: NatsServer) -> int:
    found: int = json.loads(fetch(f"{server.monitor_url}/connz")[1])["num_connections"]
    return found


def slow_consumers(server: NatsServer) -> int:
    found: int = json.loads(fetch(f"{server.monitor_url}/varz")[1])["slow_consumers"]
    return found


@both_apis
async def test_readers_that_do_not_read(managers: Managers) -> None:
    """They hold up nobody but themselves, and lose nothing: what the worker may send is bounded."""
    with NatsServer(config="max_pending: 8388608") as server:
        async with serving(server.url, Book()), managers(server.url, nats_credit_budget=4 << 20) as manager:
            blocks, echo = await manager.client(PATH.format("blocks")), await manager.client(PATH.format("echo"))
            async with AsyncExitStack() as stack:
                streams = [await stack.enter_async_context(blocks.stream((60, 50_000))) for _ in range(20)]
                got = [[await stream.next() for _ in range(3)] for stream in streams]
                for n in range(200):
                    assert await echo.call(n) == n
                for items, stream in zip(got, streams, strict=True):
                    items += [item async for item in stream]
                    assert [int.from_bytes(bytes(item)[:4]) for item in items] == list(range(60))
            assert slow_consumers(server) == 0


@pytest.mark.parametrize("face", ["async-uvloop"], indirect=True)
async def test_slow_readers_of_many_clients_share_one_budget(managers: Managers) -> None:
    """They share a connection, and what comes for all of them is bounded together: the NATS server throws nobody out."""
    budget, number = 4 << 20, 8
    with NatsServer(config="max_pending: 8388608") as server:
        async with serving(server.url, Book()), managers(server.url, nats_credit_budget=budget) as manager:
            (instance,) = await (await manager.client(PATH.format("blocks"))).wait_for_instances(1)
            real: Any = manager.real
            clients = [real.create_client() for _ in range(number)]
            streams = []
            for client in clients:
                channel = client.channel(instance)
                await channel.connect()
                streams += [channel.stream((40, 50_000), PATIENCE_S) for _ in range(20)]
            got = [[await anext(stream) for _ in range(3)] for stream in streams]
            for _ in range(3):
                time.sleep(0.2)  # noqa: ASYNC251  # nothing is read: all of it waits at the NATS server
                await asyncio.sleep(0)
                for items, stream in zip(got, streams, strict=True):
                    items.append(await anext(stream))
                granted = [client.stats()["granted"] for client in clients]
                assert 0 < sum(granted) <= budget
            for items, stream in zip(got, streams, strict=True):
                items += [item async for item in stream]
                assert [int.from_bytes(bytes(item)[:4]) for item in items] == list(range(40))
            assert slow_consumers(server) == 0
            assert sum(client.stats()["granted"] for client in clients) == 0


class Blocks:
    """Reads numbered blocks until they end or are lost."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.items: list[int] = []
        self.lost: PeerLost | None = None

    async def read(self, count: int) -> None:
        try:
            while self.lost is None and count > 0:
                self.items.append(int.from_bytes(bytes(await self._stream.next())[:4]))
                count -= 1
        except PeerLost as error:
            self.lost = error

    def check(self, count: int) -> None:
        assert self.items == list(range(len(self.items)))
        if self.lost is None:
            assert len(self.items) == count
        else:
            assert (self.lost.delivered, self.lost.sent) == (len(self.items), "yes" if self.items else "maybe")


@pytest.mark.parametrize(
    ("cut", "face"),
    [(False, FACES[1]), (True, FACES[0]), (True, FACES[1])],
    ids=["below", "above", "above-uvloop"],
    indirect=["face"],
)
async def test_a_caller_whose_loop_is_blocked(cut: bool, managers: Managers) -> None:
    """Below the limits of the server nothing is lost. Above them it cuts the connection, and what was lost is an error."""
    limits = 'max_payload: 65536, max_pending: 2097152, write_deadline: "200ms"' if cut else ""
    number, count, size = (80 if cut else 20), 40, 60_000
    with NatsServer(config=limits) as server:
        async with serving(server.url, Book()), managers(server.url, nats_credit_budget=64 << 20) as manager:
            client, echo = await manager.client(PATH.format("blocks")), await manager.client(PATH.format("echo"))
            async with AsyncExitStack() as stack:
                all_ = [Blocks(await stack.enter_async_context(client.stream((count, size)))) for _ in range(number)]
                for blocks in all_:
                    await blocks.read(12)  # their windows grow, to 20 MB together
                for _ in range(6 if cut else 1):
                    for blocks in all_:
                        await blocks.read(4)
                    await asyncio.sleep(0)  # what it is granted now is sent, and comes while nobody looks
                    time.sleep(0.3)  # noqa: ASYNC251  # that is the fault
                    if slow_consumers(server):
                        break
                for blocks in all_:
                    await blocks.read(count - len(blocks.items))
                    blocks.check(count)
            assert (slow_consumers(server) > 0) == any(blocks.lost for blocks in all_) == cut
            await works_again(echo, time.monotonic(), "after a blocked loop")


# Credentials, and servers that are not there ------------------------------------------------------------------------------------

SECRET = "s3cret-value"
NOBODY = "nats:dynwire.i.0123456789abcdef"


@pytest.mark.parametrize(
    ("kind", "face"),
    [
        *(("userpass", face) for face in FACES),
        ("none", FACES[2]),
        ("token", FACES[1]),
        ("nkey", FACES[2]),
        ("credentials_file", FACES[1]),
        ("url", FACES[2]),
    ],
    indirect=["face"],
)
async def test_wrong_credentials_at_start(kind: str, managers: Managers, discovery_dir: Path, tmp_path: Path) -> None:
    seed, operator = new_user_seed(), Operator()
    file = Operator().write_credentials(tmp_path / "stranger.creds")
    cases: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
        "none": ({"token": SECRET}, {}, "NATS_AUTH"),
        "userpass": ({"username": "u", "password": SECRET}, {"username": "u", "password": "x" + SECRET}, "NATS_AUTH_PASSWORD"),
        "token": ({"token": SECRET}, {"token": "x" + SECRET}, "NATS_AUTH_TOKEN"),
        "nkey": ({"nkey": new_user_seed()}, {"nkey": seed}, "NATS_AUTH_NKEY"),
        "credentials_file": ({"operator": operator}, {"credentials_file": file}, "NATS_AUTH_CREDENTIALS_FILE"),
        "url": ({"username": "u", "password": SECRET}, {}, "NATS_SERVER"),
    }
    arguments, wrong, setting = cases[kind]
    settings = {f"nats_{name}": value for name, value in wrong.items()}
    with NatsServer(**arguments) as server:
        url = server.url.replace("://", f"://u:x{SECRET}@") if kind == "url" else server.url
        async with (
            managers(url, **settings) as manager,
            known_as(manager, PATH.format("echo"), NOBODY, discovery_dir, "nats") as client,
        ):
            serve = functools.partial(manager.serve, "test.faults.here", Book().echo)
            for attempt in (lambda: client.call(1), lambda: client.items(1), serve):
                error, seconds = await fails(attempt(), Unauthenticated)
                in_time(seconds, 1.0, 0.0)
                assert error.sent == "no"
                assert setting in str(error)
                assert f"127.0.0.1:{server.port}" in str(error)
                shown = str(error) + repr(error.to_dict())
                assert SECRET not in shown and seed not in shown


@both_apis
async def test_credentials_that_change(managers: Managers) -> None:
    settings = {"nats_username": "u", "nats_password": "a"}
    with NatsServer(username="u", password="a") as server:
        async with serving(server.url, Book(), **settings), managers(server.url, **settings) as manager:
            client = await manager.client(PATH.format("echo"))
            await client.call(0)
            server._password = "b"
            await asyncio.to_thread(server.restart)
            async with asyncio.timeout(PATIENCE_S):
                while True:  # one may be under way when the connection breaks, or before we hear of that
                    _, error, seconds = await outcome(client.call(1, timeout=0.4))
                    in_time(seconds, 0.4, 0.0)
                    if isinstance(error, Unauthenticated):
                        break
                    assert isinstance(error, (ConnectError, DeadlineExceeded, PeerLost)), error
            assert error.sent == "no"
            assert "NATS_AUTH_PASSWORD" in str(error)
            server._password = "a"
            await asyncio.to_thread(server.restart)
            await works_again(client, time.monotonic(), "with the old password")


@pytest.mark.parametrize(
    ("wait", "face"),
    [(True, FACES[1]), (True, FACES[2]), (False, FACES[2])],
    ids=["waits-uvloop", "waits-blocking", "fails"],
    indirect=["face"],
)
async def test_no_server_at_start(wait: bool, managers: Managers, discovery_dir: Path) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    async with (
        managers(url, nats_wait=wait, nats_connect_timeout=0.6) as manager,
        known_as(manager, PATH.format("echo"), NOBODY, discovery_dir, "nats") as client,
    ):
        error, seconds = await fails(manager.serve("test.faults.here", Book().echo), ConnectError)
        in_time(seconds, 0.6, 0.6 if wait else 0.0)
        assert "NATS_SERVER" in str(error) and url in str(error)
        assert await manager.list_instances("test.faults.here") == ()
        for attempt in (client.call, client.items):
            error, seconds = await fails(attempt(1, timeout=0.3), (ConnectError, DeadlineExceeded))
            in_time(seconds, 0.3, 0.0)
            assert error.sent == "no"


async def test_a_server_that_says_nothing_at_start(managers: Managers, discovery_dir: Path) -> None:
    with NatsServer() as server:
        async with (
            managers(server.url, nats_connect_timeout=0.6) as manager,
            known_as(manager, PATH.format("echo"), NOBODY, discovery_dir, "nats") as client,
        ):
            with server.paused():
                error, seconds = await fails(client.call(1, timeout=0.3), (ConnectError, DeadlineExceeded))
                in_time(seconds, 0.3, 0.0)
                assert error.sent == "no"
                error, seconds = await fails(manager.serve("test.faults.here", Book().echo), ConnectError)
                in_time(seconds, 0.6, 0.0)
            await manager.serve("test.faults.here", Book().echo)


@both_apis
async def test_a_server_that_comes_late(managers: Managers) -> None:
    port = free_port()
    server = NatsServer(port=port)
    url = f"nats://127.0.0.1:{port}"
    settings = {"nats_connect_timeout": PATIENCE_S}
    async with managers(url, **settings) as worker, managers(url, **settings, nats_ping_interval=2.8) as caller:
        client = await caller.client(PATH.format("echo"), wait=0)
        serving = asyncio.create_task(worker.serve(PATH.format("echo"), Book().echo))
        await asyncio.sleep(0)
        try:
            await asyncio.to_thread(server.start)
            ready = time.monotonic()
            await serving
            within(time.monotonic() - ready, "serves when the server has come")
            await client.wait_for_instances()
            assert await client.call("late") == "late"
        finally:
            server.stop()


# Workers and callers -----------------------------------------------------------------------------------------------------------

StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(discovery_dir: Path, tmp_path: Path) -> Iterator[StartWorker]:
    """``start_worker(url, setting=…)``: a process with the handlers of tests/faults/worker.py."""
    started: list[Worker] = []

    def start(url: str, **settings: object) -> Worker:
        arguments = [f"{name}={value}" for name, value in {"request_plane": "nats", "nats_servers": url, **settings}.items()]
        command = [sys.executable, "-X", "faulthandler", str(PROGRAM), "asyncio", *arguments]
        worker = Worker(command, tmp_path / f"stderr-{len(started)}")
        started.append(worker)
        word, worker.address = worker.line().split()
        assert word == "ready"
        return worker

    try:
        yield start
    finally:
        with ExitStack() as stack:
            for worker in started:
                stack.callback(worker.close)


@both_apis
async def test_a_worker_is_killed(managers: Managers, start_worker: StartWorker) -> None:
    """The NATS server knows at once that nobody listens there, and probes find that out."""
    with NatsServer() as server:
        worker = start_worker(server.url)
        async with managers(server.url) as manager:
            waits, echo = await manager.client("f.w.wait"), await manager.client("f.w.echo")
            some, endless = await manager.client("f.w.some_then_wait"), await manager.client("f.w.endless")
            call = asyncio.create_task(fails(waits.call(0), PeerLost))
            await worker.says("waiting")
            async with some.stream(5) as stream, endless.stream(1000) as running:
                got = [await stream.next() for _ in range(5)]
                numbers = [(await running.next())[0] for _ in range(20)]
                killed = time.monotonic()
                worker.kill()
                error, _ = await fails(stream.next(), PeerLost)
                within(time.monotonic() - killed, "noticed that a worker is gone")
                assert got == list(range(5))
                assert (error.delivered, error.sent, error.peer) == (5, "yes", worker.address)
                with pytest.raises(PeerLost) as caught:
                    async for index, _ in running:
                        numbers.append(index)
                assert numbers == list(range(len(numbers)))
                assert (caught.value.delivered, caught.value.sent) == (len(numbers), "yes")
            error, _ = await call
            assert error.sent in ("maybe", "yes")
            assert time.monotonic() - killed < RECOVERY_S + BUSY_S
            error, seconds = await fails(echo.call(1, timeout=1.0), (ConnectError, NoInstances))
            in_time(seconds, 1.0, 0.0)
            assert error.sent == "no"
            start_worker(server.url)
            await works_again(echo, time.monotonic(), "with another worker")


@both_apis
async def test_streams_do_not_see_that_one_of_two_workers_was_killed(managers: Managers, start_worker: StartWorker) -> None:
    """Its instance is in the table, and it was heard of a moment ago: streams are opened there, and then elsewhere."""
    with NatsServer() as server:
        doomed, other = start_worker(server.url), start_worker(server.url)
        async with managers(server.url, discovery_ttl=60.0) as manager:
            client, echo = await manager.client("f.w.endless", wait=2), await manager.client("f.w.echo", wait=2)
            there = {instance.address: instance.id for instance in await client.wait_for_instances(2)}
            for instance in await echo.wait_for_instances(2):
                await echo.call(0, instance=instance.id)
            before = connections(server)
            await asyncio.to_thread(doomed.kill)
            await eventually(lambda: connections(server) < before)
            async with AsyncExitStack() as stack:
                streams = [await stack.enter_async_context(client.stream(10)) for _ in range(8)]
                for stream in streams:
                    assert (await stream.next())[0] == 0
                    assert stream.real.instance_id == there[other.address]


@both_apis
async def test_a_worker_is_stopped(managers: Managers, start_worker: StartWorker) -> None:
    """Nothing tells that it is only stopped: deadlines and the keepalive timeout end what waits for it."""
    with NatsServer() as server:
        worker = start_worker(server.url)
        async with managers(server.url, nats_probe_interval=0.1, nats_keepalive_timeout=0.6) as manager:
            echo, cleans_up = await manager.client("f.w.echo"), await manager.client("f.w.cleans_up")
            await echo.call(0)
            async with cleans_up.stream("second") as stream:
                assert await stream.next() == 0
                await worker.says("cleanable")
                worker.signal(signal.SIGSTOP)
                stopped = time.monotonic()
                error, seconds = await fails(echo.call(1, timeout=0.4), (DeadlineExceeded, ConnectError))
                in_time(seconds, 0.4)
                error, _ = await fails(stream.next(), PeerLost)
                in_time(time.monotonic() - stopped, 2.0, 0.5)
                assert (error.delivered, error.sent) == (1, "yes")
                assert "DYNWIRE_NATS_KEEPALIVE_TIMEOUT" in str(error)
            worker.signal(signal.SIGCONT)
            await works_again(echo, time.monotonic(), "after SIGCONT")
            report = await manager.client("f.w.report")

            events: list[str] = []
            async with asyncio.timeout(PATIENCE_S):  # its cancel message had waited in the stopped worker's socket
                while "cleaned" not in events:
                    events = (await report.call(0))["events"]


CALLER = """
import asyncio, sys
import dynwire

async def main():
    async with dynwire.AsyncNetworkManager(request_plane="nats", nats_servers=sys.argv[1]) as manager:
        client = await manager.endpoint("test.faults.forever").client()
        await client.wait_for_instances(1, 20)
        call = asyncio.create_task(client.call(0))
        async with client.stream(2) as first, client.stream(1) as second:
            await anext(first), await anext(first), await anext(second)
            print("running", flush=True)
            await asyncio.get_running_loop().create_future()

asyncio.run(main())
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
async def test_a_caller_ends(end: signal.Signals, face: str, managers: Managers) -> None:
    """Its handlers are cancelled: those of a killed one when probes find nobody."""
    book = Book()
    with NatsServer() as server:
        async with serving(server.url, book, nats_probe_interval=0.1):
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", CALLER, server.url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            with process:
                try:
                    assert process.stdout is not None
                    assert await asyncio.to_thread(process.stdout.readline) == b"running\n"
                    process.send_signal(end)
                    ended = time.monotonic()
                    await eventually(lambda: book.cancelled == 3)
                    within(time.monotonic() - ended, "handlers of a caller that is gone are cancelled")
                finally:
                    process.kill()


# Payloads ----------------------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def check_refused(error: MessageTooLarge, size: int, announced: int, setting: str) -> None:
    assert error.size == size
    assert announced - 1024 < error.limit < announced
    for word in (str(size), str(error.limit), setting, "tcp plane"):
        assert word in str(error), error
    assert error.setting == setting


@pytest.mark.parametrize(
    ("announced", "face"),
    [(None, FACES[1]), (None, FACES[2]), (8 * MIB, FACES[2]), (32 * MIB, FACES[1])],
    ids=["default-uvloop", "default-blocking", "8 MiB", "32 MiB"],
    indirect=["face"],
)
async def test_payloads(announced: int | None, managers: Managers) -> None:
    """What the server announces, and never above 16 MiB: refused before sending, requests and replies."""
    limit = min(announced or MIB, 16 * MIB)
    setting = "max_payload of the NATS server" if limit < 16 * MIB else "nats plane limit"
    book = Book()
    with NatsServer(max_payload=announced) as server:
        async with serving(server.url, book), managers(server.url) as manager:
            size, make, blocks = [await manager.client(PATH.format(name)) for name in ("size", "make", "blocks")]
            assert await size.call(b"first") == 5
            for attempt in (size.call, size.items):
                error, _ = await fails(attempt(bytes(limit)), MessageTooLarge)
                check_refused(error, limit, limit, setting)
                assert error.sent == "no"
            assert book.sized == 1
            assert await size.call(bytes(error.limit)) == error.limit
            error, _ = await fails(make.call(limit), MessageTooLarge)
            check_refused(error, limit, limit, setting)
            assert error.sent == "yes"
            largest = error.limit
            assert bytes(await make.call(largest)) == bytes(largest)
            items = await blocks.items((2, largest))
            assert [len(item) for item in items] == [largest, largest]
            del items
            error, _ = await fails(blocks.items((2, largest + 1)), MessageTooLarge)
            check_refused(error, largest + 1, limit, setting)
            assert error.sent == "yes"
            assert await size.call(b"last") == 4


@both_apis
async def test_a_server_that_comes_back_with_a_smaller_limit(managers: Managers) -> None:
    book = Book()
    with NatsServer(max_payload=8 * MIB) as server:
        async with serving(server.url, book), managers(server.url) as manager:
            size, make = [await manager.client(PATH.format(name)) for name in ("size", "make")]
            assert await size.call(bytes(4 * MIB)) == 4 * MIB
            hold = book.hold = Signal()
            reply = asyncio.create_task(fails(make.call(4 * MIB), MessageTooLarge))
            await book.held.wait()
            await asyncio.to_thread(server.kill)
            waiting = [asyncio.create_task(size.call(b"small"))]
            large = asyncio.create_task(fails(size.call(bytes(4 * MIB)), MessageTooLarge))
            server._max_payload = MIB
            await asyncio.to_thread(server.start)
            assert await waiting[0] == 5
            error, _ = await large
            check_refused(error, 4 * MIB, MIB, "max_payload of the NATS server")
            assert error.sent == "no"
            hold.set()
            error, _ = await reply
            check_refused(error, 4 * MIB, MIB, "max_payload of the NATS server")
