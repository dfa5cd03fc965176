"""stario: Cython over a bundled nghttp2. Needs Python 3.12; handlers are coroutines, the writer sends."""

import os
import signal

import common
import orjson
import stario.json
from stario import App, Route, ServerConfig, Span, serve
from stario.http.compression import CompressionConfig
from stario.telemetry.noop import NoOpTracer

OCTETS, JSON = common.OCTETS.encode(), common.JSON.encode()


async def echo(c, w):
    w.respond(await c.req.body(), OCTETS)


async def json(c, w):
    w.respond(orjson.dumps(orjson.loads(await c.req.body())), JSON)


async def chunks(c, w):
    await c.req.body()
    w.headers.set("content-type", common.OCTETS)
    w.write_headers(200)
    for _ in range(common.CHUNKS):
        w.write(common.CHUNK)
    w.end()


async def live(c, w):
    w.respond(common.LIVE_BODY, b"text/plain")


async def bootstrap(app: App, span: Span):
    app.add(Route("POST", common.ECHO_PATH), echo)
    app.add(Route("POST", common.JSON_PATH), json)
    app.add(Route("POST", common.CHUNKS_PATH), chunks)
    app.add(Route("GET", common.LIVE_PATH), live)
    yield


def server(setup):
    port = common.free_port()
    stario.json.set_codec(orjson.dumps, orjson.loads)
    config = ServerConfig(
        host="127.0.0.1",
        port=port,
        compression=CompressionConfig(zstd_level=-1, brotli_level=-1, gzip_level=-1),
        graceful_shutdown_timeout=0,
    )
    common.end_with_stdin(lambda: os.kill(os.getpid(), signal.SIGTERM))

    async def main():
        with NoOpTracer() as tracer:
            await serve(bootstrap, config=config, tracer=tracer)

    common.say({"port": port})
    common.run_loop(setup, main())


if __name__ == "__main__":
    common.entry(server, None)
