"""vLLM behind the worker's handler gives what vLLM called directly gives, on every plane, and hears of every end."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dynwire
from dynwire.testing.pytest_plugin import nats_server  # noqa: F401  # session fixture, here by its plain name
from dynwire.workers.protocol import (
    EngineItem,
    EngineRequest,
    OutputOptions,
    Routing,
    SamplingOptions,
    StopConditions,
)

from .conftest import START_S, environment, needs_vllm, running

PLANES = ("tcp", "http", "nats")
GREEDY = SamplingOptions(temperature=0.0)
RNG = random.Random(5)
PROMPTS = [[RNG.randrange(3, 1024) for _ in range(length)] for length in (1, 31, 32, 33, 200)]

pytestmark = [needs_vllm, pytest.mark.hard_timeout(START_S + 60)]


@pytest.fixture(scope="module")
def server(model: Path, nats_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:  # noqa: F811
    folder = tmp_path_factory.mktemp("planes")
    settings = {"DYN_FILE_KV": str(folder / "discovery"), "NATS_SERVER": nats_server.url}
    env = environment(folder / "discovery", NATS_SERVER=nats_server.url)
    with running([str(Path(__file__).parent / "planes.py"), str(model), *PLANES], env, folder / "log") as started:
        yield settings
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(60) == 0, started.text[-4000:]


@pytest.fixture(autouse=True)
def settings(server: dict[str, str], clean_env: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.items():
        monkeypatch.setenv(name, value)


def request(token_ids: list[int], max_tokens: int | None, **options: Any) -> EngineRequest:
    stop = options.pop("stop", StopConditions(max_tokens=max_tokens, ignore_eos=True))
    return EngineRequest("m", token_ids, stop, options.pop("sampling", GREEDY), **options)


class Face:
    """The planes' endpoints, as a client sees them."""

    def __init__(self, plane: str) -> None:
        self.plane = plane

    async def __aenter__(self) -> Face:
        self._managers = [dynwire.AsyncNetworkManager(request_plane=plane) for plane in (self.plane, PLANES[0])]
        self.client = await self._managers[0].endpoint(f"test.{self.plane}.generate").client()
        self.direct = await self._managers[1].endpoint("test.direct.generate").client()
        self._requests = await self._managers[1].endpoint("test.direct.requests").client()
        for client in (self.client, self.direct, self._requests):
            await client.wait_for_instances(1, 10.0)
        return self

    async def __aexit__(self, *error: object) -> None:
        for manager in self._managers:
            await manager.close()

    async def items(self, asked: EngineRequest) -> list[EngineItem]:
        async with self.client.stream(asked, reply_type=EngineItem, timeout=60.0) as stream:
            return [item async for item in stream]

    async def running(self) -> int:
        return int((await self._requests.call(None, timeout=10.0))[0])

    async def aborted(self) -> int:
        """Requests that vLLM was told to abort, so far."""
        return int((await self._requests.call(None, timeout=10.0))[1])

    async def none_running(self) -> None:
        async with asyncio.timeout(20):
            while await self.running():  # noqa: ASYNC110  # in another process
                await asyncio.sleep(0.01)


def tokens_of(items: list[EngineItem]) -> list[int]:
    return [token for item in items for token in item.token_ids]


@pytest.mark.parametrize("plane", PLANES)
async def test_greedy_answers_equal_those_of_vllm_itself(plane: str) -> None:
    async with Face(plane) as face:
        wanted = [
            await face.direct.call({"token_ids": prompt, "max_tokens": 48, "id": f"{plane}-{number}"}, timeout=60.0)
            for number, prompt in enumerate(PROMPTS)
        ]
        for prompt, tokens in zip(PROMPTS, wanted, strict=True):
            items = await face.items(request(prompt, 48))
            assert tokens_of(items) == tokens and len(tokens) == 48
            assert items[-1].finish_reason == "length" and all(item.finish_reason is None for item in items[:-1])
            assert items[0].cached_tokens is not None and all(item.cached_tokens is None for item in items[1:])
        assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("after", [0, 3], ids=["before the first item", "in the middle"])
async def test_leaving_a_stream_aborts_the_request(plane: str, after: int) -> None:
    async with Face(plane) as face:
        await face.none_running()
        before = await face.aborted()
        stream = face.client.stream(request(PROMPTS[-1], 1500), timeout=60.0)
        async with stream:
            for _ in range(after):
                await stream.__anext__()
            if not after:
                waiting = asyncio.ensure_future(stream.__anext__())
                while not await face.running() and not waiting.done():  # noqa: ASYNC110  # in another process
                    await asyncio.sleep(0.001)
                waiting.cancel()
                await asyncio.wait([waiting])
            else:
                assert await face.running() == 1
        await face.none_running()
        assert await face.aborted() == before + 1


