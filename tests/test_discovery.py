"""Discovery backends: one body for all, then what only files can do wrong. What only NATS can: ``nats/``."""

# The files here are tiny and local, and that the loop stands still while a test acts is sometimes the point:
# ruff: noqa: ASYNC221, ASYNC222, ASYNC230, ASYNC240
from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dynwire
from dynwire.config import NatsConfig
from dynwire.discovery import Discovery, FileDiscovery, MemoryDiscovery, open_discovery
from dynwire.discovery import file as file_module
from dynwire.discovery.etcd import EtcdDiscovery
from dynwire.discovery.file import has_ended, record_name, this_process
from dynwire.discovery.memory import MemoryRegistry
from dynwire.discovery.nats import NatsDiscovery
from dynwire.discovery.record import MAX_RECORD_BYTES, BadRecord, ProcessId, Record, decode_record, record_key
from dynwire.errors import ConfigError, ConnectError, DynwireError, ForkedManager, ManagerClosed, MessageTooLarge
from dynwire.types import Instance
from tests.etcd_server import EtcdServer, etcd_server  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 30.0
"""How long a test waits for an event before it fails; says nothing about how soon the event should come."""


def instance(number: int = 1, endpoint: str = "generate", **fields: Any) -> Instance:
    values: dict[str, Any] = {"plane": "tcp", "address": f"127.0.0.1:{number}", **fields}
    return Instance(number, "demo", "worker", endpoint, **values)


