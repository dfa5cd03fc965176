"""A served endpoint: `AsyncService` for asyncio code, `Service` for threads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .errors import ForkedManager, ManagerClosed
from .runtime import LINGER_S, LoopRuntime, Registration
from .types import Instance

if TYPE_CHECKING:
    from .manager import NetworkManager

DEFAULT_GRACE_S = 30.0


class _Service:
    def __init__(self, runtime: LoopRuntime, registration: Registration) -> None:
        self._runtime = runtime
        self._registration = registration
        self._forked = False

    @property
    def instance(self) -> Instance:
        """The record in discovery: id, address, metadata."""
        return self._registration.instance

    @property
    def ready(self) -> bool:
        """True until draining begins."""
        return self._registration.ready and not self._runtime.closed

    @property
    def in_flight(self) -> int:
        """Requests of this endpoint that are running."""
        return 0 if self._runtime.closed else self._runtime.server().in_flight(self._registration.path)

    def _check_not_forked(self) -> None:
        if self._forked:
            raise ForkedManager(f"{self._registration.path} is served by the parent process, which this one was forked from")

    def __repr__(self) -> str:
        state = "ready" if self.ready else "drained"
        return f"<{type(self).__name__} {self._registration.path} {self.instance.id:016x} {state}>"


class AsyncService(_Service):
    """One endpoint that this process serves. Leaving ``async with`` drains it with the default grace."""

    async def drain(self, grace: float = DEFAULT_GRACE_S) -> int:
        """Stop serving gently and return how many requests had to be killed.

        Not ready, deregister, keep accepting for a moment (``LINGER_S``, within the grace), wait for what is in flight, kill
        what is left after ``grace`` seconds. May be called from any event loop, and again: with a grace of 0 a second call
        ends the first one's patience.
        """
        self._check_not_forked()
        runtime = self._runtime
        if runtime.closed:
            return 0
        if runtime.loop is asyncio.get_running_loop():
            return await runtime.drain(self._registration, grace, LINGER_S)
        if not runtime.loop.is_running():
            raise ManagerClosed(f"the event loop that served {self._registration.path} does not run any more")
        elsewhere = asyncio.run_coroutine_threadsafe(runtime.drain(self._registration, grace, LINGER_S), runtime.loop)
        return await asyncio.wrap_future(elsewhere)

    async def close(self) -> None:
        """Stop serving now; requests in flight are killed. May be called twice."""
        if not self._forked:
            await self.drain(0.0)

    async def __aenter__(self) -> AsyncService:
        return self

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        await (self.drain() if error is None else self.close())


class Service(_Service):
    """Blocking twin of `AsyncService`; any thread may use it."""

    def __init__(self, manager: NetworkManager, runtime: LoopRuntime, registration: Registration) -> None:
        super().__init__(runtime, registration)
        self._manager = manager

    def drain(self, grace: float = DEFAULT_GRACE_S) -> int:
        """Stop serving gently and return how many requests had to be killed; see `AsyncService.drain`."""
        self._check_not_forked()
        if self._runtime.closed:
            return 0
        return self._manager._portal.run(self._runtime.drain, self._registration, grace, LINGER_S)

    def close(self) -> None:
        """Stop serving now; requests in flight are killed. May be called twice."""
        if not self._forked:
            self.drain(0.0)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._forked:
            return
        self.drain(DEFAULT_GRACE_S if error is None else 0.0)
