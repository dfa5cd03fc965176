"""What came of a run: numbers for JSON, and a chart."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from .run import BIN_S, Tally

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def spread(values: array[float], zeros: int = 0) -> dict[str, float | int | None]:
    """Mean, quantiles (nearest rank) and maximum of ``values`` and as many zeros; None without values."""
    count = len(values) + zeros
    if not count:
        return {"count": 0, "mean": None, **dict.fromkeys(QUANTILES), "max": None}
    ordered = sorted(values)

    def at(q: float) -> float:
        place = min(count - 1, int(q * count)) - zeros
        return 0.0 if place < 0 else ordered[place]

    found = {name: at(q) for name, q in QUANTILES.items()}
    return {"count": count, "mean": sum(ordered) / count, **found, "max": ordered[-1] if ordered else 0.0}


def summary(tally: Tally) -> dict[str, Any]:
    """Everything about a run, in seconds and counts, as JSON can hold it."""
    elapsed = tally.elapsed or 1e-9
    return {
        "seconds": tally.elapsed,
        "generator_cpu_seconds": tally.cpu,
        "interrupted": tally.interrupted,
        "requests": {"sent": tally.sent, "done": tally.done, "failed": tally.failed, "connections": tally.connections},
        "requests_per_s": tally.done / elapsed,
        "tokens_per_s": tally.tokens / elapsed,
        "events_per_s": tally.events / elapsed,
        "tokens": {"prompt": tally.prompt_tokens, "cached": tally.cached_tokens, "completion": tally.tokens},
        "ttft": spread(tally.ttft),
        "itl": spread(tally.gaps, tally.together),
        "latency": spread(tally.latency),
        "late": spread(tally.late),
        "finish_reasons": dict(tally.finish_reasons),
        "errors": {kind: {"count": count, "examples": tally.texts[kind]} for kind, count in tally.errors.most_common()},
        "timeline": {
            "bin_s": BIN_S,
            "requests": _bins(tally.done_bins, tally.elapsed),
            "tokens": _bins(tally.token_bins, tally.elapsed),
        },
    }


def _bins(counts: dict[int, int], elapsed: float) -> list[int]:
    return [counts.get(n, 0) for n in range(int(elapsed / BIN_S) + 1)]


def chart(tally: Tally, title: str, path: Path) -> None:
    """Draw distributions and the time line; the suffix says in which format. Needs matplotlib: `ImportError` without."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    try:
        for axes, values, zeros, name in (
            (left, tally.ttft, 0, "time to first token"),
            (middle, tally.gaps, tally.together, "time between tokens"),
        ):
            ordered = [0.0] * min(1, zeros) + [value * 1e3 for value in sorted(values)]
            count = len(values) + zeros
            shares = [zeros / count] * min(1, zeros) + [100 * (zeros + n) / count for n in range(1, len(values) + 1)]
            axes.plot(ordered, shares, drawstyle="steps-post")
            if ordered:
                # the very last ones would squeeze all others into a line; the table names them
                axes.set_xlim(0, max(1e-3, 1.2 * ordered[min(len(ordered) - 1, int(0.995 * len(ordered)))]))
            axes.set(title=name, xlabel="ms", ylabel="% of them", ylim=(0, 100))
            axes.grid(alpha=0.3)
        tokens = _bins(tally.token_bins, tally.elapsed)
        right.plot([n * BIN_S for n in range(len(tokens))], [count / BIN_S for count in tokens])
        right.set(title="throughput", xlabel="s", ylabel="tokens/s", ylim=(0, None))
        right.grid(alpha=0.3)
        figure.suptitle(title)
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)
