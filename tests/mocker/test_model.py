"""The model directory that ships in the package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dynwire.mocker import TINY_MODEL

ROOT = Path(__file__).parent.parent.parent


def test_the_script_makes_the_same_files(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_tiny_model", ROOT / "tools" / "make_tiny_model.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)
    made, shipped = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, TINY_MODEL))
    assert made == shipped
    assert sum(map(len, shipped.values())) < 100_000


@pytest.mark.parametrize("text", ["Hello, world!", "Grüße, 你好, 🙂👍🏽\n\n\ttabs  and  spaces ", "\x00\x7f", ""])
def test_the_tokenizer_keeps_every_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_files_agree_with_each_other() -> None:
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    config, settings, generation = (
        json.loads((TINY_MODEL / name).read_text()) for name in ("config.json", "tokenizer_config.json", "generation_config.json")
    )
    assert config["vocab_size"] == tokenizer.get_vocab_size() == 1024
    end = tokenizer.token_to_id(settings["eos_token"])
    assert config["eos_token_id"] == end and end in generation["eos_token_id"]
    assert settings["model_max_length"] == config["max_position_embeddings"]
    # a special token in a text is one token, and never appears because of what letters a user types apart
    assert tokenizer.encode("<|im_start|>user").ids[0] == tokenizer.token_to_id("<|im_start|>")
