"""What a server remembers of the addresses from where it was abused."""

from __future__ import annotations

import pytest

from dynwire.errors import DynwireError, ProtocolError
from dynwire.planes.http.offenders import Offenders, is_abuse, network_of


def test_less_and_less() -> None:
    offenders = Offenders()
    assert offenders.leniency("10.0.0.1", 0.0) == 1.0
    seen, paused = [], []
    for _ in range(6):
        paused.append(offenders.note("10.0.0.1", 0.0))
        seen.append(offenders.leniency("10.0.0.1", 0.0))
    assert seen == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16, 1 / 16]
    assert paused == [False, True, False, False, False, False], "once, for the log"
    assert [offenders.paused(leniency) for leniency in (1.0, 0.5, 0.25)] == [False, False, True]
    assert offenders.leniency("10.0.0.2", 0.0) == 1.0


def test_time_heals() -> None:
    offenders = Offenders()
    for _ in range(1000):
        offenders.note("10.0.0.1", 100.0)
    assert [offenders.leniency("10.0.0.1", 100.0 + t) for t in (0, 10, 20, 30, 41)] == [1 / 16, 1 / 16, 1 / 4, 1 / 2, 1.0]


def test_the_table_is_bounded() -> None:
    offenders = Offenders()
    for number in range(5000):
        offenders.note(f"10.0.{number >> 8}.{number & 255}", 0.0)
        offenders.note("10.1.0.0", 0.0)  # goes on, so it is not the one that is forgotten
    assert len(offenders) == 4096
    assert offenders.leniency("10.0.0.0", 0.0) == 1.0
    assert offenders.leniency("10.0.19.135", 0.0) == 0.5
    assert offenders.leniency("10.1.0.0", 0.0) == 1 / 16


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_is_one_peer(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


def test_what_is_abuse() -> None:
    assert is_abuse(ProtocolError("too much", details={"http2_code": "ENHANCE_YOUR_CALM"}))
    assert not is_abuse(ProtocolError("wrong", details={"http2_code": "PROTOCOL_ERROR"}))
    assert not is_abuse(DynwireError("gone"))
