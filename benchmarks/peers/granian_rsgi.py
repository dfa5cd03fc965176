"""granian (Rust, hyper) with an RSGI application: one worker process with one runtime thread, uvloop."""

import os
import signal

import common
import orjson

OCTETS = [("content-type", common.OCTETS)]
JSON = [("content-type", common.JSON)]
TEXT = [("content-type", "text/plain")]


async def app(scope, protocol):
    path = scope.path
    if path == common.ECHO_PATH:
        protocol.response_bytes(200, OCTETS, await protocol())
    elif path == common.JSON_PATH:
        protocol.response_bytes(200, JSON, orjson.dumps(orjson.loads(await protocol())))
    elif path == common.CHUNKS_PATH:
        await protocol()
        transport = protocol.response_stream(200, OCTETS)
        for _ in range(common.CHUNKS):
            await transport.send_bytes(common.CHUNK)
    elif path == common.LIVE_PATH:
        protocol.response_bytes(200, TEXT, common.LIVE_BODY)
    else:
        protocol.response_empty(404, [])


def server(setup):
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops, RuntimeModes
    from granian.http import HTTP2Settings

    port = common.free_port()
    serving = Granian(
        "granian_rsgi:app",
        address="127.0.0.1",
        port=port,
        interface=Interfaces.RSGI,
        workers=1,
        runtime_threads=1,
        runtime_mode=RuntimeModes(setup["options"].get("runtime", "st")),
        loop=Loops(setup["loop"]),
        http=HTTPModes.http2,
        http2_settings=HTTP2Settings(max_concurrent_streams=common.MAX_HTTP_STREAMS),
        log_enabled=False,
        backpressure=common.MAX_HTTP_STREAMS,
    )
    common.end_with_stdin(lambda: os.kill(os.getpid(), signal.SIGTERM))
    common.say({"port": port})
    serving.serve()


if __name__ == "__main__":
    common.entry(server, None)
