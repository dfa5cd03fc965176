"""Pages of the http plane that are for people and their tools: what is served, whether it is alive, and how to call it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import orjson


class EndpointInfo(msgspec.Struct):
    """What the pages tell about an endpoint."""

    endpoint: str
    """``namespace.component.endpoint``"""
    streaming: bool = False
    in_flight: int = 0
    max_in_flight: int | None = None
    description: str = ""
    """the handler's docstring, say"""
    request_type: Any = None
    """type that requests are decoded into, or None"""

    def path(self, root: str) -> str:
        """Where it is called."""
        return f"{root}/{self.endpoint.replace('.', '/')}"


def _page(document: dict[str, Any]) -> bytes:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def endpoints_page(entries: Iterable[EndpointInfo], root: str, plane: dict[str, Any]) -> bytes:
    """The list of endpoints; ``plane`` is added at the top (software, address, engine: whatever JSON can carry)."""
    return _page(
        {
            **plane,
            "root": root,
            "endpoints": [
                {
                    "endpoint": entry.endpoint,
                    "path": entry.path(root),
                    "reply": "stream" if entry.streaming else "single",
                    "in_flight": entry.in_flight,
                    **({} if entry.max_in_flight is None else {"max_in_flight": entry.max_in_flight}),
                    **({"description": entry.description} if entry.description else {}),
                }
                for entry in sorted(entries, key=lambda entry: entry.endpoint)
            ],
        }
    )


def live_page() -> bytes:
    """The process answers; status 200."""
    return orjson.dumps({"status": "live"}, option=orjson.OPT_APPEND_NEWLINE)


def ready_page(ready: bool, reasons: Iterable[str] = ()) -> bytes:
    """Whether requests are welcome; status 200 or 503."""
    document: dict[str, Any] = {"status": "ready" if ready else "not ready"}
    if not ready:
        document["reasons"] = list(reasons)
    return orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)


_PROBLEM_SCHEMA = {
    "type": "object",
    "description": "RFC 9457, with the fields of the error of dynwire that it stands for",
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "code": {"type": "string"},
        "phase": {"type": "string"},
        "sent": {"enum": ["no", "maybe", "yes"]},
        "retryable": {"type": "boolean"},
    },
    "required": ["type", "title", "status", "code", "sent", "retryable"],
}
_SHAPES = (
    "application/json",
    "application/x-ndjson",
    "text/event-stream",
    "application/msgpack",
    "application/octet-stream",
)
_PARAMETERS = [
    {
        "name": "x-request-timeout-ms",
        "in": "header",
        "description": "the request ends within this time",
        "schema": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    },
    {"name": "x-request-id", "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": 128}},
]


def openapi_page(entries: Iterable[EndpointInfo], root: str, *, version: str, server: str = "") -> bytes:
    """An OpenAPI 3.1 document with one path per endpoint; ``server`` is the URL that clients reach this worker at.

    A request type gives the schema of the request's body, if msgspec can describe it; replies have no declared type.
    """
    entries = sorted(entries, key=lambda entry: entry.endpoint)
    schemas: dict[str, Any] = {"Problem": _PROBLEM_SCHEMA}
    paths: dict[str, Any] = {}
    for entry in entries:
        schema = _schema(entry.request_type, schemas)
        operation: dict[str, Any] = {
            "operationId": entry.endpoint,
            "tags": [entry.endpoint.rpartition(".")[0]],
            "parameters": [{"$ref": "#/components/parameters/timeout"}, {"$ref": "#/components/parameters/id"}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": schema},
                    "application/msgpack": {"schema": schema},
                    "application/octet-stream": {},
                },
            },
            "responses": {
                "200": {
                    "description": "a stream of items" if entry.streaming else "the reply",
                    "content": {shape: {} for shape in _SHAPES},
                },
                "default": {"$ref": "#/components/responses/Problem"},
            },
        }
        if entry.description:
            operation["description"] = entry.description
        paths[entry.path(root)] = {"post": operation}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "dynwire endpoints", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": {"timeout": _PARAMETERS[0], "id": _PARAMETERS[1]},
            "responses": {
                "Problem": {
                    "description": "the request failed",
                    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }
            },
        },
    }
    if server:
        document["servers"] = [{"url": server}]
    return _page(document)


def _schema(request_type: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if request_type is None:
        return {}
    try:
        (schema,), components = msgspec.json.schema_components([request_type], ref_template="#/components/schemas/{name}")
    except (TypeError, RuntimeError):  # what msgspec cannot describe, it may still decode with hooks
        return {}
    for name, component in components.items():
        # Two types of one name, or one called Problem: its endpoint goes without, which is better than the wrong schema.
        if schemas.setdefault(name, component) != component:
            return {}
    return schema
