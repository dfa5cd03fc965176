"""HPACK against RFC 7541: the examples of appendix C, and each rule with the bytes that break it."""

from __future__ import annotations

import sys
import tracemalloc
from collections import namedtuple

import hpack
import pytest

from dynwire._hpack import NAMES, NEVER_INDEXED, SENSITIVE, HpackDecoder, HpackEncoder, HpackError, huffman_encode, intern_name

Fields = list[tuple[bytes, bytes]]

ENTRY = (b"custom-key", b"custom-header")
INSERT = bytes.fromhex("400a637573746f6d2d6b65790d637573746f6d2d686561646572")
"""ENTRY, literal with incremental indexing (RFC 7541 C.2.1); 55 bytes in the table"""


def fields(text: str) -> Fields:
    """Lines of ``name: value``."""
    return [(name.encode(), value.encode()) for name, _, value in (line.rpartition(": ") for line in text.split("\n"))]


def literal(name: bytes, value: bytes, first: int = 0x40) -> bytes:
    """A literal with a literal name, without Huffman code; names and values below 127 bytes."""
    return bytes([first, len(name)]) + name + bytes([len(value)]) + value


def update(size: int) -> bytes:
    """A dynamic table size update."""
    data = hpack.hpack.encode_integer(size, 5)
    data[0] |= 0x20
    return bytes(data)


def indexed(index: int) -> bytes:
    data = hpack.hpack.encode_integer(index, 7)
    data[0] |= 0x80
    return bytes(data)


def long_literal(name: bytes, value: bytes) -> bytes:
    """With incremental indexing, any length."""
    return b"\x40" + b"".join(bytes(hpack.hpack.encode_integer(len(text), 7)) + text for text in (name, value))


# --- appendix C -----------------------------------------------------------------------------------------------------------

REQUESTS = [
    fields(":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com"),
    fields(":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com\ncache-control: no-cache"),
    fields(":method: GET\n:scheme: https\n:path: /index.html\n:authority: www.example.com\ncustom-key: custom-value"),
]
REQUEST_TABLES = [
    [(b":authority", b"www.example.com")],
    [(b"cache-control", b"no-cache"), (b":authority", b"www.example.com")],
    [(b"custom-key", b"custom-value"), (b"cache-control", b"no-cache"), (b":authority", b"www.example.com")],
]
COOKIE = b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
STATUS, PRIVATE, LOCATION = (b":status", b"302"), (b"cache-control", b"private"), (b"location", b"https://www.example.com")
DATE_21, DATE_22 = (b"date", b"Mon, 21 Oct 2013 20:13:21 GMT"), (b"date", b"Mon, 21 Oct 2013 20:13:22 GMT")
RESPONSES = [
    [STATUS, PRIVATE, DATE_21, LOCATION],
    [(b":status", b"307"), PRIVATE, DATE_21, LOCATION],
    [(b":status", b"200"), PRIVATE, DATE_22, LOCATION, (b"content-encoding", b"gzip"), (b"set-cookie", COOKIE)],
]
RESPONSE_TABLES = [
    [LOCATION, DATE_21, PRIVATE, STATUS],
    [(b":status", b"307"), LOCATION, DATE_21, PRIVATE],
    [(b"set-cookie", COOKIE), (b"content-encoding", b"gzip"), DATE_22],
]
BLOCKS = {
    "C.3": ["828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565"],
    "C.4": ["828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf", "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"],
    "C.5": ["4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e1768747470733a2f2f7777"
            "772e6578616d706c652e636f6d", "4803333037c1c0bf",
            "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a584f"
            "5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31"],
    "C.6": ["488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
            "4883640effc1c0bf",
            "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b39"
            "60d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007"],
}  # fmt: skip


@pytest.mark.parametrize("data, field, entered", [
    (INSERT.hex(), ENTRY, True),  # C.2.1
    ("040c2f73616d706c652f70617468", (b":path", b"/sample/path"), False),  # C.2.2
    ("100870617373776f726406736563726574", (b"password", b"secret"), False),  # C.2.3
    ("82", (b":method", b"GET"), False),  # C.2.4
])  # fmt: skip
def test_examples_of_single_fields(data: str, field: tuple[bytes, bytes], entered: bool) -> None:
    decoder = HpackDecoder()
    assert decoder.decode_bytes(bytes.fromhex(data)) == [field]
    assert decoder.entries == ([field] if entered else [])
    assert decoder.table_size == (len(field[0]) + len(field[1]) + 32 if entered else 0)


