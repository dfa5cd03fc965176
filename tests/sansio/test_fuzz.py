"""Random and mutated bytes: a typed error or correct behaviour, never a crash, a hang or memory beyond the limits.

``DYNWIRE_FUZZ_CASES=1000000 python -m pytest tests/sansio/test_fuzz.py`` (``make fuzz``) runs more cases than the default,
``DYNWIRE_FUZZ_SEED`` others.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import fuzz

CASES = int(os.environ.get("DYNWIRE_FUZZ_CASES", "100000"))
SEED = int(os.environ.get("DYNWIRE_FUZZ_SEED", "1"))
CHUNK = 20_000
"""cases of one process; it does not get back the memory of connections that ended with open streams"""


@pytest.mark.hard_timeout(60 + CASES / 1000)
def test_seeded_cases() -> None:
    root = Path(__file__).parents[2]
    total: Counter[str] = Counter()
    for first in range(0, CASES, CHUNK):
        command = [sys.executable, "-m", "tests.sansio.fuzz", str(SEED), str(min(CHUNK, CASES - first)), "--first", str(first)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-6000:]}"
        result = json.loads(done.stdout)
        total["highest_pool_bytes"] = max(total["highest_pool_bytes"], result.pop("highest_pool_bytes"))
        total.update({k: v for k, v in result.items() if k != "seconds"})
    print(dict(total))
    assert total["cases"] == CASES
    # a fuzzer that is always refused at the door, or never, tests nothing
    for name in ("events", "quiet", "ProtocolError", "PlaneMismatch"):
        assert total[name] > CASES / 100, total
    assert total["highest_pool_bytes"] > 0


@settings(max_examples=200, deadline=None)
@given(
    role=st.sampled_from(["client", "server"]),
    with_hello=st.booleans(),
    frames=st.lists(
        st.builds(
            fuzz.o.Frame,
            st.sampled_from([*range(14), 128, 255]),
            st.integers(0, 255),
            st.integers(0, 3),
            st.sampled_from([*range(9), 0xFFFFFFFF]),
            st.sampled_from(fuzz.INTERESTING),
            st.one_of(
                st.binary(max_size=40), st.sampled_from([b"\x00\x00\x01\x00", b"\x70\x11\x01\x00", b"\x01\x00a", b"x" * 65536])
            ),
        ),
        max_size=12,
    ),
    tail=st.binary(max_size=30),
    seed=st.integers(0, 1000),
)
def test_hypothesis_frames(role: str, with_hello: bool, frames: list[fuzz.o.Frame], tail: bytes, seed: int) -> None:
    conn = fuzz.connection(role, with_hello, 3)
    before = fuzz.get_pool().in_use_bytes
    with contextlib.suppress(fuzz.ProtocolError, fuzz.PlaneMismatch):
        fuzz.feed(conn, random.Random(seed), fuzz.o.encode(*frames) + tail)
    assert fuzz.get_pool().in_use_bytes - before <= fuzz.POOL_LIMIT
    conn.output()
    fuzz.release(conn)
