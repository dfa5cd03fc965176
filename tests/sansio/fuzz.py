"""Random and mutated bytes into the codec. ``python -m tests.sansio.fuzz SEED COUNT`` prints a JSON summary; ``make fuzz``.

Each case is one byte string for one connection, in random pieces: random bytes, or a valid dialogue with bytes changed, cut out,
repeated, swapped or cut off; for a client or a server, before or after HELLO. Allowed are events, `ProtocolError` and
`PlaneMismatch`. Memory of payloads must stay within what the limits of the connection allow. A case depends on seed and number
only: ``python -m tests.sansio.fuzz SEED 1 --first NUMBER`` repeats it.

The process is meant to be thrown away: connections that end with open streams are not collected (see
test_a_connection_with_open_streams_is_collected), and a crash should not take the test run with it.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
from typing import Any

from dynwire._buffers import get_pool
from dynwire._frames import EventConnection
from dynwire.errors import PlaneMismatch, ProtocolError

from . import oracle as o

STREAMS = 8
LIMITS: dict[str, Any] = {"max_message": 200_000, "max_streams": STREAMS, "stream_window": 100_000, "connection_window": 400_000}
# 200,000 bytes take a block of 262,144; no more payloads can be arriving or be held than there are streams (and one delivered)
POOL_LIMIT = (STREAMS + 1) * 262_144

INTERESTING = [0, 1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 32768, 65535, 65536, 98900, 98901, 1 << 20,
               (1 << 20) + 1, 200_000, 200_001, (1 << 31) - 1, 1 << 31, 0xFFFFFFFE, 0xFFFFFFFF]  # fmt: skip


def corpus(role: str) -> list[o.Frame]:
    """Frames that such a receiver may get, several streams open."""
    big = bytes(range(256)) * 300
    if role == "server":
        return [
            o.request(0, b"hello", name=b"a.b.c"), o.request(1, b"\xc3", kind=1, meta=b"\x80", timeout_ms=50),
            o.request(2, announce=len(big), endpoint=1, name=b"d.e.f"), *o.fragments(2, big, 30_000), o.cancel(0, o.STOP),
            o.cancel(1, o.KILL), o.window(0, 1000), o.window(o.CONNECTION, 5000), o.Frame(o.PING, 0, 0, 1, 2),
            o.Frame(o.PONG, 0, 0, 1, 2), o.request(3), o.request(4, announce=70_000), o.Frame(o.CONT, stream=4, body=big[:5]),
            o.cancel(4, o.KILL), o.Frame(200, body=b"new"), o.Frame(o.GOAWAY, body=b"bye"),
        ]  # fmt: skip
    return [
        o.Frame(o.ACCEPT, stream=0), o.item(0, b"hello"), o.item(0, b"{}", kind=2, last=True), o.item(1, announce=len(big)),
        o.item(2, b"x" * 300), *o.fragments(1, big, 30_000), o.item(1, last=True), o.item(2, announce=70_000),
        o.Frame(o.CONT, stream=2, body=big[:9]), o.Frame(o.ERROR, 0, 1, 2, 0, b"\x81\xa1c\xa1x"), o.Frame(o.END, stream=3),
        o.window(o.CONNECTION, 5000), o.Frame(o.PING, 0, 0, 1, 2), o.Frame(o.PONG, 0, 0, 1, 2), o.Frame(200, body=b"new"),
        o.Frame(o.GOAWAY, 0, 0, 0, 9, b"bye"),
    ]  # fmt: skip


CORPUS = {role: corpus(role) for role in ("client", "server")}
HELLO = o.PREFACE + o.encode(o.hello(software="fuzz", id=b"12345678", token="t", codecs=["raw"], **LIMITS))


def mutate(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            return
        at = rng.randrange(len(data))
        how = rng.randrange(7)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.getrandbits(8)
        elif how == 2:
            del data[at : at + rng.choice((1, 2, 4, 16, 100))]
        elif how == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16, 100)))
        elif how == 4:
            data[at:at] = data[at : at + rng.choice((1, 16, 20, 200))]
        elif how == 5:
            data[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING))
        else:
            del data[at:]


def case(rng: random.Random, role: str, with_hello: bool) -> bytes:
    how = rng.randrange(10)
    if how == 0:
        return rng.randbytes(rng.choice((1, 8, 16, 50, 300)))
    if how == 1 and not with_hello:
        return o.PREFACE + rng.randbytes(rng.choice((1, 16, 50, 300)))
    frames = CORPUS[role]
    if how <= 5:  # whole frames in another order, header fields changed
        picked = [rng.choice(frames) for _ in range(rng.randint(1, 8))]
        for _ in range(rng.randint(0, 3)):
            i = rng.randrange(len(picked))
            name = rng.choice(("type", "flags", "aux", "stream", "arg", "body"))
            value: Any = {
                "type": rng.randrange(14), "flags": rng.getrandbits(8), "aux": rng.choice((0, 1, 2, rng.getrandbits(16))),
                "stream": rng.choice((*range(9), rng.choice(INTERESTING))), "arg": rng.choice(INTERESTING),
                "body": rng.choice((b"", struct.pack("<I", rng.choice(INTERESTING)), rng.randbytes(20))),
            }[name]  # fmt: skip
            picked[i] = picked[i]._replace(**{name: value})
        data = bytearray(o.encode(*picked))
        if rng.random() < 0.3:
            mutate(rng, data)
    else:  # a valid dialogue, bytes changed
        first = rng.choice((0, 0, rng.randrange(len(frames))))
        data = bytearray(o.encode(*frames[first : first + rng.randint(1, len(frames))]))
        mutate(rng, data)
    if not with_hello:
        if rng.random() < 0.7:
            data = bytearray(HELLO)
            mutate(rng, data)
        else:
            data[:0] = HELLO
    return bytes(data)


def feed(conn: EventConnection, rng: random.Random, data: bytes) -> int:
    """In one piece or several; returns the number of events."""
    if rng.random() < 0.6:
        return len(conn.receive(data))
    count = 0
    at = 0
    size = rng.choice((1, 7, 16, 17, 100, 5000))
    while at < len(data):
        if len(data) > 2000:
            size = rng.choice((16, 100, 5000))
        count += len(conn.receive(data[at : at + size]))
        at += size
    return count


def connection(role: str, with_hello: bool, streams: int) -> EventConnection:
    conn = EventConnection(role == "client", **LIMITS)
    if with_hello:
        conn.receive(HELLO)
        if role == "client":
            for _ in range(streams):
                conn.request("a", b"")
            if streams > 2:
                conn.cancel(1, 2)
    return conn


def release(conn: EventConnection) -> None:
    """End the open streams as far as that is possible from outside (a client's only by frames that it still understands)."""
    for sid in range(STREAMS):
        if conn.stream(sid) is not None:
            if not conn.is_client:
                conn.send_error(sid, 0, b"")
            elif conn.buffered == 0:
                try:
                    conn.receive(o.encode(o.Frame(o.ERROR, stream=sid)))
                except ProtocolError:
                    return


def run(seed: int, count: int, first: int = 0) -> dict[str, Any]:
    outcome = {"cases": 0, "bytes": 0, "events": 0, "quiet": 0, "ProtocolError": 0, "PlaneMismatch": 0}
    highest = 0
    started = time.monotonic()
    pool = get_pool()
    for number in range(first, first + count):
        rng = random.Random(seed * 1_000_003 + number)
        role = rng.choice(("client", "server"))
        with_hello = rng.random() < 0.8
        data = case(rng, role, with_hello)
        conn = connection(role, with_hello, rng.choice((0, 3, STREAMS)))
        before = pool.in_use_bytes
        outcome["cases"] += 1
        outcome["bytes"] += len(data)
        try:
            events = feed(conn, rng, data)
            outcome["events" if events else "quiet"] += 1
        except (ProtocolError, PlaneMismatch) as error:
            outcome[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed} ({role}, hello {with_hello}): {data.hex()}") from error
        used = pool.in_use_bytes - before
        highest = max(highest, used)
        answer = len(conn.output())
        if used > POOL_LIMIT or conn.buffered > 131_072 or answer > len(data) + STREAMS * 200 + 100:
            raise AssertionError(
                f"case {number} of seed {seed}: pool {used}, buffered {conn.buffered}, answer {answer}: {data.hex()}"
            )
        release(conn)
    return outcome | {"highest_pool_bytes": highest, "seconds": round(time.monotonic() - started, 1)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(arguments)
    print(json.dumps(run(options.seed, options.count, options.first)))


if __name__ == "__main__":
    main(sys.argv[1:])
