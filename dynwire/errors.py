"""Every error that dynwire raises: one root, fields rather than prose, picklable.

The field ``sent`` tells how far a request got, and decides whether repeating it is safe:

``"no"``     no handler has seen it and none will: it never left this process, or the peer said that it refused it
``"maybe"``  it left this process and nobody knows whether a handler has run
``"yes"``    the peer accepted it or its handler has run

Only errors with ``sent == "no"`` are ever retried automatically.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Sent = Literal["no", "maybe", "yes"]


class DynwireError(Exception):
    """Root of all errors of this package.

    Fields: ``code`` (stable snake_case name, also used on the wire), ``phase`` (what was being done: ``config``, ``bind``,
    ``connect``, ``send``, ``accept``, ``first_item``, ``between_items``, ``reply``, ``total``, …), ``peer`` (address or
    None), ``sent``, ``retryable`` (a later attempt may succeed without a change), ``request_id`` and ``details``.
    """

    code: ClassVar[str] = "error"
    default_retryable: ClassVar[bool] = False
    default_phase: ClassVar[str] = ""
    own_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        message: str,
        *,
        phase: str | None = None,
        peer: str | None = None,
        sent: Sent = "no",
        retryable: bool | None = None,
        request_id: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.phase = self.default_phase if phase is None else phase
        self.peer = peer
        self.sent: Sent = sent
        self.retryable = self.default_retryable if retryable is None else retryable
        self.request_id = request_id
        self.details: dict[str, Any] = details or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-compatible values, for ``--json`` output and logs."""
        out: dict[str, Any] = {"code": self.code, "message": str(self)}
        for name in ("phase", "peer", "sent", "retryable", "request_id", *self.own_fields):
            value = getattr(self, name)
            if value is None or isinstance(value, (str, int, float, bool, list, tuple, dict)):
                out[name] = value
            else:
                out[name] = str(value)
        if self.details:
            out["details"] = self.details
        return out


def _rebuild(cls: type[DynwireError], args: tuple[Any, ...], state: dict[str, Any]) -> DynwireError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(DynwireError):
    """A setting is wrong. ``name`` is the variable or keyword, ``value`` what was given, ``allowed`` what would be right."""

    code = "config_error"
    default_phase = "config"
    own_fields = ("name", "value", "allowed")

    def __init__(self, message: str, *, name: str = "", value: object = None, allowed: object = None, **kw: Any) -> None:
        super().__init__(message, **kw)
        self.name = name
        self.value = value
        self.allowed = allowed


class BindError(DynwireError):
    """The listening address is in use, privileged or not one of this host's. ``address`` is ``host:port``."""

    code = "bind_error"
    default_phase = "bind"
    own_fields = ("address",)

    def __init__(self, message: str, *, address: str = "", **kw: Any) -> None:
        super().__init__(message, **kw)
        self.address = address


class ConnectError(DynwireError):
    """No connection: refused, unreachable, name not found, or not within the connect timeout. Nothing was sent."""

    code = "connect_error"
    default_phase = "connect"
    default_retryable = True


class NoInstances(DynwireError):
    """Nobody serves the endpoint, or every instance is set aside after failures."""

    code = "no_instances"
    default_phase = "route"
    default_retryable = True
    own_fields = ("endpoint",)

    def __init__(self, message: str, *, endpoint: str = "", **kw: Any) -> None:
        super().__init__(message, **kw)
        self.endpoint = endpoint


class EndpointNotFound(DynwireError):
    """The peer is there but does not serve the endpoint."""

    code = "endpoint_not_found"
    default_phase = "accept"
    own_fields = ("endpoint",)

    def __init__(self, message: str, *, endpoint: str = "", **kw: Any) -> None:
        super().__init__(message, **kw)
        self.endpoint = endpoint


class PlaneMismatch(DynwireError):
    """The other side speaks another plane or another version of the wire."""

    code = "plane_mismatch"
    default_phase = "connect"
    own_fields = ("ours", "theirs")

    def __init__(self, message: str, *, ours: str = "", theirs: str = "", **kw: Any) -> None:
        super().__init__(message, **kw)
        self.ours = ours
        self.theirs = theirs