@pytest.mark.parametrize("section", BLOCKS)
def test_examples_decoded(section: str) -> None:
    """Fields and dynamic table after each block; C.5 and C.6 evict."""
    requests = section in ("C.3", "C.4")
    decoder = HpackDecoder() if requests else HpackDecoder(256)
    sizes = [57, 110, 164] if requests else [222, 222, 215]
    messages, tables = (REQUESTS, REQUEST_TABLES) if requests else (RESPONSES, RESPONSE_TABLES)
    for data, message, table, size in zip(BLOCKS[section], messages, tables, sizes, strict=True):
        assert decoder.decode_bytes(bytes.fromhex(data)) == message
        assert decoder.entries == table
        assert decoder.table_size == size


@pytest.mark.parametrize("section", ["C.3", "C.4"])
def test_examples_encoded(section: str) -> None:
    encoder = HpackEncoder(huffman=section == "C.4")
    for data, message, table in zip(BLOCKS[section], REQUESTS, REQUEST_TABLES, strict=True):
        assert encoder.encode_bytes(message).hex() == data
        assert encoder.entries == table


def test_examples_of_single_fields_encoded() -> None:
    """C.2.1 and C.2.4; the others are forms that our encoder has no reason to choose for those fields."""
    encoder = HpackEncoder()
    assert encoder.encode_bytes([ENTRY]) == INSERT
    assert encoder.encode_bytes([(b":method", b"GET")]) == b"\x82"


@pytest.mark.parametrize("huffman", [False, True])
def test_example_responses_encoded(huffman: bool) -> None:
    """Our encoder does not index dates and set-cookie, so the bytes differ from C.5 and C.6; what they mean does not."""
    encoder, decoder, other = HpackEncoder(256, huffman), HpackDecoder(256), hpack.Decoder()
    other.header_table_size = 256
    for message in RESPONSES:
        data = encoder.encode_bytes(message)
        assert decoder.decode_bytes(data) == message
        assert [tuple(field) for field in other.decode(data, raw=True)] == message
        assert encoder.entries == decoder.entries == list(other.header_table.dynamic_entries)
    assert encoder.entries == [(b"content-encoding", b"gzip"), (b":status", b"307"), LOCATION, PRIVATE, STATUS]


def test_integer_examples() -> None:
    """C.1.1 and C.1.2 as sizes of the table, whose prefix has the five bits of the examples."""
    decoder = HpackDecoder()
    assert decoder.decode_bytes(bytes.fromhex("2a") + INSERT) == [ENTRY]  # 10: too small for the entry
    assert decoder.entries == []
    decoder.decode_bytes(bytes.fromhex("3f9a0a") + INSERT * 24)
    assert decoder.table_size == 1320  # 24 entries of 55 bytes are in 1337 bytes, 25 are not
    decoder.decode_bytes(INSERT)
    assert decoder.table_size == 1320


# --- what breaks a block --------------------------------------------------------------------------------------------------

TRUNCATED, INTEGER, INDEX = "ends inside a field", "integer above", "index 0 or beyond"
LATE, LARGE, MISSING, HUFFMAN = "behind a field", "above the limit", "the limit was lowered", "Huffman code"


