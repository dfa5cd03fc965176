"""``dynwire tail``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..config import Config, load_config
from ..errors import ConfigError
from ..types import EndpointId, Instance
from ._common import Command, hex_id, json_option, settings_options, to_json

if TYPE_CHECKING:
    from ..event_plane.base import EventReceiver
    from ..event_plane.recovery import Batch
    from ..wire.kv_events import KvCacheEvent


@click.command(name="tail", cls=Command)
@click.argument("endpoint")
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after so many events.")
@json_option
@settings_options
def command(endpoint: str, count: int | None, as_json: bool, chosen: dict[str, object]) -> None:
    """Print the KV cache events of the workers of ENDPOINT (namespace.component.endpoint) as they are published.

    One line each, or a JSON document each with --json, until Ctrl-C, or until the reader of the output has gone. Events that were
    lost on the way are counted where they are missing; nothing is asked for again, and nothing of this is seen by workers and
    routers.
    """
    path = EndpointId.parse(endpoint)
    config = load_config(cli=chosen)
    # asyncio's own loop: it watches the output's other end
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(_tail(config, path, count, as_json))


async def _tail(config: Config, path: EndpointId, count: int | None, as_json: bool) -> None:
    from ..event_plane.base import open_tap
    from ..event_plane.recovery import Batch
    from ..kv_router.inspection import events_endpoint
    from ..manager import AsyncNetworkManager

    receiver = open_tap(config, path.namespace, path.component)
    if receiver is None:
        raise ConfigError(
            "DYN_EVENT_PLANE is none: there are no events to print",
            name="DYN_EVENT_PLANE",
            value="none",
            allowed="jetstream, nats, zmq",
        )
    ended = asyncio.Event()
    printer = _Printer(as_json, count, ended.set)
    decode = msgspec.msgpack.Decoder(Batch).decode

    def on_message(data: bytes) -> None:
        try:
            printer.take(decode(data))
        except msgspec.MsgspecError as error:
            click.echo(f"a message that is none of a worker: {error}", err=True)

    with _watched_output(ended.set):
        async with AsyncNetworkManager(config=config) as manager:
            await receiver.start(on_message)
            watch = None
            try:
                senders = _Senders(receiver)
                watch = await manager.watch_instances(senders.update, events_endpoint(path))
                plane = config.events.plane
                click.echo(f"following {len(senders.known)} workers of {path.namespace}.{path.component} over {plane}", err=True)
                await ended.wait()
            finally:
                if watch is not None:
                    watch.cancel()
                await receiver.close()


class _Senders:
    """Workers come and go."""

    def __init__(self, receiver: EventReceiver) -> None:
        self.known: dict[int, Instance] = {}
        self._receiver = receiver
        self._complained: set[int] = set()

    def update(self, instances: tuple[Instance, ...]) -> None:
        found = {i.metadata["worker_id"]: i for i in instances if isinstance(i.metadata.get("worker_id"), int)}
        for worker_id in self.known.keys() - found.keys():
            del self.known[worker_id]
            self._receiver.remove_sender(worker_id)
        for worker_id, instance in found.items():
            if worker_id in self.known or worker_id in self._complained:
                continue
            try:
                self._receiver.add_sender(worker_id, instance.metadata)
            except ConfigError as error:
                self._complained.add(worker_id)
                click.echo(f"dynwire: {error}", err=True)
            else:
                self.known[worker_id] = instance


class _Printer:
    """Writes events, and how many are missing between them."""

    def __init__(self, as_json: bool, count: int | None, end: Callable[[], object]) -> None:
        self._as_json = as_json
        self._left = count
        self._end = end
        self._last: dict[tuple[int, int], tuple[int, int]] = {}
        """of a worker's rank: epoch and number of its newest event that was seen or missed"""

    def take(self, batch: Batch) -> None:
        """Events, or the newest numbers that workers repeat from time to time."""
        lines = []
        for event in batch.events:
            if self._left == 0:
                break
            key = (batch.worker_id, event.dp_rank)
            epoch, last = self._last.get(key, (batch.epoch, event.event_id - 1))
            if batch.epoch < epoch or (batch.epoch == epoch and event.event_id <= last):
                continue  # sent once more
            # a worker that has started anew counts from 1
            lines += self._missed(batch, event.dp_rank, event.event_id - 1 - (last if batch.epoch == epoch else 0))
            self._last[key] = (batch.epoch, event.event_id)
            lines.append(self._line(batch, event))
            if self._left is not None:
                self._left -= 1
        for rank, head in batch.heads.items():
            epoch, last = self._last.get((batch.worker_id, rank), (batch.epoch, head))
            if batch.epoch == epoch and self._left != 0:
                lines += self._missed(batch, rank, head - last)
                last = max(last, head)
            if batch.epoch >= epoch:
                self._last[batch.worker_id, rank] = (batch.epoch, last if batch.epoch == epoch else 0)
        if lines:
            self._write("".join(line + "\n" for line in lines))
        if self._left == 0:
            self._end()

    def _missed(self, batch: Batch, rank: int, number: int) -> list[str]:
        if number <= 0:
            return []
        if self._as_json:
            found = {"worker_id": batch.worker_id, "instance": hex_id(batch.worker_id), "dp_rank": rank, "missed": number}
            return [to_json({"time": time.time(), **found})]
        return [f"{_clock()}  {hex_id(batch.worker_id)}  {rank}  -  {number} events were lost on the way here"]

    def _line(self, batch: Batch, event: KvCacheEvent) -> str:
        data = event.data
        if self._as_json:
            found: dict[str, Any] = {
                "time": time.time(), "worker_id": batch.worker_id, "instance": hex_id(batch.worker_id), "epoch": batch.epoch,
                "dp_rank": event.dp_rank, "event_id": event.event_id,
            }  # fmt: skip
            return to_json({**found, **({"cleared": True} if data == "cleared" else msgspec.to_builtins(data))})
        if data == "cleared":
            text = "cleared"
        elif data.stored is not None:
            blocks, parent = data.stored.blocks, data.stored.parent_hash
            where = "at the beginning" if parent is None else f"behind {hex_id(parent)}"
            text = f"stored   {_counted(len(blocks))} {where}: {_ids([block.block_hash for block in blocks])}"
        else:
            assert data.removed is not None
            text = f"removed  {_counted(len(data.removed.block_hashes))}: {_ids(data.removed.block_hashes)}"
        return f"{_clock()}  {hex_id(batch.worker_id)}  {event.dp_rank}  {event.event_id}  {text}"

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
            self._left = 0
            self._end()


def _clock() -> str:
    return datetime.now().isoformat(timespec="milliseconds").partition("T")[2]


def _counted(number: int) -> str:
    return f"{number} block" if number == 1 else f"{number} blocks"


def _ids(hashes: list[int]) -> str:
    shown = " ".join(hex_id(each) for each in hashes[:3])
    return shown if len(hashes) <= 3 else f"{shown} … {hex_id(hashes[-1])}"


def _discard_output() -> None:
    """The interpreter flushes standard output once more at its end, and would complain."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextlib.contextmanager
def _watched_output(gone: Callable[[], object]) -> Any:
    """Call ``gone`` when the reader of a pipe on standard output has left, also while nothing is written."""
    loop, number = asyncio.get_running_loop(), sys.stdout.fileno()
    if not stat.S_ISFIFO(os.fstat(number).st_mode):
        yield
        return

    def on_event() -> None:
        # the end for writing of a pipe is readable only by an error: nobody has the other end any more
        loop.remove_reader(number)
        gone()

    loop.add_reader(number, on_event)
    try:
        yield
    finally:
        loop.remove_reader(number)
