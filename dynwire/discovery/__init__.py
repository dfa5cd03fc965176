"""Who serves which endpoint: backends that store instance records and tell watchers about changes."""

from __future__ import annotations

from ..errors import ConfigError
from .base import Discovery, Watch
from .file import FileDiscovery
from .memory import MemoryDiscovery

__all__ = ["Discovery", "FileDiscovery", "MemoryDiscovery", "Watch", "open_discovery"]

_AVAILABLE = ("mem", "file")
_PLANNED = ("etcd", "nats")


def open_discovery(backend: str, *, file_dir: str, ttl: float) -> Discovery:
    """A discovery object of the named backend, not yet started; does no I/O.

    ``file_dir`` is the directory of the ``file`` backend (``DYN_FILE_KV``); ``ttl`` in seconds is how long a record without
    heartbeat counts. Raises `ConfigError` for a backend that is unknown or not in this release.
    """
    if backend == "mem":
        return MemoryDiscovery()
    if backend == "file":
        return FileDiscovery(file_dir, ttl=ttl)
    why = "is not in this release" if backend in _PLANNED else "does not exist"
    raise ConfigError(
        f"DYN_DISCOVERY_BACKEND: the discovery backend {backend!r} {why}; available: {', '.join(_AVAILABLE)}",
        name="DYN_DISCOVERY_BACKEND",
        value=backend,
        allowed=list(_AVAILABLE),
    )
