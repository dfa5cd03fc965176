"""Random frame scripts into the native engine and the h2 library, and into the native engine whole and in pieces.

``DYNWIRE_FUZZ_CASES`` as for tests/sansio/test_fuzz.py, of whose cases one script here stands for 25: by default 4,000 scripts.
``DYNWIRE_FUZZ_SEED`` takes others.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from . import differential as d
from . import frames as f

CASES = max(int(os.environ.get("DYNWIRE_FUZZ_CASES", "100000")) // 25, 40)
FIRST = int(os.environ.get("DYNWIRE_FUZZ_SEED", "1")) * 10_000_000


@pytest.mark.hard_timeout(60 + CASES / 20)
@pytest.mark.parametrize("role", ["server", "client"])
def test_engines_agree(role: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + CASES // 2):
        result = d.run(role, seed)
        seen["frames"] += result.frames
        seen[result.difference or ("the same error" if result.error is not None else "the same")] += 1
    print(dict(seen))
    # scripts that are refused at once, or never, would compare little
    assert seen["the same"] > CASES / 8, seen
    assert seen["the same error"] > CASES / 20, seen
    assert seen["frames"] > CASES * 3, seen


@pytest.mark.hard_timeout(60 + CASES / 20)
@pytest.mark.parametrize("role", ["server", "client"])
def test_cuts_do_not_matter(role: str) -> None:
    for seed in range(FIRST, FIRST + CASES // 8):
        d.split(role, "native", seed)
    for seed in range(FIRST, FIRST + 20):
        d.split(role, "native", seed, single=True)
        d.split(role, "h2", seed)


@pytest.mark.parametrize("role", ["server", "client"])
def test_an_unintended_difference_is_found(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rule less, and scripts that need it fail."""
    name = next(name for name in d.INTENDED if name.startswith("a malformed message"))
    monkeypatch.delitem(d.INTENDED, name)
    with pytest.raises(d.UnintendedDifference, match=r"python -m tests.http2.differential"):
        for seed in range(FIRST, FIRST + 200):
            d.run(role, seed)


def step(frame: bytes, native: d.Outcome, h2: d.Outcome) -> d.Step:
    parsed = next(f.FrameReader().feed(frame))
    return d.Step(parsed, native, h2, frozenset(), 1, frozenset(), frozenset(), False, False)


def test_rules_are_narrow() -> None:
    """What would be a defect of the native engine is not excused."""
    reset, error = d.Outcome(resets={(1, f.PROTOCOL_ERROR)}), d.Outcome(error=f.PROTOCOL_ERROR, text="some other reason")
    passed = d.Outcome(events=[("headers", 1, [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")], "request", True)])
    get = f.headers(1, b"", end=True)
    for frame, native, h2 in (
        (get, reset, error),
        (get, reset, passed),
        (get, passed, error),
        (get, passed, reset),
        (get, d.Outcome(), error),
        (f.data(1, b"x"), d.Outcome(), d.Outcome(resets={(1, f.STREAM_CLOSED)})),
        (f.data(1, b"x"), d.Outcome(error=f.PROTOCOL_ERROR), d.Outcome(resets={(1, f.STREAM_CLOSED)})),
        (f.window_update(1, 5), reset, d.Outcome()),
        (f.window_update(1, 0), d.Outcome(), d.Outcome()),
        (f.rst_stream(1), d.Outcome(error=f.PROTOCOL_ERROR), d.Outcome()),
        (f.ping(), d.Outcome(error=f.FRAME_SIZE_ERROR), d.Outcome(error=f.PROTOCOL_ERROR)),
        (f.ping(b""), d.Outcome(error=f.PROTOCOL_ERROR), d.Outcome(error=f.FRAME_SIZE_ERROR)),
    ):
        assert d.explain(step(frame, native, h2)) is None, (frame, str(native), str(h2))
