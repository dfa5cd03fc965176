"""``dynwire replay``."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import msgspec
import orjson

from ..codec import KIND_JSON, KIND_MSGPACK
from ..config import Config
from ..errors import DynwireError
from ..nats.queue import REPLAY_OF
from ..types import EndpointId
from . import tables
from ._common import Command, describe_error, json_option, run_async, settings_options, to_json, tool_config

if TYPE_CHECKING:
    from ..client import AsyncClient
    from ..nats.log import Copy

    _ParamType = click.ParamType[datetime]
else:
    _ParamType = click.ParamType  # generic from click 8.2 on only

# requests of a replay that are on their way at once: what a slow endpoint holds up stays on the server, not in this process
AT_ONCE = 256

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Moment(_ParamType):
    """A moment: ISO 8601 (local time where it names no zone), or how long ago, as in 90s, 10m, 2h or 3d."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
        try:
            if ago is not None:
                return datetime.now(UTC) - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
            return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is neither a time such as 2025-01-31T12:00:00 nor an age such as 90s, 10m, 2h or 3d", param, ctx
            )


@dataclass
class Outcome:
    """What became of one request."""

    copy: Copy
    new_id: str = ""
    items: int = 0
    seconds: float = 0.0
    error: DynwireError | None = None


@click.command(name="replay", cls=Command)
@click.argument("endpoint")
@click.option("--since", type=Moment(), metavar="TIME", help="The earliest request: 2025-01-31T12:00:00 or 10m (ago).")
@click.option("--until", type=Moment(), metavar="TIME", help="Requests before this moment.")
@click.option("--speed", type=click.FloatRange(min=0), default=1.0, show_default=True, metavar="FACTOR",
              help="1 keeps the distances in time, 2 halves them, 0 sends as fast as it can.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Per request.  [default: what the request was sent with]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="List the requests, send nothing.")
@json_option
@settings_options
def command(
    endpoint: str,
    since: datetime | None,
    until: datetime | None,
    speed: float,
    timeout: float | None,
    dry_run: bool,
    as_json: bool,
    chosen: dict[str, object],
) -> int:
    """Send the durable requests of a time range to ENDPOINT (namespace.component.endpoint) once more.

    The endpoint's workers must keep copies: DYNWIRE_NATS_REPLAY_RETENTION. A replayed request has a new id and the header
    dynwire-replay-of with the old one; replayed requests themselves are left out. Replies are counted and thrown away. The
    exit code is 1 if a request failed.
    """
    target = EndpointId.parse(endpoint)
    settings = tool_config(chosen)
    config = replace(settings, request_plane="nats", nats=replace(settings.nats, request_mode="jetstream"))
    return run_async(_replay(config, target, since, until, speed, timeout, dry_run, as_json))


async def _replay(
    config: Config,
    endpoint: EndpointId,
    since: datetime | None,
    until: datetime | None,
    speed: float,
    timeout: float | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    from dynwire import AsyncNetworkManager

    from ..nats.connection import NatsConnection
    from ..nats.log import read_log
    from ..nats.queue import QueueNames

    connection = await NatsConnection.acquire(config.nats, timeout=None)
    results: Counter[str] = Counter()
    sending: set[asyncio.Task[None]] = set()
    try:
        names = QueueNames.of(config.nats.prefix, endpoint)
        async with AsyncNetworkManager(config) as manager:
            clients = {codec: await manager.endpoint(endpoint).client(codec=codec) for codec in ("msgpack", "json")}
            places = asyncio.Semaphore(AT_ONCE)
            loop = asyncio.get_running_loop()
            start, first = loop.time(), None

            async def send(copy: Copy) -> None:
                try:
                    outcome = await _send(clients, copy, timeout)
                finally:
                    places.release()
                results["answered" if outcome.error is None else outcome.error.code] += 1
                _print(outcome, as_json)

            try:
                async for copy in read_log(connection.client, names, since, until or datetime.now(UTC)):
                    if copy.replay_of:
                        results["replays left out"] += 1
                        continue
                    if dry_run:
                        results["found"] += 1
                        _print(Outcome(copy), as_json)
                        continue
                    first = first or copy.stored_at
                    if speed:
                        due = start + (copy.stored_at - first).total_seconds() / speed
                        await asyncio.sleep(max(0.0, due - loop.time()))
                    await places.acquire()
                    task = loop.create_task(send(copy))
                    sending.add(task)
                    task.add_done_callback(sending.discard)
                await asyncio.gather(*sending)
            finally:
                for task in sending:
                    task.cancel()
    finally:
        await connection.release()
    if not as_json:
        click.echo(", ".join(f"{count} {what}" for what, count in results.items()) or "no requests in that time")
    return 1 if set(results) - {"answered", "found", "replays left out"} else 0


async def _send(clients: dict[str, AsyncClient], copy: Copy, timeout: float | None) -> Outcome:
    """Send one request again and count its reply's items."""
    from .._context import Context

    context = Context(headers=copy.headers | {REPLAY_OF: copy.id})
    outcome = Outcome(copy)
    started = asyncio.get_running_loop().time()
    payload, codec = _as_it_was(copy)
    try:
        async with clients[codec].stream(payload, timeout=timeout or copy.timeout, context=context) as stream:
            outcome.new_id = stream.context.id or ""
            async for _ in stream:
                outcome.items += 1
    except DynwireError as error:
        outcome.error = error
    outcome.seconds = asyncio.get_running_loop().time() - started
    return outcome


def _as_it_was(copy: Copy) -> tuple[Any, str]:
    """``(what to send, the codec to send it with)`` so that the same bytes arrive in the same codec."""
    if copy.kind == KIND_MSGPACK:
        return msgspec.Raw(copy.payload), "msgpack"
    if copy.kind == KIND_JSON:
        return orjson.Fragment(copy.payload), "json"
    return copy.payload, "msgpack"


def _print(outcome: Outcome, as_json: bool) -> None:
    copy, error = outcome.copy, outcome.error
    if as_json:
        row: dict[str, Any] = {"id": copy.id, "stored_at": copy.stored_at, "bytes": len(copy.payload)}
        if outcome.new_id:
            row |= {"new_id": outcome.new_id, "items": outcome.items, "seconds": round(outcome.seconds, 6)}
            row["error"] = None if error is None else error.to_dict()
        click.echo(to_json(row))
    elif error is not None:
        click.echo(f"{copy.id}  {describe_error(error)}")
    else:
        what = f"{outcome.items} items in {tables.duration(outcome.seconds)}" if outcome.new_id else f"{len(copy.payload)} bytes"
        click.echo(f"{copy.id}  {copy.stored_at.isoformat(timespec='milliseconds')}  {what}")
