"""What a request plane is: the interfaces between the manager and the planes.

A further plane is one folder with these four classes (or two: `dynwire.portal` makes blocking faces from async ones) and one
entry in the manager.

Life of a call: the router picks an `Instance`; `AsyncRequestPlaneClient.channel` gives the (cached) channel to it; if the
channel is not ``ready``, ``await channel.connect(timeout)``; then ``channel.call`` or ``channel.stream``. A channel raises typed
errors only (`dynwire.errors`); everything with ``sent == "no"`` and ``retryable`` may be repeated on another channel, which is
the caller's business, not the channel's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

from .._context import Context
from ..types import Handler, Instance, Timeouts


class AsyncItemStream(ABC):
    """Items of one streamed reply, in order, once. Belongs to the event loop that created it."""

    context: Context

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[Any]: ...

    @abstractmethod
    def __anext__(self) -> Awaitable[Any]:
        """Next item; raises `StopAsyncIteration` at the end and a typed error (`PeerLost` with ``delivered``, …) otherwise."""

    @property
    def ready(self) -> bool:
        """True if `__anext__` has something to return or to raise at once. False says nothing: it may still not have to wait."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Give up: kills the handler if it still runs, drops queued items. Never blocks; may be called twice."""


class ItemStream(ABC):
    """Blocking twin of `AsyncItemStream`. One thread at a time may iterate; any thread may close."""

    context: Context

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    @abstractmethod
    def __next__(self) -> Any: ...

    @abstractmethod
    def close(self) -> None: ...


class AsyncChannel(ABC):
    """Calls to one instance, from one event loop."""

    instance: Instance

    @property
    @abstractmethod
    def ready(self) -> bool:
        """True if a request can be sent at once, without waiting for a connection."""

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Calls and streams of this channel that have not ended."""

    @abstractmethod
    async def connect(self, timeout: float | None = None) -> None:
        """Make ``ready`` true or raise `ConnectError`, `PlaneMismatch`, `Unauthenticated`, `Overloaded`."""

    @abstractmethod
    def call(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> Awaitable[Any]:
        """Send at once and return an awaitable of the only reply item.

        ``timeouts`` a number is the total in seconds. The effective deadline is the earlier of it and ``context.deadline``.
        Cancelling the awaiting task kills the handler. Raises before sending: `MessageTooLarge`, `Overloaded`,
        `ConnectError`; a handler that yields several items is a `ProtocolError` that points to ``stream``.
        """

    @abstractmethod
    def stream(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> AsyncItemStream:
        """Send at once and return the reply's items."""


class Channel(ABC):
    """Blocking twin of `AsyncChannel`; connects by itself. Any thread may call."""

    instance: Instance

    @property
    @abstractmethod
    def in_flight(self) -> int: ...

    @abstractmethod
    def call(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> Any: ...

    @abstractmethod
    def stream(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> ItemStream: ...


class AsyncRequestPlaneClient(ABC):
    """Connections of one process to its peers on one plane, used from one event loop."""

    plane: str

    @abstractmethod
    def channel(self, instance: Instance) -> AsyncChannel:
        """The channel to an instance. Does no I/O; raises `PlaneMismatch` if the instance is on another plane."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection; calls in flight end with `ManagerClosed`."""

    def stats(self) -> dict[str, Any]:
        """Counters of this client, for diagnostics and tests. Which ones is the plane's; none by default."""
        return {}


class RequestPlaneClient(ABC):
    """Blocking twin of `AsyncRequestPlaneClient`; any thread may use it."""

    plane: str

    @abstractmethod
    def channel(self, instance: Instance) -> Channel: ...

    @abstractmethod
    def close(self) -> None: ...

    def stats(self) -> dict[str, Any]:
        """As of `AsyncRequestPlaneClient`. Any thread."""
        return {}


class AsyncRequestPlaneServer(ABC):
    """Listens for requests and runs handlers, on one event loop."""

    plane: str

    @property
    @abstractmethod
    def address(self) -> str:
        """What to advertise; valid after `start`."""

    @abstractmethod
    async def start(self) -> None:
        """Bind and listen, or raise `BindError`. Starting twice is allowed and does nothing."""

    @abstractmethod
    def add_endpoint(self, endpoint: str, handler: Handler) -> None:
        """Serve ``namespace.component.endpoint``. Raises `ConfigError` if it is already served."""

    async def endpoint_added(self, endpoint: str) -> None:  # noqa: B027  # nothing to do is what most want
        """Wait until requests to an endpoint that was just added can come. Most planes have nothing to wait for."""

    @abstractmethod
    async def remove_endpoint(self, endpoint: str, grace: float = 0.0) -> int:
        """Refuse new requests, wait up to ``grace`` seconds for those in flight, kill the rest; returns how many were killed."""

    @abstractmethod
    def in_flight(self, endpoint: str | None = None) -> int:
        """Requests that are running, of one endpoint or of all."""

    @abstractmethod
    async def close(self, grace: float = 0.0) -> None:
        """Stop listening, let requests in flight finish for up to ``grace`` seconds, close every connection."""

    def stats(self) -> list[dict[str, Any]]:
        """Counters of this server, for each of its connections; none by default."""
        return []


class RequestPlaneServer(ABC):
    """Blocking twin of `AsyncRequestPlaneServer`; any thread may use it."""

    plane: str

    @property
    @abstractmethod
    def address(self) -> str: ...

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def add_endpoint(self, endpoint: str, handler: Handler) -> None: ...

    @abstractmethod
    def remove_endpoint(self, endpoint: str, grace: float = 0.0) -> int: ...

    @abstractmethod
    def in_flight(self, endpoint: str | None = None) -> int: ...

    @abstractmethod
    def close(self, grace: float = 0.0) -> None: ...

    def stats(self) -> list[dict[str, Any]]:
        """As of `AsyncRequestPlaneServer`. Any thread."""
        return []
