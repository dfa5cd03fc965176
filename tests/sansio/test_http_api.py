"""What requests and replies of the http plane mean, without any protocol below them."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwire.codec import KIND_JSON, KIND_MSGPACK, KIND_RAW
from dynwire.errors import (
    BY_CODE,
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    DecodeError,
    DynwireError,
    EndpointNotFound,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PermissionDenied,
    ProtocolError,
    RemoteError,
    Unauthenticated,
)
from dynwire.wire import http_api
from dynwire.wire.faults import handler_error
from dynwire.wire.http_api import (
    ITEM_HEAD_BYTES,
    ITEMS,
    JSON,
    KIND_ACCEPT,
    KIND_ERROR,
    MSGPACK,
    NDJSON,
    PROBLEM,
    RAW,
    SSE,
    EndpointInfo,
    Headers,
    HttpFault,
    RequestHead,
    constant_headers,
    endpoints_page,
    error_from_response,
    item_head,
    live_page,
    openapi_page,
    parse_head,
    problem,
    ready_page,
    refusal,
    reply_encoder,
    reply_kind,
    request_headers,
    status_of,
)

ROOT = "/v1/rpc"
PATH = f"{ROOT}/demo/worker/echo"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def head_of(path: str = PATH, method: str = "POST", **headers: str) -> RequestHead:
    """Keyword ``content_type="…"`` is the header content-type."""
    pseudo = [(b":method", method.encode()), (b":scheme", b"http"), (b":authority", b"h:1"), (b":path", path.encode())]
    rest = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return parse_head(pseudo + rest, ROOT)


def fault_of(path: str = PATH, method: str = "POST", **headers: str) -> HttpFault:
    with pytest.raises(HttpFault) as caught:
        head_of(path, method, **headers)
    return caught.value


def sent(**options: Any) -> RequestHead:
    """What a server reads of a request of our own client."""
    return parse_head(
        constant_headers(authority="h:1", root=ROOT, endpoint="demo.worker.echo") + request_headers(**options), ROOT
    )


# --- paths and methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "page"),
    [
        ("GET", "/v1/rpc", "list"),
        ("GET", "/v1/rpc/", "list"),
        ("HEAD", "/v1/rpc?x=1", "list"),
        ("GET", "/", "list"),
        ("GET", "/live", "live"),
        ("GET", "/ready", "ready"),
        ("GET", "/health", "ready"),
        ("HEAD", "/ready/", "ready"),
        ("GET", "/openapi.json", "openapi"),
        ("GET", "/v1/rpc/openapi.json", "openapi"),
        ("POST", "/v1/rpc/stop/id-1", "stop"),
    ],
)
def test_pages(method: str, path: str, page: str) -> None:
    head = head_of(path, method)
    assert (head.page, head.endpoint, head.method) == (page, "", method)
    assert head.path == path.partition("?")[0]


@pytest.mark.parametrize("path", [PATH, f"{PATH}/", f"{PATH}?q=/", f"{ROOT}/demo.worker.echo", f"{ROOT}/demo/w%6Frker/echo"])
def test_an_endpoints_path(path: str) -> None:
    head = head_of(path)
    assert (head.page, head.endpoint) == ("endpoint", "demo.worker.echo")


@pytest.mark.parametrize(
    "path",
    [
        "/favicon.ico",
        "/v1",
        "/v1/rpcs",
        "/v1/rpcXdemo.worker.echo",
        "/v1/rpc/demo",
        "/v1/rpc/demo/worker",
        "/v1/rpc/demo/worker.echo",
        "/v1/rpc/demo/worker/echo/more",
        "/v1/rpc/demo/worker/ec%68%20o",
        "/v1/rpc//worker/echo",
        "/v1/rpc/demo/../echo",
        "/v1/rpc/stop/not%20an%20id",
        "*",
        "host:443",
    ],
)
def test_an_unknown_path_is_told_what_there_is(path: str) -> None:
    fault = fault_of(path, "GET")
    assert fault.status == 404
    for known in (
        f"POST {ROOT}/<namespace>/<component>/<endpoint>",
        f"GET {ROOT}",
        "GET /live",
        "GET /ready",
        "GET /openapi.json",
    ):
        assert known in fault.detail


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", PATH, b"POST"),
        ("HEAD", PATH, b"POST"),
        ("OPTIONS", PATH, b"POST"),
        ("POST", ROOT, b"GET, HEAD"),
        ("DELETE", "/live", b"GET, HEAD"),
        ("get", "/live", b"GET, HEAD"),
        ("GET", f"{ROOT}/stop/a", b"POST"),
    ],
)
def test_a_wrong_method(method: str, path: str, allow: bytes) -> None:
    fault = fault_of(path, method)
    assert fault.status == 405 and (b"allow", allow) in fault.headers and allow.decode() in fault.detail


def test_stopping_names_a_request() -> None:
    assert head_of(f"{ROOT}/stop/a%2Fb").request_id == "a/b"
    assert head_of(f"{ROOT}/stop/a", x_request_id="b").request_id == "a"
    assert head_of(f"{ROOT}/stop", x_request_id="b").request_id == "b"
    assert fault_of(f"{ROOT}/stop").status == 400


# --- content type and accept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        ("application/json", KIND_JSON),
        ("Application/JSON; charset=utf-8", KIND_JSON),
        ("application/cloudevents+json", KIND_JSON),
        ("application/x-www-form-urlencoded", KIND_JSON),
        ("application/msgpack", KIND_MSGPACK),
        ("application/x-msgpack", KIND_MSGPACK),
        ("application/vnd.msgpack", KIND_MSGPACK),
        ("application/octet-stream", KIND_RAW),
    ],
)
def test_the_content_type_chooses_the_codec(content_type: str, kind: int) -> None:
    assert head_of(content_type=content_type).kind == kind


def test_without_a_content_type_the_body_is_json() -> None:
    assert head_of().kind == KIND_JSON


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "image/png", "json"])
def test_an_unknown_content_type(content_type: str) -> None:
    fault = fault_of(content_type=content_type)
    assert fault.status == 415
    for known in ("application/json", "application/msgpack", "application/octet-stream"):
        assert known in fault.detail and known in dict(fault.headers)[b"accept"].decode()


def test_foreign_sites_cannot_send_requests_in_secret() -> None:
    """A page may post forms and bodies without a type to any host; the browser asks first only for other types."""
    assert fault_of(origin="https://evil.example").status == 415
    assert fault_of(origin="null", content_type="application/x-www-form-urlencoded").status == 415
    assert head_of(origin="https://evil.example", content_type="application/json").kind == KIND_JSON


@pytest.mark.parametrize(
    ("accept", "shape"),
    [
        (None, "auto"),
        ("*/*", "auto"),
        ("application/*", "auto"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "auto"),
        ("application/json", "json"),
        ("application/x-ndjson", "ndjson"),
        ("application/jsonl", "ndjson"),
        ("text/event-stream", "sse"),
        ("text/*", "sse"),
        ("application/msgpack", "msgpack"),
        ("application/vnd.msgpack", "msgpack"),
        ("application/octet-stream", "raw"),
        ("application/vnd.dynwire.items", "items"),
        ("*/*, text/event-stream", "sse"),
        ("application/json;q=0.5, text/event-stream;q=0.9", "sse"),
        ("application/json, text/event-stream", "json"),
        ("text/event-stream, application/json", "sse"),
        ("application/json;q=0, text/event-stream;q=0.1", "sse"),
        ("APPLICATION/X-NDJSON ; Q=1.000", "ndjson"),
        ("application/json;q=nonsense", "json"),
        ("text/html, application/json", "json"),
    ],
)
def test_accept_chooses_the_shape(accept: str | None, shape: str) -> None:
    head = head_of() if accept is None else head_of(accept=accept)
    assert head.shape == shape


def test_several_accept_headers_are_one_list() -> None:
    headers = [(b":method", b"POST"), (b":path", PATH.encode()), (b"accept", b"text/html"), (b"accept", b"text/event-stream")]
    assert parse_head(headers, ROOT).shape == "sse"


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*", "nonsense"])
def test_an_accept_that_cannot_be_met(accept: str) -> None:
    fault = fault_of(accept=accept)
    assert fault.status == 406
    for known in (JSON, NDJSON, SSE, MSGPACK, RAW):
        assert known.decode() in fault.detail


def test_pages_are_json_whatever_a_browser_accepts() -> None:
    assert head_of("/live", "GET", accept="text/html").page == "live"


# --- further headers ----------------------------------------------------------------------------------------------------------


def test_what_the_headers_say() -> None:
    head = head_of(x_request_timeout_ms="1500", x_request_id="id-1", content_length="12", x_dynwire_accept_timeout_ms="9")
    assert (head.timeout_ms, head.request_id, head.content_length, head.accept_timeout_ms) == (1500, "id-1", 12, 9)
    head = head_of()
    assert (head.timeout_ms, head.request_id, head.content_length, head.accept_timeout_ms) == (0, "", None, 0)


@pytest.mark.parametrize("value", ["", "1.5", "-1", "+1", " 1", "1e3", "ten", "4294967296", "9" * 5000, "¹"])
def test_a_bad_timeout(value: str) -> None:
    fault = fault_of(x_request_timeout_ms=value)
    assert fault.status == 400 and "x-request-timeout-ms" in fault.detail and "milliseconds" in fault.detail


@pytest.mark.parametrize("value", ["", "a b", "é", "x" * 129])
def test_a_bad_request_id_is_ignored(value: str) -> None:
    assert head_of(x_request_id=value).request_id == ""


@pytest.mark.parametrize(
    "value",
    [
        TRACE,
        TRACE.replace("00-", "cc-", 1),
        TRACE.replace("00-", "cc-", 1) + "-what-the-future-will-be-like",
        TRACE[:-2] + "ff",
    ],
)
def test_a_valid_traceparent(value: str) -> None:
    assert head_of(traceparent=value, tracestate="a=1").headers == {"traceparent": value, "tracestate": "a=1"}


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "nonsense",
        TRACE.upper(),
        TRACE + "-more",
        TRACE.replace("00-", "ff-", 1),
        TRACE[:-3],
        "00-" + "0" * 32 + TRACE[35:],
        TRACE[:36] + "0" * 16 + "-01",
        f"{TRACE}, {TRACE}",
    ],
)
def test_an_invalid_traceparent_is_ignored_and_tracestate_with_it(value: str | None) -> None:
    given = {} if value is None else {"traceparent": value}
    assert head_of(**given, tracestate="a=1", baggage="k=v").headers == {"baggage": "k=v"}


RESERVED = """
    host te user-agent authorization connection keep-alive transfer-encoding upgrade expect trailer http2-settings content-length
    content-encoding content-whatever accept-encoding accept-language proxy-authorization x-dynwire-meta x-dynwire-new
    x-request-timeout-ms x-request-id
