"""A server that answers like an OpenAI-compatible one, or wrongly in the ways that the model's name asks for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any


def chunk(content: str | None = None, **more: Any) -> bytes:
    delta = {"role": "assistant", "content": ""} if content is None else {"content": content}
    value = {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **more}
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def stream(tokens: int) -> list[bytes]:
    """The events of a whole answer. Contents look as much like the structure around them as they can."""
    events = [chunk(None)]
    events += [chunk(f'{n}, "error" [DONE?] "finish_reason":"stop" \n\n {{"prompt_tokens"') for n in range(tokens)]
    events.append(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n')
    usage = {"prompt_tokens": 11, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 8}}
    events.append(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    events.append(b"data: [DONE]\n\n")
    return events


def reply(body: bytes, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(tokens: int) -> bytes:
    return STREAM_HEAD + b"".join(map(chunked, stream(tokens))) + b"0\r\n\r\n"


def error(message: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "server_error", "code": code, "param": None}}).encode()


async def until(condition: Callable[[], bool]) -> None:
    """Poll: what is waited for happens in another process, or tells nobody."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


class Server:
    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[bytes] = []
        self.at_once = 0
        self.most_at_once = 0
        self.gate = asyncio.Event()
        """model "gate" answers when it is set"""
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.headers.append(head)
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.partition(b":")[2])
                body = await reader.readexactly(length)
                if head.startswith(b"GET"):
                    writer.write(reply(b'{"object": "list", "data": [{"id": "ok"}]}'))
                    continue
                self.bodies.append(json.loads(body))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    if not await self.answer(self.bodies[-1], writer):
                        return
                finally:
                    self.at_once -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        model, tokens = request["model"], request["max_tokens"]
        if model == "refuse":
            writer.write(reply(error("too much to do", "overloaded"), "503 Service Unavailable"))
        elif model == "page":
            writer.write(reply(b"<h1>Bad gateway</h1>", "502 Bad Gateway", "text/html"))
        elif model == "middle":
            writer.write(
                STREAM_HEAD + chunked(b"".join(stream(tokens)[:3])) + chunked(b"data: " + error("gone", "worker_lost") + b"\n\n")
            )
            writer.write(b"0\r\n\r\n")
        elif model == "cut":
            writer.write(STREAM_HEAD + chunked(b"".join(stream(tokens)[:3])))
            return False
        elif model == "endless":
            writer.write(STREAM_HEAD + chunked(b"".join(stream(tokens)[:-1])) + b"0\r\n\r\n")
        elif model == "garbage":
            writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        elif model == "silent":
            return False
        elif model == "hang":
            writer.write(STREAM_HEAD + chunked(b"".join(stream(tokens)[:3])))
            await asyncio.Event().wait()
        else:
            if model == "gate":
                await self.gate.wait()
            if model == "pause":
                await asyncio.sleep(0)
            writer.write(whole(tokens) if request["stream"] else reply(_plain(tokens)))
        return bool(model != "forgetful")  # closes a kept connection without having said so


def _plain(tokens: int) -> bytes:
    usage = {"prompt_tokens": 11, "completion_tokens": tokens}
    return json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": usage}).encode()


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await server.handle(reader, writer)
        except asyncio.CancelledError:
            writer.close()
        finally:
            tasks.discard(task)

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listening.wait_closed()