@pytest.mark.parametrize("data, why", [
    ("80", INDEX),  # 6.1: index 0
    ("be", INDEX),  # one behind the static table, nothing in the dynamic one
    ("ff00", INDEX),
    ("7f0000", INDEX),  # name of a literal
    ("0f300161", INDEX),
    ("1f300161", INDEX),
    ("ffffffffff0f", INTEGER),  # 5.1: 127 more than 2^32 - 1
    ("ff8080808010", INTEGER),
    ("ff808080808000", INTEGER),  # a zero too many
    ("ff80808080808080808080808080808000", INTEGER),
    ("ff808080808000", INTEGER),
    ("7fffffffffff7f", INTEGER),
    ("007fffffffffff7f", INTEGER),
    ("3fe1ffffff0f", INTEGER),
    ("ff", TRUNCATED),
    ("ff80", TRUNCATED),
    ("ff80808080", TRUNCATED),
    ("40", TRUNCATED),
    ("4001", TRUNCATED),
    ("400161", TRUNCATED),
    ("40016102", TRUNCATED),
    ("4001610261", TRUNCATED),
    ("0001617f80", TRUNCATED),
    ("000161ffffffff0f", TRUNCATED),  # a string of 4 GiB that is not there
    ("8220", LATE),  # 4.2
    ("82203f", LATE),
    (INSERT.hex() + "20", LATE),
    ("3fe21f", LARGE),  # 6.3: 4097
    ("203fe21f", LARGE),
    ("3fe0ffffff0f", LARGE),
    ("00016181fe", HUFFMAN),  # 5.2: padding not all ones
    ("00016182ffff", HUFFMAN),  # padding longer than 7 bits
    ("00016184ffffffff", HUFFMAN),  # EOS
    ("0081fe0161", HUFFMAN),  # in a name
])  # fmt: skip
def test_broken_block(data: str, why: str) -> None:
    with pytest.raises(HpackError, match=why):
        HpackDecoder().decode_bytes(bytes.fromhex(data))


def test_hpack_error_is_a_value_error() -> None:
    assert issubclass(HpackError, ValueError)


def test_largest_integers_and_leading_zeros() -> None:
    """2^32 - 1 is a number like others, and zeros are allowed as long as six bytes hold them."""
    decoder = HpackDecoder(table_limit=2**32 - 1)
    assert decoder.decode_bytes(bytes.fromhex("3fe0ffffff0f") + INSERT) == [ENTRY]
    small = HpackDecoder()
    small.decode_bytes(bytes.fromhex("3f8080808000") + INSERT)  # 31: no room
    assert small.entries == []


def test_cut_at_every_offset() -> None:
    """A block that ends between fields is a shorter block; anywhere else it is an error."""
    long = b"v" * 300
    pieces = [
        b"\x82",
        INSERT,
        b"\xbe",
        literal(b"name", b"value", 0x00),
        literal(b"name", b"value", 0x10),
        long_literal(b"long", long),
        bytes.fromhex("418cf1e3c2e5f23a6ba0ab90f4ff"),
        bytes.fromhex("0f0d03313030"),  # content-length by an index of two bytes
    ]
    whole = HpackDecoder().decode_bytes(b"".join(pieces))
    assert [value for _, value in whole[-3:]] == [long, b"www.example.com", b"100"]
    boundaries = {sum(map(len, pieces[:count])): count for count in range(len(pieces) + 1)}
    data = b"".join(pieces)
    for end in range(len(data) + 1):
        if end in boundaries:
            assert HpackDecoder().decode_bytes(data[:end]) == whole[: boundaries[end]]
        else:
            with pytest.raises(HpackError, match=TRUNCATED):
                HpackDecoder().decode_bytes(data[:end])


def test_index_beyond_what_is_left_after_eviction() -> None:
    decoder = HpackDecoder(120)
    decoder.decode_bytes(INSERT + literal(b"a", b"1"))
    assert decoder.decode_bytes(b"\xbe\xbf") == [(b"a", b"1"), ENTRY]
    decoder.decode_bytes(literal(b"b", b"2"))  # 34 + 34 + 55 bytes: ENTRY goes
    assert decoder.decode_bytes(b"\xbe\xbf") == [(b"b", b"2"), (b"a", b"1")]
    with pytest.raises(HpackError, match=INDEX):
        decoder.decode_bytes(b"\xc0")


def test_an_error_leaks_nothing() -> None:
    """Fields decoded before the error are given back, names and strings too."""
    decoder = HpackDecoder()
    decoder.decode_bytes(INSERT)
    entry = decoder.entries[0]
    name = entry[0]
    before = sys.getrefcount(entry), sys.getrefcount(name)
    for _ in range(10):
        for end in ("80", "4001", "7e01", "7e81fe", "7e", "1f2f", "1f2f81fe", "20"):
            with pytest.raises(HpackError):
                decoder.decode_bytes(b"\xbe\xbe\xbe" + bytes.fromhex(end))
    assert (sys.getrefcount(entry), sys.getrefcount(name)) == before


