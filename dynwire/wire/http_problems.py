"""Errors of the http plane: typed errors as RFC 9457 problems, and typed errors made from responses again."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
import orjson

from ..errors import (
    BY_CODE,
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    DecodeError,
    DynwireError,
    EndpointNotFound,
    ManagerClosed,
    MessageTooLarge,
    NoInstances,
    Overloaded,
    PeerLost,
    PermissionDenied,
    PlaneMismatch,
    ProtocolError,
    Sent,
    Unauthenticated,
)
from .faults import error_body, error_from_body

Headers = list[tuple[bytes, bytes]]

PROBLEM = b"application/problem+json"
ITEMS = b"application/vnd.dynwire.items"
KIND_ERROR = 3
TYPE_PREFIX = "urn:dynwire:error:"
"""``type`` of a problem is this and the error's ``code``: a name, since there is no page to be found at an address."""

ITEM_HEAD_BYTES = 5
_TEXT_LIMIT = 200  # characters of a foreign page that an error quotes
_PAGE_LIMIT = 4096  # bytes of it that are searched for text
_VISIBLE_ID = re.compile(r"[!-~]{1,128}")


class HttpFault(Exception):
    """A request that is wrong as HTTP, before any endpoint has to do with it. ``headers`` go into the response."""

    def __init__(self, status: int, title: str, detail: str, headers: Headers | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail
        self.headers: Headers = headers or []
        self.request_id = ""
        """the caller's, if the request could be read that far"""

    def response(self, request_id: str = "") -> tuple[int, Headers, bytes]:
        """Status, headers and body of the answer."""
        request_id = request_id or self.request_id
        code = "endpoint_not_found" if self.status == 404 else "protocol_error"
        document: dict[str, Any] = {
            "type": TYPE_PREFIX + code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **_instance(request_id),
            "code": code,
            "phase": "receive",
            "sent": "no",
            "retryable": False,
        }
        return _response(self.status, document, request_id, self.headers)


# Errors as responses ---------------------------------------------------------------------------------------------------------

_STATUS: dict[type[DynwireError], int] = {
    DecodeError: 400,
    ProtocolError: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    EndpointNotFound: 404,
    MessageTooLarge: 413,
    Overloaded: 429,
    Cancelled: 499,
    ConnectError: 502,
    PlaneMismatch: 502,
    PeerLost: 503,
    NoInstances: 503,
    ManagerClosed: 503,
    DeadlineExceeded: 504,
}
"""All others, `RemoteError` among them, are 500. 499 is what nginx calls a request that its client has cancelled."""


def status_of(error: DynwireError) -> int:
    """The status for an error that ends a request.

    4xx blame the request, so what only looks like it is 500: a reply that is too large or that its codec cannot encode.
    `Overloaded` is 429 when the endpoint's own limit is full, and 503 with ``limit == 0``: nothing is accepted at all.
    """
    if isinstance(error, Overloaded) and error.limit == 0:
        return 503
    if isinstance(error, DeadlineExceeded) and error.phase == "send":
        return 408  # the request's body did not arrive in time
    if (isinstance(error, MessageTooLarge) and error.phase == "reply") or (
        isinstance(error, DecodeError) and error.phase == "encode"
    ):
        return 500
    return _STATUS.get(type(error), 500)


def problem(error: DynwireError, request_id: str = "") -> tuple[int, Headers, bytes]:
    """Status, headers and body (``application/problem+json``) for a request that an error ends before any item."""
    status = status_of(error)
    extra: Headers = []
    if isinstance(error, Overloaded) or status == 503:
        wait = getattr(error, "retry_after", None)
        # RFC 9110 §10.2.3: whole seconds. Rounded up, since coming too early costs another refusal.
        extra.append((b"retry-after", b"%d" % (1 if wait is None else max(1, math.ceil(wait)))))
    if status == 401:
        extra.append((b"www-authenticate", b"Bearer"))  # RFC 9110 §11.6.1 requires one
    return _response(status, problem_document(error, request_id, status), request_id, extra)


def problem_document(error: DynwireError, request_id: str = "", status: int | None = None) -> dict[str, Any]:
    """The members of a problem: those of RFC 9457, and the error's own fields so that the caller's side can rebuild it."""
    parts = msgspec.msgpack.decode(error_body(error))  # for its limits, and so that every value is plain
    code = parts["c"]
    document: dict[str, Any] = {
        "type": TYPE_PREFIX + code,
        "title": _TITLES[code],
        "status": status_of(error) if status is None else status,
        "detail": str(error).encode("utf-8", "replace").decode() if code == "remote_error" else parts["m"],
        **_instance(request_id),
        "code": code,
        "phase": parts["p"],
        "sent": parts["s"],
        "retryable": parts["r"],
    }
    if code == "remote_error":
        document["message"] = parts["m"]
    document.update((name, value) for name, value in parts["f"].items() if value is not None)
    if parts["d"]:
        document["details"] = parts["d"]
    return document


def _title(cls: type[DynwireError]) -> str:
    return re.sub(r"(?<!^)([A-Z])", lambda match: f" {match[1].lower()}", cls.__name__)


_TITLES = {code: _title(cls) for code, cls in BY_CODE.items()} | {DynwireError.code: "Error"}


def _instance(request_id: str) -> dict[str, str]:
    """``instance`` is a URI reference (RFC 9457 §3.1.5): the request id, escaped where it is no such thing."""
    if not request_id:
        return {}
    return {"instance": quote(request_id, safe="!$&'()*+,;=:@/?-._~", errors="replace")}


def id_header(request_id: str) -> tuple[bytes, bytes] | None:
    """``x-request-id`` for a response; None for an id that no header can carry."""
    return (b"x-request-id", request_id.encode()) if _VISIBLE_ID.fullmatch(request_id) else None


def _response(status: int, document: dict[str, Any], request_id: str, extra: Headers) -> tuple[int, Headers, bytes]:
    body = to_json(document)
    headers: Headers = [(b"content-type", PROBLEM), (b"content-length", b"%d" % len(body)), *extra]
    shown_id = id_header(request_id)
    if shown_id is not None:
        headers.append(shown_id)
    return status, headers, body


def to_json(document: Any) -> bytes:
    """JSON for people: with a line end, so that a shell's prompt stands on a line of its own."""
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


# Responses as errors ---------------------------------------------------------------------------------------------------------

_SURELY_NOT_SENT = (
    "no healthy upstream",  # Envoy
    "reset reason: connection failure",  # Envoy 1.21 and older; connecting failed, so nothing was passed on
    "reset reason: local connection failure",
    "reset reason: remote connection failure",
    "reset reason: connection timeout",
    "reset reason: overflow",  # Envoy: its circuit breaker is open
    "no server is available to handle this request",  # HAProxy; it answers 502 when a server failed in mid-request
)
"""What proxies write into a 503 when they have passed the request on to nobody. All other 503 say nothing about that."""


def error_from_response(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    *,
    peer: str | None,
    request_id: str | None,
    delivered: int = 0,
) -> DynwireError:
    """The typed error that a response other than a reply stands for; never raises.

    A worker's own answer (a problem with our ``type``, or an item of kind 3) gives the error that the worker meant, with all its
    fields. Any other comes from something between us and the worker, or from a server that is no dynwire: the error says so
    and quotes the status and the page's first 200 characters.
    """
    found = dict(headers)
    content_type = found.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if content_type == ITEMS and len(body) > ITEM_HEAD_BYTES and body[0] == KIND_ERROR:
        return error_from_body(body[ITEM_HEAD_BYTES:], peer=peer, request_id=request_id, delivered=delivered)
    document: Any = None
    if content_type == PROBLEM:
        try:
            document = orjson.loads(body)
        except ValueError:
            document = None
    if isinstance(document, dict):
        made = error_from_problem(document, peer=peer, request_id=request_id, delivered=delivered)
        if made is not None:
            if isinstance(made, Overloaded) and made.retry_after is None:
                made.retry_after = _retry_after(found)
            return made
    return _foreign(status, found, content_type, body, peer, request_id, delivered)


def error_from_problem(
    document: dict[str, Any], *, peer: str | None, request_id: str | None, delivered: int = 0
) -> DynwireError | None:
    """The error that one of our problems describes, or None if it is not ours. Never raises."""
    code, kind = document.get("code"), document.get("type")
    if not isinstance(code, str) or kind != TYPE_PREFIX + code:
        return None
    cls = BY_CODE.get(code)
    fields = cls.own_fields if cls is not None else ()
    retryable, phase, details = document.get("retryable"), document.get("phase"), document.get("details")
    text = document.get("message" if code == "remote_error" else "detail", "")
    parts = {
        "c": code,
        "m": text if isinstance(text, str) else "",
        "s": document["sent"] if document.get("sent") in ("no", "maybe", "yes") else "maybe",
        "r": retryable if isinstance(retryable, bool) else None,
        "p": phase if isinstance(phase, str) else None,
        "f": {name: document[name] for name in fields if name in document},
        "d": details if isinstance(details, dict) else {},
    }
    try:
        packed = msgspec.msgpack.encode(parts)
    except RecursionError:  # orjson reads deeper nesting than msgspec writes
        packed = msgspec.msgpack.encode({**parts, "f": {}, "d": {}})
    return error_from_body(packed, peer=peer, request_id=request_id, delivered=delivered)


def _foreign(
    status: int,
    headers: dict[bytes, bytes],
    content_type: bytes,
    body: bytes,
    peer: str | None,
    request_id: str | None,
    delivered: int,
) -> DynwireError:
    text = page_text(body)
    quoted = f": {text}" if text else ""
    try:
        phrase = f" {HTTPStatus(status).phrase}"
    except ValueError:
        phrase = ""
    server = headers.get(b"server", b"").decode("latin-1")[:64]
    by = f" (server: {server})" if server else ""
    what = f"{peer or 'the peer'} answered {status}{phrase}{by}, which is not a dynwire worker's answer{quoted}"
    common: dict[str, Any] = {"peer": peer, "request_id": request_id, "details": {"status": status, "text": text}}

    def made(cls: type[DynwireError], message: str = what, *, sent: Sent, **fields: Any) -> DynwireError:
        return cls(message, sent=sent, **fields, **common)

    if status == 502:
        return made(PeerLost, f"a proxy has lost the worker: {what}", sent="maybe", delivered=delivered)
    if status == 503:
        if any(phrase in text.lower() for phrase in _SURELY_NOT_SENT):
            return made(ConnectError, f"a proxy reaches no worker: {what}", sent="no")
        return made(PeerLost, f"a proxy has no worker for the request: {what}", sent="maybe", delivered=delivered)
    if status == 504:
        return made(DeadlineExceeded, f"a proxy gave up waiting for the worker: {what}", sent="maybe", phase="reply")
    if status in (408, 499):
        return made(DeadlineExceeded, what, sent="maybe", phase="send")
    if status == 401:
        return made(Unauthenticated, what, sent="no")
    if status == 403:
        return made(PermissionDenied, what, sent="no")
    if status == 404:
        return made(EndpointNotFound, f"{what} (is DYN_HTTP_RPC_ROOT_PATH the same on both sides?)", sent="no")
    if status == 413:
        return made(MessageTooLarge, what, sent="no", setting="the body limit of the proxy")
    if status == 429:
        return made(Overloaded, what, sent="no", retry_after=_retry_after(headers))
    if 200 <= status < 300:
        kind = content_type.decode("latin-1")[:64] or "no content type"
        return made(ProtocolError, f"{what} (content type {kind}, expected {ITEMS.decode()})", sent="maybe")
    if 300 <= status < 400:
        target = headers.get(b"location", b"").decode("latin-1")[:_TEXT_LIMIT]
        return made(ProtocolError, f"{what} (redirects to {target or 'nowhere'}; dynwire follows none)", sent="no")
    return made(ProtocolError, what, sent="no" if 400 <= status < 500 else "maybe")


def _retry_after(headers: dict[bytes, bytes]) -> float | None:
    value = headers.get(b"retry-after", b"").strip()
    return float(value) if value.isdigit() and len(value) <= 9 else None  # a date needs a clock, and proxies send seconds


def page_text(body: bytes) -> str:
    """The first 200 characters of what a person would read in a page, HTML or not."""
    text = body[:_PAGE_LIMIT].decode("utf-8", "replace")
    if "<" in text:
        text = re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->", " ", text)
        # not <[^>]*>, which takes time quadratic in the number of "<"
        text = html.unescape(re.sub(r"<[^<>]*>", " ", text))
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= _TEXT_LIMIT else f"{text[: _TEXT_LIMIT - 1]}…"
