"""Fixtures of the tests without sockets."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def collected_before() -> None:
    """Connections of earlier tests are gone, with the blocks they hold: tests compare the pool before and after."""
    gc.collect()
