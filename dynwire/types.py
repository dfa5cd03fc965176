"""Plain value types shared by all layers. Imports nothing else of the package but the errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from .errors import ConfigError

_PART = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


class EndpointId(msgspec.Struct, frozen=True, order=True):
    """``namespace.component.endpoint``: each part 1 to 64 of ``A-Za-z0-9_-``."""

    namespace: str
    component: str
    name: str

    @classmethod
    def parse(cls, text: str) -> EndpointId:
        """Parse ``ns.component.endpoint`` or ``dyn://ns.component.endpoint``; raises `ConfigError` with what is wrong."""
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3 or not all(_PART.match(p) for p in parts):
            raise ConfigError(
                f"{text!r} is not an endpoint: expected namespace.component.endpoint (optionally after dyn://), "
                "three parts of 1 to 64 letters, digits, '-' or '_'",
                name="endpoint",
                value=text,
                allowed="namespace.component.endpoint",
            )
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.name}"


class Instance(msgspec.Struct, frozen=True):
    """One worker's registration of one endpoint, as discovery stores it."""

    id: int
    """random u64, unique per registration"""
    namespace: str
    component: str
    endpoint: str
    plane: str
    """``tcp``, ``http``, ``nats`` or ``memory``"""
    address: str
    """where to reach it, in the plane's own notation (``host:port`` for tcp)"""
    wire: str = "dynwire/1"
    codecs: tuple[str, ...] = ("raw", "msgpack", "json")
    metadata: dict[str, Any] = {}
    started_at: float = 0.0
    """Unix time of the registration, in seconds"""

    @property
    def path(self) -> str:
        """``namespace.component.endpoint``"""
        return f"{self.namespace}.{self.component}.{self.endpoint}"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds per phase; None means no limit of its own. A plain number given as ``timeout=`` sets ``total``.

    ``connect`` covers opening the connection, ``accept`` the time until the worker accepted the request or sent its first
    item, ``first_item`` and ``between_items`` the gaps of a stream, ``total`` everything.
    """

    total: float | None = None
    connect: float | None = None
    accept: float | None = None
    first_item: float | None = None
    between_items: float | None = None


@dataclass(frozen=True, slots=True)
class Handler:
    """A user's handler, made uniform by `dynwire.handlers.prepare`; what planes run.

    ``function(request, context)`` (or ``function(request)`` when ``takes_context`` is false) returns a coroutine when
    ``streaming`` is false, and an async generator when it is true.
    """

    function: Callable[..., Any]
    streaming: bool
    takes_context: bool
    request_type: Any = None
    """type for msgspec to decode requests into, or None for plain objects"""
    codec: str = "msgpack"
    """codec of replies to raw requests; other requests are answered in their own codec"""
    max_in_flight: int = 65536
    """requests that may run at once; one more is refused with `Overloaded`"""
    name: str = ""
