"""What requests and replies of the http plane mean, for HTTP/1.1 and HTTP/2 alike: bytes and header lists, no I/O.

`parse_head` reads a request's headers, `reply_encoder` writes replies in the shape that the caller asked for, and
`constant_headers` and `request_headers` write what `parse_head` reads, for dynwire's own client. Header lists are those of
HTTP/2: names in lower case, pseudo-headers first; HTTP/1.1 is translated by `dynwire.wire.http1`. docs/http.md is the same for
people with curl.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import struct
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import unquote

import msgspec
import orjson

from ..codec import KIND_JSON, KIND_MSGPACK, KIND_RAW
from ..errors import DecodeError, DynwireError, MessageTooLarge
from .faults import error_body
from .http_pages import EndpointInfo, endpoints_page, live_page, openapi_page, ready_page
from .http_problems import (
    ITEM_HEAD_BYTES,
    ITEMS,
    KIND_ERROR,
    PROBLEM,
    Headers,
    HttpFault,
    error_from_problem,
    error_from_response,
    id_header,
    problem,
    problem_document,
    status_of,
)

__all__ = [
    "ITEMS",
    "ITEM_HEAD_BYTES",
    "JSON",
    "KIND_ACCEPT",
    "KIND_ERROR",
    "MSGPACK",
    "NDJSON",
    "PROBLEM",
    "RAW",
    "SSE",
    "UNIQUE_NAMES",
    "EndpointInfo",
    "Headers",
    "HttpFault",
    "ReplyEncoder",
    "RequestHead",
    "constant_headers",
    "endpoints_page",
    "error_from_problem",
    "error_from_response",
    "id_header",
    "item_head",
    "live_page",
    "openapi_page",
    "parse_head",
    "problem",
    "ready_page",
    "refusal",
    "reply_encoder",
    "reply_kind",
    "request_headers",
    "status_of",
]

JSON = b"application/json"
MSGPACK = b"application/msgpack"
RAW = b"application/octet-stream"
NDJSON = b"application/x-ndjson"
SSE = b"text/event-stream"

KIND_ACCEPT = 4
"""Kinds of items are those of payloads (`dynwire.codec.KINDS`), `KIND_ERROR`, and this one: the worker has the request."""

Page = Literal["endpoint", "list", "live", "ready", "openapi", "stop"]
Shape = Literal["items", "json", "ndjson", "sse", "msgpack", "raw", "auto"]

_CONTENT_KINDS: dict[bytes, int] = {
    JSON: KIND_JSON,
    b"text/json": KIND_JSON,
    MSGPACK: KIND_MSGPACK,
    b"application/x-msgpack": KIND_MSGPACK,
    b"application/vnd.msgpack": KIND_MSGPACK,
    RAW: KIND_RAW,
}
_KIND_TYPES = (RAW, MSGPACK, JSON)
_FORM = b"application/x-www-form-urlencoded"
_KNOWN_CONTENT = (
    f"{JSON.decode()}, {MSGPACK.decode()} (also application/x-msgpack and application/vnd.msgpack) and {RAW.decode()}"
)

_ACCEPT_SHAPES: dict[bytes, Shape] = {
    JSON: "json",
    b"text/json": "json",
    NDJSON: "ndjson",
    b"application/ndjson": "ndjson",
    b"application/jsonl": "ndjson",
    b"application/x-jsonlines": "ndjson",
    SSE: "sse",
    b"text/*": "sse",
    MSGPACK: "msgpack",
    b"application/x-msgpack": "msgpack",
    b"application/vnd.msgpack": "msgpack",
    RAW: "raw",
    ITEMS: "items",
    b"*/*": "auto",
    b"application/*": "auto",
}
_KNOWN_ACCEPT = ", ".join(t.decode() for t in (JSON, NDJSON, SSE, MSGPACK, RAW, ITEMS))

HEADERS_LIMIT = 32768
"""Bytes of a request's context headers, as on the tcp plane."""
_PLAIN_HEADERS = 64  # context headers sent as HTTP headers; receivers refuse heads of more than 100
_CACHEABLE = 512  # bytes of headers that may be the key of a cache's entry; what a peer sends must not make caches large
_MAX_MS = 2**32 - 1
_ACCEPT_PARTS = 64

