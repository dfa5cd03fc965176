"""Both ports against a real nats-server, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest

from dynwire._buffers import Block
from dynwire._natsproto import CLOSED, DOWN, UP
from dynwire.errors import ConfigError, ManagerClosed, MessageTooLarge, PeerLost, ProtocolError
from dynwire.nats.server import NatsServer, find_binary

from .kept import WAIT_S, Inbox, connected, eventually

pytest.importorskip("nats")
MIB = 1 << 20
HEADERS = b"NATS/1.0\r\nD: i 7\r\nName: va:lue\r\n\r\n"


@pytest.fixture(autouse=True)
def needs_the_program() -> None:
    try:
        find_binary()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["fast", "plain"])
def port(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def large_server() -> Iterator[NatsServer]:
    """Takes payloads of 8 MiB."""
    with NatsServer(max_payload=8 * MIB, jetstream=True) as server:
        yield server


async def test_order_headers_and_replies(large_server: NatsServer, port: str) -> None:
    async with connected(large_server.url, port=port) as connection:
        assert connection.port.fast is (port == "fast")
        inbox = Inbox()
        subscription = await connection.subscribe("order.*", inbox.sink)
        rng = random.Random(4)
        sent = []
        for i in range(5000):
            payload = b"%d " % i + rng.randbytes(rng.choice([0, 10, 100, 3000]))
            reply = b"back.%d" % i if i % 3 == 0 else None
            headers = HEADERS if i % 2 else None
            connection.port.send(b"order.%d" % (i % 7), payload, reply, headers)
            sent.append((b"order.%d" % (i % 7), reply or b"", headers, payload))
            if rng.random() < 0.02:
                await asyncio.sleep(0)
            if rng.random() < 0.02:
                connection.port.flush_now()
        await inbox.count(len(sent))
        assert inbox.messages == sent
        assert inbox.batches == [True, False] * (len(inbox.batches) // 2)
        assert not inbox.in_task, "sinks are called from the loop, where readers may be woken"
        subscription.unsubscribe()


async def test_large_payloads(large_server: NatsServer, port: str) -> None:
    async with connected(large_server.url, port=port) as connection:
        assert connection.port.max_payload == 8 * MIB == connection.max_payload
        inbox = Inbox()
        subscription = await connection.subscribe("large", inbox.sink)
        rng = random.Random(5)
        sizes = [1, 65535, 65536, 65537, 131072, MIB, 3 * MIB + 1, 8 * MIB - len(HEADERS)]
        payloads = [rng.randbytes(size) for size in sizes]
        for payload in payloads:
            connection.port.send(b"large", payload, headers=HEADERS)
            connection.port.send(b"large", b"between")
        await inbox.count(2 * len(sizes))
        assert inbox.payloads[::2] == payloads
        assert set(inbox.payloads[1::2]) == {b"between"}
        if port == "fast":
            assert type(inbox.messages[-2][3]) is Block
        subscription.unsubscribe()


async def test_a_payload_by_reference_is_taken_before_publish_returns_or_kept(large_server: NatsServer) -> None:
    async with connected(large_server.url, port="fast") as connection:
        inbox = Inbox()
        subscription = await connection.subscribe("kept", inbox.sink)
        for i in range(20):
            connection.port.send(b"kept", bytes([i]) * MIB)  # nobody else refers to it
        await inbox.count(20)
        assert inbox.payloads == [bytes([i]) * MIB for i in range(20)]
        subscription.unsubscribe()


async def test_too_large_is_refused_before_sending(port: str) -> None:
    with NatsServer(max_payload=1000) as server:
        async with connected(server.url, port=port) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            with pytest.raises(MessageTooLarge, match="1001 bytes") as caught:
                connection.port.send(b"a", b"x" * (1001 - len(HEADERS)), headers=HEADERS)
            assert (caught.value.size, caught.value.limit) == (1001, 1000)
            assert "max_payload" in caught.value.setting
            connection.port.send(b"a", b"x" * (1000 - len(HEADERS)), headers=HEADERS)
            await inbox.count(1)
            subscription.unsubscribe()


async def test_a_subject_that_is_none(port: str, large_server: NatsServer) -> None:
    async with connected(large_server.url, port=port) as connection:
        with pytest.raises(ConfigError, match="subject"):
            connection.port.send(b"a b", b"")
        with pytest.raises(ConfigError, match="subject"):
            await connection.subscribe("a b", Inbox().sink)
        assert connection.up


async def test_unsubscribed_at_once(port: str, large_server: NatsServer) -> None:
    async with connected(large_server.url, port=port) as connection:
        gone, stays = Inbox(), Inbox()
        first = await connection.subscribe("gone", gone.sink)
        second = await connection.subscribe("gone", stays.sink)
        connection.port.send(b"gone", b"1")
        await gone.count(1)
        await stays.count(1)
        for _ in range(10):
            connection.port.send(b"gone", b"2")
        first.unsubscribe()
        first.unsubscribe()
        await stays.count(11)
        assert gone.payloads == [b"1"]
        second.unsubscribe()
        for _ in range(5):  # nats-py unsubscribes in a task
            await asyncio.sleep(0)
        # the server knows as well: nobody listens
        with pytest.raises(Exception, match="no responders"):
            await connection.client.request("gone", b"", timeout=WAIT_S)


async def test_queue_groups(port: str, large_server: NatsServer) -> None:
    async with connected(large_server.url, port=port) as connection:
        inboxes = [Inbox(), Inbox()]
        subscriptions = [await connection.subscribe("work", inbox.sink, "group") for inbox in inboxes]
        for i in range(200):
            connection.port.send(b"work", b"%d" % i)
        await eventually(lambda: sum(len(inbox.messages) for inbox in inboxes) == 200)
        assert sorted(int(p) for inbox in inboxes for p in inbox.payloads) == list(range(200))
        assert all(inbox.messages for inbox in inboxes)
        for subscription in subscriptions:
            subscription.unsubscribe()


async def test_a_sink_that_raises_loses_its_message_only(port: str, large_server: NatsServer) -> None:
    from dynwire._natsproto import CallbackSink

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    async with connected(large_server.url, port=port) as connection:
        got = []

        def take(subject: bytes, reply: bytes, headers: bytes | None, payload: Any) -> None:
            if payload == b"bad":
                raise ValueError("mine")
            got.append(payload)

        subscription = await connection.subscribe("raise", CallbackSink(take))
        for payload in (b"1", b"bad", b"2"):
            connection.port.send(b"raise", payload)
        await eventually(lambda: len(got) == 2)
        assert got == [b"1", b"2"]
        assert [str(context["exception"]) for context in reported] == ["mine"]
        subscription.unsubscribe()


async def test_no_responders_comes_with_its_status(port: str, large_server: NatsServer) -> None:
    async with connected(large_server.url, port=port) as connection:
        inbox = Inbox()
        subscription = await connection.subscribe("_INBOX.me.*", inbox.sink)
        connection.port.send(b"nobody.there", b"x", b"_INBOX.me.1")
        await inbox.count(1)
        subject, reply, headers, payload = inbox.messages[0]
        assert (subject, reply, payload) == (b"_INBOX.me.1", b"", b"")
        # newer servers add the subject that nobody listens to
        assert headers is not None and headers.replace(b"Nats-Subject: nobody.there\r\n", b"") == b"NATS/1.0 503\r\n\r\n"
        subscription.unsubscribe()


# --- everything that nats-py does goes through the port


async def test_nats_py_works_over_it(port: str, large_server: NatsServer, nats_prefix: str) -> None:
    name = nats_prefix.replace(".", "-")
    async with connected(large_server.url, port=port) as connection:
        client = connection.client

        async def echo(message: Any) -> None:
            await message.respond(message.data * 2)

        await client.subscribe(f"{name}.echo", cb=echo)
        assert (await client.request(f"{name}.echo", b"ab", timeout=WAIT_S)).data == b"abab"
        big = random.Random(1).randbytes(2 * MIB)
        assert (await client.request(f"{name}.echo", big, timeout=WAIT_S)).data == big * 2
        assert await client.rtt() >= 0
        stream = client.jetstream()
        await stream.add_stream(name=name, subjects=[f"{name}.js.>"])
        for i in range(300):
            await stream.publish(f"{name}.js.{i % 3}", b"%d" % i, headers={"N": str(i)})
        pulled = await stream.pull_subscribe(f"{name}.js.>", durable="d")
        got = []
        while len(got) < 300:
            for message in await pulled.fetch(100, timeout=WAIT_S):
                assert message.headers["N"] == message.data.decode()
                got.append(int(message.data))
                await message.ack()
        assert got == list(range(300))
        bucket = await stream.create_key_value(bucket=name)
        watcher = await bucket.watchall()
        await bucket.put("k", b"v")
        entries = [entry async for entry in _first(watcher, 2)]
        assert [entry.value for entry in entries if entry is not None] == [b"v"]
        await watcher.stop()
        store = await stream.create_object_store(bucket=f"{name}-objects")
        await store.put("o", big)
        assert (await store.get("o")).data == big
        await client.flush()
        ordered = await stream.subscribe(f"{name}.js.>", ordered_consumer=True)
        assert [int((await ordered.next_msg(timeout=WAIT_S)).data) for _ in range(300)] == list(range(300))
        await ordered.unsubscribe()
        await stream.delete_stream(name)


async def _first(watcher: Any, n: int) -> Any:
    for _ in range(n):
        yield await watcher.updates(timeout=WAIT_S)


async def test_much_for_nats_py_itself_is_not_held_without_bound(large_server: NatsServer) -> None:
    """A slow callback of nats-py's makes its subscription drop, as without the fast port, and nothing else suffers."""
    async with connected(large_server.url, port="fast") as connection:
        inbox = Inbox()
        subscription = await connection.subscribe("both.>", inbox.sink)
        got = 0

        async def slow(message: Any) -> None:
            nonlocal got
            got += 1

        await connection.client.subscribe("both.>", cb=slow)
        await connection.client.flush()
        for i in range(400):
            connection.port.send(b"both.x", bytes(60000))
            if i % 20 == 0:
                await inbox.count(i - 20)
        await inbox.count(400)
        await eventually(lambda: got == 400)
        subscription.unsubscribe()


