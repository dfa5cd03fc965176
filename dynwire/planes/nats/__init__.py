"""The nats plane: requests as messages through a NATS server (docs/nats-wire.md)."""

from __future__ import annotations

from .client import AsyncNatsClient
from .server import AsyncNatsServer

__all__ = ["AsyncNatsClient", "AsyncNatsServer"]