UNIQUE_NAMES = frozenset(
    {
        b"x-request-id",
        b"x-dynwire-id",
        b"x-dynwire-meta",
        b"x-request-timeout-ms",
        b"content-length",
        b"traceparent",
        b"tracestate",
        b"baggage",
    }
)
"""Headers whose values rarely repeat: an HPACK encoder must not index them, they would drive out the useful ones."""

# Names that HTTP, proxies or this plane use. They never reach a handler's context, except through x-dynwire-meta.
_RESERVED = frozenset(
    {
        b"accept",
        b"authorization",
        b"connection",
        b"expect",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"user-agent",
        b"x-request-id",
        b"x-request-timeout-ms",
    }
)
_RESERVED_PREFIXES = (b":", b"accept-", b"content-", b"proxy-", b"x-dynwire-")
_NAMES = dict.fromkeys((*_RESERVED, b":scheme", b":authority"), False) | dict.fromkeys(
    (
        b":method",
        b":path",
        b"accept",
        b"authorization",
        b"content-length",
        b"content-type",
        b"x-dynwire-accept-timeout-ms",
        b"x-dynwire-id",
        b"x-dynwire-meta",
        b"x-dynwire-token",
        b"x-request-id",
        b"x-request-timeout-ms",
    ),
    True,
)
"""Known names: whether `parse_head` reads them; the others among them are skipped."""

_VISIBLE_ID = re.compile(rb"[!-~]{1,128}")
_PLAIN_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,128}")
_PLAIN_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_PART = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of an endpoint, as in `dynwire.types.EndpointId`


class RequestHead(msgspec.Struct):
    """What a request's headers say."""

    method: str = ""
    path: str = ""
    """without the query"""
    page: Page = "endpoint"
    endpoint: str = ""
    """``namespace.component.endpoint``, for the page ``endpoint``"""
    kind: int = KIND_JSON
    """codec of the request's body, a number of `dynwire.codec.KINDS`"""
    shape: Shape = "auto"
    timeout_ms: int = 0
    """time left until the deadline, 0 for none"""
    accept_timeout_ms: int = 0
    """(dynwire's own client) how long it waits for an accept or an item, 0 if it does not say"""
    request_id: str = ""
    """the caller's, or empty; for the page ``stop`` the id of the request to stop"""
    headers: dict[str, str] = {}
    """for the handler's context"""
    content_length: int | None = None
    token: str | None = None


# Reading requests ------------------------------------------------------------------------------------------------------------


def parse_head(headers: Headers, root: str) -> RequestHead:
    """What the request with these headers wants; ``root`` is DYN_HTTP_RPC_ROOT_PATH.

    Raises `HttpFault`: 404, 405, 415, 406, 400 in this order of looking, 431 for oversized x-dynwire-meta. Names must be lower
    case, one ``:method`` and ``:path`` present, as both protocol layers ensure.

    A body without content type, or with the one of HTML forms (what ``curl -d`` sends), counts as JSON: that is what people
    mean. From a browser it does not, because pages of foreign sites can send both without asking (no CORS preflight).
    """
    known: dict[bytes, bytes] = {}
    given: dict[str, str] = {}
    for name, value in headers:
        wanted = _NAMES.get(name)
        if wanted:
            known[name] = value if name != b"accept" or name not in known else known[name] + b"," + value
        elif wanted is None and not name.startswith(_RESERVED_PREFIXES):
            key = name.decode("latin-1")
            text = _text(value)
            if key in given:  # RFC 9110 §5.3, RFC 9113 §8.2.3
                text = f"{given[key]}{'; ' if key == 'cookie' else ', '}{text}"
            given[key] = text

    get = known.get
    method, target = known[b":method"], known[b":path"]
    content_type, accept = get(b"content-type", b""), get(b"accept", b"")
    small = len(target) + len(content_type) + len(accept) + len(method) <= _CACHEABLE
    meaning = _meaning if small else _meaning.__wrapped__
    try:
        head = RequestHead(*meaning(method, target, content_type, accept, "origin" in given, root))
        _read_rest(head, known, given, root)
    except HttpFault as fault:
        fault.request_id = _visible_id(get(b"x-request-id"))
        raise
    return head


