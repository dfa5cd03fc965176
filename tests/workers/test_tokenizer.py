"""Tokens to text while they arrive, against the library's own decoding of the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

pytest.importorskip("tokenizers")

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from dynwire.errors import ConfigError
from dynwire.mocker import TINY_MODEL
from dynwire.workers.tokenizer import StopStrings, Tokenizer

TEXTS = [
    "Hello, world!",
    "Grüße aus Köln, naïve café",
    "日本語のテキスト、漢字とかな",
    "🎉👩‍👩‍👧‍👦 flags 🇩🇪 and skin 👍🏽",
    'quotes " and \\ backslashes\nlines\ttabs\x00\x1f controls \u2028 separators',
    "  leading and   inner spaces  ",
    "mixed: é🎉é日é",
]
CORPUS = [text for text in TEXTS[:2] for _ in range(5)] + ["hello world and other words of the same kind"] * 5


def byte_level() -> Library:
    return Library.from_file(str(TINY_MODEL / "tokenizer.json"))


def sentencepiece() -> Library:
    """As Llama 2 and Gemma have it: ``▁`` for spaces, and bytes for what is not in the vocabulary."""
    made = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator(CORPUS, BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"]))
    source = json.loads(made.to_str())
    vocabulary = source["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    made = Library.from_str(json.dumps(source))
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return made


def metaspace() -> Library:
    made = Library(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    alphabet = sorted({c for text in TEXTS for c in text} - {" "})
    made.train_from_iterator(CORPUS, BpeTrainer(vocab_size=300, special_tokens=["<unk>"], initial_alphabet=alphabet))
    return made


def word_piece() -> Library:
    made = Library(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(CORPUS, WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"]))
    return made


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace, "word_piece": word_piece}


@pytest.fixture(scope="module", params=KINDS)
def library(request: pytest.FixtureRequest) -> Library:
    made: Library = KINDS[request.param]()
    return made


def ours(library: Library) -> Tokenizer:
    return Tokenizer(library.to_str().encode())


def chunks(ids: list[int], rng: random.Random) -> Iterator[list[int]]:
    while ids:
        size = rng.choice((1, 1, 2, 5))
        yield ids[:size]
        ids = ids[size:]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(library: Library, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = ours(library)
    ids = library.encode(text, add_special_tokens=False).ids
    expected = library.decode(ids)
    if request.node.callspec.params["library"] in ("sentencepiece", "metaspace"):
        expected = " " + expected  # an answer continues a prompt: the space at its beginning stays
    for seed in range(5):
        detokenizer = tokenizer.detokenizer()
        pieces = [detokenizer.push(part) for part in chunks(ids, random.Random(seed))]
        pieces.append(detokenizer.flush())
        assert "".join(pieces) == expected
        if "�" not in expected:
            assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_json_pieces_are_the_same(library: Library, text: str) -> None:
    tokenizer = ours(library)
    ids = library.encode(text, add_special_tokens=False).ids
    plain = tokenizer.detokenizer()
    expected = "".join([plain.push([i]) for i in ids]) + plain.flush()
    for seed in range(5):
        rng = random.Random(seed)
        detokenizer = tokenizer.detokenizer()
        found = b""
        for part in chunks(ids, rng):  # the two ways mixed, as stop strings and plain answers use them
            found += detokenizer.push_json(part) if rng.random() < 0.8 else orjson.dumps(detokenizer.push(part))[1:-1]
        found += orjson.dumps(detokenizer.flush())[1:-1]
        assert orjson.loads(b'"' + found + b'"') == expected


def test_which_ones_are_tables(library: Library, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["library"]
    assert ours(library).by_table == (kind != "word_piece")


def test_half_a_character_is_held_back() -> None:
    library = byte_level()
    tokenizer = ours(library)
    ids = library.encode("🎉", add_special_tokens=False).ids
    assert len(ids) > 1, "the test needs a character of several tokens"
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == [""] * (len(ids) - 1) + ["🎉"]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_broken_character_does_not_swallow_the_next() -> None:
    library = byte_level()
    half = library.encode("🎉", add_special_tokens=False).ids[:-1]
    detokenizer = ours(library).detokenizer()
    text = detokenizer.push(half) + detokenizer.push(library.encode("ok", add_special_tokens=False).ids) + detokenizer.flush()
    assert text == "�ok"


def test_special_tokens_are_no_text_unless_wanted() -> None:
    tokenizer = ours(byte_level())
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.detokenizer().push(ids) == "ab"
    assert tokenizer.detokenizer(skip_special=False).push(ids) == "a<|im_end|>b"
    assert tokenizer.token_bytes(2) == b"<|im_end|>"


def test_added_tokens_that_are_text() -> None:
    library = byte_level()
    library.add_tokens([AddedToken("<think now>", special=False), AddedToken("日本", special=False)])
    tokenizer = ours(library)
    ids = tokenizer.encode("a<think now>日本b")
    assert len(ids) == 4
    assert tokenizer.detokenizer().push(ids) == library.decode(ids) == "a<think now>日本b"


@pytest.mark.parametrize("token_id", [10**6, -1])
def test_ids_outside_of_the_vocabulary_are_nothing_and_not_kept(token_id: int) -> None:
    tokenizer = ours(byte_level())
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([token_id]) == ""
    assert detokenizer.push_json([token_id]) == b""
    assert all(token_id not in table for table in tokenizer._table(True))


def test_no_truncation_and_no_padding() -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    tokenizer = ours(library)
    assert 10 < len(tokenizer.encode("a much longer text than three tokens")) < 50


def test_beginning_of_sequence() -> None:
    tokenizer = Tokenizer(byte_level().to_str().encode(), add_bos_id=1)
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.encode("<|im_start|>a").count(1) == 1
    assert 1 not in tokenizer.encode("a", special=False)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"model": 5}'])
def test_what_is_no_tokenizer(data: bytes) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer(data)


# Stop strings -------------------------------------------------------------------------------------------------------------------


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    checker = StopStrings(stops, include)
    text = ""
    for piece in pieces:
        more, stop = checker.push(piece)
        text += more
        for known in stops:
            assert include or known not in text
        if stop is not None:
            return text, stop
    return text + checker.flush(), None


def reference(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    found = min(((at, -len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0), default=None)
    if found is None:
        return text, None
    at, _, stop = found
    return text[: at + (len(stop) if include else 0)], stop


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("stops", "text"), [
    (["END"], "one END two"), (["END"], "one EN"), (["END"], "EENDX"), (["aab"], "aaab"), (["\n\n"], "a\nb\n\nc"),
    (["ab", "cd"], "xcdab"), (["stop"], "sto sto stop"), (["🎉"], "a🎉b"), (["x"], "abc"), (["abc"], "ab"),
])  # fmt: skip
def test_stop_strings_at_every_split(stops: list[str], text: str, include: bool) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = [text[:first], text[first:second], text[second:]]
            assert run(stops, pieces, include) == reference(stops, text, include)
    assert run(stops, list(text), include) == reference(stops, text, include)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    checker = StopStrings(["END"])
    assert checker.push("one E") == ("one ", None)
    assert checker.push("N") == ("", None)
    assert checker.push("X") == ("ENX", None)


def test_stops_against_random_text() -> None:
    rng = random.Random(5)
    for _ in range(500):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", k=20))
        single: Any = reference(stops, text, False)
        # letter by letter, the stop string that is complete first wins
        found = run(stops, list(text))
        assert found[0] == single[0] or found[1] in stops
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if ends:
            stop = found[1]
            assert stop is not None
            assert found[0] == text[: min(ends) - len(stop)]
        else:
            assert found == (text, None)
