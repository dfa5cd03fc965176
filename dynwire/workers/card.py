"""Model cards: what a worker says of its model when it registers, so that a frontend can serve it.

A card travels in the metadata of the worker's instance, so it is small: tokenizer and chat template are named by path and
checksum. A frontend that finds the same bytes at that path reads them there; otherwise it asks the worker for them
(`dynwire.workers.serve`). Templates of up to `INLINE_BYTES` are in the card itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConfigError

METADATA_KEY = "model_card"
"""of an instance's metadata"""
INLINE_BYTES = 4096
"""A file up to this size is part of the card. Records of discovery are read by every frontend at every change."""
FILE_LIMIT_BYTES = 64 * 1024 * 1024
"""Larger tokenizers do not exist; a peer that offers one is wrong."""
DEFAULT_CONTEXT_LENGTH = 8192
DEFAULT_BLOCK_SIZE = 64


class FileRef(msgspec.Struct, omit_defaults=True, frozen=True):
    """A file of the model: by content if it is small, otherwise by path and checksum."""

    name: str
    sha256: str
    size: int
    path: str | None = None
    content: bytes | None = None

    def read(self) -> bytes | None:
        """The bytes, from the card or this machine's disk; None if they are not there, or are others."""
        if self.content is not None:
            return self.content
        if self.path is None:
            return None
        try:
            data = Path(self.path).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == self.sha256 else None


class EngineLimits(msgspec.Struct, omit_defaults=True, frozen=True):
    """What one worker can hold, for busy thresholds and routing."""

    total_blocks: int | None = None
    max_sequences: int | None = None
    max_batched_tokens: int | None = None
    dp_size: int = 1


class ModelCard(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What a frontend has to know of a model."""

    name: str
    tokenizer: FileRef
    """``tokenizer.json``"""
    chat_template: FileRef | None = None
    """jinja2 source; without one the model has no chat endpoint"""
    kinds: tuple[str, ...] = ("chat", "completions")
    context_length: int = DEFAULT_CONTEXT_LENGTH
    """tokens of prompt and answer together"""
    block_size: int = DEFAULT_BLOCK_SIZE
    """tokens per block of the KV cache; router and engine have to agree on it"""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: dict[str, str] = {}
    """names as chat templates use them (``bos_token``, ``eos_token``, …), to their text"""
    add_bos_token: bool = False
    limits: EngineLimits = EngineLimits()
    files_endpoint: str | None = None
    """endpoint of the worker that hands out the files by checksum"""

    @property
    def checksum(self) -> str:
        """Of what two workers of one model have to agree on; files by content, not by path."""
        parts = (
            self.name,
            self.tokenizer.sha256,
            self.chat_template.sha256 if self.chat_template is not None else None,
            self.kinds,
            self.context_length,
            self.block_size,
            self.eos_token_ids,
        )
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]

    def files(self) -> tuple[FileRef, ...]:
        """All files of the card."""
        return tuple(ref for ref in (self.tokenizer, self.chat_template) if ref is not None)

    def to_metadata(self) -> dict[str, Any]:
        """The card as the ``metadata=`` of `serve`; JSON and msgpack can carry it."""
        return {METADATA_KEY: msgspec.json.encode(self).decode()}

    @classmethod
    def from_metadata(cls, metadata: Any) -> ModelCard | None:
        """The card in an instance's metadata; None if there is none. Raises `ConfigError` if it cannot be read."""
        text = metadata.get(METADATA_KEY)
        if text is None:
            return None
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, TypeError) as error:
            raise ConfigError(
                f"the model card of a worker cannot be read: {error}", name=METADATA_KEY, value=str(text)[:200]
            ) from error

    @classmethod
    def from_directory(cls, path: str | Path, name: str | None = None, **overrides: Any) -> ModelCard:
        """The card of a local directory as Hugging Face models have it; ``overrides`` are fields of the card.

        Reads ``tokenizer.json`` (required), ``config.json``, ``generation_config.json``, ``tokenizer_config.json``,
        ``special_tokens_map.json``, ``chat_template.jinja`` or ``chat_template.json``. Raises `ConfigError` that says what was
        looked for and where.
        """
        directory = Path(path).resolve()
        if not directory.is_dir():
            raise ConfigError(
                f"{path} is no directory with a model", name="model", value=str(path), allowed="a directory, or a hub name"
            )
        tokenizer = directory / "tokenizer.json"
        if not tokenizer.is_file():
            there = ", ".join(sorted(entry.name for entry in directory.iterdir())[:20]) or "nothing"
            raise ConfigError(
                f"{directory} has no tokenizer.json (there: {there}); other kinds of tokenizer have to be converted to it first",
                name="model",
                value=str(path),
                allowed="a directory with tokenizer.json",
            )
        config = _read_json(directory / "config.json")
        generation = _read_json(directory / "generation_config.json")
        settings = _read_json(directory / "tokenizer_config.json")
        texts = {
            key: text for key, value in settings.items() if key.endswith("_token") and (text := _token_text(value)) is not None
        }
        texts |= {
            key: text
            for key, value in _read_json(directory / "special_tokens_map.json").items()
            if (text := _token_text(value)) is not None
        }
        fields: dict[str, Any] = {
            "name": name or directory.name,
            "tokenizer": file_ref(tokenizer),
            "chat_template": _chat_template(directory, settings),
            "context_length": _context_length(config, settings),
            "bos_token_id": _first_id(generation.get("bos_token_id", config.get("bos_token_id"))),
            "eos_token_ids": _ids(generation.get("eos_token_id", config.get("eos_token_id"))),
            "special_tokens": texts,
            "add_bos_token": bool(settings.get("add_bos_token", False)),
        }
        fields |= overrides
        if fields["chat_template"] is None and "kinds" not in overrides:
            fields["kinds"] = ("completions",)
        return cls(**fields)


