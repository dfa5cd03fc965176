"""The http plane: HTTP/2 (and HTTP/1.1 for tools), which curl, proxies and load balancers understand."""

from __future__ import annotations

from .async_client import AsyncHttpClient
from .client import HttpClient
from .server import AsyncHttpServer

__all__ = ["AsyncHttpClient", "AsyncHttpServer", "HttpClient"]