def _visible_id(value: bytes | None) -> str:
    return value.decode() if value is not None and _VISIBLE_ID.fullmatch(value) else ""


def _read_rest(head: RequestHead, known: dict[bytes, bytes], given: dict[str, str], root: str) -> None:
    get = known.get
    if ("traceparent" in given or "tracestate" in given) and not _valid_traceparent(given.get("traceparent")):
        # W3C Trace Context §3.2.2: an invalid traceparent is ignored, and tracestate with it
        given.pop("traceparent", None)
        given.pop("tracestate", None)
    if b"x-dynwire-meta" in known:
        # What stands in a header of its own wins: a proxy that sets it must not be outdone by a caller.
        given = _unpack_meta(known[b"x-dynwire-meta"]) | given
    head.headers = given

    if (timeout := get(b"x-request-timeout-ms")) is not None:
        head.timeout_ms = _number("x-request-timeout-ms", timeout, _MAX_MS, "milliseconds")
    if (timeout := get(b"x-dynwire-accept-timeout-ms")) is not None:
        head.accept_timeout_ms = _number("x-dynwire-accept-timeout-ms", timeout, _MAX_MS, "milliseconds")
    if (length := get(b"content-length")) is not None:
        head.content_length = _number("content-length", length, 2**63 - 1, "bytes")

    if not head.request_id:  # not named by the path
        head.request_id = _visible_id(get(b"x-request-id"))
        if not head.request_id and (packed_id := get(b"x-dynwire-id")) is not None:
            head.request_id = _text(_unbase64("x-dynwire-id", packed_id))
    if head.page == "stop" and not head.request_id:
        raise HttpFault(400, "Bad Request", f"which request? POST {root}/stop/<request id>, or name it in x-request-id")

    # The one of our own wins, so that a proxy may use `authorization` for itself.
    if (token := get(b"x-dynwire-token")) is not None:
        head.token = _text(token)
    elif (authorization := get(b"authorization")) is not None and authorization[:7].lower() == b"bearer ":
        head.token = _text(authorization[7:].strip())


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")  # RFC 9110 §5.5: what obs-text means is not defined


@functools.lru_cache(maxsize=1024)
def _meaning(
    method: bytes, target: bytes, content_type: bytes, accept: bytes, from_browser: bool, root: str
) -> tuple[str, str, Page, str, int, Shape, int, int, str]:
    """The first fields of a `RequestHead`, as far as these few headers say: the same ones come again and again."""
    path = target.partition(b"?")[0].decode("latin-1")
    page, endpoint, stop_id = _route(path, root)
    verb = method.decode("latin-1")
    allowed = "GET, HEAD" if page not in ("endpoint", "stop") else "POST"
    if verb not in allowed.split(", "):
        raise HttpFault(
            405, "Method Not Allowed", f"{verb[:32]} {path[:256]}: allowed is {allowed}", [(b"allow", allowed.encode())]
        )
    kind = KIND_JSON
    shape: Shape = "auto"
    if page == "endpoint":
        kind = _kind_of(content_type)
        if kind == _KIND_FORM and not from_browser:
            kind = KIND_JSON
        if kind < 0:
            raise _unsupported(content_type, kind == _KIND_FORM)
        if accept:
            shape = _shape_of(accept)
    return verb, path, page, endpoint, kind, shape, 0, 0, stop_id


def _route(path: str, root: str) -> tuple[Page, str, str]:
    """Page, endpoint and id of the request to stop; raises `HttpFault` 404."""
    plain = path[:-1] if path.endswith("/") and path != "/" else path
    if plain in _FIXED_PAGES:
        return _FIXED_PAGES[plain], "", ""
    detail = f"nothing is at {path[:256]}"
    if plain == root or plain == "/":
        return "list", "", ""
    if plain.startswith(f"{root}/"):
        parts = [unquote(part, errors="replace") for part in plain[len(root) + 1 :].split("/")]
        if parts == ["openapi.json"]:
            return "openapi", "", ""
        if parts == ["stop"]:
            return "stop", "", ""
        if len(parts) == 2 and parts[0] == "stop" and _VISIBLE_ID.fullmatch(parts[1].encode()):
            return "stop", "", parts[1]
        if len(parts) == 1:
            parts = parts[0].split(".")
        if len(parts) == 3:
            if all(_PART.fullmatch(part) for part in parts):
                return "endpoint", ".".join(parts), ""
            detail += ": each part of an endpoint is 1 to 64 letters, digits, '-' or '_'"
    raise HttpFault(
        404,
        "Not Found",
        f"{detail}; there are POST {root}/<namespace>/<component>/<endpoint>, GET {root} (lists the endpoints), "
        f"POST {root}/stop/<request id>, GET /live, GET /ready and GET /openapi.json",
    )


