"""``dynwire config show``."""

from __future__ import annotations

import click

from ..config import describe, load_config
from . import tables
from ._common import Command, json_option, settings_options, to_json


@click.group(name="config")
def command() -> None:
    """Show the settings and where they come from."""


@command.command(name="show", cls=Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--origin", is_flag=True, help="Also where each value comes from, and its variable.")
@click.option("--doc", is_flag=True, help="Also what each setting means.")
@json_option
@settings_options
def show(names: tuple[str, ...], origin: bool, doc: bool, as_json: bool, chosen: dict[str, object]) -> None:
    """Print the value of every setting, or of those whose name contains NAME. Secrets are masked."""
    rows = [
        row
        for row in describe(load_config(cli=chosen))
        if not names or any(name in (row.name, row.env) or name in row.name for name in names)
    ]
    if not rows:
        raise click.UsageError(f"no setting's name contains {' or '.join(map(repr, names))}")
    if as_json:
        click.echo(to_json([row._asdict() for row in rows]))
        return
    headers = ["SETTING", "VALUE"]
    if origin:
        headers += ["ORIGIN", "VARIABLE"]
    if doc:
        headers += ["MEANING"]
    body = []
    for row in rows:
        line: list[object] = [row.name, _value(row.value, row.unit, row.default)]
        if origin:
            line += [row.origin, row.env]
        if doc:
            line += [row.doc]
        body.append(line)
    click.echo(tables.render(headers, body))


def _value(value: object, unit: str, default: object) -> str:
    if value is None:
        # None is what a computed default looks like before it is computed; say what will happen instead
        return f"({default})" if isinstance(default, str) else "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text} {unit}" if unit else text
