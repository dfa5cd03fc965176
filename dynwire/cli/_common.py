"""What the commands share: options, settings, errors on stderr, output of values."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
import msgspec

from ..config import Config, load_config
from ..errors import ConfigError, DynwireError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


# Errors ----------------------------------------------------------------------------------------------------------------------


def exit_code(error: DynwireError) -> int:
    """2 for wrong settings, 1 for an operation that failed."""
    return 2 if isinstance(error, ConfigError) else 1


def describe_error(error: DynwireError) -> str:
    """One line: class, message and the fields that matter for it."""
    shown = []
    skip = ("name", "value", "allowed", "message") if isinstance(error, ConfigError) else ("message",)
    general = () if isinstance(error, ConfigError) else ("phase", "peer", "sent", "request_id")
    for name in (*general, *error.own_fields):
        value = getattr(error, name)
        if name not in skip and value not in (None, ""):
            shown.append(f"{name}={value}")
    text = " ".join(str(error).split())
    fields = f" [{', '.join(shown)}]" if shown else ""
    return f"{type(error).__name__}: {text}{fields}"


def print_error(error: DynwireError, as_json: bool) -> None:
    """To stderr, so that stdout holds nothing but replies."""
    click.echo(to_json({"error": error.to_dict()}) if as_json else f"dynwire: {describe_error(error)}", err=True)


class Command(click.Command):
    """A command whose typed errors become one line on stderr, or JSON if it was called with ``--json``."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DynwireError as error:
            print_error(error, bool(ctx.params.get("as_json")))
            ctx.exit(exit_code(error))


# Options ---------------------------------------------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def settings_options(function: F) -> F:
    """Add the options for settings; the command gets them as one argument ``chosen``: setting -> value."""

    # --plane is no click.Choice: a wrong value must give the same text here as everywhere else (DESIGN §3)
    @click.option("--plane", metavar="PLANE", help="Request plane: tcp, http or nats.  [DYN_REQUEST_PLANE]")
    @click.option("--discovery", metavar="BACKEND", help="mem, file, etcd or nats.  [DYN_DISCOVERY_BACKEND]")
    @click.option("--discovery-dir", metavar="DIR", help="Directory of the file discovery.  [DYN_FILE_KV]")
    @click.option("--config", "config_file", metavar="FILE", help="TOML file with settings.  [DYNWIRE_CONFIG]")
    @click.option("--set", "pairs", metavar="NAME=VALUE", multiple=True, help="Any setting, for example tcp.pool_size=4.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        plane: str | None,
        discovery: str | None,
        discovery_dir: str | None,
        config_file: str | None,
        pairs: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        chosen: dict[str, object] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise click.UsageError(f"--set needs NAME=VALUE, got {pair!r}")
            chosen[name] = value
        named = {
            "request_plane": plane,
            "discovery": discovery,
            "discovery_file_dir": discovery_dir,
            "config_file": config_file,
        }
        chosen.update({name: value for name, value in named.items() if value is not None})
        return function(*args, chosen=chosen, **kwargs)

    return wrapper  # type: ignore[return-value]  # click calls it by keyword; the wrapped signature differs on purpose


def manager_arguments(chosen: dict[str, object]) -> dict[str, Any]:
    """Keywords for a manager with the settings of this command line; raises `ConfigError`."""
    return {"config": load_config(cli=chosen)}


def tool_config(chosen: dict[str, object]) -> Config:
    """Settings of a command that only looks or calls: it often shares a worker's environment, and leaves it its system port.

    Raises `ConfigError`.
    """
    return load_config(cli={"system.system_port": "off", **chosen})


# Event loop ------------------------------------------------------------------------------------------------------------------


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's if it is installed, otherwise None: the standard one."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on the fastest loop there is."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(coroutine)


# Values ----------------------------------------------------------------------------------------------------------------------


def to_json(value: object) -> str:
    """JSON on one line; what JSON has no form for becomes text."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def read_data(text: str | None) -> bytes | None:
    """The bytes that a DATA argument means: ``-`` reads stdin, ``@file`` a file. Usage error if the file cannot be read."""
    if text is None:
        return None
    if text == "-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                return file.read()
        except OSError as error:
            raise click.UsageError(f"cannot read {text[1:]!r}: {error.strerror}") from error
    return text.encode("utf-8", "surrogateescape")


def parse_payload(data: bytes | None, raw: bool) -> Any:
    """What to send: the bytes themselves, JSON if it parses, otherwise text; None without data."""
    if raw:
        return data or b""
    if data is None:
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"the data is neither JSON nor UTF-8 text ({error.reason} at byte {error.start}); send it with --raw"
        ) from error


def parse_headers(pairs: tuple[str, ...]) -> dict[str, str] | None:
    """``k=v`` pairs as a dict; usage error without an ``=``."""
    headers = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--header needs NAME=VALUE, got {pair!r}")
        headers[name] = value
    return headers or None


def hex_id(instance_id: int) -> str:
    """How instance ids are written everywhere: 16 hexadecimal digits."""
    return f"{instance_id:016x}"
