"""``dynwire call``."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..types import EndpointId
from ._common import (
    Command,
    json_option,
    parse_headers,
    parse_payload,
    read_data,
    settings_options,
    to_json,
    tool_config,
)

if TYPE_CHECKING:
    from dynwire import NetworkManager

# long enough for a worker that is just starting, short enough to find out about a misspelt name
DEFAULT_WAIT_S = 2.0
DEFAULT_TIMEOUT_S = 30.0


@click.command(name="call", cls=Command)
@click.argument("endpoint")
@click.argument("data", required=False)
@click.option("--stream", is_flag=True, help="Print every item of the reply, one per line.")
@click.option("--raw", is_flag=True, help="Send the data as bytes instead of JSON or text.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help=f"For everything.  [default: {DEFAULT_TIMEOUT_S:g}, none with --stream]")  # fmt: skip
@click.option("--wait", type=click.FloatRange(min=0), default=DEFAULT_WAIT_S, metavar="SECONDS", show_default=True,
              help="For the first instance to appear.")  # fmt: skip
@click.option("--header", "headers", metavar="NAME=VALUE", multiple=True, help="Header of the request; may be repeated.")
@click.option("--instance", metavar="HEX", help="Id of the instance to call, as `dynwire ls` shows it.")
@json_option
@settings_options
def command(
    endpoint: str,
    data: str | None,
    stream: bool,
    raw: bool,
    timeout: float | None,
    wait: float,
    headers: tuple[str, ...],
    instance: str | None,
    as_json: bool,
    chosen: dict[str, object],
) -> None:
    """Send one request to ENDPOINT (namespace.component.endpoint) and print the reply.

    DATA is sent as the value it means if it is JSON, otherwise as text; @FILE reads a file, - reads stdin. Replies are
    printed as JSON, one line each; replies of bytes as they are, or in base64 with --json.
    """
    EndpointId.parse(endpoint)
    payload = parse_payload(read_data(data), raw)
    options: dict[str, Any] = {"headers": parse_headers(headers)}
    if instance is not None:
        options["instance"] = _instance_id(instance)
    options["timeout"] = timeout if timeout is not None or stream else DEFAULT_TIMEOUT_S
    arguments = {"config": tool_config(chosen)}

    from dynwire import NetworkManager

    with NetworkManager(**arguments) as manager:
        for reply in _replies(manager, endpoint, payload, stream, wait, options):
            _print_reply(reply, as_json)


def _replies(
    manager: NetworkManager, endpoint: str, payload: Any, stream: bool, wait: float, options: dict[str, Any]
) -> Iterator[Any]:
    client = manager.endpoint(endpoint).client()
    client.wait_for_instances(1, timeout=wait)
    if not stream:
        yield client.call(payload, **options)
        return
    with client.stream(payload, **options) as items:
        yield from items


def _instance_id(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise click.UsageError(f"--instance needs the hexadecimal id that `dynwire ls` shows, got {text!r}") from None


def _print_reply(reply: Any, as_json: bool) -> None:
    raw = _as_bytes(reply)
    if raw is None:
        click.echo(to_json(reply))
    elif as_json:
        click.echo(to_json({"base64": base64.b64encode(raw).decode()}))
    elif sys.stdout.isatty():
        # bytes from a peer can hold control sequences, which a terminal would obey
        text = raw.decode("utf-8", "replace")
        click.echo("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))
    else:
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()


def _as_bytes(reply: Any) -> bytes | None:
    """The bytes of a raw reply (`dynwire.Payload` or another buffer), None for a decoded value."""
    try:
        with memoryview(reply) as view:
            return bytes(view)
    except TypeError:
        return None