"""


def test_headers_of_the_protocol_do_not_reach_the_handler() -> None:
    reserved = RESERVED.split()
    values = {"content-length": "0", "x-request-timeout-ms": "0", "x-dynwire-meta": "gA"}  # gA: an empty map
    head = head_of(**{name: values.get(name, "x") for name in reserved}, tenant="a", x_forwarded_for="10.0.0.1", cookie="c=1")
    assert head.headers == {"tenant": "a", "x-forwarded-for": "10.0.0.1", "cookie": "c=1"}


def test_repeated_headers_are_joined() -> None:
    pairs = [(b":method", b"POST"), (b":path", PATH.encode())]
    pairs += [(b"a", b"1"), (b"cookie", b"x=1"), (b"a", b"2"), (b"cookie", b"y=2")]
    assert parse_head(pairs, ROOT).headers == {"a": "1, 2", "cookie": "x=1; y=2"}


def test_values_that_are_not_ascii() -> None:
    pairs = [(b":method", b"POST"), (b":path", PATH.encode()), (b"a", "ü".encode()), (b"b", "ü".encode("latin-1"))]
    assert parse_head(pairs, ROOT).headers == {"a": "ü", "b": "ü"}


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, None),
        ({"authorization": "Bearer s3cret"}, "s3cret"),
        ({"authorization": "bearer  s3cret"}, "s3cret"),
        ({"authorization": "Basic dXNlcg=="}, None),
        ({"x_dynwire_token": "s3cret"}, "s3cret"),
        ({"authorization": "Bearer theirs", "x_dynwire_token": "ours"}, "ours"),
    ],
)
def test_tokens(headers: dict[str, str], token: str | None) -> None:
    assert head_of(**headers).token == token


def test_a_peer_cannot_fill_the_caches_with_large_values() -> None:
    http_api._meaning.cache_clear()
    for number in range(3):
        head_of(f"{PATH}?{number}{'x' * 600}")
        head_of(accept=f"application/json, {number}{'x' * 600}")
    assert http_api._meaning.cache_info().currsize == 0
    head_of()
    assert http_api._meaning.cache_info().currsize == 1


# --- our own client -----------------------------------------------------------------------------------------------------------

TRICKY = """
    traceparent tracestate baggage cookie host te accept accept-encoding content-length content-type authorization connection
    x-request-id x-request-timeout-ms x-dynwire-meta x-dynwire-token :path origin tenant X-Tenant a:b
