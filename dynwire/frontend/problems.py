"""Errors as OpenAI's clients expect them: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
import re
from typing import Any

import orjson

from ..errors import (
    Cancelled,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    DynwireError,
    EndpointNotFound,
    ManagerClosed,
    MessageTooLarge,
    NoInstances,
    Overloaded,
    PeerLost,
    PlaneMismatch,
    RemoteError,
)

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """What the client is told. ``param`` is the field of the request, ``code`` a stable name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or (INVALID if status < 500 else SERVER)
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The envelope as JSON."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}},
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """``Retry-After`` in whole seconds, if waiting may help."""
        if self.retry_after is None:
            return []
        return [(b"retry-after", str(max(1, math.ceil(self.retry_after))).encode())]


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong; ``param`` is the field."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    """A field of OpenAI's API that changes the answer, and that is not available here: better said than ignored."""
    return invalid(f"{param} is not supported: {what}", param, "unsupported_parameter")


def model_not_found(name: str, known: list[str]) -> ApiError:
    there = f"; served are: {', '.join(known)}" if known else "; no model is served at the moment"
    return ApiError(404, f"The model {name[:200]!r} does not exist{there}", param="model", code="model_not_found")


_AT = re.compile(r" - at `\$((?:[^`])*)`$")
_MISSING = re.compile(r"^Object missing required field `([^`]+)`")


def from_validation(error: Exception) -> ApiError:
    """msgspec's complaint about a body, with the field it is about."""
    text = str(error)
    path = ""
    found = _AT.search(text)
    if found:
        path = found[1].lstrip(".")
        text = text[: found.start()]
    missing = _MISSING.match(text)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        text = "it is required"
    if not path:
        return invalid(f"the body is not a valid request: {text}")
    return invalid(f"{path}: {text[0].lower()}{text[1:]}", path)


# Class of error -> (status, code, whether waiting may help). Anything else is a 500: a fault of the deployment.
_STATUS: tuple[tuple[type[DynwireError], int, str, bool], ...] = (
    (NoInstances, 503, "no_worker", True),
    (PlaneMismatch, 503, "plane_mismatch", False),
    (ConnectError, 503, "worker_unreachable", True),
    (EndpointNotFound, 503, "no_worker", True),
    (Overloaded, 503, "overloaded", True),
    (Cancelled, 503, "cancelled_by_worker", True),
    (ManagerClosed, 503, "shutting_down", True),
    (PeerLost, 502, "worker_lost", True),
    (DeadlineExceeded, 504, "timeout", False),
    (MessageTooLarge, 413, "request_too_large", False),
)


def from_error(error: DynwireError, retry_after: float) -> ApiError:
    """What went wrong on the way to the worker or in it."""
    for kind, status, code, waiting_helps in _STATUS:
        if isinstance(error, kind):
            own = getattr(error, "retry_after", None)
            return ApiError(status, str(error), code=code, retry_after=(own or retry_after) if waiting_helps else None)
    if isinstance(error, RemoteError):
        if error.type_name == "ValueError":  # what engines raise for a request that can never be answered
            return invalid(error.message)
        return ApiError(500, f"the worker failed: {error.type_name}: {error.message}", code="engine_error")
    if isinstance(error, ConfigError):
        return ApiError(500, str(error), code="configuration")
    return ApiError(500, f"{type(error).__name__}: {error}", code=error.code)


def error_event(error: ApiError) -> bytes:
    """The end of a stream that fails after its beginning."""
    return b"data: " + error.body() + b"\n\n"


def error_item(item: dict[str, Any]) -> ApiError:
    """The engine gave up on an answer and said so."""
    return ApiError(500, f"the engine failed: {item.get('error') or 'it did not say why'}", code="engine_error")
