"""``python -m dynwire.vllm``: vLLM as a worker."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import load_config
from ..errors import ConfigError, DynwireError
from ..types import EndpointId
from ..workers.card import EngineLimits, ModelCard, find_model
from ..workers.events import KV_EVENTS_CHOICES, KV_EVENTS_HELP, publishes_kv_events
from ..workers.process import DEFAULT_GRACE_S, Signals, run_process
from ..workers.protocol import EngineRequest
from .engine import engine_config, engine_death, require_vllm, start_engine, stop_engine

DEFAULT_ENDPOINT = "dynwire.backend.generate"


def parser() -> argparse.ArgumentParser:
    """vLLM's flags and ours. Imports vLLM."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made: argparse.ArgumentParser = FlexibleArgumentParser(
        prog="python -m dynwire.vllm",
        description="Serve a model with vLLM. All flags of vLLM's engine are taken; the request plane and everything else about "
        "the network comes from DYN_* variables (dynwire config show).",
    )
    own = made.add_argument_group("dynwire")
    add = own.add_argument
    add("--endpoint", default=DEFAULT_ENDPOINT, metavar="NS.C.E", help=f"endpoint to serve (default: {DEFAULT_ENDPOINT})")
    add("--request-plane", metavar="PLANE", help="tcp, http or nats, instead of DYN_REQUEST_PLANE")
    add("--kv-events", choices=KV_EVENTS_CHOICES, default="auto", help=KV_EVENTS_HELP)
    add(
        "--grace",
        type=float,
        default=DEFAULT_GRACE_S,
        metavar="SECONDS",
        help=f"how long a shutdown waits for requests in flight; a second signal ends it (default: {DEFAULT_GRACE_S:g})",
    )
    AsyncEngineArgs.add_cli_args(made)
    return made


async def serve(arguments: argparse.Namespace) -> bool:
    """Serve until a signal comes, then drain; whether a second signal forced the end. Raises `DynwireError`."""
    from dynwire import AsyncNetworkManager

    from ..kv_router.publisher import KvEventPublisher
    from ..workers.serve import serve_model
    from .events import EventSocket, Translator
    from .guard import Guard
    from .worker import VllmWorker

    signals = Signals()
    config = load_config(cli={"request_plane": arguments.request_plane})
    endpoint = EndpointId.parse(arguments.endpoint)
    name, directory = _model(arguments)
    if arguments.kv_events_config is not None:
        raise ConfigError(
            "dynwire.vllm sets vLLM's --kv-events-config itself: say --kv-events on or off, and where to with DYN_EVENT_PLANE",
            name="kv-events-config",
        )
    ranks = arguments.data_parallel_size
    with_events = publishes_kv_events(arguments.kv_events, config) and arguments.enable_prefix_caching is not False
    events = EventSocket(ranks) if with_events else None
    guard = Guard()
    publisher: KvEventPublisher | None = None
    manager: AsyncNetworkManager | None = None
    llm: Any = None
    forced = False
    try:
        args, engine = engine_config(arguments, events.endpoint if events is not None else None)
        llm = await start_engine(args, engine, signals.first, guard)
        if llm is None:
            return False
        block_size, blocks = engine.cache_config.block_size, engine.cache_config.num_gpu_blocks
        scheduler = engine.scheduler_config
        per_rank = blocks // ranks if blocks else None
        card = ModelCard.from_directory(
            directory,
            name,
            block_size=block_size,
            context_length=engine.model_config.max_model_len,
            limits=EngineLimits(per_rank, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, ranks),
        )
        worker = VllmWorker(llm)
        manager = AsyncNetworkManager(config=config)
        service = await serve_model(
            manager,
            endpoint,
            card,
            worker.generate,
            request_type=EngineRequest,
            metadata={"dp_size": ranks},
            max_in_flight=scheduler.max_num_queued_reqs,
        )
        if events is not None:
            publisher = KvEventPublisher(manager, endpoint.namespace, endpoint.component, service.worker_id, block_size, ranks)
            await publisher.start()
            events.relay(Translator(publisher, block_size))
        found = service.generate.instance
        where = f"{found.path} on {found.plane} at {found.address}"
        # whoever started us may be waiting for this line on a pipe
        print(f"serving {card.name} as {where} (instance {found.id:016x}, pid {os.getpid()})", flush=True)

        death = asyncio.ensure_future(engine_death(llm, worker.engine_dead))
        signalled = asyncio.ensure_future(signals.first.wait())
        await asyncio.wait((death, signalled), return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if death.done():
            death.result()
            await service.drain(0.0)  # callers see a lost worker, and may go on with another one
            raise DynwireError(
                f"vLLM's engine has died; its log above says why. {card.name} is not served here any more", phase="engine"
            )
        print(f"draining, up to {arguments.grace:g} s; a second signal ends at once", file=sys.stderr, flush=True)
        draining = asyncio.ensure_future(signals.drain([service], [manager], arguments.grace))
        await asyncio.wait((draining, death), return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await service.drain(0.0)
        death.cancel()
        forced = await draining
        return forced
    finally:
        if publisher is not None:
            await publisher.close()
        if manager is not None:
            await manager.close()
        if llm is not None and not forced:
            await stop_engine(llm)
        guard.close()  # after a second signal, this is what ends the engine
        if events is not None:
            await events.close()


def _model(arguments: argparse.Namespace) -> tuple[str, Path]:
    """What callers call the model, and the directory with its tokenizer. Raises `ConfigError`."""
    names = arguments.served_model_name
    if isinstance(names, list):
        if len(names) > 1:
            raise ConfigError(
                f"a worker serves a model under one name, not {len(names)}: start one worker per name",
                name="served-model-name", value=names,
            )  # fmt: skip
        names = names[0] if names else None
    directory = find_model(arguments.tokenizer or arguments.model)
    local = Path(arguments.model).expanduser()
    return names or (local.resolve().name if local.is_dir() else arguments.model), directory


def main(argv: Sequence[str] | None = None) -> int:
    try:
        require_vllm()
        arguments = parser().parse_args(argv)
    except ConfigError as error:
        print(f"dynwire.vllm: ConfigError: {error}", file=sys.stderr)
        return 2
    return run_process("dynwire.vllm", lambda: serve(arguments))


if __name__ == "__main__":
    sys.exit(main())
