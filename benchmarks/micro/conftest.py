"""What the microbenchmarks share: one server process for all of them, and managers that reach it."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).resolve().parent.parent / "peers"
ROOT = PEERS.parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    """The dynwire server of compare.py (asyncio, uvloop where installed); returns the keywords of a manager that reaches it."""
    directory = str(tmp_path_factory.mktemp("discovery"))
    try:
        import uvloop  # noqa: F401 - only whether it is there

        loop = "uvloop"
    except ImportError:
        loop = "asyncio"
    setup = {"loop": loop, "directory": directory, "options": {}}
    process = subprocess.Popen(
        [sys.executable, str(PEERS / "dynwire_peer.py"), "server", json.dumps(setup)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline(), "the server did not start"
    yield {"request_plane": "tcp", "discovery": "file", "discovery_file_dir": directory}
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


@pytest.fixture(scope="session")
def blocking(worker):
    """Blocking clients by handler name."""
    import dynwire

    with dynwire.NetworkManager(**worker) as manager:
        clients = {name: manager.endpoint(f"bench.worker.{name}").client() for name in ("echo", "bulk")}
        for client in clients.values():
            client.wait_for_instances(1, timeout=5)
        yield clients


@pytest.fixture(scope="session")
def loop_and_clients(worker):
    """A loop of our own and async clients by handler name."""
    import dynwire

    loop = asyncio.new_event_loop()

    async def start():
        manager = dynwire.AsyncNetworkManager(**worker)
        await manager.__aenter__()
        clients = {name: await manager.endpoint(f"bench.worker.{name}").client() for name in ("echo", "suspend", "bulk")}
        for client in clients.values():
            await client.wait_for_instances(1, timeout=5)
        return manager, clients

    manager, clients = loop.run_until_complete(start())
    yield loop, clients
    loop.run_until_complete(manager.__aexit__(None, None, None))
    loop.close()