# --- faults


async def test_killed_and_restarted(port: str) -> None:
    with NatsServer() as server:
        async with connected(server.url, port=port) as connection:
            states: list[int] = []
            remove = connection.on_state(lambda state, error: states.append(state))
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            for turn in range(2):
                await asyncio.to_thread(server.kill)
                await inbox.until(lambda turn=turn: len(inbox.states) == 2 * turn + 1)  # type: ignore[misc]
                assert not connection.up
                with pytest.raises(PeerLost) as caught:
                    connection.port.send(b"a", b"x")
                assert caught.value.sent == "no"
                assert not connection.port.congested
                await asyncio.to_thread(server.start)
                await connection.wait_up(WAIT_S)
                connection.port.send(b"a", b"%d" % turn)
                await inbox.count(turn + 1)
            assert [state for state, _ in inbox.states] == [DOWN, UP] * 2
            assert states == [DOWN, UP] * 2
            assert inbox.payloads == [b"0", b"1"]
            assert not inbox.in_task
            remove()
            subscription.unsubscribe()


def never_pauses_writelines() -> bool:
    """A defect of asyncio in Python 3.12 and 3.13, up to some release of each; what nats-py alone sends is not bounded there."""
    transport: Any = importlib.import_module("asyncio.selector_events")._SelectorSocketTransport
    own = vars(transport).get("writelines")
    return own is not None and "_maybe_pause_protocol" not in inspect.getsource(own)


