"""HPACK as seen from outside: h2spec's section "hpack" in numbers and order, then more of RFC 7541."""

from __future__ import annotations

from collections.abc import Callable

from . import frames as f
from .peer import Case, EnginePeer, Peer, Section

CASES: list[Case] = []


def section(number: str, prefix: str = "hpack") -> Section:
    return Section(CASES, f"{prefix}/{number}", f"RFC 7541 {number}")


def undecodable(extra: bytes, before: bytes = b"") -> Callable[[Peer], None]:
    def run(p: Peer) -> None:
        p.handshake_and_hold()
        p.send(f.headers(1, before + f.block(p.fields()) + extra, end=True))
        p.connection_error(f.COMPRESSION_ERROR)

    return run


NAME = bytes([0]) + f.string(f.huffman(b"x-test"), huffman=True)

s = section("2.3.3")
s.add("An indexed field beyond both tables is a decoding error.", undecodable(f.indexed(126)))
s.add("An indexed name beyond both tables is a decoding error.", undecodable(f.indexed_name(126, b"value", f.INDEXING)))

s = section("4.2")
s.add("A dynamic table size update at the end of a block is a decoding error.", undecodable(f.table_size_update(1)))

s = section("5.2")
s.add(
    "Padding of a Huffman string longer than 7 bits is a decoding error.",
    undecodable(NAME + f.string(f.huffman(b"test") + b"\xff", huffman=True)),
)
s.add(
    "Padding of a Huffman string with zeros is a decoding error.",
    undecodable(NAME + f.string(b"\x49\x50\x90", huffman=True)),  # "test" ends inside of the last byte
)
s.add(
    "EOS inside of a Huffman string is a decoding error.",
    undecodable(NAME + f.string(b"\xff\xff\xff\xfd\x25\x42\x7f", huffman=True)),
)

s = section("6.1")
s.add("An indexed field with index 0 is a decoding error.", undecodable(f.indexed(0)))

s = section("6.3")
s.add("A dynamic table size update above the announced limit is a decoding error.", undecodable(b"", f.table_size_update(4097)))

# --- beyond h2spec --------------------------------------------------------------------------------------------------------


def decodes(*pieces: tuple[bytes, list[f.Field]]) -> Callable[[EnginePeer], None]:
    """Blocks that follow one another on one connection, and the fields that each adds to a plain request."""

    def run(p: EnginePeer) -> None:
        p.handshake()
        for number, (extra, expected) in enumerate(pieces):
            before, _, extra = extra.rpartition(SPLIT)
            p.send(f.headers(1 + 2 * number, before + f.block(p.fields()) + extra, end=True))
            p.response(1 + 2 * number)
            got = [event[2] for event in p.events if event[0] == "headers"][-1]
            assert list(got) == [*p.fields(), *expected], f"expected {expected} behind the request's fields, got {got}"

    return run


SPLIT = b"<the request's own fields>"
FIELD = (b"x-test", b"one")
OTHER = (b"x-other", b"two")
add, add_other = f.literal(*FIELD, f.INDEXING), f.literal(*OTHER, f.INDEXING)

s = section("2.3.2", "rfc7541")
s.add(
    "New entries get the lowest index, older ones move up.",
    decodes((add + add_other, [FIELD, OTHER]), (f.indexed(62) + f.indexed(63), [OTHER, FIELD])),
    socket=False,
)
s.add(
    "A literal without indexing and one never indexed leave the dynamic table as it was.",
    decodes(
        (add, [FIELD]),
        (f.literal(*OTHER) + f.literal(*OTHER, f.NEVER_INDEXED), [OTHER, OTHER]),
        (f.indexed(62), [FIELD]),
    ),
    socket=False,
)

s = section("4.3", "rfc7541")


@s("A table size update to 0 empties the dynamic table: what was in it is a decoding error.")
def _(p: Peer) -> None:
    p.handshake()
    p.send(f.headers(1, f.block(p.fields()) + add, end=True))
    p.response(1)
    p.send(f.headers(3, f.table_size_update(0) + f.block(p.fields()) + f.indexed(62), end=True))
    p.connection_error(f.COMPRESSION_ERROR)