_FIXED_PAGES: dict[str, Page] = {"/live": "live", "/ready": "ready", "/health": "ready", "/openapi.json": "openapi"}

_KIND_UNKNOWN = -1
_KIND_FORM = -2


def _kind_of(content_type: bytes) -> int:
    media = content_type.partition(b";")[0].strip().lower()
    if not media or media == _FORM:
        return _KIND_FORM
    if media.startswith(b"application/") and media.endswith(b"+json"):  # RFC 6839 §3.1
        return KIND_JSON
    return _CONTENT_KINDS.get(media, _KIND_UNKNOWN)


def _unsupported(content_type: bytes, from_browser: bool) -> HttpFault:
    what = f"the content type {_text(content_type)[:128]!r}" if content_type else "no content type"
    text = f"{what} is not one that this plane knows; known are {_KNOWN_CONTENT}"
    if from_browser:
        text = f"{what} from a browser: pages must say {JSON.decode()}, so that foreign sites cannot send requests in secret"
    # RFC 9110 §15.5.16: `accept` in the answer says what would have been right
    return HttpFault(415, "Unsupported Media Type", text, [(b"accept", b", ".join((JSON, MSGPACK, RAW)))])


def _shape_of(accept: bytes) -> Shape:
    """The shape that an Accept header asks for: highest q, then the more specific range, then the first. Raises 406."""
    best: tuple[float, int] = (0.0, -1)
    shape: Shape | None = None
    for part in accept.split(b",", _ACCEPT_PARTS)[:_ACCEPT_PARTS]:
        media, *parameters = [piece.strip().lower() for piece in part.split(b";")]
        found = _ACCEPT_SHAPES.get(media)
        if found is None:
            continue
        quality = 1.0
        for parameter in parameters:
            if re.fullmatch(rb"q=[01](?:\.[0-9]{0,3})?", parameter):
                quality = min(1.0, float(parameter[2:]))
        rank = (quality, 2 - media.count(b"*"))
        if quality > 0 and rank > best:
            best, shape = rank, found
    if shape is None:
        raise HttpFault(
            406, "Not Acceptable", f"replies cannot have the form {_text(accept)[:256]!r}; possible are {_KNOWN_ACCEPT}"
        )
    return shape


def _number(name: str, value: bytes, limit: int, unit: str) -> int:
    if value.isdigit() and len(value) <= 19:
        number = int(value)
        if number <= limit:
            return number
    raise HttpFault(400, "Bad Request", f"{name}: {_text(value)[:64]!r} is not a whole number of {unit} from 0 to {limit}")


def _valid_traceparent(value: str | None) -> bool:
    """W3C Trace Context §3.2.2; versions above 00 may have more at the end."""
    match = _TRACEPARENT.fullmatch(value) if value is not None else None
    if match is None or match[1] == "ff" or (match[1] == "00" and match[4] is not None):
        return False
    return match[2].strip("0") != "" and match[3].strip("0") != ""


def _unbase64(name: str, value: bytes) -> bytes:
    value = value.rstrip(b"=")
    try:
        return binascii.a2b_base64(value.translate(_FROM_URL) + b"=" * (-len(value) % 4), strict_mode=True)
    except binascii.Error as error:
        raise HttpFault(400, "Bad Request", f"{name} is not base64url: {error}") from error


_FROM_URL = bytes.maketrans(b"-_", b"+/")
_meta_decoder = msgspec.msgpack.Decoder(dict[str, str])


