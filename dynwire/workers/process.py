"""The life of a worker process: signals, draining, and errors as one line."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from ..errors import ConfigError, DynwireError

FORCED_CLOSE_S = 1.0
"""after a second signal: what closing may take before the process just goes"""

DEFAULT_GRACE_S = 30.0


class Drainable(Protocol):
    async def drain(self, grace: float = ...) -> int: ...


class Closable(Protocol):
    def close(self, grace: float = ...) -> Awaitable[object]: ...


class Signals:
    """SIGINT and SIGTERM: the first one asks for an end in order, the second one for the end. Made on the running loop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    async def drain(self, services: Sequence[Drainable], managers: Sequence[Closable], grace: float = DEFAULT_GRACE_S) -> bool:
        """After the first signal: deregister, let requests finish within ``grace`` seconds, close. Whether a second one came."""

        async def close() -> None:
            await asyncio.gather(*(service.drain(grace) for service in services))
            await asyncio.gather(*(manager.close() for manager in managers))

        closing, forcing = asyncio.ensure_future(close()), asyncio.ensure_future(self.second.wait())
        await asyncio.wait((closing, forcing), return_when=asyncio.FIRST_COMPLETED)
        if self.second.is_set():
            # a grace of 0 ends the patience of the drain that is running
            hurrying = [asyncio.ensure_future(service.drain(0.0)) for service in services]
            await asyncio.wait((closing, *hurrying), timeout=FORCED_CLOSE_S)
            return True
        forcing.cancel()
        closing.result()
        return False


def run_process(name: str, main: Callable[[], Coroutine[Any, Any, bool]]) -> int:
    """Run a worker's ``main`` on the fastest loop there is; what it returns says whether the end was forced.

    Returns the exit code: 0, 1 for an operation that failed, 2 for wrong settings. A `DynwireError` becomes one line on stderr.
    """
    factory = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            forced = runner.run(main())
    except DynwireError as error:
        text = " ".join(str(error).split())
        print(f"{name}: {type(error).__name__}: {text}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if forced:
        # blocking handlers may still run in threads that the interpreter would wait for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 0
