"""The JetStream part of durable requests against a real server, without the machine of the plane."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typing_extensions import Buffer

from dynwire._natsproto import UP, CallbackSink
from dynwire.config import NatsConfig
from dynwire.errors import ConfigError, ConnectError, MessageTooLarge, Overloaded
from dynwire.nats.connection import NatsConnection
from dynwire.nats.log import read_log
from dynwire.nats.pull import QueueConsumer
from dynwire.nats.queue import ACK, Delivery, PubAck, QueueAdmin, QueueNames, parse_pub_ack, refusal
from dynwire.nats.server import NatsServer
from dynwire.types import EndpointId

NAMES = QueueNames.of("dynwire", EndpointId("demo", "worker", "generate"))
CONFIG = NatsConfig(queue_ack_wait=1.0, queue_max_bytes=1 << 20)


@pytest.fixture
def loop_factory(leak_guard: None) -> Callable[[], asyncio.AbstractEventLoop]:
    """One loop: what is tested is between processes, or between us and the server."""
    return asyncio.new_event_loop


@pytest.fixture
def server(jetstream_server: NatsServer) -> NatsServer:
    return jetstream_server


@contextlib.asynccontextmanager
async def connected(server: NatsServer, **changes: Any) -> AsyncIterator[NatsConnection]:
    """A connection of its own: ``purpose`` of another one would share it."""
    connection = await NatsConnection.acquire(dataclasses.replace(CONFIG, servers=(server.url,), **changes), 10.0)
    try:
        yield connection
    finally:
        await connection.release()


async def publish(connection: NatsConnection, id: str, payload: bytes = b"x", **headers: str) -> PubAck:
    headers = {"Nats-Msg-Id": id} | {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await connection.client.request(NAMES.subject, payload, headers=headers, timeout=2)
    return parse_pub_ack(answer.data)


async def restart(server: NatsServer, connection: NatsConnection, wipe: bool = False) -> None:
    """Until the connection has noticed both its end and the new server."""
    back = asyncio.Event()
    forget = connection.on_state(lambda state, error: back.set() if state == UP else None)
    server.restart(wipe=wipe)
    async with asyncio.timeout(20):
        await back.wait()
    forget()


def admin_of(connection: NatsConnection, config: NatsConfig = CONFIG) -> QueueAdmin:
    return QueueAdmin(connection.client, config)


class Worker:
    """A `QueueConsumer` with a sink in Python."""

    def __init__(self, connection: NatsConnection, config: NatsConfig = CONFIG, limit: int = 100) -> None:
        self.taken: asyncio.Queue[tuple[Delivery, bytes]] = asyncio.Queue()
        sink = CallbackSink(self.on_message, on_state=self.on_state)
        self.consumer = QueueConsumer(connection, NAMES, config, sink, limit)

    def on_state(self, state: int, error: BaseException | None) -> None:
        if state == UP:
            self.consumer.connected()

    def on_message(self, subject: bytes, reply: bytes, headers: bytes | None, payload: Buffer) -> None:
        if headers is not None and headers.startswith(b"NATS/1.0 "):
            self.consumer.on_status(int(headers[9:12]), headers)
            return
        delivery = self.consumer.take(reply)
        if delivery is not None:
            self.taken.put_nowait((delivery, bytes(payload)))

    async def next(self) -> tuple[Delivery, bytes]:
        async with asyncio.timeout(20):
            return await self.taken.get()

    async def __aenter__(self) -> Worker:
        await self.consumer.start(5.0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.consumer.stop()
        await self.consumer.close()


async def left_in_queue(client: NatsConnection) -> int:
    return (await client.client.jetstream().stream_info(NAMES.stream)).state.messages


async def until(condition: Callable[[], Any]) -> None:
    """``condition`` may be a coroutine function."""
    async with asyncio.timeout(20):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return
            await asyncio.sleep(0.01)


# names -------------------------------------------------------------------------------------------------------------------------


def test_names_of_different_endpoints_differ() -> None:
    a = QueueNames.of("dynwire", EndpointId("a_b", "c", "d"))
    b = QueueNames.of("dynwire", EndpointId("a", "b_c", "d"))
    assert a.stream == "dynwire+q+a_b+c+d"
    assert a.stream != b.stream and a.log_stream != b.log_stream
    assert QueueNames.of("my.prefix", EndpointId("a", "b", "c")).stream == "my+prefix+q+a+b+c"


# making the queue --------------------------------------------------------------------------------------------------------------


async def test_a_queue_is_made_once_with_the_settings_given(server: NatsServer) -> None:
    config = dataclasses.replace(CONFIG, queue_max_age=77.0, queue_max_messages=12, queue_duplicate_window=100.0)
    async with connected(server) as client:
        admin = admin_of(client, config)
        first = await admin.ensure(NAMES, worker=True, timeout=5.0)
        again = await admin.ensure(NAMES, worker=True, timeout=5.0)
        assert first.created == again.created
        found = (await client.client.jetstream().stream_info(NAMES.stream)).config
        assert (found.retention, found.discard, found.storage) == ("workqueue", "new", "file")
        assert (found.max_age, found.max_msgs, found.max_bytes) == (77.0, 12, 1 << 20)
        assert first.duplicate_window == 77.0  # the server takes none that is longer than messages live
        assert first.ttl and not first.recording
        assert abs(first.clock_offset) < 1.0
        consumer = (await client.client.jetstream().consumer_info(NAMES.stream, "workers")).config
        assert (consumer.ack_wait, consumer.max_deliver, consumer.ack_policy) == (1.0, -1, "explicit")


async def test_many_make_it_at_once(server: NatsServer) -> None:
    async with connected(server) as client, connected(server, ping_interval=4.0) as other:
        other_config = dataclasses.replace(CONFIG, queue_max_messages=50)
        queues = await asyncio.gather(
            *(admin_of(client, CONFIG).ensure(NAMES, worker=n % 2 == 0, timeout=5.0) for n in range(10)),
            *(admin_of(other, other_config).ensure(NAMES, worker=n % 2 == 0, timeout=5.0) for n in range(10)),
        )
        assert len({queue.created for queue in queues}) == 1


async def test_a_worker_changes_what_can_be_changed_and_says_so(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=5.0)
        changed = dataclasses.replace(CONFIG, queue_max_age=60.0, queue_duplicate_window=30.0, queue_ack_wait=3.0)
        with caplog.at_level(logging.WARNING):
            queue = await admin_of(client, changed).ensure(NAMES, worker=False, timeout=5.0)
            assert queue.max_age == 3600.0 and not caplog.records  # a caller takes it as it is
            queue = await admin_of(client, changed).ensure(NAMES, worker=True, timeout=5.0)
        assert queue.max_age == 60.0
        assert "max_age from 3600.0 to 60.0" in caplog.text and "ack_wait from 1.0 to 3.0" in caplog.text
        consumer = (await client.client.jetstream().consumer_info(NAMES.stream, "workers")).config
        assert consumer.ack_wait == 3.0


async def test_recording_can_be_turned_on_and_off_later(server: NatsServer) -> None:
    async with connected(server) as client:
        recording = dataclasses.replace(CONFIG, replay_retention=100.0)
        for config in (CONFIG, recording, CONFIG):
            queue = await admin_of(client, config).ensure(NAMES, worker=True, timeout=5.0)
            assert queue.recording == (config is recording)
            # with a time to live the copy in the log would end with the original
            assert queue.ttl != queue.recording


async def test_what_cannot_be_changed_is_a_config_error(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=5.0)
        memory = dataclasses.replace(CONFIG, queue_storage="memory")
        with pytest.raises(ConfigError) as caught:
            await admin_of(client, memory).ensure(NAMES, worker=True, timeout=5.0)
        assert caught.value.name == "DYNWIRE_NATS_QUEUE_STORAGE" and caught.value.allowed == "file"


async def test_a_stream_in_the_way_is_a_config_error(server: NatsServer) -> None:
    async with connected(server) as client:
        await client.client.jetstream().add_stream(name="FOREIGN", subjects=["dynwire.d.>"])
        with pytest.raises(ConfigError, match="another stream has its subject"):
            await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=5.0)
        await client.client.jetstream().delete_stream("FOREIGN")
        await client.client.jetstream().add_stream(name=NAMES.stream, subjects=["other"])
        with pytest.raises(ConfigError, match="is none of ours"):
            await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=5.0)


async def test_a_server_without_jetstream_is_a_config_error(server: NatsServer) -> None:
    with NatsServer(monitor=False) as without:
        async with connected(without) as client:
            with pytest.raises(ConfigError, match="-js") as caught:
                await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=0.5)
        assert caught.value.name == "DYN_NATS_REQUEST_MODE"


async def test_no_space_is_overloaded(server: NatsServer) -> None:
    async with connected(server) as client:
        huge = dataclasses.replace(CONFIG, queue_max_bytes=2**50)
        with pytest.raises(Overloaded) as caught:
            await admin_of(client, huge).ensure(NAMES, worker=True, timeout=5.0)
        assert caught.value.limit == 2**50 and "DYNWIRE_NATS_QUEUE_MAX_BYTES" in str(caught.value)


async def test_a_stopped_server_is_a_connect_error(server: NatsServer) -> None:
    async with connected(server) as client:
        server.kill()
        with pytest.raises(ConnectError, match="did not answer within"):
            await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=0.3)


# publishing --------------------------------------------------------------------------------------------------------------------


async def test_the_same_id_is_stored_once(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=False, timeout=5.0)
        first, second = await publish(client, "a"), await publish(client, "a")
        assert (first.seq, first.duplicate) == (second.seq, False)
        assert second.duplicate
        assert await left_in_queue(client) == 1


async def test_the_same_id_is_stored_once_across_a_restart(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=False, timeout=5.0)
        await publish(client, "a")
        await restart(server, client)
        assert (await publish(client, "a")).duplicate


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"queue_max_messages": 3}, "DYNWIRE_NATS_QUEUE_MAX_MESSAGES"),
        ({"queue_max_bytes": 4096}, "DYNWIRE_NATS_QUEUE_MAX_BYTES"),
    ],
)
async def test_a_full_queue_refuses(server: NatsServer, changes: dict[str, int], setting: str) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    async with connected(server) as client:
        await admin_of(client, config).ensure(NAMES, worker=False, timeout=5.0)
        for n in range(10):
            ack = await publish(client, f"r{n}", b"x" * 1000)
            if ack.error is not None:
                break
        assert ack.error is not None and n == 3
        error = refusal(NAMES, ack.error, config, 1000)
        assert isinstance(error, Overloaded) and error.sent == "no" and error.retryable
        assert setting in str(error) and error.limit == next(iter(changes.values()))


async def test_a_request_beyond_the_streams_own_limit_is_too_large(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=False, timeout=5.0)
        config = (await client.client.jetstream().stream_info(NAMES.stream)).config
        await client.client.jetstream().update_stream(config, max_msg_size=500)
        ack = await publish(client, "a", b"x" * 1000)
        assert ack.error is not None
        error = refusal(NAMES, ack.error, CONFIG, 1000)
        assert isinstance(error, MessageTooLarge) and error.size == 1000


async def test_a_request_ends_with_its_time_to_live(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=False, timeout=5.0)
        await publish(client, "a", Nats_TTL="1s")
        await publish(client, "b")
        assert await left_in_queue(client) == 2
        await until(lambda: one_left(client))


async def one_left(client: NatsConnection) -> bool:
    return await left_in_queue(client) == 1


async def test_numbers_of_a_queue_made_anew_are_no_numbers_of_the_old_one(server: NatsServer) -> None:
    async with connected(server) as client:
        admin = admin_of(client, CONFIG)
        await admin.ensure(NAMES, worker=False, timeout=5.0)
        old = [(await publish(client, f"r{n}")).seq for n in range(5)]
        await restart(server, client, wipe=True)
        await admin.ensure(NAMES, worker=False, timeout=5.0)
        new = [(await publish(client, f"r{n}")).seq for n in range(5)]
        assert max(old) < min(new)
        assert not await admin.delete(NAMES, old[0])


async def test_a_caller_takes_its_request_back(server: NatsServer) -> None:
    async with connected(server) as client:
        admin = admin_of(client, CONFIG)
        await admin.ensure(NAMES, worker=False, timeout=5.0)
        ack = await publish(client, "a")
        assert await admin.delete(NAMES, ack.seq)
        assert not await admin.delete(NAMES, ack.seq)
        assert await left_in_queue(client) == 0


# taking ------------------------------------------------------------------------------------------------------------------------


async def test_requests_before_any_worker_are_taken_in_order(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=False, timeout=5.0)
        for n in range(5):
            await publish(client, f"r{n}", b"%d" % n)
        async with Worker(client) as worker:
            for n in range(5):
                delivery, payload = await worker.next()
                assert (payload, delivery.attempt) == (b"%d" % n, 1)
                worker.consumer.finished(delivery, ACK)
            await until(lambda: empty(client))
            assert worker.consumer.running == 0


async def empty(client: NatsConnection) -> bool:
    return await left_in_queue(client) == 0


async def test_a_worker_takes_no_more_than_it_runs(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=False, timeout=5.0)
        for n in range(20):
            await publish(client, f"r{n}")
        async with Worker(client, limit=4) as worker:
            running = [await worker.next() for _ in range(4)]
            await client.client.flush()
            assert worker.taken.empty() and worker.consumer.running == 4
            for _ in range(16):
                worker.consumer.finished(running.pop(0)[0], ACK)
                running.append(await worker.next())
                assert worker.consumer.running <= 4


async def test_two_workers_share_a_queue(server: NatsServer) -> None:
    async with (
        connected(server) as client,
        connected(server, ping_interval=4.0) as other,
        Worker(client, limit=8) as a,
        Worker(other, limit=8) as b,
    ):
        for n in range(16):
            await publish(client, f"r{n}", b"%d" % n)
        taken = [await a.next() for _ in range(8)] + [await b.next() for _ in range(8)]
        assert {payload for _, payload in taken} == {b"%d" % n for n in range(16)}
        assert {delivery.attempt for delivery, _ in taken} == {1}


async def test_long_work_is_reported_and_given_to_nobody_else(server: NatsServer) -> None:
    async with connected(server) as client, connected(server, ping_interval=4.0) as other, Worker(client) as worker:
        await publish(client, "a")
        delivery, _ = await worker.next()
        async with Worker(other) as idle:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.5 * CONFIG.queue_ack_wait):
                    await idle.taken.get()
        worker.consumer.finished(delivery, ACK)
        await until(lambda: empty(client))


async def test_what_a_silent_worker_had_goes_to_another(server: NatsServer) -> None:
    async with connected(server) as client:
        async with connected(server, ping_interval=4.0) as doomed:
            lost = Worker(doomed)
            await lost.consumer.start(5.0)
            await publish(client, "a")
            await lost.next()
            await lost.consumer.stop()
            lost.consumer._timer.cancel()  # type: ignore[union-attr]  # what a killed process does not do either
        async with Worker(client) as worker:
            delivery, _ = await worker.next()
            assert delivery.attempt == 2 and worker.consumer.redelivered == 1
            worker.consumer.finished(delivery, ACK)


async def test_what_is_given_back_goes_to_another_at_once(server: NatsServer) -> None:
    config = dataclasses.replace(CONFIG, queue_ack_wait=60.0)
    async with connected(server) as client, connected(server, ping_interval=4.0) as other:
        worker = Worker(client, config)
        await worker.consumer.start(5.0)
        await publish(client, "a")
        delivery, _ = await worker.next()
        await worker.consumer.stop()
        async with Worker(other, config) as heir:
            await worker.consumer.close()
            second, _ = await heir.next()
            assert (second.seq, second.attempt) == (delivery.seq, 2)


async def test_nothing_is_held_by_a_worker_that_stopped(server: NatsServer) -> None:
    """Requests arrive while a worker stops: each is given back.

    The server can lose one between taking it for us and hearing that we take no more (nats-server 2.15.1, one of 4,000 here);
    that one comes after the time that the queue waits for a silent worker.
    """
    config = dataclasses.replace(CONFIG, queue_ack_wait=5.0)
    async with connected(server) as client, connected(server, ping_interval=4.0) as other:
        worker = Worker(client, config)
        await worker.consumer.start(5.0)
        for n in range(50):
            await publish(other, f"r{n}")
        stopping = asyncio.create_task(worker.consumer.stop())
        for n in range(50, 100):
            await publish(other, f"r{n}")
        await stopping
        await worker.consumer.close()
        seen: set[int] = set()
        async with Worker(other, config) as heir:
            late = 0
            began = asyncio.get_running_loop().time()
            while len(seen) < 100:
                delivery, _ = await heir.next()
                seen.add(delivery.seq)
                late += asyncio.get_running_loop().time() - began > 4.0
                heir.consumer.finished(delivery, ACK)
            assert late <= 2


async def test_our_own_request_again_is_not_run_twice(server: NatsServer) -> None:
    """The loop was blocked for longer than the time that the queue waits."""
    async with connected(server) as client, Worker(client) as worker:
        await publish(client, "a")
        delivery, _ = await worker.next()
        worker.consumer._progress.running[delivery.seq].progress_at = float("inf")
        await until(lambda: worker.consumer.repeated_here)
        assert worker.taken.empty() and worker.consumer.running == 1
        worker.consumer.finished(delivery, ACK)
        await until(lambda: empty(client))


@pytest.mark.parametrize("wipe", [False, True])
async def test_a_worker_goes_on_after_a_restart_of_the_server(server: NatsServer, wipe: bool) -> None:
    async with connected(server) as client, Worker(client) as worker:
        await publish(client, "a", b"a")
        delivery, _ = await worker.next()
        await restart(server, client, wipe=wipe)
        created = worker.consumer.queue.created  # type: ignore[union-attr]
        worker.consumer.finished(delivery, ACK)
        if wipe:
            await until(lambda: worker.consumer.queue.created != created)  # type: ignore[union-attr]
        await publish(client, "b", b"b")
        assert (await worker.next())[1] == b"b"


async def test_a_worker_goes_on_after_its_consumer_was_deleted(server: NatsServer) -> None:
    async with connected(server) as client, Worker(client) as worker:
        await until(lambda: is_asked(client))
        await client.client.jetstream().delete_consumer(NAMES.stream, "workers")
        await publish(client, "a")
        await worker.next()


async def is_asked(client: NatsConnection) -> bool:
    return ((await client.client.jetstream().consumer_info(NAMES.stream, "workers")).num_waiting or 0) > 0


async def test_a_question_that_was_lost_is_asked_again(server: NatsServer) -> None:
    """A consumer that is deleted before the question arrives says nothing to it."""
    async with connected(server) as client:
        worker = Worker(client)
        await worker.consumer._admin.ensure(NAMES, worker=True, timeout=5.0)
        await client.client.subscribe("nobody.answers")
        real, worker.consumer._pull_subject = worker.consumer._pull_subject, b"nobody.answers"
        async with worker:
            worker.consumer._pull_subject = real
            await publish(client, "a")
            await worker.next()


async def test_the_end_of_a_request_counts_from_when_it_was_stored(server: NatsServer) -> None:
    async with connected(server) as client, Worker(client) as worker:
        before = datetime.now(UTC).timestamp()
        await publish(client, "a")
        delivery, _ = await worker.next()
        queue = worker.consumer.queue
        assert queue is not None
        assert before - 0.1 <= queue.expires_at(delivery, 10.0) - 10.0 <= datetime.now(UTC).timestamp() + 0.1
        assert queue.expires_at(delivery, None) == queue.expires_at(delivery, 1e9)
        worker.consumer.finished(delivery, ACK)


# the log -----------------------------------------------------------------------------------------------------------------------


async def test_the_log_has_what_the_queue_has_forgotten(server: NatsServer) -> None:
    config = dataclasses.replace(CONFIG, replay_retention=600.0)
    async with connected(server) as client, Worker(client, config) as worker:
        for n in range(150):
            await publish(client, f"r{n}", b"%d" % n, traceparent=f"t{n}")
            delivery, _ = await worker.next()
            worker.consumer.finished(delivery, ACK)
        await until(lambda: empty(client))
        copies = [copy async for copy in read_log(client.client, NAMES)]
        assert [(c.id, c.payload, c.headers) for c in copies] == [
            (f"r{n}", b"%d" % n, {"traceparent": f"t{n}"}) for n in range(150)
        ]
        since, end = copies[20].stored_at, copies[30].stored_at
        assert [c.id for c in [c async for c in read_log(client.client, NAMES, since, end)]] == [f"r{n}" for n in range(20, 30)]
        assert [c async for c in read_log(client.client, NAMES, datetime.now(UTC) + timedelta(hours=1))] == []
        assert [c async for c in read_log(client.client, NAMES, None, copies[0].stored_at)] == []
        assert (await client.client.jetstream().stream_info(NAMES.log_stream)).state.consumer_count == 0


async def test_without_a_log_the_error_names_the_setting(server: NatsServer) -> None:
    async with connected(server) as client:
        await admin_of(client, CONFIG).ensure(NAMES, worker=True, timeout=5.0)
        with pytest.raises(ConfigError) as caught:
            [copy async for copy in read_log(client.client, NAMES)]
        assert caught.value.name == "DYNWIRE_NATS_REPLAY_RETENTION"


def test_what_is_no_acknowledgement(capsys: pytest.CaptureFixture[str]) -> None:
    from dynwire.errors import ProtocolError

    for payload in (b"", b"{}", b"hello", json.dumps({"stream": "S"}).encode(), b'{"seq": "1"}'):
        with pytest.raises(ProtocolError):
            parse_pub_ack(payload)
    good = b"$JS.ACK.S.workers.2.7.9.1700000000000000000.3"
    parsed = Delivery.parse(good)
    assert (parsed.attempt, parsed.seq, parsed.stored_at, parsed.pending) == (2, 7, 1700000000.0, 3)
    for longer in (
        b"$JS.ACK._.hash.S.workers.2.7.9.1700000000000000000.3",
        b"$JS.ACK._.hash.S.workers.2.7.9.1700000000000000000.3.x",
    ):
        assert Delivery.parse(longer).seq == 7
    for reply in (b"", b"_INBOX.x", good + b".x", good.replace(b"7", b"z"), b"$JS.FC." + good[8:]):
        with pytest.raises(ProtocolError):
            Delivery.parse(reply)