# --- representations and the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0x00, 0x10])
def test_literals_without_indexing_do_not_enter(first: int) -> None:
    decoder = HpackDecoder()
    assert decoder.decode_bytes(literal(b"name", b"value", first)) == [(b"name", b"value")]
    by_index = bytes([first | 0x0F, 62 - 15]) + b"\x01x"
    assert decoder.decode_bytes(INSERT + by_index) == [ENTRY, (b"custom-key", b"x")]
    assert decoder.entries == [ENTRY]


def test_indexed_fields_are_the_entries_themselves() -> None:
    decoder = HpackDecoder()
    first = decoder.decode_bytes(INSERT)[0]
    assert decoder.decode_bytes(b"\xbe\x82")[0] is first
    assert decoder.entries[0] is first
    assert decoder.decode_bytes(b"\xbe\x82")[1] is HpackDecoder().decode_bytes(b"\x82")[0]


@pytest.mark.parametrize("huffman", [False, True])
def test_well_known_names_are_one_object(huffman: bool) -> None:
    """However a name was spelt on the wire. What is not well-known is equal, no more."""
    names = sorted({name for name, _ in hpack.table.HeaderTable.STATIC_TABLE} | set(NAMES) | NEVER_INDEXED | SENSITIVE)
    assert len(names) > 60
    for name in names:
        text = bytes(bytearray(name))
        data = huffman_encode(text) if huffman else text
        block = b"\x00" + bytes([len(data) | (0x80 if huffman else 0)]) + data + b"\x00"
        found = HpackDecoder().decode_bytes(block)[0][0]
        assert found == name
        assert found is intern_name(text)
        assert found is not text
    for index in range(1, 62):
        name = HpackDecoder().decode_bytes(bytes([0x80 | index]))[0][0]
        assert name is intern_name(bytes(bytearray(name)))
    text = b"x-something-else"
    assert intern_name(text) == text
    assert intern_name(b"") == b""
    assert intern_name(b":pat") == b":pat"


def test_an_entry_larger_than_the_table_empties_it() -> None:
    """RFC 7541 4.4: no error; the field itself is delivered."""
    decoder = HpackDecoder(100)
    decoder.decode_bytes(INSERT)
    big = (b"name", b"v" * 65)  # 101 bytes
    assert decoder.decode_bytes(literal(*big)) == [big]
    assert decoder.entries == []
    assert decoder.decode_bytes(literal(b"name", b"v" * 64)) == [(b"name", b"v" * 64)]
    assert decoder.table_size == 100


def test_a_name_may_come_from_the_entry_that_its_insertion_evicts() -> None:
    """RFC 7541 4.4, last paragraph."""
    decoder = HpackDecoder(60)
    decoder.decode_bytes(INSERT)
    assert decoder.decode_bytes(bytes.fromhex("7e") + b"\x05other") == [(b"custom-key", b"other")]
    assert decoder.entries == [(b"custom-key", b"other")]


