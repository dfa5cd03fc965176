"""Load for one question: does a request cost more when many streams of its connection are open? Used by compare_http.py.

    python h2_streams.py PORT PATH OPEN SECONDS SERVER_PID[,PID...]

Speaks HTTP/2 by hand over two blocking sockets. On one it opens ``OPEN`` POST requests whose body does not come. Then it sends
batches of 32 POST requests of 64 bytes and reads the replies, in turn some on this and some on the other connection, so that
whatever disturbs the machine disturbs both. Header blocks are literals without indexing, made once. At the end some of the open
requests get their body and must be answered, so that nobody is flat by having closed them. Prints one JSON object: calls,
seconds and cpu_server of the connection with open requests, and open_cost: its CPU per request by that of the other.
"""

import json
import socket
import struct
import sys
import time

import common

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
BATCH, BODY, WARM_UP, TURN_S = 32, b"x" * 64, 5, 0.01
MAX_WINDOW = (1 << 31) - 1


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def literal(index_or_name, value):
    """RFC 7541 section 6.2.2; values below 127 bytes, so every length is one byte."""
    if isinstance(index_or_name, int):
        return bytes([index_or_name, len(value)]) + value
    return bytes([0, len(index_or_name)]) + index_or_name + bytes([len(value)]) + value


class Connection:
    def __init__(self, port, path):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""
        self.window = 65535  # of the connection, towards the server; 64 bytes never fill a stream's
        self.limit = None  # SETTINGS_MAX_CONCURRENT_STREAMS
        self.ended = 0
        self.next_id = 1
        self.block = (
            b"\x83\x86"  # :method POST, :scheme http
            + literal(4, path.encode())
            + literal(1, b"127.0.0.1:%d" % port)
            + literal(b"content-type", common.OCTETS.encode())
            + literal(b"accept", common.OCTETS.encode())
        )
        settings = struct.pack(">HIHI", 4, MAX_WINDOW, 2, 0)  # windows are not the question; no push
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW - 65535))
        )
        while self.limit is None:
            self.read()

    def read(self):
        data = self.socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        data = self.rest + data if self.rest else data
        at, size = 0, len(data)
        while size - at >= 9:
            high, low, kind, flags, stream = struct.unpack_from(">HBBBI", data, at)
            end = at + 9 + (high << 8 | low)
            if end > size:
                break
            if kind in (DATA, HEADERS):
                self.ended += flags & END_STREAM
            else:
                self.control(kind, flags, stream, data[at + 9 : end])
            at = end
        self.rest = data[at:]

    def control(self, kind, flags, stream, payload):
        if kind == SETTINGS and not flags & ACK:
            values = dict(struct.iter_unpack(">HI", payload))
            self.limit = values.get(3, self.limit or MAX_WINDOW)
            self.socket.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and not stream:
            self.window += int.from_bytes(payload, "big")
        elif kind == RST_STREAM:
            # after a whole response it only says that the request's rest is not wanted, RFC 9113 section 8.1
            raise ConnectionError(f"stream {stream} reset with code {int.from_bytes(payload, 'big')}")
        elif kind == GOAWAY:
            raise ConnectionError(f"GOAWAY with code {int.from_bytes(payload[4:8], 'big')} {payload[8:].decode()}")

    def open(self, count):
        """Requests without their body; a PING shows that the server has read them."""
        if count + BATCH > self.limit:
            raise ConnectionError(f"the server allows {self.limit} streams")
        streams = range(self.next_id, self.next_id + 2 * count, 2)
        self.next_id += 2 * count
        for start in range(0, count, 100):
            self.socket.sendall(b"".join(frame(HEADERS, END_HEADERS, s, self.block) for s in streams[start : start + 100]))
        return streams

    def batch(self):
        first = self.next_id
        self.next_id += 2 * BATCH
        self.window -= BATCH * len(BODY)
        while self.window < 0:
            self.read()
        block, wanted = self.block, self.ended + BATCH
        self.socket.sendall(
            b"".join(
                frame(HEADERS, END_HEADERS, s, block) + frame(DATA, END_STREAM, s, BODY)
                for s in range(first, first + 2 * BATCH, 2)
            )
        )
        while self.ended < wanted:
            self.read()


class Side:
    """One of the two connections and what it has cost."""

    def __init__(self, port, path, count):
        self.connection = Connection(port, path)
        self.streams = self.connection.open(count)
        self.calls, self.cpu, self.seconds = 0, 0.0, 0.0
        for _ in range(WARM_UP):
            self.connection.batch()
        if self.connection.ended != WARM_UP * BATCH:
            raise ConnectionError("requests without their body were answered")

    def turn(self, pids):
        cpu, started = sum(map(common.process_cpu_s, pids)), time.perf_counter()
        while time.perf_counter() - started < TURN_S:
            self.connection.batch()
            self.calls += BATCH
        self.seconds += time.perf_counter() - started
        self.cpu += sum(map(common.process_cpu_s, pids)) - cpu

    def finish(self):
        wanted = self.connection.ended
        for stream in self.streams[:: max(1, len(self.streams) // 16)]:
            self.connection.socket.sendall(frame(DATA, END_STREAM, stream, BODY))
            wanted += 1
        while self.connection.ended < wanted:
            self.connection.read()


def main(port, path, count, seconds, pids):
    without, held = Side(port, path, 0), Side(port, path, count)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        without.turn(pids)
        held.turn(pids)
    held.finish()
    cost = (held.cpu / held.calls) / (without.cpu / without.calls)
    print(json.dumps({"calls": held.calls, "seconds": held.seconds, "cpu_server": held.cpu, "open_cost": cost}))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), [int(p) for p in sys.argv[5].split(",")])
    except (OSError, ConnectionError) as error:
        print(json.dumps({"error": str(error)}))
