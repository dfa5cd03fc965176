"""Text to tokens, and tokens back to text while they arrive: never half a character, and never half a stop string.

Detokenising is table work where the tokenizer's decoder allows it: byte-level BPE, and the byte fallback and ``▁`` of
sentencepiece's models, give every token its bytes independently of its neighbours. A token that is whole characters by itself,
which nearly all are, costs one dictionary lookup, in text or in JSON. Other decoders (WordPiece, CTC) go through the library's
own stream decoder.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from ..errors import ConfigError

CONTEXT_TOKENS = 16
"""of the prompt, that a decoder which looks at neighbours is shown before the answer"""
LONG_TEXT_CHARS = 8192
"""From here on encoding takes milliseconds, too long for an event loop; the library releases the GIL in `encode`."""

_REPLACEMENT = "�"

_SPACE = "▁"


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes as printable characters (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class _Head(msgspec.Struct):
    """The parts of ``tokenizer.json`` that are looked at here; msgspec skips the rest without making objects of it."""

    decoder: dict[str, Any] | None = None


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder.get("decoders", ())) if decoder.get("type") == "Sequence" else [decoder]


class _Scheme:
    """How a decoder turns one token into bytes, read from its description; `known` is false if it depends on neighbours."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        self.byte_level = self.byte_fallback = False
        self.replace: list[tuple[str, str]] = []
        self.known = decoder is not None
        for step in _steps(decoder):
            kind = step.get("type")
            if kind == "ByteLevel":
                self.byte_level = True
            elif kind == "ByteFallback":
                self.byte_fallback = True
            elif kind == "Replace" and isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
                self.replace.append((step["pattern"]["String"], step.get("content", "")))
            elif kind == "Metaspace":
                self.replace.append((step.get("replacement", _SPACE), " "))
            elif kind == "Fuse" or (kind == "Strip" and step.get("content") == " " and not step.get("stop")):
                # Strip takes the space from the beginning of a text. An answer is the continuation of one: its space stays.
                continue
            else:
                self.known = False

    def bytes_of(self, token: str) -> bytes:
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes((int(token[3:5], 16),))
            except ValueError:
                pass  # a token that only looks like a byte
        for old, new in self.replace:
            token = token.replace(old, new)
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[c] for c in token])
            except KeyError:
                pass  # added tokens are plain text
        return token.encode("utf-8", "replace")


class _Pieces(dict[int, bytes]):
    """Token id to its bytes, made when first wanted: of a vocabulary of 150,000 an answer uses a few hundred."""

    def __init__(self, tokenizer: Any, scheme: _Scheme, skipped: frozenset[int]) -> None:
        self._tokenizer, self._scheme, self._skipped = tokenizer, scheme, skipped

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped or token_id < 0 else self._tokenizer.id_to_token(token_id)
        if token is None and token_id not in self._skipped:
            return b""  # outside of the vocabulary, and not remembered: a broken engine must not fill memory
        found = self[token_id] = b"" if token is None else self._scheme.bytes_of(token)
        return found


class _JsonPieces(dict[int, "bytes | None"]):
    """Token id to the inside of a JSON string; None if the token is not whole characters by itself."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces

    def __missing__(self, token_id: int) -> bytes | None:
        piece = self._pieces[token_id]
        try:
            found = escape(piece.decode())
        except UnicodeDecodeError:
            self[token_id] = None
            return None
        if piece:
            self[token_id] = found
        return found


def escape(text: str) -> bytes:
    """Text as the inside of a JSON string."""
    return orjson.dumps(text)[1:-1]


class Detokenizer:
    """Text of one answer, as far as it is whole characters. Made by `Tokenizer.detokenizer`; not shared by answers."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        raise NotImplementedError

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        """The same as the inside of a JSON string; `push` and `push_json` may be mixed."""
        return escape(self.push(token_ids))

    def flush(self) -> str:
        """What is left at the end: a character that was never completed, as U+FFFD."""
        return ""


