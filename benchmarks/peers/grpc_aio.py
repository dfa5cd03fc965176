"""grpc.aio with generic handlers on raw bytes (no protobuf), one channel."""

import asyncio

import common
import grpc
import grpc.aio
from common import DONE

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]


def handlers():
    async def echo(request, context):
        return request

    async def suspend(request, context):
        await asyncio.sleep(0)
        return request

    async def sink(request, context):
        return DONE

    async def bulk(request, context):
        items, size = common.parse_stream_request(request)
        item = b"x" * size
        for _ in range(items):
            yield item

    async def tick(request, context):
        items, size = common.parse_stream_request(request)
        item = b"x" * size
        for _ in range(items):
            yield item
            await asyncio.sleep(0)

    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    methods = {"echo": unary(echo), "suspend": unary(suspend), "sink": unary(sink), "bulk": stream(bulk), "tick": stream(tick)}
    return grpc.method_handlers_generic_handler("bench", methods)


def server(setup):
    async def main():
        serving = grpc.aio.server(options=OPTIONS)
        serving.add_generic_rpc_handlers((handlers(),))
        port = serving.add_insecure_port("127.0.0.1:0")
        await serving.start()
        common.say({"port": port})
        await common.stdin_closed()
        await serving.stop(0)

    common.run_loop(setup, main())


class Client(common.AsyncClient):
    def __init__(self, channel):
        self.calls = {k: channel.unary_unary(f"/bench/{k}") for k in ("echo", "suspend", "sink")}
        self.streams = {k: channel.unary_stream(f"/bench/{k}") for k in ("bulk", "tick")}

    def caller(self, kind):
        return self.calls[kind]

    def items(self, kind, payload):
        return self.streams[kind](payload)


def client(setup):
    async def main():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{setup['port']}", options=OPTIONS) as channel:
            await channel.channel_ready()
            await common.async_client(setup, Client(channel))

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
