"""What a call inherits, how long it may take, when it is tried again: decisions without I/O, for both faces and the planes.

A leaf: imports errors, types and the compiled context, and nothing else of the package.
"""

from __future__ import annotations

import enum
import itertools
import math
import os
import random
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal

from ._context import INHERITED_HEADERS, Context, current_context
from .errors import ConfigError, DeadlineExceeded, DynwireError, Overloaded
from .types import Timeouts


class _Inherit(enum.Enum):
    INHERIT = "the deadline of the request whose handler is running"

    def __repr__(self) -> str:
        return "INHERIT"


INHERIT: Final = _Inherit.INHERIT
"""Default of ``deadline=``: a call made inside a handler ends when the handler's own request does."""

Deadline = float | None | Literal[_Inherit.INHERIT]

_ids = itertools.count(1)
_prefix = os.urandom(6).hex()


def _renew_prefix() -> None:
    global _prefix
    _prefix = os.urandom(6).hex()


os.register_at_fork(after_in_child=_renew_prefix)


def new_request_id() -> str:
    """A request id that no other process has: a random prefix of the process and a number."""
    return f"{_prefix}-{next(_ids)}"


def inherited_headers(parent: Context) -> dict[str, str]:
    """Trace headers that a call made inside ``parent``'s handler takes over."""
    headers = parent.headers
    return {name: headers[name] for name in INHERITED_HEADERS if name in headers}


def effective_context(context: Context | None) -> Context:
    """The context a channel sends a request with, for planes written in Python.

    ``context`` itself if one was given: whoever made it decided about deadline and headers. Otherwise a new one that
    inherits deadline and trace from the request whose handler is running, if any.
    """
    if context is not None:
        return context
    parent = current_context()
    if parent is None:
        return Context(id=new_request_id())
    return Context(id=new_request_id(), headers=inherited_headers(parent), deadline=parent.deadline)


def call_context(
    context: Context | None, headers: Mapping[str, str] | None, deadline: Deadline
) -> tuple[Context | None, float | None]:
    """Translate the keywords ``context``, ``headers`` and ``deadline`` of a call into ``(context for the channel, limit)``.

    A None context lets the channel inherit by itself. ``limit`` is a further deadline that the context does not know, in
    ``time.monotonic()`` seconds. Raises `ConfigError` if both context and headers are given.
    """
    parent = current_context()
    if context is None and headers is None and deadline is INHERIT:
        return None, None
    if deadline is not INHERIT:
        limit = deadline
        parent_headers: dict[str, str] = inherited_headers(parent) if parent is not None and deadline is not None else {}
    else:
        limit = parent.deadline if parent is not None else None
        parent_headers = inherited_headers(parent) if parent is not None else {}
    if context is None:
        merged = {**parent_headers, **{k.lower(): v for k, v in headers.items()}} if headers else parent_headers
        return Context(id=new_request_id(), headers=merged, deadline=limit), None
    if headers is not None:
        raise ConfigError("headers= and context= exclude each other: pass Context(headers=…)", name="headers")
    if context is parent:
        return _forward(context), limit
    if parent_headers:
        own = context.headers
        for name, value in parent_headers.items():
            own.setdefault(name, value)
    return context, limit


def _forward(context: Context) -> Context:
    """A context for a call that a handler passes its own context to: same id, headers and deadline, and stop reaches it.

    Kill needs no link: it cancels the handler and with it the call it awaits.
    """
    import asyncio

    child = Context(id=context.id, headers=context.headers, deadline=context.deadline)
    reference = weakref.ref(child)
    loop = asyncio._get_running_loop()

    def stop_child() -> None:
        found = reference()
        if found is None:
            return
        if loop is None or loop is asyncio._get_running_loop():
            found.stop()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(found.stop)

    context.on_stop(stop_child)
    return child


def total_of(timeout: Timeouts | float | None) -> float | None:
    """The total time in seconds that ``timeout`` allows, or None."""
    return timeout.total if isinstance(timeout, Timeouts) else timeout


def deadline_of(timeout: Timeouts | float | None, now: float, limit: float | None = None) -> float | None:
    """The earlier of ``limit`` and the end of the total time, counted from ``now``; None without either."""
    total = total_of(timeout)
    if total is None or total == math.inf:
        return limit
    return now + total if limit is None else min(now + total, limit)


def remaining_timeout(timeout: Timeouts | float | None, deadline: float | None, now: float) -> Timeouts | float | None:
    """``timeout`` with its total replaced by what is left until ``deadline``.

    Raises `DeadlineExceeded` (phase ``total``, not sent) if nothing is left.
    """
    if deadline is None:
        return timeout
    left = deadline - now
    if left <= 0:
        total = total_of(timeout)
        raise DeadlineExceeded("the deadline passed before the request could be sent", timeout=total)
    return replace(timeout, total=left) if isinstance(timeout, Timeouts) else left


def connect_timeout(timeout: Timeouts | float | None, deadline: float | None, now: float) -> float | None:
    """Seconds that connecting may take: the connect phase, within what is left until ``deadline``; None: the plane's setting."""
    own = timeout.connect if isinstance(timeout, Timeouts) else None
    if deadline is None:
        return own
    left = max(0.0, deadline - now)
    return left if own is None else min(own, left)


FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 1.0
LEAST_ATTEMPTS = 3


class Attempts:
    """The failures of one call so far, and whether, where and when it is tried again. Time comes in as an argument.

    Only failures that are retryable and certainly not sent are repeated (promise P3), first on the instances that were not
    tried yet, then, after a pause that doubles, on all. A refusal because of load is not repeated on the same instance: a
    full queue refuses at once (promise P5).
    """

    __slots__ = ("count", "deadline", "last_error", "pauses", "tried")

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.tried: set[int] = set()
        self.count = 0
        self.pauses = 0
        self.last_error: DynwireError | None = None

    def again(self, error: DynwireError, instance_id: int, instances: int, now: float) -> bool:
        """Record a failed attempt; False if the error belongs to the caller."""
        self.count += 1
        self.tried.add(instance_id)
        self.last_error = error
        if error.sent != "no" or not error.retryable or self.count >= max(LEAST_ATTEMPTS, instances):
            return False
        return self.deadline is None or now < self.deadline

    def pause(self, now: float) -> float | None:
        """All instances were tried: seconds to wait before trying them again, or None to give up with ``last_error``."""
        if self.last_error is None or isinstance(self.last_error, Overloaded) or self.pauses >= LEAST_ATTEMPTS - 1:
            return None
        # Half of it random: callers that failed together should not come back together.
        seconds: float = min(LAST_PAUSE_S, FIRST_PAUSE_S * 2**self.pauses) * random.uniform(0.5, 1.0)
        if self.deadline is not None and now + seconds >= self.deadline:
            return None
        self.pauses += 1
        self.tried.clear()
        return seconds
