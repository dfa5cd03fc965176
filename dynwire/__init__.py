"""Request planes and KV events for inference deployments: one sync and async API over TCP, HTTP/2 and NATS.

Importing starts nothing and reads no environment. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._buffers import Payload
    from ._context import Context, current_context
    from .client import AsyncClient, Client
    from .config import Config, load_config
    from .endpoint import AsyncEndpoint, Endpoint
    from .errors import (
        BindError,
        Cancelled,
        ConfigError,
        ConnectError,
        DeadlineExceeded,
        DecodeError,
        DynwireError,
        EndpointNotFound,
        ForkedManager,
        ManagerClosed,
        MessageTooLarge,
        NoInstances,
        Overloaded,
        PeerLost,
        PermissionDenied,
        PlaneMismatch,
        ProtocolError,
        RemoteError,
        Unauthenticated,
    )
    from .manager import AsyncNetworkManager, NetworkManager, get_async_manager, get_manager
    from .replies import AsyncReplyStream, ReplyStream
    from .service import AsyncService, Service
    from .types import EndpointId, Instance, Timeouts

_HOMES = {
    "_buffers": ("Payload",),
    "_context": ("Context", "current_context"),
    "client": ("AsyncClient", "Client"),
    "config": ("Config", "load_config"),
    "endpoint": ("AsyncEndpoint", "Endpoint"),
    "errors": (
        "BindError", "Cancelled", "ConfigError", "ConnectError", "DeadlineExceeded", "DecodeError", "DynwireError",
        "EndpointNotFound", "ForkedManager", "ManagerClosed", "MessageTooLarge", "NoInstances", "Overloaded", "PeerLost",
        "PermissionDenied", "PlaneMismatch", "ProtocolError", "RemoteError", "Unauthenticated",
    ),
    "manager": ("AsyncNetworkManager", "NetworkManager", "get_async_manager", "get_manager"),
    "replies": ("AsyncReplyStream", "ReplyStream"),
    "service": ("AsyncService", "Service"),
    "types": ("EndpointId", "Instance", "Timeouts"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncClient", "AsyncEndpoint", "AsyncNetworkManager", "AsyncReplyStream", "AsyncService", "BindError", "Cancelled",
    "Client", "Config", "ConfigError", "ConnectError", "Context", "DeadlineExceeded", "DecodeError", "DynwireError", "Endpoint",
    "EndpointId", "EndpointNotFound", "ForkedManager", "Instance", "ManagerClosed", "MessageTooLarge", "NetworkManager",
    "NoInstances", "Overloaded", "Payload", "PeerLost", "PermissionDenied", "PlaneMismatch", "ProtocolError", "RemoteError",
    "ReplyStream", "Service", "Timeouts", "Unauthenticated", "__version__", "current_context", "get_async_manager",
    "get_manager", "load_config",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
