"""What asyncio offers works inside a handler from its first line, and after a suspension, on both loops."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib.util
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import dynwire

from .conftest import Managers

pytestmark = pytest.mark.parametrize("face", ["async-asyncio", "async-uvloop"], indirect=True)

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture(params=["first line", "after a suspension"])
def suspended(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "after a suspension")


@pytest.fixture(params=["coroutine", "generator", "second item"])
def shape(request: pytest.FixtureRequest) -> str:
    text: str = request.param
    return text


async def run_inside(managers: Managers, suspended: bool, shape: str, body: Callable[..., Any], times: int = 1) -> list[Any]:
    """What ``body(context)`` returns when it runs as a handler."""

    async def coroutine(request: Any, context: dynwire.Context) -> Any:
        if suspended:
            await asyncio.sleep(0)
        return await body(context)

    async def generator(request: Any, context: dynwire.Context) -> Any:
        if suspended:
            await asyncio.sleep(0)
        yield await body(context)

    async def second(request: Any, context: dynwire.Context) -> Any:
        yield "first"
        if suspended:
            await asyncio.sleep(0)
        yield await body(context)

    async with managers() as manager:
        await manager.serve("f.in.side", {"coroutine": coroutine, "generator": generator, "second item": second}[shape])
        client = await manager.client("f.in.side")
        if shape == "second item":
            found = [[item async for item in client.stream(i, timeout=10.0)] for i in range(times)]
            assert all(len(items) == 2 and items[0] == "first" for items in found)
            return [items[1] for items in found]
        return [await client.call(i, timeout=10.0) for i in range(times)]


async def test_current_task(managers: Managers, suspended: bool, shape: str) -> None:
    seen = []

    async def body(context: dynwire.Context) -> list[Any]:
        first = asyncio.current_task()
        assert first is not None
        in_all_before = first in asyncio.all_tasks()
        await asyncio.sleep(0)
        second = asyncio.current_task()
        await asyncio.sleep(0.01)
        seen.append(first)
        await asyncio.gather(asyncio.sleep(0))
        return [
            first is second is asyncio.current_task(),
            in_all_before or not suspended,
            first in asyncio.all_tasks(),
            first.done(),
            first.cancelling(),
            first.get_loop() is asyncio.get_running_loop(),
            isinstance(first.get_name(), str) and bool(repr(first)),
        ]

    results = await run_inside(managers, suspended, shape, body, 3)
    assert results == [[True, True, True, False, 0, True, True]] * 3
    assert len({id(task) for task in seen}) == 3, "kept, so all different"
    assert all(task.done() for task in seen)


async def test_timeout(managers: Managers, suspended: bool, shape: str) -> None:
    async def body(context: dynwire.Context) -> list[Any]:
        out: list[Any] = []
        try:
            async with asyncio.timeout(0.02) as scope:
                await asyncio.sleep(20)
        except TimeoutError:
            out.append(scope.expired())
        try:
            await asyncio.wait_for(asyncio.sleep(20), 0.02)
        except TimeoutError:
            out.append("wait_for")
        async with asyncio.timeout(10):
            out.append(await asyncio.wait_for(asyncio.sleep(0, "value"), 10))
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(20)
        except TimeoutError:
            out.append("zero")
        task = asyncio.current_task()
        assert task is not None
        return [*out, task.cancelling()]

    assert await run_inside(managers, suspended, shape, body) == [[True, "wait_for", "value", "zero", 0]]


async def test_task_group(managers: Managers, suspended: bool, shape: str) -> None:
    async def body(context: dynwire.Context) -> list[Any]:
        out: list[Any] = []

        async def fails() -> None:
            await asyncio.sleep(0.01)
            raise ValueError("child")

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                try:
                    await asyncio.sleep(20)
                except asyncio.CancelledError:
                    out.append("body cancelled")
                    raise
        except* ValueError as errors:
            out.append(len(errors.exceptions))
        async with asyncio.TaskGroup() as group:
            made = [group.create_task(asyncio.sleep(0, i)) for i in range(3)]
        task = asyncio.current_task()
        assert task is not None
        return [*out, [task.result() for task in made], task.cancelling()]

    assert await run_inside(managers, suspended, shape, body) == [["body cancelled", 1, [0, 1, 2], 0]]


async def test_gather_and_shield(managers: Managers, suspended: bool, shape: str) -> None:
    async def body(context: dynwire.Context) -> list[Any]:
        one, two = await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0.01, 2))
        inner = asyncio.ensure_future(asyncio.sleep(0.05, "kept"))
        try:
            async with asyncio.timeout(0.01):
                await asyncio.shield(inner)
        except TimeoutError:
            pass
        failed = await asyncio.gather(asyncio.sleep(0), _raises(), return_exceptions=True)
        return [one, two, await inner, type(failed[1]).__name__]

    async def _raises() -> None:
        raise KeyError

    assert await run_inside(managers, suspended, shape, body) == [[1, 2, "kept", "KeyError"]]


async def test_context_variables(managers: Managers, suspended: bool, shape: str) -> None:
    async def child(context: dynwire.Context) -> bool:
        return dynwire.current_context() is context

    async def body(context: dynwire.Context) -> list[Any]:
        before = variable.get()
        token = variable.set("mine")
        task = asyncio.create_task(child(context))
        await asyncio.sleep(0)
        inherited = await asyncio.create_task(_get())
        kept = variable.get()
        variable.reset(token)
        variable.set("leaky")
        return [before, inherited, kept, await task, dynwire.current_context() is context]

    async def _get() -> str:
        return variable.get()

    assert await run_inside(managers, suspended, shape, body, 3) == [["unset", "mine", "mine", True, True]] * 3
    assert variable.get() == "unset"
    assert dynwire.current_context() is None


async def test_what_a_handler_keeps_stays_its_own(managers: Managers, suspended: bool, shape: str) -> None:
    """Context and variables of a handler that nobody kept serve the next request; what was kept must not change with it."""
    ways = ("nothing", "context", "copy", "derived", "variable", "task", "weakref", "callback", "nothing")
    kept: list[tuple[int, Callable[[], int]]] = []
    refs: list[weakref.ref[dynwire.Context]] = []
    stopped: list[int] = []
    rest = asyncio.Event()

    def see() -> int:
        context = dynwire.current_context()
        assert context is not None
        return int(context.headers["number"])

    async def late() -> int:
        await rest.wait()
        return see()

    async def body(context: dynwire.Context) -> list[Any]:
        number = int(context.headers["number"])
        found = [see() == number, variable.get(), context.is_stopped(), [r() is None for r in refs]]
        match ways[number % len(ways)]:
            case "context":
                kept.append((number, lambda: int(context.headers["number"])))
            case "copy":
                kept.append((number, functools.partial(contextvars.copy_context().run, see)))
            case "derived":
                derived = contextvars.copy_context()
                derived.run(variable.set, "derived")
                kept.append((number, functools.partial(derived.run, see)))
            case "variable":
                variable.set("changed")
            case "task":
                kept.append((number, asyncio.create_task(late()).result))
            case "weakref":
                refs.append(weakref.ref(context))
            case "callback":
                context.on_stop(functools.partial(stopped.append, number))
        return found

    async def coroutine(request: Any, context: dynwire.Context) -> Any:
        if suspended:
            await asyncio.sleep(0)
        return await body(context)

    async def generator(request: Any, context: dynwire.Context) -> Any:
        if suspended:
            await asyncio.sleep(0)
        yield await body(context)

    async with managers() as manager:
        await manager.serve("f.in.side", coroutine if shape == "coroutine" else generator)
        client = await manager.client("f.in.side")
        for number in range(2 * len(ways)):
            found = await client.call(0, timeout=10.0, headers={"number": str(number)})
            assert found == [True, "unset", False, [True] * len(found[3])], ways[number % len(ways)]
        rest.set()
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_coro().__name__ == "late"))  # type: ignore[union-attr]
        assert [look() for _, look in kept] == [number for number, _ in kept]
        assert len(kept) == 8
        assert stopped == []


async def test_errors_between_items(managers: Managers, suspended: bool) -> None:
    """What is raised at an await of a generator, now and later, is the handler's to catch; it ends when the handler says so."""
    known: list[str] = []

    async def fail() -> None:
        if suspended:
            await asyncio.sleep(0)
        raise KeyError("inner")

    async def handler(request: Any) -> Any:
        for number in range(3):
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_exception, LookupError(str(number)))
            try:
                await future
            except LookupError as error:
                yield str(error)
            try:
                await fail()
            except KeyError as error:
                yield repr(error)
        yield b"bytes"
        if request == "raise":
            raise RuntimeError("at the end")
        if request == "return":
            return
        await asyncio.sleep(0)
        yield None

    def firstiter(generator: Any) -> None:
        known.append(generator.__name__)

    hooks = sys.get_asyncgen_hooks()
    async with managers() as manager:
        await manager.serve("f.in.side", handler)
        client = await manager.client("f.in.side")
        caught = [text for number in range(3) for text in (str(number), "KeyError('inner')")]
        for request, rest in (("", [None]), ("return", []), ("raise", [])):
            items = []
            sys.set_asyncgen_hooks(firstiter=firstiter, finalizer=hooks.finalizer)
            try:
                async for item in client.stream(request, timeout=10.0):
                    items.append(item)
                assert request != "raise"
            except dynwire.RemoteError as error:
                assert request == "raise" and "at the end" in str(error)
            finally:
                sys.set_asyncgen_hooks(*hooks)
            assert items == [*caught, b"bytes", *rest]
    assert known.count("handler") == 3, "the loop knows of each generator, once"


