"""Discovery over NATS when things fail: the server, its storage, its processes, and those who register.

What all backends have in common is in ``tests/test_discovery.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import dynwire
from dynwire.config import NatsConfig
from dynwire.discovery.nats import NatsDiscovery, bucket_name
from dynwire.errors import ConfigError, ConnectError, ForkedManager, MessageTooLarge, PermissionDenied, Unauthenticated
from dynwire.nats.server import NatsCluster, NatsServer, free_port
from tests.test_discovery import Watcher, eventually, instance, opened, run

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 30.0


def settings(server: NatsServer | NatsCluster, prefix: str = "dynwire", **more: Any) -> NatsConfig:
    return NatsConfig(servers=tuple(server.url.split(",")), prefix=prefix, connect_timeout=10.0, **more)


async def in_bucket(reader: NatsDiscovery) -> set[str]:
    """The keys that are stored, dead or alive."""
    from nats.js.errors import NoKeysError

    assert reader._jetstream is not None
    bucket = await reader._jetstream.key_value(reader._bucket)
    try:
        return set(await bucket.keys())
    except NoKeysError:
        return set()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- the server -----------------------------------------------------------------------------------------------------------


def test_killed_and_restarted(own_nats_server: NatsServer) -> None:
    """While it is away the last known set stays; what happened meanwhile is told afterwards."""

    async def main() -> None:
        # two connections, and a TTL that plays no part
        one = NatsDiscovery(settings(own_nats_server), ttl=600.0)
        two = NatsDiscovery(settings(own_nats_server, ping_interval=2.0), ttl=600.0)
        async with opened(one, two):
            for number in (1, 2, 3):
                await one.register(instance(number))
            seen = Watcher(two)
            mine = Watcher(one)
            await seen.until(1, 2, 3)
            await mine.until(1, 2, 3)
            own_nats_server.kill()
            await eventually(lambda: not one.healthy and not two.healthy)
            heard = len(seen.sets)
            assert {i.id for i in await two.list()} == {1, 2, 3}
            await one.deregister(instance(2))
            late = Watcher(two)
            for _ in range(3):
                await asyncio.sleep(0)
            assert late.sets == []
            assert len(seen.sets) == heard, "nothing is told while it is away"
            assert mine.ids == {1, 2, 3}
            own_nats_server.start()
            await seen.until(1, 3)
            await late.until(1, 3)
            await mine.until(1, 3)
            assert all({1, 3} <= {i.id for i in s} for s in seen.sets[heard:]), "nobody else blinked"
            await one.register(instance(4))
            await seen.until(1, 3, 4)
            await eventually(lambda: one.healthy and two.healthy)

    run(main())


@pytest.mark.parametrize(("how", "ttl"), [("restart", 600.0), ("long outage", 1.0), ("delete", 1.5)])
def test_storage_wiped(own_nats_server: NatsServer, how: str, ttl: float) -> None:
    """Owners write again, readers do not blink, and who comes new sees everybody."""

    async def main() -> None:
        one = NatsDiscovery(settings(own_nats_server), ttl=ttl)
        two = NatsDiscovery(settings(own_nats_server, ping_interval=2.0), ttl=ttl)
        async with opened(one, two):
            for number in (1, 2):
                await one.register(instance(number))
            seen = Watcher(two)
            await seen.until(1, 2)
            heard = len(seen.sets)
            if how == "delete":
                assert two._jetstream is not None
                await two._jetstream.delete_key_value(two._bucket)
            else:
                own_nats_server.kill()
                await eventually(lambda: not one.healthy and not two.healthy)
                if how == "long outage":
                    await asyncio.sleep(2 * ttl)
                own_nats_server.wipe()
                own_nats_server.start()
            fresh = NatsDiscovery(settings(own_nats_server))
            await Watcher(fresh).until(1, 2)
            await fresh.close()
            await one.register(instance(3))
            await seen.until(1, 2, 3)
            assert all({1, 2} <= {i.id for i in s} for s in seen.sets[heard:])
            await until(lambda: written(two, 3))

    async def written(reader: NatsDiscovery, count: int) -> bool:
        return len(await in_bucket(reader)) == count

    run(main())


def test_what_comes_by_itself_is_newer_than_what_is_read(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        one, two = (NatsDiscovery(settings(nats_server, nats_prefix)) for _ in range(2))
        async with opened(one, two):
            for number in (1, 2):
                await one.register(instance(number))
            original = two._ensure_bucket

            async def and_then_a_farewell(connection: Any) -> Any:
                time = await original(connection)
                marker = SimpleNamespace(
                    subject=f"{two._subject}demo.worker.generate.0000000000000001", headers={"KV-Operation": "DEL"}, data=b""
                )
                await two._on_message(cast(Any, marker))
                return time

            two._ensure_bucket = and_then_a_farewell  # type: ignore[method-assign]
            assert {i.id for i in await two.list()} == {2}

    run(main())


def test_absent_at_start(nats_server: NatsServer) -> None:
    port = free_port()
    config = NatsConfig(servers=(f"nats://127.0.0.1:{port}",), connect_timeout=0.5)

    async def main() -> None:
        for wait in (True, False):
            discovery = NatsDiscovery(NatsConfig(servers=config.servers, connect_timeout=0.5, wait=wait))
            for operation in (discovery.start, discovery.list, lambda: discovery.register(instance(1))):  # noqa: B023
                with pytest.raises(ConnectError, match=f"127.0.0.1:{port}.*NATS_SERVER"):
                    await operation()
            await discovery.close()

    run(main())


def test_absent_at_start_and_then_there(nats_server: NatsServer) -> None:
    server = NatsServer(jetstream=True, port=free_port())

    async def main() -> None:
        one = NatsDiscovery(settings(server))
        starting = asyncio.create_task(one.start())
        watcher = Watcher(one)
        await asyncio.to_thread(server.start)
        await starting
        await one.register(instance(1))
        await watcher.until(1)
        await one.close()

    with server:
        server.kill()
        run(main())


def test_watch_without_a_server_hears_when_it_comes(nats_server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    server = NatsServer(jetstream=True, port=free_port())

    async def main() -> None:
        one = NatsDiscovery(NatsConfig(servers=(f"nats://127.0.0.1:{server.port}",), connect_timeout=0.1))
        watcher = Watcher(one)
        await eventually(lambda: "cannot read" in caplog.text)
        assert watcher.sets == []
        await asyncio.to_thread(server.start)
        await watcher.until()
        assert one.healthy
        await one.close()

    try:
        run(main())
    finally:
        server.stop()


def test_without_jetstream(nats_server: NatsServer) -> None:
    async def main(server: NatsServer) -> None:
        one = NatsDiscovery(settings(server))
        with pytest.raises(ConfigError, match=r"DYN_DISCOVERY_BACKEND.*JetStream.*-js"):
            await one.start()
        await one.close()

    with NatsServer() as server:
        run(main(server))


def test_wrong_credentials(nats_server: NatsServer) -> None:
    async def main(server: NatsServer) -> None:
        one = NatsDiscovery(settings(server, token="wrong"))
        with pytest.raises(Unauthenticated, match="NATS_AUTH_TOKEN"):
            await one.start()
        await one.close()

    with NatsServer(jetstream=True, token="right") as server:
        run(main(server))


ALLOWED = {"publish": ["$KV.dynwire_instances.>", "$JS.API.>"], "subscribe": ["$KV.dynwire_instances.>", "_INBOX.>"]}
"""as in docs/nats.md"""


@pytest.mark.parametrize(
    ("operation", "subject", "named"),
    [
        ("", "", ""),
        ("publish", "$JS.API.>", r"publish.*\$JS.API.STREAM.INFO.KV_dynwire_instances"),
        ("publish", "$KV.dynwire_instances.>", r"publish.*\$KV.dynwire_instances.demo.worker.generate"),
        ("subscribe", "$KV.dynwire_instances.>", r"subscribe.*\$KV.dynwire_instances.>"),
    ],
    ids=["all", "no api", "no writing", "no watching"],
)
def test_what_a_user_must_be_allowed(nats_server: NatsServer, operation: str, subject: str, named: str) -> None:
    allowed = {verb: [s for s in subjects if (verb, s) != (operation, subject)] for verb, subjects in ALLOWED.items()}
    users = [{"user": "me", "password": "p", "permissions": allowed}]

    async def main(server: NatsServer) -> None:
        one = NatsDiscovery(NatsConfig(servers=(server.url,), username="me", password="p"))
        try:
            await one.register(instance(1))
            assert await one.list() == (instance(1),)
            seen = Watcher(one)
            await seen.until(1)
        finally:
            await one.close()

    with NatsServer(jetstream=True, config=f"authorization: {json.dumps({'users': users})}") as server:
        if not named:
            run(main(server))
        else:
            with pytest.raises(PermissionDenied, match=named):
                run(main(server))


def test_suspended_server(own_nats_server: NatsServer) -> None:
    """For longer than the TTL: that nobody can be heard is no sign that they are gone."""

    async def main() -> None:
        one, two = NatsDiscovery(settings(own_nats_server), ttl=0.6), NatsDiscovery(settings(own_nats_server), ttl=0.6)
        async with opened(one, two):
            await one.register(instance(1))
            seen = Watcher(two)
            await seen.until(1)
            with own_nats_server.paused():
                assert two._expiry_handle is not None
                due = two._expiry_handle.when()
                loop = asyncio.get_running_loop()
                # past the end of the TTL, and past what was tried then
                await eventually(lambda: loop.time() > due and "read" in two._failing)
            await eventually(lambda: two.healthy)
            await one.register(instance(2))
            await seen.until(1, 2)
            assert all({1} <= {i.id for i in s} for s in seen.sets)

    run(main())


def test_closing_without_a_server(own_nats_server: NatsServer) -> None:
    async def main() -> None:
        async with opened(one := NatsDiscovery(settings(own_nats_server))):
            await one.register(instance(1))
            own_nats_server.kill()
            await eventually(lambda: not one.healthy)

    run(main())


def test_one_of_three_members_lost(nats_cluster: NatsCluster) -> None:
    async def main(cluster: NatsCluster) -> None:
        one, two = NatsDiscovery(settings(cluster)), NatsDiscovery(settings(cluster))
        async with opened(one, two):
            await one.register(instance(1))
            seen = Watcher(two)
            await seen.until(1)
            assert one._jetstream is not None
            info = await one._jetstream.stream_info(f"KV_{one._bucket}")
            assert info.config.num_replicas == 3
            assert info.cluster is not None
            leader = next(server for server in cluster.servers if server.name == info.cluster.leader)
            await asyncio.to_thread(leader.kill)
            async with asyncio.timeout(WAIT_S):
                while True:
                    try:
                        await one.register(instance(2))
                        break
                    except ConnectError:  # until there is a new leader; who serves may try again
                        continue
            await seen.until(1, 2)

    run(main(nats_cluster))


# --- those who register ---------------------------------------------------------------------------------------------------

WORKER = """
import asyncio, sys
from dynwire.config import NatsConfig
from dynwire.discovery import open_discovery
from dynwire.types import Instance

