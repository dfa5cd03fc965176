"""From an engine's items to the text of one answer, and that to JSON in OpenAI's two forms.

The constant parts of a chunk are encoded once per answer. A token that is whole characters by itself then costs a lookup in the
tokenizer's table and a place in a list: no JSON encoder runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from ..workers.tokenizer import Detokenizer, StopStrings, Tokenizer, escape
from .problems import ApiError, error_item

FINISH_REASONS = frozenset({"stop", "length", "content_filter", "tool_calls"})


def _no_item(error: Exception) -> ApiError:
    return ApiError(502, f"the engine sent an item that is none: {error!r}", code="engine_error")


class Answer:
    """State of one of the answers to a request."""

    __slots__ = (
        "_detokenizer",
        "_held_logprobs",
        "_max_tokens",
        "_plain",
        "_stops",
        "_tokenizer",
        "cached_tokens",
        "finish_reason",
        "form",
        "index",
        "logprobs",
        "tokens",
    )

    def __init__(
        self,
        index: int,
        form: Form | None,
        tokenizer: Tokenizer,
        detokenizer: Detokenizer,
        stops: StopStrings | None,
        max_tokens: int | None,
        logprobs: bool,
    ) -> None:
        self.index = index
        self.form: Any = form
        """how it is written, of a stream"""
        self.tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.logprobs: list[Any] = []
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._stops = stops
        self._max_tokens = max_tokens
        self._held_logprobs: list[Any] | None = [] if logprobs else None
        self._plain = stops is None and not logprobs

    def take(self, item: Any) -> str:
        """The text that an item adds; sets ``finish_reason`` at the end. Raises `ApiError` if the engine has failed."""
        token_ids, reason = self._open(item)
        try:
            text = self._detokenizer.push(token_ids) if token_ids else ""
        except (TypeError, OverflowError) as error:
            raise _no_item(error) from error
        stops = self._stops
        if stops is not None:
            text, stop = stops.push(text)
            if stop is not None:
                self.finish_reason = "stop"
                return text
        if reason is not None:
            text += self._close(reason)
        return text

    @property
    def whole(self) -> bool:
        """Whether its text may be made at its end, with `note` and `text_of`, instead of piece by piece with `take`."""
        return self._stops is None

    def note(self, item: Any, token_ids: list[int]) -> str | None:
        """Append the tokens of an item and return its finish reason. Raises `ApiError` if the engine has failed."""
        new, reason = self._open(item)
        token_ids += new
        return reason

    def text_of(self, token_ids: list[int], reason: str) -> str:
        """The whole text; sets ``finish_reason``. Raises `ApiError`."""
        try:
            text = self._detokenizer.push(token_ids) if token_ids else ""
        except (TypeError, OverflowError) as error:
            raise _no_item(error) from error
        return text + self._close(reason)

    def events(self, item: Any, parts: list[bytes]) -> None:
        """Append the events that an item adds to a stream. Raises `ApiError` if the engine has failed."""
        if self._plain:
            # `_open` and `push_json` by hand for an item with nothing but one whole token, which nearly all are
            try:
                token_ids = item["token_ids"]
                reason = None
                if len(item) == 1:
                    self.tokens += len(token_ids)
                else:
                    token_ids, reason = self._open(item)
                piece = self._detokenizer.push_json(token_ids) if token_ids else b""
            except (KeyError, TypeError, AttributeError, OverflowError) as error:
                raise _no_item(error) from error
            if piece:
                form = self.form
                parts += (form.head, piece, form.tail)
            if reason is not None:
                self._add(self._close(reason), parts)
                parts.append(self.form.final(self.finish_reason))
            return
        self._add(self.take(item), parts)
        if self.finish_reason is not None:
            if self._held_logprobs:
                self._add("", parts, True)
            parts.append(self.form.final(self.finish_reason))

    def ended(self) -> str:
        """The stream ended without a finish reason: right if nothing is missing. The rest of the text, or `ApiError`."""
        return self._close(self.reason_of_end())

    def reason_of_end(self) -> str:
        """The finish reason of a stream that ended without one. Raises `ApiError` if it was cut."""
        if self._max_tokens is not None and self.tokens >= self._max_tokens:
            return "length"
        raise ApiError(502, "the engine ended its answer without a finish reason", code="engine_error")

    def end_events(self, parts: list[bytes]) -> None:
        """The same for a stream."""
        self._add(self.ended(), parts)
        parts.append(self.form.final(self.finish_reason))

    def take_logprobs(self) -> list[Any] | None:
        """What was collected since the last call; None if nobody asked."""
        held = self._held_logprobs
        if held is not None:
            self._held_logprobs = []
        return held

    def _open(self, item: Any) -> tuple[Sequence[int], str | None]:
        """``(tokens, finish reason)`` of an item, after everything else in it was looked at."""
        try:
            token_ids: list[int] = item["token_ids"]
            self.tokens += len(token_ids)
            fields = len(item)
            if fields == 1:  # most of them
                return token_ids, None
            reason = item.get("finish_reason")
            if fields > 2 or reason is not None or "finish_reason" not in item:
                self._look_at(item, reason)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _no_item(error) from error
        return token_ids, reason

    def _look_at(self, item: Any, reason: Any) -> None:
        if reason == "error" or item.get("error"):
            raise error_item(item)
        if item.get("cached_tokens"):
            self.cached_tokens = int(item["cached_tokens"])
        if self._held_logprobs is not None and item.get("logprobs"):
            self._held_logprobs += item["logprobs"]

    def _close(self, reason: str) -> str:
        """The rest of the text at the end."""
        if reason == "cancelled":
            raise ApiError(503, "the worker cancelled the request", code="cancelled_by_worker", retry_after=1.0)
        self.finish_reason = reason if reason in FINISH_REASONS else "stop"
        text = self._detokenizer.flush()
        stops = self._stops
        if stops is None:
            return text
        text, stop = stops.push(text)
        if stop is not None:
            self.finish_reason = "stop"
            return text
        return text + stops.flush()

    def _add(self, text: str, parts: list[bytes], even_empty: bool = False) -> None:
        if not text and not even_empty:
            return
        form = self.form
        logprobs = self.take_logprobs()
        if logprobs:
            parts += (form.head, escape(text), form.with_logprobs(self._tokenizer, logprobs))
        else:
            parts += (form.head, escape(text), form.tail)


class Form:
    """How answers are written: one subclass per endpoint. Of one answer, because the index is part of every chunk."""

    __slots__ = ("_after", "_before", "_choice", "head", "tail")

    object = ""
    chunk_object = ""
    id_prefix = ""

    def __init__(self, response_id: str, created: int, model: str, index: int, with_usage: bool) -> None:
        name = escape(model).decode()
        before = f'data: {{"id":"{response_id}","object":"{self.chunk_object}","created":{created},"model":"{name}","choices":['
        after = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._before = before.encode()
        self._after = after.encode()
        self._choice = f'{{"index":{index},'
        self.head = self._before + self._choice.encode() + self._opening
        self.tail = self._closing + b'"finish_reason":null}]' + self._after

    _opening = b""
    _closing = b""

    def with_logprobs(self, tokenizer: Tokenizer, logprobs: list[Any]) -> bytes:
        """What follows the text of a chunk that has them."""
        encoded = orjson.dumps(self.logprobs(tokenizer, logprobs))
        return self._closing + b'"logprobs":' + encoded + b',"finish_reason":null}]' + self._after

    def first(self) -> bytes:
        """What a stream begins with."""
        return b""

    def final(self, reason: str | None) -> bytes:
        """The chunk with the finish reason."""
        return self._before + f'{self._choice}{self._empty}"finish_reason":"{reason}"}}]'.encode() + self._after

    _empty = ""

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The chunk with the usage."""
        return self._before + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"

    @staticmethod
    def logprobs(tokenizer: Tokenizer, logprobs: list[Any]) -> Any:
        raise NotImplementedError

    @staticmethod
    def choice(index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        """One answer that is not streamed."""
        raise NotImplementedError


class ChatForm(Form):
    """``/v1/chat/completions``"""

    __slots__ = ()
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    _opening = b'"delta":{"content":"'
    _closing = b'"},'
    _empty = '"delta":{},'

    def first(self) -> bytes:
        choice = f'{self._choice}"delta":{{"role":"assistant","content":""}},"finish_reason":null}}]'
        return self._before + choice.encode() + self._after

    @staticmethod
    def logprobs(tokenizer: Tokenizer, logprobs: list[Any]) -> Any:
        def entry(given: Mapping[str, Any]) -> dict[str, Any]:
            data = tokenizer.token_bytes(given["token_id"])
            return {"token": data.decode("utf-8", "replace"), "logprob": given["logprob"], "bytes": list(data)}

        return {"content": [{**entry(one), "top_logprobs": [entry(top) for top in one.get("top", ())]} for one in logprobs]}

    @staticmethod
    def choice(index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


class CompletionForm(Form):
    """``/v1/completions``"""

    __slots__ = ()
    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"
    _opening = b'"text":"'
    _closing = b'",'
    _empty = '"text":"",'

    @staticmethod
    def logprobs(tokenizer: Tokenizer, logprobs: list[Any]) -> Any:
        tokens, values, tops, offsets, offset = [], [], [], [], 0
        for one in logprobs:
            text = tokenizer.token_bytes(one["token_id"]).decode("utf-8", "replace")
            tokens.append(text)
            values.append(one["logprob"])
            tops.append(
                {tokenizer.token_bytes(top["token_id"]).decode("utf-8", "replace"): top["logprob"] for top in one.get("top", ())}
            )
            offsets.append(offset)
            offset += len(text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    @staticmethod
    def choice(index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
