"""``dynwire tree``."""

from __future__ import annotations

import time
from typing import Any

import click

from ..types import EndpointId
from . import tables
from ._common import Command, hex_id, json_option, run_async, settings_options, to_json, tool_config

TIMEOUT_S = 10.0


@click.command(name="tree", cls=Command)
@click.argument("endpoint")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=TIMEOUT_S, metavar="SECONDS", show_default=True,
              help="For the answer of each worker.")  # fmt: skip
@json_option
@settings_options
def command(endpoint: str, timeout: float, as_json: bool, chosen: dict[str, object]) -> None:
    """Show what the workers of ENDPOINT (namespace.component.endpoint) have cached, and share.

    Asks every worker for its own tree, as a router does that sees it first. BYTES is what its blocks take in a router's index;
    SHARED are blocks that another worker has too, MOST WITH the one that has the most of them. Exit code 1 if a worker does not
    answer, or nobody publishes.
    """
    path = EndpointId.parse(endpoint)
    from ..kv_router.inspection import Overlaps, WorkerTree, events_endpoint, worker_trees
    from ..manager import AsyncNetworkManager

    async def look() -> list[WorkerTree]:
        async with AsyncNetworkManager(config=tool_config(chosen)) as manager:
            return await worker_trees(manager, path, timeout)

    trees = run_async(look())
    if not trees:
        click.echo(
            f"no worker of {path.namespace}.{path.component} publishes KV events (nobody serves {events_endpoint(path)}; workers "
            "do with DYN_EVENT_PLANE set)",
            err=True,
        )
        click.get_current_context().exit(1)
    overlaps = Overlaps(trees)
    rows = [_row(trees, overlaps, number) for number in range(len(trees))]
    if as_json:
        summary = {"workers": rows, "blocks": sum(row["blocks"] for row in rows), "different_blocks": overlaps.different}
        click.echo(to_json(summary))
    else:
        _show(rows, overlaps.different)
    for row in rows:
        if row["error"]:
            click.echo(f"dynwire: worker {row['instance']} rank {row['dp_rank']}: {row['error']}", err=True)
    if any(row["error"] for row in rows):
        click.get_current_context().exit(1)


def _row(trees: list[Any], overlaps: Any, number: int) -> dict[str, Any]:
    tree = trees[number]
    worker_id, rank = tree.worker
    common = {
        f"{hex_id(other.worker[0])}/{other.worker[1]}": overlaps.common(number, at)
        for at, other in enumerate(trees)
        if at != number
    }
    return {
        "worker_id": worker_id,
        "instance": hex_id(worker_id),
        "dp_rank": rank,
        "block_size": tree.block_size,
        "blocks": len(overlaps.blocks[number]),
        "bytes": tree.nbytes,
        "shared": overlaps.shared(number),
        "common": common,
        "events": tree.last_id,
        "since": tree.epoch / 1e9,
        "error": tree.error or None,
    }


def _show(rows: list[dict[str, Any]], different: int) -> None:
    body: list[tuple[object, ...]] = []
    for row in rows:
        if row["error"]:
            body.append((row["instance"], row["dp_rank"], None, None, None, None, None, None))
            continue
        most = max(row["common"].items(), key=lambda item: item[1], default=("", 0))
        share = f"{row['shared']} ({100 * row['shared'] / row['blocks']:.0f} %)" if row["blocks"] else "0"
        body.append(
            (
                row["instance"],
                row["dp_rank"],
                row["blocks"],
                row["bytes"],
                share,
                f"{most[0]} ({most[1]})" if most[1] else None,
                row["events"],
                tables.age(time.time() - row["since"]),
            )
        )
    click.echo(tables.render(("WORKER", "RANK", "BLOCKS", "BYTES", "SHARED", "MOST WITH", "EVENTS", "AGE"), body))
    total = sum(row["blocks"] for row in rows)
    click.echo(f"\n{total} blocks, {different} different ones")
