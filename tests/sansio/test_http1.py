"""HTTP/1.1 for tools: one connection without a socket, at every split offset."""

from __future__ import annotations

import itertools
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwire._frames import PREFACE
from dynwire.wire.http1 import FIELD_LIMIT, HEAD_LIMIT, TARGET_LIMIT, Http1Session, foreign, sniff
from dynwire.wire.http_api import parse_head, request_headers

GET = b"GET /live HTTP/1.1\r\nHost: h:1\r\n\r\n"
POST = b"POST /v1/rpc/a/b/c HTTP/1.1\r\nHost: h:1\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n[1,2,3]"
CHUNKED = (
    b"POST /v1/rpc/a/b/c HTTP/1.1\r\nHost: h:1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\n[1,\r\n4;ext=1\r\n2,3]\r\n0\r\nTrailer: x\r\n\r\n"
)
OLD = b"GET /live HTTP/1.0\r\n\r\n"
PSEUDO_GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"h:1"), (b":path", b"/live")]


def joined(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """How a body is cut into events depends on how it arrives, and is nobody's business."""
    out: list[tuple[Any, ...]] = []
    for event in events:
        if event[0] == "data" and out and out[-1][0] == "data":
            out[-1] = ("data", out[-1][1] + event[1])
        else:
            out.append(event)
    return out


def answer(session: Http1Session, status: int = 200, body: bytes = b"ok") -> None:
    session.send_head(status, [(b"content-length", b"%d" % len(body))])
    session.send_data(body)
    session.end()


def serve(chunks: list[bytes]) -> tuple[list[tuple[Any, ...]], bytes, Http1Session]:
    """A server that answers each request as soon as it is complete, and each error."""
    session = Http1Session()
    seen: list[tuple[Any, ...]] = []
    for chunk in chunks:
        events = session.receive(chunk)
        while events:
            seen += events
            kind = events[-1][0]
            if kind == "end":
                answer(session)
            elif kind == "error":
                answer(session, events[-1][1], events[-1][2].encode())
            events = session.receive(b"") if kind == "end" else []
    return joined(seen), session.output(), session


def responses(data: bytes, *methods: str) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """What a client (h11, the oracle) reads: status, headers, body of each response."""
    found = []
    for method in methods:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        body = b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status, headers = event.status_code, dict(event.headers)
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                assert isinstance(event, h11.InformationalResponse), event
        found.append((status, headers, body))
        data = client.trailing_data[0]
    assert data == b""
    return found


@pytest.mark.parametrize("wire", [GET, POST, CHUNKED, OLD, POST + CHUNKED + GET, b"\r\n" + GET], ids=range(6))
def test_every_split_gives_the_same_events(wire: bytes) -> None:
    whole = serve([wire])
    for cut in range(1, len(wire)):
        events, out, session = serve([wire[:cut], wire[cut:]])
        assert (events, out, session.must_close) == (whole[0], whole[1], whole[2].must_close), cut
    events, out, _ = serve([bytes([byte]) for byte in wire])
    assert (events, out) == whole[:2]


def test_a_request_looks_like_one_of_http2() -> None:
    events, _, _ = serve([POST])
    (kind, headers), *rest = events
    assert kind == "request"
    assert headers == [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":authority", b"h:1"),
        (b":path", b"/v1/rpc/a/b/c"),
        (b"content-type", b"application/json"),
        (b"content-length", b"7"),
    ]
    assert rest == [("data", b"[1,2,3]"), ("end",)]
    head = parse_head(headers, "/v1/rpc")
    assert (head.endpoint, head.content_length) == ("a.b.c", 7)
    assert Http1Session("https").receive(GET)[0][1][1] == (b":scheme", b"https")


def test_a_chunked_request() -> None:
    events, _, _ = serve([CHUNKED])
    assert events[1:] == [("data", b"[1,2,3]"), ("end",)]
    assert b"transfer-encoding" not in dict(events[0][1]) and b"trailer" not in dict(events[0][1])