_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class TableDetokenizer(Detokenizer):
    """Every token has its bytes."""

    __slots__ = ("_decoder", "_json", "_partial", "_pieces")

    def __init__(self, pieces: _Pieces, json: _JsonPieces) -> None:
        self._pieces = pieces
        self._json = json
        self._partial = False
        self._decoder: codecs.IncrementalDecoder | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        data = pieces[token_ids[0]] if len(token_ids) == 1 else b"".join([pieces[i] for i in token_ids])
        decoder = self._decoder
        if not self._partial:
            try:
                return data.decode()
            except UnicodeDecodeError:
                decoder = self._decoder = decoder or _utf8_decoder("replace")
        assert decoder is not None
        text = decoder.decode(data)
        self._partial = bool(decoder.getstate()[0])
        return text

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        if not self._partial:
            if len(token_ids) == 1:
                piece = self._json[token_ids[0]]
                if piece is not None:
                    return piece
            else:
                pieces = [self._json[i] for i in token_ids]
                if None not in pieces:
                    return b"".join(pieces)  # type: ignore[arg-type]  # the line above
        return escape(self.push(token_ids))

    def flush(self) -> str:
        if not self._partial or self._decoder is None:
            return ""
        self._partial = False
        return self._decoder.decode(b"", True)


class StreamDetokenizer(Detokenizer):
    """The library's own, for decoders that look at neighbours."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-CONTEXT_TOKENS:]), skip_special_tokens=skip_special)

    def push(self, token_ids: Sequence[int]) -> str:
        step, tokenizer = self._stream.step, self._tokenizer
        return "".join([text for i in token_ids if (text := step(tokenizer, i)) is not None])


class Tokenizer:
    """A model's tokenizer. Immutable apart from caches; any thread may encode, answers belong to one."""

    def __init__(self, data: bytes, add_bos_id: int | None = None) -> None:
        """``data`` is a ``tokenizer.json``; ``add_bos_id`` begins every prompt that is not a chat.

        Raises `ConfigError` if the library is missing or cannot read the data.
        """
        try:
            import tokenizers
        except ImportError as error:
            text = "serving models as text needs tokenizers: pip install 'dynwire[frontend]'"
            raise ConfigError(text, name="tokenizers") from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
            head = msgspec.json.decode(data, type=_Head)
        except Exception as error:  # the library raises plain Exception for what it cannot read
            raise ConfigError(f"the tokenizer cannot be read: {error}", name="tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos = add_bos_id
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        """of tokens that structure a text and are not part of it"""
        self._scheme = _Scheme(head.decoder)
        self._tables: dict[bool, tuple[_Pieces, _JsonPieces]] = {}

    @property
    def vocabulary_size(self) -> int:
        """Ids are below this, added tokens included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def by_table(self) -> bool:
        """Whether tokens have bytes of their own, so that detokenising is a lookup."""
        return self._scheme.known

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; ``special`` adds what the model wants around a plain prompt (a chat template does that by itself)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        if special and self._bos is not None and (not ids or ids[0] != self._bos):
            ids.insert(0, self._bos)
        return ids

    def detokenizer(self, prompt: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
        """For one answer. ``prompt`` gives context to decoders that look at neighbours."""
        if not self._scheme.known:
            return StreamDetokenizer(self._tokenizer, prompt, skip_special)
        return TableDetokenizer(*self._table(skip_special))

    def _table(self, skip_special: bool) -> tuple[_Pieces, _JsonPieces]:
        found = self._tables.get(skip_special)
        if found is None:
            pieces = _Pieces(self._tokenizer, self._scheme, self.special_ids if skip_special else frozenset())
            found = self._tables[skip_special] = (pieces, _JsonPieces(pieces))
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, special ones included, for logprobs; of decoders that look at neighbours, those of its text."""
        if self._scheme.known:
            return self._table(False)[0][token_id]
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()


class StopStrings:
    """Finds the end of an answer in its text. What may be the beginning of a stop string is held back until that is decided."""

    __slots__ = ("_held", "_include", "_longest", "_prefixes", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """``stops`` are not empty; with ``include`` the stop string is part of the answer."""
        self._stops = tuple(stops)
        self._include = include
        self._prefixes = frozenset(stop[:n] for stop in stops for n in range(1, len(stop)))
        self._longest = max(map(len, stops)) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """``(text to hand out, the stop string that was found or None)``. After a find nothing more may be pushed."""
        if not text:
            return "", None
        text = self._held + text
        found = min(((at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self._held = ""
            at, _, stop = found
            return text[: at + (len(stop) if self._include else 0)], stop
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                self._held = text[-length:]
                return text[:-length], None
        self._held = ""
        return text, None

    def flush(self) -> str:
        """What was held back: the answer has ended otherwise."""
        held, self._held = self._held, ""
        return held