async def test_a_server_that_does_not_read(port: str) -> None:
    """Producers that heed ``congested`` hold a bounded amount, and nothing is lost or doubled when it goes on."""
    standard_loop = type(asyncio.get_running_loop()) is asyncio.SelectorEventLoop
    if port == "plain" and standard_loop and never_pauses_writelines():
        pytest.skip("this Python's writelines() never tells nats-py that the socket is full")
    with NatsServer() as server:
        async with connected(server.url, port=port, ping_interval=60.0) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("flow", inbox.sink)
            sent = 0

            def produce(most: int) -> None:
                nonlocal sent
                while not connection.port.congested and sent < most:
                    connection.port.send(b"flow", b"%8d" % sent + bytes(4000))
                    sent += 1

            server.pause()
            async with asyncio.timeout(WAIT_S):
                while not connection.port.congested:  # the sockets' buffers are full first
                    produce(sent + 20)
                    await asyncio.sleep(0)
            held = connection.port.unsent
            for _ in range(20):
                produce(10**6)
                await asyncio.sleep(0)
            assert connection.port.congested
            assert connection.port.unsent <= max(held, MIB) < 2 * MIB
            at_pause = sent
            server.resume()
            await inbox.until(lambda: inbox.writable)
            assert not connection.port.congested
            async with asyncio.timeout(WAIT_S):
                while sent < at_pause + 500:
                    produce(at_pause + 500)
                    await asyncio.sleep(0)
            await inbox.count(sent)
            assert [int(payload[:8]) for payload in inbox.payloads] == list(range(sent))
            subscription.unsubscribe()