def test_without_host_there_is_no_authority() -> None:
    events, _, _ = serve([OLD])
    assert events[0] == ("request", [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/live")])


@pytest.mark.parametrize(
    ("target", "path"),
    [(b"http://x:9/a?b", b"/a?b"), (b"http://x:9", b"/"), (b"HTTPS://x:9?b", b"/?b")],
    ids=lambda v: v.decode(),
)
def test_a_proxys_form_of_the_target(target: bytes, path: bytes) -> None:
    events, _, _ = serve([b"GET %b HTTP/1.1\r\nHost: h:1\r\n\r\n" % target])
    assert dict(events[0][1])[b":path"] == path and dict(events[0][1])[b":authority"] == b"x:9"


def test_an_upgrade_to_h2c_is_ignored() -> None:
    """What `curl --http2` sends."""
    upgrade = GET[:-2] + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    events, out, session = serve([upgrade + GET])
    assert events == [("request", PSEUDO_GET), ("end",)] * 2
    assert [status for status, _, _ in responses(out, "GET", "GET")] == [200, 200]
    assert not session.must_close


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=5))
def test_context_headers_survive_http1(headers: dict[str, str]) -> None:
    lines = b"".join(b"%b: %b\r\n" % pair for pair in request_headers(headers=headers, request_id="id-1"))
    events, _, _ = serve([b"POST /v1/rpc/a/b/c HTTP/1.1\r\nHost: h\r\n" + lines + b"\r\n"])
    head = parse_head(events[0][1], "/v1/rpc")
    assert (head.headers, head.request_id) == (headers, "id-1")


# --- several requests ---------------------------------------------------------------------------------------------------------


def test_the_next_request_waits_for_the_reply() -> None:
    session = Http1Session()
    assert session.receive(POST + GET) == [*serve([POST])[0]]
    assert session.receive(GET) == []
    session.send_head(200, [(b"content-length", b"2")])
    assert session.receive(b"") == []
    session.send_data(b"ok")
    session.end()
    for _ in range(2):
        assert session.receive(b"") == [("request", PSEUDO_GET), ("end",)]
        assert session.receive(b"") == []
        answer(session)
    assert session.idle and not session.must_close
    assert len(responses(session.output(), "POST", "GET", "GET")) == 3


def test_pipelining_is_no_way_to_fill_memory() -> None:
    session = Http1Session()
    session.receive(GET)
    assert session.wants_data
    session.receive(GET * 2000)
    assert not session.wants_data
    for _ in range(2000):
        answer(session)
        assert session.receive(b"") == [("request", PSEUDO_GET), ("end",)]
    assert session.wants_data


@pytest.mark.parametrize("line", [b"Connection: close\r\n", b"Connection: x, Close\r\n"])
def test_a_client_that_wants_the_connection_closed(line: bytes) -> None:
    events, out, session = serve([GET[:-2] + line + b"\r\n" + GET])
    assert len(events) == 2 and session.must_close
    assert responses(out, "GET")[0][1][b"connection"] == b"close"


def test_http_1_0_gets_no_chunks() -> None:
    session = Http1Session()
    session.receive(OLD)
    session.send_head(200, [(b"content-type", b"a/b")])
    session.send_data(b"until the end")
    session.end()
    head, _, body = session.output().partition(b"\r\n\r\n")
    assert body == b"until the end" and b"ransfer-" not in head
    assert session.must_close


# --- replies ------------------------------------------------------------------------------------------------------------------


def test_a_chunked_reply() -> None:
    session = Http1Session()
    session.receive(GET)
    session.send_head(200, [(b"content-type", b"text/event-stream")])
    assert session.output().endswith(b"\r\n\r\n")
    for piece in (b"one", b"", b"two"):  # an empty chunk would be the end
        session.send_data(piece)
    pieces = session.output()
    assert b"one" in pieces and b"two" in pieces
    session.end()
    assert session.output() == b"0\r\n\r\n" and not session.must_close and session.output() == b""


@pytest.mark.parametrize("status", [200, 204, 304, 499, 799])
def test_replies_without_a_body(status: int) -> None:
    session = Http1Session()
    session.receive(GET)
    session.send_head(status, [], True)
    ((shown, headers, body),) = responses(session.output(), "GET")
    assert (shown, body) == (status, b"")
    assert headers.get(b"content-length") == (None if status in (204, 304) else b"0")
    assert not session.must_close


