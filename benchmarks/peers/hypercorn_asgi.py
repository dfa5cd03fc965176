"""hypercorn (h2, pure Python) with an ASGI application, in one process."""

import common
import orjson

OCTETS = [(b"content-type", common.OCTETS.encode())]
JSON = [(b"content-type", common.JSON.encode())]
TEXT = [(b"content-type", b"text/plain")]


async def body(receive):
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ConnectionError(message["type"])
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


async def reply(send, headers, content):
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def app(scope, receive, send):
    path = scope["path"]
    if path == common.ECHO_PATH:
        await reply(send, OCTETS, await body(receive))
    elif path == common.JSON_PATH:
        await reply(send, JSON, orjson.dumps(orjson.loads(await body(receive))))
    elif path == common.CHUNKS_PATH:
        await body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": OCTETS})
        for _ in range(common.CHUNKS):
            await send({"type": "http.response.body", "body": common.CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    elif path == common.LIVE_PATH:
        await reply(send, TEXT, common.LIVE_BODY)


def server(setup):
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    port = common.free_port()
    config.bind = [f"127.0.0.1:{port}"]
    config.keep_alive_max_requests = 1 << 60  # the default closes a connection after 1000 requests
    config.h2_max_concurrent_streams = common.MAX_HTTP_STREAMS
    config.accesslog = None
    config.errorlog = None
    config.graceful_timeout = 0.1

    common.say({"port": port})
    common.run_loop(setup, serve(app, config, mode="asgi", shutdown_trigger=common.stdin_closed))


if __name__ == "__main__":
    common.entry(server, None)
