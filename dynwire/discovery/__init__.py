"""Who serves which endpoint: backends that store instance records and tell watchers about changes."""

from __future__ import annotations

from ..config import NatsConfig
from ..errors import ConfigError
from .base import Discovery, Watch
from .file import FileDiscovery
from .memory import MemoryDiscovery

__all__ = ["Discovery", "FileDiscovery", "MemoryDiscovery", "Watch", "open_discovery"]

_AVAILABLE = ("mem", "file", "etcd", "nats")


def open_discovery(
    backend: str, *, file_dir: str, ttl: float, nats: NatsConfig | None = None, etcd: tuple[str, ...] = ("http://localhost:2379",)
) -> Discovery:
    """A discovery object of the named backend, not yet started; does no I/O.

    ``file_dir`` is the directory of the ``file`` backend (``DYN_FILE_KV``), ``nats`` how the ``nats`` backend connects,
    ``etcd`` the endpoints of the ``etcd`` backend (``ETCD_ENDPOINTS``); ``ttl`` in seconds is how long a record without heartbeat
    counts. Raises `ConfigError` for a backend that is unknown, or whose packages are not installed.
    """
    if backend == "mem":
        return MemoryDiscovery()
    if backend == "file":
        return FileDiscovery(file_dir, ttl=ttl)
    if backend == "nats":
        try:
            import nats as _  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "DYN_DISCOVERY_BACKEND: the discovery backend nats needs nats-py: pip install 'dynwire[nats]'",
                name="DYN_DISCOVERY_BACKEND",
                value=backend,
                allowed="pip install 'dynwire[nats]', or another backend",
            ) from error
        from .nats import NatsDiscovery

        return NatsDiscovery(nats or NatsConfig(), ttl=ttl)
    if backend == "etcd":
        try:
            import httpx as _httpx  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "DYN_DISCOVERY_BACKEND: the discovery backend etcd needs httpx: pip install 'dynwire[etcd]'",
                name="DYN_DISCOVERY_BACKEND",
                value=backend,
                allowed="pip install 'dynwire[etcd]', or another backend",
            ) from error
        from .etcd import EtcdDiscovery

        return EtcdDiscovery(etcd, ttl=ttl)
    raise ConfigError(
        f"DYN_DISCOVERY_BACKEND: the discovery backend {backend!r} does not exist; available: {', '.join(_AVAILABLE)}",
        name="DYN_DISCOVERY_BACKEND",
        value=backend,
        allowed=list(_AVAILABLE),
    )
