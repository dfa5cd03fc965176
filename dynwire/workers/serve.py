"""Serving a model: its endpoint with its card, and its files for frontends on other machines."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

from ..client import AsyncClient
from ..errors import ConfigError, DecodeError
from ..manager import AsyncNetworkManager
from ..service import AsyncService
from ..types import EndpointId
from .card import FILE_LIMIT_BYTES, FileRef, ModelCard

FILES_ENDPOINT = "model_files"
CHUNK_BYTES = 256 * 1024


class ModelService:
    """A served model: two endpoints, drained together."""

    def __init__(self, card: ModelCard, generate: AsyncService, files: AsyncService) -> None:
        self.card = card
        self.generate = generate
        self._files = files

    @property
    def worker_id(self) -> int:
        """Id of the worker in routing and KV events: that of its generate endpoint's instance."""
        return self.generate.instance.id

    @property
    def ready(self) -> bool:
        """True until draining begins."""
        return self.generate.ready

    async def drain(self, grace: float = 30.0) -> int:
        """Stop serving gently; returns how many requests had to be killed."""
        killed = await self.generate.drain(grace)
        await self._files.drain(0.0)
        return killed


async def serve_model(
    manager: AsyncNetworkManager,
    endpoint: str | EndpointId,
    card: ModelCard,
    handler: Callable[..., Any],
    *,
    request_type: Any = None,
    metadata: Mapping[str, Any] | None = None,
    max_in_flight: int | None = None,
) -> ModelService:
    """Serve ``handler`` (an async generator of `EngineItem`, or of dicts of that shape) as a model.

    Requests are `EngineRequest`: dicts, unless ``request_type`` says otherwise. The card goes into the instance's record; the
    files that it only names are served at ``namespace.component.model_files``. Raises what `AsyncEndpoint.serve` raises.
    """
    path = endpoint if isinstance(endpoint, EndpointId) else EndpointId.parse(endpoint)
    files_path = EndpointId(path.namespace, path.component, FILES_ENDPOINT)
    by_checksum = {ref.sha256: ref for ref in card.files()}

    async def send_file(sha256: str) -> AsyncIterator[bytes]:
        ref = by_checksum.get(sha256)
        data = ref.read() if ref is not None else None
        if data is None:
            raise ConfigError(f"the worker of {card.name} has no file {sha256}", name="sha256", value=sha256)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    files = await manager.endpoint(files_path).serve(send_file, request_type=str, max_in_flight=16)
    try:
        named = msgspec.structs.replace(card, files_endpoint=str(files_path))
        generate = await manager.endpoint(path).serve(
            handler,
            request_type=request_type,
            metadata={**(metadata or {}), **named.to_metadata(), "files_instance": files.instance.id},
            max_in_flight=max_in_flight,
        )
    except BaseException:  # cancellation included: the files are nothing without the model
        await files.drain(0.0)
        raise
    return ModelService(named, generate, files)


async def fetch_file(client: AsyncClient, ref: FileRef, instance: int | None = None, timeout: float = 30.0) -> bytes:
    """A file of a card, from this machine or from the worker; ``client`` calls the card's ``files_endpoint``.

    Raises `DecodeError` if the worker sends something else than the card names, and what calls raise.
    """
    data = ref.read()
    if data is not None:
        return data
    if ref.size > FILE_LIMIT_BYTES:
        raise DecodeError(f"{ref.name} would have {ref.size} bytes, the limit is {FILE_LIMIT_BYTES}")
    parts = bytearray()
    async with client.stream(ref.sha256, timeout=timeout, instance=instance) as stream:
        async for part in stream:
            parts += part
            if len(parts) > ref.size:
                break
    if hashlib.sha256(parts).hexdigest() != ref.sha256:
        raise DecodeError(f"{ref.name}: the worker sent other bytes than its model card names")
    return bytes(parts)
