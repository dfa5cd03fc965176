"""The two routes that make answers: what is asked, whether it may be, and how the answer comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import orjson

from .._context import Context
from ..errors import DynwireError, EndpointNotFound
from ..replies import AsyncReplyStream
from ..workers.protocol import EngineRequest
from ..workers.template import TemplateRefused
from ..workers.tokenizer import LONG_TEXT_CHARS, StopStrings, Tokenizer
from . import schema
from .answer import Answer, ChatForm, CompletionForm, Form
from .exchange import CLIENT_LEFT, JSON, SSE_HEADERS, Exchange, Receive, Scope, Send, Watchers
from .metrics import Metrics, ModelMetrics
from .models import Model, Registry
from .problems import ApiError, error_event, from_error, invalid

DONE = b"data: [DONE]\n\n"
MORE_WORKERS = 2
"""that are asked after one that has refused a request"""
QUEUE_ITEMS = 64
"""per answer, between its reader and the one that writes for all of them"""

FORWARDED = ((b"traceparent", "traceparent"), (b"tracestate", "tracestate"), (b"baggage", "baggage"))

clock = time.perf_counter


class Plan:
    """A request that has been understood: what to ask the engine, and how to write down what it says."""

    __slots__ = ("answers", "created", "form", "model", "prompt_tokens", "requests", "response_id", "stream", "with_usage")

    def __init__(self, model: Model, form: type[Form], stream: bool, with_usage: bool, request_id: bytes) -> None:
        self.model = model
        self.form = form
        self.stream = stream
        self.with_usage = with_usage
        self.created = int(time.time())
        self.response_id = form.id_prefix + escape_id(request_id)
        self.requests: list[EngineRequest] = []
        self.answers: list[Answer] = []
        self.prompt_tokens = 0

    def usage(self) -> dict[str, Any]:
        """Of all answers together."""
        made = sum(answer.tokens for answer in self.answers)
        cached = sum(answer.cached_tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def escape_id(request_id: bytes) -> str:
    """A request id as a part of JSON and of ids: clients choose it, and may choose quotes."""
    return request_id.decode("ascii").replace("\\", "_").replace('"', "_")


class Completions:
    """``POST /v1/chat/completions`` and ``POST /v1/completions`` as ASGI applications."""

    def __init__(self, registry: Registry, metrics: Metrics, admit: Callable[[Exchange], None], *, body_limit: int,
                 timeout: float | None, busy_threshold: float | None, retry_after: float) -> None:  # fmt: skip
        """``admit`` raises `ApiError` for exchanges that are not let in."""
        self._registry = registry
        self._metrics = metrics
        self._admit = admit
        self._body_limit = body_limit
        self._timeout = timeout
        self._busy_threshold = busy_threshold
        self._retry_after = retry_after
        self.watchers = Watchers()

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(Exchange(scope, receive, send, self.watchers), "chat", self._plan_chat)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(Exchange(scope, receive, send, self.watchers), "completions", self._plan_completions)

    async def _run(self, exchange: Exchange, endpoint: str, plan_for: Callable[[bytes, bytes], Any]) -> None:
        began = clock()
        metrics = self._metrics
        model_metrics: ModelMetrics | None = None
        kind = "unary"
        status = 500
        try:
            self._admit(exchange)
        except ApiError as error:
            metrics.refuse(error.code or "refused")
            await exchange.problem(error)
            return
        metrics.in_flight += 1
        try:
            plan: Plan = await plan_for(await exchange.body(self._body_limit), exchange.request_id)
            model_metrics = plan.model.metrics
            model_metrics.in_flight += 1
            self._check_load(plan)
            if plan.stream:
                kind = "stream"
                status = await self._stream(exchange, plan, began)
            else:
                await self._collect(exchange, plan, began)
                status = 200
        except (ApiError, DynwireError) as error:
            # everything but a stream that has begun, which reports in its own way
            problem = error if isinstance(error, ApiError) else from_error(error, self._retry_after)
            status = CLIENT_LEFT if exchange.gone else problem.status
            if not exchange.gone:
                await exchange.problem(problem)
        except BaseException:
            # A bug, or the server is cancelled: the client is told before whoever runs us is.
            if not exchange.started and not exchange.gone:
                await exchange.problem(ApiError(500, "the frontend failed; its log says more", code="internal_error"))
            raise
        finally:
            exchange.end()
            metrics.in_flight -= 1
            if model_metrics is None:
                metrics.refuse("client_left" if status == CLIENT_LEFT else f"status_{status}")
            else:
                model_metrics.in_flight -= 1
                model_metrics.finished(endpoint, kind, status, clock() - began)
                if status == CLIENT_LEFT:
                    model_metrics.disconnects += 1

    # What is asked

    async def _plan_chat(self, body: bytes, request_id: bytes) -> Plan:
        request = schema.read_chat(body)
        model = self._registry.find(request.model)
        template = model.template
        if template is None or "chat" not in model.card.kinds:
            raise invalid(f"the model {model.name!r} has no chat template; use /v1/completions", "model", "no_chat_template")
        messages = schema.checked_messages(request.messages)
        tools = request.tools if request.tool_choice != "none" else None
        try:
            text = template.render(
                messages,
                tools=tools,
                documents=request.documents,
                add_generation_prompt=request.add_generation_prompt,
                extra=request.chat_template_kwargs,
            )
        except TemplateRefused as error:
            raise invalid(f"messages: the model's chat template does not take them: {error}", "messages") from None
        limit = request.max_completion_tokens
        name = "max_tokens" if limit is None else "max_completion_tokens"
        limit = request.max_tokens if limit is None else limit
        token_ids = await _encode(model.tokenizer, text, False)
        return self._plan(request, model, ChatForm, [token_ids], limit, name, "messages", request_id, bool(request.logprobs))

    async def _plan_completions(self, body: bytes, request_id: bytes) -> Plan:
        request = schema.read_completion(body)
        model = self._registry.find(request.model)
        if "completions" not in model.card.kinds:
            raise invalid(f"the model {model.name!r} has no /v1/completions", "model", "no_completions")
        prompts = []
        for prompt in schema.prompts_of(request):
            if isinstance(prompt, str):
                prompts.append(await _encode(model.tokenizer, prompt, request.add_special_tokens))
            else:
                size = model.tokenizer.vocabulary_size
                if not all(0 <= i < size for i in prompt):
                    raise invalid(f"prompt: token ids of {model.name!r} are from 0 to {size - 1}", "prompt")
                prompts.append(prompt)
        limit = schema.DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        wanted = request.logprobs is not None
        return self._plan(request, model, CompletionForm, prompts, limit, "max_tokens", "prompt", request_id, wanted)

    def _plan(self, request: schema.ChatRequest | schema.CompletionRequest, model: Model, form: type[Form],
              prompts: Sequence[list[int]], max_tokens: int | None, limit_name: str, prompt_name: str, request_id: bytes,
              logprobs: bool) -> Plan:  # fmt: skip
        copies = request.n or 1
        if len(prompts) * copies > schema.MAX_CHOICES:
            raise invalid(f"n: {len(prompts)} prompts times {copies} are more than {schema.MAX_CHOICES} answers", "n")
        stream = bool(request.stream)
        options = request.stream_options
        plan = Plan(model, form, stream, options is not None and options.include_usage, request_id)
        stops = schema.stops_of(request)
        skip_special = request.skip_special_tokens is not False
        eos = list(model.card.eos_token_ids)
        output = schema.output_options(request)
        context = model.card.context_length
        for prompt in prompts:
            plan.prompt_tokens += len(prompt)
            if not prompt:
                raise invalid(f"{prompt_name}: there is not a single token in it", prompt_name)
            if len(prompt) >= context:
                raise invalid(
                    f"This model's maximum context length is {context} tokens. However, your {prompt_name} resulted in "
                    f"{len(prompt)} tokens. Please reduce the length of the {prompt_name}.",
                    prompt_name,
                    "context_length_exceeded",
                )
            if max_tokens is not None and len(prompt) + max_tokens > context:
                raise invalid(
                    f"{limit_name} is {max_tokens}, but {len(prompt)} tokens of the {prompt_name} leave "
                    f"{context - len(prompt)} of this model's maximum context length of {context} tokens",
                    limit_name,
                    "context_length_exceeded",
                )
            for copy in range(copies):
                plan.requests.append(
                    EngineRequest(
                        model.name,
                        prompt,
                        schema.stop_conditions(request, max_tokens),
                        schema.sampling_options(request, copy),
                        output,
                        eos,
                        request.nvext.annotations if request.nvext is not None else [],
                    )
                )
                index = len(plan.answers)
                plan.answers.append(
                    Answer(
                        index,
                        form(plan.response_id, plan.created, model.name, index, plan.with_usage) if stream else None,
                        model.tokenizer,
                        model.tokenizer.detokenizer(prompt, skip_special),
                        StopStrings(stops, bool(request.include_stop_str_in_output)) if stops else None,
                        max_tokens,
                        logprobs,
                    )
                )
        return plan

    def _check_load(self, plan: Plan) -> None:
        threshold, sequences = self._busy_threshold, plan.model.sequences
        if threshold is None or not sequences:
            return
        running = plan.model.metrics.in_flight  # this one included
        if running > threshold * sequences:
            raise ApiError(
                503,
                f"all workers of {plan.model.name!r} are busy: {running - 1} requests in flight for {sequences} sequences of "
                f"{len(plan.model.instances)} worker(s), the threshold is {threshold:g} (DYN_BUSY_THRESHOLD)",
                code="busy",
                retry_after=self._retry_after,
            )

    # Asking

    def _open(self, exchange: Exchange, plan: Plan) -> list[_Reader]:
        given = exchange.headers
        headers = {name: given[key].decode("latin-1") for key, name in FORWARDED if key in given}
        request_id = exchange.request_id.decode("ascii")
        headers["x-request-id"] = request_id
        several = len(plan.requests) > 1
        readers = [
            _Reader(plan.model, request, f"{request_id}-{number}" if several else request_id, headers, self._timeout)
            for number, request in enumerate(plan.requests)
        ]

        def client_left() -> None:
            for reader in readers:
                reader.close()

        exchange.watch(client_left)
        return readers

    # An answer in one piece

    async def _collect(self, exchange: Exchange, plan: Plan, began: float) -> None:
        readers = self._open(exchange, plan)
        if len(readers) == 1:
            texts = [await _read(readers[0], plan.answers[0], plan.model.metrics, began)]
        else:
            tasks = [
                asyncio.create_task(_read(reader, answer, plan.model.metrics, began))
                for reader, answer in zip(readers, plan.answers, strict=True)
            ]
            try:
                texts = await asyncio.gather(*tasks)
            finally:
                await _end(tasks)
        choices = []
        for answer, text in zip(plan.answers, texts, strict=True):
            found = answer.take_logprobs()
            logprobs = plan.form.logprobs(plan.model.tokenizer, found) if found else None
            choices.append(plan.form.choice(answer.index, text, answer.finish_reason, logprobs))
        _count(plan)
        body = {
            "id": plan.response_id,
            "object": plan.form.object,
            "created": plan.created,
            "model": plan.model.name,
            "choices": choices,
            "usage": plan.usage(),
        }
        await exchange.reply(200, orjson.dumps(body), [JSON])

    # An answer as it comes

    async def _stream(self, exchange: Exchange, plan: Plan, began: float) -> int:
        """Returns the status for the metrics. Before the first item, errors are raised; after it, they are events."""
        readers = self._open(exchange, plan)
        parts: list[bytes] = []
        status = 200
        try:
            writer = _Writer(exchange, plan, began, parts)
            try:
                if len(readers) == 1:
                    await _stream_one(readers[0], plan.answers[0], writer)
                else:
                    await _stream_several(readers, plan.answers, writer)
                if plan.with_usage:
                    parts.append(plan.answers[0].form.usage(plan.usage()))
                parts.append(DONE)
            except (ApiError, DynwireError) as error:
                if exchange.gone:
                    return CLIENT_LEFT
                if not exchange.started:
                    raise
                problem = error if isinstance(error, ApiError) else from_error(error, self._retry_after)
                status = problem.status
                parts.append(error_event(problem))
            except BaseException:
                if exchange.started and not exchange.gone:
                    parts.append(error_event(ApiError(500, "the frontend failed; its log says more", code="internal_error")))
                    await writer.send(last=True)
                raise
            await writer.send(last=True)
        finally:
            _count(plan)
        return status


class _Writer:
    """Sends what has come together, and keeps the times."""

    __slots__ = ("_answers", "_exchange", "_last", "_metrics", "_parts", "_tokens")

    def __init__(self, exchange: Exchange, plan: Plan, began: float, parts: list[bytes]) -> None:
        self._exchange = exchange
        self._answers = plan.answers
        self._metrics = plan.model.metrics
        self._parts = parts
        self._last = began
        self._tokens = 0

    async def send(self, last: bool = False) -> None:
        """Send the parts there are, and forget them."""
        exchange, parts, answers = self._exchange, self._parts, self._answers
        tokens = answers[0].tokens if len(answers) == 1 else sum([answer.tokens for answer in answers])
        new = tokens - self._tokens
        if new:
            now = clock()
            if self._tokens:
                self._metrics.gap.add((now - self._last) / new, new)
            else:
                self._metrics.first_token.add(now - self._last)
            self._last = now
            self._tokens = tokens
        if not exchange.started:
            await exchange.start(200, SSE_HEADERS)
            parts[:0] = [answer.form.first() for answer in answers]
        if parts or last:
            data = b"".join(parts)
            parts.clear()
            await exchange.send({"type": "http.response.body", "body": data, "more_body": not last})


class _Reader:
    """Items of one answer. A worker that certainly has not begun is replaced by another one, which the client never notices."""

    __slots__ = ("_closed", "_context_id", "_headers", "_model", "_request", "_stream", "_timeout", "first", "items")

    def __init__(
        self, model: Model, request: EngineRequest, context_id: str, headers: dict[str, str], timeout: float | None
    ) -> None:
        self._model = model
        self._request = request
        self._context_id = context_id
        self._headers = headers
        self._timeout = timeout
        self._stream: AsyncReplyStream | None = None
        self._closed = False
        self.first: Any = None
        """the first item; None if there is none"""
        self.items: Any = None

    async def __aenter__(self) -> _Reader:
        """Ask, and wait for the first item."""
        left = MORE_WORKERS
        while True:
            context = Context(id=self._context_id, headers=self._headers)
            stream = self._model.client().stream(self._request, timeout=self._timeout, context=context)
            self._stream = stream
            if self._closed:
                stream.close()
            try:
                await stream.__aenter__()
                self.items = stream.__aiter__()
                self.first = await self.items.__anext__()
                return self
            except StopAsyncIteration:
                return self
            except DynwireError as error:
                await stream.__aexit__(type(error), error, None)
                # The planes repeat what did not leave; what a worker has refused comes back as the stream's first item.
                untouched = error.sent == "no" and (error.retryable or isinstance(error, EndpointNotFound))
                if not untouched or not left or self._closed:
                    raise
                left -= 1
            except BaseException:
                stream.close()
                raise

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        assert self._stream is not None
        await self._stream.__aexit__(kind, error, traceback)

    def close(self) -> None:
        """The client has left, or wants no more: the worker is told."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()


