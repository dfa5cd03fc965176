"""nats-py by hand, as its documentation has it: request with the client's one inbox, a callback that responds; for streams the
worker publishes the items to an inbox of the client, which has one wildcard subscription for all its streams.

An empty message ends a stream. There is no flow control: what the client does not read piles up in nats-py and in the server.
"""

import asyncio
import functools
import itertools
from collections import deque

import common
import nats
from common import DONE

TIMEOUT_S = 10.0
SUBJECT = "bench."


async def connect(setup):
    return await nats.connect(setup["nats"], allow_reconnect=False)


def server(setup):
    async def main():
        connection = await connect(setup)
        tasks = set()

        async def echo(message):
            await message.respond(message.data)

        async def sink(message):
            await message.respond(DONE)

        async def bulk(message):
            items, size = common.parse_stream_request(message.data)
            item, publish, inbox = b"x" * size, connection.publish, message.reply
            for _ in range(items):
                await publish(inbox, item)
            await publish(inbox)

        async def ticking(message):
            items, size = common.parse_stream_request(message.data)
            item, publish, inbox = b"x" * size, connection.publish, message.reply
            for _ in range(items):
                await publish(inbox, item)
                await asyncio.sleep(0)
            await publish(inbox)

        async def suspending(message):
            await asyncio.sleep(0)
            await message.respond(message.data)

        def in_a_task(function):
            async def start(message):  # a subscription's callbacks run one after the other
                task = asyncio.create_task(function(message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            return start

        handlers = {"echo": echo, "sink": sink, "bulk": bulk, "tick": in_a_task(ticking), "suspend": in_a_task(suspending)}
        for name, handler in handlers.items():
            await connection.subscribe(SUBJECT + name, cb=handler)
        await connection.flush()
        common.say({"port": 0})
        await common.stdin_closed()
        await connection.close()

    common.run_loop(setup, main())


class Client(common.AsyncClient):
    def __init__(self, connection):
        self.connection = connection
        self.numbers = itertools.count()
        self.inbox = connection.new_inbox() + "."
        self.streams = {}

    async def start(self):
        await self.connection.subscribe(self.inbox + "*", cb=self.arrived)

    async def call(self, payload, subject=SUBJECT + "echo"):
        return (await self.connection.request(subject, payload, TIMEOUT_S)).data

    def caller(self, kind):
        return functools.partial(self.call, subject=SUBJECT + kind)

    async def arrived(self, message):
        stream = self.streams[message.subject]
        stream[0].append(message.data)
        if stream[1] is not None:
            stream[1].set_result(None)
            stream[1] = None

    async def items(self, kind, payload):
        inbox = self.inbox + str(next(self.numbers))
        stream = self.streams[inbox] = [deque(), None]  # items, waiter
        items = stream[0]
        try:
            await self.connection.publish(SUBJECT + kind, payload, inbox)
            while True:
                while items:
                    item = items.popleft()
                    if not item:
                        return
                    yield item
                stream[1] = asyncio.get_running_loop().create_future()
                await stream[1]
        finally:
            del self.streams[inbox]

    async def close(self):
        await self.connection.close()


def client(setup):
    async def main():
        made = Client(await connect(setup))
        await made.start()
        await common.async_client(setup, made)

    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, client)