s.add(
    "After an update to 0 and back the table works again.",
    decodes(
        (add, [FIELD]),
        (f.table_size_update(0) + f.table_size_update(4096) + SPLIT + add_other, [OTHER]),
        (f.indexed(62), [OTHER]),
    ),
    socket=False,
)

s = section("4.4", "rfc7541")
BIG = (b"x-big", b"b" * 4096)
s.add(
    "An entry larger than the table empties it and is no error; the field itself is delivered.",
    decodes((add, [FIELD]), (f.literal(*BIG, f.INDEXING), [BIG]), (add_other, [OTHER]), (f.indexed(62), [OTHER])),
    socket=False,
)
s.add(
    "Entries are evicted from the old end.",
    decodes(
        (add + f.literal(b"x-fill", b"f" * 3900, f.INDEXING), [FIELD, (b"x-fill", b"f" * 3900)]),
        (add_other + f.literal(b"x-new", b"n" * 150, f.INDEXING), [OTHER, (b"x-new", b"n" * 150)]),
        (f.indexed(62) + f.indexed(63), [(b"x-new", b"n" * 150), OTHER]),
    ),
    socket=False,
)
s.add(
    "A new entry may take its name from an entry that it evicts.",
    decodes(
        (f.literal(b"x-name", b"v" * 4000, f.INDEXING), [(b"x-name", b"v" * 4000)]),
        (f.indexed_name(62, b"w" * 4000, f.INDEXING), [(b"x-name", b"w" * 4000)]),
        (f.indexed(62), [(b"x-name", b"w" * 4000)]),
    ),
    socket=False,
)

s = section("5.1", "rfc7541")
s.add(
    "A string length that is coded with trailing zero bytes is accepted.",
    decodes((b"\x00\x06x-test\x7f\x81\x00" + b"v" * 128, [(b"x-test", b"v" * 128)])),
    socket=False,
)
s.add("An integer beyond 32 bits is a decoding error.", undecodable(b"\xff" + b"\xff" * 9 + b"\x7f"))
s.add("An integer that never ends is a decoding error.", undecodable(b"\xff" + b"\x80" * 60))
s.add("An integer that is cut off is a decoding error.", undecodable(b"\xff"))

s = section("5.2", "rfc7541")
s.add("A string longer than the block is a decoding error.", undecodable(b"\x00\x06x-test\x08value"))
s.add("A literal without a value is a decoding error.", undecodable(b"\x00\x06x-test"))
s.add("A string of 2^31 bytes is a decoding error.", undecodable(b"\x00\x06x-test\x7f\x81\xff\xff\xff\x07value"))
s.add(
    "A Huffman string that ends inside of a long code is a decoding error.",
    undecodable(NAME + f.string(b"\xff\xff", huffman=True)),
)
s.add("An empty Huffman string is accepted.", decodes((NAME + b"\x80", [(b"x-test", b"")])), socket=False)
s.add(
    "Every byte a field value may have survives Huffman coding.",
    decodes(
        (
            f.huffman_literal(b"x-test", b"v" + bytes([9, *range(32, 127), *range(128, 256)]) + b"v"),
            [(b"x-test", b"v" + bytes([9, *range(32, 127), *range(128, 256)]) + b"v")],
        )
    ),
    socket=False,
)

s = section("6.2", "rfc7541")
s.add(
    "A literal with incremental indexing is in the table for the next field already.",
    decodes((add + f.indexed(62), [FIELD, FIELD])),
    socket=False,
)

s = section("6.3", "rfc7541")
s.add("A dynamic table size update between fields is a decoding error.", undecodable(f.table_size_update(0) + add))
s.add("A dynamic table size update of 2^32 is a decoding error.", undecodable(b"", b"\x3f" + b"\xe1\xff\xff\xff\x0f"))
