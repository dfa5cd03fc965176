"""Errors on the wire: the body of an ERROR frame, and errors of one request made from those of a connection.

The body is a msgpack map: ``c`` code, ``m`` message, ``s`` sent, ``r`` retryable, ``p`` phase, ``f`` fields of the class,
``d`` details.
"""

from __future__ import annotations

import copy
import traceback
from typing import Any

import msgspec

from ..errors import BY_CODE, DynwireError, ProtocolError, RemoteError, Sent

_MESSAGE_LIMIT = 8192  # characters of one message: an error must fit into one frame
_encode = msgspec.msgpack.Encoder().encode


class _Body(msgspec.Struct):
    c: str
    m: str
    s: Sent = "yes"
    r: bool | None = None
    p: str | None = None
    f: dict[str, Any] = {}
    d: dict[str, Any] = {}


_decoder = msgspec.msgpack.Decoder(_Body)


def error_body(error: DynwireError) -> bytes:
    """The ERROR body for what the server itself decided: the same typed error arises at the caller."""
    fields = {name: _plain(getattr(error, name)) for name in error.own_fields}
    body = _Body(
        error.code, str(error)[:_MESSAGE_LIMIT], error.sent, error.retryable, error.phase, fields, _plain_dict(error.details)
    )
    return bytes(_encode(body))


def handler_error_body(error: BaseException, *, with_traceback: bool = False) -> bytes:
    """The ERROR body for what a handler raised: `RemoteError` at the caller, whatever it was."""
    details: dict[str, Any] = {}
    if with_traceback:
        details["traceback"] = "".join(traceback.format_exception(error))[-4 * _MESSAGE_LIMIT :]
    fields = {"type_name": type(error).__name__}
    return bytes(_encode(_Body("remote_error", str(error)[:_MESSAGE_LIMIT], "yes", False, "handler", fields, details)))


def error_from_body(body: bytes, *, peer: str | None, request_id: str | None, delivered: int = 0) -> DynwireError:
    """The exception that an ERROR body describes. A body that does not decode is itself a `ProtocolError`."""
    try:
        parts = _decoder.decode(body)
    except msgspec.MsgspecError as error:
        text = f"{peer} sent an ERROR frame that does not decode: {error}"
        problem = ProtocolError(text, peer=peer, sent="maybe", request_id=request_id)
        problem.__cause__ = error
        return problem
    cls = BY_CODE.get(parts.c, RemoteError)
    common: dict[str, Any] = {
        "peer": peer,
        "sent": parts.s,
        "retryable": parts.r,
        "request_id": request_id,
        "phase": parts.p,
        "details": parts.d,
    }
    if cls is RemoteError:
        type_name = str(parts.f.get("type_name", parts.c))
        text = f"the handler at {peer} raised {type_name}: {parts.m}" if parts.m else f"the handler at {peer} raised {type_name}"
        return RemoteError(text, type_name=type_name, remote_message=parts.m, **common)
    made = cls(parts.m, **common)
    for name in cls.own_fields:
        if name in parts.f:
            setattr(made, name, parts.f[name])
    if "delivered" in cls.own_fields:
        made.__dict__["delivered"] = delivered
    return made


def for_request(template: DynwireError, *, sent: Sent, request_id: str | None, delivered: int = 0) -> DynwireError:
    """An error of a connection, as one of its requests sees it."""
    error = copy.copy(template)
    error.sent = sent
    error.request_id = request_id
    if "delivered" in error.own_fields:
        error.__dict__["delivered"] = delivered
    error.__cause__ = template.__cause__
    return error


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (str, int, float, bool, list, tuple, dict)) else str(value)


def _plain_dict(values: dict[str, Any]) -> dict[str, Any]:
    return {str(k): _plain(v) for k, v in values.items()}
