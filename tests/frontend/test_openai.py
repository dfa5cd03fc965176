"""The official client, against the frontend on both HTTP servers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

openai = pytest.importorskip("openai")

from .conftest import Shared  # noqa: E402
from .stack import PATIENCE_S, Frontend  # noqa: E402


@pytest.fixture
def client(frontend: Frontend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ask("say Grüße, 日本 🎉!"))
    assert reply.object == "chat.completion"
    assert reply.choices[0].message.content == "Grüße, 日本 🎉!"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens > 5


def test_stream(client: openai.OpenAI) -> None:
    text = 'Grüße, 日本 🎉! "quoted" \\ back\nline'
    stream = client.chat.completions.create(
        model="tiny", messages=ask(f"say {text}"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens >= len(pieces) - 2
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_usage_unless_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=ask("say hi"), stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("verb", ["say", "together"])
def test_stop_string_spans_tokens(client: openai.OpenAI, verb: str, stream: bool) -> None:
    messages = ask(f"{verb} one two THE END three")
    made = client.chat.completions.create(model="tiny", messages=messages, stop=["nowhere", " THE END"], stream=stream)
    if stream:
        chunks = list(made)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert (text, reason) == ("one two", "stop")


def test_beginning_of_a_stop_string_is_not_lost(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=ask("say one THE"), stop="THE END", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one THE"


def test_stop_string_in_output(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=ask("say a. b."), stop=".", extra_body={"include_stop_str_in_output": True}
    )
    assert reply.choices[0].message.content == "a."


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(client: openai.OpenAI, name: str) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ask("count 100"), **{name: 7})
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 7


def test_eos_is_no_text(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ask("eos bye"))
    assert reply.choices[0].message.content == "bye"
    reply = client.chat.completions.create(model="tiny", messages=ask("eos bye"), extra_body={"skip_special_tokens": False})
    assert reply.choices[0].message.content == "bye<|im_end|>"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: openai.OpenAI, stream: bool) -> None:
    made = client.chat.completions.create(model="tiny", messages=ask("say hello there"), n=3, stream=stream)
    texts, reasons = {0: "", 1: "", 2: ""}, {}
    if stream:
        for chunk in made:
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    else:
        for choice in made.choices:
            texts[choice.index], reasons[choice.index] = choice.message.content, choice.finish_reason
        assert made.usage.completion_tokens % 3 == 0
    assert set(texts.values()) == {"hello there"}
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt=["say left", "say right"], max_tokens=50)
    assert reply.object == "text_completion"
    assert [choice.text for choice in reply.choices] == ["left", "right"]
    chunks = list(client.completions.create(model="tiny", prompt="say left", max_tokens=50, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "left"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_completions_make_sixteen_tokens_by_default(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="count 100")
    assert reply.usage.completion_tokens == 16


def test_prompts_of_tokens(client: openai.OpenAI, shared: Shared) -> None:
    from tokenizers import Tokenizer

    from dynwire.mocker import TINY_MODEL

    ids = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json")).encode("say hello").ids
    reply = client.completions.create(model="tiny", prompt=ids)
    assert reply.choices[0].text == "hello"
    assert reply.usage.prompt_tokens == len(ids)
    assert [c.text for c in client.completions.create(model="tiny", prompt=[ids, ids]).choices] == ["hello", "hello"]


def test_what_the_engine_is_asked(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=ask("about"), max_tokens=2000, temperature=0.5, top_p=0.9, seed=7, presence_penalty=1.0,
        frequency_penalty=-1.0, extra_body={"ignore_eos": True, "top_k": 5, "min_p": 0.1, "min_tokens": 3,
                                            "repetition_penalty": 1.1, "stop_token_ids": [9]},
        extra_headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "my-id"},
    )  # fmt: skip
    about = json.loads(reply.choices[0].message.content)
    request = about["request"]
    assert request["stop_conditions"] == {"max_tokens": 2000, "min_tokens": 3, "stop_token_ids": [9], "ignore_eos": True}
    assert request["sampling_options"] == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "frequency_penalty": -1.0,
        "presence_penalty": 1.0, "repetition_penalty": 1.1,
    }  # fmt: skip
    assert request["eos_token_ids"] == [2, 0]
    assert about["headers"]["traceparent"] == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert about["headers"]["x-request-id"] == about["id"] == "my-id"


def test_each_answer_has_a_seed_of_its_own(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ask("about"), max_tokens=2000, seed=7, n=2)
    seeds = [json.loads(choice.message.content)["request"]["sampling_options"]["seed"] for choice in reply.choices]
    assert seeds == [7, 8]


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=ask("say é!"), logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert bytes(b for entry in content for b in entry.bytes).decode() == "é!"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)
    chunks = list(client.chat.completions.create(model="tiny", messages=ask("say é!"), logprobs=True, stream=True))
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]
    completion = client.completions.create(model="tiny", prompt="say ab", logprobs=1)
    found = completion.choices[0].logprobs
    assert "".join(found.tokens) == "ab"
    assert found.token_logprobs == [-0.5] * len(found.tokens)
    assert found.text_offset[0] == 0


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="huge", messages=ask("say hi"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "tiny" in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_engine_refuses(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="can never be answered"):
        client.chat.completions.create(model="tiny", messages=ask("refuse"), stream=stream)


@pytest.mark.parametrize("verb", ["fail", "item", "short"])
def test_failure_in_mid_stream_is_an_error(client: openai.OpenAI, verb: str) -> None:
    pieces = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in client.chat.completions.create(model="tiny", messages=ask(f"{verb} 5 0.01"), stream=True):
            pieces.append(chunk.choices[0].delta.content)
    assert {"fail": "out of memory", "item": "on fire", "short": "without a finish reason"}[verb] in str(caught.value)


@pytest.mark.parametrize(("what", "status"), [("fail 5", 500), ("item 5", 500), ("short 5", 502), ("odd nothing", 502),
                                              ("odd text", 502), ("odd number", 502)])  # fmt: skip
def test_failure_of_an_answer_in_one_piece(client: openai.OpenAI, what: str, status: int) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=ask(what))
    assert caught.value.status_code == status
    assert caught.value.code == "engine_error"


async def test_async_client(frontend: Frontend) -> None:
    async with openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="tiny", messages=ask("say many words here"), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "many words here"
