"""``dynwire tail`` and ``dynwire tree``, run as people run them, with publishers in this process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.kv_router import RadixTree
from dynwire.kv_router.publisher import KvEventPublisher

from .kv.test_tree import chain
from .plane.faces import eventually

ROOT = Path(__file__).parent.parent
HANG_S = 40.0


class Shell:
    """Runs ``dynwire`` with the settings of the publishers."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dynwire", *arguments],
            env=self.environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.processes.append(process)
        return process

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = await asyncio.to_thread(process.communicate, timeout=HANG_S)
        return process.returncode, out, err

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(params=["zmq", "nats", "jetstream"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "zmq":
        pytest.importorskip("zmq")
        return {"event_plane": "zmq"}
    server, prefix = request.getfixturevalue("nats_server"), request.getfixturevalue("nats_prefix")
    return {"event_plane": request.param, "nats_servers": server.url, "nats_prefix": prefix}


@pytest.fixture
def shell(settings: dict[str, Any], discovery_dir: Path, dynwire_manager: Any) -> Iterator[Shell]:
    made = Shell(dynwire_manager.environment(**settings) | {"DYN_FILE_KV": str(discovery_dir)})
    yield made
    made.close()


@pytest.fixture
def publishers(settings: dict[str, Any]) -> Callable[..., Any]:
    @asynccontextmanager
    async def make(*workers: int, **options: Any) -> AsyncIterator[list[KvEventPublisher]]:
        async with AsyncExitStack() as stack:
            made = []
            for worker in workers:
                manager = await stack.enter_async_context(dynwire.AsyncNetworkManager(tcp_host="127.0.0.1", **settings))
                publisher = KvEventPublisher(manager, "demo", "worker", worker, 16, **options)
                await publisher.start()
                stack.push_async_callback(publisher.close)
                made.append(publisher)
            yield made

    return make


def store(publisher: KvEventPublisher, blocks: list[tuple[int, int]], parent: int | None = None, rank: int = 0) -> None:
    publisher.publish_stored(parent, [b for b, _ in blocks], [t for _, t in blocks], rank)


async def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(HANG_S):
        return await asyncio.to_thread(process.stdout.readline)


async def following(process: subprocess.Popen[str], publisher: KvEventPublisher) -> None:
    """Until the events reach it: PUB sockets send to those who have subscribed, and nobody tells of that."""
    assert process.stderr is not None and process.stdout is not None
    assert "following" in await asyncio.to_thread(process.stderr.readline)
    first = asyncio.create_task(line_of(process))
    while not first.done():
        publisher.publish_cleared()
        await asyncio.sleep(0.02)
    text = await first
    last = publisher.index.last_id()
    while f'"event_id":{last}' not in text and f"  {last}  cleared" not in text:
        text = await line_of(process)


async def test_tail_prints_what_is_published(shell: Shell, publishers: Callable[..., Any]) -> None:
    rng = random.Random(1)
    async with publishers(11, 22, dp_size=2) as (first, second):
        process = shell.start("tail", "demo.worker.generate", "-n", "100000")
        await following(process, first)
        blocks = chain(rng, 5)
        store(first, blocks)
        line = await line_of(process)
        assert line.split()[1:4] == ["000000000000000b", "0", str(first.index.last_id())]
        assert f"stored   5 blocks at the beginning: {blocks[0][0]:016x} " in line
        assert line.endswith(f"… {blocks[4][0]:016x}\n")
        store(first, chain(rng, 1), parent=blocks[4][0])
        assert f"stored   1 block behind {blocks[4][0]:016x}: " in await line_of(process)
        first.publish_removed([blocks[4][0]])
        assert (await line_of(process)).endswith(f"removed  1 block: {blocks[4][0]:016x}\n")
        store(second, blocks, rank=1)
        # the other one's socket may not be connected yet
        heard = asyncio.create_task(line_of(process))
        while not heard.done():
            second.publish_cleared(1)
            await asyncio.sleep(0.02)
        assert (await heard).split()[1:3] == ["0000000000000016", "1"]
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.to_thread(process.communicate, timeout=HANG_S)
        assert (process.returncode, err.strip()) == (130, "")


async def test_tail_as_json_counts_what_is_lost(
    shell: Shell, publishers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    async with publishers(11) as (first,):
        process = shell.start("tail", "demo.worker.generate", "--json")
        await following(process, first)
        with monkeypatch.context() as patch:
            patch.setattr(first._sender, "send", lambda *data, **more: None)
            for _ in range(3):
                first.publish_cleared()
            await eventually(lambda: not first._waiting)
        blocks = chain(rng, 2)
        store(first, blocks)
        missed, stored = json.loads(await line_of(process)), json.loads(await line_of(process))
        assert (missed["missed"], missed["worker_id"], missed["instance"]) == (3, 11, "000000000000000b")
        assert stored["stored"] == {
            "parent_hash": None, "blocks": [{"block_hash": b, "tokens_hash": t} for b, t in blocks],
        }  # fmt: skip
        assert (stored["event_id"], stored["epoch"]) == (first.index.last_id(), first.index.epoch)
        # the last one is missed too, by the numbers that are repeated
        with monkeypatch.context() as patch:
            patch.setattr(first._sender, "send", lambda *data, **more: None)
            first.publish_cleared()
            await eventually(lambda: not first._waiting)
        assert json.loads(await line_of(process))["missed"] == 1
        first.publish_cleared()
        cleared = json.loads(await line_of(process))
        assert cleared["cleared"] is True and cleared["event_id"] == first.index.last_id()


async def test_tail_ends_with_its_reader(shell: Shell, publishers: Callable[..., Any]) -> None:
    """Without anything being printed."""
    async with publishers(11) as (first,):
        process = shell.start("tail", "demo.worker.generate")
        await following(process, first)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert await asyncio.to_thread(process.wait, HANG_S) == 0
        assert process.stderr.read() == ""
        process.stderr.close()
        shell.processes.remove(process)


async def test_tail_ends_after_so_many(shell: Shell, publishers: Callable[..., Any]) -> None:
    async with publishers(11) as (first,):
        process = shell.start("tail", "demo.worker.generate", "-n", "2")
        ended = asyncio.create_task(asyncio.to_thread(process.communicate, timeout=HANG_S))
        while not ended.done():
            first.publish_cleared()
            first.publish_cleared()
            first.publish_cleared()
            await asyncio.sleep(0.02)
        out, _ = await ended
        assert process.returncode == 0
        assert len(out.splitlines()) == 2


async def test_tail_without_events(shell: Shell) -> None:
    shell.environment["DYN_EVENT_PLANE"] = "none"
    code, out, err = await shell.run("tail", "demo.worker.generate")
    assert (code, out) == (2, "") and "there are no events to print" in err


async def test_tree_of_workers_that_share_blocks(shell: Shell, publishers: Callable[..., Any]) -> None:
    rng = random.Random(3)
    common, own = chain(rng, 6), chain(rng, 4)
    renamed = [(block ^ 1, tokens) for block, tokens in common]  # the same tokens, the engine's ids are others
    async with publishers(11, 22, 33) as (first, second, third):
        store(first, common)
        store(first, own, parent=common[-1][0])
        store(second, renamed[:3])
        store(second, own)  # the same tokens at another place are another block
        await eventually(lambda: not first._waiting and not second._waiting)
        code, out, err = await shell.run("tree", "demo.worker.generate", "--json")
        assert (code, err) == (0, "")
        seen = json.loads(out)
        assert (seen["blocks"], seen["different_blocks"]) == (17, 14)
        rows = {row["worker_id"]: row for row in seen["workers"]}
        assert [(rows[w]["blocks"], rows[w]["shared"]) for w in (11, 22, 33)] == [(10, 3), (7, 3), (0, 0)]
        assert rows[11]["common"] == {"0000000000000016/0": 3, "0000000000000021/0": 0}
        assert (rows[11]["block_size"], rows[11]["events"], rows[11]["error"]) == (16, 2, None)
        alone = RadixTree()
        for event in first.index.tree.dump(11):
            alone.apply_event(11, event.event)
        assert rows[11]["bytes"] == alone.nbytes

        code, out, _ = await shell.run("tree", "demo.worker.generate")
        lines = out.splitlines()
        assert lines[0].split() == ["WORKER", "RANK", "BLOCKS", "BYTES", "SHARED", "MOST", "WITH", "EVENTS", "AGE"]
        assert lines[1].startswith("000000000000000b     0      10")
        assert "3 (30 %)  0000000000000016/0 (3)" in lines[1]
        assert lines[-1] == "17 blocks, 14 different ones"
        assert third.index.tree.entries == 0


async def test_tree_of_a_worker_that_does_not_answer(
    shell: Shell, publishers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with publishers(11, 22) as (first, second):
        store(second, chain(random.Random(4), 2))

        def broken(query: Any) -> Any:
            raise RuntimeError("no")

        monkeypatch.setattr(first.index, "answer", broken)
        code, out, err = await shell.run("tree", "demo.worker.generate", "--timeout", "5")
        assert code == 1
        assert "dynwire: worker 000000000000000b rank 0: RemoteError" in err
        assert "0000000000000016     0       2" in out


async def test_tree_without_publishers(shell: Shell) -> None:
    code, out, err = await shell.run("tree", "demo.worker.generate")
    assert (code, out) == (1, "")
    assert "nobody serves demo.worker.kv_events" in err
