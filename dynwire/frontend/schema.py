"""Bodies of requests. What msgspec can say about a field is said here; what belongs together is checked in `checked`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ..workers.protocol import OutputOptions, SamplingOptions, StopConditions
from .problems import ApiError, from_validation, invalid, unsupported

MAX_CHOICES = 128
MAX_STOPS = 32
"""OpenAI allows 4; every one of them is looked for in every piece of text."""
DEFAULT_COMPLETION_TOKENS = 16
"""of /v1/completions without max_tokens, as in OpenAI's API; a chat may fill the context"""

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]


class StreamOptions(msgspec.Struct):
    """``stream_options``"""

    include_usage: bool = False


class ResponseFormat(msgspec.Struct):
    """``response_format``: only text."""

    type: str = "text"


class Extensions(msgspec.Struct):
    """``nvext``: where Dynamo's clients put what OpenAI's API has no field for."""

    ignore_eos: bool | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    greed_sampling: bool | None = None
    annotations: list[str] = []


class _Request(msgspec.Struct, kw_only=True):
    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    # extensions, with the names that vLLM gives them
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Count] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    nvext: Extensions | None = None


class ChatRequest(_Request, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    documents: list[dict[str, Any]] | None = None


class CompletionRequest(_Request, kw_only=True):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


_decode_chat = msgspec.json.Decoder(ChatRequest).decode
_decode_completion = msgspec.json.Decoder(CompletionRequest).decode


def read_chat(body: bytes) -> ChatRequest:
    """Raises `ApiError` that names the field."""
    try:
        request = _decode_chat(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise from_validation(error) from None
    if not request.messages:
        raise invalid("messages: at least one is needed", "messages")
    if request.functions:
        raise unsupported("functions", "use tools")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "only type 'text' is")
    if request.modalities and request.modalities != ["text"]:
        raise unsupported("modalities", "only text is")
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "'auto' and 'none' are")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs: logprobs has to be true", "top_logprobs")
    _check(request)
    return request


def read_completion(body: bytes) -> CompletionRequest:
    """Raises `ApiError` that names the field."""
    try:
        request = _decode_completion(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise from_validation(error) from None
    if request.echo:
        raise unsupported("echo", "the prompt is not repeated")
    if request.suffix:
        raise unsupported("suffix", "answers continue the prompt")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "only as many answers as n are made")
    _check(request)
    return request


def _check(request: _Request) -> None:
    if request.logit_bias:
        raise unsupported("logit_bias", "engines are not told of it")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options: stream has to be true", "stream_options")
    stop = request.stop
    if stop is not None and not isinstance(stop, str):
        if len(stop) > MAX_STOPS:
            raise invalid(f"stop: at most {MAX_STOPS} strings are allowed, there are {len(stop)}", "stop")
        if "" in stop:
            raise invalid("stop: an empty string stops before the answer", "stop")


def stops_of(request: _Request) -> tuple[str, ...]:
    """The stop strings."""
    stop = request.stop
    return (stop,) if isinstance(stop, str) and stop else tuple(stop or ())


def stop_conditions(request: _Request, max_tokens: int | None) -> StopConditions:
    """When the engine has to stop by itself."""
    ignore_eos = request.ignore_eos
    if ignore_eos is None and request.nvext is not None:
        ignore_eos = request.nvext.ignore_eos
    return StopConditions(max_tokens, request.min_tokens, list(request.stop_token_ids or ()), bool(ignore_eos))


def sampling_options(request: _Request, number: int) -> SamplingOptions:
    """How the engine chooses tokens of one of the ``n`` answers: with a seed, each has its own."""
    more = request.nvext or _NO_EXTENSIONS
    return SamplingOptions(
        temperature=0.0 if more.greed_sampling else request.temperature,
        top_p=request.top_p,
        top_k=more.top_k if request.top_k is None else request.top_k,
        min_p=request.min_p,
        seed=None if request.seed is None else request.seed + number,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=more.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty,
    )


_NO_EXTENSIONS = Extensions()


def output_options(request: ChatRequest | CompletionRequest) -> OutputOptions:
    """What the engine has to tell about tokens."""
    if isinstance(request, ChatRequest):
        return OutputOptions((request.top_logprobs or 0) if request.logprobs else None)
    return OutputOptions(request.logprobs)


def checked_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: text parts joined, arguments of tool calls as objects. Raises `ApiError`."""
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise invalid(f"{where}.role: it is required and a string", f"{where}.role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        if content is None and role in ("user", "system", "developer"):
            raise invalid(f"{where}.content: it is required for the role {role!r}", f"{where}.content")
    elif isinstance(content, list):
        message = {**message, "content": "".join([_part(p, f"{where}.content[{i}]") for i, p in enumerate(content)])}
    else:
        raise invalid(f"{where}.content: expected a string or an array of parts", f"{where}.content")
    calls = message.get("tool_calls")
    if calls is not None:
        message = {**message, "tool_calls": _tool_calls(calls, f"{where}.tool_calls")}
    return message


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if kind in ("text", "input_text") else None
    if isinstance(text, str):
        return text
    if kind is None or kind == "text":
        raise invalid(f"{where}: expected {{'type': 'text', 'text': …}}", where)
    raise ApiError(400, f"{where}: parts of type {kind!r} are not supported, only text is", param=where, code="unsupported_part")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise invalid(f"{where}: expected an array", where)
    made = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{where}[{number}].function: expected an object with a name", f"{where}[{number}].function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments or "{}")
            except msgspec.DecodeError as error:
                path = f"{where}[{number}].function.arguments"
                raise invalid(f"{path}: not JSON: {error}", path) from None
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """One or several prompts, as text or tokens. Raises `ApiError`."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt: at least one is needed", "prompt")
    if all(isinstance(part, int) for part in prompt):
        return [prompt]  # type: ignore[list-item]  # the line above
    if any(isinstance(part, int) for part in prompt):
        raise invalid("prompt: expected text, token ids, or an array of either", "prompt")
    return list(prompt)  # type: ignore[arg-type]  # the lines above
