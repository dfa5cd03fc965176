import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextvars import Context as ContextVars
from typing import Any, Final, Self

from typing_extensions import disjoint_base

from ._awaitable import CallFuture, ChannelBase, EndpointEntry, HandlerTask, ItemReader, ItemStream
from ._context import INHERITED_HEADERS as INHERITED_HEADERS
from ._context import Context
from ._frames import WireConnection
from .codec import msgpack_encode as msgpack_encode
from .errors import BY_CODE as BY_CODE
from .errors import DynwireError
from .types import Instance, Timeouts

GOAWAY_ERRORS: Final[dict[int, type[DynwireError]]]

def read_error_text(code: int) -> str: ...

@disjoint_base
class TlsLayer:
    def __init__(self, context: ssl.SSLContext, server_side: bool, hostname: str | None, peer: str) -> None: ...
    @property
    def alpn(self) -> str | None: ...

@disjoint_base
class RequestOptions:
    def __init__(
        self,
        *,
        accept_timeout: float,
        connect_timeout: float = 3.0,
        total_timeout: float | None = None,
        codec: str = "msgpack",
        channel_buffer: int = 100,
        keepalive_interval: float = 10.0,
        keepalive_timeout: float = 10.0,
        keepalive_setting: str = "DYNWIRE_TCP_KEEPALIVE_TIMEOUT",
        spin_us: float = 0.0,
    ) -> None: ...

# Constructors with **limits are written as __new__: stubs of __init__ are compared with the compiled signature by name.
@disjoint_base
class AsyncConnection(WireConnection):
    on_drained: Callable[[], object] | None
    @property
    def unsent(self) -> bool: ...
    on_closed: Callable[[Any, DynwireError], object] | None
    def __new__(
        cls,
        is_client: bool,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        peer: str,
        *,
        spin_us: float = 0.0,
        **limits: Any,
    ) -> Self: ...
    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def close_error(self) -> DynwireError | None: ...
    def open(self) -> None: ...
    def close(self, error: DynwireError | None = None) -> None: ...
    def _on_readable(self) -> None: ...
    def _flush_soon(self) -> None: ...
    def _on_writable(self) -> None: ...
    def _on_timer(self) -> None: ...
    def _spin(self) -> None: ...

@disjoint_base
class AsyncClientConnection(AsyncConnection):
    on_saturated: Callable[[AsyncClientConnection], object] | None
    def __new__(
        cls, loop: asyncio.AbstractEventLoop, sock: socket.socket, peer: str, options: RequestOptions, **limits: Any
    ) -> Self: ...
    @property
    def busy(self) -> bool: ...
    def handshake(
        self, waiter: asyncio.Future[dict[str, Any]], *, software: str, connection_id: bytes, token: str | None
    ) -> None: ...

@disjoint_base
class AsyncServerConnection(AsyncConnection):
    def __new__(
        cls,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        peer: str,
        server: Any,
        base_context: ContextVars,
        *,
        tracebacks: bool = False,
        **limits: Any,
    ) -> Self: ...
    def go_away(self, text: str) -> None: ...
    def tasks(self, entry: EndpointEntry | None = None) -> list[HandlerTask]: ...
    def kill_tasks(self, entry: EndpointEntry | None = None) -> int: ...

@disjoint_base
class AsyncSocketChannel(ChannelBase):
    def __init__(self, instance: Instance, pool: Any, options: RequestOptions, loop: asyncio.AbstractEventLoop) -> None: ...
    @property
    def pool(self) -> Any: ...
    @property
    def ready(self) -> bool: ...
    async def connect(self, timeout: float | None = None) -> None: ...
    def call(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> CallFuture: ...
    def stream(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> ItemStream: ...

@disjoint_base
class Parker: ...

@disjoint_base
class BlockingCall(CallFuture): ...

@disjoint_base
class BlockingReader(ItemReader): ...

@disjoint_base
class BlockingConnection(WireConnection):
    def __new__(
        cls, sock: socket.socket, peer: str, options: RequestOptions, owner: BlockingPool | None, **limits: Any
    ) -> Self: ...
    @property
    def close_error(self) -> DynwireError | None: ...
    @property
    def owner(self) -> BlockingPool | None: ...
    def handshake(
        self, *, software: str, connection_id: bytes, token: str | None, accept_timeout: float, timeout: float
    ) -> None: ...
    def close(self, error: DynwireError | None = None) -> None: ...
    def forget(self) -> None: ...

@disjoint_base
class BlockingPool:
    def __init__(
        self,
        address: str,
        limit: int,
        open_connection: Callable[[BlockingPool, float], BlockingConnection],
        *,
        idle_timeout: float = 60.0,
        max_idle: int = 65535,
    ) -> None: ...
    @property
    def limit(self) -> int: ...
    @property
    def address(self) -> str: ...
    def connect(self, timeout: float | None = None) -> None: ...
    def gone(self, conn: BlockingConnection) -> None: ...
    def close(self) -> None: ...
    def forget(self) -> None: ...
    def stats(self) -> list[dict[str, Any]]: ...

@disjoint_base
class BlockingSocketChannel(ChannelBase):
    def __init__(self, instance: Instance, pool: BlockingPool, options: RequestOptions) -> None: ...
    @property
    def pool(self) -> BlockingPool: ...
    def call(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> Any: ...
    def stream(
        self,
        payload: Any,
        timeouts: Timeouts | float | None = None,
        reply_type: Any = None,
        context: Context | None = None,
    ) -> BlockingItemStream: ...

@disjoint_base
class BlockingItemStream:
    again: Callable[[DynwireError, Context], BlockingItemStream] | None
    @property
    def context(self) -> Context: ...
    @property
    def delivered(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __next__(self) -> Any: ...
    def close(self) -> None: ...
    def __del__(self) -> None: ...
