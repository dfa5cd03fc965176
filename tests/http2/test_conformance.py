"""Every conformance case on the native engine, which passes all, and on the h2 library, which has known deviations."""

from __future__ import annotations

from collections import Counter

import pytest

from . import cases, deviations
from .peer import Case


def parameters(engine: str, deviating: bool) -> list[object]:
    return [
        pytest.param(case, role, id=case.id)
        for role, collection in cases.ROLES.items()
        for case in collection
        if (engine == "h2" and case.id in deviations.H2) is deviating
    ]


@pytest.mark.parametrize(("case", "role"), parameters("native", deviating=False))
def test_native(case: Case, role: str) -> None:
    cases.run(case, role, "native")


@pytest.mark.parametrize(("case", "role"), parameters("h2", deviating=False))
def test_h2(case: Case, role: str) -> None:
    cases.run(case, role, "h2")


@pytest.mark.parametrize(("case", "role"), parameters("h2", deviating=True))
def test_h2_deviates(case: Case, role: str) -> None:
    """As strict as an expected failure: if h2 begins to pass, the case has to leave the list."""
    with pytest.raises(AssertionError, match="the endpoint sent"):
        cases.run(case, role, "h2")


def test_deviations_name_existing_cases() -> None:
    known = {case.id for collection in cases.ROLES.values() for case in collection}
    assert set(deviations.H2) - known == set()
    listed = [case for collection in deviations.BY_REASON.values() for case in collection]
    assert [case for case, count in Counter(listed).items() if count > 1] == []


SERVER_SECTIONS = {
    "generic": {
        "1": 1, "2": 5, "3.1": 3, "3.2": 3, "3.3": 5, "3.4": 1, "3.5": 1, "3.7": 1, "3.8": 1, "3.9": 2, "3.10": 2, "4": 4,
        "5": 15,
    },
    "http2": {
        "3.5": 2, "4.1": 3, "4.2": 3, "4.3": 3, "5.1": 13, "5.1.1": 2, "5.1.2": 1, "5.3.1": 2, "5.4.1": 2, "5.5": 2, "6.1": 3,
        "6.2": 4, "6.3": 2, "6.4": 3, "6.5": 3, "6.5.2": 5, "6.5.3": 2, "6.7": 4, "6.8": 1, "6.9": 3, "6.9.1": 3, "6.9.2": 3,
        "6.10": 6, "7": 2, "8.1": 1, "8.1.2": 1, "8.1.2.1": 4, "8.1.2.2": 2, "8.1.2.3": 7, "8.1.2.6": 2, "8.2": 1,
    },
    "hpack": {"2.3.3": 2, "4.2": 1, "5.2": 3, "6.1": 1, "6.3": 1},
}  # fmt: skip
"""how many cases h2spec has in each of its sections"""


def test_no_section_is_forgotten() -> None:
    """A case may not vanish unnoticed: the sections of h2spec are complete, and numbers are used once."""
    found = Counter(case.id.rpartition("/")[0] for case in cases.SERVER)
    expected = {f"{suite}/{section}": count for suite, sections in SERVER_SECTIONS.items() for section, count in sections.items()}
    assert {section: found[section] for section in expected} == expected
    assert sum(expected.values()) == 147
    assert len([case for case in cases.ROLES["client"] if not case.id.startswith("client/rfc9113/")]) >= 57
    every = [case.id for collection in cases.ROLES.values() for case in collection]
    assert len(set(every)) == len(every)


def test_a_wrong_endpoint_fails() -> None:
    """The verdicts can fail: a server that is asked for too much, and one that does not answer."""
    with pytest.raises(AssertionError, match="expected GOAWAY"):
        cases.run(Case("x", "", "", lambda p: (p.handshake(), p.connection_error(1))), "server", "native")
    with pytest.raises(AssertionError, match=r"expected RST_STREAM\(1, CANCEL\); the endpoint sent .*GOAWAY"):
        cases.run(Case("x", "", "", lambda p: (p.handshake(), p.send(p.get(2)), p.stream_error(1, 8))), "server", "native")
    with pytest.raises(AssertionError, match=r"expected HEADERS on stream 1; the endpoint sent .*then silence"):
        cases.run(Case("x", "", "", lambda p: (p.handshake(), p.response(1))), "server", "native")
