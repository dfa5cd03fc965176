"""``python -m dynwire.router``: a KV-aware router as a service."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from ..config import Config, load_config
from ..manager import AsyncNetworkManager
from ..system import announcement
from ..types import EndpointId
from ..workers.flags import KV_SWITCHES, add_flags
from ..workers.process import DEFAULT_GRACE_S, Signals, run_process
from .service import SUFFIX, RouterService

FLAGS: dict[str, tuple[str, ...]] = {
    "request_plane": ("--request-plane",),
    "router.kv_overlap_score_weight": ("--kv-overlap-score-weight",),
    "router.temperature": ("--router-temperature",),
    "router.kv_cache_block_size": ("--block-size", "--kv-cache-block-size"),
    "router.booking_ttl": ("--booking-ttl",),
}
"""Setting to its flags with a value; those that the frontend has are called as there"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m dynwire.router",
        description="Answer which worker of an endpoint a prompt should go to, by what the workers have cached and are busy "
        "with, and take requests there. Everything else about the network comes from DYN_* variables (dynwire config show).",
    )
    made.add_argument("--endpoint", required=True, metavar="NS.C.E", help="endpoint of the workers")
    made.add_argument(
        "--component", metavar="NAME", help=f"component to serve as [default: that of the workers with {SUFFIX} behind it]"
    )
    made.add_argument(
        "--grace",
        type=float,
        default=DEFAULT_GRACE_S,
        metavar="SECONDS",
        help=f"how long a shutdown waits for requests in flight [default: {DEFAULT_GRACE_S:g}]",
    )
    add_flags(made, FLAGS, KV_SWITCHES)
    return made


async def serve(config: Config, endpoint: str, component: str | None, grace: float) -> bool:
    """Serve until a signal comes, then drain; whether a second signal forced the end. Raises `DynwireError`."""
    signals = Signals()
    manager = AsyncNetworkManager(config=config)
    router = RouterService(manager, EndpointId.parse(endpoint), None, component, config.router.booking_ttl)
    try:
        await router.start()
        served = router.services["generate"].instance
        where = f"{served.namespace}.{served.component} on {served.plane} at {served.address}"
        # whoever started us may be waiting for this line on a pipe
        print(f"routing {router.endpoint} as {where} (pid {os.getpid()}{announcement()})", flush=True)
        await signals.first.wait()
        print(f"draining, up to {grace:g} s; a second signal ends at once", file=sys.stderr, flush=True)
        return await signals.drain(list(router.services.values()), [manager], grace)
    finally:
        await router.close()
        await manager.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for an operation that failed or was forced to end, 2 for wrong settings."""
    given = vars(parser().parse_args(argv))
    endpoint, component, grace = given.pop("endpoint"), given.pop("component"), given.pop("grace")
    level = logging.INFO if given.pop("verbose") else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def run() -> bool:
        return await serve(load_config(cli=given), endpoint, component, grace)

    return run_process("dynwire.router", run)


if __name__ == "__main__":
    sys.exit(main())