class Overloaded(DynwireError):
    """A queue or limit is full; the request was refused before any handler saw it. ``retry_after`` is in seconds."""

    code = "overloaded"
    default_phase = "send"
    default_retryable = True
    own_fields = ("depth", "limit", "retry_after")

    def __init__(
        self, message: str, *, depth: int | None = None, limit: int | None = None, retry_after: float | None = None, **kw: Any
    ) -> None:
        super().__init__(message, **kw)
        self.depth = depth
        self.limit = limit
        self.retry_after = retry_after


class DeadlineExceeded(DynwireError):
    """A phase ran out of time; ``phase`` names it, ``timeout`` is its length in seconds."""

    code = "deadline_exceeded"
    default_phase = "total"
    own_fields = ("timeout",)

    def __init__(self, message: str, *, timeout: float | None = None, **kw: Any) -> None:
        super().__init__(message, **kw)
        self.timeout = timeout


class PeerLost(DynwireError):
    """The connection or the worker is gone. ``delivered`` items of the stream had been handed to the caller."""

    code = "peer_lost"
    default_phase = "reply"
    default_retryable = True
    own_fields = ("delivered",)

    def __init__(self, message: str, *, delivered: int = 0, **kw: Any) -> None:
        super().__init__(message, **kw)
        self.delivered = delivered


class MessageTooLarge(DynwireError):
    """Refused before sending or before allocating. ``size`` and ``limit`` in bytes; ``setting`` is what raises the limit."""

    code = "message_too_large"
    default_phase = "send"
    own_fields = ("size", "limit", "setting")

    def __init__(self, message: str, *, size: int = 0, limit: int = 0, setting: str = "", **kw: Any) -> None:
        super().__init__(message, **kw)
        self.size = size
        self.limit = limit
        self.setting = setting


class ProtocolError(DynwireError):
    """The peer broke the protocol. ``offset`` counts bytes received on the connection up to the offending frame."""

    code = "protocol_error"
    default_phase = "receive"
    own_fields = ("offset",)

    def __init__(self, message: str, *, offset: int = 0, **kw: Any) -> None:
        super().__init__(message, **kw)
        self.offset = offset


class DecodeError(DynwireError):
    """A payload does not match its codec or the wanted type."""

    code = "decode_error"
    default_phase = "decode"


class RemoteError(DynwireError):
    """The handler raised. ``type_name`` is the exception's class name, ``message`` its text; no traceback unless enabled."""

    code = "remote_error"
    default_phase = "handler"
    own_fields = ("type_name", "message")

    def __init__(self, message: str, *, type_name: str = "", remote_message: str | None = None, **kw: Any) -> None:
        super().__init__(message, **kw)
        self.type_name = type_name
        self.message = message if remote_message is None else remote_message


class Cancelled(DynwireError):
    """The worker ended the stream because of ``stop()`` or ``kill()``."""

    code = "cancelled"
    default_phase = "reply"


class Unauthenticated(DynwireError):
    """The peer wants a token or certificate that we did not show, or showed wrongly."""

    code = "unauthenticated"
    default_phase = "connect"


class PermissionDenied(DynwireError):
    """We are known, but not allowed."""

    code = "permission_denied"
    default_phase = "connect"


class ManagerClosed(DynwireError):
    """The manager, client or service was used after it was closed."""

    code = "manager_closed"
    default_phase = "api"


class ForkedManager(DynwireError):
    """An object from before ``fork()`` was used in the child, where it cannot work."""

    code = "forked_manager"
    default_phase = "api"


BY_CODE: dict[str, type[DynwireError]] = {
    cls.code: cls
    for cls in (
        ConfigError,
        BindError,
        ConnectError,
        NoInstances,
        EndpointNotFound,
        PlaneMismatch,
        Overloaded,
        DeadlineExceeded,
        PeerLost,
        MessageTooLarge,
        ProtocolError,
        DecodeError,
        RemoteError,
        Cancelled,
        Unauthenticated,
        PermissionDenied,
        ManagerClosed,
        ForkedManager,
    )
}
"""Wire name to class, for errors that a peer reports."""
