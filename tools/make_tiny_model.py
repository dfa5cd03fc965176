"""Makes the tiny model directory that ships in the package: ``python tools/make_tiny_model.py [DIRECTORY]``.

A byte-level BPE tokenizer of 1,024 tokens, trained on the text of the simulated engine and a few lines of other kinds, with a
chat template and a configuration like Qwen3's. There are no weights. The result depends on nothing but the files read here;
`tests/mocker/test_model.py` makes it again and compares. Needs the `tokenizers` package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = Path(__file__).resolve().parent.parent / "dynwire" / "mocker"

VOCABULARY = 1024
CONTEXT_LENGTH = 32768

END_OF_TEXT, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

OTHER_LINES = (
    "system user assistant tool function name content role arguments result",
    "Hello! Hello, how are you? What is the capital of France? Tell me a story about the sea. Explain this to me, please.",
    "You are a helpful assistant. Answer in one sentence. Thank you very much.",
    "def main(argument): return argument if argument is not None else []  # comment",
    '{"name": "value", "number": 1234567890, "list": [1, 2, 3], "true": false}',
    "0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 60 64 70 80 90 100 128 256 512 1000 1024 2000 2024 2025 2026",
    "Grüße aus München, où est la gare, ¿dónde está la biblioteca?, добрый день, こんにちは, 你好, 안녕하세요, 🙂 👍",
)

TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- raise_exception('unknown role ' ~ message.role) }}"
    "{%- endif %}"
    "{{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') ~ '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (PACKAGE / "text.txt").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([*lines, *OTHER_LINES], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def write(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    end_of_text, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in (END_OF_TEXT, BEGIN, END)
    }
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT_LENGTH,
            "added_tokens_decoder": added,
            "additional_special_tokens": [BEGIN, END],
            "bos_token": None,
            "eos_token": END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT_LENGTH,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": end_of_text,
            "torch_dtype": "float32",
        },
        "generation_config.json": {
            "eos_token_id": [end, end_of_text],
            "pad_token_id": end_of_text,
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE / "model")
