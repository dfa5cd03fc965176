"""``python -m dynwire.mocker``: simulated workers in one process."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, load_config
from ..errors import ConfigError
from ..system import announcement
from ..types import EndpointId
from ..wire.kv_events import as_cache_event
from ..workers.card import EngineLimits, ModelCard, find_model
from ..workers.events import KV_EVENTS_CHOICES, KV_EVENTS_HELP, publishes_kv_events
from ..workers.process import DEFAULT_GRACE_S, Signals, run_process
from ..workers.protocol import EngineRequest
from . import TINY_MODEL
from .scheduler import EngineConfig
from .timing import Timing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..kv_router.publisher import KvEventPublisher

DEFAULT_ENDPOINT = "dynwire.backend.generate"
METRICS_ENDPOINT = "engine_metrics"
DEFAULTS = EngineConfig()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m dynwire.mocker",
        description="Serve a model with a simulated engine: it schedules, caches and answers like one, without weights and "
        "without a GPU. The request plane and everything else about the network comes from DYN_* variables "
        "(dynwire config show).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--model", "--model-path", default=str(TINY_MODEL), metavar="DIR",
        help="model directory or hub name, of which tokenizer and chat template are used")  # fmt: skip
    add("--model-name", metavar="NAME", help="what callers call the model; otherwise the directory's name")
    add("--endpoint", default=DEFAULT_ENDPOINT, metavar="NS.C.E", help="endpoint to serve")
    add("--num-workers", type=_count, default=1, metavar="N", help="workers in this process, each an instance of its own")
    add("--request-plane", metavar="PLANE", help="tcp, http or nats, instead of DYN_REQUEST_PLANE")
    add("--grace", type=float, default=DEFAULT_GRACE_S, metavar="SECONDS",
        help="how long a shutdown waits for requests in flight; a second signal ends it")  # fmt: skip

    engine = made.add_argument_group("engine")
    add = engine.add_argument
    add("--num-gpu-blocks-override", "--num-blocks", dest="num_blocks", type=_count, default=DEFAULTS.num_blocks, metavar="N",
        help="blocks of the KV cache, per rank")  # fmt: skip
    add("--block-size", type=_count, default=DEFAULTS.block_size, metavar="TOKENS", help="tokens per block")
    add("--max-num-seqs", type=_count, default=DEFAULTS.max_num_seqs, metavar="N", help="sequences that run at once")
    add("--max-num-batched-tokens", type=_count, default=DEFAULTS.max_num_batched_tokens, metavar="N",
        help="new tokens per step")  # fmt: skip
    add("--max-model-len", type=_count, metavar="TOKENS", help="prompt and answer together, at most what the model says")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="reuse blocks of equal prefixes")
    add("--enable-chunked-prefill", action=argparse.BooleanOptionalAction, default=True,
        help="let a long prompt be read in several steps")  # fmt: skip
    add("--data-parallel-size", "--dp-size", dest="dp_size", type=_count, default=1, metavar="N",
        help="ranks per worker, each with a scheduler and a cache")  # fmt: skip

    add("--kv-events", choices=KV_EVENTS_CHOICES, default="auto", help=KV_EVENTS_HELP)

    simulation = made.add_argument_group("simulation")
    add = simulation.add_argument
    add("--speedup-ratio", type=float, default=1.0, metavar="X", help="simulated seconds per second")
    add("--timing", type=_timing, default=Timing(), metavar="NAME=SECONDS,…",
        help="coefficients of a step's time: base, per_token, attention, cache_read (docs/mocker.md)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of what is answered; equal on workers that serve the same model")
    add("--ends", choices=("open", "always", "never"), default="open",
        help="whether an answer may end by itself: if the request sets no max_tokens, always, never")  # fmt: skip
    return made


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _timing(text: str) -> Timing:
    values: dict[str, float] = {}
    for pair in text.split(","):
        name, equals, value = pair.strip().partition("=")
        if not equals or name not in Timing.__slots__:
            raise argparse.ArgumentTypeError(f"{pair!r} is none of {', '.join(f'{n}=SECONDS' for n in Timing.__slots__)}")
        values[name] = float(value)
        if not 0 <= values[name] < 3600:
            raise argparse.ArgumentTypeError(f"{pair!r} is not from 0 to 3600")
    return Timing(**values)


async def serve(arguments: argparse.Namespace) -> bool:
    """Serve until a signal comes, then drain; whether a second signal forced the end. Raises `DynwireError`."""
    from dynwire import AsyncNetworkManager

    from ..kv_router.publisher import KvEventPublisher
    from ..workers.serve import ModelService, serve_model

    signals = Signals()
    config = load_config(cli={"request_plane": arguments.request_plane})
    endpoint = EndpointId.parse(arguments.endpoint)
    directory = find_model(arguments.model)
    name = arguments.model_name or ("tiny" if directory == TINY_MODEL else directory.name)
    card = ModelCard.from_directory(directory, name, block_size=arguments.block_size)
    length = min(arguments.max_model_len or card.context_length, card.context_length)
    try:
        sizes = EngineConfig(
            num_blocks=arguments.num_blocks,
            block_size=arguments.block_size,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_model_len=length,
            enable_prefix_caching=arguments.enable_prefix_caching,
            enable_chunked_prefill=arguments.enable_chunked_prefill,
            timing=arguments.timing,
        )
    except ValueError as error:
        raise ConfigError(str(error), name="mocker") from error
    limits = EngineLimits(sizes.num_blocks, sizes.max_num_seqs, sizes.max_num_batched_tokens, arguments.dp_size)
    card = ModelCard.from_directory(directory, name, block_size=sizes.block_size, context_length=sizes.limit, limits=limits)

    tokenizer = _tokenizer(directory)
    from .engine import Engine
    from .worker import Mocker, storyteller

    text = storyteller(lambda line: tokenizer.encode(line, add_special_tokens=False).ids, arguments.seed)
    managers: list[AsyncNetworkManager] = []
    services: list[ModelService] = []
    engines: list[Engine] = []
    publishers: list[KvEventPublisher] = []
    with_events = publishes_kv_events(arguments.kv_events, config)
    try:
        for number in range(arguments.num_workers):
            manager = AsyncNetworkManager(config=config if number == 0 else _on_free_ports(config))
            managers.append(manager)
            try:
                sink = partial(_publish, publishers, number) if with_events else None
                engine = Engine(sizes, text, speedup=arguments.speedup_ratio, dp_size=arguments.dp_size, sink=sink)
            except ValueError as error:
                raise ConfigError(str(error), name="mocker") from error
            engines.append(engine)
            mocker = Mocker(engine, card.eos_token_ids, arguments.ends)
            metrics = EndpointId(endpoint.namespace, endpoint.component, METRICS_ENDPOINT)
            await manager.endpoint(metrics).serve(mocker.metrics)
            service = await serve_model(manager, endpoint, card, mocker.generate, request_type=EngineRequest)
            services.append(service)
            if with_events:
                publisher = KvEventPublisher(
                    manager, endpoint.namespace, endpoint.component, service.worker_id, sizes.block_size, arguments.dp_size
                )
                publishers.append(publisher)
                await publisher.start()
            engine.identify(service.worker_id)
            found = service.generate.instance
            where = f"{found.path} on {found.plane} at {found.address}"
            # whoever started us may be waiting for this line on a pipe
            print(f"serving {card.name} as {where} (instance {found.id:016x}, pid {os.getpid()}{announcement()})", flush=True)
        await signals.first.wait()
        print(f"draining, up to {arguments.grace:g} s; a second signal ends at once", file=sys.stderr, flush=True)
        return await signals.drain(services, managers, arguments.grace)
    finally:
        for publisher in publishers:
            await publisher.close()
        await asyncio.gather(*(manager.close() for manager in managers))
        for engine in engines:
            engine.close()


def _publish(publishers: list[KvEventPublisher], number: int, event: dict[str, Any]) -> None:
    """Sink of the engine with this number: its events wait until it has its id, and then there is a publisher."""
    publishers[number].publish(as_cache_event(event["event"]))


def _on_free_ports(config: Config) -> Config:
    """For the second worker of a process and those after it: the configured port is taken by the first."""
    return replace(config, tcp=replace(config.tcp, port=0), http=replace(config.http, port=0))


def _tokenizer(directory: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError("the simulated engine needs tokenizers: pip install 'dynwire[mocker]'", name="model") from error
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return run_process("dynwire.mocker", lambda: serve(arguments))


if __name__ == "__main__":
    sys.exit(main())
