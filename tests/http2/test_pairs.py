"""Clients and servers on both engines talk to each other while their applications do random things; see `tests.http2.pairs`.

``DYNWIRE_FUZZ_CASES`` as for tests/sansio/test_fuzz.py, of whose cases one here stands for 500: by default 200 for each pair.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from . import pairs

CASES = max(int(os.environ.get("DYNWIRE_FUZZ_CASES", "100000")) // 500, 10)
FIRST = int(os.environ.get("DYNWIRE_FUZZ_SEED", "1")) * 10_000_000


@pytest.mark.hard_timeout(60 + CASES / 5)
@pytest.mark.parametrize("server", ["native", "h2"])
@pytest.mark.parametrize("client", ["native", "h2"])
def test_pair(client: str, server: str) -> None:
    total: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + CASES):
        try:
            total += pairs.run(client, server, seed)
        except AssertionError as error:
            raise AssertionError(f"python -m tests.http2.pairs {client} {server} {seed}: {error}") from error
    assert total["messages"] > CASES * 4, total
    assert total["resets"] > CASES / 2, total