"""
context_headers = st.dictionaries(
    st.one_of(st.sampled_from(["", *TRICKY.split()]), st.text(max_size=20), st.from_regex(r"[a-z-]{1,20}", fullmatch=True)),
    st.one_of(
        st.text(max_size=40), st.from_regex(r"[!-~ ]{0,40}", fullmatch=True), st.sampled_from([TRACE, TRACE.upper(), "a=1"])
    ),
    max_size=80,
)


@settings(max_examples=60, deadline=None)
@given(headers=context_headers, request_id=st.text(max_size=40), timeout_ms=st.integers(0, 2**32 - 1))
def test_our_own_requests_arrive_as_they_were_sent(headers: dict[str, str], request_id: str, timeout_ms: int) -> None:
    head = sent(headers=headers, request_id=request_id, timeout_ms=timeout_ms, content_length=3)
    assert head.headers == headers
    assert (head.request_id, head.timeout_ms, head.content_length) == (request_id, timeout_ms, 3)
    assert (head.page, head.endpoint, head.kind, head.shape) == ("endpoint", "demo.worker.echo", KIND_MSGPACK, "items")


@settings(max_examples=60, deadline=None)
@given(headers=context_headers, request_id=st.text(max_size=40))
def test_our_own_headers_are_valid_http(headers: dict[str, str], request_id: str) -> None:
    seen = set()
    for name, value in request_headers(headers=headers, request_id=request_id):
        assert name and all(byte in b"!#$%&'*+.^_`|~-0123456789abcdefghijklmnopqrstuvwxyz" for byte in name), name
        assert all(0x20 <= byte <= 0x7E for byte in value) and value == value.strip(), value
        assert name not in seen
        seen.add(name)


def test_many_headers_do_not_make_many_fields() -> None:
    """Receivers refuse heads of more than 100."""
    headers = {f"h{number}": "x" for number in range(300)}
    assert len(request_headers(headers=headers)) < 90
    assert sent(headers=headers).headers == headers


def test_ordinary_headers_stay_visible_to_proxies() -> None:
    headers = {"traceparent": TRACE, "tracestate": "a=1", "baggage": "k=v", "tenant": "a b", "x-forwarded-for": "10.0.0.1"}
    assert request_headers(headers=headers) == [(name.encode(), value.encode()) for name, value in headers.items()]


def test_what_no_header_can_carry_is_packed() -> None:
    for headers in ({"tenant": "ü"}, {"Tenant": "a"}, {"host": "h"}, {"a": " b"}, {"a": "b\r\nc: d"}, {"tracestate": "a=1"}):
        ((name, value),) = request_headers(headers=headers)
        assert name == b"x-dynwire-meta"
        assert msgspec.msgpack.decode(base64.urlsafe_b64decode(value + b"==")) == headers


def test_a_proxys_header_wins_over_a_packed_one() -> None:
    packed = request_headers(headers={"x-user": "ädmin"})
    pairs = constant_headers(authority="h:1", root=ROOT, endpoint="a.b.c") + packed + [(b"x-user", b"nobody")]
    assert parse_head(pairs, ROOT).headers == {"x-user": "nobody"}


@pytest.mark.parametrize("value", ["not base64!", "gQ", "kA", "gaFhAQ", "!", "g", "!!!!gA"])
def test_bad_packed_headers(value: str) -> None:
    fault = fault_of(x_dynwire_meta=value)
    assert fault.status == 400 and "x-dynwire-meta" in fault.detail


def test_the_constant_part() -> None:
    headers = constant_headers(
        authority="h:1", root="/r", endpoint="a.b.c", kind=KIND_RAW, scheme="https", token="s3crét", accept_timeout_ms=10_000
    )
    head = parse_head(headers, "/r")
    assert (head.endpoint, head.kind, head.token, head.accept_timeout_ms) == ("a.b.c", KIND_RAW, "s3crét", 10_000)
    assert (b":scheme", b"https") in headers and (b":authority", b"h:1") in headers


def test_too_many_headers_are_refused_before_sending() -> None:
    with pytest.raises(MessageTooLarge) as caught:
        request_headers(headers={"a": "x" * 40_000})
    assert caught.value.sent == "no" and caught.value.limit == 32768 and caught.value.size > 40_000
    with pytest.raises(MessageTooLarge):
        request_headers(headers={"a": "ü" * 20_000})
    oversized = base64.urlsafe_b64encode(msgspec.msgpack.encode({"a": "x" * 40_000})).decode()
    assert fault_of(x_dynwire_meta=oversized).status == 431


def test_lone_surrogates_are_a_typed_error() -> None:
    for options in ({"headers": {"a": "\udc80"}}, {"request_id": "\udc80"}):
        with pytest.raises(DecodeError) as caught:
            request_headers(**options)  # type: ignore[arg-type]
        assert caught.value.phase == "encode"


# --- errors as responses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DecodeError("x"), 400),
        (DecodeError("x", phase="encode"), 500),
        (ProtocolError("x"), 400),
        (Unauthenticated("x"), 401),
        (PermissionDenied("x"), 403),
        (EndpointNotFound("x"), 404),
        (DeadlineExceeded("x", phase="send"), 408),
        (MessageTooLarge("x"), 413),
        (MessageTooLarge("x", phase="reply"), 500),
        (Overloaded("x", depth=5, limit=5), 429),
        (Overloaded("x", depth=0, limit=0), 503),
        (Overloaded("x"), 429),
        (Cancelled("x"), 499),
        (RemoteError("x"), 500),
        (BY_CODE["config_error"]("x"), 500),
        (ConnectError("x"), 502),
        (PeerLost("x"), 503),
        (BY_CODE["no_instances"]("x"), 503),
        (BY_CODE["manager_closed"]("x"), 503),
        (DeadlineExceeded("x"), 504),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.code}-{value.phase}",
)
def test_statuses(error: DynwireError, status: int) -> None:
    assert status_of(error) == status
    given, headers, body = problem(error, "id-1")
    document = json.loads(body)
    assert given == document["status"] == status
    assert document["type"] == f"urn:dynwire:error:{error.code}" and document["code"] == error.code
    assert document["detail"] == "x" and document["instance"] == "id-1" and document["title"]
    found = dict(headers)
    assert found[b"content-type"] == b"application/problem+json"
    assert found[b"content-length"] == b"%d" % len(body) and found[b"x-request-id"] == b"id-1"
    assert (b"www-authenticate" in found) == (status == 401)
    assert (b"retry-after" in found) == (status in (429, 503))


@pytest.mark.parametrize(("wait", "shown"), [(None, b"1"), (0.0, b"1"), (0.2, b"1"), (2.0, b"2"), (2.1, b"3")])
def test_retry_after_is_in_whole_seconds(wait: float | None, shown: bytes) -> None:
    assert dict(problem(Overloaded("x", retry_after=wait))[1])[b"retry-after"] == shown


def test_a_request_id_that_is_no_header() -> None:
    _, headers, body = problem(DecodeError("x"), "ü\r\n")
    assert b"x-request-id" not in dict(headers)
    assert json.loads(body)["instance"] == "%C3%BC%0D%0A"
    assert json.loads(problem(DecodeError("x"), "\udc80")[2])["instance"] == "?"
    assert "instance" not in json.loads(problem(DecodeError("x"))[2])


def test_details_that_json_has_no_form_for() -> None:
    error = DecodeError("\udc80", details={"a": {1, 2}, "b": b"\xff", "c": float("nan"), "d": 2**70, "e": {1: "\udc80"}})
    document = json.loads(problem(error)[2])
    assert document["detail"] == "?" and set(document["details"]) == set("abcde")


def value_for(name: str) -> Any:
    return 7 if name in ("depth", "limit", "size", "offset", "retry_after", "timeout") else "seven"


@pytest.mark.parametrize("shape", ["json", "items"])
@pytest.mark.parametrize("code", BY_CODE)
def test_every_error_survives(code: str, shape: Any) -> None:
    error = BY_CODE[code]("what happened", phase="accept", sent="no", retryable=True, details={"a": [1, None]})
    for name in error.own_fields:
        if name != "delivered":
            setattr(error, name, value_for(name))
    status, headers, body = refusal(shape, error, "id-1")
    assert dict(headers)[b"content-type"] == (ITEMS if shape == "items" else PROBLEM)
    assert dict(headers)[b"content-length"] == b"%d" % len(body)
    back = error_from_response(status, headers, body, peer="p:1", request_id="id-1", delivered=3)
    assert type(back) is type(error)
    assert (back.phase, back.sent, back.retryable, back.details) == ("accept", "no", True, {"a": [1, None]})
    assert (back.peer, back.request_id) == ("p:1", "id-1")
    for name in error.own_fields:
        assert getattr(back, name) == (3 if name == "delivered" else value_for(name)), name
    assert "what happened" in str(back) or code == "remote_error"


@pytest.mark.parametrize("shape", ["json", "items"])
def test_what_a_handler_raised_survives(shape: Any) -> None:
    status, headers, body = refusal(shape, handler_error(KeyError("k"), with_traceback=True))
    assert status == 500
    back = error_from_response(status, headers, body, peer="p:1", request_id=None)
    assert isinstance(back, RemoteError)
    assert (back.type_name, back.message, back.sent, back.retryable) == ("KeyError", "'k'", "yes", False)
    assert str(back) == "the handler at p:1 raised KeyError: 'k'"
    assert "KeyError" in back.details["traceback"]
    if shape == "json":
        assert json.loads(body)["detail"] == "the handler raised KeyError: 'k'"


@pytest.mark.parametrize("headers", [{"content_type": "image/png"}, {"x_request_timeout_ms": "soon"}])
def test_a_wrong_request_is_told_its_id(headers: dict[str, str]) -> None:
    _, answer, body = fault_of(x_request_id="id-1", **headers).response()
    assert dict(answer)[b"x-request-id"] == b"id-1" and json.loads(body)["instance"] == "id-1"


def test_a_wrong_request_arrives_as_a_typed_error() -> None:
    status, headers, body = fault_of(content_type="text/plain").response("id-1")
    assert status == 415 and dict(headers)[b"x-request-id"] == b"id-1"
    back = error_from_response(status, headers, body, peer="p:1", request_id="id-1")
    assert isinstance(back, ProtocolError) and back.sent == "no" and "text/plain" in str(back)
    status, headers, body = fault_of("/elsewhere").response()
    back = error_from_response(status, headers, body, peer="p:1", request_id="id-1")
    assert isinstance(back, EndpointNotFound) and "/elsewhere" in str(back)


# --- what stands between us and the worker ------------------------------------------------------------------------------------

NGINX = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n"
    b"<hr><center>nginx/1.27.0</center>\r\n</body>\r\n</html>\r\n"
)


@pytest.mark.parametrize(
    ("status", "body", "cls", "sent"),
    [
        (502, NGINX, PeerLost, "maybe"),
        (
            503,
            b"upstream connect error or disconnect/reset before headers. reset reason: connection termination",
            PeerLost,
            "maybe",
        ),
        (503, b"upstream connect error or disconnect/reset before headers. reset reason: connection failure", ConnectError, "no"),
        (503, b"no healthy upstream", ConnectError, "no"),
        (503, b"<h1>503 Service Unavailable</h1>\nNo server is available to handle this request.", ConnectError, "no"),
        (503, b"", PeerLost, "maybe"),
        (504, b"upstream request timeout", DeadlineExceeded, "maybe"),
        (408, b"", DeadlineExceeded, "maybe"),
        (401, b"", Unauthenticated, "no"),
        (403, b"", PermissionDenied, "no"),
        (404, b"", EndpointNotFound, "no"),
        (413, b"", MessageTooLarge, "no"),
        (429, b"", Overloaded, "no"),
        (418, b"", ProtocolError, "no"),
        (500, b"", ProtocolError, "maybe"),
        (302, b"", ProtocolError, "no"),
        (200, b"<p>Log in to the hotel's network", ProtocolError, "maybe"),
        (999, b"", ProtocolError, "maybe"),
    ],
)
def test_foreign_answers(status: int, body: bytes, cls: type[DynwireError], sent: str) -> None:
    headers = [(b"content-type", b"text/html"), (b"server", b"nginx"), (b"retry-after", b"7"), (b"location", b"http://x/")]
    error = error_from_response(status, headers, body, peer="p:1", request_id="id-1", delivered=2)
    assert type(error) is cls and error.sent == sent
    assert str(status) in str(error) and "p:1" in str(error) and "nginx" in str(error)
    assert error.request_id == "id-1" and error.details["status"] == status
    if isinstance(error, Overloaded):
        assert error.retry_after == 7.0
    if isinstance(error, PeerLost):
        assert error.delivered == 2
    if status == 302:
        assert "http://x/" in str(error)


def test_a_foreign_page_is_quoted_as_text() -> None:
    error = error_from_response(502, [(b"content-type", b"text/html")], NGINX, peer="p:1", request_id=None)
    assert error.details["text"] == "502 Bad Gateway nginx/1.27.0"
    body = b"<style>a { b: c }</style><!-- x --><b>a &amp; b</b>\x1b[31m" + b"x" * 9000
    error = error_from_response(502, [], body, peer="p:1", request_id=None)
    assert error.details["text"].startswith("a & b [31mxxx") and len(error.details["text"]) == 200


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"[1]", b"{", b"\xff", b'{"code": "overloaded"}', b'{"type": 1, "code": 2}', b'{"type": "about:blank"}']
)
def test_a_foreign_problem(body: bytes) -> None:
    error = error_from_response(503, [(b"content-type", PROBLEM)], body, peer="p:1", request_id=None)
    assert type(error) is PeerLost


def test_an_unknown_code_of_a_later_version() -> None:
    body = orjson.dumps({"type": "urn:dynwire:error:new_in_2", "code": "new_in_2", "detail": "text", "sent": "no"})
    error = error_from_response(500, [(b"content-type", PROBLEM)], body, peer="p:1", request_id=None)
    assert isinstance(error, RemoteError) and error.type_name == "new_in_2" and error.sent == "no"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


FIELDS = "detail sent retryable phase details type_name message depth limit size timeout retry_after delivered value"


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from([*BY_CODE, "new_in_2"]),
    fields=st.dictionaries(
        st.sampled_from(FIELDS.split()),
        json_values,
    ),
    status=st.integers(200, 599),
)
def test_forged_problems_are_some_typed_error(code: str, fields: dict[str, Any], status: int) -> None:
    body = orjson.dumps({"type": f"urn:dynwire:error:{code}", "code": code, **fields})
    error = error_from_response(status, [(b"content-type", PROBLEM)], body, peer="p:1", request_id="id-1")
    assert type(error) is BY_CODE.get(code, RemoteError)
    assert error.sent in ("no", "maybe", "yes") and isinstance(error.phase, str) and isinstance(error.retryable, bool)
    assert isinstance(getattr(error, "retry_after", None), (int, float, type(None)))


def test_deep_nesting_is_survived() -> None:
    body = b'{"type":"urn:dynwire:error:overloaded","code":"overloaded","details":{"a":' + b"[" * 1000 + b"]" * 1000 + b"}}"
    assert type(error_from_response(503, [(b"content-type", PROBLEM)], body, peer=None, request_id=None)) is Overloaded


@pytest.mark.parametrize("body", [b"", b"\x03", b"\x03\0\0\0\1", b"\x03\0\0\0\1\xc1", b"\0\0\0\0\0"])
def test_a_broken_error_item_is_some_typed_error(body: bytes) -> None:
    assert isinstance(error_from_response(500, [(b"content-type", ITEMS)], body, peer=None, request_id=None), ProtocolError)


# --- replies ------------------------------------------------------------------------------------------------------------------

ITEMS_SENT: list[tuple[bytes, int]] = [
    (orjson.dumps({"text": "a\nb"}), KIND_JSON),
    (msgspec.msgpack.encode([1, None, "x"]), KIND_MSGPACK),
    ("ü\n".encode(), KIND_RAW),
    (b"\xff\x00", KIND_RAW),
    (b'{\n "pretty": [\r\n1]}', KIND_JSON),
]
AS_JSON = [{"text": "a\nb"}, [1, None, "x"], "ü\n", {"base64": "/wA="}, {"pretty": [1]}]
OUR_ERROR = Overloaded("full", depth=3, limit=3, sent="yes")


def written(shape: Any, streaming: bool, items: list[tuple[bytes, int]], error: DynwireError | None = None) -> bytes:
    encoder = reply_encoder(shape, streaming)
    body = b"".join(encoder.item(data, kind) for data, kind in items)
    return body + (encoder.end() if error is None else encoder.error(error, "id-1"))


def written_with_last(shape: Any, streaming: bool, items: list[tuple[bytes, int]]) -> bytes:
    encoder = reply_encoder(shape, streaming)
    return b"".join(encoder.item(data, kind, number == len(items)) for number, (data, kind) in enumerate(items, 1))


def read_items(body: bytes) -> list[tuple[int, bytes]]:
    """The other side of the shape ``items``, written from its description only."""
    found = []
    while body:
        kind, size = body[0], int.from_bytes(body[1:5], "big")
        assert len(body) >= 5 + size
        found.append((kind, body[5 : 5 + size]))
        body = body[5 + size :]
    return found


def read_events(body: bytes) -> list[tuple[str, str]]:
    """An EventSource (WHATWG HTML §9.2.6): event name and data."""
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = "message", []
        for line in block.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            else:
                assert field == "", line  # a comment
        if data:
            found.append((name, "\n".join(data)))
    return found


@pytest.mark.parametrize("shape", ["json", "ndjson", "sse", "msgpack", "raw", "items", "auto"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_last_item_may_bring_the_end(shape: str, streaming: bool) -> None:
    items = ITEMS_SENT if streaming else ITEMS_SENT[:1]
    assert written_with_last(shape, streaming, items) == written(shape, streaming, items)


def test_a_single_reply_in_json() -> None:
    for (data, kind), expected in zip(ITEMS_SENT, AS_JSON, strict=True):
        body = written("json", False, [(data, kind)])
        assert json.loads(body) == expected and body.endswith(b"\n") and body.count(b"\n") == 1


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_stream_as_one_json_array(count: int) -> None:
    assert json.loads(written("json", True, ITEMS_SENT[:count])) == AS_JSON[:count]
    failed = json.loads(written("json", True, ITEMS_SENT[:count], OUR_ERROR))
    assert failed[:count] == AS_JSON[:count] and failed[count]["error"]["code"] == "overloaded"


@pytest.mark.parametrize("count", [0, 1, 5])
def test_ndjson(count: int) -> None:
    lines = written("ndjson", True, ITEMS_SENT[:count]).splitlines()
    assert [json.loads(line) for line in lines] == AS_JSON[:count]
    *lines, last = written("ndjson", True, ITEMS_SENT[:count], OUR_ERROR).splitlines()
    assert [json.loads(line) for line in lines] == AS_JSON[:count]
    assert json.loads(last)["error"]["instance"] == "id-1"


@pytest.mark.parametrize("count", [0, 1, 5])
def test_server_sent_events(count: int) -> None:
    *events, last = read_events(written("sse", True, ITEMS_SENT[:count]))
    assert [(name, json.loads(data)) for name, data in events] == [("message", value) for value in AS_JSON[:count]]
    assert last == ("end", "{}")
    *events, last = read_events(written("sse", True, ITEMS_SENT[:count], OUR_ERROR))
    assert len(events) == count and last[0] == "error"
    assert json.loads(last[1]) == json.loads(problem(OUR_ERROR, "id-1")[2])


def test_an_early_word_for_those_who_wait() -> None:
    assert read_events(reply_encoder("sse", True).accepted() + written("sse", True, [])) == [("end", "{}")]
    assert reply_encoder("sse", True).accepted() != b""
    assert read_items(reply_encoder("items", True).accepted()) == [(KIND_ACCEPT, b"")]
    assert reply_encoder("ndjson", True).accepted() == b""


def test_msgpack_objects_one_after_the_other() -> None:
    body = written("msgpack", True, ITEMS_SENT[:4], OUR_ERROR)
    expected = [{"text": "a\nb"}, [1, None, "x"], "ü\n".encode(), b"\xff\x00"]
    for value in expected:
        encoded = msgspec.msgpack.encode(value)
        assert body.startswith(encoded)
        body = body.removeprefix(encoded)
    assert msgspec.msgpack.decode(body)["error"]["code"] == "overloaded"


def test_raw_bytes_one_after_the_other() -> None:
    assert written("raw", True, ITEMS_SENT) == b"".join(data for data, _ in ITEMS_SENT)
    assert reply_encoder("raw", True).error(OUR_ERROR) == b""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 2))))
def test_items(items: list[tuple[bytes, int]]) -> None:
    assert read_items(written("items", True, items)) == [(kind, data) for data, kind in items]
    *read, (kind, body) = read_items(written("items", True, items, OUR_ERROR))
    assert read == [(kind, data) for data, kind in items] and kind == KIND_ERROR
    back = error_from_response(200, [(b"content-type", ITEMS)], item_head(kind, len(body)) + body, peer="p:1", request_id=None)
    assert isinstance(back, Overloaded) and back.limit == 3 and back.sent == "yes"
    assert len(item_head(0, 0)) == ITEM_HEAD_BYTES


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([KIND_MSGPACK, KIND_JSON]), json_values), max_size=4), st.sampled_from(["ndjson", "sse"])
)
def test_any_object_survives_shapes_of_lines(items: list[tuple[int, Any]], shape: str) -> None:
    packed = [(msgspec.msgpack.encode(v) if kind == KIND_MSGPACK else orjson.dumps(v), kind) for kind, v in items]
    body = written(shape, True, packed)
    found = [data for _, data in read_events(body)[:-1]] if shape == "sse" else body.decode().split("\n")[:-1]
    assert [json.loads(line) for line in found] == [value for _, value in items]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
def test_raw_bytes_are_never_taken_for_json(data: bytes) -> None:
    value = json.loads(http_api.as_json(data, KIND_RAW))
    assert (value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])) == data


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"\xff", "/w=="),
        ({1: "a"}, {"1": "a"}),
        (msgspec.msgpack.Ext(5, b"\xff"), {"ext": 5, "base64": "/w=="}),
        (float("inf"), None),
        (2**64 - 1, 2**64 - 1),
    ],
    ids=str,
)
def test_what_msgpack_has_and_json_has_not(value: Any, expected: Any) -> None:
    assert json.loads(http_api.as_json(msgspec.msgpack.encode(value), KIND_MSGPACK)) == expected


@pytest.mark.parametrize(
    "data", [b"\x81\x91\x01\x02", b"\xc1", b"", b"\xa1\xff"], ids=["list as key", "no msgpack", "", "no UTF-8"]
)
def test_what_has_no_form_in_json_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        http_api.as_json(data, KIND_MSGPACK)
    assert caught.value.phase == "encode" and status_of(caught.value) == 500


def test_what_is_no_json_is_a_typed_error() -> None:
    with pytest.raises(DecodeError):
        http_api.as_msgpack(b"{", KIND_JSON)


@pytest.mark.parametrize(
    ("shape", "streaming", "kind", "content_type"),
    [
        ("auto", False, KIND_JSON, JSON),
        ("auto", False, KIND_MSGPACK, JSON),
        ("auto", False, KIND_RAW, RAW),
        ("auto", True, KIND_RAW, NDJSON),
        ("json", True, KIND_JSON, JSON),
        ("json", False, KIND_RAW, JSON),
        ("sse", False, KIND_JSON, SSE),
        ("msgpack", True, KIND_JSON, MSGPACK),
        ("raw", False, KIND_JSON, RAW),
        ("items", True, KIND_RAW, ITEMS),
    ],
)
def test_content_types_of_replies(shape: Any, streaming: bool, kind: int, content_type: bytes) -> None:
    encoder = reply_encoder(shape, streaming, kind)
    head = encoder.head()
    assert dict(head)[b"content-type"] == content_type
    assert (dict(head).get(b"x-accel-buffering") == b"no") == (content_type in (NDJSON, SSE) or (shape == "json" and streaming))
    assert reply_encoder(shape, streaming, kind).head() is head, "HPACK indexes what comes again and again"


# --- pages --------------------------------------------------------------------------------------------------------------------


class Prompt(msgspec.Struct):
    text: str
    limit: int = 16


class Batch(msgspec.Struct):
    prompts: list[Prompt]


ENTRIES = [
    EndpointInfo("demo.worker.generate", streaming=True, in_flight=2, max_in_flight=8, request_type=Batch),
    EndpointInfo("demo.worker.echo", description="Says what it hears.", request_type=Prompt),
    EndpointInfo("demo.worker.any", request_type=object),
]


def test_the_list_of_endpoints() -> None:
    document = json.loads(endpoints_page(ENTRIES, ROOT, {"plane": "http", "engine": "native"}))
    assert document["plane"] == "http" and document["root"] == ROOT
    any_, echo, generate = document["endpoints"]
    assert echo == {
        "endpoint": "demo.worker.echo",
        "path": "/v1/rpc/demo/worker/echo",
        "reply": "single",
        "in_flight": 0,
        "description": "Says what it hears.",
    }
    assert (generate["reply"], generate["in_flight"], generate["max_in_flight"]) == ("stream", 2, 8)
    assert head_of(any_["path"]).endpoint == "demo.worker.any"


def test_live_and_ready() -> None:
    assert json.loads(live_page()) == {"status": "live"}
    assert json.loads(ready_page(True, ["unused"])) == {"status": "ready"}
    assert json.loads(ready_page(False, ["shutting down"])) == {"status": "not ready", "reasons": ["shutting down"]}


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [ref for inner in value.values() for ref in references(inner)]
    return [ref for inner in value for ref in references(inner)] if isinstance(value, list) else []


def test_the_openapi_document() -> None:
    document = json.loads(openapi_page(ENTRIES, ROOT, version="1.2", server="http://h:8888"))
    assert document["openapi"].startswith("3.1.") and document["info"]["version"] == "1.2"
    assert document["servers"] == [{"url": "http://h:8888"}]
    assert list(document["paths"]) == [f"{ROOT}/demo/worker/{name}" for name in ("any", "echo", "generate")]
    echo = document["paths"][f"{ROOT}/demo/worker/echo"]["post"]
    assert echo["operationId"] == "demo.worker.echo" and echo["description"] == "Says what it hears."
    assert echo["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Prompt"}
    assert document["components"]["schemas"]["Prompt"]["required"] == ["text"]
    found = references(document)
    assert "#/components/schemas/Prompt" in found
    for reference in found:
        target = document
        for key in reference.removeprefix("#/").split("/"):
            target = target[key]


def test_two_types_of_one_name_are_not_mixed_up() -> None:
    other = msgspec.defstruct("Prompt", [("number", int)])
    entries = [EndpointInfo("a.b.c", request_type=Prompt), EndpointInfo("a.b.d", request_type=other)]
    document = json.loads(openapi_page(entries, ROOT, version="1"))
    schemas = [path["post"]["requestBody"]["content"]["application/json"]["schema"] for path in document["paths"].values()]
    assert schemas == [{"$ref": "#/components/schemas/Prompt"}, {}]
    assert "text" in document["components"]["schemas"]["Prompt"]["properties"]


def test_types_that_have_no_schema() -> None:
    document = json.loads(openapi_page([EndpointInfo("a.b.c", request_type=type("Own", (), {}))], ROOT, version="1"))
    content = document["paths"][f"{ROOT}/a/b/c"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"] == {}


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        (None, KIND_RAW),
        (b"", KIND_RAW),
        (b"text/plain; charset=utf-8", KIND_RAW),
        (b"application/x-www-form-urlencoded", KIND_RAW),
        (b"application/octet-stream", KIND_RAW),
        (b"application/json; charset=utf-8", KIND_JSON),
        (b"application/hal+json", KIND_JSON),
        (b"Application/Vnd.MsgPack", KIND_MSGPACK),
        (b"text/html; charset=utf-8", -1),
    ],
)
def test_the_kind_of_a_foreign_servers_reply(content_type: bytes | None, kind: int) -> None:
    headers = [(b":status", b"200"), (b"server", b"other")]
    if content_type is not None:
        headers.append((b"content-type", content_type))
    assert reply_kind(headers) == kind


def test_headers_is_what_both_protocols_give() -> None:
    pairs: Headers = [(b":method", b"GET"), (b":path", b"/live")]
    assert parse_head(pairs, ROOT).page == "live"
