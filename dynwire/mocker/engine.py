"""Moves the scheduler along in real time, on an event loop, and hands tokens to whoever waits for them."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from .events import KvEventSink
from .scheduler import EngineConfig, Scheduler, Sequence, Step
from .text import Storyteller

TIMER_RESOLUTION_S = 0.5e-3
"""event loops count in milliseconds; a step that ends earlier than this from now ends now, and the next one pays for it"""

MAX_LAG_S = 0.02
"""how far a late engine catches up; what is missing beyond is lost, as after a pause of the process"""

BURST_ITEMS = 64
"""Steps that are due at the same moment, at a high speedup, run in one turn of the loop until so many tokens have been handed on.

They leave in one write, which saves a system call per step when few sequences run. A step with somebody's first token is the
last of its turn: that token is waited for.
"""

BURST_S = 5e-6
"""steps this close together count as due at the same moment"""

_clock = time.monotonic


class Wake:
    """What the consumer of a sequence awaits: asyncio's future protocol without a new future per token.

    The consumer goes on within `__call__`, not in a later turn of the loop, so that everything that one step brings leaves
    together. Only ever awaited by one task, on the engine's loop.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_cancelled", "_context", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._callback: Callable[[Any], object] | None = None
        self._context: contextvars.Context | None = None
        self._cancelled = False

    def __call__(self) -> None:
        callback, context = self._callback, self._context
        if callback is not None and context is not None:
            self._callback = self._context = None
            context.run(callback, self)

    def __await__(self) -> Generator[Wake, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], object], *, context: contextvars.Context | None = None) -> None:
        self._callback = callback
        self._context = context or contextvars.copy_context()

    def remove_done_callback(self, callback: Callable[[Any], object]) -> int:
        if self._callback != callback:
            return 0
        self._callback = self._context = None
        return 1

    def result(self) -> None:
        if self._cancelled:
            self._cancelled = False
            raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:
        """Called by the task that awaits, when it is cancelled itself."""
        self._cancelled = True
        self._loop.call_soon(self)
        return True


class Rank:
    """One scheduler and its clock. Belongs to the thread of its event loop."""

    def __init__(self, scheduler: Scheduler, speedup: float, loop: asyncio.AbstractEventLoop) -> None:
        self.scheduler = scheduler
        self._speedup = speedup
        self._loop = loop
        self._origin = _clock()
        self._due = 0.0
        self._step: Step | None = None
        self._handle: asyncio.Handle | None = None

    def add(self, sequence: Sequence) -> Wake:
        self.scheduler.add(sequence, self._now())
        wake = sequence.wake = Wake(self._loop)
        if self._handle is None:
            self._due = _clock()
            # not now: what else arrives in this turn of the loop belongs into the same step
            self._handle = self._loop.call_soon(self._begin)
        return wake

    def cancel(self, sequence: Sequence) -> None:
        """Nothing more is wanted: its blocks are free at once. Nothing happens if it has finished."""
        self.scheduler.cancel(sequence)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have the engine's loop call something soon, from any thread. Nothing happens if the loop is gone."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _now(self) -> float:
        return (_clock() - self._origin) * self._speedup

    def _begin(self) -> None:
        if self._plan() is not None:
            self._wait()

    def _plan(self) -> Step | None:
        step = self._step = self.scheduler.schedule(self._now())
        if step is None:
            self._handle = None
        else:
            self._due = max(self._due, _clock() - MAX_LAG_S) + step.duration / self._speedup
        return step

    def _wait(self) -> None:
        delay = self._due - _clock()
        if delay > TIMER_RESOLUTION_S:
            self._handle = self._loop.call_later(delay, self._end)
        else:
            self._handle = self._loop.call_soon(self._end)

    def _end(self) -> None:
        items = 0
        step = self._step
        while step is not None:
            got = self.scheduler.complete(step, self._now())
            for sequence in got:
                sequence.wake()
            items += len(got)
            last = bool(step.prefills) or items >= BURST_ITEMS
            step = self._plan()
            if step is not None and (last or self._due - _clock() > BURST_S):
                self._wait()
                return

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


@dataclass(frozen=True, slots=True)
class Metrics:
    """One rank at one moment."""

    dp_rank: int
    active: int
    """sequences that run"""
    waiting: int
    blocks_used: int
    """held by sequences"""
    blocks_cached: int
    """not held, but their content is known"""
    blocks_total: int
    prompt_tokens: int
    hit_tokens: int
    """of the prompt tokens, those that were found in the cache"""
    generated_tokens: int
    preemptions: int

    @property
    def usage(self) -> float:
        return self.blocks_used / self.blocks_total

    @property
    def prefix_hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Engine:
    """All ranks of one worker. Belongs to the event loop that was running when it was made."""

    def __init__(
        self,
        config: EngineConfig,
        text: Storyteller,
        *,
        speedup: float = 1.0,
        dp_size: int = 1,
        sink: KvEventSink | None = None,
        worker_id: int | None = None,
    ) -> None:
        """``speedup``: simulated seconds per real second. ``sink`` gets the cache events of all ranks, once there is a worker id.

        Raises `ValueError`.
        """
        if not speedup > 0:
            raise ValueError(f"the speedup ratio is {speedup}; allowed is > 0")
        if dp_size < 1:
            raise ValueError(f"the data parallel size is {dp_size}; allowed is 1 or more")
        loop = asyncio.get_running_loop()
        self.config = config
        self.ranks = [Rank(Scheduler(config, text, sink, worker_id, number), speedup, loop) for number in range(dp_size)]

    def identify(self, worker_id: int) -> None:
        """The worker has been registered under this id: it stands in the cache events."""
        for rank in self.ranks:
            rank.scheduler.events.identify(worker_id)

    def rank(self, number: int | None = None) -> Rank:
        """The rank of that number, or the one with the least to do. Raises `ValueError` if there is none of that number."""
        if number is None:
            return min(self.ranks, key=lambda r: (r.scheduler.active + len(r.scheduler.waiting), r.scheduler.pool.used))
        if not 0 <= number < len(self.ranks):
            raise ValueError(f"dp_rank is {number}; this worker has ranks 0 to {len(self.ranks) - 1}")
        return self.ranks[number]

    def metrics(self) -> list[Metrics]:
        found = []
        for number, rank in enumerate(self.ranks):
            scheduler, pool = rank.scheduler, rank.scheduler.pool
            found.append(
                Metrics(
                    dp_rank=number,
                    active=scheduler.active,
                    waiting=len(scheduler.waiting),
                    blocks_used=pool.used,
                    blocks_cached=pool.idle,
                    blocks_total=pool.capacity,
                    prompt_tokens=scheduler.prompt_tokens,
                    hit_tokens=scheduler.hit_tokens,
                    generated_tokens=scheduler.generated_tokens,
                    preemptions=scheduler.preemptions,
                )
            )
        return found

    def close(self) -> None:
        """Stop the clocks. Whoever waits for tokens waits for ever: cancel them before."""
        for rank in self.ranks:
            rank.close()
