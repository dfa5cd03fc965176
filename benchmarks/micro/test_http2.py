"""How long does the HTTP/2 engine take, without sockets, and how much faster is it than the h2 library in the same run?

The engine is used through its Python face, whose events and copies cost about as much as the engine itself. h2 does what a
server and a client on it have to do: answer events, give windows back.
"""

import time

import h2.config
import h2.connection
import h2.events
import pytest

from dynwire.wire.http2 import Http2Connection

BODY = b"x" * 1024
REQUEST = [
    (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"127.0.0.1:8888"), (b":path", b"/v1/rpc/bench.worker.echo"),
    (b"content-type", b"application/msgpack"), (b"content-length", b"%d" % len(BODY)),
]  # fmt: skip
RESPONSE = [(b":status", b"200"), (b"content-type", b"application/msgpack"), (b"content-length", b"%d" % len(BODY))]

PROMISED = 25
"""times h2, for the exchange of 1 KiB and both ends together"""


def native_pair():
    client, server = Http2Connection("client"), Http2Connection("server")
    client.start()
    server.start()
    for _ in range(2):
        server.receive(client.output())
        client.receive(server.output())
    return client, server


def native_exchange():
    client, server = native_pair()

    def exchange():
        sid = client.open_stream()
        client.send_headers(sid, REQUEST)
        client.send_data(sid, BODY, True)
        for event in server.receive(client.output()):
            if event[0] == "data":
                body = event[2]
                server.consumed(sid, len(body))
                server.send_headers(sid, RESPONSE)
                server.send_data(sid, body, True)
        for event in client.receive(server.output()):
            if event[0] == "data":
                body = event[2]
                client.consumed(sid, len(body))
        return body

    return exchange


def h2_pair():
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    client.initiate_connection()
    server.initiate_connection()
    for _ in range(2):
        server.receive_data(client.data_to_send())
        client.receive_data(server.data_to_send())
    return client, server


def h2_exchange():
    client, server = h2_pair()

    def exchange():
        sid = client.get_next_available_stream_id()
        client.send_headers(sid, REQUEST)
        client.send_data(sid, BODY, True)
        for event in server.receive_data(client.data_to_send()):
            if isinstance(event, h2.events.DataReceived):
                body = event.data
                server.acknowledge_received_data(event.flow_controlled_length, sid)
                server.send_headers(sid, RESPONSE)
                server.send_data(sid, body, True)
        for event in client.receive_data(server.data_to_send()):
            if isinstance(event, h2.events.DataReceived):
                body = event.data
                client.acknowledge_received_data(event.flow_controlled_length, sid)
        return body

    return exchange


EXCHANGES = {"native": native_exchange, "h2": h2_exchange}


@pytest.mark.parametrize("engine", EXCHANGES)
def test_exchange(benchmark, engine):
    """1 KiB there and back, both ends."""
    assert benchmark(EXCHANGES[engine]()) == BODY


@pytest.mark.parametrize("size", [64, 1024, 16384])
@pytest.mark.parametrize("engine", EXCHANGES)
def test_receive_data(benchmark, engine, size):
    """100 DATA frames, read and given back."""
    if engine == "native":
        client, server = native_pair()
        sid = client.open_stream()
        client.send_headers(sid, REQUEST[:-1])
        server.receive(client.output())
        frames = (size.to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, sid]) + bytes(size)) * 10

        def receive():
            for _ in range(10):
                for event in server.receive(frames):
                    server.consumed(sid, len(event[2]))
                server.output()
    else:
        client, server = h2_pair()
        client.send_headers(1, REQUEST[:-1])
        server.receive_data(client.data_to_send())
        # h2's window holds three frames of 16 KiB
        batch = 10 if size < 16384 else 2
        frames = (size.to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1]) + bytes(size)) * batch

        def receive():
            for _ in range(100 // batch):
                for event in server.receive_data(frames):
                    if isinstance(event, h2.events.DataReceived):
                        server.acknowledge_received_data(event.flow_controlled_length, 1)
                server.data_to_send()

    benchmark(receive)


def best(call, seconds):
    """Shortest of many runs of the call: what the machine's other work cannot hide."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        call()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def test_times_h2():
    """A ratio within one run, so no promise about a machine."""
    native, library = native_exchange(), h2_exchange()
    ratio = best(library, 1.0) / best(native, 1.0)
    print(f"1 KiB exchange, both ends: {ratio:.0f} x h2")
    assert ratio >= PROMISED
