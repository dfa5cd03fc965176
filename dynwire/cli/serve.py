"""``dynwire serve``."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from ..system import address as system_address
from ..types import EndpointId, Instance
from ._common import Command, hex_id, json_option, manager_arguments, run_async, settings_options, to_json

# after a second signal: what closing connections may take before the process just goes
FORCED_CLOSE_S = 1.0


@click.command(name="serve", cls=Command)
@click.argument("handlers", metavar="MODULE:HANDLER...", nargs=-1, required=True)
@click.option("--endpoint", "endpoints", metavar="NS.C.E", multiple=True, required=True,
              help="Endpoint to serve; as many as there are handlers, in their order.")  # fmt: skip
@click.option("--host", help="Host to bind.  [DYN_TCP_RPC_HOST, DYN_HTTP_RPC_HOST]")
@click.option("--port", help="Port to bind, 0 for any free one.  [DYN_TCP_RPC_PORT, DYN_HTTP_RPC_PORT]")
@click.option("--grace", type=click.FloatRange(min=0), default=30.0, show_default=True, metavar="SECONDS",
              help="How long a shutdown waits for requests in flight.")  # fmt: skip
@json_option
@settings_options
def command(
    handlers: tuple[str, ...],
    endpoints: tuple[str, ...],
    host: str | None,
    port: str | None,
    grace: float,
    as_json: bool,
    chosen: dict[str, object],
) -> None:
    """Serve handlers until SIGINT or SIGTERM.

    MODULE:HANDLER is imported with the current directory on the path: a coroutine function (one reply), an async generator
    function (a stream), or their blocking counterparts, of (request) or (request, context). Once it can be called, one
    line per endpoint is printed. The first signal drains: no new requests, those in flight finish within the grace. A
    second signal ends the process at once.
    """
    if len(handlers) != len(endpoints):
        raise click.UsageError(
            f"{len(handlers)} handlers and {len(endpoints)} --endpoint: give one endpoint per handler, in order"
        )
    for endpoint in endpoints:
        EndpointId.parse(endpoint)
    for plane in ("tcp", "http"):
        for name, value in (("host", host), ("port", port)):
            if value is not None:
                chosen.setdefault(f"{plane}.{name}", value)
    arguments = manager_arguments(chosen)
    loaded = [load_handler(text) for text in handlers]
    forced = run_async(_serve(list(zip(endpoints, loaded, strict=True)), arguments, grace, as_json))
    if forced:
        # Blocking handlers may still run in threads that the interpreter would wait for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def load_handler(text: str) -> Callable[..., Any]:
    """Import ``module:name`` (dots in the name allowed). Raises `click.UsageError` if there is no such thing.

    An exception that the module itself raises goes through with its traceback: it is the user's code that failed.
    """
    module_name, colon, path = text.partition(":")
    if not (module_name and colon and path):
        raise click.UsageError(f"expected MODULE:HANDLER, got {text!r}")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise click.UsageError(f"no module {error.name!r} (searched {directory} and the Python path)") from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            import difflib

            close = difflib.get_close_matches(name, [n for n in dir(found) if not n.startswith("_")], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"{module_name!r} has no {path!r}{hint}") from None
    if not callable(found):
        raise click.UsageError(f"{text} is not callable, but {type(found).__name__}")
    handler: Callable[..., Any] = found
    return handler


async def _serve(pairs: list[tuple[str, Callable[..., Any]]], arguments: dict[str, Any], grace: float, as_json: bool) -> bool:
    """Serve until a signal, then drain. Returns whether a second signal forced the end."""
    from dynwire import AsyncNetworkManager

    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    # before anything is registered: a supervisor may stop us while we start
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)

    manager = AsyncNetworkManager(**arguments)
    services = []
    try:
        for endpoint, handler in pairs:
            services.append(await manager.endpoint(endpoint).serve(handler))
            _announce(services[-1].instance, as_json)
        await first.wait()
    except BaseException:
        await manager.close()
        raise
    if not as_json:
        click.echo(f"draining, up to {grace:g} s; a second signal ends at once", err=True)
    closing = asyncio.ensure_future(manager.close(grace))
    forcing = asyncio.ensure_future(second.wait())
    await asyncio.wait((closing, forcing), return_when=asyncio.FIRST_COMPLETED)
    if second.is_set():
        # a grace of 0 ends the patience of the drain that is running
        hurrying = [asyncio.ensure_future(service.drain(grace=0.0)) for service in services]
        await asyncio.wait((closing, *hurrying), timeout=FORCED_CLOSE_S)
        return True
    forcing.cancel()
    closing.result()
    return False


def _announce(instance: Instance, as_json: bool) -> None:
    shown = {
        "event": "serving",
        "endpoint": instance.path,
        "instance": hex_id(instance.id),
        "plane": instance.plane,
        "address": instance.address,
        "pid": os.getpid(),
    }
    text = "serving {endpoint} on {plane} at {address} (instance {instance}, pid {pid})"
    if system_address() is not None:
        shown["system"] = system_address()
        text = text.removesuffix(")") + ", system port {system})"
    click.echo(to_json(shown) if as_json else text.format(**shown))
    # whoever started us may be waiting for this line on a pipe
    sys.stdout.flush()
