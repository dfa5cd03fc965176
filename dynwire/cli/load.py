"""``dynwire load``: load on an OpenAI-compatible server, and a table of what came back."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..errors import ConfigError, ConnectError
from . import tables
from ._common import Command, parse_headers, read_data, run_async, to_json

if TYPE_CHECKING:
    from ..loadgen.run import Plan, Run, Tally

DEFAULT_CONCURRENCY = 8
DEFAULT_DURATION_S = 10.0
BAR_WIDTH = 30
TICK_S = 0.1
# without a terminal a line now and then shows that it lives
TICK_QUIET_S = 5.0


@click.command(name="load", cls=Command)
@click.argument("url")
@click.option("--model", help="Model to ask for; default: the first that the server lists.")
@click.option("-c", "--concurrency", type=click.IntRange(1, 16384), help=f"Requests at once.  [default: {DEFAULT_CONCURRENCY}]")
@click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="PER_SECOND",
              help="Requests per second at random moments (Poisson), whether the server keeps up or not.")  # fmt: skip
@click.option("-d", "--duration", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
              help=f"How long requests are sent.  [default: {DEFAULT_DURATION_S:g}]")  # fmt: skip
@click.option("-n", "--requests", type=click.IntRange(1), help="How many are sent; with --duration whichever ends first.")
@click.option("--stream/--no-stream", default=True, show_default=True, help="Streamed replies, or whole ones.")
@click.option("--api", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option("--prompt-words", type=click.IntRange(0), default=100, show_default=True, help="Words of a prompt of its own.")
@click.option("--prefix-groups", type=click.IntRange(0), default=0, show_default=True,
              help="Different prefixes, of which every prompt gets one; 0: none.")  # fmt: skip
@click.option("--prefix-words", type=click.IntRange(0), default=500, show_default=True, help="Words of a shared prefix.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of an answer.")
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True, help="Have every answer use up --max-tokens.")
@click.option("--warmup", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
              help="Load before, that is not counted.")  # fmt: skip
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, metavar="SECONDS",
              help="For one request.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and moments.")
@click.option("--header", "headers", metavar="NAME=VALUE", multiple=True, help="Header to send.")
@click.option("--api-key", metavar="KEY|@FILE", help="Sent as a bearer token.")
@click.option("--body", metavar="JSON", help="More fields of every request, for example '{\"temperature\": 0}'.")
@click.option("--chart", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw distributions and throughput (.png, .svg, .pdf).")  # fmt: skip
@click.option("--json", "as_json", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write the numbers here too; - prints them instead of the table.")  # fmt: skip
def command(
    url: str,
    model: str | None,
    concurrency: int | None,
    rate: float | None,
    duration: float | None,
    requests: int | None,
    stream: bool,
    api: str,
    prompt_words: int,
    prefix_groups: int,
    prefix_words: int,
    max_tokens: int,
    ignore_eos: bool,
    warmup: float,
    timeout: float,
    seed: int,
    headers: tuple[str, ...],
    api_key: str | None,
    body: str | None,
    chart: Path | None,
    as_json: str | None,
) -> None:
    """Send chat completions to the server at URL and measure.

    With --rate the moments of sending do not depend on the server, and latencies count from the moment when a request was
    due, so that a server that falls behind cannot hide it. Ctrl-C ends the run and shows what there is. Exit code 1 if no
    request succeeded.
    """
    if rate is not None and concurrency is not None:
        raise click.UsageError("--rate and --concurrency exclude each other")
    if importlib.util.find_spec("httptools") is None:
        raise ConfigError("dynwire load needs httptools: pip install 'dynwire[load]'", name="load", allowed="httptools")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--chart needs matplotlib: pip install matplotlib", name="chart", allowed="matplotlib")
    from ..loadgen.http import Target
    from ..loadgen.prompts import Shape
    from ..loadgen.report import chart as draw
    from ..loadgen.report import summary
    from ..loadgen.run import Plan

    given = {name.lower(): value for name, value in (parse_headers(headers) or {}).items()}
    if api_key:
        key = (read_data(api_key) or b"") if api_key.startswith("@") else api_key.encode()
        given["authorization"] = f"Bearer {key.decode('latin-1').strip()}"

    try:
        target = Target(url, given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if duration is None and requests is None:
        duration = DEFAULT_DURATION_S
    if concurrency is None and rate is None:
        concurrency = DEFAULT_CONCURRENCY
    plan = Plan(concurrency=concurrency, rate=rate, duration=duration, requests=requests, timeout=timeout, seed=seed)
    extra = _fields(body)

    async def go() -> tuple[str, Tally]:
        chosen = model or await _first_model(target)
        shape = Shape(
            model=chosen,
            chat=api == "chat",
            stream=stream,
            prompt_words=prompt_words,
            prefix_groups=prefix_groups,
            prefix_words=prefix_words,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            extra=extra,
        )
        return chosen, await _play(target, shape, plan, warmup)

    chosen, tally = run_async(go())
    result = {
        "url": url,
        "model": chosen,
        "api": api,
        "stream": stream,
        "concurrency": concurrency,
        "rate": rate,
        "prompt_words": prompt_words,
        "prefix_groups": prefix_groups,
        "prefix_words": prefix_words if prefix_groups else 0,
        "max_tokens": max_tokens,
        "seed": seed,
        **summary(tally),
    }

    if as_json is not None and as_json != "-":
        Path(as_json).write_text(msgspec.json.format(to_json(result), indent=2) + "\n")
    if chart is not None:
        load = f"{rate:g} requests/s" if rate is not None else f"{concurrency} at once"
        draw(tally, f"{chosen} at {target.authority}, {load}", chart)

    if as_json == "-":
        click.echo(to_json(result))
    else:
        _show(result)
    if not tally.done:
        click.get_current_context().exit(130 if tally.interrupted else 1)


def _fields(body: str | None) -> dict[str, Any] | None:
    if body is None:
        return None
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise click.UsageError(f"--body is no JSON object: {error}") from error


async def _first_model(target: Any) -> str:
    from ..loadgen.http import Exchange, LoadError, Pool, clock

    pool = Pool(target)
    exchange = Exchange(clock())
    try:
        await pool.run(target.get("/v1/models"), exchange)
        listed = msgspec.json.decode(exchange.body)["data"]
        return str(listed[0]["id"])
    except LoadError as error:
        raise ConnectError(f"cannot ask {target.authority} for its models: {error}", peer=target.authority) from error
    except (KeyError, TypeError, msgspec.DecodeError) as error:
        raise ConnectError(f"{target.authority}/v1/models answers with something else", peer=target.authority) from error
    except IndexError:
        raise ConnectError(f"{target.authority} serves no model; name one with --model", peer=target.authority) from None
    finally:
        pool.close()


async def _play(target: Any, shape: Any, plan: Plan, warmup: float) -> Tally:
    from dataclasses import replace

    from ..loadgen.run import Run

    loop = asyncio.get_running_loop()
    current: list[Run] = []

    def interrupt() -> None:
        # the second Ctrl-C ends it at once
        loop.remove_signal_handler(signal.SIGINT)
        for run in current:
            run.stop()

    loop.add_signal_handler(signal.SIGINT, interrupt)

    try:
        for part in ([replace(plan, duration=warmup, requests=None, seed=plan.seed + 1000)] if warmup else []) + [plan]:
            run = Run(target, shape, part)
            current[:] = [run]
            ticking = asyncio.ensure_future(tick(run, "warm-up" if part is not plan else "load"))
            try:
                tally = await run.start()
            finally:
                ticking.cancel()
                with suppress(asyncio.CancelledError):
                    await ticking
            if tally.interrupted:
                break
        return tally
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def tick(run: Run, name: str) -> None:
    """The progress bar, on stderr."""
    live = sys.stderr.isatty()
    try:
        while True:
            await asyncio.sleep(TICK_S if live else TICK_QUIET_S)
            tally, share = run.tally, run.progress()
            filled = int(share * BAR_WIDTH)
            text = (
                f"{name} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {share:4.0%}  {tally.done} done, "
                f"{tally.in_flight} in flight{f', {tally.failed} failed' if tally.failed else ''}"
            )
            click.echo(f"\r{text}\x1b[K" if live else text, nl=not live, err=True)
    finally:
        if live:
            click.echo("\r\x1b[K", nl=False, err=True)


def _show(result: dict[str, Any]) -> None:
    counted = result["requests"]
    load = f"{result['rate']:g} requests/s" if result["rate"] is not None else f"{result['concurrency']} at once"
    click.echo(
        f"{result['model']}: {counted['done']} requests done, {counted['failed']} failed in {tables.duration(result['seconds'])}"
        f" ({load}, {'streamed' if result['stream'] else 'not streamed'}){', interrupted' if result['interrupted'] else ''}"
    )
    tokens = result["tokens"]
    cached = f", {tokens['cached'] / tokens['prompt']:.0%} of the prompts from the cache" if tokens["cached"] else ""
    click.echo(f"{result['requests_per_s']:,.1f} requests/s, {result['tokens_per_s']:,.0f} tokens/s{cached}\n")
    names = [("time to first token", "ttft"), ("between tokens", "itl")] if result["stream"] else []
    rows = []
    for shown, name in [*names, ("whole answer", "latency")]:
        found = result[name]
        rows.append((shown, *(tables.duration(found[column]) for column in ("mean", "p50", "p90", "p99", "max"))))
    click.echo(tables.render(("", "MEAN", "P50", "P90", "P99", "MAX"), rows))
    late = result["late"]["p99"]
    if late is not None and result["rate"] is not None and late > 0.005:
        click.echo(f"\nRequests were sent {tables.duration(late)} late (p99): this machine or the connections are the limit.")
    if result["generator_cpu_seconds"] > 0.9 * result["seconds"]:
        click.echo("\nThis process used up its core: the server may be able to do more.")
    if result["errors"]:
        click.echo()
        errors = [(found["count"], kind, (found["examples"] or [""])[0]) for kind, found in result["errors"].items()]
        click.echo(tables.render(("COUNT", "ERROR", "FOR EXAMPLE"), errors))
