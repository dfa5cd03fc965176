"""Addresses of the http plane: URLs, because scheme and path belong to them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..._httpio import RequestOptions
from ...config import Config
from ...errors import ConfigError


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """``http://host:port/root`` in its parts."""

    scheme: str
    host: str
    port: int
    root: str

    @property
    def authority(self) -> str:
        """What requests name as their host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.root}"


def parse_address(text: str, default_root: str) -> HttpAddress:
    """``http://host:port[/root]``, or ``host:port``. Raises `ConfigError`."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problem = f"{text!r} is not an address of the http plane: expected http://host:port/root"
        raise ConfigError(problem, name="address", value=text, allowed="http://host:port/root")
    return HttpAddress(
        parts.scheme,
        parts.hostname,
        port or (443 if parts.scheme == "https" else 80),
        parts.path.rstrip("/") or default_root,
    )


def request_options(config: Config) -> RequestOptions:
    return RequestOptions(
        accept_timeout=config.tcp.request_timeout,
        connect_timeout=config.tcp.connect_timeout,
        total_timeout=config.default_timeout,
        codec=config.codec,
        channel_buffer=config.tcp.channel_buffer,
        keepalive_interval=config.http.keep_alive_interval,
        keepalive_timeout=config.http.keep_alive_timeout,
        keepalive_setting="DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS",
        spin_us=config.tcp.spin_us,
    )


def client_keywords(address: HttpAddress, config: Config, context: Callable[[], ssl.SSLContext]) -> dict[str, Any]:
    """Keywords of a compiled client connection; ``context`` is asked for where the address says https."""
    secure = address.scheme == "https"
    return {
        "scheme": address.scheme,
        "authority": address.authority,
        "root": address.root,
        "token": config.token,
        "tls": context() if secure else None,
        "tls_hostname": address.host if secure else None,
        **http2_limits(config),
    }


def http2_limits(config: Config) -> dict[str, Any]:
    """Keywords of the compiled connection that both roles need."""
    http = config.http
    return {
        "max_message": config.tcp.max_message_size,
        "engine": http.engine,
        "adaptive": http.adaptive_window,
        "max_frame_size": http.max_frame_size,
        "stream_window": http.stream_window,
        "connection_window": max(http.connection_window, http.stream_window),
    }
