"""Long dialogues between our encoder or decoder and those of the hpack package: same fields, same tables, same errors."""

from __future__ import annotations

import random

import hpack
import pytest
from hpack.exceptions import HPACKError

from dynwire._hpack import NEVER_INDEXED, SENSITIVE, HpackDecoder, HpackEncoder, HpackError

STATIC = hpack.table.HeaderTable.STATIC_TABLE
BLOCKS = 300
NO_LIMIT = {"max_list": 1 << 40, "max_fields": 1 << 20}

Fields = list[tuple[bytes, bytes]]


class Messages:
    """Header lists as requests have them: some fields always, some often, some never seen before."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pool: Fields = [
            *STATIC,
            *((b"x-%d" % number, b"value %d" % (number % 7)) for number in range(40)),
            *((b":path", b"/v1/rpc/worker.%d" % number) for number in range(10)),
            (b"", b""),
            (b"empty", b""),
            (b"\xff\x00", b"\x80 \r\n"),
        ]
        self.names = [*sorted(NEVER_INDEXED), *sorted(SENSITIVE), b"cookie", b":authority", b":status", b"content-type", b"x-new"]

    def one(self) -> tuple[bytes, bytes]:
        rng = self.rng
        chance = rng.random()
        if chance < 0.7:
            name, value = rng.choice(self.pool)
            return (name, value) if rng.random() < 0.5 else (bytes(bytearray(name)), bytes(bytearray(value)))
        name = rng.choice(self.names) if chance < 0.9 else rng.randbytes(rng.randrange(0, 12))
        size = rng.choice((0, 1, 5, 19, 20, 40, 126, 127, 128, 700, 2048, 2049, 5000)) if chance > 0.85 else rng.randrange(30)
        return name, rng.randbytes(size) if rng.random() < 0.3 else bytes(rng.choices(b"abcdefgh 0123456789-/", k=size))

    def message(self) -> Fields:
        return [self.one() for _ in range(self.rng.randrange(12))]


@pytest.mark.parametrize("huffman", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_our_encoder_their_decoder(seed: int, huffman: bool) -> None:
    rng = random.Random(seed)
    messages = Messages(rng)
    encoder, ours, theirs = HpackEncoder(huffman=huffman), HpackDecoder(**NO_LIMIT), hpack.Decoder(1 << 40)
    most = 0
    for _ in range(BLOCKS):
        if rng.random() < 0.05:
            for limit in rng.choices((0, 60, 200, 1000, 4096, 10_000), k=rng.randrange(1, 4)):
                # what the peer announces holds on its side once we have acknowledged, that is before our next block
                encoder.set_table_limit(limit)
                ours.set_table_limit(limit)
                theirs.max_allowed_table_size = limit
        message = messages.message()
        data = encoder.encode_bytes(message)
        assert ours.decode_bytes(data) == message
        assert [tuple(field) for field in theirs.decode(data, raw=True)] == message
        entries = encoder.entries
        assert entries == ours.entries
        # theirs keeps the limit that we do not follow upwards, but the entries are the same
        assert entries == list(theirs.header_table.dynamic_entries)
        assert not {name for name, _ in entries} & (NEVER_INDEXED | SENSITIVE)
        most = max(most, len(entries))
    assert most > 20


@pytest.mark.parametrize("seed", range(8))
def test_their_encoder_our_decoder(seed: int) -> None:
    rng = random.Random(seed)
    messages = Messages(rng)
    encoder, decoder = hpack.Encoder(), HpackDecoder(**NO_LIMIT)
    for _ in range(BLOCKS):
        if rng.random() < 0.05:
            # hpack sends every change, forgets them all when the last is none, and would exceed a limit that was lowered twice
            limits = sorted(rng.sample((0, 60, 200, 1000, 4096, 10_000), k=rng.randrange(1, 4)))
            for limit in limits if limits[0] != encoder.header_table_size else limits[1:]:
                encoder.header_table_size = limit
                decoder.set_table_limit(limit)
        message = messages.message()
        marked = [hpack.NeverIndexedHeaderTuple(*pair) if rng.random() < 0.1 else hpack.HeaderTuple(*pair) for pair in message]
        data = encoder.encode(marked, huffman=rng.random() < 0.7)
        assert decoder.decode_bytes(data) == message
        assert decoder.entries == list(encoder.header_table.dynamic_entries)
        assert decoder.table_size == encoder.header_table._current_size


@pytest.mark.parametrize("seed", range(4))
def test_limits_keep_the_table(seed: int) -> None:
    """A decoder that drops most of what it gets has the same table as one that keeps everything, and the same first fields."""
    rng = random.Random(seed)
    messages = Messages(rng)
    encoder = hpack.Encoder()
    strict, lenient = HpackDecoder(max_list=300, max_fields=5), HpackDecoder(**NO_LIMIT)
    seen = set()
    for _ in range(BLOCKS):
        message = messages.message()
        data = encoder.encode(message, huffman=True)
        whole = lenient.decode_bytes(data)
        found = strict.decode_bytes(data)
        size, kept = 0, []
        for pair in whole:
            size += len(pair[0]) + len(pair[1]) + 32
            if size > 300 or len(kept) == 5:
                break
            kept.append(pair)
        total = sum(len(name) + len(value) + 32 for name, value in whole)
        assert found == kept
        assert strict.overflow == (2 if total > 1200 and found != whole else 0 if found == whole else 1)
        assert strict.entries == lenient.entries
        seen.add(strict.overflow)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("seed", range(6))
def test_any_bytes_are_judged_as_hpack_does(seed: int) -> None:
    """Good blocks with bytes changed, cut out, doubled; and random ones. After an error both begin anew."""
    rng = random.Random(seed)
    messages = Messages(rng)
    encoder, ours, theirs = hpack.Encoder(), HpackDecoder(**NO_LIMIT), hpack.Decoder(1 << 40)
    good = bad = 0
    for _ in range(600):
        data = bytearray(encoder.encode(messages.message(), huffman=rng.random() < 0.5))
        if rng.random() < 0.2:
            data = bytearray(rng.randbytes(rng.randrange(20)))
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            if data:
                at = rng.randrange(len(data))
                kind = rng.randrange(4)
                if kind == 0:
                    data[at] = rng.choice((0x00, 0x10, 0x20, 0x3F, 0x40, 0x7F, 0x80, 0xBE, 0xFF, rng.randrange(256)))
                elif kind == 1:
                    del data[at : at + rng.randrange(1, 4)]
                elif kind == 2:
                    data[at:at] = data[at : at + rng.randrange(1, 9)]
                else:
                    data[at] ^= 1 << rng.randrange(8)
        block = bytes(data)
        try:
            expected = [tuple(field) for field in theirs.decode(block, raw=True)]
        except HPACKError:
            with pytest.raises(HpackError):
                ours.decode_bytes(block)
            encoder, ours, theirs = hpack.Encoder(), HpackDecoder(**NO_LIMIT), hpack.Decoder(1 << 40)
            bad += 1
        else:
            assert ours.decode_bytes(block) == expected, block.hex()
            assert ours.entries == list(theirs.header_table.dynamic_entries)
            good += 1
    assert good > 100
    assert bad > 100
