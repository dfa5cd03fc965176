"""Aligned tables and human units, without a dependency."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence


def _width(text: str) -> int:
    # wide East Asian characters take two columns, combining marks none
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    # a control character in a name from the network must not reach the terminal
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def render(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a header line; columns that hold only numbers are aligned to the right. No trailing spaces."""
    body = [list(row) for row in rows]
    cells = [[_cell(value) for value in row] for row in body]
    right = [bool(body) and all(_numeric(row[i]) for row in body) for i in range(len(headers))]
    widths = [max(map(_width, column)) for column in zip(headers, *cells, strict=True)]
    lines = []
    for row in [list(headers), *cells]:
        parts = []
        for text, width, to_right in zip(row, widths, right, strict=True):
            pad = " " * (width - _width(text))
            parts.append(pad + text if to_right else text + pad)
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _numeric(value: object) -> bool:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return True
    return isinstance(value, str) and value[:1].isdigit() and value.split(" ")[-1] in ("µs", "ms", "s", "/s")


def duration(seconds: float | None) -> str | None:
    """``83 µs``, ``1.2 ms``, ``3.4 s``: three significant digits at most."""
    if seconds is None:
        return None
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        value = seconds * factor
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def age(seconds: float) -> str:
    """``5s``, ``3m12s``, ``2h05m``, ``4d03h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def percentile(sorted_values: Sequence[float], q: float) -> float | None:
    """Nearest-rank percentile of sorted values, None without values; ``q`` from 0 to 1."""
    if not sorted_values:
        return None
    return sorted_values[min(len(sorted_values) - 1, int(q * len(sorted_values)))]
