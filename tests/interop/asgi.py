"""An ASGI application for hypercorn: echoes, streams lines, and says which HTTP it was asked in."""

from __future__ import annotations

import json
from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = dict(scope["headers"])
    name = scope["path"].rpartition("/")[2]
    kind = headers.get(b"content-type", b"application/octet-stream")
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)] or [b""]
    if name == "version":
        kind, pieces = b"application/json", [json.dumps(scope["http_version"]).encode()]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
