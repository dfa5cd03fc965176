"""How long do HPACK blocks take, and how much longer in the hpack package? Compare within one group of one run.

``decode`` alternates between two blocks, because a block that comes again at once is answered from memory (``repeated``).
"""

import itertools

import hpack
import pytest

from dynwire._hpack import HpackDecoder, HpackEncoder, huffman_decode, huffman_encode

REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/v1/rpc/bench.worker.echo"),
    (b":authority", b"127.0.0.1:8888"),
    (b"content-type", b"application/msgpack"),
    (b"accept", b"application/msgpack"),
    (b"user-agent", b"dynwire/0.1"),
    (b"accept-encoding", b"identity"),
]
FRESH = 20_000
"""messages with new values before the same ones come again; more than the tables hold"""


def with_fresh_values():
    """Six fields that are in the tables and two values that are not."""
    return [
        [
            *REQUEST[:6],
            (b"x-request-id", b"%08x-e89b-12d3-a456-426614174000" % (number * 2654435761 % 2**32)),
            (b"traceparent", b"00-%032x-00f067aa0ba902b7-01" % (number * 2654435761)),
        ]
        for number in range(FRESH)
    ]


def copies(messages):
    """Equal fields that are other objects each time, as if they had just been made."""
    return [[(bytes(bytearray(name)), bytes(bytearray(value))) for name, value in message] for message in messages]


class Theirs:
    """The hpack package under our names."""

    def __init__(self):
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()

    def encode_bytes(self, message):
        return self.encoder.encode(message, huffman=False)

    def decode_bytes(self, block):
        return self.decoder.decode(block, raw=True)


CODECS = {"dynwire": (HpackEncoder, HpackDecoder), "hpack": (Theirs, Theirs)}


@pytest.fixture(params=CODECS)
def codec(request):
    encoder, decoder = CODECS[request.param]
    return encoder(), decoder()


@pytest.mark.benchmark(group="encode 8 indexed, constant")
def test_encode_indexed(benchmark, codec):
    encoder, _ = codec
    encoder.encode_bytes(REQUEST)
    benchmark(encoder.encode_bytes, REQUEST)


@pytest.mark.benchmark(group="encode 8 indexed, made anew")
def test_encode_equal(benchmark, codec):
    encoder, _ = codec
    messages = itertools.cycle(copies([REQUEST] * 50))
    encoder.encode_bytes(REQUEST)
    benchmark(lambda: encoder.encode_bytes(next(messages)))


@pytest.mark.benchmark(group="encode 6 indexed + 2 fresh")
def test_encode_fresh(benchmark, codec):
    encoder, _ = codec
    messages = itertools.cycle(with_fresh_values())
    benchmark(lambda: encoder.encode_bytes(next(messages)))


@pytest.mark.benchmark(group="decode 8 indexed, 2 blocks in turn")
def test_decode_indexed(benchmark, codec):
    encoder, decoder = codec
    decoder.decode_bytes(encoder.encode_bytes(REQUEST))
    blocks = itertools.cycle([encoder.encode_bytes(REQUEST), encoder.encode_bytes(REQUEST[::-1])])
    benchmark(lambda: decoder.decode_bytes(next(blocks)))


@pytest.mark.benchmark(group="decode 8 indexed, repeated")
def test_decode_repeated(benchmark, codec):
    encoder, decoder = codec
    decoder.decode_bytes(encoder.encode_bytes(REQUEST))
    block = encoder.encode_bytes(REQUEST)
    benchmark(decoder.decode_bytes, block)


@pytest.mark.parametrize("huffman", [True, False], ids=["huffman", "plain"])
def test_decode_fresh(benchmark, codec, huffman):
    """Neither value is indexed, so that the same blocks may come again."""
    benchmark.group = f"decode 6 indexed + 2 fresh, {'Huffman' if huffman else 'plain'}"
    encoder = HpackEncoder(huffman=huffman)
    _, decoder = codec
    decoder.decode_bytes(encoder.encode_bytes(REQUEST[:6]))
    blocks = itertools.cycle([encoder.encode_bytes(message) for message in with_fresh_values()])
    benchmark(lambda: decoder.decode_bytes(next(blocks)))


@pytest.mark.parametrize("size", [16, 1024])
def test_huffman(benchmark, size):
    text = (b"/v1/chat/completions?model=demo&n=" * 40)[:size]
    assert benchmark(lambda: huffman_decode(huffman_encode(text))) == text
