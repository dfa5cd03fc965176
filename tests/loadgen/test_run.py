"""Load on a server that behaves and misbehaves."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dynwire.loadgen.http import Target
from dynwire.loadgen.prompts import Prompts, Shape
from dynwire.loadgen.report import spread, summary
from dynwire.loadgen.run import Plan, Run, Tally

from .server import Server, serving, until

SHAPE = Shape(model="ok", max_tokens=5, prompt_words=3)


async def load(server: Server, shape: Shape = SHAPE, **plan: Any) -> Tally:
    return await Run(Target(server.url), shape, Plan(**{"timeout": 20.0, **plan})).start()


async def test_a_number_of_requests() -> None:
    async with serving() as server:
        tally = await load(server, concurrency=4, requests=21)
    assert (tally.sent, tally.done, tally.failed, tally.tokens, tally.events) == (21, 21, 0, 105, 105)
    assert server.most_at_once <= 4 and tally.connections <= 4
    assert len(tally.ttft) == len(tally.latency) == 21 and len(tally.gaps) + tally.together == 21 * 4
    assert (tally.prompt_tokens, tally.cached_tokens) == (21 * 11, 21 * 8) and tally.finish_reasons == {"length": 21}
    assert tally.cpu > 0 and tally.elapsed > 0
    assert sum(tally.token_bins.values()) == 105 and sum(tally.done_bins.values()) == 21


async def test_replies_that_are_not_streamed() -> None:
    async with serving() as server:
        tally = await load(server, replace(SHAPE, stream=False, chat=False), concurrency=2, requests=5)
    assert (tally.done, tally.tokens, tally.events) == (5, 25, 0)
    assert all(not body["stream"] and isinstance(body["prompt"], str) for body in server.bodies)


async def test_a_duration_ends_the_sending_and_waits_for_what_is_in_flight() -> None:
    async with serving() as server:
        tally = await load(server, concurrency=2, duration=0.2)
    assert tally.sent == tally.done > 0 and tally.in_flight == 0


async def test_a_rate_does_not_wait_for_replies() -> None:
    """Ten requests are due, and none is answered: all are in flight, and their time counts from when they were due."""
    async with serving() as server:
        run = Run(Target(server.url), replace(SHAPE, model="gate"), Plan(rate=200.0, requests=10, timeout=20.0))
        running = asyncio.ensure_future(run.start())
        await until(lambda: server.at_once == 10)
        assert run.tally.in_flight == 10 and not running.done()
        server.gate.set()
        tally = await running
    assert tally.done == 10 and min(tally.latency) > 0


async def test_what_waits_for_a_place_counts_from_when_it_was_due() -> None:
    async with serving() as server:
        run = Run(Target(server.url), replace(SHAPE, model="gate"), Plan(rate=1000.0, requests=5, max_in_flight=1, timeout=20.0))
        running = asyncio.ensure_future(run.start())
        await until(lambda: run.tally.sent == 5)
        await asyncio.sleep(0.2)  # the time that has to show
        server.gate.set()
        tally = await running
    assert server.most_at_once == 1
    assert sorted(tally.late)[1] > 0.15 and min(tally.ttft) > 0.15, "coordinated omission"


async def test_the_same_seed_sends_the_same() -> None:
    async def bodies(seed: int) -> list[Any]:
        async with serving() as server:
            await load(server, replace(SHAPE, prefix_groups=2, prefix_words=5), concurrency=1, requests=6, seed=seed)
        return server.bodies

    first, again, other = await bodies(1), await bodies(1), await bodies(2)
    assert first == again != other
    prefixes = {body["messages"][0]["content"] for body in first}
    assert len(prefixes) == 2 and len({body["messages"][1]["content"] for body in first}) == 6


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("refuse", "HTTP 503 overloaded"),
        ("page", "HTTP 502"),
        ("middle", "in stream worker_lost"),
        ("cut", "reply cut off"),
        ("endless", "stream without an end"),
        ("garbage", "bad HTTP"),
        ("silent", "closed without a reply"),
    ],
)
async def test_failures_are_counted_by_kind(model: str, kind: str) -> None:
    async with serving() as server:
        tally = await load(server, replace(SHAPE, model=model), concurrency=2, requests=4)
    assert tally.errors == {kind: 4} and (tally.done, tally.sent) == (0, 4)


async def test_a_reply_that_does_not_come_ends_with_the_timeout() -> None:
    async with serving() as server:
        tally = await load(server, replace(SHAPE, model="hang"), concurrency=2, requests=2, timeout=0.2)
    assert tally.errors == {"timeout": 2}


async def test_nobody_listens() -> None:
    async with serving() as server:
        pass
    tally = await load(server, concurrency=1, requests=2)
    assert tally.errors == {"connection refused": 2}


async def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    async with serving() as server:
        tally = await load(server, replace(SHAPE, model="forgetful"), concurrency=1, requests=5)
    assert (tally.done, tally.failed) == (5, 0) and tally.connections >= 2


def _busy(run: Run) -> bool:
    return run.tally.in_flight >= 3


async def test_stopping_gives_up_what_is_in_flight() -> None:
    async with serving() as server:
        for plan in (Plan(concurrency=3, duration=60.0), Plan(rate=500.0, duration=60.0)):
            run = Run(Target(server.url), replace(SHAPE, model="hang"), plan)
            running = asyncio.ensure_future(run.start())
            await until(partial(_busy, run))
            run.stop()
            tally = await running
            assert (tally.interrupted, tally.done, tally.failed, tally.in_flight) == (True, 0, 0, 0)


@pytest.mark.parametrize("plan", [{}, {"concurrency": 1}, {"rate": 1.0}, {"concurrency": 1, "rate": 1.0, "requests": 1}])
def test_wrong_plans(plan: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Plan(**plan)


def test_quantiles() -> None:
    assert spread(array("d"))["p50"] is None
    found = spread(array("d", [4.0, 2.0, 3.0, 1.0]), zeros=6)
    assert (found["count"], found["mean"], found["p50"], found["p90"], found["p99"], found["max"]) == (
        10,
        1.0,
        0.0,
        4.0,
        4.0,
        4.0,
    )


def test_prompts_have_the_length_that_was_asked_for() -> None:
    body = json.loads(Prompts(Shape(model="m", prompt_words=7, prefix_groups=1, prefix_words=3, chat=False), 0).next())
    assert len(body["prompt"].split()) == 10 and body["ignore_eos"] is True
    assert json.loads(Prompts(Shape(model="m", ignore_eos=False, extra={"temperature": 0}), 0).next())["temperature"] == 0


def test_the_time_line_has_every_token() -> None:
    tally = Tally(elapsed=1.0)
    assert len(summary(tally)["timeline"]["tokens"]) == 5


# The command --------------------------------------------------------------------------------------------------------------


async def command(*arguments: str, interrupt_when: Any = None) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dynwire", "load", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if interrupt_when is not None:
        await until(interrupt_when)
        process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_table(tmp_path: Path) -> None:
    async with serving() as server:
        code, out, err = await command(
            *(server.url, "-n", "20", "-c", "4", "--max-tokens", "5", "--header", "x-tenant=a", "--api-key", "secret"),
            *("--json", str(tmp_path / "out.json"), "--chart", str(tmp_path / "out.svg"), "--body", '{"temperature": 0.5}'),
        )
    assert code == 0 and not err
    assert "ok: 20 requests done, 0 failed" in out and "time to first token" in out and "P99" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["requests"]["done"] == 20 and found["tokens"]["completion"] == 100 and found["ttft"]["count"] == 20
    assert "<svg" in (tmp_path / "out.svg").read_text()
    assert server.bodies[0]["temperature"] == 0.5
    assert all(b"authorization: Bearer secret" in head and b"x-tenant: a" in head for head in server.headers)


async def test_json_on_stdout_and_errors_in_it() -> None:
    async with serving() as server:
        code, out, _ = await command(server.url, "--model", "refuse", "-n", "3", "--json", "-")
    found = json.loads(out)
    assert code == 1 and found["errors"]["HTTP 503 overloaded"] == {"count": 3, "examples": ["too much to do"]}


async def test_ctrl_c_shows_what_there_is() -> None:
    async with serving() as server:
        code, out, err = await command(
            *(server.url, "--rate", "100", "-d", "60", "--max-tokens", "5"), interrupt_when=lambda: len(server.bodies) > 20
        )
    assert code == 0 and "interrupted" in out and "Traceback" not in err


async def test_nobody_to_ask_for_models() -> None:
    async with serving() as server:
        pass
    code, out, err = await command(server.url)
    assert code == 1 and not out and "ConnectError" in err and "models" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--rate", "1", "-c", "1"], "exclude"), (["--body", "[]"], "--body"), (["--header", "x"], "NAME=VALUE")],
)
async def test_wrong_usage(arguments: list[str], text: str) -> None:
    code, _, err = await command("http://127.0.0.1:1", *arguments)
    assert code == 2 and text in err
