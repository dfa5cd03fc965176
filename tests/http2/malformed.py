"""Requests with malformed fields (RFC 9113 section 8.1.1), one defect each: what request smuggling is made of.

The first 29 are the kinds that HTTP2.md section 3 lists, with what h2, hyper and nghttp2 refuse and what they let pass. Each has
to be refused with RST_STREAM PROTOCOL_ERROR, on its stream only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import frames as f


@dataclass(frozen=True)
class Malformed:
    name: str
    section: str
    """of RFC 9113"""
    extra: tuple[f.Field, ...] = ()
    """behind the fields of a plain request"""
    replace: dict[bytes, bytes | None] = field(default_factory=dict)
    """values of pseudo-header fields; None leaves one out"""
    before: tuple[f.Field, ...] = ()
    method: bytes = b"GET"
    body: bytes | None = None

    def fields(self, request: list[f.Field]) -> list[f.Field]:
        base = [(name, self.replace.get(name, value)) for name, value in request]
        return [*self.before, *((name, value) for name, value in base if value is not None), *self.extra]

    def frames(self, stream: int, request: list[f.Field], kind: int = f.WITHOUT_INDEXING) -> list[bytes]:
        head = f.headers(stream, f.block(self.fields(request), kind), end=self.body is None)
        return [head] if self.body is None else [head, f.data(stream, self.body, end=True)]

    def __str__(self) -> str:
        return self.name


def _extra(name: str, section: str, *extra: f.Field) -> Malformed:
    return Malformed(name, section, extra)


def _pseudo(name: str, **replace: bytes | None) -> Malformed:
    return Malformed(name, "8.3.1", replace={b":" + key.encode(): value for key, value in replace.items()})


KINDS_29: list[Malformed] = [
    _extra("CR in a value", "8.2.1", (b"x-test", b"a\rb")),
    _extra("LF in a value", "8.2.1", (b"x-test", b"a\nb: c")),
    _extra("NUL in a value", "8.2.1", (b"x-test", b"a\x00b")),
    _extra("space before a value", "8.2.1", (b"x-test", b" a")),
    _extra("tab behind a value", "8.2.1", (b"x-test", b"a\t")),
    _extra("upper case in a name", "8.2.1", (b"X-Test", b"a")),
    _extra("colon in a name", "8.2.1", (b"x:test", b"a")),
    _extra("space in a name", "8.2.1", (b"x test", b"a")),
    _extra("empty name", "8.2.1", (b"", b"a")),
    _extra("transfer-encoding", "8.2.2", (b"transfer-encoding", b"chunked")),
    _extra("connection", "8.2.2", (b"connection", b"close")),
    _extra("te with another value than trailers", "8.2.2", (b"te", b"gzip")),
    _extra("two content-length fields that differ", "8.1.1", (b"content-length", b"0"), (b"content-length", b"1")),
    Malformed("content-length with a sign", "8.1.1", ((b"content-length", b"+5"),), method=b"POST", body=b"12345"),
    Malformed("content-length other than the body", "8.1.1", ((b"content-length", b"3"),), method=b"POST", body=b"12345"),
    Malformed("pseudo-header field behind a regular one", "8.3", before=((b"x-test", b"a"),)),
    _extra("pseudo-header field twice", "8.3", (b":authority", b"localhost")),
    _extra("unknown pseudo-header field", "8.3", (b":unknown", b"a")),
    _pseudo("empty :path", path=b""),
    _pseudo("no :path", path=None),
    _extra("host other than :authority", "8.3.1", (b"host", b"elsewhere")),
    _extra("two host fields", "8.3.1", (b"host", b"localhost"), (b"host", b"localhost")),
    _pseudo(":path without a slash", path=b"admin"),
    _pseudo(":path with spaces", path=b"/a b HTTP/1.1"),
    _pseudo(":path with a control character", path=b"/a\x7f"),
    _pseudo(":method with a space", method=b"GET /admin"),
    _pseudo(":scheme other than http and https", scheme=b"gopher"),
    _pseudo(":authority with user information", authority=b"user:secret@localhost"),
    _extra("proxy-connection", "8.2.2", (b"proxy-connection", b"keep-alive")),
]

MORE: list[Malformed] = [
    _extra("keep-alive", "8.2.2", (b"keep-alive", b"timeout=5")),
    _extra("upgrade", "8.2.2", (b"upgrade", b"h2c")),
    _extra("CR behind a value", "8.2.1", (b"x-test", b"a\r")),
    _extra("LF before a value", "8.2.1", (b"x-test", b"\na")),
    _extra("tab before a value", "8.2.1", (b"x-test", b"\ta")),
    _extra("space behind a value", "8.2.1", (b"x-test", b"a ")),
    _extra("value that is one space", "8.2.1", (b"x-test", b" ")),
    _extra("NUL in a name", "8.2.1", (b"x\x00test", b"a")),
    _extra("DEL in a name", "8.2.1", (b"x-test\x7f", b"a")),
    _extra("byte above 0x7f in a name", "8.2.1", (b"x-t\xebst", b"a")),
    _extra("parenthesis in a name", "8.2.1", (b"x-test(", b"a")),
    _extra("slash in a name", "8.2.1", (b"x/test", b"a")),
    _extra("name that is a colon", "8.2.1", (b":", b"a")),
    _extra("upper case in a pseudo-header field", "8.3", (b":Protocol", b"a")),
    _extra(":status in a request", "8.3", (b":status", b"200")),
    _extra(":protocol without extended CONNECT", "8.3", (b":protocol", b"websocket")),
    _extra(":method twice", "8.3.1", (b":method", b"GET")),
    _extra(":path twice", "8.3.1", (b":path", b"/other")),
    _extra(":scheme twice", "8.3.1", (b":scheme", b"http")),
    _pseudo("no :method", method=None),
    _pseudo("no :scheme", scheme=None),
    _pseudo("empty :method", method=b""),
    _pseudo("empty :scheme", scheme=b""),
    _pseudo(":path * for GET", path=b"*"),
    _pseudo(":path as an absolute URI", path=b"http://localhost/"),
    _pseudo(":path with a tab", path=b"/a\tb"),
    _pseudo(":path with LF", path=b"/a\nb"),
    _pseudo(":path with NUL", path=b"/a\x00"),
    _pseudo(":method with CR", method=b"GET\r"),
    _pseudo(":authority with a space", authority=b"local host"),
    _pseudo(":authority with a slash", authority=b"localhost/admin"),
    _pseudo(":authority with CR LF", authority=b"localhost\r\nx: y"),
    _extra("empty content-length", "8.1.1", (b"content-length", b"")),
    _extra("content-length with a space", "8.1.1", (b"content-length", b"0 0")),
    _extra("content-length that is no number", "8.1.1", (b"content-length", b"zero")),
    _extra("content-length below zero", "8.1.1", (b"content-length", b"-0")),
    _extra("content-length of 2^64", "8.1.1", (b"content-length", b"18446744073709551616")),
    _extra("te: trailers among others", "8.2.2", (b"te", b"trailers, gzip")),
    _extra("CR in a cookie", "8.2.1", (b"cookie", b"a=b\r")),
]  # fmt: skip

MALFORMED = [*KINDS_29, *MORE]