async def main(url, prefix, ttl, number):
    discovery = open_discovery("nats", file_dir="", ttl=float(ttl), nats=NatsConfig(servers=(url,), prefix=prefix))
    await discovery.register(Instance(int(number), "demo", "worker", "generate", "tcp", f"127.0.0.1:{number}"))
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await discovery.close()

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def worker(server: NatsServer, prefix: str, ttl: float, number: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, server.url, prefix, str(ttl), str(number)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()
            process.wait()


def test_killed_worker_vanishes_after_its_ttl(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        reader = NatsDiscovery(settings(nats_server, nats_prefix), ttl=60.0)  # somebody else's TTL keeps the bucket's records
        async with opened(reader):
            with worker(nats_server, nats_prefix, 1.0, 1) as first, worker(nats_server, nats_prefix, 60.0, 2) as second:
                seen = Watcher(reader)
                await seen.until(1, 2)
                first.kill()
                await seen.until(2)
                assert len(await in_bucket(reader)) == 2, "the server keeps it for as long as the longest TTL"
                fresh = NatsDiscovery(settings(nats_server, nats_prefix))
                assert {i.id for i in await fresh.list()} == {2}, "and readers know its age from the server"
                await fresh.close()
                assert second.stdin is not None
                second.stdin.close()
                await seen.until()
                assert second.wait(WAIT_S) == 0

    run(main())


def test_suspended_worker_goes_and_comes_back(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        async with opened(reader := NatsDiscovery(settings(nats_server, nats_prefix))):
            with worker(nats_server, nats_prefix, 0.6, 1) as process:
                seen = Watcher(reader)
                await seen.until(1)
                process.send_signal(signal.SIGSTOP)
                await seen.until()
                process.send_signal(signal.SIGCONT)
                await seen.until(1)
                assert process.poll() is None

    run(main())


def test_live_worker_does_not_flicker(nats_server: NatsServer, nats_prefix: str) -> None:
    """Many TTLs, and a bucket whose server removes what is older than one of them."""

    async def main() -> None:
        async with opened(reader := NatsDiscovery(settings(nats_server, nats_prefix), ttl=0.6)):
            with worker(nats_server, nats_prefix, 0.6, 1):
                seen = Watcher(reader)
                await seen.until(1)
                times = set()
                key = "demo.worker.generate.0000000000000001"

                def another_heartbeat() -> bool:
                    times.add(reader._known[key].heard_at)
                    return len(times) >= 15

                await eventually(another_heartbeat)
                assert [len(s) for s in seen.sets if s] == [1]

    run(main())


def test_suspended_reader(nats_server: NatsServer, nats_prefix: str) -> None:
    """A loop that stood still has heard nobody; nobody is taken for dead for that."""

    async def main() -> None:
        reader = NatsDiscovery(settings(nats_server, nats_prefix))
        with worker(nats_server, nats_prefix, 0.6, 1):
            async with opened(reader):
                seen = Watcher(reader)
                await seen.until(1)
                assert reader._expiry_handle is not None
                due = reader._expiry_handle.when()
                loop = asyncio.get_running_loop()
                while loop.time() < due + 0.5:  # busy: the loop does not run
                    pass
                read: list[int] = []
                original = reader._forget_expired
                reader._forget_expired = lambda now: (original(now), read.append(1))[0]  # type: ignore[method-assign]
                await eventually(lambda: bool(read))
                await asyncio.sleep(0)
                assert [len(s) for s in seen.sets if s] == [1]
                assert seen.sets[-1] != ()

    run(main())


def test_longer_ttl_of_somebody_else(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        short, long = (NatsDiscovery(settings(nats_server, nats_prefix), ttl=ttl) for ttl in (1.0, 100.0))
        async with opened(short, long):
            assert short._jetstream is not None
            assert (await short._jetstream.stream_info(f"KV_{short._bucket}")).config.max_age == 100.0
            await short.register(instance(1))
            assert {i.id for i in await long.list()} == {1}

    run(main())


def test_records_that_are_none(nats_server: NatsServer, nats_prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    """What others put into the bucket is skipped, with one warning each."""

    async def main() -> None:
        one, two = (NatsDiscovery(settings(nats_server, nats_prefix)) for _ in range(2))
        async with opened(one, two):
            await one.register(instance(1))
            seen = Watcher(two)
            await seen.until(1)
            assert two._jetstream is not None
            bucket = await two._jetstream.key_value(two._bucket)
            for _ in range(2):
                await bucket.put("nonsense", b"{")
                await bucket.put("demo.worker.generate.0000000000000009", json.dumps({"instance": 1}).encode())
                await bucket.put("demo.worker.other.0000000000000001", one._own["demo.worker.generate.0000000000000001"][1])
            await bucket.put("demo.worker.generate.0000000000000001", b"")  # ours, as the next heartbeat will say
            await two.list()
            assert {i.id for i in await one.list()} == {1}
            one._write_soon()
            await seen.until(1)

    with caplog.at_level(logging.WARNING, "dynwire.discovery"):
        run(main())
    ignored = [record.getMessage() for record in caplog.records if "ignoring" in record.getMessage()]
    for key in ("nonsense", "demo.worker.generate.0000000000000009", "demo.worker.other.0000000000000001"):
        assert sum(f"ignoring {key} " in text for text in ignored) in (1, 2), "at most once per reader"


def test_large_metadata_is_refused(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        async with opened(one := NatsDiscovery(settings(nats_server, nats_prefix))):
            with pytest.raises(MessageTooLarge, match="nats backend takes 65536"):
                await one.register(instance(1, metadata={"x": "x" * 70000}))
            with pytest.raises(ConfigError, match="not JSON"):
                await one.register(instance(1, metadata={"x": object()}))
            assert await one.list() == ()

    run(main())


def test_prefixes_keep_deployments_apart(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        one, two = (NatsDiscovery(settings(nats_server, f"{nats_prefix}{end}")) for end in (".a", ".b"))
        async with opened(one, two):
            await one.register(instance(1))
            assert await two.list() == ()

    run(main())
    assert bucket_name("dynwire") == "dynwire_instances"
    names = {bucket_name(prefix) for prefix in ("a", "a.b", "a-b", "a_b", "b.a")}
    assert len(names) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_object_from_before_a_fork(nats_server: NatsServer, nats_prefix: str) -> None:
    async def main() -> None:
        async with opened(one := NatsDiscovery(settings(nats_server, nats_prefix))):
            await one.register(instance(1))
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    with contextlib.suppress(StopIteration):
                        one.register(instance(2)).send(None)  # the loop is the parent's
                except ForkedManager:
                    with contextlib.suppress(StopIteration):
                        one.close().send(None)
                    code = 0
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert await one.list() == (instance(1),)

    run(main())


def test_many_instances(nats_server: NatsServer, nats_prefix: str) -> None:
    """More than fit into one batch of anything."""

    async def main() -> None:
        one, two = (NatsDiscovery(settings(nats_server, nats_prefix)) for _ in range(2))
        async with opened(one, two):
            numbers = range(1, 701)
            await asyncio.gather(*(one.register(instance(n)) for n in numbers))
            assert {i.id for i in await two.list()} == {*numbers}
            seen = Watcher(two)
            await seen.until(*numbers)
        async with opened(three := NatsDiscovery(settings(nats_server, nats_prefix))):
            assert await three.list() == (), "all have said goodbye"

    run(main())


# --- managers -------------------------------------------------------------------------------------------------------------


def test_managers_meet_and_go_on_without_nats(own_nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: losing discovery fails no call between peers that know each other."""
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "nats")
    monkeypatch.setenv("NATS_SERVER", own_nats_server.url)
    monkeypatch.setenv("DYN_TCP_RPC_HOST", "127.0.0.1")
    with dynwire.NetworkManager() as worker, dynwire.NetworkManager() as caller:
        worker.endpoint("demo.worker.echo").serve(lambda request: request)
        client = caller.endpoint("demo.worker.echo").client()
        client.wait_for_instances(1, timeout=WAIT_S)
        assert client.call(1, timeout=10.0) == 1
        own_nats_server.kill()
        assert [client.call(n, timeout=10.0) for n in range(50)] == [*range(50)]
        own_nats_server.start()
        worker.endpoint("demo.worker.late").serve(lambda request: -request)
        late = caller.endpoint("demo.worker.late").client()
        late.wait_for_instances(1, timeout=WAIT_S)
        assert late.call(3, timeout=10.0) == -3
        assert {i.path for i in caller.list_instances()} == {"demo.worker.echo", "demo.worker.late"}
    with dynwire.NetworkManager() as manager:
        assert manager.list_instances() == ()