@pytest.mark.parametrize("length", [True, False])
def test_head_has_the_headers_of_get_and_no_body(length: bool) -> None:
    session = Http1Session()
    session.receive(GET.replace(b"GET", b"HEAD"))
    session.send_head(200, [(b"content-length", b"2")] if length else [(b"content-type", b"a/b")])
    session.send_data(b"ok")
    session.end()
    out = session.output()
    ((status, headers, body),) = responses(out, "HEAD")
    assert (status, body) == (200, b"") and out.endswith(b"\r\n\r\n")
    assert headers.get(b"content-length") == (b"2" if length else None)
    assert not session.must_close and session.receive(GET)


def test_head_has_no_invented_length() -> None:
    session = Http1Session()
    session.receive(GET.replace(b"GET", b"HEAD"))
    session.send_head(200, [], True)
    ((status, headers, _),) = responses(session.output(), "HEAD")
    assert status == 200 and b"content-length" not in headers and not session.must_close


def test_reason_phrases() -> None:
    for status, line in ((404, b"HTTP/1.1 404 Not Found"), (499, b"HTTP/1.1 499 Client Closed Request")):
        session = Http1Session()
        session.receive(GET)
        session.send_head(status, [], True)
        assert session.output().startswith(line)


def test_expect_100_continue() -> None:
    head, _, body = POST.partition(b"\r\n\r\n")
    head += b"\r\nExpect: 100-continue\r\n\r\n"
    session = Http1Session()
    (request,) = session.receive(head)
    assert b"expect" not in dict(request[1]) and session.expects_continue
    assert session.output() == b""
    session.send_continue()
    assert session.output() == b"HTTP/1.1 100 Continue\r\n\r\n" and not session.expects_continue
    session.send_continue()
    assert session.output() == b""
    assert session.receive(body) == [("data", body), ("end",)]
    answer(session)
    assert not session.must_close


def test_a_refusal_instead_of_continue_closes() -> None:
    """Whether the client then sends the body is its own choice, so nobody knows what the next bytes are."""
    session = Http1Session()
    session.receive(POST.partition(b"\r\n\r\n")[0] + b"\r\nExpect: 100-continue\r\n\r\n")
    answer(session, 413, b"no")
    assert session.must_close and session.receive(b"[1,2,3]" + GET) == []
    assert responses(session.output(), "POST")[0][1][b"connection"] == b"close"


@pytest.mark.parametrize(("status", "announced"), [(400, b"close"), (200, None)])
def test_a_reply_before_the_end_of_the_request_closes(status: int, announced: bytes | None) -> None:
    session = Http1Session()
    session.receive(POST[:-3])
    answer(session, status, b"no")
    assert session.must_close and session.receive(POST[-3:] + GET) == []
    assert responses(session.output(), "POST")[0][1].get(b"connection") == announced


def test_a_reply_may_begin_before_the_end_of_the_request() -> None:
    session = Http1Session()
    session.receive(POST[:-3])
    session.send_head(200, [(b"content-length", b"2")])
    assert session.receive(POST[-3:]) == [("data", POST[-3:]), ("end",)]
    session.send_data(b"ok")
    session.end()
    assert not session.must_close and b"connection" not in responses(session.output(), "POST")[0][1]


def test_a_reply_that_is_given_up_has_no_end() -> None:
    session = Http1Session()
    session.receive(GET)
    session.send_head(200, [])
    session.send_data(b"some")
    session.abort()
    assert session.must_close and not session.output().endswith(b"0\r\n\r\n")
    session.send_data(b"more")
    session.end()
    session.send_head(200, [], True)
    session.send_continue()
    assert session.output() == b"" and session.receive(GET) == [] == session.receive_eof()


# --- what is refused ----------------------------------------------------------------------------------------------------------


def request(*lines: bytes, first: bytes = b"POST / HTTP/1.1") -> bytes:
    return b"\r\n".join((first, b"Host: h", *lines, b"", b""))