async def _stream_one(reader: _Reader, answer: Answer, writer: _Writer) -> None:
    parts = writer._parts
    async with reader:
        items, item = reader.items, reader.first
        take, add = items.__anext__, answer.events
        while True:
            try:
                if item is None:
                    item = await take()
                add(item, parts)
                while answer.finish_reason is None and items.ready:
                    add(await take(), parts)
            except StopAsyncIteration:
                answer.end_events(parts)
            if answer.finish_reason is not None:
                await _take_end(items)
                return
            if parts or not writer._tokens:
                await writer.send()
            item = None


async def _take_end(items: Any) -> None:
    """The end of a stream mostly comes together with its last item; then closing it has nothing to tell the worker."""
    with suppress(StopAsyncIteration, DynwireError):
        while items.ready:
            await items.__anext__()


async def _stream_several(readers: Sequence[_Reader], answers: Sequence[Answer], writer: _Writer) -> None:
    parts = writer._parts
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(QUEUE_ITEMS * len(readers))

    async def pump(number: int) -> None:
        outcome: Any = None
        try:
            async with readers[number] as reader:
                if reader.first is not None:
                    await queue.put((number, reader.first))
                    async for item in reader.items:
                        await queue.put((number, item))
        except DynwireError as error:
            outcome = error
        await queue.put((number, outcome))

    tasks = [asyncio.create_task(pump(number)) for number in range(len(readers))]
    try:
        left = len(readers)
        while left:
            number, item = await queue.get()
            while True:
                answer = answers[number]
                if answer.finish_reason is None:
                    if isinstance(item, DynwireError):
                        raise item
                    if item is None:
                        answer.end_events(parts)
                    else:
                        answer.events(item, parts)
                    if answer.finish_reason is not None:
                        left -= 1
                        readers[number].close()
                if not left or queue.empty():
                    break
                number, item = queue.get_nowait()
            if left:
                await writer.send()
    finally:
        await _end(tasks)


