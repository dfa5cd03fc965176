"""Writes docs/http2-conformance.md from the cases: ``python -m tests.http2.report``. A test checks that it is up to date."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h2

from . import cases, deviations
from .peer import Case

FILE = Path(__file__).parents[2] / "docs" / "http2-conformance.md"

HEAD = """\
# HTTP/2 conformance

Written by `python -m tests.http2.report`; do not edit. Every line is a test: `tests/http2/test_conformance.py`.

Each case talks to one connection in raw frames, as an outside conformance suite does, and looks at what comes back: the code of
RST_STREAM or GOAWAY where the RFC lays one down, one of several where it leaves a choice. Sections `generic`, `http2`, `hpack`
and `client` have the structure, numbering and at least the number of cases of h2spec (sections of RFC 7540, some of which RFC
9113 has dropped; the second column names today's). `rfc9113` and `rfc7541` go beyond it. Cases marked `s` can be seen from
outside and are run over TCP as well (`tests/http2/over_socket.py`).

`native` is dynwire's own engine; `h2` is the same interface over the library h2 {version}, which is `engine="h2"`.

"""


def outcome(case: Case, role: str, engine: str) -> bool:
    try:
        cases.run(case, role, engine)
    except AssertionError:
        return False
    return True


def render() -> str:
    return HEAD.format(version=h2.__version__) + "".join(f"{line}\n" for line in lines())


def lines() -> Iterator[str]:
    reasons = {reason: number for number, reason in enumerate(deviations.BY_REASON, 1)}
    results = {
        (role, case.id, engine): outcome(case, role, engine)
        for role, collection in cases.ROLES.items()
        for case in collection
        for engine in ("native", "h2")
    }
    passed = Counter((role, engine) for (role, _, engine), good in results.items() if good)
    yield "| role | cases | native | h2 |"
    yield "|---|---|---|---|"
    for role, collection in cases.ROLES.items():
        yield f"| {role} | {len(collection)} | {passed[role, 'native']} | {passed[role, 'h2']} |"
    yield ""
    yield f"Where h2 {h2.__version__} does something else, it"
    yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason};" if number < len(reasons) else f"{number}. {reason}."
    for role, collection in cases.ROLES.items():
        yield ""
        yield f"## {role.capitalize()}"
        yield ""
        yield "| case | section | requirement | | native | h2 |"
        yield "|---|---|---|---|---|---|"
        for case in collection:
            native = "pass" if results[role, case.id, "native"] else "**fail**"
            library = "pass" if results[role, case.id, "h2"] else f"no ({reasons.get(deviations.H2.get(case.id, ''), '?')})"
            requirement = case.requirement.replace("|", "\\|")
            over_tcp = "s" if role == "server" and case.socket else ""
            yield f"| {case.id} | {case.rfc} | {requirement} | {over_tcp} | {native} | {library} |"


if __name__ == "__main__":
    text = render()
    FILE.write_text(text)
    print(f"{FILE}: {text.count('| pass |')} lines", file=sys.stderr)