async def test_cancelling_itself(managers: Managers, suspended: bool, shape: str) -> None:
    async def body(context: dynwire.Context) -> list[Any]:
        task = asyncio.current_task()
        assert task is not None
        out: list[Any] = [task.cancel(), task.cancelling()]
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            out += ["cancelled", task.uncancel(), task.cancelling()]
        await asyncio.sleep(0)
        task.cancel("with a message")
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError as error:
            out += [list(error.args), task.uncancel()]
        return out

    assert await run_inside(managers, suspended, shape, body) == [[True, 1, "cancelled", 0, 0, ["with a message"], 0]]


async def test_awaiting_it_from_another_task(managers: Managers, suspended: bool, shape: str) -> None:
    watched: list[asyncio.Task[Any]] = []

    async def body(context: dynwire.Context) -> str:
        task: Any = asyncio.current_task()
        called: list[bool] = []
        task.add_done_callback(lambda done: called.append(done is task))

        async def watch() -> Any:
            await asyncio.wait([task])
            return task.done(), called

        watched.append(asyncio.create_task(watch()))
        await asyncio.sleep(0.01)
        return "ended"

    assert await run_inside(managers, suspended, shape, body) == ["ended"]
    done, called = await asyncio.wait_for(watched[0], 10)
    assert (done, called) == (True, [True])