def _unpack_meta(value: bytes) -> dict[str, str]:
    data = _unbase64("x-dynwire-meta", value)
    if len(data) > HEADERS_LIMIT:
        raise HttpFault(
            431, "Request Header Fields Too Large", f"x-dynwire-meta has {len(data)} bytes, the limit is {HEADERS_LIMIT}"
        )
    try:
        return _meta_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise HttpFault(400, "Bad Request", f"x-dynwire-meta is not a msgpack map of texts: {error}") from error


# Writing requests ------------------------------------------------------------------------------------------------------------


def constant_headers(
    *,
    authority: str,
    root: str,
    endpoint: str,
    kind: int = KIND_MSGPACK,
    scheme: str = "http",
    user_agent: str = "dynwire",
    token: str | None = None,
    accept_timeout_ms: int = 0,
) -> Headers:
    """What is the same in all requests for an endpoint with bodies of one kind; make it once and use the same list again.

    HPACK then sends each of them as one byte. `request_headers` is the rest of a request.
    """
    headers: Headers = [
        (b":method", b"POST"),
        (b":scheme", scheme.encode()),
        (b":authority", authority.encode()),
        (b":path", f"{root}/{endpoint.replace('.', '/')}".encode()),
        (b"content-type", _KIND_TYPES[kind]),
        (b"accept", ITEMS),
        (b"user-agent", user_agent.encode()),
    ]
    if accept_timeout_ms:
        headers.append((b"x-dynwire-accept-timeout-ms", b"%d" % accept_timeout_ms))
    if token is not None:
        headers.append((b"authorization", b"Bearer " + token.encode()))
    return headers


def request_headers(
    *,
    request_id: str = "",
    timeout_ms: int = 0,
    headers: Mapping[str, str] | None = None,
    content_length: int | None = None,
) -> Headers:
    """What differs from request to request. ``headers`` are those of the context; the handler gets exactly the same ones.

    Those that can be HTTP headers are, so that proxies and logs see them. The rest travels in ``x-dynwire-meta``: names that
    are not lower-case tokens or reserved, values that are not visible ASCII, trace headers that are not valid.
    Raises `MessageTooLarge` above `HEADERS_LIMIT` bytes, `DecodeError` for texts that are not Unicode (lone surrogates).
    """
    out: Headers = []
    if timeout_ms:
        out.append((b"x-request-timeout-ms", b"%d" % min(timeout_ms, _MAX_MS)))
    if content_length is not None:
        out.append((b"content-length", b"%d" % content_length))
    try:
        if request_id:
            out.append(id_header(request_id) or (b"x-dynwire-id", _base64(request_id.encode())))
        if headers:
            _add_context(out, headers)
    except UnicodeEncodeError as error:
        raise DecodeError(f"the request's id and headers must be Unicode: {error}", phase="encode") from error
    return out


def _add_context(out: Headers, headers: Mapping[str, str]) -> None:
    packed: dict[str, str] = {}
    size = plain = 0
    traced = _valid_traceparent(headers.get("traceparent"))
    for name, value in headers.items():
        if (
            plain < _PLAIN_HEADERS
            and _plain_name(name)
            and _PLAIN_VALUE.fullmatch(value)
            and (traced or name not in ("traceparent", "tracestate"))
        ):
            plain += 1
            size += len(name) + len(value)
            out.append((name.encode(), value.encode()))
        else:
            packed[name] = value
    if packed:
        data = msgspec.msgpack.encode(packed)
        size += len(data)
        out.append((b"x-dynwire-meta", _base64(data)))
    if size > HEADERS_LIMIT:
        raise MessageTooLarge(
            f"the request's headers have {size} bytes, the limit is {HEADERS_LIMIT}", size=size, limit=HEADERS_LIMIT, sent="no"
        )


@functools.lru_cache(maxsize=1024)
def _plain_name(name: str) -> bool:
    if not _PLAIN_NAME.fullmatch(name):
        return False
    data = name.encode()
    return data not in _RESERVED and not data.startswith(_RESERVED_PREFIXES)


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


# Replies ---------------------------------------------------------------------------------------------------------------------

_item_head = struct.Struct(">BI")


def item_head(kind: int, size: int) -> bytes:
    """The 5 bytes before an item's payload in the shape ``items``; the payload itself can then be sent by reference."""
    return _item_head.pack(kind, size)