class Watcher:
    """Collects what a watch delivers, and waits for a set that satisfies a condition."""

    def __init__(self, discovery: Discovery, path: str | None = None) -> None:
        self.sets: list[tuple[Instance, ...]] = []
        self._changed = asyncio.Event()
        self.watch = discovery.watch(path, self._on_change)

    def _on_change(self, instances: tuple[Instance, ...]) -> None:
        self.sets.append(instances)
        self._changed.set()

    @property
    def ids(self) -> set[int]:
        return {i.id for i in self.sets[-1]}

    async def until(self, *ids: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while not self.sets or self.ids != set(ids):
                self._changed.clear()
                await self._changed.wait()


async def eventually(condition: Callable[[], bool]) -> None:
    """For what no callback tells: files that disappear."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


Opener = Callable[[], Discovery]


@pytest.fixture(params=["mem", "file", "etcd", "nats"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Makes discovery objects that see each other's registrations."""
    if request.param == "nats":
        server, prefix = request.getfixturevalue("nats_server"), request.getfixturevalue("nats_prefix")
        return lambda: NatsDiscovery(NatsConfig(servers=(server.url,), prefix=prefix), ttl=10.0)
    if request.param == "etcd":
        etcd = request.getfixturevalue("etcd_server")
        return lambda: EtcdDiscovery((etcd.url,), ttl=10.0)
    if request.param == "mem":
        registry = MemoryRegistry()
        return lambda: MemoryDiscovery(registry)
    return lambda: FileDiscovery(str(tmp_path / "kv"), ttl=10.0)


@contextlib.asynccontextmanager
async def opened(*discoveries: Discovery) -> AsyncIterator[None]:
    try:
        for discovery in discoveries:
            await discovery.start()
        yield
    finally:
        for discovery in discoveries:
            await discovery.close()
        await asyncio.sleep(0)  # what was cancelled ends in the next turn
        assert len(asyncio.all_tasks()) == 1
        loop: Any = asyncio.get_running_loop()
        left = [h for h in loop._scheduled if not h.cancelled() and "dynwire" in repr(h)]
        assert not left


def run(main: Awaitable[None]) -> None:
    async def wrapper() -> None:
        await main

    asyncio.run(wrapper())


# -- all backends


def test_register_watch_list_deregister(opener: Opener) -> None:
    async def main() -> None:
        one, two = opener(), opener()
        async with opened(one, two):
            seen = Watcher(two)
            await seen.until()
            full = instance(2, metadata={"model": "m", "nested": [1, {"a": None}]}, started_at=12.5, codecs=("raw",))
            await one.register(full)
            await one.register(instance(1))
            await seen.until(1, 2)
            assert seen.sets[-1] == (instance(1), full), "sorted, and nothing lost"
            assert await two.list() == (instance(1), full)
            await two.deregister(full)  # not two's: nothing happens
            assert len(await two.list()) == 2
            await one.deregister(full)
            await seen.until(1)
            assert one.healthy
            assert two.healthy

    run(main())


def test_path_filter_and_change_of_a_record(opener: Opener) -> None:
    async def main() -> None:
        one, two = opener(), opener()
        async with opened(one, two):
            await one.register(instance(1))
            seen = Watcher(two, "demo.worker.generate")
            await seen.until(1)
            await one.register(instance(2, "other"))
            await one.register(instance(3))
            await seen.until(1, 3)
            assert {i.id for i in await two.list("demo.worker.other")} == {2}
            await one.register(instance(1, address="elsewhere:1"))
            async with asyncio.timeout(WAIT_S):
                while seen.sets[-1][0].address != "elsewhere:1":
                    seen._changed.clear()
                    await seen._changed.wait()
            assert all(i.endpoint == "generate" for s in seen.sets for i in s)
            assert all(a != b for a, b in zip(seen.sets, seen.sets[1:], strict=False)), "no set twice in a row"

    run(main())


def test_close_withdraws_and_is_idempotent(opener: Opener) -> None:
    async def main() -> None:
        one, two = opener(), opener()
        async with opened(one, two):
            await one.register(instance(1))
            await two.register(instance(2))
            seen = Watcher(two)
            await seen.until(1, 2)
            mine = Watcher(one)
            await mine.until(1, 2)
            await one.close()
            await one.close()
            await seen.until(2)
            assert mine.watch.cancelled
            assert mine.ids == {1, 2}
            assert not one.healthy
            with pytest.raises(ManagerClosed):
                await one.register(instance(1))
            with pytest.raises(ManagerClosed):
                one.watch(None, lambda _: None)
            with pytest.raises(ManagerClosed):
                await one.start()

    run(main())


def test_close_without_start(opener: Opener) -> None:
    run(opener().close())


def test_cancelled_watch_hears_nothing(opener: Opener) -> None:
    async def main() -> None:
        one, two = opener(), opener()
        async with opened(one, two):
            early = Watcher(two)
            early.watch.cancel()
            early.watch.cancel()
            seen, other = Watcher(two), Watcher(two)
            await seen.until()
            await other.until()
            seen.watch.cancel()
            await one.register(instance(1))
            await other.until(1)
            assert seen.sets == [()]
            assert early.sets == []

    run(main())


def test_exception_in_a_callback_stays_with_its_watch(opener: Opener) -> None:
    async def main() -> None:
        one = opener()
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        def broken(_: object) -> None:
            raise RuntimeError("the user's fault")

        async with opened(one):
            one.watch(None, broken)
            seen = Watcher(one)
            await seen.until()
            await one.register(instance(1))
            await seen.until(1)
            await eventually(lambda: len(reported) >= 2)

    run(main())


def test_other_threads_and_loops(opener: Opener) -> None:
    saw_all: list[int] = []
    done = threading.Event()

    async def elsewhere(number: int) -> None:
        async with opened(theirs := opener()):
            await theirs.register(instance(number))
            await Watcher(theirs).until(1, 2, 3, 4)
            saw_all.append(number)
            await eventually(done.is_set)

    def in_thread(number: int) -> None:
        asyncio.run(elsewhere(number))

    async def main() -> None:
        async with opened(mine := opener()):
            seen = Watcher(mine)
            threads = [threading.Thread(target=in_thread, args=(n,)) for n in (1, 2, 3, 4)]
            for thread in threads:
                thread.start()
            try:
                await seen.until(1, 2, 3, 4)
                await eventually(lambda: len(saw_all) == 4)
            finally:
                done.set()
            await seen.until()
            for thread in threads:
                thread.join()

    run(main())


@pytest.mark.parametrize(
    "wrong",
    [instance(1, "../up"), instance(1, ""), instance(1, "x" * 65), instance(-1), instance(1 << 64)],
    ids=lambda i: i.path[:30],
)
def test_instances_that_cannot_be_stored(opener: Opener, wrong: Instance) -> None:
    async def main() -> None:
        async with opened(one := opener()):
            with pytest.raises(ConfigError):
                await one.register(wrong)
            assert await one.list() == ()

    run(main())


# -- etcd: what fails


@pytest.mark.parametrize("wipe", [False, True])
def test_etcd_killed_and_restarted(etcd_server: EtcdServer, wipe: bool) -> None:  # noqa: F811
    async def main() -> None:
        dead_first = ("http://127.0.0.1:1", etcd_server.url)
        one, two = (EtcdDiscovery(dead_first, ttl=3.0) for _ in range(2))
        async with opened(one, two):
            for number in (1, 2, 3):
                await one.register(instance(number))
            seen = Watcher(two)
            await seen.until(1, 2, 3)
            etcd_server.kill()
            await eventually(lambda: not one.healthy and not two.healthy)
            heard = len(seen.sets)
            await one.deregister(instance(2))
            assert {i.id for i in await two.list()} == {1, 2, 3}
            assert len(seen.sets) == heard
            if wipe:
                etcd_server.wipe()
            etcd_server.start()
            await seen.until(1, 3)
            assert all({1, 3} <= {i.id for i in s} for s in seen.sets[heard:])

    run(main())


def test_etcd_suspended(etcd_server: EtcdServer) -> None:  # noqa: F811
    """For longer than the TTL: when it wakes up, it ends the leases of everybody, and nobody is missed meanwhile."""

    async def main() -> None:
        one, two = (EtcdDiscovery((etcd_server.url,), ttl=1.0) for _ in range(2))
        async with opened(one, two):
            await one.register(instance(1))
            seen = Watcher(two)
            await seen.until(1)
            assert etcd_server.process is not None
            etcd_server.process.send_signal(signal.SIGSTOP)
            await eventually(lambda: not one.healthy and not two.healthy)
            heard = len(seen.sets)
            etcd_server.process.send_signal(signal.SIGCONT)
            await eventually(lambda: one.healthy and two.healthy)
            await one.register(instance(2))
            await seen.until(1, 2)
            assert all(1 in {i.id for i in s} for s in seen.sets[heard:])

    run(main())


def test_calls_go_on_while_etcd_is_away(etcd_server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "etcd")
    monkeypatch.setenv("ETCD_ENDPOINTS", etcd_server.url)
    monkeypatch.setenv("DYN_TCP_RPC_HOST", "127.0.0.1")

    async def echo(request: Any) -> Any:
        return request

    async def main() -> None:
        async with dynwire.AsyncNetworkManager() as worker, dynwire.AsyncNetworkManager() as caller:
            await worker.endpoint("demo.worker.generate").serve(echo)
            client = await caller.endpoint("demo.worker.generate").client()
            await client.wait_for_instances(1, WAIT_S)
            assert await client.call(1, timeout=WAIT_S) == 1
            etcd_server.kill()
            for number in range(100):
                assert await client.call(number, timeout=WAIT_S) == number

    run(main())


def test_etcd_absent_at_start() -> None:
    with pytest.raises(ConnectError, match="ETCD_ENDPOINTS"):
        run(EtcdDiscovery(("http://127.0.0.1:1",)).start())


# -- opening


def test_open_discovery(tmp_path: Path) -> None:
    assert isinstance(open_discovery("mem", file_dir="", ttl=1), MemoryDiscovery)
    assert isinstance(open_discovery("file", file_dir=str(tmp_path), ttl=1), FileDiscovery)
    assert isinstance(open_discovery("nats", file_dir="", ttl=1), NatsDiscovery)
    with pytest.raises(ConfigError, match=r"does not exist; available: mem, file, etcd, nats"):
        open_discovery("consul", file_dir="", ttl=1)
    with pytest.raises(ConfigError, match="'zk' does not exist") as caught:
        open_discovery("zk", file_dir="", ttl=1)
    assert caught.value.name == "DYN_DISCOVERY_BACKEND"
    with pytest.raises(ConfigError, match="ttl"):
        FileDiscovery(str(tmp_path), ttl=float("nan"))
    for wrong in ("", "a\0b"):
        with pytest.raises(ConfigError, match="DYN_FILE_KV"):
            FileDiscovery(wrong)


def test_mem_loop_closed_without_cancelling(tmp_path: Path) -> None:
    registry = MemoryRegistry()

    async def leave() -> None:
        MemoryDiscovery(registry).watch(None, lambda _: None)

    run(leave())

    async def main() -> None:
        async with opened(one := MemoryDiscovery(registry)):
            await one.register(instance(1))
            assert await one.list() == (instance(1),)

    run(main())


# -- file: the directory


def kv(tmp_path: Path) -> str:
    return str(tmp_path / "kv")


def records(directory: str) -> list[str]:
    return sorted(os.listdir(directory))


def start_error(directory: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        run(FileDiscovery(directory).start())
    assert caught.value.name == "DYN_FILE_KV"
    assert "DYN_FILE_KV" in str(caught.value)
    assert directory in str(caught.value)
    return caught.value


def test_directory_is_private_and_records_are_whole(tmp_path: Path) -> None:
    directory = str(tmp_path / "a" / "b" / "kv")

    async def main() -> None:
        async with opened(one := FileDiscovery(directory)):
            for place in (directory, tmp_path / "a" / "b", tmp_path / "a"):
                assert stat.S_IMODE(os.stat(place).st_mode) == 0o700
            await one.register(instance(7))
            assert records(directory) == ["demo.worker.generate.0000000000000007.json"]
            stored = json.loads(Path(directory, records(directory)[0]).read_text())
            assert stored["process"]["pid"] == os.getpid()
            assert "pid" not in stored["instance"]["metadata"]
        assert records(directory) == []

    run(main())


def test_path_below_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    start_error(str(tmp_path / "file" / "kv"))


def test_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not a directory" in str(start_error(str(tmp_path / "file")))


def test_dangling_and_looping_links(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    start_error(str(tmp_path / "dangling"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    start_error(str(tmp_path / "loop"))


def test_name_too_long(tmp_path: Path) -> None:
    start_error(str(tmp_path / ("x" * 300)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_somebody_elses_directory_in_a_shared_place(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "kv" / "deeper").mkdir(parents=True)
    os.chown(shared / "kv", 12345, 12345)
    assert "belongs to uid 12345" in str(start_error(str(shared / "kv")))
    # through a link of our own, too
    (tmp_path / "link").symlink_to(shared / "kv")
    assert "belongs to uid 12345" in str(start_error(str(tmp_path / "link")))
    # a parent of theirs is no better: they could exchange what is in it
    assert f"{shared / 'kv'} belongs to uid 12345" in str(start_error(str(shared / "kv" / "deeper")))
    assert f"{shared / 'kv'} belongs to uid 12345" in str(start_error(str(shared / "kv" / "new" / "deeper")))
    assert records(str(shared / "kv")) == ["deeper"]
    # in a private place the owner is our own business
    os.chmod(shared, 0o755)
    os.chmod(shared / "kv", 0o775)
    os.chown(shared / "kv", 12345, os.getegid())
    run(FileDiscovery(str(shared / "kv")).start())


def test_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o500)
    if os.access(tmp_path / "kv", os.W_OK):
        pytest.skip("this process may write in any directory (it has CAP_DAC_OVERRIDE)")
    assert "may not write" in str(start_error(kv(tmp_path)))


def test_world_writable_directory_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(0o777)
    run(FileDiscovery(kv(tmp_path)).start())
    assert "every user" in caplog.text


@contextlib.contextmanager
def tmpfs(target: Path, options: str) -> Iterator[None]:
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(target)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def test_read_only_file_system(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "kv", "size=64k,ro"):
        assert "read-only" in str(start_error(kv(tmp_path)))
    (tmp_path / "kv").rmdir()
    with tmpfs(tmp_path / "ro", "size=64k,ro"):
        assert "Read-only" in str(start_error(str(tmp_path / "ro" / "kv")))


def test_becomes_read_only_after_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
            await one.register(instance(1))
            subprocess.run(["mount", "-o", "remount,ro", kv(tmp_path)], check=True)
            with pytest.raises(ConfigError, match=r"DYN_FILE_KV.*Read-only") as caught:
                await one.register(instance(2))
            assert caught.value.phase == "register"
            assert isinstance(caught.value.__cause__, OSError)
            await one.deregister(instance(1))  # warns, and lets the record expire

    with tmpfs(tmp_path / "kv", "size=64k"):
        run(main())


def test_full_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
            filler = Path(kv(tmp_path), "filler")
            with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            for _ in range(20):  # failing must not use up anything
                with pytest.raises(ConnectError) as caught:
                    await one.register(instance(1))
            assert caught.value.phase == "register"
            assert caught.value.retryable
            assert kv(tmp_path) in str(caught.value)
            assert "No space left" in str(caught.value)
            assert records(kv(tmp_path)) == ["filler"]
            filler.unlink()
            await one.register(instance(1))
            assert await one.list() == (instance(1),)

    with tmpfs(tmp_path / "kv", "size=16k,nr_inodes=64"):
        run(main())


def nested(levels: int) -> list[Any]:
    return [] if levels == 0 else [nested(levels - 1)]


@pytest.mark.parametrize(
    "metadata",
    [{"a": object()}, {"a": "\ud800"}, {"a": nested(100)}, {("a", "b"): 1}],
    ids=["object", "surrogate", "deep", "key"],
)
def test_metadata_that_no_file_can_hold(tmp_path: Path, metadata: dict[str, Any]) -> None:
    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
            with pytest.raises(ConfigError) as caught:
                await one.register(instance(1, metadata=metadata))
            assert caught.value.name == "metadata"
            assert records(kv(tmp_path)) == []

    run(main())


def test_record_too_large(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
            with pytest.raises(MessageTooLarge) as caught:
                await one.register(instance(1, metadata={"x": "y" * MAX_RECORD_BYTES}))
            assert caught.value.limit == MAX_RECORD_BYTES
            assert records(kv(tmp_path)) == []
            assert caught.value.size > caught.value.limit

    run(main())


@pytest.mark.parametrize("how", ["deleted", "hidden"])
def test_directory_disappears_and_comes_back(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The watcher keeps what it knew, says so once, and goes on by itself."""

    def delete() -> None:
        for name in records(kv(tmp_path)):
            os.unlink(Path(kv(tmp_path), name))
        os.rmdir(kv(tmp_path))

    async def main() -> None:
        # A long TTL: the owners do not write again during this test.
        async with opened(owner := FileDiscovery(kv(tmp_path), ttl=3600), reader := FileDiscovery(kv(tmp_path))):
            await owner.register(instance(1))
            await owner.register(instance(2))
            seen = Watcher(reader)
            await seen.until(1, 2)
            if how == "deleted":
                delete()  # synchronously: the reader's loop sees only the result
            else:
                os.rename(kv(tmp_path), tmp_path / "hidden")
            await eventually(lambda: not reader.healthy)
            assert await reader.list() == (instance(1), instance(2))
            late = Watcher(reader)
            await eventually(lambda: reader._scan_due < time.monotonic() and not reader.healthy)
            assert late.sets == []
            if how == "deleted":
                await owner.register(instance(3))  # creates the directory; the other two are not written yet
                await seen.until(1, 2, 3)
                await late.until(1, 2, 3)
                await owner.deregister(instance(3))
                await seen.until(1, 2)
            else:
                os.rename(tmp_path / "hidden", kv(tmp_path))
                await late.until(1, 2)
            await eventually(lambda: reader.healthy)
            assert () not in seen.sets[1:], "never an empty set"

    with caplog.at_level(logging.WARNING, "dynwire.discovery"):
        run(main())
    assert len([r for r in caplog.records if "cannot read" in r.getMessage()]) == 1


def test_owner_writes_its_record_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(owner := FileDiscovery(kv(tmp_path), ttl=0.3), reader := FileDiscovery(kv(tmp_path))):
            await owner.register(instance(1))
            seen = Watcher(reader)
            await seen.until(1)
            os.unlink(Path(kv(tmp_path), record_name(instance(1))))
            await eventually(lambda: bool(records(kv(tmp_path))))
            for name in records(kv(tmp_path)):
                os.unlink(Path(kv(tmp_path), name))
            os.rmdir(kv(tmp_path))
            await eventually(lambda: os.path.isdir(kv(tmp_path)) and bool(records(kv(tmp_path))))
            await seen.until(1)

    run(main())


# -- file: records


def write_record(directory: str, of: Instance, **fields: Any) -> Path:
    values: dict[str, Any] = {"ttl": 10.0, "process": None, **fields}
    path = Path(directory, record_name(of))
    path.write_bytes(msgspec.json.encode(Record(of, **values)))
    return path


def test_junk_is_skipped_with_one_warning_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "kv"
    directory.mkdir()
    good = write_record(str(directory), instance(1))
    raw = good.read_bytes()
    bad = {
        "empty.json": b"",
        "text.json": b"hello",
        "binary.json": bytes(range(256)),
        "array.json": b"[]",
        "types.json": raw.replace(b'"id":1', b'"id":"one"'),
        "range.json": raw.replace(b'"id":1', b'"id":%d' % (1 << 70)),
        "negative.json": raw.replace(b'"id":1', b'"id":-1'),
        "huge.json": raw + b" " * MAX_RECORD_BYTES,
        "deep.json": b"[" * 60000,
        "deepmeta.json": raw.replace(b'"metadata":{}', b'"metadata":{"a":' + b"[" * 200 + b"]" * 200 + b"}"),
        "verydeepmeta.json": raw.replace(b'"metadata":{}', b'"metadata":{"a":' + b"[" * 20000 + b"]" * 20000 + b"}"),
        "utf8.json": raw.replace(b"demo", b"\xff\xfe\xfd\xfc"),
        "surrogate.json": raw.replace(b"demo", b"\\ud800"),
        "traversal.json": raw.replace(b"demo", b"../.."),
        "wrongname.json": raw,
        "cut.json": raw[:-1],
    }
    for name, content in bad.items():
        (directory / name).write_bytes(content)
    bad["notutf8"] = b""
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff\xfe.json")).write_bytes(b"x")
    (directory / "link.json").symlink_to(good)
    (directory / record_name(instance(2))).symlink_to("/dev/zero")
    os.mkfifo(directory / "fifo.json")
    (directory / "folder.json").mkdir()
    (directory / "notes.txt").write_text("not ours")

    async def main() -> None:
        async with opened(one := FileDiscovery(str(directory))):
            for _ in range(3):
                assert await one.list() == (instance(1),)
            os.utime(directory / "empty.json", (1, 1))
            assert await one.list() == (instance(1),)

    with caplog.at_level(logging.WARNING, "dynwire.discovery"):
        run(main())
    assert len(caplog.records) == len(bad) + 4


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.integers(0, 1 << 32)))
def test_any_contents_give_a_record_or_a_reason(content: bytes | int) -> None:
    name = record_key(instance(1))
    raw = msgspec.json.encode(Record(instance(1, metadata={"k": [1, "é", None]}), 10.0, this_process()))
    if isinstance(content, int):
        rng = random.Random(content)
        mutable = bytearray(raw)
        for _ in range(rng.randrange(1, 6)):
            mutable[rng.randrange(len(mutable))] = rng.randrange(256)
        content = bytes(mutable[: rng.randrange(1, len(mutable) + 1)] if rng.random() < 0.3 else mutable)
    try:
        record = decode_record(name, content)
    except BadRecord:
        return
    assert record.instance.id == 1
    assert 0 < record.effective_ttl <= 3600
    if record.process is not None:
        has_ended(record.process, None if (me := this_process()) is None else me.scope)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 64) - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=10,
)
PART = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Instance,
        st.integers(0, (1 << 64) - 1),
        PART,
        PART,
        PART,
        st.sampled_from(["tcp", "http"]),
        st.text(),
        codecs=st.lists(st.text(), max_size=3).map(tuple),
        metadata=st.dictionaries(st.text(), JSON, max_size=3),
        started_at=st.floats(0, 1e12),
    )
)
def test_every_instance_survives_its_file(of: Instance) -> None:
    with tempfile.TemporaryDirectory() as directory:

        async def main() -> None:
            async with opened(one := FileDiscovery(directory), two := FileDiscovery(directory)):
                await one.register(of)
                assert await two.list() == (of,)
                assert await two.list(of.path) == (of,)

        run(main())


def test_orphaned_temporary_files_are_removed(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
            old, new, other = (Path(kv(tmp_path), n) for n in (".0123.tmp", ".4567.tmp", "users.tmp"))
            for path in (old, new, other):
                path.write_text("{")
            os.utime(old, (1, 1))
            os.utime(other, (1, 1))
            await one.list()
            assert records(kv(tmp_path)) == [".4567.tmp", "users.tmp"]

    run(main())


# -- file: time


class Clocks:
    def __init__(self) -> None:
        self.wall = time.time()
        self.monotonic = 100.0

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds

    def open(self, directory: str) -> FileDiscovery:
        return FileDiscovery(directory, wall=lambda: self.wall, monotonic=lambda: self.monotonic)

    def touch(self, path: Path) -> None:
        os.utime(path, (self.wall, self.wall))


def with_clocks(tmp_path: Path, body: Callable[[FileDiscovery, Clocks, Path], Awaitable[None]]) -> None:
    async def main() -> None:
        clocks = Clocks()
        async with opened(one := clocks.open(kv(tmp_path))):
            path = write_record(kv(tmp_path), instance(1))
            clocks.touch(path)
            await body(one, clocks, path)

    run(main())


async def ids(of: FileDiscovery) -> set[int]:
    return {i.id for i in await of.list()}


def test_expires_after_its_ttl_and_is_removed(tmp_path: Path) -> None:
    async def body(one: FileDiscovery, clocks: Clocks, path: Path) -> None:
        for _ in range(10):
            assert await ids(one) == {1}
            clocks.advance(9.9)
            clocks.touch(path)
        assert await ids(one) == {1}
        clocks.advance(10.1)
        assert await ids(one) == set()
        assert not path.exists()

    with_clocks(tmp_path, body)


def test_already_expired_when_first_seen(tmp_path: Path) -> None:
    """Ignored at once, but left in place until it was watched for longer than a heartbeat takes: the clock may be wrong."""

    async def body(one: FileDiscovery, clocks: Clocks, path: Path) -> None:
        clocks.wall += 11
        assert await ids(one) == set()
        assert path.exists()
        clocks.advance(4)
        clocks.touch(path)
        assert await ids(one) == {1}, "it was alive after all"
        clocks.advance(10.1)
        assert await ids(one) == set()
        assert not path.exists()

    with_clocks(tmp_path, body)


@pytest.mark.parametrize("step", [-1e6, -60.0, 60.0, 1e6])
def test_step_of_the_wall_clock(tmp_path: Path, step: float) -> None:
    """Nobody who is known disappears, and somebody who dies around the step still does after one TTL."""

    async def body(one: FileDiscovery, clocks: Clocks, path: Path) -> None:
        assert await ids(one) == {1}
        clocks.advance(1.0)
        clocks.wall += step
        assert await ids(one) == {1}
        clocks.advance(1.0)
        clocks.touch(path)
        assert await ids(one) == {1}
        clocks.advance(9.0)
        assert await ids(one) == {1}
        clocks.advance(1.1)
        assert await ids(one) == set()

    with_clocks(tmp_path, body)


def test_touched_just_before_a_step_forward(tmp_path: Path) -> None:
    async def body(one: FileDiscovery, clocks: Clocks, path: Path) -> None:
        assert await ids(one) == {1}
        clocks.advance(0.5)
        clocks.touch(path)
        clocks.advance(0.1)
        clocks.wall += 1e6
        assert await ids(one) == {1}, "the touch came after the last scan, whatever the wall clock says"

    with_clocks(tmp_path, body)


def test_time_in_the_future_counts_as_alive(tmp_path: Path) -> None:
    async def body(one: FileDiscovery, clocks: Clocks, path: Path) -> None:
        os.utime(path, (clocks.wall + 1e6, clocks.wall + 1e6))
        assert await ids(one) == {1}

    with_clocks(tmp_path, body)


def test_ttl_is_the_writers_within_limits(tmp_path: Path) -> None:
    async def main() -> None:
        clocks = Clocks()
        async with opened(one := clocks.open(kv(tmp_path))):
            for number, ttl in enumerate((1.0, 100.0, -5.0, 1e300)):
                clocks.touch(write_record(kv(tmp_path), instance(number), ttl=ttl))
            assert await ids(one) == {0, 1, 2, 3}
            clocks.advance(50)
            assert await ids(one) == {1, 3}
            clocks.advance(3600)
            assert await ids(one) == set()

    run(main())


# -- file: processes


def test_process_identity() -> None:
    me = this_process()
    if me is None:
        pytest.skip("/proc does not identify processes here")
    assert not has_ended(me, me.scope)
    assert has_ended(ProcessId(me.scope, me.pid, me.start - 1), me.scope), "a later process with the same pid"
    elsewhere = ProcessId(("otherhost", *me.scope[1:]), me.pid, me.start - 1)
    assert not has_ended(elsewhere, me.scope), "not to be judged from here"
    assert not has_ended(ProcessId(me.scope, me.pid, me.start - 1), None)
    for pid in (-1, 0, 1 << 31, 1 << 62):
        assert not has_ended(ProcessId(me.scope, pid, 1), me.scope)
    assert not has_ended(ProcessId(me.scope, 1, file_module._read_start(1)[1]), me.scope)  # type: ignore[index]


def test_zombie_has_ended_but_not_a_process_whose_first_thread_has() -> None:
    me = this_process()
    if me is None:
        pytest.skip("/proc does not identify processes here")
    # The first thread ends by itself, without ending the process, while another one waits for its input to close.
    code = (
        "import ctypes, os, sys, threading\n"
        "def wait():\n"
        "    os.write(1, b'x'); os.read(0, 1); os._exit(0)\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        child.stdout.read(1)
        start = file_module._read_start(child.pid)
        assert start is not None
        identity = ProcessId(me.scope, child.pid, start[1])
        run(eventually(lambda: (file_module._read_start(child.pid) or ("", 0))[0] == "Z"))
        assert not has_ended(identity, me.scope)
        child.stdin.close()
        run(eventually(lambda: has_ended(identity, me.scope)))  # a real zombie now: nobody waited for it
        assert (file_module._read_start(child.pid) or ("", 0))[0] == "Z"
        child.wait()
        assert has_ended(identity, me.scope)


WORKER = """
import asyncio, sys
from dynwire.discovery import open_discovery
from dynwire.types import Instance

async def main(directory, ttl, number):
    discovery = open_discovery("file", file_dir=directory, ttl=float(ttl))
    await discovery.register(Instance(int(number), "demo", "worker", "generate", "tcp", "127.0.0.1:1"))
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await discovery.close()

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def worker(directory: str, ttl: float, number: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, directory, str(ttl), str(number)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
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


def test_killed_worker_vanishes_without_waiting_for_its_ttl(tmp_path: Path) -> None:
    if this_process() is None:
        pytest.skip("/proc does not identify processes here")

    async def main() -> None:
        async with opened(reader := FileDiscovery(kv(tmp_path))):
            with worker(kv(tmp_path), 3600, 1) as first, worker(kv(tmp_path), 3600, 2) as second:
                seen = Watcher(reader)
                await seen.until(1, 2)
                first.kill()  # and not waited for: a zombie counts as ended
                await seen.until(2)
                assert records(kv(tmp_path)) == [record_name(instance(2))]
                second.kill()
                second.wait()
                await seen.until()

    run(main())


def test_worker_that_ends_properly_withdraws(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(reader := FileDiscovery(kv(tmp_path))):
            with worker(kv(tmp_path), 3600, 1) as process:
                seen = Watcher(reader)
                await seen.until(1)
                assert process.stdin is not None
                process.stdin.close()
                await seen.until()
                assert process.wait(WAIT_S) == 0

    run(main())


def test_suspended_worker_goes_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(reader := FileDiscovery(kv(tmp_path))):
            with worker(kv(tmp_path), 0.6, 1) as process:
                seen = Watcher(reader)
                await seen.until(1)
                process.send_signal(signal.SIGSTOP)
                await seen.until()
                await eventually(lambda: records(kv(tmp_path)) == [])
                process.send_signal(signal.SIGCONT)
                await seen.until(1)
                assert process.poll() is None

    run(main())


def test_live_worker_is_kept_alive_by_heartbeats_alone(tmp_path: Path) -> None:
    """Many TTLs: nothing may flicker while the owner's loop runs."""

    async def main() -> None:
        async with opened(reader := FileDiscovery(kv(tmp_path))):
            with worker(kv(tmp_path), 2.0, 1):
                seen = Watcher(reader)
                await seen.until(1)
                path = Path(kv(tmp_path), record_name(instance(1)))
                times = {path.stat().st_mtime_ns}

                def another_heartbeat() -> bool:
                    times.add(path.stat().st_mtime_ns)
                    return len(times) >= 6

                await eventually(another_heartbeat)
                assert [len(s) for s in seen.sets if s] == [1]

    run(main())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_object_from_before_a_fork(tmp_path: Path) -> None:
    """The child gets a clear error, and closing there leaves the parent's record alone."""

    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mem_is_empty_in_the_child_of_a_fork() -> None:
    async def main() -> None:
        async with opened(one := MemoryDiscovery()):
            await one.register(instance(1))
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    MemoryDiscovery().list().send(None)
                except StopIteration as result:
                    code = 0 if result.value == () else 2
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert await one.list() == (instance(1),)

    run(main())


def test_no_polling_when_nobody_watches(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(one := FileDiscovery(kv(tmp_path))):
            assert one._poll_handle is None
            assert one._heartbeat_handle is None
            first, second = Watcher(one), Watcher(one)
            await first.until()
            await one.register(instance(1))
            await second.until(1)
            first.watch.cancel()
            assert one._poll_handle is not None
            second.watch.cancel()
            assert one._poll_handle is None
            assert one._heartbeat_handle is not None
            await one.deregister(instance(1))
            assert one._heartbeat_handle is None

    run(main())


def test_errors_pickle() -> None:
    import pickle

    error: DynwireError = file_module._unusable("/x", "why", details={"errno": 1})
    assert pickle.loads(pickle.dumps(error)).to_dict() == error.to_dict()