async def test_locks_queues_and_threads(managers: Managers, suspended: bool, shape: str) -> None:
    async def body(context: dynwire.Context) -> list[Any]:
        lock, queue, event = asyncio.Lock(), asyncio.Queue[int](1), asyncio.Event()
        async with lock:
            asyncio.get_running_loop().call_later(0.01, event.set)
            await event.wait()
        producer = asyncio.create_task(_fill(queue))
        got = [await queue.get() for _ in range(3)]
        await producer
        return [got, await asyncio.to_thread(lambda: variable.get())]

    async def _fill(queue: asyncio.Queue[int]) -> None:
        for i in range(3):
            await queue.put(i)

    assert await run_inside(managers, suspended, shape, body) == [[[0, 1, 2], "unset"]]


async def test_the_loop_ends_while_handlers_are_suspended(managers: Managers, suspended: bool, shape: str) -> None:
    """asyncio.run cancels what is in all_tasks: suspended handlers too, with their finally blocks."""
    ends: list[str] = []
    started = asyncio.Event()

    async def body(context: dynwire.Context) -> None:
        try:
            asyncio.get_running_loop().call_soon(started.set)
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def program() -> None:
        async def handler(request: Any, context: dynwire.Context) -> Any:
            if suspended:
                await asyncio.sleep(0)
            return await body(context)

        manager = dynwire.AsyncNetworkManager(tcp_host="127.0.0.1")
        before = asyncio.all_tasks()
        await manager.endpoint("f.in.end").serve(handler)
        client = await manager.endpoint("f.in.end").client()
        await client.wait_for_instances(1, timeout=10)
        call = asyncio.ensure_future(client.call(0, timeout=10))
        await asyncio.wait_for(started.wait(), 10)
        # What asyncio.run does at its end.
        left = [task for task in asyncio.all_tasks() - before if not isinstance(task, asyncio.Task)]
        assert len(left) == 1, "the suspended handler is not among the tasks of the loop"
        left[0].cancel()
        await asyncio.gather(*left, return_exceptions=True)
        with pytest.raises(dynwire.DynwireError):
            await call
        await manager.close()

    await program()
    assert ends == ["cancelled"]


@pytest.mark.skipif(importlib.util.find_spec("anyio") is None, reason="anyio is not installed")
async def test_anyio(managers: Managers, suspended: bool, shape: str) -> None:
    import anyio  # type: ignore[import-not-found, unused-ignore]

    async def body(context: dynwire.Context) -> list[Any]:
        out: list[Any] = []
        try:
            with anyio.fail_after(0.02):
                await anyio.sleep(20)
        except TimeoutError:
            out.append("fail_after")
        with anyio.move_on_after(0.02) as scope:
            await anyio.sleep(20)
        out.append(scope.cancelled_caught)
        try:
            async with anyio.create_task_group() as group:

                async def child() -> None:
                    await anyio.sleep(0.01)
                    raise ValueError

                group.start_soon(child)
                await anyio.sleep(20)
        except BaseExceptionGroup as errors:
            out.append(len(errors.exceptions))
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)
        return out

    assert await run_inside(managers, suspended, shape, body) == [["fail_after", True, 1]]