class ReplyEncoder:
    """Writes one reply. What its methods return is body; the caller adds it to the stream in this order and ends the stream.

    ``head()`` is a list shared by all replies of the shape: copy it to add something.
    """

    content_type = JSON
    codec: str | None = "json"
    """codec in which objects are needed; what arrives in another one is converted. None: as it is"""
    _more: Headers = []  # noqa: RUF012 - shared and never changed, like all constant header lists

    def head(self) -> Headers:
        """Headers of the response besides ``:status`` (200), ``x-request-id`` and ``date``."""
        return _head(self.content_type, self.streams)

    streams = False

    def accepted(self) -> bytes:
        """What tells the caller that the worker has accepted the request; empty if the shape has no word for it.

        If it is empty do not send the head early either: until the first item an error can still have its own status.
        """
        return b""

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        """One item; with ``last`` the end as well. Raises `DecodeError` (phase ``encode``) if it has no form in this shape."""
        raise NotImplementedError

    def end(self) -> bytes:
        """The end after the last item."""
        return b""

    def error(self, error: DynwireError, request_id: str = "") -> bytes:
        """An error after the head has been sent. Empty: the shape has no form for it, the stream must be reset."""
        return b""


@functools.lru_cache(maxsize=32)
def _head(content_type: bytes, streams: bool) -> Headers:
    head: Headers = [(b"content-type", content_type)]
    if streams:
        # nginx collects replies otherwise; no-store: RFC 9111 caches and browsers' back button have no use for a stream
        head += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
    return head


class _JsonDocument(ReplyEncoder):
    """One JSON document, of a handler with one reply."""

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        return as_json(data, kind) + b"\n"


class _JsonArray(ReplyEncoder):
    """A stream as one JSON array, for callers that insist on ``application/json``. An error is its last element."""

    streams = True

    def __init__(self) -> None:
        self._before = b"["

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        text = self._before + as_json(data, kind)
        self._before = b",\n"
        return text + b"]\n" if last else text

    def end(self) -> bytes:
        return b"[]\n" if self._before == b"[" else b"]\n"

    def error(self, error: DynwireError, request_id: str = "") -> bytes:
        return self._before + _error_object(error, request_id) + b"]\n"


class _Ndjson(ReplyEncoder):
    """A JSON document per line. An error is the last line: ``{"error": {…}}``."""

    content_type = NDJSON
    streams = True

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        return as_json(data, kind) + b"\n"

    def error(self, error: DynwireError, request_id: str = "") -> bytes:
        return _error_object(error, request_id) + b"\n"


class _Sse(ReplyEncoder):
    """Server-sent events: ``data`` is one line of JSON per item.

    The last event is always ``end`` (data ``{}``) or ``error`` (data: the problem). Without it a reader could not tell a
    finished stream from a cut one, and a browser's EventSource, which connects again after both, would not know to stop.
    """

    content_type = SSE
    streams = True

    def accepted(self) -> bytes:
        return b": accepted\n\n"  # a comment, which readers skip

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        event = b"data: " + as_json(data, kind) + b"\n\n"
        return event + self.end() if last else event

    def end(self) -> bytes:
        return b"event: end\ndata: {}\n\n"

    def error(self, error: DynwireError, request_id: str = "") -> bytes:
        return b"event: error\ndata: " + orjson.dumps(problem_document(error, request_id)) + b"\n\n"


class _Msgpack(ReplyEncoder):
    """Msgpack objects one after the other, which say themselves where they end. An error is ``{"error": {…}}``, the last."""

    content_type = MSGPACK
    codec = "msgpack"

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        return as_msgpack(data, kind)

    def error(self, error: DynwireError, request_id: str = "") -> bytes:
        return msgspec.msgpack.encode({"error": problem_document(error, request_id)})


class _Raw(ReplyEncoder):
    """The items' bytes one after the other, without anything between: objects as the codec wrote them."""

    content_type = RAW
    codec = None

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        return bytes(data)


class _Items(ReplyEncoder):
    """For dynwire's own client: kind (u8), length (u32, big-endian), payload. The end of the stream is the end of the reply."""

    content_type = ITEMS
    codec = None

    def accepted(self) -> bytes:
        return _item_head.pack(KIND_ACCEPT, 0)

    def item(self, data: Any, kind: int, last: bool = False) -> bytes:
        return _item_head.pack(kind, len(data)) + bytes(data)

    def error(self, error: DynwireError, request_id: str = "") -> bytes:
        body = error_body(error)
        return _item_head.pack(KIND_ERROR, len(body)) + body


