"""RPC made by hand on an asyncio Protocol, in pure Python: length, id and kind, a dict of futures, the handler in the callback.

Frames that one read completes are answered with one write.
"""

import asyncio
import functools
import struct

import common
from common import DONE, ECHO, KINDS, SINK

HEADER = struct.Struct("<IIB")  # payload length, id, kind


class Frames(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.rest = b""
        self.parts = []
        self.have = 0
        self.need = 0

    def data_received(self, data):
        if self.need or self.rest:
            self.parts.append(data)
            self.have += len(data)
            if self.have < self.need:
                return
            data = b"".join(self.parts)
        at, size = 0, len(data)
        unpack = HEADER.unpack_from
        self.need = 0
        while size - at >= 9:
            length, call_id, kind = unpack(data, at)
            end = at + 9 + length
            if end > size:
                self.need = end - at
                break
            self.frame(call_id, kind, data, at, end)
            at = end
        self.rest = data[at:] if at < size else b""
        self.parts = [self.rest] if self.rest else []
        self.have = len(self.rest)
        self.done()

    def done(self):
        pass


class Server(Frames):
    def connection_made(self, transport):
        super().connection_made(transport)
        self.out = []

    def frame(self, call_id, kind, data, at, end):
        if kind == SINK:
            self.out.append(HEADER.pack(len(DONE), call_id, kind) + DONE)
        else:
            self.out.append(data if at == 0 and end == len(data) else data[at:end])

    def done(self):
        if self.out:
            self.transport.write(self.out[0] if len(self.out) == 1 else b"".join(self.out))
            self.out.clear()


class Connection(Frames):
    def connection_made(self, transport):
        super().connection_made(transport)
        self.pending = {}
        self.next_id = 0
        self.create_future = asyncio.get_running_loop().create_future

    def frame(self, call_id, kind, data, at, end):
        self.pending.pop(call_id).set_result(data[at + 9 : end])

    def call(self, payload, kind=ECHO):
        call_id = self.next_id
        self.next_id = (call_id + 1) & 0xFFFFFFFF
        future = self.pending[call_id] = self.create_future()
        self.transport.write(HEADER.pack(len(payload), call_id, kind) + payload)
        return future


class Client(common.AsyncClient):
    def __init__(self, connection):
        self.connection = connection

    def caller(self, kind):
        return self.connection.call if kind == "echo" else functools.partial(self.connection.call, kind=KINDS[kind])

    async def close(self):
        self.connection.transport.close()


def server(setup):
    async def main():
        listening = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        common.say({"port": listening.sockets[0].getsockname()[1]})
        await common.stdin_closed()

    common.run_loop(setup, main())


def client(setup):
    async def main():
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", setup["port"])
        await common.async_client(setup, Client(connection))

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
