"""The speed that issues #2 to #5 promise, as data. The compare scripts measure both sides in one row of one run.

``left`` and ``right`` are contestants of the row (``peer`` or ``peer:kind``), the measured value is ``metric(left) /
metric(right)``, or the plain metric where ``right`` is empty. ``<=`` on times, CPU and memory, ``>=`` on rates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    text: str
    row: str
    metric: str  # of a row, for example rate, p50_us, cpu_s_per_100k, server_us (CPU of the server per request)
    left: str
    op: str
    bound: float
    right: str = ""

    @property
    def name(self) -> str:
        return f"{self.row}: {self.metric} {self.left} {self.op} {self.bound:g}" + (f" x {self.right}" if self.right else "")

    def met(self, value: float) -> bool:
        return value >= self.bound if self.op == ">=" else value <= self.bound


SPLIT = "split/uvloop/default"
ONE = "one/uvloop/default"
RENO = "split/uvloop/reno"


def _large() -> list[Promise]:
    found = []
    for where in (SPLIT, RENO):
        found += [
            Promise("16 MiB one way, pyzmq copy=False", f"sink-16MiB-c1/{where}", "rate", "dynwire", ">=", 1.0, "pyzmq-rep"),
            Promise("16 MiB one way, picows", f"sink-16MiB-c1/{where}", "rate", "dynwire", ">=", 2.4, "picows"),
        ]
        for size in ("1MiB", "16MiB"):
            found += [
                Promise(f"{size} echo, pyzmq copy=False", f"echo-{size}-c1/{where}", "rate", "dynwire", ">=", 0.9, "pyzmq-rep"),
                Promise(f"{size} echo, grpc.aio", f"echo-{size}-c1/{where}", "rate", "dynwire", ">=", 4.0, "grpc.aio"),
            ]
    return found


PROMISES: list[Promise] = [
    # async, 64 B raw
    Promise("1 in flight, a core each, C blocking", f"unary-64B-c1/{SPLIT}", "p50_us", "dynwire", "<=", 1.15, "c"),
    Promise("1 in flight, one core, C blocking", f"unary-64B-c1/{ONE}", "p50_us", "dynwire", "<=", 2.0, "c"),
    Promise("1 in flight, one core, picows", f"unary-64B-c1/{ONE}", "p50_us", "dynwire", "<=", 0.65, "picows"),
    Promise("32 in flight, picows", f"unary-64B-c32/{SPLIT}", "rate", "dynwire", ">=", 1.4, "picows"),
    Promise("32 in flight, grpc.aio", f"unary-64B-c32/{SPLIT}", "rate", "dynwire", ">=", 30, "grpc.aio"),
    Promise("256 in flight, picows", f"unary-64B-c256/{SPLIT}", "rate", "dynwire", ">=", 4, "picows"),
    Promise("256 in flight, zmq.asyncio", f"unary-64B-c256/{SPLIT}", "rate", "dynwire", ">=", 35, "zmq.asyncio"),
    Promise("256 in flight, grpc.aio", f"unary-64B-c256/{SPLIT}", "rate", "dynwire", ">=", 90, "grpc.aio"),
    Promise("256 in flight, standard loop", "unary-64B-c256/split/asyncio/default", "rate", "dynwire", ">=", 3, "picows"),
    Promise("small msgpack object, raw", f"object-64B-c256/{SPLIT}", "rate", "dynwire:object", ">=", 0.6, "dynwire"),
    Promise("handler suspends once, picows inline", f"suspend-64B-c256/{SPLIT}", "rate", "dynwire:suspend", ">=", 1.1, "picows"),
    # async streams of 64 B items
    Promise("stream, 8 at a time, picows", f"stream-64B-x8/{SPLIT}", "rate", "dynwire", ">=", 3, "picows"),
    Promise("stream, 8 at a time, zmq.asyncio", f"stream-64B-x8/{SPLIT}", "rate", "dynwire", ">=", 50, "zmq.asyncio"),
    Promise("one item per tick, 256 streams, picows", f"tick-64B-x256/{SPLIT}", "rate", "dynwire", ">=", 2, "picows"),
    Promise("one item per tick, 256 streams, grpc.aio", f"tick-64B-x256/{SPLIT}", "rate", "dynwire", ">=", 12, "grpc.aio"),
    Promise("first item, unary", f"first-64B/{SPLIT}", "p50_us", "dynwire:first", "<=", 1.5, "dynwire"),
    # blocking, 64 B
    Promise("blocking, one thread, C blocking", f"blocking-64B-t1/{ONE}", "p50_us", "dynwire-sync", "<=", 1.3, "c"),
    Promise("blocking, one thread, Python socket", f"blocking-64B-t1/{ONE}", "p50_us", "dynwire-sync", "<=", 0.85, "socket"),
    Promise("blocking, one thread, pyzmq REQ/REP", f"blocking-64B-t1/{ONE}", "p50_us", "dynwire-sync", "<=", 0.25, "pyzmq-rep"),
    Promise("8 threads, a Python socket each", f"blocking-64B-t8/{SPLIT}", "rate", "dynwire-sync", ">=", 1.1, "socket"),
    Promise("32 threads, a Python socket each", f"blocking-64B-t32/{SPLIT}", "rate", "dynwire-sync", ">=", 1.3, "socket"),
    Promise("8 threads, a pyzmq socket each", f"blocking-64B-t8/{SPLIT}", "rate", "dynwire-sync", ">=", 3, "pyzmq-dealer"),
    Promise("32 threads, a pyzmq socket each", f"blocking-64B-t32/{SPLIT}", "rate", "dynwire-sync", ">=", 1.9, "pyzmq-dealer"),
    Promise("8 threads, grpcio", f"blocking-64B-t8/{SPLIT}", "rate", "dynwire-sync", ">=", 12, "grpcio"),
    Promise("32 threads, grpcio", f"blocking-64B-t32/{SPLIT}", "rate", "dynwire-sync", ">=", 12, "grpcio"),
    # spinning
    Promise("spin, 1 in flight, polling C", f"spin-64B-c1/{SPLIT}", "p50_us", "dynwire-spin", "<=", 1.5, "c-spin"),
    Promise("spin, 32 in flight, picows", f"spin-64B-c32/{SPLIT}", "rate", "dynwire-spin", ">=", 4, "picows"),
    # "never worse than without": 5 % for what two runs of the same thing differ by
    Promise("spin on one core, without spin", f"spin-64B-c1/{ONE}", "p50_us", "dynwire-spin", "<=", 1.05, "dynwire"),
    Promise("spin on one core, 32 in flight, without", f"spin-64B-c32/{ONE}", "rate", "dynwire-spin", ">=", 0.95, "dynwire"),
    *_large(),
    # CPU and memory
    Promise("CPU at 256 in flight, picows", f"unary-64B-c256/{SPLIT}", "cpu_s_per_100k", "dynwire", "<=", 1 / 5, "picows"),
    Promise(
        "CPU at 256 in flight, zmq.asyncio", f"unary-64B-c256/{SPLIT}", "cpu_s_per_100k", "dynwire", "<=", 1 / 40, "zmq.asyncio"
    ),
    Promise("CPU at 256 in flight, grpc.aio", f"unary-64B-c256/{SPLIT}", "cpu_s_per_100k", "dynwire", "<=", 1 / 100, "grpc.aio"),
    Promise("RSS of the client, picows", f"unary-64B-c256/{SPLIT}", "rss_client", "dynwire", "<=", 1.2, "picows"),
    Promise("RSS of the server, picows", f"unary-64B-c256/{SPLIT}", "rss_server", "dynwire", "<=", 1.2, "picows"),
    Promise("p99 beside a 16 MiB transfer, alone", f"beside-16MiB/{SPLIT}", "p99_us", "dynwire:beside", "<=", 3, "dynwire"),
    Promise("bytes of server RSS per idle stream", f"idle-10000/{SPLIT}", "server_bytes_per_stream", "dynwire", "<=", 8192),
]


# The http plane, compare_http.py


def _server(text: str, row: str, bound: float, peer: str) -> list[Promise]:
    """At least ``bound`` times the peer's rate; and by CPU per request, which says the same and does not depend on the load
    generator keeping up or on neighbours."""
    return [
        Promise(text, f"{row}/split", "rate", "dynwire", ">=", bound, peer),
        Promise(f"{text}, by CPU", f"{row}/split", "server_us", "dynwire", "<=", 1 / bound, peer),
    ]


HTTP_PROMISES: list[Promise] = [
    *_server("POST 1 KiB, stario", "post-1KiB", 1.5, "stario"),
    *_server("POST 1 KiB, granian RSGI", "post-1KiB", 3, "granian"),
    *_server("POST 1 KiB, hypercorn", "post-1KiB", 40, "hypercorn"),
    *_server("POST 1 KiB, grpc.aio", "post-1KiB", 30, "grpc.aio"),
    *_server("JSON in and out, granian RSGI with orjson", "json", 1.5, "granian"),
    *_server("GET /live, nghttpd", "live", 0.4, "nghttpd"),
    *_server("GET /live, stario", "live", 1.5, "stario"),
    *_server("POST 64 KiB, stario", "post-64KiB", 1, "stario"),
    *_server("POST 64 KiB, granian RSGI", "post-64KiB", 2, "granian"),
    *_server("100 chunks, stario", "chunks", 1.5, "stario"),
    *_server("100 chunks, granian RSGI", "chunks", 3, "granian"),
    # "flat": 10 % for what two measurements of the same thing differ by
    Promise("1000 open streams, by none", "open-streams/split", "open_cost", "dynwire:1000", "<=", 1.1),
    Promise("client, 32 in flight, h2 + asyncio", "client-32/split", "rate", "dynwire", ">=", 4, "h2+asyncio"),
    Promise("client, 32 in flight, Node's http2", "client-32/split", "rate", "dynwire", ">=", 1.5, "node"),
    Promise("client, 32 in flight, pycurl, by CPU", "client-32/split", "client_us", "dynwire", "<=", 1, "pycurl-multi"),
    Promise("blocking client, a core each, pycurl", "client-blocking/split", "p50_us", "dynwire-sync", "<=", 1, "pycurl"),
    Promise("blocking client, one core, pycurl", "client-blocking/one", "p50_us", "dynwire-sync", "<=", 1, "pycurl"),
]


# The nats plane, compare_nats.py


# The plane is promised with its compiled port. What is left of it where it has to fall back to nats-py's API is bounded too: it
# pays for its credit and index per item in Python.
def _nats(text: str, row: str, plain: float, fast: float) -> list[Promise]:
    return [
        Promise(f"{text}, nats-py's API only", f"{row}/split", "rate", "dynwire-plain", ">=", plain, "nats-py"),
        Promise(text, f"{row}/split", "rate", "dynwire", ">=", fast, "nats-py"),
    ]


NATS_PROMISES: list[Promise] = [
    *_nats("1 in flight, nats-py by hand", "unary-64B-c1", 0.9, 0.9),
    *_nats("32 in flight, nats-py by hand", "unary-64B-c32", 0.9, 2.5),
    *_nats("256 in flight, nats-py by hand", "unary-64B-c256", 0.9, 2.5),
    *_nats("stream, one at a time, nats-py by hand", "stream-64B-x1", 0.5, 0.9),
    *_nats("stream, 8 at a time, nats-py by hand", "stream-64B-x8", 0.5, 0.9),
    *_nats("one item per tick, 64 streams, nats-py by hand", "tick-64B-x64", 0.5, 0.9),
    Promise("8 blocking threads, 8 tasks", "threads-64B-t8/split", "rate", "dynwire-sync", ">=", 0.7, "dynwire"),
]


# Frontend and worker, serving.py


def _serving(row: str, rate: str) -> list[Promise]:
    return [
        Promise(f"{rate}, Dynamo", row, "rate", "dynwire", ">=", 1.5, "dynamo"),
        Promise(f"{rate}, CPU per token, Dynamo", row, "cpu_s_per_1k", "dynwire", "<=", 0.7, "dynamo"),
    ]


SERVING_PROMISES: list[Promise] = [
    *_serving("unary-16-c32", "16 tokens in one piece, 32 at a time"),
    *_serving("unary-16-c128", "16 tokens in one piece, 128 at a time"),
    *_serving("stream-128-c32", "streamed tokens, 32 at a time"),
    *_serving("stream-128-c128", "streamed tokens, 128 at a time"),
    Promise("added time to first token, 100 arrivals/s", "arrivals-128-r100", "ttft_p50_us", "dynwire", "<=", 0.5, "dynamo"),
    Promise("added time to first token, 32 at a time, Dynamo", "stream-128-c32", "ttft_p50_us", "dynwire", "<=", 0.5, "dynamo"),
    Promise("added time to first token, 128 at a time, Dynamo", "stream-128-c128", "ttft_p50_us", "dynwire", "<=", 0.5, "dynamo"),
    # 5 %: a neighbour on the machine may hold up an answer as well
    Promise("answers to an ordinary client that are late", "ordinary-128-c1", "late_share", "dynwire", "<=", 0.05),
]
