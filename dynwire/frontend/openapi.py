"""``/openapi.json``: the description of the routes, made from the types that read the bodies."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from .._version import __version__
from .schema import ChatRequest, CompletionRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_FAILURES = {
    "400": "the body is wrong; error.param names the field",
    "401": "no API key, or a wrong one",
    "404": "nobody serves the model",
    "413": "the body is too large",
    "429": "too many requests are in flight; Retry-After says when to come back",
    "500": "the engine or the frontend failed",
    "502": "the worker was lost",
    "503": "no worker, all are busy, or the frontend is shutting down; Retry-After says when to come back",
    "504": "the answer took too long",
}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answers(what: str, summary: str, body: str) -> dict[str, Any]:
    failures = {
        status: {"description": text, "content": _json({"$ref": "#/components/schemas/Error"})}
        for status, text in _FAILURES.items()
    }
    reply = {
        "description": f"{what}; with stream: true, server-sent events 'data: {{chunk}}', the last one 'data: [DONE]'",
        "content": {**_json({"type": "object"}), "text/event-stream": {"schema": {"type": "string"}}},
    }
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json({"$ref": f"#/components/schemas/{body}"})},
            "responses": {"200": reply, **failures},
        }
    }


def _get(summary: str, media: str = "application/json", **more: Any) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": "OK", "content": {media: {}}}}, **more}}


@functools.lru_cache(maxsize=2)
def document(with_keys: bool) -> dict[str, Any]:
    """The OpenAPI document; ``with_keys`` if clients have to show one."""
    _, components = msgspec.json.schema_components([ChatRequest, CompletionRequest], ref_template="#/components/schemas/{name}")
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "dynwire frontend", "version": __version__},
        "paths": {
            "/v1/chat/completions": _answers("the answer", "Continue a conversation", "ChatRequest"),
            "/v1/completions": _answers("the answer", "Continue a text", "CompletionRequest"),
            "/v1/models": _get("Models that are served"),
            "/v1/models/{name}": _get("One of them", parameters=[name]),
            "/health": _get("200 if requests can be served, otherwise 503 with the reason"),
            "/live": _get("200 while the process runs"),
            "/metrics": _get("Metrics for Prometheus", "text/plain"),
            "/state.json": _get("What the page at / shows"),
        },
        "components": {"schemas": {**components, "Error": _ERROR}},
    }
    if with_keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made
