"""A router process for the tests of the jetstream event plane: ``router_process.py [hang]``, settings from the environment.

Prints ``ready``, then ``blocks N`` whenever a line comes in. With ``hang`` it stops for ever in the middle of its first snapshot,
when two parts of it are stored, and prints ``uploading``.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from nats.js.client import JetStreamContext

import dynwire
from dynwire.event_plane import stream
from dynwire.kv_router.indexer import KvIndexer


def say(text: str) -> None:
    print(text, flush=True)


def hang_in_upload() -> None:
    stream.CHUNK_BYTES = 4096
    publish = JetStreamContext.publish
    parts = 0

    async def slow(self: JetStreamContext, subject: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal parts
        if subject.startswith("$O.") and ".C." in subject:
            parts += 1
            if parts > 2:
                say("uploading")
                await asyncio.Event().wait()
        return await publish(self, subject, *args, **kwargs)

    JetStreamContext.publish = slow  # type: ignore[method-assign,assignment]


async def main() -> None:
    async with dynwire.AsyncNetworkManager() as manager:
        index = KvIndexer(manager, "demo", "worker", router_id=manager.config.router.id)
        await index.start()
        say("ready")
        while await asyncio.to_thread(sys.stdin.readline):
            say(f"blocks {index.tree.entries}")
        await index.close()


if "hang" in sys.argv:
    hang_in_upload()
asyncio.run(main())