@pytest.mark.parametrize("plane", PLANES)
async def test_stop_ends_an_answer_early(plane: str) -> None:
    async with Face(plane) as face:
        items: list[EngineItem] = []
        async with face.client.stream(request(PROMPTS[1], 1500), reply_type=EngineItem, timeout=60.0) as stream:
            async for item in stream:
                items.append(item)
                if len(items) == 3:
                    stream.context.stop()
        assert items[-1].finish_reason == "cancelled" and 3 <= len(tokens_of(items)) < 1500
        await face.none_running()


async def test_logprobs_and_alternatives() -> None:
    async with Face("tcp") as face:
        items = await face.items(request(PROMPTS[1], 6, output_options=OutputOptions(logprobs=3)))
        entries = [entry for item in items for entry in item.logprobs or ()]
        assert [entry.token_id for entry in entries] == tokens_of(items) and len(entries) == 6
        for entry in entries:
            # greedy: the chosen one is the likeliest
            assert len(entry.top) == 3 and (entry.top[0].token_id, entry.top[0].logprob) == (entry.token_id, entry.logprob)
            assert 0 > entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob
        items = await face.items(request(PROMPTS[1], 4, output_options=OutputOptions(logprobs=0)))
        assert [len(entry.top) for item in items for entry in item.logprobs or ()] == [0] * 4


async def test_stop_tokens_and_the_smallest_length() -> None:
    async with Face("tcp") as face:
        whole = tokens_of(await face.items(request(PROMPTS[1], 30)))
        # a token whose first use is late enough to tell: as a stop token, as an end of text, and not before min_tokens
        at = next(n for n in range(5, 30) if whole[n] not in whole[:n])
        for fields in ({"stop_token_ids": [whole[at]], "ignore_eos": True}, {"stop_token_ids": [whole[at]]}):
            items = await face.items(request(PROMPTS[1], None, stop=StopConditions(max_tokens=30, **fields)))
            assert tokens_of(items) == whole[: at + 1] and items[-1].finish_reason == "stop"
        asked = request(PROMPTS[1], None, stop=StopConditions(max_tokens=30), eos_token_ids=[whole[at]])
        items = await face.items(asked)
        assert tokens_of(items) == whole[: at + 1] and items[-1].finish_reason == "stop"
        asked.stop_conditions = StopConditions(max_tokens=30, min_tokens=at + 2)
        assert len(tokens_of(await face.items(asked))) >= at + 2
        asked.stop_conditions = StopConditions(max_tokens=30, ignore_eos=True)
        assert tokens_of(await face.items(asked)) == whole


async def test_sampling_options_reach_vllm() -> None:
    async with Face("tcp") as face:

        async def answer(**options: Any) -> list[int]:
            return tokens_of(await face.items(request(PROMPTS[2], 24, sampling=SamplingOptions(**options))))

        greedy = await answer(temperature=0.0)
        assert await answer(temperature=1.5, top_k=1) == greedy
        assert await answer(temperature=1.5, top_p=1e-6) == greedy
        assert await answer(temperature=1.5, min_p=1.0) == greedy
        hot = {"temperature": 2.0, "top_k": -1, "top_p": 1.0}
        assert await answer(**hot, seed=1) == await answer(**hot, seed=1) != await answer(**hot, seed=2)
        penalised = await answer(temperature=0.0, repetition_penalty=1e6)
        assert len(set(penalised)) == 24 and not set(penalised) & set(PROMPTS[2])
        # the model's generation_config.json has top_k 20, which is what a request without options gets
        assert await answer(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0) != greedy


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (request([], 4), "cannot be empty"),
        (request([3] * 2048, 4), "maximum model length of 2048"),
        (request([3, 5000], 4), "5000"),
        (request([3], 4, sampling=SamplingOptions(temperature=-1.0)), "temperature"),
        (request([3], 0), "max_tokens"),
        (request([3], 4, output_options=OutputOptions(logprobs=5000)), "logprobs"),
        (request([3], 4, routing=Routing(dp_rank=3)), "data_parallel_rank 3"),
        (request([3], 4, routing=Routing(lora="french")), "LoRA"),
    ],
    ids=["empty", "too long", "no token", "temperature", "max_tokens", "logprobs", "rank", "lora"],
)
async def test_requests_that_can_never_be_answered(asked: EngineRequest, text: str) -> None:
    """They are ValueErrors, which frontends answer with 400."""
    async with Face("tcp") as face:
        with pytest.raises(dynwire.RemoteError) as caught:
            await face.items(asked)
        assert caught.value.type_name == "ValueError" and text in caught.value.message
        assert await face.running() == 0


async def test_many_at_once() -> None:
    async with Face("tcp") as face:
        before = await face.aborted()
        lengths = [RNG.randrange(1, 60) for _ in range(40)]
        answers = await asyncio.gather(*(face.items(request(PROMPTS[n % 5], length)) for n, length in enumerate(lengths)))
        assert [len(tokens_of(items)) for items in answers] == lengths
        assert await face.aborted() == before
        assert await face.running() == 0