async def _read(reader: _Reader, answer: Answer, metrics: ModelMetrics, began: float) -> str:
    """The text of an answer."""
    reason: str | None = None
    token_ids: list[int] = []
    texts: list[str] = []
    async with reader:
        last = clock()
        metrics.first_token.add(last - began)
        items, item = reader.items, reader.first
        try:
            if item is None:
                item = await items.__anext__()
            if answer.whole:
                reason = answer.note(item, token_ids)
                while reason is None:
                    reason = answer.note(await items.__anext__(), token_ids)
            else:
                texts.append(answer.take(item))
                while answer.finish_reason is None:
                    texts.append(answer.take(await items.__anext__()))
        except StopAsyncIteration:
            if answer.whole:
                reason = answer.reason_of_end()
            else:
                texts.append(answer.ended())
        await _take_end(items)
    if answer.tokens > 1:
        metrics.gap.add((clock() - last) / (answer.tokens - 1), answer.tokens - 1)
    return "".join(texts) if reason is None else answer.text_of(token_ids, reason)


def _count(plan: Plan) -> None:
    metrics = plan.model.metrics
    metrics.input_tokens += plan.prompt_tokens
    metrics.prompt_sizes.add(plan.prompt_tokens)
    for answer in plan.answers:
        metrics.output_tokens += answer.tokens
        metrics.cached_tokens += answer.cached_tokens


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _encode(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    if len(text) > LONG_TEXT_CHARS:
        return await asyncio.to_thread(tokenizer.encode, text, special)
    return tokenizer.encode(text, special)
