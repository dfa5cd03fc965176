import asyncio
from contextvars import Context as ContextVars
from typing import Any, Self

from typing_extensions import disjoint_base

from ._awaitable import CallFuture, ChannelBase, EndpointEntry, HandlerTask, ItemStream
from ._context import INHERITED_HEADERS as INHERITED_HEADERS
from ._context import Context
from ._natsproto import MessagePort, MessageSink
from ._natsqueue import QueueWire
from ._natswire import NatsPeer
from .codec import msgpack_encode as msgpack_encode
from .errors import DynwireError
from .types import Instance, Timeouts

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

@disjoint_base
class LoopState: ...

@disjoint_base
class LinkSink(MessageSink): ...

# Constructors with **limits are written as __new__: stubs of __init__ are compared with the compiled signature by name.
@disjoint_base
class NatsLink(QueueWire):
    def __new__(cls, is_client: bool, subject: bytes, loop: asyncio.AbstractEventLoop, **limits: Any) -> Self: ...
    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def sink(self) -> LinkSink: ...
    @property
    def close_error(self) -> DynwireError | None: ...
    @property
    def attached(self) -> bool: ...
    def attach(self, port: MessagePort) -> None: ...
    def forget(self, error: DynwireError) -> None: ...
    def close(self, error: DynwireError | None = None) -> None: ...
    def _on_timer(self) -> None: ...

class NatsClientLink(NatsLink):
    def __new__(cls, subject: bytes, loop: asyncio.AbstractEventLoop, options: RequestOptions, **limits: Any) -> Self: ...
    @property
    def unsettled(self) -> bool: ...
    def ask_peer(self, peer: NatsPeer) -> asyncio.Future[DynwireError | None]: ...

@disjoint_base
class NatsChannel(ChannelBase):
    def __init__(
        self, instance: Instance, client: Any, link: NatsClientLink, peer: NatsPeer, options: RequestOptions
    ) -> None: ...
    @property
    def client(self) -> Any: ...
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
class QueueChannel(NatsChannel): ...

@disjoint_base
class NatsServerLink(NatsLink):
    def __new__(
        cls,
        subject: bytes,
        loop: asyncio.AbstractEventLoop,
        entries: dict[str, EndpointEntry],
        base_context: ContextVars,
        *,
        tracebacks: bool = False,
        **limits: Any,
    ) -> Self: ...
    def endpoints_changed(self) -> None: ...
    def go_away(self) -> None: ...
    def tasks(self, entry: EndpointEntry | None = None) -> list[HandlerTask]: ...
    def kill_tasks(self, entry: EndpointEntry | None = None) -> int: ...

@disjoint_base
class QueueSink(MessageSink):
    def __init__(self, link: NatsServerLink, endpoint: str) -> None: ...
    consumer: Any
