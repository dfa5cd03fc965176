"""What a discovery backend is: who serves which endpoint, and who wants to know about it."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from ..errors import ConfigError, ForkedManager
from ..types import EndpointId, Instance

MAX_ID = (1 << 64) - 1

Instances = tuple[Instance, ...]
WatchCallback = Callable[[Instances], None]


class Watch:
    """One subscription made by `Discovery.watch`; ends with `cancel` or when the discovery object closes.

    Belongs to the event loop it was made on. A set equal to the last one is not delivered again.
    """

    __slots__ = ("_callback", "_on_cancel", "_seen", "cancelled", "loop", "path")

    def __init__(
        self,
        path: str | None,
        callback: WatchCallback,
        loop: asyncio.AbstractEventLoop,
        on_cancel: Callable[[Watch], None],
    ) -> None:
        self.path = path
        self.loop = loop
        self.cancelled = False
        self._callback = callback
        self._on_cancel = on_cancel
        self._seen: Instances | None = None

    def cancel(self) -> None:
        """Stop the callbacks; none comes after this returns. Loop thread only. May be called twice."""
        if not self.cancelled:
            self.cancelled = True
            self._on_cancel(self)

    def deliver(self, instances: Instances) -> None:
        """Give the callback the instances of its path, unless it has them already. ``instances`` is sorted, loop thread only.

        Exceptions of the callback pass through: backends call this from a callback of the loop of its own, so that the
        loop's exception handler reports them and other watches are not affected.
        """
        if self.cancelled:
            return
        selected = select(instances, self.path)
        if selected != self._seen:
            self._seen = selected
            self._callback(selected)


class Discovery(ABC):
    """Registrations of instances, kept by a backend. Belongs to the event loop that started it.

    All methods but the constructor must be called on that loop's thread. Use one object per loop.
    """

    @property
    @abstractmethod
    def healthy(self) -> bool:
        """True unless the last contact with the backend failed; the last known set stays in use while it is false."""

    @abstractmethod
    async def start(self) -> None:
        """Prepare the backend, or raise `ConfigError`. Starting twice is allowed and does nothing.

        Raises `ManagerClosed` after `close`.
        """

    @abstractmethod
    async def register(self, instance: Instance) -> None:
        """Make the instance visible until `deregister`, `close` or the end of this process; starts if necessary.

        Registering an id again replaces its record. Raises `ConfigError`, `ConnectError` with phase ``register`` if the
        backend cannot store it now, and `MessageTooLarge` if its metadata is too large.
        """

    @abstractmethod
    async def deregister(self, instance: Instance) -> None:
        """Withdraw what this object registered under ``instance.id``; does nothing if it did not."""

    @abstractmethod
    def watch(self, path: str | None, callback: WatchCallback) -> Watch:
        """Call ``callback`` with the current instances sorted by path and id, soon, and again whenever they change.

        ``path`` is ``namespace.component.endpoint``, or None for all. The callback runs on the loop's thread and always
        gets the whole set. It is not called while the backend is unreachable. Starts if necessary.
        """

    @abstractmethod
    async def list(self, path: str | None = None) -> Instances:
        """The current instances, sorted by path and id; the last known ones while the backend is unreachable."""

    @abstractmethod
    async def close(self) -> None:
        """Deregister everything this object registered, cancel its watches and timers. May be called twice."""


def select(instances: Instances, path: str | None) -> Instances:
    """The instances of one path, or all."""
    return instances if path is None else tuple(i for i in instances if i.path == path)


def ordered(instances: Iterable[Instance]) -> Instances:
    """Sorted by path and id, the order in which every backend hands them out."""
    return tuple(sorted(instances, key=lambda i: (i.path, i.id)))


def check_instance(instance: Instance) -> None:
    """Raise `ConfigError` if the path or the id is not one that every backend can store."""
    EndpointId.parse(instance.path)
    if not 0 <= instance.id <= MAX_ID:
        raise ConfigError(
            f"instance id {instance.id} is not an unsigned 64-bit number",
            name="id",
            value=instance.id,
            allowed=f"0 to {MAX_ID}",
        )


def check_process(pid: int) -> None:
    """Raise `ForkedManager` if the object was started by another process than this one; ``pid`` 0: by none yet."""
    if pid not in (0, os.getpid()):
        raise ForkedManager(
            "this discovery object belongs to the parent process; open a new one in the child",
            details={"parent": pid, "child": os.getpid()},
        )
