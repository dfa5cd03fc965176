"""How long do the compiled codec and the pool take, without sockets?"""

import pytest

from dynwire import Context, Payload
from dynwire._buffers import BufferPool
from dynwire._frames import EventConnection
from dynwire.codec import KIND_JSON, KIND_MSGPACK, encode, unpack

OBJECT = {"id": 1, "model": "demo", "tokens": [1, 20, 300], "stream": False}


def pair():
    """Two ends of the wire that have said hello."""
    client, server = EventConnection(True), EventConnection(False)
    client.start(software="bench", connection_id=b"12345678")
    server.receive(client.output())
    server.start(software="bench")
    client.receive(server.output())
    return client, server


@pytest.mark.parametrize("size", [64, 1024, 1 << 16, 1 << 20], ids=["64B", "1KiB", "64KiB", "1MiB"])
def test_exchange(benchmark, size):
    """Request and reply between the two state machines (with the copies that a socket would make)."""
    client, server = pair()
    payload = b"x" * size

    def exchange():
        sid = client.request("bench.worker.echo", payload)
        server.receive(client.output())
        server.send_item(sid, payload, last=True)
        client.receive(server.output())
        client.take(None, size + 64)
        if size >= 1 << 16:
            server.finish(sid)
        server.receive(client.output())

    benchmark(exchange)


def test_pipelined_exchange(benchmark):
    """256 requests and replies at a time."""
    client, server = pair()
    payload = b"x" * 64

    def exchange():
        for _ in range(256):
            client.request("bench.worker.echo", payload)
        for event in server.receive(client.output()):
            server.send_item(event[1], payload, last=True)
        client.receive(server.output())
        client.take(None, 256 * 128)
        server.receive(client.output())

    benchmark(exchange)


@pytest.mark.parametrize("codec, kind", [("msgpack", KIND_MSGPACK), ("json", KIND_JSON)])
def test_object(benchmark, codec, kind):
    assert benchmark(lambda: unpack(kind, encode(OBJECT, codec))) == OBJECT


@pytest.mark.parametrize("size", [1 << 16, 1 << 20, 1 << 24], ids=["64KiB", "1MiB", "16MiB"])
def test_pool(benchmark, size):
    pool = BufferPool()
    benchmark(pool.acquire, size)


@pytest.mark.parametrize("size", [64, 1024], ids=["64B", "1KiB"])
def test_payload(benchmark, size):
    """Copy into a payload, take a view of it."""
    data = bytearray(size)
    benchmark(lambda: memoryview(Payload(data)))


def test_context(benchmark):
    benchmark(Context)
