"""``dynwire ls``."""

from __future__ import annotations

import time

import click

from ..config import load_config
from . import tables
from ._common import Command, hex_id, json_option, settings_options, to_json


@click.command(name="ls", cls=Command)
@click.argument("prefix", metavar="[PREFIX]", default="")
@json_option
@settings_options
def command(prefix: str, as_json: bool, chosen: dict[str, object]) -> None:
    """List the instances that discovery knows, or those whose endpoint begins with PREFIX."""
    from dynwire import NetworkManager

    config = load_config(cli=chosen)
    with NetworkManager(config=config) as manager:
        instances = sorted(manager.list_instances(), key=lambda i: (i.path, i.started_at, i.id))
    instances = [i for i in instances if i.path.startswith(prefix.removeprefix("dyn://"))]
    now = time.time()
    if as_json:
        rows = [
            {
                "endpoint": i.path,
                "instance": hex_id(i.id),
                "plane": i.plane,
                "address": i.address,
                "age": round(max(0.0, now - i.started_at), 3),
                "started_at": i.started_at,
                "wire": i.wire,
                "codecs": i.codecs,
                "metadata": i.metadata,
            }
            for i in instances
        ]
        click.echo(to_json(rows))
        return
    if not instances:
        where = f" in {config.discovery.file_dir}" if config.discovery.backend == "file" else ""
        click.echo(f"no instances (discovery: {config.discovery.backend}{where})", err=True)
        return
    body = [(i.path, hex_id(i.id), i.plane, i.address, tables.age(now - i.started_at)) for i in instances]
    click.echo(tables.render(("ENDPOINT", "INSTANCE", "PLANE", "ADDRESS", "AGE"), body))
