"""The application without a server: frontend and worker in one process, on the memory plane, in any ASGI server's words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

import dynwire
from dynwire.config import load_config
from dynwire.errors import ConfigError
from dynwire.frontend.app import Frontend
from dynwire.mocker import TINY_MODEL
from dynwire.workers.card import ModelCard
from dynwire.workers.serve import serve_model

from .stack import PATIENCE_S, chat, split_events


async def count(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    limit = request["stop_conditions"]["max_tokens"]
    for number in range(limit):
        yield {"token_ids": [300 + number], "finish_reason": "length" if number == limit - 1 else None}


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[tuple[Frontend, httpx.AsyncClient]]:
    config = load_config({"request_plane": "memory", "discovery": "mem", **settings})
    async with dynwire.AsyncNetworkManager(config=config) as manager:
        await serve_model(manager, "test.backend.generate", ModelCard.from_directory(TINY_MODEL, "tiny"), count)
        frontend = Frontend(config)
        await frontend.startup()
        try:
            transport = httpx.ASGITransport(app=frontend)
            async with httpx.AsyncClient(transport=transport, base_url="http://frontend") as client:
                async with asyncio.timeout(PATIENCE_S):
                    while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110  # it tells nobody
                        await asyncio.sleep(0.005)
                yield frontend, client
        finally:
            await frontend.shutdown()
            await frontend.shutdown()  # lifespan and whoever stops the server may both say it


async def test_memory_plane() -> None:
    async with running() as (frontend, client):
        body = chat("hi", max_tokens=5)
        whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
        found = split_events((await client.post("/v1/chat/completions", json={**body, "stream": True})).text)
        assert found[-1] == "[DONE]"
        assert "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in found[:-1]) == whole
        assert frontend.metrics.of("tiny").output_tokens == 10
        assert frontend.metrics.in_flight == 0


async def test_json_codec() -> None:
    async with running(codec="json") as (_, client):
        reply = (await client.post("/v1/chat/completions", json=chat("hi", max_tokens=5))).json()
        assert reply["usage"]["completion_tokens"] == 5


async def test_lifespan_of_any_server() -> None:
    """``uvicorn dynwire…:app`` and the like start and stop it by ASGI's lifespan."""
    config = load_config({"request_plane": "memory", "discovery": "mem"})
    frontend = Frontend(config)
    to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    from_app: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.create_task(frontend({"type": "lifespan", "state": {}}, to_app.get, from_app.put))  # type: ignore[arg-type]
    await to_app.put({"type": "lifespan.startup"})
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    assert not frontend.manager.closed
    await to_app.put({"type": "lifespan.shutdown"})
    assert (await from_app.get())["type"] == "lifespan.shutdown.complete"
    assert frontend.manager.closed
    await task


async def test_a_bug_is_an_error_for_the_client_and_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (frontend, _):
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(chat("hi", max_tokens=5)).encode(), "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        def broken(*arguments: object) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr("dynwire.frontend.answer.Answer._open", broken)
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        with pytest.raises(ZeroDivisionError):
            await frontend(scope, receive, send)  # type: ignore[arg-type]
        assert sent[0]["status"] == 500
        assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
        assert frontend.metrics.in_flight == 0


@pytest.mark.parametrize(
    ("settings", "text"), [({"event_plane": "none"}, "DYN_EVENT_PLANE is none"), ({"router_kv_events": False}, "--no-kv-events")]
)
def test_replica_sync_without_a_way_is_refused_at_the_start(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Frontend(load_config({"router_mode": "kv", "router_replica_sync": True, **settings}, environ={}))
