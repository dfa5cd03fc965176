"""dynwire on its http plane.

The server is an `AsyncNetworkManager`; it answers h2load like any HTTP/2 client. The clients are dynwire's own, ``face`` async or
sync, and talk to a foreign server (nghttpd): its address is put into their discovery as an instance of the endpoint.
"""

import asyncio

import common

import dynwire
from dynwire.discovery import open_discovery

COMPONENT = "demo.bench."


async def echo(request):
    return request


async def chunks(request):
    for _ in range(common.CHUNKS):
        yield common.CHUNK


HANDLERS = {"echo": echo, "json": echo, "chunks": chunks}


def settings(setup):
    return {
        "request_plane": "http",
        "discovery": "file",
        "discovery_file_dir": setup["directory"],
        "http_max_concurrent_streams": common.MAX_HTTP_STREAMS,
        **setup["options"].get("settings", {}),
    }


def server(setup):
    port = common.free_port()

    async def main():
        async with dynwire.AsyncNetworkManager(**settings(setup), http_host="127.0.0.1", http_port=port) as manager:
            for name, handler in HANDLERS.items():
                await manager.endpoint(COMPONENT + name).serve(handler)
            common.say({"port": port})
            await common.stdin_closed()

    common.run_loop(setup, main())


async def register(setup):
    """Put the foreign server into the file discovery. The record stays valid for as long as this process lives."""
    discovery = open_discovery("file", file_dir=setup["directory"], ttl=3600)
    await discovery.register(
        dynwire.Instance(
            id=1, namespace="demo", component="bench", endpoint="echo", plane="http", address=f"127.0.0.1:{setup['port']}"
        )
    )
    return discovery


class Client(common.AsyncClient):
    def __init__(self, client):
        self.client = client

    def caller(self, kind):
        return self.client.call


class SyncClient(common.SyncClient):
    def __init__(self, client):
        self.client = client

    def caller(self, thread, kind):
        return self.client.call


def client(setup):
    if setup["options"].get("face") == "sync":
        kept = asyncio.run(register(setup))
        with dynwire.NetworkManager(**settings(setup)) as manager:
            one = manager.endpoint(COMPONENT + "echo").client()
            one.wait_for_instances(1, timeout=5)
            common.sync_client(setup, SyncClient(one))
        del kept
        return

    async def main():
        discovery = await register(setup)
        async with dynwire.AsyncNetworkManager(**settings(setup)) as manager:
            one = await manager.endpoint(COMPONENT + "echo").client()
            await one.wait_for_instances(1, timeout=5)
            await common.async_client(setup, Client(one))
        await discovery.close()

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
