"""HTTP/2 frames and HPACK fields as plain bytes, right or deliberately wrong. Knows nothing of the code under test.

Builders write what they are told: a wrong length, stream or padding is the caller's intention (RFC 9113 section 4.1 and 6).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
TYPE_NAMES = (
    "DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE", "CONTINUATION",
)  # fmt: skip

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = range(1, 7)
NO_RFC7540_PRIORITIES = 9

(
    NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR,
    REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM, INADEQUATE_SECURITY, HTTP_1_1_REQUIRED,
) = range(14)  # fmt: skip
ERROR_NAMES = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
    "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
)  # fmt: skip

MAX_WINDOW = 0x7FFFFFFF
HEADER_BYTES = 9


def error_name(code: int) -> str:
    return ERROR_NAMES[code] if code < len(ERROR_NAMES) else f"0x{code:x}"


@dataclass(frozen=True)
class Frame:
    type: int
    flags: int
    stream: int
    payload: bytes

    def encode(self) -> bytes:
        return frame(self.type, self.flags, self.stream, self.payload)

    @property
    def ack(self) -> bool:
        return self.type in (SETTINGS, PING) and bool(self.flags & ACK)

    @property
    def end_stream(self) -> bool:
        return self.type in (DATA, HEADERS) and bool(self.flags & END_STREAM)

    @property
    def code(self) -> int:
        """error code of RST_STREAM or GOAWAY"""
        return int(struct.unpack_from(">I", self.payload, 4 if self.type == GOAWAY else 0)[0])

    @property
    def last_stream(self) -> int:
        """of GOAWAY"""
        return int(struct.unpack_from(">I", self.payload)[0]) & MAX_WINDOW

    @property
    def increment(self) -> int:
        """of WINDOW_UPDATE"""
        return int(struct.unpack(">I", self.payload)[0]) & MAX_WINDOW

    @property
    def settings(self) -> list[tuple[int, int]]:
        return [struct.unpack_from(">HI", self.payload, at) for at in range(0, len(self.payload), 6)]

    @property
    def body(self) -> bytes:
        """payload of DATA, HEADERS or CONTINUATION without padding and priority"""
        at, end = 0, len(self.payload)
        if self.type in (DATA, HEADERS) and self.flags & PADDED:
            at, end = 1, end - self.payload[0]
        if self.type == HEADERS and self.flags & PRIORITY_FLAG:
            at += 5
        return self.payload[at:end]

    def __str__(self) -> str:
        name = TYPE_NAMES[self.type] if self.type < len(TYPE_NAMES) else f"type {self.type}"
        if self.type in (RST_STREAM, GOAWAY) and len(self.payload) >= (8 if self.type == GOAWAY else 4):
            debug = f" {self.payload[8:]!r}" if self.type == GOAWAY and len(self.payload) > 8 else ""
            return f"{name}({self.stream}, {error_name(self.code)}{debug})"
        if self.ack:
            return f"{name}(ACK)"
        return f"{name}({self.stream}, {len(self.payload)} bytes, flags 0x{self.flags:x})"


class FrameReader:
    """Splits a stream of bytes into frames."""

    def __init__(self) -> None:
        self.pending = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        self.pending += data
        while len(self.pending) >= HEADER_BYTES:
            high, low, type_, flags, stream = struct.unpack_from(">BHBBI", self.pending)
            end = HEADER_BYTES + (high << 16 | low)
            if len(self.pending) < end:
                return
            payload, self.pending = self.pending[HEADER_BYTES:end], self.pending[end:]
            yield Frame(type_, flags, stream & MAX_WINDOW, payload)


# --- frames ---------------------------------------------------------------------------------------------------------------


def frame(type_: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """``length`` other than that of the payload makes a frame that lies."""
    size = len(payload) if length is None else length
    return struct.pack(">BHBBI", size >> 16, size & 0xFFFF, type_, flags, stream) + payload


def _padded(payload: bytes, pad: int | None) -> bytes:
    return payload if pad is None else bytes([pad]) + payload + bytes(pad)


def data(stream: int, payload: bytes = b"", *, end: bool = False, pad: int | None = None) -> bytes:
    flags = (END_STREAM if end else 0) | (0 if pad is None else PADDED)
    return frame(DATA, flags, stream, _padded(payload, pad))


def priority_fields(depends_on: int, weight: int = 16, exclusive: bool = False) -> bytes:
    return struct.pack(">IB", depends_on | (0x80000000 if exclusive else 0), weight - 1)


def headers(
    stream: int,
    block: bytes,
    *,
    end: bool = False,
    end_headers: bool = True,
    pad: int | None = None,
    priority: bytes = b"",
) -> bytes:
    flags = (END_STREAM if end else 0) | (END_HEADERS if end_headers else 0)
    flags |= (0 if pad is None else PADDED) | (PRIORITY_FLAG if priority else 0)
    return frame(HEADERS, flags, stream, _padded(priority + block, pad))


def continuation(stream: int, block: bytes, *, end_headers: bool = True) -> bytes:
    return frame(CONTINUATION, END_HEADERS if end_headers else 0, stream, block)


def priority(stream: int, depends_on: int = 0, weight: int = 16, exclusive: bool = False) -> bytes:
    return frame(PRIORITY, 0, stream, priority_fields(depends_on, weight, exclusive))


def rst_stream(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", key, value) for key, value in pairs))


SETTINGS_ACK = frame(SETTINGS, ACK)


def push_promise(stream: int, promised: int, block: bytes, *, end_headers: bool = True) -> bytes:
    return frame(PUSH_PROMISE, END_HEADERS if end_headers else 0, stream, struct.pack(">I", promised) + block)


def ping(payload: bytes = bytes(8), *, ack: bool = False) -> bytes:
    return frame(PING, ACK if ack else 0, 0, payload)


def goaway(last_stream: int = 0, code: int = NO_ERROR, debug: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last_stream, code) + debug)


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


# --- HPACK ----------------------------------------------------------------------------------------------------------------

Field = tuple[bytes, bytes]

WITHOUT_INDEXING, INDEXING, NEVER_INDEXED = 0x00, 0x40, 0x10
"""first byte of a literal with a new name (RFC 7541 section 6.2)"""


def integer(value: int, prefix_bits: int, first: int = 0) -> bytes:
    """RFC 7541 section 5.1"""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes([first | value])
    out = bytearray([first | limit])
    value -= limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def string(text: bytes, *, huffman: bool = False) -> bytes:
    """RFC 7541 section 5.2. With ``huffman`` the text is coded already."""
    return integer(len(text), 7, 0x80 if huffman else 0) + text


_huffman = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)


def huffman(text: bytes) -> bytes:
    """RFC 7541 appendix B"""
    return bytes(_huffman.encode(text))


def huffman_literal(name: bytes, value: bytes, kind: int = WITHOUT_INDEXING) -> bytes:
    return bytes([kind]) + string(huffman(name), huffman=True) + string(huffman(value), huffman=True)


def indexed_name(index: int, value: bytes, kind: int = WITHOUT_INDEXING) -> bytes:
    return integer(index, 6 if kind == INDEXING else 4, kind) + string(value)


def literal(name: bytes, value: bytes, kind: int = WITHOUT_INDEXING) -> bytes:
    return bytes([kind]) + string(name) + string(value)


def indexed(index: int) -> bytes:
    return integer(index, 7, 0x80)


def table_size_update(size: int) -> bytes:
    return integer(size, 5, 0x20)


def block(fields: Iterable[Field], kind: int = WITHOUT_INDEXING) -> bytes:
    """Header block of literals: by default it neither reads nor changes the dynamic table."""
    return b"".join(literal(name, value, kind) for name, value in fields)
