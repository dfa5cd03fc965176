"""The Huffman code of RFC 7541 both ways, with the hpack package as the oracle."""

from __future__ import annotations

import random

import pytest
from hpack.exceptions import HPACKDecodingError
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.huffman_table import decode_huffman

from dynwire._hpack import HpackError, huffman_decode, huffman_encode

ORACLE = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
PRINTABLE = bytes(range(0x20, 0x7F))


def bits_of(data: bytes) -> str:
    """Code of the symbols without padding."""
    return "".join(format(REQUEST_CODES[byte], f"0{REQUEST_CODES_LENGTH[byte]}b") for byte in data)


def pack(bits: str) -> bytes:
    assert len(bits) % 8 == 0
    return int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""


def both_ways(text: bytes) -> None:
    coded = huffman_encode(text)
    assert coded == ORACLE.encode(text)
    assert huffman_decode(coded) == text


def test_every_byte_and_every_pair_of_bytes() -> None:
    assert huffman_encode(b"") == huffman_decode(b"") == b""
    for first in range(256):
        both_ways(bytes([first]))
        both_ways(b"www" + bytes([first]) + b"\xff")
        both_ways(bytes(byte for second in range(256) for byte in (first, second)))


@pytest.mark.parametrize("seed", range(5))
def test_random_strings(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        size = rng.choice((1, 2, 3, 8, 40, 620, 640, 1000))
        both_ways(rng.randbytes(size))
        both_ways(bytes(rng.choices(PRINTABLE, k=size)))


@pytest.mark.parametrize("seed", range(5))
def test_random_code_is_judged_as_hpack_does(seed: int) -> None:
    """Random bytes are seldom long without an EOS, and often end with wrong padding; beginnings of good code too."""
    rng = random.Random(seed)
    outcomes = set()
    for _ in range(4000):
        data = rng.randbytes(rng.randrange(1, 8))
        if rng.random() < 0.5:
            data = huffman_encode(bytes(rng.choices(PRINTABLE, k=12)))[: rng.randrange(1, 12)]
        if rng.random() < 0.3:
            data += b"\xff" * rng.randrange(1, 6)
        try:
            expected = decode_huffman(data)
        except HPACKDecodingError:
            expected = None
        if expected is None:
            with pytest.raises(HpackError):
                huffman_decode(data)
        else:
            assert huffman_decode(data) == expected
        outcomes.add(expected is None)
    assert outcomes == {True, False}


def test_padding() -> None:
    """Up to seven ones, and nothing else (RFC 7541 5.2); every symbol ends somewhere else in a byte."""
    for text in (bytes([byte]) for byte in range(256)):
        bits = bits_of(text)
        need = -len(bits) % 8
        assert huffman_decode(pack(bits + "1" * need)) == text
        with pytest.raises(HpackError):
            huffman_decode(pack(bits + "1" * (need + 8)))
        for zero in range(need):
            padding = "1" * zero + "0" + "1" * (need - zero - 1)
            data = pack(bits + padding)
            if padding in SYMBOLS_WITH_PADDING:
                assert huffman_decode(data) == text + SYMBOLS_WITH_PADDING[padding]
            else:
                with pytest.raises(HpackError):
                    huffman_decode(data)


SYMBOLS_WITH_PADDING = {
    (code + "1" * 7)[:size]: bytes([byte])
    for byte in range(256)
    for size in range(5, 8)
    if len(code := bits_of(bytes([byte]))) <= size
}
"""what looks like wrong padding and is one more symbol: the shortest have five bits"""


def test_eos_inside() -> None:
    eos = "1" * 30
    for text in (b"", b"a", b"www", b"\x00"):
        bits = bits_of(text) + eos
        for tail in ("", bits_of(b"a"), bits_of(b"abc")):
            whole = bits + tail
            with pytest.raises(HpackError, match="EOS"):
                huffman_decode(pack(whole + "1" * (-len(whole) % 8)))


def test_only_bytes() -> None:
    for wrong in ("text", None, bytearray(b"x")):
        with pytest.raises(TypeError):
            huffman_encode(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            huffman_decode(wrong)  # type: ignore[arg-type]