def test_the_ring_grows_and_wraps() -> None:
    """As many entries as the smallest possible size allows, several times over."""
    decoder = HpackDecoder()
    fill = [(b"", b"%d" % (number % 10)) for number in range(1000)]
    for start in range(0, 1000, 100):
        assert decoder.decode_bytes(b"".join(literal(*pair) for pair in fill[start : start + 100])) == fill[start : start + 100]
    assert decoder.entries == fill[: -1 - 4096 // 33 : -1]
    oldest = 61 + 4096 // 33
    assert decoder.decode_bytes(indexed(oldest)) == decoder.entries[-1:]
    with pytest.raises(HpackError, match=INDEX):
        decoder.decode_bytes(indexed(oldest + 1))


# --- size of the table ----------------------------------------------------------------------------------------------------


def test_update_evicts_and_grows_again() -> None:
    decoder = HpackDecoder()
    decoder.decode_bytes(INSERT + literal(b"a", b"1"))
    assert decoder.decode_bytes(update(40) + b"\xbe") == [(b"a", b"1")]
    assert decoder.entries == [(b"a", b"1")]
    decoder.decode_bytes(update(0) + update(4096))
    assert decoder.entries == []
    decoder.decode_bytes(INSERT)
    assert decoder.entries == [ENTRY]


def test_lowered_limit_has_to_be_acknowledged() -> None:
    """RFC 7541 4.2: in the first block after the change."""
    decoder = HpackDecoder()
    decoder.decode_bytes(INSERT)
    assert not decoder.required_update
    decoder.set_table_limit(100)
    assert decoder.required_update
    assert decoder.entries == [ENTRY]  # the encoder decides when
    assert decoder.decode_bytes(update(60) + b"\xbe") == [ENTRY]
    assert not decoder.required_update
    assert decoder.decode_bytes(b"\xbe") == [ENTRY]
    with pytest.raises(HpackError, match=LARGE):
        decoder.decode_bytes(update(101))


@pytest.mark.parametrize("data", [b"", b"\x82", INSERT], ids=["empty", "indexed", "literal"])
def test_missing_acknowledgement(data: bytes) -> None:
    decoder = HpackDecoder()
    decoder.decode_bytes(data)
    decoder.set_table_limit(4095)
    with pytest.raises(HpackError, match=MISSING):
        decoder.decode_bytes(data)


def test_smallest_limit_has_to_be_acknowledged() -> None:
    """Lowered and raised between two blocks: the smallest size comes first, then any up to the limit."""
    for sizes, error in (
        ([0, 4096], None),
        ([100, 4096], None),
        ([200, 100, 4096], None),
        ([4096, 100], None),
        ([101, 4096], MISSING),
        ([4096], MISSING),
        ([100, 4097], LARGE),
    ):
        decoder = HpackDecoder()
        decoder.decode_bytes(INSERT)
        decoder.set_table_limit(100)
        decoder.set_table_limit(4096)
        data = b"".join(map(update, sizes)) + b"\x82"
        if error is None:
            assert decoder.decode_bytes(data) == [(b":method", b"GET")]
        else:
            with pytest.raises(HpackError, match=error):
                decoder.decode_bytes(data)


def test_no_acknowledgement_where_the_size_fits() -> None:
    """The encoder chose less than the new limit long ago; and a raised limit asks for nothing."""
    decoder = HpackDecoder()
    decoder.decode_bytes(update(100) + INSERT)
    decoder.set_table_limit(100)
    assert not decoder.required_update
    assert decoder.decode_bytes(b"\xbe") == [ENTRY]
    decoder.set_table_limit(8192)
    assert not decoder.required_update
    assert decoder.decode_bytes(b"\xbe") == [ENTRY]
    decoder.decode_bytes(update(8192))
    decoder.set_table_limit(8191)
    assert decoder.required_update


# --- limits of one block --------------------------------------------------------------------------------------------------


def test_fields_over_the_list_limit_are_dropped_and_the_table_kept() -> None:
    decoder = HpackDecoder(max_list=100)
    data = b"\x82" + INSERT + literal(b"a", b"1", 0) + literal(b"b", b"2") + b"\x82"
    assert decoder.decode_bytes(b"\x82" + INSERT) == [(b":method", b"GET"), ENTRY]  # 42 + 55
    assert decoder.overflow == 0
    assert decoder.decode_bytes(data) == [(b":method", b"GET"), ENTRY]
    assert decoder.overflow == 1
    assert decoder.entries == [(b"b", b"2"), ENTRY, ENTRY]
    assert decoder.decode_bytes(b"\xbe\xbf") == [(b"b", b"2"), ENTRY]
    assert decoder.overflow == 0


def test_nothing_follows_a_dropped_field() -> None:
    """A request without the field in the middle would be another request."""
    decoder = HpackDecoder(max_list=80)
    assert decoder.decode_bytes(literal(b"a", b"1" * 50, 0) + b"\x82") == []
    assert decoder.overflow == 1


def test_number_of_fields() -> None:
    decoder = HpackDecoder(max_fields=3)
    assert len(decoder.decode_bytes(b"\x82" * 3)) == 3
    assert decoder.overflow == 0
    assert len(decoder.decode_bytes(b"\x82" * 3 + INSERT)) == 3
    assert decoder.overflow == 1
    assert decoder.entries == [ENTRY]
    assert HpackDecoder(max_fields=0).decode_bytes(b"\x82") == []
    assert len(HpackDecoder().decode_bytes(b"\x82" * 1000)) == 100


def test_four_times_the_limit() -> None:
    decoder = HpackDecoder(max_list=42)  # one :method GET
    for count, overflow in ((1, 0), (2, 1), (4, 1), (5, 2), (100, 2)):
        assert len(decoder.decode_bytes(b"\x82" * count)) == 1
        assert decoder.overflow == overflow
    decoder.decode_bytes(b"\x82" * 5 + INSERT)
    assert decoder.overflow == 2
    assert decoder.entries == [ENTRY]


def test_dropped_literals_are_still_checked() -> None:
    with pytest.raises(HpackError, match=HUFFMAN):
        HpackDecoder(max_list=0).decode_bytes(b"\x82" + bytes.fromhex("00016182ffff"))


def test_bomb() -> None:
    """4096 bytes for each byte of the block: the fields are one object, and most of them are not even listed."""
    decoder = HpackDecoder()
    value = b"v" * 4000
    decoder.decode_bytes(long_literal(b"a", value))
    block = b"\xbe" * 1_000_000
    tracemalloc.start()
    try:
        found = decoder.decode_bytes(block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 65536 // (4001 + 32)
    assert {id(pair) for pair in found} == {id(decoder.entries[0])}
    assert decoder.overflow == 2
    assert peak < 4096
    assert decoder.decode_bytes(b"\xbe") == [(b"a", value)]


def test_long_strings() -> None:
    """Beyond the buffer on the stack, in both codes; an entry that does not fit costs the table its content, not more."""
    decoder = HpackDecoder(max_list=1 << 20)
    encoder = HpackEncoder()
    for huffman in (False, True):
        encoder.huffman = huffman
        for size in (126, 127, 128, 254, 255, 630, 640, 1023, 1024, 1025, 5000, 100_000):
            message = [(b"n" * size, b"0" * size), (b"name", bytes(range(256)) * (size // 256 + 1))]
            assert decoder.decode_bytes(encoder.encode_bytes(message)) == message


# --- blocks that come again -----------------------------------------------------------------------------------------------


def test_the_same_block_is_the_same_list() -> None:
    decoder = HpackDecoder()
    decoder.decode_bytes(INSERT)
    first = decoder.decode_bytes(b"\x82\xbe")
    assert decoder.decode_bytes(b"\x82\xbe") is first
    assert decoder.decode_bytes(bytearray(b"\x82\xbe")) is first
    assert decoder.decode_bytes(memoryview(b"\x82\xbe")) is first
    other = decoder.decode_bytes(b"\xbe\x82")
    assert other == first[::-1]
    assert decoder.decode_bytes(b"\x82\xbe") is not first  # one block is remembered
    assert decoder.decode_bytes(b"\x82") == first[:1]  # the beginning of a block is another block


def test_a_remembered_block_is_forgotten_when_the_table_changes() -> None:
    decoder = HpackDecoder()
    decoder.decode_bytes(INSERT)
    assert decoder.decode_bytes(b"\xbe") == [ENTRY]
    decoder.decode_bytes(literal(b"a", b"1"))
    assert decoder.decode_bytes(b"\xbe") == [(b"a", b"1")]
    decoder.decode_bytes(update(0))
    with pytest.raises(HpackError, match=INDEX):
        decoder.decode_bytes(b"\xbe")


def test_a_remembered_block_does_not_hide_a_missing_update() -> None:
    decoder = HpackDecoder()
    assert decoder.decode_bytes(b"\x82") is decoder.decode_bytes(b"\x82")
    decoder.set_table_limit(0)
    with pytest.raises(HpackError, match=MISSING):
        decoder.decode_bytes(b"\x82")


def test_blocks_that_change_the_table_are_decoded_each_time() -> None:
    decoder = HpackDecoder()
    for count in (1, 2, 3):
        assert decoder.decode_bytes(INSERT) == [ENTRY]
        assert decoder.entries == [ENTRY] * count
    for data in (update(4096) + b"\x82", update(4096)):
        assert decoder.decode_bytes(data) is not decoder.decode_bytes(data)
    # too large for the table: the first time it empties it, the second time nothing changes any more
    big = update(50) + literal(b"name", b"v" * 100)
    assert decoder.decode_bytes(big) == decoder.decode_bytes(big) == [(b"name", b"v" * 100)]
    assert decoder.entries == []


def test_cut_and_long_blocks_are_not_remembered() -> None:
    decoder = HpackDecoder(max_fields=1000, max_list=1 << 20)
    assert decoder.decode_bytes(b"\x82" * 512) is decoder.decode_bytes(b"\x82" * 512)
    assert decoder.decode_bytes(b"\x82" * 513) is not decoder.decode_bytes(b"\x82" * 513)
    small = HpackDecoder(max_fields=1)
    assert small.decode_bytes(b"\x82\x82") is not small.decode_bytes(b"\x82\x82")
    assert small.overflow == 1
    small.decode_bytes(b"\x82")
    first = small.decode_bytes(b"\x82")
    small.decode_bytes(b"\x82\x82")
    assert small.overflow == 1
    assert small.decode_bytes(b"\x82") is first
    assert small.overflow == 0


# --- encoder --------------------------------------------------------------------------------------------------------------


def test_values_that_do_not_come_again_are_not_indexed() -> None:
    encoder = HpackEncoder()
    for name in sorted(NEVER_INDEXED):
        data = encoder.encode_bytes([(name, b"some value")])
        assert data[0] & 0xF0 == 0x00
        assert hpack.Decoder().decode(data, raw=True) == [(name, b"some value")]
    assert encoder.entries == []


def test_secrets_are_never_indexed() -> None:
    encoder = HpackEncoder()
    for name in sorted(SENSITIVE | {b"cookie"}):
        data = encoder.encode_bytes([(name, b"short secret")])
        assert data[0] & 0xF0 == 0x10
        found = hpack.Decoder().decode(data, raw=True)
        assert found == [(name, b"short secret")]
        assert isinstance(found[0], hpack.NeverIndexedHeaderTuple)
    assert encoder.encode_bytes([(b"cookie", b"c" * 19)])[0] & 0xF0 == 0x10
    assert encoder.entries == []
    assert encoder.encode_bytes([(b"cookie", b"c" * 20)])[0] & 0xC0 == 0x40
    assert encoder.encode_bytes([(b"cookie", b"c" * 20)]) == b"\xbe"


def test_large_values_are_not_indexed() -> None:
    encoder = HpackEncoder(256)
    assert encoder.encode_bytes([(b"a", b"v" * 129)])[0] == 0x00
    assert encoder.entries == []
    encoder.encode_bytes([(b"a", b"v" * 128)])
    assert encoder.entries == [(b"a", b"v" * 128)]
    assert encoder.encode_bytes([(b"n" * 200, b"v" * 25)])[0] == 0x00  # 257 bytes
    assert encoder.encode_bytes([(b"n" * 200, b"v" * 24)])[0] == 0x40


def test_equal_pairs_need_not_be_one_object() -> None:
    encoder = HpackEncoder()
    encoder.encode_bytes([ENTRY])
    assert encoder.encode_bytes([(bytes(bytearray(ENTRY[0])), bytes(bytearray(ENTRY[1])))]) == b"\xbe"
    assert encoder.encode_bytes([(bytes(bytearray(b":method")), bytes(bytearray(b"POST")))]) == b"\x83"


def test_an_object_that_left_the_table_is_sent_again() -> None:
    encoder, decoder = HpackEncoder(60), HpackDecoder(60)
    for pair in (ENTRY, ENTRY, (b"a", b"1"), ENTRY, ENTRY):
        assert decoder.decode_bytes(encoder.encode_bytes([pair])) == [pair]
        assert encoder.entries == decoder.entries == [pair]


def test_names_refer_to_the_newest_entry() -> None:
    encoder, decoder = HpackEncoder(), HpackDecoder()
    for value, head in ((b"1", b"\x40\x0bcustom-name"), (b"2", b"\x7e"), (b"3", b"\x7e")):
        data = encoder.encode_bytes([(b"custom-name", value)])
        assert data == head + b"\x01" + value
        assert decoder.decode_bytes(data) == [(b"custom-name", value)]
    encoder.encode_bytes([ENTRY])
    assert encoder.encode_bytes([(b"custom-name", b"4")]) == b"\x7f\x00\x014"


@pytest.mark.parametrize(
    "limit, expected", [(4096, b""), (65536, b""), (100, b"\x3f\x45"), (0, b"\x20"), (4095, b"\x3f\xe0\x1f")]
)
def test_encoder_follows_the_peers_limit_down(limit: int, expected: bytes) -> None:
    encoder = HpackEncoder()
    encoder.encode_bytes([ENTRY])
    encoder.set_table_limit(limit)
    assert encoder.encode_bytes([]) == expected
    assert encoder.encode_bytes([]) == b""
    assert encoder.entries == ([ENTRY] if limit else [])
    assert encoder.table_limit == min(limit, 4096)


def test_encoder_says_smallest_and_final_limit() -> None:
    encoder, decoder = HpackEncoder(), HpackDecoder()
    decoder.decode_bytes(encoder.encode_bytes([ENTRY]))
    for limit in (200, 0, 50, 1000):
        encoder.set_table_limit(limit)
    assert encoder.encode_bytes([]) == update(0) + update(1000)
    assert encoder.entries == []
    encoder.set_table_limit(100)
    encoder.set_table_limit(1000)
    assert encoder.encode_bytes([]) == update(100) + update(1000)
    encoder.set_table_limit(2000)
    encoder.set_table_limit(1000)
    assert encoder.encode_bytes([]) == b""
    encoder.set_table_limit(2000)
    assert encoder.encode_bytes([]) == update(2000)


def test_encoder_without_a_table() -> None:
    encoder = HpackEncoder(0)
    for _ in range(2):
        assert encoder.encode_bytes([ENTRY, (b":method", b"GET")]) == b"\x00" + INSERT[1:] + b"\x82"


@pytest.mark.parametrize("bad", [
    (b"name", "text"), ("name", b"text"), (b"name",), (b"name", b"value", b"more"), (b"name", bytearray(b"value")),
    [b"name", b"value"], b"name", None,
])  # fmt: skip
def test_a_header_of_another_type_changes_nothing(bad: object) -> None:
    encoder = HpackEncoder()
    encoder.set_table_limit(100)
    with pytest.raises(TypeError, match="tuple"):
        encoder.encode_bytes([ENTRY, bad])  # type: ignore[list-item]
    assert encoder.entries == []
    assert encoder.encode_bytes([ENTRY]) == update(100) + INSERT
    assert encoder.encode_bytes([ENTRY]) == b"\xbe"


def test_subclasses_of_tuple_are_taken() -> None:
    encoder = HpackEncoder()
    named = namedtuple("named", "name value")
    assert encoder.encode_bytes([hpack.HeaderTuple(*ENTRY)]) == INSERT
    assert encoder.encode_bytes([named(*ENTRY)]) == b"\xbe"
    assert type(encoder.entries[0]) is tuple


def test_the_encoder_holds_what_is_in_its_table_and_no_more() -> None:
    encoder = HpackEncoder(60)
    pair, other = (b"name", bytes(bytearray(b"a value"))), (b"name", bytes(bytearray(b"another value")))
    before = sys.getrefcount(pair), sys.getrefcount(other)
    encoder.encode_bytes([pair])
    assert sys.getrefcount(pair) == before[0] + 1
    encoder.encode_bytes([other])
    assert (sys.getrefcount(pair), sys.getrefcount(other)) == (before[0], before[1] + 1)
    del encoder
    assert (sys.getrefcount(pair), sys.getrefcount(other)) == before


def test_huffman_only_where_shorter() -> None:
    encoder = HpackEncoder(huffman=True)
    assert encoder.encode_bytes([(b"a", b"&")])[-2:] == b"\x01&"  # eight bits in either code
    assert encoder.encode_bytes([(b"a", b"\x00\x01\x02")])[-4:] == b"\x03\x00\x01\x02"
    assert encoder.encode_bytes([(b"a", b"000000")])[-5:-4] == b"\x84"
    encoder.huffman = False
    assert encoder.encode_bytes([(b"b", b"000000")])[-7:] == b"\x06000000"
