from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from typing_extensions import disjoint_base

from ._http2 import Http2Engine
from ._link import Link
from .errors import ProtocolError

@disjoint_base
class Exchange: ...

@disjoint_base
class HttpWire(Link):
    routes: dict[bytes, str]
    fixed: dict[bytes, tuple[list[tuple[bytes, bytes]], bytes]]
    leniency: float
    # Constructors with **limits are written as __new__: stubs of __init__ are compared with the compiled signature by name.
    def __new__(
        cls,
        is_client: bool,
        *,
        max_message: int = 33554432,
        root: str = "/v1/rpc",
        authority: str = "",
        scheme: str = "http",
        token: str | None = None,
        engine: str = "native",
        adaptive: bool = True,
        pages: Callable[[Any], tuple[int, list[tuple[bytes, bytes]], bytes]] | None = None,
        lock: AbstractContextManager[Any] | None = None,
        **limits: Any,
    ) -> Self: ...
    @property
    def engine(self) -> Http2Engine | None: ...
    @property
    def root(self) -> str: ...
    @property
    def authority(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def body_bytes(self) -> int: ...
    @property
    def protocol(self) -> str | None: ...
    def start(
        self, *, software: str = "", connection_id: bytes = b"", token: str | None = None, accept_timeout_ms: int = 10000
    ) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def connection_error(self, error: Exception) -> ProtocolError: ...
    def stop_request(self, request_id: str) -> bool: ...