BAD = {
    "both lengths": (request(b"Content-Length: 3", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "two lengths": (request(b"Content-Length: 3", b"Content-Length: 4"), 400),
    "a length with a sign": (request(b"Content-Length: +3"), 400),
    "unknown coding": (request(b"Transfer-Encoding: gzip, chunked"), 501),
    "chunked in 1.0": (request(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0") + b"0\r\n\r\n", 400),
    "folded": (request(b"A: b", b" c"), 400),
    "folded with tab": (request(b"A: b", b"\tc"), 400),
    "space before colon": (request(b"A : b"), 400),
    "bare CR": (request(b"A: b\rc: d"), 400),
    "bare CR in the request line": (request(first=b"GET /\r HTTP/1.1"), 400),
    "bare LF": (b"GET / HTTP/1.1\nHost: h\n\n", 400),
    "bare LF in a header": (request(b"A: b\nC: d"), 400),
    "NUL": (request(b"A: \0"), 400),
    "control character": (request(b"A: \x1b[31m"), 400),
    "DEL": (request(b"A: \x7f"), 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (request(b"Host: other"), 400),
    "two empty lines": (b"\r\n\r\n" + GET, 400),
    "no version": (request(first=b"GET /"), 400),
    "a space in the target": (request(first=b"GET /a b HTTP/1.1"), 400),
    "HTTP/2 without its preface": (request(first=b"GET / HTTP/2.0"), 505),
    "HTTP/0.9": (request(first=b"GET / HTTP/0.9"), 505),
    "long method": (request(first=b"G" * 33 + b" / HTTP/1.1"), 400),
    "long target": (request(first=b"GET /%b HTTP/1.1" % (b"x" * TARGET_LIMIT)), 414),
    "many fields": (request(*(b"A%d: b" % number for number in range(FIELD_LIMIT))), 431),
    "bad chunk": (request(b"Transfer-Encoding: chunked") + b"z\r\n", 400),
    "bad end of a chunk": (request(b"Transfer-Encoding: chunked") + b"1\r\nabc\r\n", 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name: str) -> None:
    wire, status = BAD[name]
    for chunks in ([wire + GET], [bytes([byte]) for byte in wire + GET]):
        events, out, session = serve(chunks)
        assert [event[1] for event in events if event[0] == "error"] == [status], events
        assert events[-1][0] == "error" and isinstance(events[-1][2], str) and events[-1][2]
        assert session.must_close and not session.wants_data
        shown, headers, body = responses(out, "POST")[0]
        assert (shown, headers[b"connection"], body) == (status, b"close", events[-1][2].encode())


def test_words_for_what_is_wrong() -> None:
    wire = BAD["bare CR"][0]
    for chunks in ([wire], [bytes([byte]) for byte in wire]):
        assert "a bare CR at byte 30" in serve(chunks)[0][-1][2]
    assert "0x1b" in serve([BAD["control character"][0]])[0][-1][2]
    assert str(TARGET_LIMIT) in serve([BAD["long target"][0]])[0][-1][2]


def test_limits_are_limits() -> None:
    longest = b"/" + b"x" * (TARGET_LIMIT - 1)
    assert dict(serve([request(first=b"GET %b HTTP/1.1" % longest)])[0][0][1])[b":path"] == longest
    fields = [b"A%d: b" % number for number in range(FIELD_LIMIT - 1)]
    assert serve([request(*fields)])[0][0][0] == "request"
    room = HEAD_LIMIT - len(request(b"A: "))
    assert serve([request(b"A: " + b"x" * room)])[0][0][0] == "request"
    assert serve([request(b"A: " + b"x" * (room + 1))])[0] == [
        ("error", 431, f"the request's head is longer than {HEAD_LIMIT} bytes")
    ]


@pytest.mark.parametrize(
    ("endless", "status"),
    [(b"x" * 1000, 414), (b"GET /" + b"x" * 1000, 414), (b"GET / HTTP/1.1\r\nA: " + b"x" * 1000, 431)],
    ids=["no request line", "target", "header"],
)
def test_a_head_without_end_is_cut_off(endless: bytes, status: int) -> None:
    session = Http1Session()
    for number in itertools.count(1):
        if events := session.receive(endless if number == 1 else b"x" * 1000):
            break
        assert number <= HEAD_LIMIT // 1000 + 1
    assert events[0][:2] == ("error", status)
    assert session.receive(b"x" * 1000) == []


def test_a_chunk_head_without_end_is_cut_off() -> None:
    session = Http1Session()
    session.receive(request(b"Transfer-Encoding: chunked"))
    seen = [event for _ in range(70) for event in session.receive(b"0" * 1000)]
    assert [event[:2] for event in seen] == [("error", 431)]


# --- ends ---------------------------------------------------------------------------------------------------------------------


def test_the_client_closes_between_requests() -> None:
    _, _, session = serve([GET])
    assert session.receive_eof() == [] and session.must_close


@pytest.mark.parametrize("cut", [3, 40, -3])
def test_the_client_closes_in_the_middle_of_a_request(cut: int) -> None:
    session = Http1Session()
    session.receive(POST[:cut])
    ((kind, status, text),) = session.receive_eof()
    assert (kind, status) == ("error", 400) and "middle of a request" in text
    answer(session, status)
    assert session.must_close


def test_a_client_that_only_stops_sending_gets_its_replies() -> None:
    session = Http1Session()
    session.receive(GET + GET)
    assert session.receive_eof() == [] and not session.must_close
    answer(session)
    assert not session.must_close
    assert session.receive(b"") == [("request", PSEUDO_GET), ("end",)]
    answer(session)
    assert session.must_close
    first, second = responses(session.output(), "GET", "GET")
    assert b"connection" not in first[1] and second[1][b"connection"] == b"close"


def test_a_client_stops_sending_while_it_is_answered() -> None:
    session = Http1Session()
    session.receive(GET)
    session.send_head(200, [])
    assert session.receive_eof() == [] and not session.must_close
    session.end()
    assert session.must_close and session.output().endswith(b"0\r\n\r\n")


def test_half_a_request_behind_a_whole_one_and_then_the_end() -> None:
    session = Http1Session()
    session.receive(GET + GET[:9])
    session.receive_eof()
    answer(session)
    assert [event[:2] for event in session.receive(b"")] == [("error", 400)]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_any_bytes_give_events_or_an_error(data: bytes, cuts: list[int]) -> None:
    wire = POST[:60] + data
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    events, _, _ = serve([wire[a:b] for a, b in itertools.pairwise(edges)])
    assert events == serve([wire])[0]
    assert all(event[0] in ("request", "data", "end", "error") for event in events)


# --- telling protocols apart --------------------------------------------------------------------------------------------------

H2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (H2, "h2"),
        (b"PRI * HTTP/1.1\r\n\r\n", "h2"),
        (GET, "http1"),
        (OLD, "http1"),
        (b"\r\n" + GET, "http1"),
        (b"PRINT / HTTP/1.1\r\n", "http1"),
        (b"GET http://h/ HTTP/1.1\r\n", "http1"),
        (b"OPTIONS * HTTP/1.1\r\n", "http1"),
        (b"GET / HTTP/1.1\nHost", "http1"),
        (b"GET /" + b"x" * 9000, "http1"),
        (b"", "need-more"),
        (b"GET / HTTP/1.", "need-more"),
        (b"INVALID CONNECTION PREFACE\r\n\r\n", "other"),
        (b"GET /\r\n", "other"),
        (b"GET / HTTP/2.0\r\n", "other"),
        (b"GET / HTTQ", "other"),
        (b"GET  / HTTP/1.1\r\n", "other"),
        (b"GET /a b HTTP/1.1\r\n", "other"),
        (b"HTTP/1.1 200 OK\r\n", "other"),
        (b"\x16\x03\x01\x02\x00\x01", "other"),
        (PREFACE, "other"),
        (b"INFO {}\r\n", "other"),
        (b"\0", "other"),
        (b"\n", "other"),
        (b"x" * 33, "other"),
    ],
    ids=lambda value: ascii(value[:24]) if isinstance(value, bytes) else value,
)
def test_sniffing(head: bytes, expected: str) -> None:
    assert sniff(head) == expected
    for size in range(len(head)):  # what is decided stays so
        early = sniff(head[:size])
        assert early in ("need-more", expected), head[:size]


@pytest.mark.parametrize("head", [H2, GET, POST, b"\r\n" + GET])
def test_a_protocol_is_known_only_with_its_proof(head: bytes) -> None:
    decided = next(size for size in range(len(head)) if sniff(head[:size]) != "need-more")
    assert decided == (4 if head == H2 else head.index(b"\n", 2) + 1)


@pytest.mark.parametrize(
    ("head", "words"),
    [(b"\x16\x03\x01", "TLS"), (PREFACE, "the dynwire tcp plane"), (b"INFO {}\r\n", "NATS"), (b"\0\0\0", "an unknown protocol")],
)
def test_words_for_what_it_is_instead(head: bytes, words: str) -> None:
    error = foreign(head, "p:1")
    assert error.theirs == words and error.ours == "http" and error.peer == "p:1"
    assert words in str(error) and "DYN_REQUEST_PLANE" in str(error)
