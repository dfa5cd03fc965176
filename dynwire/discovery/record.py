"""What the backends that store records store: one JSON text per instance."""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import ConfigError, MessageTooLarge
from ..types import Instance
from .base import check_instance

MAX_RECORD_BYTES = 64 * 1024
"""A record is read into memory as a whole; registering a larger one is refused, reading one is skipped."""
TTL_RANGE_S = (0.05, 3600.0)
_MAX_DEPTH = 32  # of metadata; comparing deeper values could exceed the interpreter's recursion limit


class ProcessId(msgspec.Struct, frozen=True):
    """A process, identified so that another process can tell whether it still runs."""

    scope: tuple[str, ...]
    """host name, boot id, pid namespace, time namespace: pid and start mean something only where all four are the same"""
    pid: int
    start: int
    """clock ticks from boot to the start of the process: tells it from a later one with the same pid"""


class Record(msgspec.Struct, frozen=True):
    """What is stored. Unknown fields are ignored, so that later versions may add some."""

    instance: Instance
    ttl: float
    """seconds; the writer promises to renew the record three times as often"""
    process: ProcessId | None = None

    @property
    def effective_ttl(self) -> float:
        low, high = TTL_RANGE_S
        return min(max(self.ttl, low), high)


class BadRecord(Exception):
    """Something that is not a record; the text says why."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


def record_key(instance: Instance) -> str:
    """The name of an instance's record; at most 211 characters, because each part of the path has at most 64."""
    return f"{instance.path}.{instance.id:016x}"


def check_ttl(ttl: float) -> None:
    """Raise `ConfigError` for a time to live out of range."""
    low, high = TTL_RANGE_S
    if not low <= ttl <= high:
        raise ConfigError(
            f"discovery ttl is {ttl!r}; allowed are {low} to {high} seconds", name="ttl", value=ttl, allowed=[low, high]
        )


def encode_record(record: Record, backend: str, limit: int = MAX_RECORD_BYTES) -> tuple[bytes, Instance]:
    """The text of a record, and its instance as every reader will see it.

    Raises `ConfigError` for what readers would skip, and `MessageTooLarge`.
    """
    path = record.instance.path
    try:
        raw = _encoder.encode(record)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"cannot register {path}: its metadata is not JSON ({error})", name="metadata", phase="register"
        ) from error
    if len(raw) > limit:
        raise MessageTooLarge(
            f"the registration of {path} has {len(raw)} bytes, the {backend} backend takes {limit}: shorten its metadata",
            phase="register",
            size=len(raw),
            limit=limit,
            setting="metadata",
        )
    try:
        return raw, decode_record(record_key(record.instance), raw).instance
    except BadRecord as error:
        raise ConfigError(f"cannot register {path}: {error}", name="metadata", phase="register") from error


def decode_record(key: str, raw: bytes) -> Record:
    """The record stored under ``key``. Raises `BadRecord`."""
    try:
        record = _decoder.decode(raw)
        check_instance(record.instance)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as error:
        raise BadRecord(str(error)) from error
    if record_key(record.instance) != key:
        raise BadRecord(f"its contents belong under the name {record_key(record.instance)}")
    if _deeper_than(record.instance.metadata, _MAX_DEPTH):
        raise BadRecord(f"its metadata is nested more than {_MAX_DEPTH} levels deep")
    return record


def _deeper_than(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper_than(v, levels - 1) for v in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper_than(v, levels - 1) for v in value)
    return False
