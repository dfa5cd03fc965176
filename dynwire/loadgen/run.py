"""Sends requests at a rate or with a concurrency, and keeps what was seen."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from .http import Exchange, LoadError, Pool, Target, clock
from .prompts import Prompts, Shape

BIN_S = 0.25
"""width of the time line"""

TIMER_S = 1.5e-3
"""how late a timer of the event loop may be without anybody being at fault"""

SHOWN_ERRORS = 5
"""texts kept per kind of error"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much load, and for how long. One of ``concurrency`` and ``rate``, at least one of ``duration`` and ``requests``."""

    concurrency: int | None = None
    """requests at once: the next one is sent when one is over"""
    rate: float | None = None
    """requests per second at random moments (Poisson), whether earlier ones are over or not"""
    duration: float | None = None
    """seconds in which requests are sent; those in flight are waited for"""
    requests: int | None = None
    timeout: float = 120.0
    """seconds for one request"""
    seed: int = 0
    max_in_flight: int = 4096
    """at a rate: requests at once, beyond which the next one waits, which counts as its latency"""

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give either a concurrency or a rate")
        if self.duration is None and self.requests is None:
            raise ValueError("give a duration or a number of requests")


@dataclass(slots=True)
class Tally:
    """What was seen. Times in seconds; latencies count from the moment when a request should have been sent."""

    sent: int = 0
    done: int = 0
    events: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))
    latency: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """between events of a stream, without those that came together"""
    together: int = 0
    """events that came in the same read as the one before: gaps of 0"""
    late: array[float] = field(default_factory=lambda: array("d"))
    """how long after the intended moment a request was sent"""
    errors: Counter[str] = field(default_factory=Counter)
    texts: dict[str, list[str]] = field(default_factory=dict)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    done_bins: Counter[int] = field(default_factory=Counter)
    token_bins: Counter[int] = field(default_factory=Counter)
    elapsed: float = 0.0
    """until the last reply was over"""
    connections: int = 0
    cpu: float = 0.0
    """seconds of processor time that this process took for it: near ``elapsed``, the load generator is the limit"""
    interrupted: bool = False
    in_flight: int = 0

    @property
    def failed(self) -> int:
        return self.errors.total()

    def take(self, exchange: Exchange, start: float) -> None:
        self.done += 1
        self.events += exchange.events
        self.together += exchange.together
        tokens = exchange.tokens
        self.tokens += tokens
        self.prompt_tokens += exchange.prompt_tokens or 0
        self.cached_tokens += exchange.cached_tokens or 0
        if exchange.first:
            self.ttft.append(exchange.first - exchange.intended)
        self.latency.append(exchange.finished - exchange.intended)
        self.late.append(exchange.sent - exchange.intended)
        self.gaps.extend(exchange.gaps)
        if exchange.finish_reason:
            self.finish_reasons[exchange.finish_reason] += 1
        bin_ = int((exchange.finished - start) / BIN_S)
        self.done_bins[bin_] += 1
        # spread evenly between first and last token: what the time line of a few requests needs, at no cost per token
        first = max(0, int((exchange.first - start) / BIN_S)) if exchange.first else bin_
        width = max(1, bin_ - first + 1)
        for n in range(width):
            self.token_bins[first + n] += tokens * (n + 1) // width - tokens * n // width

    def fail(self, error: LoadError) -> None:
        self.errors[error.kind] += 1
        texts = self.texts.setdefault(error.kind, [])
        if len(texts) < SHOWN_ERRORS and str(error) not in texts:
            texts.append(str(error))


class Run:
    """One run: `start` it, look at `tally` meanwhile, `stop` it early if you like."""

    def __init__(self, target: Target, shape: Shape, plan: Plan) -> None:
        self.tally = Tally()
        self.plan = plan
        self.started = 0.0
        self._target = target
        self._prompts = Prompts(shape, plan.seed)
        self._pool = Pool(target)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._crash: BaseException | None = None
        # stopped, a task crashed, or the last task is over
        self._changed = asyncio.Event()

    async def start(self) -> Tally:
        """Run to the end, or until `stop`. Failed requests are counted, not raised."""
        plan, tally = self.plan, self.tally
        self.started, cpu = clock(), time.process_time()
        try:
            await (self._at_rate(plan.rate) if plan.rate is not None else self._concurrently(plan.concurrency or 1))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._pool.close()
            tally.elapsed, tally.cpu = clock() - self.started, time.process_time() - cpu
            tally.connections = self._pool.opened
        return tally

    def stop(self) -> None:
        """End now: requests in flight are given up and count neither as done nor as failed."""
        self.tally.interrupted = True
        self._stopped = True
        self._changed.set()

    def progress(self) -> float:
        """From 0 to 1."""
        parts = [0.0]
        if self.plan.duration is not None:
            parts.append((clock() - self.started) / self.plan.duration)
        if self.plan.requests is not None:
            parts.append((self.tally.done + self.tally.failed) / max(1, self.plan.requests))
        return min(1.0, max(parts))

    def _more(self) -> bool:
        plan = self.plan
        return (
            not self._stopped
            and (plan.requests is None or self.tally.sent < plan.requests)
            and (plan.duration is None or clock() - self.started < plan.duration)
        )

    async def _one(self, intended: float) -> None:
        tally, prompts = self.tally, self._prompts
        exchange = Exchange(intended)
        tally.in_flight += 1
        try:
            async with asyncio.timeout(self.plan.timeout):
                await self._pool.run(self._target.post(prompts.path, prompts.next()), exchange)
        except TimeoutError:
            tally.fail(LoadError("timeout", f"no complete reply within {self.plan.timeout:g} s"))
        except LoadError as error:
            tally.fail(error)
        else:
            tally.take(exchange, self.started)
        finally:
            tally.in_flight -= 1

    async def _concurrently(self, concurrency: int) -> None:
        async def lane() -> None:
            while self._more():
                self.tally.sent += 1
                failed = self.tally.failed
                await self._one(clock())
                if self.tally.failed > failed:
                    await asyncio.sleep(0.01)  # a server that refuses at once must not be asked thousands of times per second

        for _ in range(concurrency if self.plan.requests is None else min(concurrency, self.plan.requests)):
            self._spawn(lane())
        await self._wait()

    async def _at_rate(self, rate: float) -> None:
        chance = random.Random(self.plan.seed + 2)
        places = asyncio.Semaphore(self.plan.max_in_flight)
        due = self.started

        async def one(intended: float) -> None:
            async with places:
                await self._one(intended)

        while True:
            due += chance.expovariate(rate)
            if self.plan.duration is not None and due - self.started >= self.plan.duration:
                break
            delay = due - clock()
            if delay > 0 and await self._sleep(delay):
                break
            if not self._more():
                break
            self.tally.sent += 1
            late = clock() - due
            # within the resolution of timers it is a random moment like any other; beyond, we are too slow, and it counts
            self._spawn(one(due + late if late < TIMER_S else due))
        await self._wait()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._crash = task.exception()
        if not self._tasks or self._crash is not None:
            self._changed.set()

    async def _sleep(self, delay: float) -> bool:
        """Whether the run is to end."""
        self._changed.clear()
        try:
            async with asyncio.timeout(delay):
                while not self._stopped and self._crash is None:
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            return False
        return True

    async def _wait(self) -> None:
        """Until all are over, or `stop`. Raises what a task raised against expectation."""
        while self._tasks and not self._stopped and self._crash is None:
            self._changed.clear()
            await self._changed.wait()
        if self._crash is not None:
            raise self._crash
