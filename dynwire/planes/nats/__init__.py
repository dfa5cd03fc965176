"""The nats plane: requests as messages through a NATS server (docs/nats-wire.md)."""

from __future__ import annotations

from .client import AsyncNatsClient
from .queues import queue_instance
from .server import AsyncNatsServer

__all__ = ["AsyncNatsClient", "AsyncNatsServer", "queue_instance"]
