"""RPC made by hand on picows: binary websocket frames, a correlation id, a dict of futures.

As fast as it gets with reasonable effort: the handler runs in the frame callback and gets a payload that it may keep, a call
returns the `asyncio.Future` itself, header and payload are one frame. With the option ``split`` a large payload follows its
header in a frame of its own, so that nothing is concatenated. No flow control, no deadlines, no cancellation.
"""

import asyncio
import functools
import struct
from collections import deque

import common
import picows
from common import BULK, DONE, ECHO, IDLE, KINDS, MAX_MESSAGE, SINK, SUSPEND, TICK

HEADER = struct.Struct("<IB")  # id, kind; replies have the request's kind, items of a stream ITEM, its end END
ITEM, END = 0x40, 0x41
LARGE = 8192
FOLLOWS = 0x80  # in the second field: the payload is the next frame
BINARY = picows.WSMsgType.BINARY


class Server(picows.WSListener):
    def on_ws_connected(self, transport):
        self.transport = transport
        self.tasks = set()
        self.head = None

    def on_ws_frame(self, transport, frame):
        if frame.msg_type is not BINARY:
            if frame.msg_type is picows.WSMsgType.CLOSE:
                transport.disconnect()
            return
        if self.head is not None:  # the payload that belongs to it
            head, self.head = self.head, None
            if head[4] == SINK | FOLLOWS:
                frame.get_payload_as_bytes()
                transport.send(BINARY, head[:4] + b"\0" + DONE)
            else:
                payload = frame.get_payload_as_bytes()
                transport.send(BINARY, head)
                transport.send(BINARY, payload)
            return
        message = frame.get_payload_as_bytes()
        kind = message[4]
        if kind == ECHO:
            transport.send(BINARY, message)
        elif kind & FOLLOWS:
            self.head = message
        elif kind == SINK:
            transport.send(BINARY, message[:5] + DONE)
        elif kind == BULK:
            items, size = common.parse_stream_request(message[5:])
            item = message[:4] + b"@" + b"x" * size
            send = transport.send
            for _ in range(items):
                send(BINARY, item)
            send(BINARY, message[:4] + b"A")
        elif kind == SUSPEND:
            self.start(self.suspend(message))
        elif kind == TICK:
            self.start(self.tick(message))
        elif kind == IDLE:
            transport.send(BINARY, message[:4] + b"@x")
            self.start(self.wait())

    def start(self, coroutine):
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def wait(self):
        await asyncio.get_running_loop().create_future()

    async def suspend(self, message):
        await asyncio.sleep(0)
        self.transport.send(BINARY, message)

    async def tick(self, message):
        items, size = common.parse_stream_request(message[5:])
        item = message[:4] + b"@" + b"x" * size
        for _ in range(items):
            self.transport.send(BINARY, item)
            await asyncio.sleep(0)
        self.transport.send(BINARY, message[:4] + b"A")


class Stream:
    __slots__ = ("ended", "items", "waiter")

    def __init__(self):
        self.items = deque()
        self.waiter = None
        self.ended = False


class Listener(picows.WSListener):
    def __init__(self, split):
        self.split = split
        self.pending = {}
        self.streams = {}
        self.next_id = 0
        self.head = None

    def on_ws_connected(self, transport):
        self.transport = transport
        self.create_future = asyncio.get_running_loop().create_future

    def on_ws_frame(self, transport, frame):
        if frame.msg_type is not BINARY:
            return
        message = frame.get_payload_as_bytes()
        if self.head is not None:
            future, self.head = self.head, None
            future.set_result(message)
            return
        call_id, flag = HEADER.unpack_from(message)
        if flag & ITEM:
            stream = self.streams.get(call_id)
            if stream is None:
                return
            if flag == END:
                stream.ended = True
                del self.streams[call_id]
            else:
                stream.items.append(message[5:])
            if stream.waiter is not None:
                stream.waiter.set_result(None)
                stream.waiter = None
            return
        future = self.pending.pop(call_id)
        if flag & FOLLOWS:
            self.head = future
        else:
            future.set_result(message[5:])

    def call(self, payload, kind=ECHO):
        call_id = self.next_id
        self.next_id = (call_id + 1) & 0xFFFFFFFF
        future = self.pending[call_id] = self.create_future()
        if self.split and len(payload) > LARGE:
            self.transport.send(BINARY, HEADER.pack(call_id, kind | FOLLOWS))
            self.transport.send(BINARY, payload)
        else:
            self.transport.send(BINARY, HEADER.pack(call_id, kind) + payload)
        return future

    async def stream(self, kind, payload):
        call_id = self.next_id
        self.next_id = (call_id + 1) & 0xFFFFFFFF
        stream = self.streams[call_id] = Stream()
        self.transport.send(BINARY, HEADER.pack(call_id, kind) + payload)
        items = stream.items
        while True:
            while items:
                yield items.popleft()
            if stream.ended:
                return
            stream.waiter = self.create_future()
            await stream.waiter


class Client(common.AsyncClient):
    def __init__(self, listener):
        self.listener = listener

    def caller(self, kind):
        return self.listener.call if kind == "echo" else functools.partial(self.listener.call, kind=KINDS[kind])

    def items(self, kind, payload):
        return self.listener.stream(KINDS[kind], payload)

    async def idle(self, setup, count):
        return await common.idle_streams(setup, count, lambda: self.listener.stream(IDLE, b""))

    async def close(self):
        self.listener.transport.disconnect()


def server(setup):
    async def main():
        listening = await picows.ws_create_server(
            lambda request: Server(), "127.0.0.1", 0, max_frame_size=MAX_MESSAGE, use_aiofastnet=False
        )
        common.say({"port": listening.sockets[0].getsockname()[1]})
        await common.stdin_closed()

    common.run_loop(setup, main())


def client(setup):
    async def main():
        _, listener = await picows.ws_connect(
            lambda: Listener(setup["options"].get("split", False)),
            f"ws://127.0.0.1:{setup['port']}/",
            max_frame_size=MAX_MESSAGE,
            use_aiofastnet=False,
        )
        await common.async_client(setup, Client(listener))

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
