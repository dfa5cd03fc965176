"""One background event loop in a thread of its own, started on first use: the way from blocking code to asyncio code."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ._context import loop_mark
from ._portal import Hub
from .errors import ManagerClosed

T = TypeVar("T")

# Which event loop is this? Asked once per call, so it has to be cheap; see there. Compare results with ==; equal means the same
# running loop, or none in both cases.
where = loop_mark
NOWHERE: object = None
"""``where()`` tells running loops apart; ``NOWHERE`` is what it returns in a thread without one."""

STOP_TIMEOUT_S = 2.0
"""How long `Portal.close` waits for the loop to run out. The thread is a daemon: exceeding it delays nobody."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop loop if uvloop is installed, else one of the standard library."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def check_may_block() -> None:
    """Raise `RuntimeError` if this thread runs an event loop, which a blocking call would stop."""
    if where() is not None:
        raise RuntimeError(
            "a blocking call of dynwire was made in a thread that runs an event loop, which would stop while it waits; "
            "use AsyncNetworkManager with await there, or make the call in a thread (asyncio.to_thread)"
        )


class Portal:
    """Runs coroutine functions on a background event loop for any number of threads. All methods: any thread.

    Nothing is started before the first use. The thread is a daemon; `close` stops it, an object that is not closed is
    stopped by the interpreter's exit.
    """

    def __init__(self, name: str = "dynwire-portal") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._hub: Hub | None = None
        self._closed = False
        self._pid = os.getpid()

    @property
    def running(self) -> bool:
        """True between the first use and `close`, in the process that started it."""
        return self._loop is not None and not self._closed and self._pid == os.getpid()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; starts it. Raises `ManagerClosed` after `close`."""
        loop = self._loop
        if loop is not None and not self._closed:
            return loop
        with self._lock:
            if self._closed:
                raise ManagerClosed("the background event loop is closed")
            if self._loop is None:
                self._loop = self._start()
            return self._loop

    @property
    def hub(self) -> Hub:
        """Where threads hand calls to the loop; starts it. Raises `ManagerClosed` after `close`."""
        hub = self._hub
        if hub is None or self._closed:
            loop = self.loop
            assert self._hub is not None, loop
            return self._hub
        return hub

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = new_event_loop()
        hub = self._hub = Hub(loop)
        started = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(loop)
            hub.open()
            loop.call_soon(started.set)
            try:
                loop.run_forever()
            finally:  # also when somebody's SystemExit has ended the loop: whoever waits is told
                hub.shut()
                try:
                    _finish(loop)
                finally:
                    hub.close()
                    asyncio.set_event_loop(None)
                    loop.close()

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()
        started.wait()
        return loop

    def run(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run ``await function(*args)`` on the loop and return its result or raise its exception.

        The caller's context variables are visible in it. An exception that ends the wait (Ctrl-C) cancels the awaited work
        and leaves the loop running for everybody else. Raises `RuntimeError` in a thread that runs an event loop, this one
        included, and `ManagerClosed` after `close`.
        """
        return self.hub.run(function(*args), contextvars.copy_context())

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Run a callback on the loop, from any thread; does nothing when the loop is closed."""
        loop = self.loop
        try:
            loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not loop.is_closed():
                raise

    def close(self) -> None:
        """Cancel what still runs on the loop and stop it. May be called twice, not from the loop's own thread."""
        if self._thread is not None and threading.get_ident() == self._thread.ident:
            raise RuntimeError("the background event loop cannot be closed from its own thread")
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or self._pid != os.getpid():
            return
        try:
            loop.call_soon_threadsafe(loop.stop)
        except RuntimeError:
            if not loop.is_closed():
                raise
        thread.join(STOP_TIMEOUT_S)


def _finish(loop: asyncio.AbstractEventLoop) -> None:
    """What `asyncio.run` does at its end: cancel tasks, close async generators."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=STOP_TIMEOUT_S / 2))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