@pytest.mark.parametrize("full", ["no", "by the port", "by nats-py"])
async def test_a_frozen_server_is_noticed(port: str, full: str) -> None:
    """Also when the socket is full, so that closing the connection would wait for the server."""
    with NatsServer() as server:
        async with connected(server.url, port=port, ping_interval=0.1, connect_timeout=0.5) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            server.pause()
            if full == "by the port":
                async with asyncio.timeout(WAIT_S):
                    while connection.up and not connection.port.congested:
                        connection.port.send(b"b", bytes(50000))
                        await asyncio.sleep(0)
            elif full == "by nats-py":
                from nats.errors import OutboundBufferLimitError

                with contextlib.suppress(TimeoutError, OutboundBufferLimitError):
                    while connection.up:
                        await asyncio.wait_for(connection.client.publish("b", bytes(50000)), 0.05)
            await inbox.until(lambda: inbox.states)
            assert not connection.up
            server.resume()
            await connection.wait_up(WAIT_S)
            connection.port.send(b"a", b"again")
            await inbox.count(1)
            subscription.unsubscribe()


async def test_frozen_for_less_than_it_takes_to_notice(port: str) -> None:
    with NatsServer() as server:
        async with connected(server.url, port=port) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            with server.paused():
                connection.port.send(b"a", b"1")
                await asyncio.sleep(0.3)
                assert connection.up
            await inbox.count(1)
            assert inbox.states == []
            subscription.unsubscribe()


async def test_released_while_the_server_is_frozen_or_gone(port: str) -> None:
    with NatsServer() as server:
        async with connected(server.url, port=port) as connection:
            server.pause()
            async with asyncio.timeout(WAIT_S):
                while not connection.port.congested:
                    connection.port.send(b"b", bytes(50000))
                    await asyncio.sleep(0)
        assert connection.port.state == CLOSED
        with pytest.raises(ManagerClosed):
            connection.port.send(b"a", b"")
        server.resume()
        async with connected(server.url, port=port) as connection:
            await asyncio.to_thread(server.kill)
            await eventually(lambda: not connection.up)
        assert connection.port.state == CLOSED


class Impostor:
    """Greets like a NATS server, and then sends ``garbage``."""

    def __init__(self, garbage: bytes) -> None:
        self.garbage = garbage
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            writer.write(b'INFO {"server_id":"x","version":"2.0.0","max_payload":1000,"headers":true}\r\n')
            while line := await reader.readline():
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
                if line.startswith(b"SUB"):
                    writer.write(self.garbage)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()


