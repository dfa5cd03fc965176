"""Makes a tiny Qwen3 with random weights, for vLLM: ``python tests/vllm/make_model.py DIRECTORY``.

Two layers, the tokenizer of 1,024 tokens and the chat template of `tools/make_tiny_model.py`; 0.7 MB. The weights depend
on the seed only. Needs torch and transformers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CONTEXT_LENGTH = 2048
SEED = 7


def write(directory: Path) -> None:
    """Write tokenizer, configuration and weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    maker = _tokenizer_maker()
    maker.write(directory)
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | {"max_position_embeddings": CONTEXT_LENGTH}
    torch.manual_seed(SEED)
    # 0.02, as usual, would make all tokens almost equally likely, and rounding would decide between them
    model = Qwen3ForCausalLM(Qwen3Config(**settings | {"initializer_range": 0.2})).to(torch.float32)
    model.save_pretrained(directory)
    maker.write(directory)  # the model has brought a configuration of its own
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _tokenizer_maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_tiny_model", ROOT / "tools" / "make_tiny_model.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


if __name__ == "__main__":
    write(Path(sys.argv[1]))
