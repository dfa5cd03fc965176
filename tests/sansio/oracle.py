"""An independent codec in plain Python: what docs/wire.md says, with struct. The oracle for the compiled one."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

PREFACE = b"DYNW\x01\x00\x00\x00"
HELLO, REQUEST, DATA, CONT, END, ERROR, CANCEL, WINDOW, ACCEPT, PING, PONG, GOAWAY = range(1, 13)
RAW, MSGPACK, JSON = range(3)
NAMED, META, FRAGMENTED, LAST = 4, 8, 16, 32
CONNECTION = 0xFFFFFFFF
STOP, KILL = 1, 2
SMALL_LIMIT = 98900
FRAME_LIMIT = 1 << 20
FRAGMENT_FROM = 65536
FRAGMENT_BYTES = 262144
ITEM_OVERHEAD = 64
HEADER = struct.Struct("<IBBHII")


class Frame(NamedTuple):
    type: int
    flags: int = 0
    aux: int = 0
    stream: int = 0
    arg: int = 0
    body: bytes = b""


def encode(*frames: Frame) -> bytes:
    return b"".join(HEADER.pack(len(f.body), f.type, f.flags, f.aux, f.stream, f.arg) + f.body for f in frames)


def parse(data: bytes) -> Iterator[Frame]:
    """Frames of a stream that has no preface (any more); raises if it ends within a frame."""
    at = 0
    while at < len(data):
        length, *fields = HEADER.unpack_from(data, at)
        at += HEADER.size
        if at + length > len(data):
            raise ValueError(f"the frame at {at - HEADER.size} needs {length} bytes, {len(data) - at} are there")
        yield Frame(*fields, data[at : at + length])
        at += length


def hello(**fields: Any) -> Frame:
    values = {"max_message": 1 << 25, "max_streams": 64, "stream_window": 1 << 18, "connection_window": 1 << 26} | fields
    return Frame(HELLO, body=msgspec.msgpack.encode({k: v for k, v in values.items() if v is not ...}))


def request(
    stream: int,
    payload: bytes = b"",
    *,
    endpoint: int = 0,
    name: bytes | None = None,
    kind: int = RAW,
    meta: bytes | None = None,
    timeout_ms: int = 0,
    announce: int | None = None,
) -> Frame:
    """``announce``: the payload follows in CONT frames and has that many bytes."""
    flags, body = kind, b""
    if name is not None:
        flags |= NAMED
        body += struct.pack("<H", len(name)) + name
    if meta is not None:
        flags |= META
        body += struct.pack("<I", len(meta)) + meta
    if announce is not None:
        flags |= FRAGMENTED
        body += struct.pack("<I", announce)
    return Frame(REQUEST, flags, endpoint, stream, timeout_ms, body + payload)


def item(stream: int, payload: bytes = b"", *, kind: int = RAW, last: bool = False, announce: int | None = None) -> Frame:
    flags = kind | (LAST if last else 0)
    if announce is not None:
        return Frame(DATA, flags | FRAGMENTED, 0, stream, 0, struct.pack("<I", announce))
    return Frame(DATA, flags, 0, stream, 0, payload)


def fragments(stream: int, payload: bytes, size: int = FRAGMENT_BYTES) -> list[Frame]:
    return [Frame(CONT, 0, 0, stream, 0, payload[i : i + size]) for i in range(0, len(payload), size)]


def window(stream: int, increment: int) -> Frame:
    return Frame(WINDOW, 0, 0, stream, increment)


def cancel(stream: int, kind: int) -> Frame:
    return Frame(CANCEL, 0, kind, stream)


class Assembler:
    """What a receiver makes of a peer's frames: the same events as the compiled codec, credit and limits apart."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open: dict[int, tuple[tuple[Any, ...], int, list[bytes]]] = {}

    def feed(self, frames: Iterator[Frame]) -> list[tuple[Any, ...]]:
        return [event for frame in frames for event in self._frame(frame)]

    def _frame(self, f: Frame) -> Iterator[tuple[Any, ...]]:
        kind, last, body = f.flags & 3, bool(f.flags & LAST), f.body
        if f.type == REQUEST:
            if f.flags & NAMED:
                n = struct.unpack_from("<H", body)[0]
                self.names.append(body[2 : 2 + n].decode())
                body = body[2 + n :]
            meta = None
            if f.flags & META:
                n = struct.unpack_from("<I", body)[0]
                meta, body = body[4 : 4 + n], body[4 + n :]
            shape: tuple[Any, ...] = ("request", f.stream, self.names[f.aux], None, kind, meta, f.arg)
            yield from self._payload(f, shape, body)
        elif f.type == DATA:
            yield from self._payload(f, ("item", f.stream, None, kind, last), body)
        elif f.type == CONT:
            shape, total, parts = self.open[f.stream]
            parts.append(body)
            if sum(map(len, parts)) == total:
                del self.open[f.stream]
                at = 3 if shape[0] == "request" else 2
                yield (*shape[:at], b"".join(parts), *shape[at + 1 :])
        elif f.type == END:
            yield ("end", f.stream)
        elif f.type == ERROR:
            self.open.pop(f.stream, None)
            yield ("error", f.stream, f.aux, body)
        elif f.type == ACCEPT:
            yield ("accept", f.stream)
        elif f.type == CANCEL:
            yield ("cancel", f.stream, f.aux)
        elif f.type == PONG:
            yield ("pong", f.stream, f.arg)
        elif f.type == GOAWAY:
            yield ("goaway", f.aux, f.arg, body.decode())

    def _payload(self, f: Frame, shape: tuple[Any, ...], body: bytes) -> Iterator[tuple[Any, ...]]:
        at = 3 if shape[0] == "request" else 2
        if f.flags & FRAGMENTED:
            self.open[f.stream] = (shape, struct.unpack("<I", body)[0], [])
        else:
            yield (*shape[:at], body, *shape[at + 1 :])
