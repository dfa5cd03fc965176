"""``dynwire nats up``."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import click
import msgspec

from ..errors import BindError, DynwireError
from ._common import Command, json_option, to_json

MIB = 1 << 20


class Stop(Exception):
    """A signal asks for the end."""


@click.group(name="nats")
def command() -> None:
    """A nats-server of your own, for development."""


@command.command(name="up", cls=Command)
@click.option("--port", type=click.IntRange(0, 65535), default=4222, show_default=True, help="Port, 0 for any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--jetstream", "directory", metavar="DIR", type=click.Path(file_okay=False),
              help="Where JetStream stores; kept.  [default: a temporary directory]")  # fmt: skip
@click.option("--no-jetstream", is_flag=True, help="Without JetStream.")
@click.option("--max-payload", type=click.IntRange(1, 64 * MIB), metavar="BYTES",
              help="Largest message; dynwire uses up to 16 MiB.  [default: 1 MiB, as nats-server has it]")  # fmt: skip
@click.option("--server-config", type=click.File(), metavar="FILE",
              help="More settings, in nats-server's own language.")  # fmt: skip
@click.option("--log", "log_file", metavar="FILE", type=click.Path(dir_okay=False), help="File for what nats-server prints.")
@json_option
def up(
    port: int,
    host: str,
    directory: str | None,
    no_jetstream: bool,
    max_payload: int | None,
    server_config: Any,
    log_file: str | None,
    as_json: bool,
) -> None:
    """Run a nats-server until Ctrl-C, SIGTERM or the end of this process.

    Once clients are served, it prints what to put into the environment of workers and callers. With the port 4222 that is
    nothing: it is where they look by themselves. Needs dynwire[nats-server], or a nats-server on PATH.
    """
    if directory and no_jetstream:
        raise click.UsageError("--jetstream and --no-jetstream exclude each other")
    from ..nats.server import NatsServer, binary_version, fetch, find_binary

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    with ExitStack() as undo:
        # before the start, which takes time; afterwards there is nothing that a second signal could spoil
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            undo.callback(signal.signal, number, signal.signal(number, stop))
        try:
            binary = find_binary()
            server = NatsServer(
                host=host,
                port=port,
                jetstream=directory or not no_jetstream,
                max_payload=max_payload,
                config="" if server_config is None else server_config.read(),
                log_file=log_file or "",
                binary=binary,
            )
            undo.callback(server.stop)
            try:
                server.start()
            except BindError as error:
                raise BindError(f"{error}; --port 0 takes a free port", address=error.address) from error
            page = msgspec.json.decode(fetch(f"{server.monitor_url}/varz")[1])
            _announce(server, binary_version(binary), page["max_payload"], bool(directory), as_json)
            code = server.wait_ended()
            raise DynwireError(f"nats-server ended by itself with code {code}: {' / '.join(server.log[-3:])}")
        except Stop:
            pass


def _announce(server: Any, version: str, max_payload: int, kept: bool, as_json: bool) -> None:
    if as_json:
        shown = {
            "event": "serving",
            "url": server.url,
            "port": server.port,
            "pid": server.pid,
            "version": version,
            "monitor": server.monitor_url,
            "jetstream": server.storage or None,
            "max_payload": max_payload,
            "environment": server.environment,
        }
        click.echo(to_json(shown))
    else:
        storage = f"JetStream in {server.storage}" if server.jetstream else "no JetStream"
        storage += "" if kept or not server.jetstream else " (removed at the end)"
        # as comments and assignments, so that all of it can be pasted into a shell
        click.echo(f"# nats-server {version} (pid {server.pid}), {storage}, messages up to {_size(max_payload)}")
        click.echo(f"# monitoring: {server.monitor_url}")
        for name, value in server.environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")
    # whoever started us may be waiting for this on a pipe
    sys.stdout.flush()


def _size(count: int) -> str:
    return f"{count / MIB:.3g} MiB" if count >= MIB else f"{count} bytes"
