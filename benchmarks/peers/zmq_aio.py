"""zmq.asyncio DEALER/ROUTER: one frame pair per request with a correlation id, the handler awaited inline (no task per request).

``copy=False`` from 64 KiB on.
"""

import asyncio
import functools
import struct
from collections import deque

import common
import zmq
import zmq.asyncio
from common import BULK, DONE, ECHO, IDLE, KINDS, SINK, SUSPEND, TICK

HEADER = struct.Struct("<IB")  # id, kind; in replies the second field is 1 at the end of a stream
LARGE = 65536


def server(setup):
    async def main():
        context = zmq.asyncio.Context()
        router = context.socket(zmq.ROUTER)
        router.set_hwm(0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        tasks = set()
        large = setup["options"].get("large", False)

        async def tick(peer, head, items, size):
            item = b"x" * size
            for _ in range(items):
                await router.send_multipart((peer, head[:4] + b"\0", item))
                await asyncio.sleep(0)
            await router.send_multipart((peer, head[:4] + b"\1", b""))

        async def serve():
            while True:
                peer, head, payload = await router.recv_multipart(copy=not large)
                if large:
                    head = head.bytes
                kind = head[4]
                if kind == ECHO:
                    await router.send_multipart((peer, head, payload), copy=not large)
                elif kind == SINK:
                    await router.send_multipart((peer, head, DONE))
                elif kind == SUSPEND:
                    await asyncio.sleep(0)
                    await router.send_multipart((peer, head, payload))
                elif kind == BULK:
                    items, size = common.parse_stream_request(payload)
                    item, item_head = b"x" * size, head[:4] + b"\0"
                    for _ in range(items):
                        await router.send_multipart((peer, item_head, item))
                    await router.send_multipart((peer, head[:4] + b"\1", b""))
                elif kind == TICK:
                    task = asyncio.ensure_future(tick(peer, head, *common.parse_stream_request(payload)))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                elif kind == IDLE:
                    await router.send_multipart((peer, head[:4] + b"\0", b"x"))

        serving = asyncio.ensure_future(serve())
        common.say({"port": port})
        await common.stdin_closed()
        serving.cancel()
        context.destroy(linger=0)

    common.run_loop(setup, main())


class Client(common.AsyncClient):
    def __init__(self, dealer, large):
        self.dealer = dealer
        self.large = large
        self.pending = {}
        self.streams = {}
        self.next_id = 0
        self.create_future = asyncio.get_running_loop().create_future
        self.reader = asyncio.ensure_future(self.read())

    async def read(self):
        receive, unpack, large = self.dealer.recv_multipart, HEADER.unpack, self.large
        while True:
            head, payload = await receive(copy=not large)
            call_id, flag = unpack(head.bytes if large else head)
            future = self.pending.pop(call_id, None)
            if future is not None:
                future.set_result(payload.buffer if large else payload)
                continue
            stream = self.streams[call_id]
            if flag == 1:
                stream[1] = True
                del self.streams[call_id]
            else:
                stream[0].append(payload)
            if stream[2] is not None:
                stream[2].set_result(None)
                stream[2] = None

    async def call(self, payload, kind=ECHO):
        call_id = self.next_id
        self.next_id = (call_id + 1) & 0xFFFFFFFF
        future = self.pending[call_id] = self.create_future()
        sent = self.dealer.send_multipart((HEADER.pack(call_id, kind), payload), copy=not self.large)
        if not sent.done():
            await sent
        return await future

    def caller(self, kind):
        return self.call if kind == "echo" else functools.partial(self.call, kind=KINDS[kind])

    async def items(self, kind, payload):
        call_id = self.next_id
        self.next_id = (call_id + 1) & 0xFFFFFFFF
        stream = self.streams[call_id] = [deque(), False, None]  # items, ended, waiter
        await self.dealer.send_multipart((HEADER.pack(call_id, KINDS[kind]), payload))
        items = stream[0]
        while True:
            while items:
                yield items.popleft()
            if stream[1]:
                return
            stream[2] = self.create_future()
            await stream[2]

    async def close(self):
        self.reader.cancel()


def client(setup):
    async def main():
        context = zmq.asyncio.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.set_hwm(0)
        dealer.connect(f"tcp://127.0.0.1:{setup['port']}")
        await common.async_client(setup, Client(dealer, setup["options"].get("large", False)))
        context.destroy(linger=0)

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