_MADE_ONCE = {
    "ndjson": _Ndjson(),
    "sse": _Sse(),
    "msgpack": _Msgpack(),
    "raw": _Raw(),
    "items": _Items(),
    "json": _JsonDocument(),
}


def reply_encoder(shape: Shape, streaming: bool, kind: int = KIND_JSON) -> ReplyEncoder:
    """The encoder for a reply. ``streaming`` says what the handler is, ``kind`` what its first item is, if that is known.

    ``auto`` (no Accept header, or ``*/*``) is NDJSON for a stream. A single reply is one JSON document, or the bytes themselves
    if the handler returned bytes. ``json`` is one document always: a stream becomes an array.
    """
    if shape == "auto":
        shape = "ndjson" if streaming else "raw" if kind == KIND_RAW else "json"
    if shape == "json" and streaming:
        return _JsonArray()
    return _MADE_ONCE[shape]


def reply_kind(headers: Headers) -> int:
    """Codec of a reply that is not in items, from a server that is no dynwire; bytes for types that are not ours.

    Negative for a page for people: that is no reply, it comes from something in between.
    """
    content_type = dict(headers).get(b"content-type", b"")
    if content_type.partition(b";")[0].strip().lower() == b"text/html":
        return _KIND_UNKNOWN
    return max(_kind_of(content_type), KIND_RAW)


def refusal(shape: Shape, error: DynwireError, request_id: str = "") -> tuple[int, Headers, bytes]:
    """Status, headers and body for an error before the head was sent: a problem, or an item for dynwire's own client."""
    status, headers, body = problem(error, request_id)
    if shape == "items":
        body = _MADE_ONCE["items"].error(error, request_id)
        changed = {b"content-type": ITEMS, b"content-length": b"%d" % len(body)}
        headers = [(name, changed.get(name, value)) for name, value in headers]
    return status, headers, body


def _error_object(error: DynwireError, request_id: str) -> bytes:
    return orjson.dumps({"error": problem_document(error, request_id)})


def _foreign(value: object) -> object:
    if isinstance(value, msgspec.msgpack.Ext):
        return {"ext": value.code, "base64": bytes(value.data)}
    raise NotImplementedError(type(value).__name__)


_json_encode = msgspec.json.Encoder(enc_hook=_foreign).encode
_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")


def as_json(data: Any, kind: int) -> bytes:
    """An item as JSON on one line.

    Raw bytes become a string if they are UTF-8, otherwise ``{"base64": "…"}``; never are they taken for JSON themselves, since
    whether they parse would depend on their content. Msgpack is converted: its binary values become base64 strings, its
    extension types ``{"ext": code, "base64": "…"}``, numbers that JSON lacks null. Raises `DecodeError` for what JSON has no
    form for, such as maps whose keys are maps.
    """
    if kind == KIND_JSON:
        # Between tokens only, where a space does as well: inside of strings they are escaped (RFC 8259 §7).
        return bytes(data).translate(_LINE_ENDS)
    if kind == KIND_RAW:
        try:
            return orjson.dumps(str(data, "utf-8"))
        except UnicodeDecodeError:
            return b'{"base64":"' + base64.b64encode(data) + b'"}'
    try:
        return _json_encode(msgspec.msgpack.decode(data))
    except (msgspec.MsgspecError, ValueError, TypeError, NotImplementedError, RecursionError) as error:
        raise DecodeError(f"an item of the reply has no form in JSON: {error}", phase="encode", sent="yes") from error


def as_msgpack(data: Any, kind: int) -> bytes:
    """An item as msgpack: raw bytes become a binary value, JSON is converted. Raises `DecodeError` if it is not valid JSON."""
    if kind == KIND_MSGPACK:
        return bytes(data)
    if kind == KIND_RAW:
        return msgspec.msgpack.encode(bytes(data))
    try:
        return msgspec.msgpack.encode(orjson.loads(data))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"an item of the reply has no form in msgpack: {error}", phase="encode", sent="yes") from error
