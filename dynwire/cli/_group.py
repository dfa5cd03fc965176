"""The group of all commands and the mapping of what they raise to exit codes."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence

import click

from ..errors import DynwireError
from ._common import exit_code, print_error

COMMANDS = {
    "bench": "Measure calls per second and latency of an endpoint.",
    "call": "Send one request and print the reply.",
    "config": "Show the settings and where they come from.",
    "demo": "Serve a model, call endpoints, kill workers: see it all work in a few seconds.",
    "doctor": "Check installation, settings, discovery and NATS, and say what to do.",
    "load": "Load on an OpenAI-compatible server, and a table of latencies.",
    "ls": "List the instances that discovery knows.",
    "replay": "Send the durable requests of a time range once more.",
    "nats": "Run a nats-server for development.",
    "serve": "Serve handlers until SIGINT or SIGTERM.",
    "tail": "Print KV cache events as workers publish them.",
    "tree": "Show what the workers of an endpoint have cached, and share.",
}
"""Name -> help in one line. It stands here so that ``dynwire --help`` imports no command."""


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f".{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"no command {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("dynwire")
        except PackageNotFoundError:  # run from a source tree that is not installed
            import dynwire

            found = getattr(dynwire, "__version__", "unknown")
        click.echo(f"dynwire {found}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version.")
@click.option("-v", "--verbose", count=True, help="Log more to stderr: -v INFO, -vv DEBUG.")
def group(verbose: int) -> None:
    """Carry requests between the services of an inference deployment.

    Settings come from options, DYN_* variables and a TOML file; `dynwire config show --origin` lists them all.
    """
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="dynwire: %(levelname)s: %(message)s")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Errors of dynwire and of click end as a line on stderr."""
    try:
        # what a command returns in this mode is the argument of ctx.exit(), or its own return value
        result = group.main(None if arguments is None else list(arguments), prog_name="dynwire", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except DynwireError as error:  # outside of a command's own handling, for example in a callback of an option
        print_error(error, as_json=False)
        return exit_code(error)
    return result if isinstance(result, int) else 0
