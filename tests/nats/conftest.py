"""Servers that a test may break, and the ways to break them.

``own_nats_server``  one server with JetStream, for this test alone
``nats_cluster``     three of them that form a cluster
``authority``        certificates for servers at 127.0.0.1, and for clients
`OUTAGES`            what can happen to a server; each ends with the server ready again and says when that was

A connection that stalls, is cut or reset at an exact byte: ``FaultProxy(server.url)`` of `dynwire.testing.proxy`; its ``address``
is a URL for ``NATS_SERVER``. A client that does not read is such a proxy that stalls, or a process that is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from dynwire.nats.server import NatsCluster, NatsServer

LAME_DUCK_S = 60.0
"""nats-server takes at most its lame_duck_duration, 30 s, to send its clients away"""


@pytest.fixture
def own_nats_server(nats_server: NatsServer) -> Iterator[NatsServer]:
    """A server that the test may break. ``nats_server`` is asked for the skip where no program is installed."""
    with NatsServer(jetstream=True) as server:
        yield server


@pytest.fixture
def nats_cluster(nats_server: NatsServer) -> Iterator[NatsCluster]:
    """Three servers with replicated JetStream. ``cluster.servers[0].kill()``, ``.start()``; ``cluster.wait_ready()``."""
    with NatsCluster(3, jetstream=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PEM files: ``ca``, ``other`` (an authority that signed nothing), certificates ``server`` and ``client`` and their keys."""
    import trustme

    folder = tmp_path_factory.mktemp("tls")
    ca, other = trustme.CA(), trustme.CA()
    paths = {}
    for name, one in (("ca", ca), ("other", other)):
        one.cert_pem.write_to_path(folder / f"{name}.pem")
        paths[name] = str(folder / f"{name}.pem")
    for name in ("server", "client"):
        leaf = ca.issue_cert("127.0.0.1", "localhost", common_name=name)
        leaf.private_key_pem.write_to_path(folder / f"{name}.key")
        for number, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(folder / f"{name}.crt", append=number > 0)
        paths[name] = str(folder / f"{name}.crt")
        paths[f"{name}_key"] = str(folder / f"{name}.key")
    return paths


@dataclass(frozen=True)
class Outage:
    """When the server was away: `time.monotonic`, the clock of event loops too."""

    began: float
    ready: float
    """clients were served again: recovery is to be measured from here"""


def _outage(
    end: Callable[[NatsServer], object], again: Callable[[NatsServer], object], down: float, server: NatsServer
) -> Outage:
    began = time.monotonic()
    end(server)
    time.sleep(down)  # what is measured from outside is the outage, and this is its length
    again(server)
    return Outage(began, time.monotonic())


def crash(server: NatsServer, down: float = 0.0) -> Outage:
    """SIGKILL, ``down`` seconds of nothing, a start on the same port with the same storage."""
    return _outage(NatsServer.kill, NatsServer.start, down, server)


def orderly(server: NatsServer, down: float = 0.0) -> Outage:
    """The same with SIGTERM: clients see an end of their connections, JetStream writes everything."""
    return _outage(NatsServer.shut_down, NatsServer.start, down, server)


def wiped(server: NatsServer, down: float = 0.0) -> Outage:
    """SIGKILL and a start without anything that JetStream had stored: streams, consumers, buckets are gone."""

    def again(server: NatsServer) -> None:
        server.wipe()
        server.start()

    return _outage(NatsServer.kill, again, down, server)


def suspended(server: NatsServer, down: float = 5.0) -> Outage:
    """SIGSTOP for ``down`` seconds: connections stay open and take what fits into buffers, nothing is answered."""
    return _outage(NatsServer.pause, NatsServer.resume, down, server)


def lame_duck(server: NatsServer, down: float = 0.0) -> Outage:
    """An announced end: clients are told, those that stay are sent away, then a start."""

    def end(server: NatsServer) -> None:
        server.lame_duck()
        server.wait_ended(LAME_DUCK_S)

    return _outage(end, NatsServer.start, down, server)


OUTAGES: dict[str, Callable[[NatsServer], Outage]] = {
    "crash": crash,
    "orderly": orderly,
    "wiped": wiped,
    "suspended": suspended,
    "lame_duck": lame_duck,
}
"""They block: from a test on an event loop, ``await asyncio.to_thread(OUTAGES[name], server)``."""
