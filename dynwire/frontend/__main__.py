"""``python -m dynwire.frontend``: the OpenAI-compatible frontend."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ..config import load_config
from ..workers.flags import KV_SWITCHES, add_flags
from ..workers.process import run_process

FLAGS: dict[str, tuple[str, ...]] = {
    "system.http_port": ("--http-port",),
    "frontend.host": ("--http-host",),
    "frontend.server": ("--http-server",),
    "frontend.namespace": ("--namespace",),
    "request_plane": ("--request-plane",),
    "router.mode": ("--router-mode",),
    "router.kv_overlap_score_weight": ("--kv-overlap-score-weight",),
    "router.temperature": ("--router-temperature",),
    "router.kv_cache_block_size": ("--kv-cache-block-size",),
    "frontend.migration_limit": ("--migration-limit",),
    "frontend.max_in_flight": ("--max-in-flight",),
    "frontend.busy_threshold": ("--busy-threshold",),
    "frontend.retry_after": ("--retry-after",),
    "frontend.body_limit_mb": ("--body-limit-mb",),
    "frontend.request_timeout": ("--request-timeout",),
    "frontend.grace": ("--grace",),
    "frontend.api_key_file": ("--api-key-file",),
}
"""Setting to its flag with a value; the keys themselves are no flag, because command lines are seen by everybody."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m dynwire.frontend",
        description="OpenAI-compatible HTTP frontend for the models that workers of this deployment serve. Everything else about "
        "the network comes from DYN_* variables (dynwire config show).",
    )
    add_flags(made, FLAGS, KV_SWITCHES)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for an operation that failed or was forced to end, 2 for wrong settings."""
    given = vars(parser().parse_args(argv))
    verbose = given.pop("verbose")
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def run() -> bool:
        from .server import serve

        return await serve(load_config(cli=given))

    return run_process("dynwire.frontend", run)


if __name__ == "__main__":
    sys.exit(main())
