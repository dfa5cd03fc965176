"""One dialogue that contains every kind of frame: the test vectors of docs/wire.md.

``python -m tests.sansio.script`` prints the table. The test compares the table in the document with what both codecs make of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dynwire._frames import EventConnection

from . import oracle as o

LIMITS = {"max_message": 1048576, "max_streams": 64, "stream_window": 256, "connection_window": 4096}
META = b"\x81\xa1k\xa1v"  # msgpack {"k": "v"}
BODY = b"\x82\xa1c\xacremote_error\xa1m\xa4oops"
Op = Callable[[EventConnection], object]


def _start(**kw: Any) -> Op:
    return lambda conn: conn.start(**kw)


SCRIPT: list[tuple[str, str, Op]] = [
    ("preface and HELLO", "client",
     _start(software="doc", connection_id=bytes(range(1, 9)), token="secret", accept_timeout_ms=5000)),
    ("preface and HELLO", "server", _start(software="doc")),
    ("REQUEST that names its endpoint", "client", lambda c: c.request("a.b.c", b"hello")),
    ("REQUEST of a known endpoint: msgpack, metadata, 1500 ms", "client",
     lambda c: c.request("a.b.c", b"\xc3", kind=1, meta=META, timeout_ms=1500)),
    ("REQUEST that announces 65536 bytes, and its only fragment", "client", lambda c: c.request("d.e.f", b"r" * 65536)),
    ("ACCEPT", "server", lambda s: s.send_accept(0)),
    ("DATA, raw", "server", lambda s: s.send_item(0, b"\x00\xff")),
    ("DATA, json, the last one", "server", lambda s: s.send_item(0, b"{}", kind=2, last=True)),
    ("CANCEL, stop", "client", lambda c: c.cancel(1, 1)),
    ("DATA of 200 bytes", "server", lambda s: s.send_item(1, b"d" * 200)),
    ("WINDOW of a stream: the application took the item", "client", lambda c: c.take(1, 264)),
    ("END", "server", lambda s: s.send_end(1)),
    ("DATA that announces 65537 bytes, the last one, and its only fragment", "server",
     lambda s: s.send_item(2, b"s" * 65537, last=True)),
    ("WINDOW of the connection: stream 2 has ended and its request is refunded", "server", lambda s: s.finish(2)),
    ("WINDOW of the connection", "client", lambda c: c.take(None, 65601)),
    ("REQUEST on a stream number used before", "client", lambda c: c.request("a.b.c", b"")),
    ("ERROR", "server", lambda s: s.send_error(2, 0, BODY)),
    ("REQUEST", "client", lambda c: c.request("a.b.c", b"")),
    ("CANCEL, kill", "client", lambda c: c.cancel(2, 2)),
    ("PING", "client", lambda c: c.send_ping(1, 2)),
    ("PONG", "server", lambda s: None),
    ("PING", "server", lambda s: s.send_ping(3, 4)),
    ("PONG", "client", lambda c: None),
    ("GOAWAY, normal, after five requests", "server", lambda s: s.send_goaway(0, "bye")),
]  # fmt: skip


def compact(data: bytes) -> str:
    """Hex; a run of at least 32 equal bytes as ``xx*count``."""
    parts: list[str] = []
    i = 0
    while i < len(data):
        run = len(data[i:]) - len(data[i:].lstrip(data[i : i + 1]))
        if run >= 32:
            parts.append(f"{data[i]:02x}*{run}")
            i += run
            continue
        if not parts or "*" in parts[-1]:
            parts.append("")
        parts[-1] += f"{data[i]:02x}"
        i += 1
    return " ".join(parts)


def expand(text: str) -> bytes:
    out = b""
    for part in text.split():
        value, _, count = part.partition("*")
        out += bytes.fromhex(value) * int(count or 1)
    return out


def play() -> list[tuple[str, str, bytes, list[list[Any]]]]:
    """Name, sender, bytes and the receiver's events (bytes as compact hex) of every step."""
    conns = {"client": EventConnection(True, **LIMITS), "server": EventConnection(False, **LIMITS)}
    rows = []
    for clock, (name, sender, op) in enumerate(SCRIPT):
        source, sink = conns[sender], conns["server" if sender == "client" else "client"]
        source.on_time(clock)  # a second between steps: small messages and large payloads do not meet
        op(source)
        data = source.output()
        source.receive(b"")  # drop its local events, "sent" and "credit"
        rows.append((name, sender, data, [plain(event) for event in sink.receive(data, clock)]))
    return rows


def plain(event: tuple[Any, ...]) -> list[Any]:
    return [compact(x) if isinstance(x, bytes) else {k: compact(v) if isinstance(v, bytes) else v for k, v in x.items()}
            if isinstance(x, dict) else x for x in event]  # fmt: skip


def table() -> str:
    lines = []
    for name, sender, data, events in play():
        lines.append(f"# {name}")
        rest = data
        if data.startswith(o.PREFACE):
            lines.append(f"{sender} {compact(o.PREFACE)}")
            rest = data[len(o.PREFACE) :]
        for f in o.parse(rest):
            lines.append(f"{sender} {compact(o.encode(f)[:16])} | {compact(f.body)}".rstrip(" |"))
        lines += [f"event {json.dumps(event)}" for event in events]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