def find_model(model: str) -> Path:
    """The directory of a model: a path, or a name on the Hugging Face hub whose files are in its cache or can be fetched.

    Fetching needs ``huggingface_hub`` and is not tried when HF_HUB_OFFLINE is set there. Raises `ConfigError` that says what was
    looked for and where.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ConfigError(f"{model} is a file; a model is a directory with tokenizer.json", name="model", value=model)
    looked = [f"the directory {directory.absolute()}"]
    if model.count("/") > 1 or model.startswith(("/", ".", "~")):
        raise ConfigError(
            f"no model {model}: looked for {looked[0]}", name="model", value=model, allowed="a directory, or a hub name"
        )
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(
            f"no model {model}: looked for {looked[0]}; names on the hub need huggingface_hub (pip install huggingface_hub)",
            name="model",
            value=model,
            allowed="a directory, or a hub name",
        ) from error
    patterns = ["tokenizer*", "*config.json", "special_tokens_map.json", "chat_template*"]
    looked.append(f"the cache {constants.HF_HUB_CACHE}")
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        looked.append("the Hugging Face hub" if not constants.HF_HUB_OFFLINE else "not the hub: HF_HUB_OFFLINE is set")
        text = f"no model {model}: looked for {'; '.join(looked)} ({type(error).__name__})"
        raise ConfigError(text, name="model", value=model, allowed="a directory, or a hub name") from error


def file_ref(path: Path) -> FileRef:
    """A file of this machine, by content if it is small. Raises `ConfigError` if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", name="model", value=str(path)) from error
    if len(data) > FILE_LIMIT_BYTES:
        raise ConfigError(f"{path} has {len(data)} bytes, the limit is {FILE_LIMIT_BYTES}", name="model", value=str(path))
    return FileRef(path.name, hashlib.sha256(data).hexdigest(), len(data), str(path), data if len(data) <= INLINE_BYTES else None)


def text_ref(name: str, text: str) -> FileRef:
    """A file that is a part of another one: always by content."""
    data = text.encode()
    return FileRef(name, hashlib.sha256(data).hexdigest(), len(data), None, data)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", name="model", value=str(path)) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object", name="model", value=str(path))
    return found


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> FileRef | None:
    source = directory / "chat_template.jinja"
    if source.is_file():
        return file_ref(source)
    template = _read_json(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return text_ref("chat_template.jinja", template) if isinstance(template, str) else None


def _context_length(config: dict[str, Any], settings: dict[str, Any]) -> int:
    inner = config.get("text_config")
    for source in (config, inner if isinstance(inner, dict) else {}):
        for key in ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length"):
            value = source.get(key)
            if isinstance(value, int) and value > 0:
                return value
    value = settings.get("model_max_length")
    if isinstance(value, int) and 0 < value < 10**9:  # without a limit, transformers writes 10^30
        return value
    return DEFAULT_CONTEXT_LENGTH


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(i for i in value if isinstance(i, int)) if isinstance(value, list) else ()


def _first_id(value: Any) -> int | None:
    found = _ids(value)
    return found[0] if found else None
