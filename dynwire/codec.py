"""Payloads: bytes-like objects travel raw, everything else through msgpack (msgspec) or JSON (orjson). Never pickle."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import orjson

from ._buffers import Payload
from .errors import ConfigError, DecodeError

KIND_RAW = 0
KIND_MSGPACK = 1
KIND_JSON = 2

KINDS: dict[str, int] = {"raw": KIND_RAW, "msgpack": KIND_MSGPACK, "json": KIND_JSON}
"""Name of a codec to its number on the wire; ``raw`` is what bytes-like payloads use."""

NAMES = ("raw", "msgpack", "json")
"""The reverse of `KINDS`."""

_OBJECTS = frozenset({dict, list, tuple, str, int, float, bool, type(None), set, frozenset})
# Types without a buffer, so that they need no attempt to make a memoryview, which costs an exception.


def _foreign(obj: object) -> object:
    """What msgspec cannot encode by itself: a received payload inside of an object goes out as bytes again."""
    if isinstance(obj, Payload):
        return memoryview(obj)
    raise NotImplementedError(f"Encoding objects of type {type(obj).__module__}.{type(obj).__qualname__} is unsupported")


msgpack_encode = msgspec.msgpack.Encoder(enc_hook=_foreign).encode
_msgpack_decode = msgspec.msgpack.Decoder().decode


def check_codec(codec: str) -> str:
    """Return ``codec`` if it is one that objects can travel in; raises `ConfigError`."""
    if codec not in ("msgpack", "json"):
        raise ConfigError(
            f"unknown codec {codec!r}; allowed is 'msgpack' or 'json' (bytes-like payloads travel raw with either)",
            name="codec",
            value=codec,
            allowed=("msgpack", "json"),
        )
    return codec


def is_bytes_like(obj: object) -> bool:
    """True if ``obj`` supports the buffer protocol, which makes it a raw payload."""
    if type(obj) in _OBJECTS:
        return False
    if isinstance(obj, (bytes, bytearray, memoryview, Payload)):
        return True
    try:
        memoryview(obj).release()  # type: ignore[arg-type]  # the question is whether it has a buffer
    except TypeError:
        return False
    return True


def encode(obj: Any, codec: str) -> bytes:
    """Encode ``obj`` with ``"msgpack"`` or ``"json"``, msgspec structs and dataclasses included.

    Raises `DecodeError` with phase ``encode`` if the codec has no form for it.
    """
    try:
        if codec == "msgpack":
            return msgpack_encode(obj)
        check_codec(codec)
        return orjson.dumps(obj, default=msgspec.to_builtins)
    except (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError, msgspec.MsgspecError) as error:
        raise DecodeError(f"cannot encode {type(obj).__name__} as {codec}: {error}", phase="encode") from error


@functools.lru_cache(maxsize=512)
def _decoder(codec: str, wanted: Any) -> Any:
    decoder = msgspec.msgpack.Decoder if codec == "msgpack" else msgspec.json.Decoder
    return decoder(wanted).decode


def decode(data: Any, codec: str, type: Any = None) -> Any:  # the parameter is what callers know as reply_type
    """Decode bytes-like ``data``; ``type`` is anything msgspec decodes into, None means plain objects.

    Raises `DecodeError` if the data is not valid or does not match the type.
    """
    try:
        if type is not None:
            return _decoder(check_codec(codec), type)(data)
        if codec == "msgpack":
            return _msgpack_decode(data)
        check_codec(codec)
        return orjson.loads(data if isinstance(data, bytes) else memoryview(data))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        wanted = f" as {getattr(type, '__name__', type)}" if type is not None else ""
        raise DecodeError(f"a payload of {len(data)} bytes is not valid {codec}{wanted}: {error}") from error


def decode_raw(payload: Payload, type: Any = None) -> Any:
    """A raw payload in the form that ``type`` asks for: None or `Payload` (no copy), bytes, bytearray or memoryview.

    Raises `DecodeError` for any other type, because raw bytes have no structure.
    """
    if type is None or type is Payload or type is Any:
        return payload
    if type is bytes:
        return bytes(payload)
    if type is bytearray:
        return bytearray(payload)
    if type is memoryview:
        return memoryview(payload)
    raise DecodeError(
        f"a raw payload of {len(payload)} bytes cannot be decoded as {getattr(type, '__name__', type)}: the sender passed "
        "a bytes-like object, which travels without a codec"
    )


def unpack(kind: int, data: Any, type: Any = None) -> Any:
    """Decode what arrived with this number of a codec (`KINDS`); raw data must be a `Payload`. Raises `DecodeError`."""
    if kind == KIND_RAW:
        return decode_raw(data, type)
    return decode(data, NAMES[kind], type)


def pack(obj: Any, codec: str) -> tuple[int, Payload | bytes]:
    """``(kind, data)`` of a payload; a bytes-like one is copied, so that its owner may reuse it. Raises `DecodeError`."""
    if is_bytes_like(obj):
        return KIND_RAW, Payload(obj)
    return KINDS[codec], encode(obj, codec)
