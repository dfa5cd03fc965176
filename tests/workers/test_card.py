"""Model cards: from directories as people have them, and through discovery."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.errors import ConfigError, DecodeError, RemoteError
from dynwire.mocker import TINY_MODEL
from dynwire.workers.card import INLINE_BYTES, FileRef, ModelCard, file_ref, find_model, text_ref
from dynwire.workers.serve import ModelService, fetch_file, serve_model


def model(path: Path, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        name = name.replace("__", ".")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_tiny_model() -> None:
    card = ModelCard.from_directory(TINY_MODEL, "tiny")
    assert (card.name, card.context_length, card.eos_token_ids, card.kinds) == ("tiny", 32768, (2, 0), ("chat", "completions"))
    assert card.special_tokens["eos_token"] == "<|im_end|>"
    assert card.tokenizer.read() == (TINY_MODEL / "tokenizer.json").read_bytes()
    assert card.chat_template is not None and b"im_start" in (card.chat_template.read() or b"")


def test_name_and_overrides(tmp_path: Path) -> None:
    card = ModelCard.from_directory(model(tmp_path / "some-model"), block_size=16, context_length=100)
    assert (card.name, card.block_size, card.context_length) == ("some-model", 16, 100)


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    assert ModelCard.from_directory(model(tmp_path / "m")).kinds == ("completions",)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template__jinja": "file"}, "file"),
        ({"chat_template__jinja": "file", "tokenizer_config__json": {"chat_template": "setting"}}, "file"),
        ({"chat_template__json": {"chat_template": "json"}}, "json"),
        ({"tokenizer_config__json": {"chat_template": "setting"}}, "setting"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "t"},
                                                       {"name": "default", "template": "d"}]}}, "d"),
    ],
)  # fmt: skip
def test_where_the_template_is(tmp_path: Path, files: dict[str, Any], expected: str) -> None:
    card = ModelCard.from_directory(model(tmp_path / "m", **files))
    assert card.chat_template is not None
    assert card.chat_template.read() == expected.encode()


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({"config__json": {"max_position_embeddings": 4096}}, 4096),
        ({"config__json": {"n_positions": 1024}}, 1024),
        ({"config__json": {"text_config": {"max_position_embeddings": 2048}}}, 2048),
        ({"tokenizer_config__json": {"model_max_length": 512}}, 512),
        ({"tokenizer_config__json": {"model_max_length": int(1e30)}}, 8192),
        ({}, 8192),
    ],
)
def test_context_length(tmp_path: Path, files: dict[str, Any], length: int) -> None:
    assert ModelCard.from_directory(model(tmp_path / "m", **files)).context_length == length


def test_ids_and_special_tokens(tmp_path: Path) -> None:
    card = ModelCard.from_directory(
        model(
            tmp_path / "m",
            config__json={"eos_token_id": 5, "bos_token_id": 1},
            generation_config__json={"eos_token_id": [7, 8]},
            tokenizer_config__json={
                "bos_token": {"content": "<s>"},
                "eos_token": "</s>",
                "pad_token": None,
                "add_bos_token": True,
            },
            special_tokens_map__json={"eos_token": {"content": "<end>"}},
        )
    )
    assert (card.eos_token_ids, card.bos_token_id, card.add_bos_token) == ((7, 8), 1, True)
    assert card.special_tokens == {"bos_token": "<s>", "eos_token": "<end>"}


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory"):
        ModelCard.from_directory(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(ConfigError, match=r"has no tokenizer.json \(there: weights.bin\)"):
        ModelCard.from_directory(tmp_path)
    model(tmp_path, config__json="{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        ModelCard.from_directory(tmp_path)
    model(tmp_path, config__json="[]")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        ModelCard.from_directory(tmp_path)


# Names -------------------------------------------------------------------------------------------------------------------------


def test_directory_is_itself(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) == tmp_path


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        find_model(str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "a/b/c"])
def test_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="looked for the directory"):
        find_model(name)


def test_hub_name_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="huggingface_hub") as caught:
        find_model("someone/some-model")
    assert "someone/some-model" in str(caught.value)


def test_hub_name_in_the_cache_and_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    real = hub.snapshot_download
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **more: real(name, cache_dir=str(tmp_path), **more))
    with pytest.raises(ConfigError) as caught:
        find_model("someone/some-model")
    text = str(caught.value)
    assert str(tmp_path) in text and "HF_HUB_OFFLINE" in text and "the directory" in text
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--someone--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    model(snapshot)
    assert (find_model("someone/some-model") / "tokenizer.json").is_file()


# Files -------------------------------------------------------------------------------------------------------------------------


def test_small_files_are_in_the_card_and_large_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * INLINE_BYTES)
    (tmp_path / "large").write_bytes(b"x" * (INLINE_BYTES + 1))
    small, large = file_ref(tmp_path / "small"), file_ref(tmp_path / "large")
    assert small.content is not None
    assert large.content is None
    (tmp_path / "small").unlink()
    assert small.read() == b"x" * INLINE_BYTES
    assert large.read() == b"x" * (INLINE_BYTES + 1)
    (tmp_path / "large").write_bytes(b"y" * (INLINE_BYTES + 1))
    assert large.read() is None, "other bytes at the same path are another file"
    (tmp_path / "large").unlink()
    assert large.read() is None


def test_through_metadata() -> None:
    card = ModelCard.from_directory(TINY_MODEL, "tiny")
    metadata = json.loads(json.dumps(card.to_metadata()))
    assert ModelCard.from_metadata(metadata) == card
    assert len(json.dumps(metadata)) < 8192
    assert ModelCard.from_metadata({}) is None
    for broken in ("{", "{}", 5, '{"name": "x", "tokenizer": 5}'):
        with pytest.raises(ConfigError, match="model card"):
            ModelCard.from_metadata({"model_card": broken})


def test_checksum_is_of_contents_and_not_of_paths(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY_MODEL, copy)
    card, other = ModelCard.from_directory(TINY_MODEL, "tiny"), ModelCard.from_directory(copy, "tiny")
    assert card.checksum == other.checksum
    (copy / "tokenizer.json").write_text("{}")
    assert ModelCard.from_directory(copy, "tiny").checksum != card.checksum
    assert ModelCard.from_directory(TINY_MODEL, "tiny", block_size=1).checksum != card.checksum


async def served(manager: dynwire.AsyncNetworkManager, card: ModelCard) -> ModelService:
    async def generate(request: Any) -> Any:
        yield {"token_ids": [1], "finish_reason": "stop"}

    return await serve_model(manager, "test.backend.generate", card, generate)


async def test_files_from_the_worker(tmp_path: Path) -> None:
    path = model(tmp_path / "m", chat_template__jinja="t" * 10_000)
    (path / "tokenizer.json").write_bytes(b"x" * 1_000_000)
    card = ModelCard.from_directory(path, "m")
    async with dynwire.AsyncNetworkManager(request_plane="memory", discovery="mem") as manager:
        service = await served(manager, card)
        (instance,) = await manager.list_instances("test.backend.generate")
        assert instance.id == service.worker_id
        found = ModelCard.from_metadata(instance.metadata)
        assert found is not None
        assert found.files_endpoint == "test.backend.model_files"
        async with await manager.endpoint(found.files_endpoint).client() as client:
            for ref in found.files():
                elsewhere = FileRef(ref.name, ref.sha256, ref.size, "/not/on/this/machine")
                assert await fetch_file(client, elsewhere, instance.metadata["files_instance"]) == ref.read()
            with pytest.raises(RemoteError, match="has no file"):
                await fetch_file(client, FileRef("x", "0" * 64, 10, "/not/here"))
            with pytest.raises(DecodeError, match="the limit is"):
                await fetch_file(client, FileRef("x", "0" * 64, 10**12, "/not/here"))
            # a worker that sends something else, or without end, is not believed
            small = FileRef("x", card.tokenizer.sha256, 10, "/not/here")
            with pytest.raises(DecodeError, match="other bytes"):
                await fetch_file(client, small)
        assert service.ready
        assert await service.drain(1.0) == 0
        assert not service.ready
        assert await manager.list_instances() == ()


async def test_endpoint_that_is_served_already_leaves_nothing_behind() -> None:
    card = ModelCard.from_directory(TINY_MODEL, "tiny")
    async with dynwire.AsyncNetworkManager(request_plane="memory", discovery="mem") as manager:

        async def other(request: Any) -> int:
            return 1

        await manager.endpoint("test.backend.generate").serve(other)
        with pytest.raises(ConfigError):
            await served(manager, card)
        assert [i.endpoint for i in await manager.list_instances()] == ["generate"]


def test_text_is_a_file_too() -> None:
    assert text_ref("x", "é").read() == "é".encode()
