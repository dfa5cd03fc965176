"""What every server has to accept: h2spec's section "generic" in numbers and order."""

from __future__ import annotations

from . import frames as f
from .peer import Case, Peer, Section

CASES: list[Case] = []

UA = f.indexed(58)
"""user-agent with an empty value, in the static table"""


def section(number: str, rfc: str) -> Section:
    return Section(CASES, f"generic/{number}", f"RFC 9113 {rfc}")


# --- 1: starting, 2: streams ----------------------------------------------------------------------------------------------

s = section("1", "3.4")


@s("The server accepts the client's connection preface and sends its SETTINGS.")
def _(p: Peer) -> None:
    p.send(f.PREFACE, f.settings())
    first = p.until("a frame", lambda frame: True)
    assert first.type == f.SETTINGS and not first.ack, f"the first frame has to be SETTINGS; the endpoint sent {p.story()}"
    p.settings_ack()
    p.send(f.SETTINGS_ACK)
    p.alive()


s = section("2", "5.1")


@s("PRIORITY is accepted on an idle stream.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.priority(1, weight=256))
    p.alive()


@s("WINDOW_UPDATE is accepted on a half-closed (remote) stream.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.window_update(1, 1))
    p.data_of_length(1, 1)


@s("PRIORITY is accepted on a half-closed (remote) stream.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.priority(1, weight=256), f.window_update(1, 1))
    p.data_of_length(1, 1)


@s("RST_STREAM is accepted on a half-closed (remote) stream.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.rst_stream(1))
    p.alive()


@s("PRIORITY is accepted on a closed stream.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.complete()
    p.send(f.priority(1, weight=256))
    p.alive()


# --- 3: every frame type --------------------------------------------------------------------------------------------------

s = section("3.1", "6.1")


@s("One DATA frame is accepted as a body.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test", end=True))
    p.response()


@s("Several DATA frames are accepted as a body.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test"), f.data(1, b"test", end=True))
    p.response()


@s("A DATA frame with padding is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test", end=True, pad=6))
    p.response()


s = section("3.2", "6.2")


@s("A HEADERS frame is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.response()


@s("A HEADERS frame with padding is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()), end=True, pad=6))
    p.response()


@s("A HEADERS frame with priority fields is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()), end=True, priority=f.priority_fields(0, 256)))
    p.response()


s = section("3.3", "6.3")


def _priority(*, stream: int = 1, depends_on: int = 0, weight: int = 1, exclusive: bool = False):  # type: ignore[no-untyped-def]
    def run(p: Peer) -> None:
        p.handshake()
        p.send(f.priority(stream, depends_on, weight, exclusive), p.get())
        p.response()

    return run


s.add("PRIORITY with weight 1 is accepted.", _priority())
s.add("PRIORITY with weight 256 is accepted.", _priority(weight=256))
s.add("PRIORITY with a dependency on another stream is accepted.", _priority(stream=3, depends_on=1))
s.add("PRIORITY with the exclusive flag is accepted.", _priority(exclusive=True))
s.add("PRIORITY on an idle stream does not close idle streams with lower numbers.", _priority(stream=3, weight=256))

s = section("3.4", "6.4")


@s("RST_STREAM is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.rst_stream(1))
    p.alive()


s = section("3.5", "6.5")


@s("SETTINGS with all defined parameters is accepted and acknowledged.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.settings((1, 4096), (2, 1), (3, 100), (4, 65535), (5, 16384), (6, 100)))
    p.settings_ack()
    p.alive()


s = section("3.7", "6.7")


@s("PING is answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.alive(b"h2 ping!")


s = section("3.8", "6.8")


@s("GOAWAY is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.goaway())
    p.alive_or_closed()


s = section("3.9", "6.9")


@s("WINDOW_UPDATE for the connection is accepted.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(f.window_update(0, 1), p.get(), f.settings((f.INITIAL_WINDOW_SIZE, 1)))
    p.data_of_length(1, 1)


@s("WINDOW_UPDATE for a stream is accepted.")
def _(p: Peer) -> None:
    p.handshake_and_hold()
    p.send(p.get(), f.window_update(1, 1))
    p.data_of_length(1, 1)


s = section("3.10", "6.10")


@s("A CONTINUATION frame is accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()), end=True, end_headers=False), f.continuation(1, f.literal(b"x-dummy0", b"x" * 99)))
    p.response()


@s("Several CONTINUATION frames are accepted.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(
        f.headers(1, f.block(p.fields()), end=True, end_headers=False),
        f.continuation(1, f.literal(b"x-dummy0", b"x" * 99), end_headers=False),
        f.continuation(1, f.literal(b"x-dummy1", b"x" * 99)),
    )
    p.response()


# --- 4: exchanges ---------------------------------------------------------------------------------------------------------

s = section("4", "8.1")


@s("A GET request is answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.get())
    p.response()
    p.complete()


@s("A HEAD request is answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields(b"HEAD")), end=True))
    p.response()


@s("A POST request is answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(), f.data(1, b"test", end=True))
    p.response()
    p.complete()


@s("A POST request with trailers is answered.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(p.post(1, (b"trailer", b"x-test")), f.data(1, b"test"), f.headers(1, f.block([(b"x-test", b"ok")]), end=True))
    p.response()
    p.complete()


# --- 5: HPACK -------------------------------------------------------------------------------------------------------------


def _field(extra: bytes, before: bytes = b""):  # type: ignore[no-untyped-def]
    def run(p: Peer) -> None:
        p.handshake()
        p.send(f.headers(1, before + f.block(p.fields()) + extra, end=True))
        p.response()

    return run


s = section("5", "4.3")
s.rfc = "RFC 7541 6.1"
s.add("An indexed field is accepted.", _field(UA))
for kind, kind_text, rfc in (
    (f.INDEXING, "with incremental indexing", "6.2.1"),
    (f.WITHOUT_INDEXING, "without indexing", "6.2.2"),
    (f.NEVER_INDEXED, "never indexed", "6.2.3"),
):
    s.rfc = f"RFC 7541 {rfc}"
    s.add(f"A literal {kind_text} is accepted: indexed name.", _field(f.indexed_name(58, b"h2 tests", kind)))
    s.add(
        f"A literal {kind_text} is accepted: indexed name, value in Huffman code.",
        _field(f.indexed_name(58, b"", kind)[:-1] + f.string(f.huffman(b"h2 tests"), huffman=True)),
    )
    s.add(f"A literal {kind_text} is accepted: new name.", _field(f.literal(b"x-test", b"h2 tests", kind)))
    s.add(
        f"A literal {kind_text} is accepted: new name, in Huffman code.", _field(f.huffman_literal(b"x-test", b"h2 tests", kind))
    )
s.rfc = "RFC 7541 6.3"
s.add("A dynamic table size update is accepted.", _field(b"", f.table_size_update(0)))
s.rfc = "RFC 7541 4.2"
s.add("Several dynamic table size updates are accepted.", _field(b"", f.table_size_update(0) + f.table_size_update(4096)))
