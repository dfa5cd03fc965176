"""dynwire on its tcp plane, or on its nats plane where there is a server.

``face`` async: `AsyncNetworkManager` on both sides; sync: `NetworkManager` in the client, async server; blocking:
`NetworkManager` on both sides.
"""

import asyncio
import sys

import common
from common import DONE

import dynwire

COMPONENT = "bench.worker."
OBJECT = {"id": 123456, "model": "demo", "tokens": [1, 20, 300, 4000, 50000], "stream": False, "t": 0.7}  # 54 bytes of msgpack


async def echo(request):
    return request


async def suspend(request):
    await asyncio.sleep(0)
    return request


async def sink(request):
    return DONE


async def bulk(request):
    items, size = common.parse_stream_request(request)
    item = b"x" * size
    for _ in range(items):
        yield item


async def tick(request):
    items, size = common.parse_stream_request(request)
    item = b"x" * size
    for _ in range(items):
        yield item
        await asyncio.sleep(0)


async def idle(request):
    yield b"x"
    await asyncio.get_running_loop().create_future()


HANDLERS = {"echo": echo, "suspend": suspend, "sink": sink, "bulk": bulk, "tick": tick, "idle": idle}


def plain_echo(request):
    return request


def plain_sink(request):
    return DONE


def plain_bulk(request):
    items, size = common.parse_stream_request(request)
    item = b"x" * size
    for _ in range(items):
        yield item


PLAIN_HANDLERS = {"echo": plain_echo, "sink": plain_sink, "bulk": plain_bulk}


def settings(setup):
    plane = {"request_plane": "nats", "nats_servers": [setup["nats"]]} if "nats" in setup else {"request_plane": "tcp"}
    return {
        **plane,
        "discovery": "file",
        "discovery_file_dir": setup["directory"],
        **setup["options"].get("settings", {}),
    }


class Client(common.AsyncClient):
    def __init__(self, clients):
        self.clients = clients

    def request(self, kind, size):
        return dict(OBJECT) if kind == "object" else b"x" * size

    def caller(self, kind):
        return self.clients["echo" if kind == "object" else kind].call

    async def consume(self, kind, payload):
        count = 0
        async with self.clients[kind].stream(payload) as stream:
            async for _ in stream:
                count += 1
        return count

    async def first(self, kind, payload):
        started, took = common.now_ns(), 0
        async with self.clients[kind].stream(payload) as stream:
            async for _ in stream:
                took = took or common.now_ns() - started
        return took

    async def idle(self, setup, count):
        return await common.idle_streams(setup, count, lambda: self.clients["idle"].stream(b"x"))


class SyncClient(common.SyncClient):
    def __init__(self, clients):
        self.clients = clients

    def caller(self, thread, kind):
        return self.clients[kind].call

    def consume(self, kind, payload):
        count = 0
        with self.clients[kind].stream(payload) as stream:
            for _ in stream:
                count += 1
        return count


def server(setup):
    if setup["options"].get("face") == "blocking":
        with dynwire.NetworkManager(**settings(setup)) as manager:
            for name, handler in PLAIN_HANDLERS.items():
                manager.endpoint(COMPONENT + name).serve(handler)
            common.say({"port": 0})
            sys.stdin.read()
        return

    async def main():
        async with dynwire.AsyncNetworkManager(**settings(setup)) as manager:
            for name, handler in HANDLERS.items():
                await manager.endpoint(COMPONENT + name).serve(handler)
            common.say({"port": 0})
            await common.stdin_closed()

    common.run_loop(setup, main())


def client(setup):
    face = setup["options"].get("face", "async")
    if face != "async":
        names = PLAIN_HANDLERS if face == "blocking" else HANDLERS
        with dynwire.NetworkManager(**settings(setup)) as manager:
            clients = {name: manager.endpoint(COMPONENT + name).client() for name in names}
            for one in clients.values():
                one.wait_for_instances(1, timeout=5)
            common.sync_client(setup, SyncClient(clients))
        return

    async def main():
        async with dynwire.AsyncNetworkManager(**settings(setup)) as manager:
            clients = {name: await manager.endpoint(COMPONENT + name).client() for name in HANDLERS}
            for one in clients.values():
                await one.wait_for_instances(1, timeout=5)
            await common.async_client(setup, Client(clients))

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
