"""The ways to break a server do break it, and leave it ready."""

from __future__ import annotations

import socket
import time

import pytest

from dynwire.nats.server import NatsCluster, NatsServer
from dynwire.testing.proxy import running_proxy

from .conftest import OUTAGES

WAIT_S = 20.0


def connect(server: NatsServer) -> socket.socket:
    """A client that has exchanged a PING with the server."""
    sock = socket.create_connection(("127.0.0.1", server.port), WAIT_S)
    read_until(sock, b"\r\n")
    sock.sendall(b'CONNECT {"verbose":false,"pedantic":false,"protocol":1}\r\nPING\r\n')
    read_until(sock, b"PONG\r\n")
    return sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        chunk = sock.recv(65536)
        if not chunk:
            break
        data += chunk
    return data


@pytest.mark.parametrize("name", OUTAGES)
def test_outage(own_nats_server: NatsServer, name: str) -> None:
    pid, port = own_nats_server.pid, own_nats_server.port
    with connect(own_nats_server) as before:
        outage = OUTAGES[name](own_nats_server)
        assert outage.began < outage.ready <= time.monotonic()
        if name == "suspended":
            assert outage.ready - outage.began >= 5.0
            assert own_nats_server.pid == pid
            before.sendall(b"PING\r\n")
            assert b"PONG" in read_until(before, b"PONG\r\n")
        else:
            assert own_nats_server.pid != pid
            told = read_until(before, b"never")  # up to its end
            assert (b'"ldm":true' in told) == (name == "lame_duck")
    assert own_nats_server.port == port
    connect(own_nats_server).close()


def test_cluster_of_three(nats_cluster: NatsCluster) -> None:
    first, *others = nats_cluster.servers
    first.kill()
    nats_cluster.wait_ready()
    for server in others:
        connect(server).close()
    first.start()
    nats_cluster.wait_ready()
    connect(first).close()


def test_proxy_in_front_of_a_server(own_nats_server: NatsServer) -> None:
    with running_proxy(own_nats_server.url) as proxy:
        assert proxy.address.startswith("nats://127.0.0.1:")
        host, _, port = proxy.address.removeprefix("nats://").partition(":")
        with socket.create_connection((host, int(port)), WAIT_S) as sock:
            assert sock.recv(4) == b"INFO"
