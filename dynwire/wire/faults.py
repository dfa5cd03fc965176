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

_MESSAGE_LIMIT = 8192  # bytes of one message …
_DETAILS_LIMIT = 49152  # … and of the details: an error must fit into one frame, of less than 98,900 bytes
_encode = msgspec.msgpack.Encoder().encode


class _Body(msgspec.Struct):
    c: str
    m: str
    s: Sent = "yes"
    r: bool | None = None
    p: str | None = None
    f: dict[str, Any] = {}
    d: dict[str, Any] = {}


_FIELD_TYPES: dict[str, Any] = {
    **dict.fromkeys(("depth", "limit", "size", "offset"), int),
    **dict.fromkeys(("retry_after", "timeout"), (int, float)),
    **dict.fromkeys(("value", "allowed"), object),
}
"""A peer's fields are taken over only if they are what the class says; texts otherwise."""

_decoder = msgspec.msgpack.Decoder(_Body)


def error_body(error: DynwireError) -> bytes:
    """The ERROR body for what the server itself decided: the same typed error arises at the caller."""
    fields = {name: getattr(error, name) for name in error.own_fields}
    text = str(error)
    if isinstance(error, RemoteError):
        text = fields.pop("message")  # the exception's own text: the caller's side writes "the handler at … raised" around it
    return _pack(error.code, text, error.sent, error.retryable, error.phase, fields, error.details)


def handler_error_body(error: BaseException, *, with_traceback: bool = False) -> bytes:
    """The ERROR body for what a handler raised: `RemoteError` at the caller, whatever it was."""
    return error_body(handler_error(error, with_traceback=with_traceback))


def handler_error(error: BaseException, *, with_traceback: bool = False) -> RemoteError:
    """What a handler raised, as the worker reports it."""
    details: dict[str, Any] = {}
    if with_traceback:
        details["traceback"] = _cut("".join(traceback.format_exception(error)), _DETAILS_LIMIT // 2, tail=True)
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001 - an exception of the user's that cannot say what it is
        text = f"(its text cannot be read: {type(broken).__name__})"
    name = type(error).__name__
    shown = f"the handler raised {name}: {text}" if text else f"the handler raised {name}"
    return RemoteError(shown, type_name=name, remote_message=text, phase="handler", sent="yes", retryable=False, details=details)


def _pack(
    code: str, text: str, sent: Sent, retryable: bool, phase: str, fields: dict[str, Any], details: dict[str, Any]
) -> bytes:
    plain = {_cut(str(key), 256): _plain(value) for key, value in details.items()}
    if len(_encode(plain)) > _DETAILS_LIMIT:
        plain = {"omitted": f"details of more than {_DETAILS_LIMIT} bytes"}
    short = {name: _plain(value) for name, value in fields.items()}
    if len(_encode(short)) > _MESSAGE_LIMIT:
        short = {name: _cut(str(value), 256) for name, value in fields.items()}
    return bytes(_encode(_Body(code, _cut(text, _MESSAGE_LIMIT), sent, retryable, phase, short, plain)))


def _cut(text: str, limit: int, *, tail: bool = False) -> str:
    """``text`` in at most ``limit`` bytes of UTF-8; lone surrogates (from file names, say) become question marks."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return (data[-limit:] if tail else data[:limit]).decode("utf-8", "ignore")


def _plain(value: object, depth: int = 4) -> object:
    """``value`` as msgpack can carry it; what it cannot is shown as text."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else str(value)
    if isinstance(value, (list, tuple)) and depth:
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict) and depth:
        return {_cut(str(key), 256): _plain(item, depth - 1) for key, item in value.items()}
    return _cut(str(value), _DETAILS_LIMIT)


def error_from_body(body: bytes, *, peer: str | None, request_id: str | None, delivered: int = 0) -> DynwireError:
    """The exception that an ERROR body describes. A body that does not decode is itself a `ProtocolError`."""
    try:
        parts = _decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
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
        if name in parts.f and isinstance(parts.f[name], _FIELD_TYPES.get(name, str)):
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