@pytest.mark.parametrize(
    "garbage",
    [b"HTTP/1.1 400\r\n", b"MSG a 1 99999999\r\n", b"INFO not json\r\n", b"INFO []\r\n", b"HMSG a 1 9 2\r\nxx\r\n"],
    ids=["http", "huge", "info", "list", "headers"],
)
async def test_garbage_from_the_server_costs_the_connection(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    impostor = Impostor(garbage)
    async with impostor as url:
        with caplog.at_level(logging.WARNING, "dynwire.nats"):
            async with connected(url, port="fast", connect_timeout=0.5) as connection:
                inbox = Inbox()
                subscribing = asyncio.create_task(connection.subscribe("a", inbox.sink))
                await subscribing
                await eventually(lambda: impostor.connections >= 4)  # it goes on trying
        assert "lost" in caplog.text
        errors = [error for state, error in inbox.states if state == DOWN]
        if not garbage.startswith(b"INFO"):
            assert any(isinstance(error, ProtocolError) for error in errors)


async def test_messages_that_nats_py_would_stop_reading_for(large_server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    """Anybody can publish such: bytes that are no text in a subject, and headers that are none."""
    _, writer = await asyncio.open_connection("127.0.0.1", large_server.port)
    async with connected(large_server.url, port="fast") as connection:
        inbox = Inbox()
        subscription = await connection.subscribe("evil.>", inbox.sink)
        got: list[bytes] = []

        async def take(message: Any) -> None:
            got.append(message.data)

        await connection.client.subscribe("evil.>", cb=take)
        await connection.client.flush()
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        writer.write(b"PUB evil.\xff\xfe 1\r\n1\r\nHPUB evil.a 2 3\r\n\r\n2\r\nHPUB evil.a 8 9\r\nNATS/1.03\r\n")
        writer.write(b"HPUB evil.a 12 13\r\nNATS/1.0\r\n\r\n4\r\nPUB evil.a 1\r\n5\r\n")
        await inbox.count(5)
        await eventually(lambda: b"5" in got)
        assert inbox.payloads == [b"1", b"2", b"3", b"4", b"5"]
        assert got == [b"2", b"3", b"4", b"5"]
        assert connection.up
        subscription.unsubscribe()
    writer.close()
    await writer.wait_closed()


async def test_max_payload_may_change_while_it_runs(port: str) -> None:
    with NatsServer(max_payload=1000) as server:
        async with connected(server.url, port=port) as connection:
            inbox = Inbox()
            subscription = await connection.subscribe("a", inbox.sink)
            await asyncio.to_thread(server.kill)
            await eventually(lambda: not connection.up)
            server._max_payload = 2000
            await asyncio.to_thread(server.start)
            await connection.wait_up(WAIT_S)
            assert connection.max_payload == 2000
            connection.port.send(b"a", b"x" * 2000)
            await inbox.count(1)
            subscription.unsubscribe()


async def test_what_fails_in_a_callback_of_nats_py_is_logged(
    large_server: NatsServer, port: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(large_server.url, port=port) as connection:
        inbox = Inbox()
        subscription = await connection.subscribe("fails", inbox.sink)

        async def take(message: Any) -> None:
            raise LookupError("mine")

        await connection.client.subscribe("fails", cb=take)
        connection.on_state(lambda state, error: None)
        await connection.client.publish("fails", b"")
        await inbox.count(1)
        await eventually(lambda: "LookupError: mine" in caplog.text)
        assert connection.up
        subscription.unsubscribe()


async def test_an_observer_that_raises_harms_nobody(port: str) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    with NatsServer() as server:
        async with connected(server.url, port=port) as connection:

            def fail(state: int, error: BaseException | None) -> None:
                raise LookupError(f"state {state}")

            connection.on_state(fail)
            await asyncio.to_thread(server.restart)
            await eventually(lambda: len(reported) == 2)
            assert [str(context["exception"]) for context in reported] == [f"state {DOWN}", f"state {UP}"]
            assert connection.up


async def test_release_leaves_nothing_behind(large_server: NatsServer, port: str) -> None:
    """What was published has reached the server when release() returns, also through nats-py itself."""
    async with connected(large_server.url, port="fast", ping_interval=9.0) as reader:
        inbox = Inbox()
        subscription = await reader.subscribe("last.*", inbox.sink)
        async with connected(large_server.url, port=port) as connection:
            for _ in range(2000):
                if connection.port.congested:
                    await asyncio.sleep(0.01)
                connection.port.send(b"last.1", bytes(2000))
            await connection.client.publish("last.2", b"")
        await inbox.count(2001)
        subscription.unsubscribe()
